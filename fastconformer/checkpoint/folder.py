"""Checkpoints: what a model is on disk, as a `.nemo` archive or as a converted folder.

A converted folder holds `config.json` ({"format_version": 1, "nemo_config": {...}}),
`model.safetensors`, and the tokenizer files under the names that the config gives them:
`tokenizer.model_path: nemo:tokenizer.model` is the file `tokenizer.model` of the folder. The
config is NeMo's `model_config.yaml` and the tensors carry NeMo's names, so no key map exists.

JSON has no word for infinity; `config.json` spells it `Infinity`, as Python's json module does
(NeMo's decoding section has `unk_weight: -.inf`).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .files import sync, work_folder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1


@dataclass
class Checkpoint:
    """A model as data.

    config: NeMo's model_config.yaml, interpolations resolved; files are "nemo:<name>", where
        name is a key of tokenizer_files.
    state_dict: tensors by NeMo's names; may be backed by a private file mapping.
    tokenizer_files: content of every file that the config names, by clean name
        ("tokenizer.model", "vocab.txt", "tokenizer.vocab", ...).
    dropped: members of the archive that the config does not name and that were not read.
    """

    config: dict
    state_dict: dict[str, torch.Tensor]
    tokenizer_files: dict[str, bytes]
    dropped: tuple[str, ...] = ()


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads a `.nemo` archive or a converted folder. The tensors stay backed by the file: they
    take memory as they are touched, once, and may be changed without changing the file.

    Raises:
        FileNotFoundError: nothing is at path.
        ValueError: it is neither form, or damaged, or unsafe, or a weight is NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = _read_folder(path)
    else:
        # Imported here: the archive is built on this file, and a folder needs no YAML.
        from .nemo_archive import read_nemo

        checkpoint = read_nemo(path)
    try:
        check_finite(checkpoint.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint


def check_finite(state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity.

    Uses the extrema, which NaN passes through, so that nothing as large as a tensor is made.
    """
    for name, tensor in state_dict.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if values.element_size() == 1:
            values = values.float()  # 8-bit floats have no comparison
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(values)):
            raise ValueError(
                f"tensor {name} holds NaN or infinity; the checkpoint is damaged or comes from "
                "a diverged run, use an earlier one"
            )


def write_folder(folder: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a converted folder. A new folder appears whole or not at all; in an existing one
    each file is replaced atomically, config.json last, and all other files stay.

    Raises:
        ValueError: the config names a file that tokenizer_files lacks (or the other way round),
            holds what JSON cannot, or folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the name of a folder")
    check_files(checkpoint)
    _check_json(checkpoint.config)
    document = {"format_version": FORMAT_VERSION, "nemo_config": checkpoint.config}

    # Inside an existing folder, which may be a file system of its own; beside a new one.
    parent = folder if folder.is_dir() else folder.parent
    with work_folder(parent, folder.name) as work:
        new = work / "new"
        new.mkdir()
        for name, content in checkpoint.tokenizer_files.items():
            (new / name).write_bytes(content)
        save_file(dense_tensors(checkpoint.state_dict), new / WEIGHTS_FILE, {"format": "pt"})
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        shutil.copymode(new / CONFIG_FILE, new / WEIGHTS_FILE)  # safetensors makes it 0600
        names = [*checkpoint.tokenizer_files, WEIGHTS_FILE, CONFIG_FILE]
        for name in names:
            sync(new / name)
        if parent == folder:
            for name in names:
                os.replace(new / name, folder / name)
        else:
            sync(new)
            os.rename(new, folder)
        sync(parent)


def _read_folder(folder: Path) -> Checkpoint:
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {path.name}; expected a .nemo file or a folder written by "
                "converters.nemo2st"
            )
    try:
        document = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_path} is not JSON: {error}") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION or not isinstance(document.get("nemo_config"), dict):
        raise ValueError(
            f"{config_path}: format_version is {version!r}, this version reads {FORMAT_VERSION} "
            "with a mapping under nemo_config; convert the .nemo again"
        )
    config = document["nemo_config"]

    files = {}
    for key, name in artifacts(config).items():
        _check_plain_name(name, f"{config_path}: {key}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}, which its config names as {key}")
        files[name] = (folder / name).read_bytes()
    try:
        state_dict = load_file(weights_path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged or truncated: {error}") from None
    return Checkpoint(config, state_dict, files)


def artifacts(config: dict) -> dict[str, str]:
    """The files that a config names: {"tokenizer.model_path": "tokenizer.model", ...}. A file is
    a mapping's value that starts with "nemo:", wherever it stands."""
    found = {}

    def note(key, name):
        found[key] = name
        return name

    rename_artifacts(config, note)
    return found


def rename_artifacts(config: dict, rename: Callable[[str, str], str]) -> dict:
    """A copy of config where each "nemo:<name>" is "nemo:" + rename(dotted key, name)."""

    def walk(value, key):
        if isinstance(value, dict):
            return {
                name: f"nemo:{rename(f'{key}{name}', item[5:])}"
                if isinstance(item, str) and item.startswith("nemo:")
                else walk(item, f"{key}{name}.")
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [walk(item, f"{key}{index}.") for index, item in enumerate(value)]
        return value

    return walk(config, "")


def check_files(checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the config's files and tokenizer_files are the same, each under
    a plain file name."""
    named = artifacts(checkpoint.config)
    for key, name in named.items():
        if name not in checkpoint.tokenizer_files:
            raise ValueError(f"{key} names {name}, which is not among the tokenizer files")
    for name in checkpoint.tokenizer_files:
        _check_plain_name(name, "tokenizer file")
        if name not in named.values():
            raise ValueError(f'tokenizer file {name}: the config has no "nemo:{name}" for it')


def _check_plain_name(name: str, what: str) -> None:
    plain = name and name not in (".", "..") and not set(name) & set("/\\\0:")
    if not plain or name.lower() in (CONFIG_FILE, WEIGHTS_FILE):
        raise ValueError(f"{what}: {name!r} is not a plain file name inside the folder")


def _check_json(value, key: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ValueError(f"config: key {name!r} under {key or 'the top'} is not a string")
            _check_json(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{key}.{index}")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"config: {key} is a {type(value).__name__}, which JSON cannot hold")


def dense_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values as CPU tensors, contiguous, each alone in its storage; copies only those
    that are not so already (tied weights, views)."""
    dense, seen = {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not (alone and tensor.is_contiguous() and storage.data_ptr() not in seen):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        dense[name] = tensor
    return dense
