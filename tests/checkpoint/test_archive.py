"""The archive and the folder: there and back, the forms that NeMo has written, bad input."""

import gzip
import io
import itertools
import math
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
import yaml
from conftest import golden
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastconformer.checkpoint.contents import Checkpoint, check_finite
from fastconformer.checkpoint.folder import write_folder
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.checkpoint.yaml_config import dump_config, load_config

CASES = [
    "ctc_bpe/model.nemo",
    "rnnt_bpe/model.nemo",
    "tdt_bpe/model.nemo",
    "hybrid_tdt_ctc_bpe/model.nemo",
    "hybrid_rnnt_ctc_bpe/model.nemo",
    "local_attn_g0/model.nemo",
    "local_attn_g1/model.nemo",
    "train_parity/model.nemo",
    "birwkv7_encoder/model.nemo",
    "vocab_expansion/model_before.nemo",
    "vocab_expansion/model_after.nemo",
]
HEX = "0123456789abcdef" * 2
CONFIG = {"target": "nemo.Model", "tokenizer": {"model_path": f"nemo:{HEX}_tokenizer.model"}}
WEIGHTS = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "encoder.steps": torch.tensor(7)}


def saved(state, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def members(config=CONFIG, weights=WEIGHTS, **files) -> dict[str, bytes]:
    """The usual members; a keyword adds or replaces one."""
    found = {
        f"{HEX}_tokenizer.model": b"pieces",
        "model_config.yaml": config
        if isinstance(config, bytes)
        else yaml.safe_dump(config, sort_keys=False).encode(),
        "model_weights.ckpt": weights if isinstance(weights, bytes) else saved(weights),
    }
    return found | files


def archive(path, files, prefix="./", mode="w:", extra=()):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def same_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert (
            tensor.contiguous()
            .view(torch.uint8 if tensor.dim() else tensor.dtype)
            .equal(b[name].contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype))
        ), name


# there and back


@pytest.mark.parametrize("case", CASES)
def test_golden_there_and_back(case, tmp_path):
    source, name = case.split("/")
    path = golden(source) / name
    first = read_checkpoint(path)
    write_folder(tmp_path / "folder", first)
    second = read_checkpoint(tmp_path / "folder")
    write_nemo(tmp_path / "again.nemo", second)
    third = read_checkpoint(tmp_path / "again.nemo")
    assert sorted(os.listdir(tmp_path / "folder")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer.vocab",
        "vocab.txt",
    ]
    for other in (second, third):
        assert other.config == first.config
        assert other.tokenizer_files == first.tokenizer_files
        same_tensors(first.state_dict, other.state_dict)
    with tarfile.open(path) as tar:
        weights = tar.extractfile("./model_weights.ckpt").read()
    same_tensors(torch.load(io.BytesIO(weights), weights_only=True), first.state_dict)
    assert first.dropped == ()


@pytest.mark.parametrize("case", CASES[:4])
def test_omegaconf_reads_ours_as_we_read_nemos(case, tmp_path):
    omegaconf = pytest.importorskip("omegaconf").OmegaConf
    source, name = case.split("/")

    def by_omegaconf(path):
        with tarfile.open(path) as tar:
            text = tar.extractfile("./model_config.yaml").read().decode()
        return text, omegaconf.to_container(omegaconf.create(text), resolve=True)

    text, expected = by_omegaconf(golden(source) / name)
    assert load_config(text.encode()) == expected
    checkpoint = read_nemo(golden(source) / name)
    write_nemo(tmp_path / "ours.nemo", checkpoint)
    _, ours = by_omegaconf(tmp_path / "ours.nemo")
    for config in (expected, ours):
        for key in ("model_path", "vocab_path", "spe_tokenizer_vocab"):
            base = config["tokenizer"][key].removeprefix("nemo:")
            assert base[:32].isalnum() and base[32] == "_"
            config["tokenizer"][key] = base[33:]
    assert ours == expected


@pytest.mark.parametrize("prefix", ["./", "", ".//./"])
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_forms_of_tar(tmp_path, prefix, mode):
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    path = archive(tmp_path / "a.nemo", members(), prefix, mode, [folder])
    checkpoint = read_checkpoint(path)
    assert checkpoint.tokenizer_files == {"tokenizer.model": b"pieces"}
    assert checkpoint.config["tokenizer"]["model_path"] == "nemo:tokenizer.model"
    same_tensors(WEIGHTS, checkpoint.state_dict)


def test_files_under_any_key_and_colliding_names(tmp_path):
    config = {
        "tokenizer": {
            "type": "agg",
            "langs": {
                "en": {
                    "model_path": f"nemo:{'a' * 32}_tokenizer.model",
                    "other": "nemo:./sub/x.txt",
                },
                "es": {"model_path": f"nemo:{'b' * 32}_tokenizer.model"},
                "de": {"model_path": f"nemo:{'b' * 32}_tokenizer.model"},
            },
        },
        "prompts": [{"file": "nemo:config.json"}],
        "aux": {"ctc": {"lm": f"nemo:{'c' * 32}_Tokenizer.model"}},
        "vocabulary": ["nemo:", "nemo:piece"],
    }
    files = {
        f"{'a' * 32}_tokenizer.model": b"en",
        f"{'b' * 32}_tokenizer.model": b"es",
        f"{'c' * 32}_Tokenizer.model": b"lm",
        "sub/x.txt": b"x",
        "config.json": b"prompt",
        "unused.bin": b"-",
    }
    checkpoint = read_nemo(archive(tmp_path / "a.nemo", files | members(config)))
    assert checkpoint.tokenizer_files == {
        "tokenizer.model": b"en",
        "x.txt": b"x",
        "tokenizer_2.model": b"es",
        "config_2.json": b"prompt",
        "Tokenizer_3.model": b"lm",
    }
    langs = checkpoint.config["tokenizer"]["langs"]
    assert langs["es"] == langs["de"] == {"model_path": "nemo:tokenizer_2.model"}
    assert checkpoint.config["vocabulary"] == ["nemo:", "nemo:piece"]
    assert checkpoint.dropped == ("unused.bin", f"{HEX}_tokenizer.model")
    write_folder(tmp_path / "f", checkpoint)
    write_nemo(tmp_path / "b.nemo", read_checkpoint(tmp_path / "f"))
    again = read_checkpoint(tmp_path / "b.nemo")
    assert again.config == checkpoint.config
    assert again.tokenizer_files == checkpoint.tokenizer_files


def test_tensors_of_every_kind_survive(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "half": torch.randn(3, 5).half(),
        "bf16": torch.randn(7).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(3.25),
        "num_batches_tracked": torch.tensor(2**40),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "tied": base,
        "tied_too": base,
        "view": base[1:3],
        "transposed": base.t(),
        "needs_grad": torch.nn.Parameter(torch.ones(2)),
        "negative_zero": torch.tensor([-0.0, 1e-42]),
    }
    checkpoint = Checkpoint({"target": "x"}, tensors, {})
    write_folder(tmp_path / "f", checkpoint)
    write_nemo(tmp_path / "a.nemo", checkpoint)
    same_tensors(tensors, read_checkpoint(tmp_path / "f").state_dict)
    same_tensors(tensors, read_checkpoint(tmp_path / "a.nemo").state_dict)
    assert torch.equal(tensors["tied"], base)


def test_tied_weights_of_an_archive_survive(tmp_path):
    tied = torch.randn(3)
    path = archive(tmp_path / "a.nemo", members(weights={"a": tied, "b": tied, "c": tied[:2]}))
    checkpoint = read_checkpoint(path)
    write_folder(tmp_path / "f", checkpoint)
    same_tensors({"a": tied, "b": tied, "c": tied[:2]}, read_checkpoint(tmp_path / "f").state_dict)


def test_old_weights_format_is_read(tmp_path, caplog):
    weights = saved(WEIGHTS, _use_new_zipfile_serialization=False)
    checkpoint = read_checkpoint(archive(tmp_path / "a.nemo", members(weights=weights)))
    same_tensors(WEIGHTS, checkpoint.state_dict)
    assert "old format" in caplog.text


def test_compressed_zip_is_not_mapped(tmp_path):
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.namelist():
            target.writestr(record, source.read(record))
    path = archive(tmp_path / "a.nemo", members(weights=packed.getvalue()))
    same_tensors(WEIGHTS, read_checkpoint(path).state_dict)


def test_changing_a_tensor_leaves_the_files_alone(tmp_path):
    path = archive(tmp_path / "a.nemo", members())
    write_folder(tmp_path / "f", read_checkpoint(path))
    for source in (path, tmp_path / "f"):
        read_checkpoint(source).state_dict["encoder.weight"].fill_(9)
        same_tensors(WEIGHTS, read_checkpoint(source).state_dict)


def test_same_checkpoint_same_bytes_and_usual_permissions(tmp_path):
    checkpoint = read_nemo(archive(tmp_path / "a.nemo", members()))
    old = os.umask(0o022)
    try:
        for name in ("b.nemo", "elsewhere.nemo"):
            write_nemo(tmp_path / name, checkpoint)
        write_folder(tmp_path / "f", checkpoint)
    finally:
        os.umask(old)
    assert (tmp_path / "b.nemo").read_bytes() == (tmp_path / "elsewhere.nemo").read_bytes()
    for path in [tmp_path / "b.nemo", *(tmp_path / "f").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
    with tarfile.open(tmp_path / "b.nemo", "r:") as tar:
        assert tar.getnames()[0] == "./model_config.yaml"
        assert tar.getnames()[-1] == "./model_weights.ckpt"
        assert {(m.mtime, m.uid, m.gid) for m in tar} == {(0, 0, 0)}
        weights = zipfile.ZipFile(io.BytesIO(tar.extractfile("./model_weights.ckpt").read()))
    assert weights.namelist()[0].startswith("model_weights/")


def test_existing_folder_keeps_its_other_files(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "config.json").write_text("old")
    write_folder(folder, Checkpoint({"a": 1}, WEIGHTS, {}))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_checkpoint(folder).config == {"a": 1}


def test_failed_write_leaves_what_was_there(tmp_path):
    good = Checkpoint({"a": 1}, WEIGHTS, {})
    # safetensors has no such dtype, torch.save has no such object: both fail halfway
    bad = Checkpoint({"a": 2}, {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    worse = Checkpoint({"a": 2}, {"x": torch.zeros(2, device="meta")}, {})
    write_folder(tmp_path / "f", good)
    write_nemo(tmp_path / "a.nemo", good)
    before = (tmp_path / "a.nemo").read_bytes()
    for folder in ("f", "new"):
        with pytest.raises((ValueError, KeyError, NotImplementedError)):
            write_folder(tmp_path / folder, bad)
    with pytest.raises((ValueError, NotImplementedError)):
        write_nemo(tmp_path / "a.nemo", worse)
    assert sorted(os.listdir(tmp_path)) == ["a.nemo", "f"]
    assert sorted(os.listdir(tmp_path / "f")) == ["config.json", "model.safetensors"]
    assert (tmp_path / "a.nemo").read_bytes() == before
    assert read_checkpoint(tmp_path / "f").config == {"a": 1}


def test_what_a_killed_run_left_is_cleared(tmp_path):
    good = Checkpoint({"a": 1}, WEIGHTS, {})
    write_folder(tmp_path / "f", good)
    for left in (tmp_path / "f" / ".f.tmp", tmp_path / ".new.tmp", tmp_path / ".a.nemo.tmp"):
        left.mkdir()
        (left / "model_weights.ckpt").write_bytes(b"half")
    for folder in ("f", "new", "deep/er"):
        write_folder(tmp_path / folder, good)
        assert sorted(os.listdir(tmp_path / folder)) == ["config.json", "model.safetensors"]
    write_nemo(tmp_path / "a.nemo", good)
    write_nemo(tmp_path / "deeper" / "still" / "a.nemo", good)
    assert sorted(os.listdir(tmp_path)) == ["a.nemo", "deep", "deeper", "f", "new"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (Checkpoint({"t": {"p": "nemo:a"}}, WEIGHTS, {}), "t.p names a"),
        (Checkpoint({}, WEIGHTS, {"a": b""}), "tokenizer file a"),
        (Checkpoint({"p": "nemo:../a"}, WEIGHTS, {"../a": b""}), "plain file name"),
        (Checkpoint({"p": "nemo:config.json"}, WEIGHTS, {"config.json": b""}), "plain file name"),
    ],
)
def test_files_that_do_not_match_are_not_written(tmp_path, checkpoint, message):
    for write, target in ((write_folder, "f"), (write_nemo, "a.nemo")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / target, checkpoint)
    assert os.listdir(tmp_path) == []


def test_json_refuses_what_it_cannot_hold(tmp_path):
    for config, message in (({1: "a"}, "key 1"), ({"a": [b"x"]}, "a.0 is a bytes")):
        with pytest.raises(ValueError, match=message):
            write_folder(tmp_path / "f", Checkpoint(config, WEIGHTS, {}))
    with pytest.raises(ValueError, match="is a file"):
        (tmp_path / "file").touch()
        write_folder(tmp_path / "file", Checkpoint({}, WEIGHTS, {}))


# YAML and interpolations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("-1E+5", -1e5),
        ("1.0e-05", 1e-5),
        ("-.inf", -math.inf),
        ("'1e-5'", "1e-5"),
        ("on", True),
        ("'on'", "on"),
        ("2024-01-02", "2024-01-02"),
        ("'n'", "n"),
        ("-.5", "-.5"),
        ("0x1F", 31),
        ("~", None),
        ("!", ""),
        ("'!'", "!"),
    ],
)
def test_scalars(text, expected):
    value = load_config(f"a: {text}".encode())["a"]
    assert value == expected and type(value) is type(expected)


NUMBERS = st.from_regex(r"\A[-+]?[0-9_.:]{0,6}([eE][-+]?[0-9]{0,3})?\Z")
WORDS = ["on", "Yes", "off", "null", "~", "1e-5", "${", "${a}", r"\${a}", "\\", "???", "=", "<<"]
WORDS += ["2024-01-01", "1:30", "0o7", ".inf", ".nan", "-", "- a", "a: b", "#x", "\x85", "\ufeff"]
STRINGS = st.one_of(st.text(max_size=12), st.sampled_from(WORDS), NUMBERS)
VALUES = st.recursive(
    st.one_of(
        STRINGS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), NUMBERS
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(STRINGS.filter(lambda key: key != "model"), VALUES, max_size=4))
@example({"a": ["${b}", "\\\\${b}", "x\\"], "1e5": "on", "": {"n": "1_0"}, "b": "\x85"})
def test_config_there_and_back(config):
    config = {"target": "x", **config}
    assert load_config(dump_config(config)) == config
    omegaconf = pytest.importorskip("omegaconf").OmegaConf
    loaded = omegaconf.create(dump_config(config).decode())
    assert omegaconf.to_container(loaded, resolve=True) == config


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(STRINGS, VALUES, max_size=4))
def test_config_survives_the_folder(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    config = {key: value for key, value in config.items() if "nemo:" not in repr(value)}
    write_folder(folder, Checkpoint(config, WEIGHTS, {}))
    assert read_checkpoint(folder).config == config


def test_interpolations_of_every_form():
    config = load_config(
        rb"""
sample_rate: 16000
sizes: {width: 1e-5, list: [3, {deep: yes}], all: "${.list}", up: "${..sample_rate}"}
which: width
chain: ${link}
link: ${sizes.width}
through: ${alias.list[1].deep}
alias: ${sizes}
text: rate ${ sample_rate }/${sizes.list.0} ${sizes[list][1][deep]}
nested: ${sizes.${which}}
nothing: ${none}
none: null
literal: \${sample_rate} \\${which}
missing: ???
model_path: C:\dir\x
"""
    )
    deep = [3, {"deep": True}]
    sizes = {"width": 1e-5, "list": deep, "all": deep, "up": 16000}
    assert config["sizes"] == config["alias"] == sizes
    assert config["chain"] == config["nested"] == 1e-5 and config["through"] is True
    assert config["text"] == "rate 16000/3 True"
    assert config["nothing"] is None and config["missing"] == "???"
    assert config["literal"] == r"${sample_rate} \width"
    assert config["model_path"] == r"C:\dir\x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: ${oc.env:HOME}", r"a: \$\{oc\.env:HOME\} calls a resolver"),
        ("a: {b: 'x${f:1}'}", r"a\.b: \$\{f:1\} calls a resolver"),
        ("a: ${b}\nb: ${c}\nc: ${a}", r"cycle a -> b -> c -> a"),
        ("a: {b: '${a}'}", r"cycle a -> a\.b -> a|cycle a"),
        ("a: ${b.x}\nb: ${c.x}\nc: ${b.y}", r"cycle"),
        ("a: ${b.c}\nb: {d: 1}", r"a: \$\{b\.c\} does not exist: no c in b"),
        ("a: ${b.1}\nb: [1]", "no 1 in b"),
        ("a: ${..b}\nb: 1", "above the top"),
        ("a: ${b", r"without its }"),
        ("a: ${}", "not an interpolation"),
        ("a: ${b c}", "not an interpolation"),
        ("a: ${b}\nb: ???", r"missing value"),
        ("a: x${b}\nb: {c: 1}", "mapping or list into a string"),
        ("a: 1\na: 2", "key 'a' appears twice"),
        ("- a", "not a mapping"),
        ("", "not a mapping"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("a: !!set {x}", "a is a set"),
        ("a: &x [*x]", "nested too deeply or contains itself"),
        ("a: " + "[" * 200_000, "nested too deeply|maximum nesting depth"),  # the latter PyYAML's
        ("- " * 200_000, "nested too deeply"),
        ("\x00", "not YAML"),
    ],
)
def test_bad_configs_are_named(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(text.encode())
    assert "\n" not in str(caught.value)


def test_config_cannot_grow_without_bound():
    names = "abcdefghijkl"
    aliases, links, strings = (["a: &a [" + "x, " * 10 + "]"], ["a: [x]"], ["a: xxxxxxxxxx"])
    for before, name in itertools.pairwise(names):
        aliases.append(f"{name}: &{name} [" + f"*{before}, " * 10 + "]")
        links.append(f"{name}: [" + f'"${{{before}}}", ' * 10 + "]")
        strings.append(f"{name}: " + f"${{{before}}}" * 10)
    for lines in (aliases, links, strings):
        with pytest.raises(ValueError, match="expands to"):
            load_config("\n".join(lines).encode())


PIECES = [
    r"${a}",
    "${b.x}",
    "${.y}",
    "\\",
    "\\\\",
    "x",
    "}",
    "{",
    "$",
    "${l[0]}",
    "${l.1}",
    "${ a }",
]
PIECES += ["${b.${k}}", "${b.z.w}", " ", "'", ":", "${b[y]}", "${..a}", r"\${", ".", "${b.q.w}"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)


@settings(deadline=None, max_examples=300)
@given(
    a=TEXT | st.just(1e-5), k=st.sampled_from(["x", "y", "z.w"]), x=TEXT, y=TEXT, w=TEXT, last=TEXT
)
def test_interpolations_agree_with_omegaconf(a, k, x, y, w, last):
    omegaconf = pytest.importorskip("omegaconf")
    b = {"x": x, "y": y, "z": {"w": w}, "q": "${.z}"}
    config = {"a": a, "k": k, "b": b, "l": [last, 3]}
    text = yaml.safe_dump(config)
    try:
        loaded = omegaconf.OmegaConf.create(text)
        expected = omegaconf.OmegaConf.to_container(loaded, resolve=True)
    except omegaconf.errors.OmegaConfBaseException:
        with pytest.raises(ValueError, match="model_config.yaml: "):
            load_config(text.encode())
    else:
        assert load_config(text.encode()) == expected


def test_a_training_configs_model_section_is_the_config():
    config = load_config(b"name: n\nmodel: {a: '${name}', b: '${model.a}'}")
    assert config == {"a": "n", "b": "n"}


# bad archives


def refused(path, message, error=ValueError):
    """read_checkpoint raises one line that names the file."""
    with pytest.raises(error, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil-absolute"])
def test_members_that_point_outside_are_refused(tmp_path, name):
    member = tarfile.TarInfo(name)
    (tmp_path / "inner").mkdir()
    path = archive(tmp_path / "inner" / "a.nemo", members(), extra=[member])
    refused(path, f"refusing member '{name}'")
    assert os.listdir(tmp_path) == ["inner"] and os.listdir(tmp_path / "inner") == ["a.nemo"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_members_that_are_not_files_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("./link")
    member.type, member.linkname = kind, "model_config.yaml"
    refused(archive(tmp_path / "a.nemo", members(), extra=[member]), "refusing member './link'")


def test_a_member_twice_is_refused(tmp_path):
    twice = tarfile.TarInfo("model_config.yaml")
    refused(archive(tmp_path / "a.nemo", members(), extra=[twice]), "appears twice")


class _Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "whole"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, form):
    sentinel = tmp_path / "sentinel"
    evil = _Evil(f"touch {sentinel}")
    weights = {
        "zip": lambda: saved({"a": torch.ones(1), "b": evil}),
        "legacy": lambda: saved({"b": evil}, _use_new_zipfile_serialization=False),
        "bare": lambda: pickle.dumps(evil),
        "whole": lambda: saved(evil),
    }[form]()
    refused(archive(tmp_path / "a.nemo", members(weights=weights)), "refusing model_weights.ckpt")
    assert not sentinel.exists()


def test_what_the_pickle_asks_for_is_named(tmp_path):
    weights = saved({"a": _Evil("true")})
    refused(archive(tmp_path / "a.nemo", members(weights=weights)), r"posix\.system")


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_truncated_anywhere(tmp_path, mode):
    whole = archive(tmp_path / "a.nemo", members(), mode=mode).read_bytes()
    path = tmp_path / "cut.nemo"
    read = 0
    for length in sorted({*range(0, len(whole), 97), *range(0, len(whole), 512), len(whole) - 1}):
        path.write_bytes(whole[:length])
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # only the empty blocks at the end of the tar are missing
            read += 1
            same_tensors(WEIGHTS, checkpoint.state_dict)
            assert checkpoint.tokenizer_files == {"tokenizer.model": b"pieces"}
            assert len(whole) - length <= tarfile.RECORDSIZE
    assert read < 200


def test_damaged_anywhere(tmp_path):
    """A flipped byte either does not matter to the structure or gives one line; never another
    kind of error."""
    whole = archive(tmp_path / "a.nemo", members()).read_bytes()
    path = tmp_path / "damaged.nemo"
    refusals = 0
    for position in range(0, len(whole), 41):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read_checkpoint(path)
        except ValueError as error:
            refusals += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refusals > 10


@pytest.mark.parametrize(
    "content",
    [b"", b"not a tar" * 1000, b"PK\x03\x04" + bytes(2000), gzip.compress(b"x" * 4000, mtime=0)],
)
def test_not_a_tar(tmp_path, content):
    path = tmp_path / "a.nemo"
    path.write_bytes(content)
    refused(path, "truncated or not a tar archive|no model_config.yaml")


def test_missing_parts_are_named(tmp_path):
    refused(tmp_path / "none.nemo", "no such", FileNotFoundError)
    for name, message in (
        ("model_config.yaml", "no model_config.yaml at the top"),
        ("model_weights.ckpt", "no model_weights.ckpt at the top"),
        (f"{HEX}_tokenizer.model", f"tokenizer.model_path names {HEX}_tokenizer.model"),
    ):
        files = members()
        del files[name]
        refused(archive(tmp_path / "a.nemo", files), message)
    no_tokenizer = members({"target": "x", "tokenizer": {"type": "bpe", "dir": "somewhere"}})
    refused(archive(tmp_path / "a.nemo", no_tokenizer), "tokenizer names no file")
    weights = members({"tokenizer": {"model_path": "nemo:model_weights.ckpt"}})
    refused(archive(tmp_path / "a.nemo", weights), "the archive does not hold")
    outside = members({"tokenizer": {"model_path": "nemo:../../etc/passwd"}})
    refused(archive(tmp_path / "a.nemo", outside), "the archive does not hold")


@pytest.mark.parametrize("name", ["model_weights/metadata.json", "mp_rank_00/model_weights.ckpt"])
def test_sharded_weights_are_named(tmp_path, name):
    files = members()
    files[name] = files.pop("model_weights.ckpt")
    refused(archive(tmp_path / "a.nemo", files), f"sharded or distributed .{name}")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), "holds a Tensor"),
        ({}, "expected tensors by name"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
        ({"a": torch.ones(1).expand(1 << 40)}, "a is larger than its data"),
        ({"a": torch.ones(2).to_sparse()}, "a is not dense"),
        (b"nothing", "model_weights.ckpt"),
        (b"", "model_weights.ckpt"),
    ],
)
def test_bad_weights(tmp_path, weights, message):
    refused(archive(tmp_path / "a.nemo", members(weights=weights)), message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
)
def test_not_finite_weights_are_named(tmp_path, value, dtype):
    bad = torch.zeros(3, 4, dtype=dtype)
    bad[1, 2] = value
    state = {"good": torch.full((5,), 3e38), "empty": torch.zeros(0), "bad": bad.t(), "n": bad}
    with pytest.raises(ValueError, match="tensor bad holds NaN or infinity"):
        check_finite(state)
    path = archive(tmp_path / "a.nemo", members(weights=state))
    refused(path, "tensor bad holds NaN or infinity")
    if dtype == torch.float32:
        write_folder(tmp_path / "f", read_nemo(path))
        refused(tmp_path / "f", "holds NaN or infinity")


# bad folders


def test_bad_folders_are_named(tmp_path):
    folder = tmp_path / "f"
    config = {"tokenizer": {"model_path": "nemo:tokenizer.model"}}
    write_folder(folder, Checkpoint(config, WEIGHTS, {"tokenizer.model": b"x"}))
    good = (folder / "config.json").read_text()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("../secret", str(secret), "..", "", "model.safetensors"):
        (folder / "config.json").write_text(good.replace("nemo:tokenizer.model", f"nemo:{name}"))
        refused(folder, "not a plain file name")
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "format_version is None"),
        (good.replace('"format_version": 1', '"format_version": 2'), "format_version is 2"),
        (good.replace("nemo_config", "other"), "under nemo_config"),
        (good.replace("nemo:tokenizer.model", "nemo:gone.model"), "holds no gone.model"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, message)
    (folder / "config.json").write_text(good)
    weights = (folder / "model.safetensors").read_bytes()
    for length in (0, 4, 40, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        refused(folder, "damaged or truncated")
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no model.safetensors")
    refused(tmp_path / "gone", "no such", FileNotFoundError)


def test_a_folder_of_links_is_read(tmp_path):
    """As a hub's cache lays it out."""
    write_folder(tmp_path / "blobs", Checkpoint({"a": 1}, WEIGHTS, {}))
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert read_checkpoint(tmp_path / "links").config == {"a": 1}


# memory

MEASURE = """
import os, sys, torch
from fastconformer import checkpoint
from fastconformer.checkpoint import nemo_archive
def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) << 10
before = peak()
read = checkpoint.read_checkpoint(sys.argv[1])
total = sum(tensor.double().sum().item() for tensor in read.state_dict.values())
loaded = peak() - before
if sys.argv[2:]:
    write = checkpoint.write_folder if "folder" in sys.argv[2] else nemo_archive.write_nemo
    write(sys.argv[2], read)
print(loaded, peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("megabytes", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_stays_within_1_3_checkpoints(tmp_path, megabytes):
    layers = {f"layer{i}": torch.randn(megabytes // 8, 250, 250) for i in range(32)}
    size = sum(tensor.nbytes for tensor in layers.values())
    write_nemo(tmp_path / "a.nemo", Checkpoint({"target": "x"}, layers, {}))
    del layers
    for source, target in (("a.nemo", "folder"), ("folder", "b.nemo")):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / source, tmp_path / target],
            capture_output=True,
            text=True,
            check=True,
        )
        loaded, written = map(int, result.stdout.split())
        assert loaded < 1.3 * size, f"reading {source} took {loaded / size:.2f} of its size"
        assert written < 1.3 * size, f"writing {target} took {written / size:.2f} of its size"
