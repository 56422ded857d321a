"""The folder that FunASR reads: `config.yaml`, `model.pt`, the language model's folder (config and
tokenizer), the CTC branch's vocabulary. The only file that knows this layout.

What a `Checkpoint` keeps of it: `config` is config.yaml, resolved, with two sections of ours:
`llm_config` (the language model's config.json) and `files` (names of the files below). Of paths in
config.yaml the last part counts, and `configuration.json` (`file_path_metas`) comes first, as in
FunASR. Pickle is read with weights_only.
"""

import json
import logging
import os
from pathlib import Path, PurePosixPath

import torch

from .contents import Checkpoint, check_plain_name, dense_tensors
from .files import sync, work_folder
from .pickled import load_tensors
from .yaml_config import dump_config, load_config

CONFIG_FILE, WEIGHTS_FILE, METAS_FILE = "config.yaml", "model.pt", "configuration.json"
LLM_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
             "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
LLM_CONFIG, VOCABULARY = "config.json", "ctc_vocabulary"
OURS = ("llm_config", "files")  # sections that are not in config.yaml
WRAPPERS = ("state_dict", "model_state_dict", "model")
MAX_FILE_BYTES = 64 << 20

logger = logging.getLogger(__name__)


def is_funasr_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def read_funasr(
    folder: str | os.PathLike, weights: str = WEIGHTS_FILE, like: str | os.PathLike | None = None
) -> Checkpoint:
    """Reads a released or fine-tuned folder.

    Args:
        weights: name of its tensors' file.
        like: the folder that it was trained from: tokenizers, vocabulary and tensors that are not
            in `folder` come from there. FunASR's training leaves the language model out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file is missing, damaged or unsafe; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        return _read(folder, weights, None if like is None else Path(like))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{folder}: {reason}") from error


def _read(folder: Path, weights: str, like: Path | None) -> Checkpoint:
    config = load_config(_bytes(folder / CONFIG_FILE), CONFIG_FILE)
    metas = {}
    if (folder / METAS_FILE).is_file():
        document = _json(folder / METAS_FILE)
        metas = document.get("file_path_metas") or {}
    places = [folder] if like is None else [folder, like]
    llm = _llm_folder(places, config, metas)
    config["llm_config"] = _json(llm / LLM_CONFIG)
    names, files = {}, {}
    for name in LLM_FILES:
        if (llm / name).is_file():
            names[name.partition(".")[0]] = f"nemo:{name}"
            files[name] = _bytes(llm / name)
    if "tokenizer.json" not in files:
        raise ValueError(f"{llm.name}/ holds no tokenizer.json")
    vocabulary = _vocabulary(places, config, metas)
    if vocabulary is not None:
        names[VOCABULARY] = f"nemo:{vocabulary.name}"
        files[vocabulary.name] = _bytes(vocabulary)
    config["files"] = names
    if not (folder / weights).is_file():
        raise ValueError(f"it holds no {weights}, the weights")
    state = _tensors(folder / weights)
    if like is not None:
        state = _tensors(like / WEIGHTS_FILE) | state
    return Checkpoint(config, state, files)


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"it holds no {path.name}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def _json(path: Path) -> dict:
    try:
        document = json.loads(_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path.parent.name}/{path.name} is no JSON object")
    return document


def _named(tree: dict, *keys: str) -> str | None:
    """The last part of the path at these keys, if there is one."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    name = PurePosixPath(tree.replace("\\", "/")).name if isinstance(tree, str) else ""
    return name or None


def _llm_folder(places: list[Path], config: dict, metas: dict) -> Path:
    for folder in places:
        for tree in (metas, config):
            name = _named(tree, "llm_conf", "init_param_path")
            if name:
                check_plain_name(name, "llm_conf.init_param_path")
                if (folder / name / LLM_CONFIG).is_file():
                    return folder / name
        found = sorted(path.parent for path in folder.glob(f"*/{LLM_CONFIG}"))
        if len(found) == 1:
            return found[0]
    named = (config.get("llm_conf") or {}).get("init_param_path")
    raise ValueError(
        "it holds no folder of the language model (config and tokenizer), which "
        f"llm_conf.init_param_path names as {named!r}"
    )


def _vocabulary(places: list[Path], config: dict, metas: dict) -> Path | None:
    """The CTC branch's; None where the model has none, or its file is not there."""
    return next((f for f in (_vocabulary_in(p, config, metas) for p in places) if f), None)


def _vocabulary_in(folder: Path, config: dict, metas: dict) -> Path | None:
    key = "ctc_tokenizer_conf", "vocab_path"
    for tree, keys in ((metas, ("dataset_conf", *key)), (metas, key), (config, key),
                       (config, ("dataset_conf", *key))):  # fmt: skip
        name = _named(tree, *keys)
        if name and (folder / name).is_file():
            check_plain_name(name, ".".join(keys))
            return folder / name
    found = sorted(folder.glob("*.tiktoken"))
    return found[0] if len(found) == 1 else None


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    state = load_tensors(path, path.name, WRAPPERS)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def write_funasr(folder: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a folder that FunASR's AutoModel reads, the language model's tensors always inside.
    It appears whole or not at all; one that was written before is replaced.

    Raises:
        ValueError: the checkpoint is of another kind of model, or what is there is something else.
    """
    folder = Path(folder)
    if checkpoint.kind != "funasr":
        raise ValueError("this is no Fun-ASR-Nano model")
    if folder.exists() and not (is_funasr_folder(folder) and (folder / WEIGHTS_FILE).is_file()):
        raise ValueError(f"{folder} is there already; give the name of a new folder")
    config = {key: value for key, value in checkpoint.config.items() if key not in OURS}
    names = checkpoint.config["files"]
    llm = _named(config, "llm_conf", "init_param_path") or "Qwen3-0.6B"
    vocabulary = str(names.get(VOCABULARY) or "").removeprefix("nemo:")
    metas = {
        "init_param": WEIGHTS_FILE,
        "config": CONFIG_FILE,
        "llm_conf": {"init_param_path": llm},
        "tokenizer_conf": {"init_param_path": llm},
    }
    if vocabulary:
        metas["dataset_conf"] = {"ctc_tokenizer_conf": {"vocab_path": vocabulary}}
    document = {
        "framework": "pytorch",
        "task": "auto-speech-recognition",
        "model": {"type": "funasr"},
        "file_path_metas": metas,
    }
    with work_folder(folder.parent, folder.name) as work:
        new = work / "new"
        (new / llm).mkdir(parents=True)
        written = {CONFIG_FILE: dump_config(config), METAS_FILE: _dumped(document)}
        written[f"{llm}/{LLM_CONFIG}"] = _dumped(checkpoint.config["llm_config"])
        for name, content in checkpoint.tokenizer_files.items():
            written[name if name == vocabulary else f"{llm}/{name}"] = content
        for name, content in written.items():
            (new / name).write_bytes(content)
            sync(new / name)
        torch.save({"state_dict": dense_tensors(checkpoint.state_dict)}, new / WEIGHTS_FILE)
        sync(new / WEIGHTS_FILE)
        sync(new)
        if folder.exists():
            os.rename(folder, work / "old")  # goes with the work folder
        os.rename(new, folder)
        sync(folder.parent)


def _dumped(document: dict) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
