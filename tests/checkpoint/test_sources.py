"""Models from where they are: the hub, run folders, Lightning's checkpoints; and traps."""

import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from conftest import golden

import fastconformer
from converters import nemo2st
from fastconformer.checkpoint import hub, nemo_archive
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.config import ModelConfig
from training.average import main as average

ROOT = Path(__file__).parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"
NEMO = golden("hybrid_tdt_ctc_bpe") / "model.nemo"


class NeMoConfig:
    """As NeMo pickles its settings into a checkpoint: of a class that is not here later."""

    def __init__(self):
        self.secret = [1, 2]


@pytest.fixture
def lightning(tmp_path):
    state = dict(read_checkpoint(NEMO).state_dict)
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    path = tmp_path / "last.ckpt"
    NeMoConfig.__module__ = "omegaconf.nowhere"
    sys.modules["omegaconf.nowhere"] = type(sys)("omegaconf.nowhere")
    sys.modules["omegaconf.nowhere"].NeMoConfig = NeMoConfig
    try:
        hyper = {"cfg": NeMoConfig()}
        content = {"epoch": 3, "state_dict": state, "optimizer_states": [], "hyper": hyper}
        torch.save(content, path)
    finally:
        del sys.modules["omegaconf.nowhere"]
    return path


def test_a_lightning_checkpoint(lightning, tmp_path, capsys):
    assert nemo2st.main([str(lightning), "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no config and no tokenizer" in err and "--like" in err
    arguments = [str(lightning), "--like", str(NEMO), "-o", str(tmp_path / "out")]
    assert nemo2st.main(arguments) == 0
    expected = read_checkpoint(NEMO).state_dict
    found = read_checkpoint(tmp_path / "out").state_dict
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    out = str(tmp_path / "mean")
    assert average([str(lightning), str(lightning), "--like", str(NEMO), "-o", out]) == 0
    fastconformer.load_model(tmp_path / "mean")
    assert nemo2st.main([str(lightning), "--like", str(BASE), "-o", out]) == 1
    assert "does not fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a whole model"):
        read_checkpoint(NEMO, NEMO)


def test_a_run_folder_means_its_best_model(tmp_path):
    model = fastconformer.load_model(NEMO)
    for name in ("last", "best"):
        model.save(tmp_path / name)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
    found = read_checkpoint(tmp_path).state_dict
    best = read_checkpoint(tmp_path / "best").state_dict
    name = next(name for name, _ in model.named_parameters())
    assert torch.equal(found[name], best[name])


def test_an_extracted_archive_is_named(tmp_path):
    with tarfile.open(NEMO) as tar:
        tar.extractall(tmp_path, filter="data")
    with pytest.raises(ValueError, match="is an extracted .nemo archive; pack it again: tar -cf"):
        fastconformer.load_model(tmp_path)


def test_counters_that_an_older_archive_lacks(tmp_path):
    checkpoint = read_checkpoint(NEMO)
    lacking = {k: v for k, v in checkpoint.state_dict.items() if "num_batches" not in k}
    assert len(lacking) < len(checkpoint.state_dict)
    torch.save(lacking, tmp_path / "old.ckpt")
    with tarfile.open(NEMO) as tar, tarfile.open(tmp_path / "old.nemo", "w") as old:
        for member in tar.getmembers():
            if member.name.endswith(".ckpt"):
                old.add(tmp_path / "old.ckpt", member.name)
            elif member.isfile():
                old.addfile(member, tar.extractfile(member))
    model = fastconformer.load_model(tmp_path / "old.nemo")
    assert model.state_dict().keys() == checkpoint.state_dict.keys()


def test_archives_of_adapter_training_without_adapters(tmp_path):
    checkpoint = read_checkpoint(NEMO)
    target = "nemo.collections.asr.modules.conformer_encoder.ConformerEncoderAdapter"
    checkpoint.config["encoder"]["_target_"] = target
    write_nemo(tmp_path / "a.nemo", checkpoint)
    fastconformer.load_model(tmp_path / "a.nemo")


def bomb(path: Path, members: list[tuple[str, bytes, int]]) -> Path:
    """A gzipped archive of (name, content, zeros behind it), whatever that is unpacked."""
    block = gzip.compress(bytes(1 << 20))
    with path.open("wb") as out:
        for name, content, n_zeros in members:
            header = tarfile.TarInfo(name)
            header.size = len(content) + n_zeros
            out.write(gzip.compress(header.tobuf() + content))
            out.write(block * (n_zeros >> 20))
            out.write(gzip.compress(bytes(n_zeros % (1 << 20) + -header.size % 512)))
        out.write(gzip.compress(bytes(1024)))
    return path


def parts_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.isfile()]
        return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in files}


def longest(kind: str) -> tuple[list, str]:
    """Members of a trap, and what is said of it."""
    parts = parts_of(NEMO)
    config, weights = parts.pop("model_config.yaml"), parts.pop("model_weights.ckpt")
    others = [(name, content, 0) for name, content in parts.items()]
    yaml = ("model_config.yaml", config, 0)
    inflated = ("model_weights.ckpt", weights, 40 << 20)
    if kind == "two gigabytes":
        return [yaml, *others, ("model_weights.ckpt", b"", 1 << 31)], "unpacks to 2048 MiB"
    if kind == "more than the config":
        return [yaml, *others, inflated], "unpacks to 41 MiB, .* 4 MiB, which its config allows"
    if kind == "weights first":
        return [inflated, yaml, *others], "unpacks to 41 MiB, .* 4 MiB, which its config allows"
    if kind == "many":
        return [*((f"{n}.bin", b"", 30 << 20) for n in range(9)), yaml], "refusing more than 4 MiB"
    if kind == "YAML":
        yaml = ("model_config.yaml", config + b"more: [" + b"0," * (4 << 20) + b"0]\n", 0)
        return [yaml, *others, ("model_weights.ckpt", weights, 0)], "more than 500000 values"
    names = "\n".join(f"  path{n}: nemo:{n}.txt" for n in range(9))
    yaml = ("model_config.yaml", config + f"\nmore:\n{names}\n".encode(), 0)
    files = [(f"{n}.txt", os.urandom(3 << 20), 29 << 20) for n in range(9)]
    return [yaml, *others, *files, ("model_weights.ckpt", weights, 0)], "tokenizers unpack to 288"


@pytest.mark.parametrize(
    "kind",
    ["two gigabytes", "more than the config", "weights first", "many", "YAML", "tokenizers"],
)
def test_a_bomb_does_not_fill_the_disk(tmp_path, monkeypatch, kind):
    members, said = longest(kind)
    path = bomb(tmp_path / "bomb.nemo", members)
    written = []
    extract = nemo_archive._extract
    monkeypatch.setattr(
        nemo_archive, "_extract", lambda *args: (written.append(args[1].size), extract(*args))
    )
    with pytest.raises(ValueError, match=said):
        fastconformer.load_model(path)
    assert sum(written) <= len(members[0][1])  # the config, at most


def test_a_long_header_is_no_bomb(tmp_path):
    """tarfile reads one whole, into memory."""
    header = tarfile.TarInfo("more")
    header.size, header.type = 1 << 30, tarfile.XHDTYPE
    path = tmp_path / "bomb.nemo"
    path.write_bytes(gzip.compress(header.tobuf()) + gzip.compress(bytes(1 << 20)) * 1024)
    with pytest.raises(ValueError, match="refusing a header of 1048576 KiB"):
        fastconformer.load_model(path)


@pytest.mark.parametrize("weights_first", [False, True])
def test_weights_of_zeros_are_no_bomb(tmp_path, weights_first):
    """They are packed to a hundredth, and not to more than the model has."""
    checkpoint = read_checkpoint(NEMO)
    for tensor in checkpoint.state_dict.values():
        tensor.zero_()
    write_nemo(tmp_path / "plain.nemo", checkpoint)
    parts = [(name, content, 0) for name, content in parts_of(tmp_path / "plain.nemo").items()]
    parts.sort(key=lambda part: part[0].endswith(".ckpt") != weights_first)
    path = bomb(tmp_path / "zeros.nemo", parts)
    assert path.stat().st_size < (tmp_path / "plain.nemo").stat().st_size / 5
    model = fastconformer.load_model(path)
    assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize(
    "archive",
    [BASE, *sorted((ROOT / "tests" / "golden").glob("*/*.nemo"))],
    ids=lambda p: p.parent.name,
)
def test_a_config_tells_how_large_its_weights_are(archive):
    checkpoint = read_checkpoint(archive)
    n = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    assert n <= ModelConfig.from_nemo(checkpoint.config).most_weights <= 1.8 * n


# --- the hub -----------------------------------------------------------------------------------

SHA = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of huggingface.co for a model."""

    repos: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    token = "Bearer right"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer()

    def answer(self, body=True):
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), (parts[5:] or ["main"])[0]
            name = None
        else:
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo.startswith("private/") and self.headers.get("Authorization") != self.token:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.repos.get(repo)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", SHA):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if name is None:
            siblings = [{"rfilename": f} for f in files]
            info = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings, "tags": []}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if name not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(200, content, {"ETag": etag, "X-Repo-Commit": SHA}, body)

    def send(self, status, content, headers, body=True):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("huggingface_hub")
    folder = tmp_path / "folder"
    fastconformer.load_model(NEMO).save(folder)
    archive = NEMO.read_bytes()
    Hub.repos = {
        "some/nemo": {"README.md": b"#", "nemo.nemo": archive},
        "some/two": {"a.nemo": archive, "b.nemo": archive},
        "some/folder": {p.name: p.read_bytes() for p in folder.iterdir()},
        "some/empty": {"README.md": b"#"},
        "private/nemo": {"x.nemo": archive},
    }
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def load(model, server, cache, **environment):
    """(status, what it says) of loading in a process of its own: the library reads its settings
    when it is imported."""
    settings = {"HF_ENDPOINT": server, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [sys.executable, "-m", "fastconformer", "transcribe", "--model", model]
    done = subprocess.run(
        [*command, str(ROOT / "samples" / "jfk.flac")],
        env=kept | settings | environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("transcribe:")]
    return done.returncode, done.stdout or "\n".join(lines) or done.stderr


def test_models_of_the_hub(server, tmp_path):
    cache = tmp_path / "cache"
    status, text = load("some/nemo", server, cache)
    assert status == 0, text
    assert load("some/folder", server, cache) == (0, text)
    n_downloads = sum("GET /some/nemo/resolve" in line for line in Hub.asked)
    assert n_downloads == 1 and load("some/nemo@v1", server, cache) == (0, text)
    assert sum("GET /some/nemo/resolve" in line for line in Hub.asked) == 1  # from the cache
    before = len(Hub.asked)
    for name in ("some/nemo", "some/folder"):
        assert load(name, server, cache, HF_HUB_OFFLINE="1") == (0, text)
    assert len(Hub.asked) == before
    status, line = load("some/unseen", server, cache, HF_HUB_OFFLINE="1")
    assert status == 1 and "is not in the cache, and the hub is offline" in line
    assert load("private/nemo", server, cache, HF_TOKEN="right")[0] == 0


@pytest.mark.parametrize(
    ("model", "environment", "words"),
    [
        ("some/gone", {}, "no such model or revision (404)"),
        ("some/nemo@v9", {}, "no such model or revision (404)"),
        ("some/two", {}, "some/two holds a.nemo, b.nemo; download one"),
        ("some/empty", {}, "holds neither a .nemo archive nor config.json"),
        ("private/nemo", {"HF_TOKEN": "wrong"}, "access refused (401)"),
        ("some/nemo", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses(server, tmp_path, model, environment, words):
    status, line = load(model, server, tmp_path / "cache", **environment)
    assert status == 1 and words in line and line.count("\n") == 0


def test_names_of_the_hub_and_paths(tmp_path, monkeypatch):
    assert hub.is_hub_id("nvidia/parakeet-tdt-0.6b-v3") and hub.is_hub_id("a/b@refs/pr/1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/finetune", "models/x.nemo", "plain", "/a/b", "a/b/c", "../a"):
        assert not hub.is_hub_id(path), path
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "fastconformer\[hub\]"'):
        fastconformer.load_model("nvidia/parakeet-tdt-0.6b-v3")
    with pytest.raises(FileNotFoundError, match="no such .nemo file"):
        fastconformer.load_model("models/x.nemo")


def test_bytes_are_enough():
    """An archive that ends with a zip is no Lightning checkpoint."""
    buffer = io.BytesIO(NEMO.read_bytes())
    assert buffer.read(4) != b"PK\3\4"
    read_checkpoint(NEMO)


def test_checkpoints_that_torch_cannot_map(tmp_path):
    """One cut short and one of an old torch are said to be that, with and without `like`."""
    weights, path = {"state_dict": {"a": torch.ones(9)}}, tmp_path / "last.ckpt"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-99])
    for like in (None, NEMO):
        with pytest.raises(ValueError, match="last.ckpt is cut short"):
            read_checkpoint(path, like)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"in torch's format of before 1\.6; torch\.save it anew"):
        read_checkpoint(path, NEMO)
