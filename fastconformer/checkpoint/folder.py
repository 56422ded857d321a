"""The converted folder: a model as files that need no unpickling.

It holds `config.json` ({"format_version": 1, "nemo_config": {...}}; the config of another kind of
model under that kind's name, "funasr_config"), `model.safetensors`, and the
tokenizer files under the names that the config gives them: `tokenizer.model_path:
nemo:tokenizer.model` is the file `tokenizer.model` of the folder. The config is NeMo's
`model_config.yaml` and the tensors carry NeMo's names, so no key map exists. A second model for
words' times is a converted folder in the folder, `timestamps_asr_model`; config.json says so.

JSON has no word for infinity; `config.json` spells it `Infinity`, as Python's json module does
(NeMo's decoding section has `unk_weight: -.inf`).
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .contents import (
    ALIGNER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    artifacts,
    check_files,
    check_plain_name,
    dense_tensors,
)
from .files import naming_file, sync, work_folder

FORMAT_VERSION = 1
KINDS = ("nemo", "funasr")


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
    document = {"format_version": FORMAT_VERSION, f"{checkpoint.kind}_config": checkpoint.config}

    if checkpoint.aligner:
        document[ALIGNER] = True  # else a folder of an earlier model would be taken for this one's
        if folder.is_dir():
            write_folder(folder / ALIGNER, checkpoint.aligner)

    # Inside an existing folder, which may be a file system of its own; beside a new one.
    parent = folder if folder.is_dir() else folder.parent
    with naming_file(folder), work_folder(parent, folder.name) as work:
        new = work / "new"
        new.mkdir()
        for name, content in checkpoint.tokenizer_files.items():
            (new / name).write_bytes(content)
        try:
            save_file(dense_tensors(checkpoint.state_dict), new / WEIGHTS_FILE, {"format": "pt"})
        except SafetensorError as error:  # a full disk, as safetensors tells it
            raise OSError(f"{folder / WEIGHTS_FILE} cannot be written: {error}") from None
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
            if checkpoint.aligner:
                write_folder(new / ALIGNER, checkpoint.aligner)
            sync(new)
            os.rename(new, folder)
        sync(parent)


def read_folder(folder: Path) -> Checkpoint:
    """Raises ValueError where a file is missing, damaged or not what the config names."""
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
    sections = [document.get(f"{kind}_config") for kind in KINDS] if version else []
    configs = [section for section in sections if isinstance(section, dict)]
    if version != FORMAT_VERSION or len(configs) != 1:
        raise ValueError(
            f"{config_path}: format_version is {version!r}, this version reads {FORMAT_VERSION} "
            "with a mapping under nemo_config; convert the .nemo again"
        )
    (config,) = configs

    files = {}
    for key, name in artifacts(config).items():
        check_plain_name(name, f"{config_path}: {key}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}, which its config names as {key}")
        files[name] = (folder / name).read_bytes()
    try:
        state_dict = load_file(weights_path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged or truncated: {error}") from None
    aligner = None
    if document.get(ALIGNER):
        if not (folder / ALIGNER).is_dir():
            raise ValueError(f"{folder} holds no {ALIGNER}/, which its config names")
        aligner = read_folder(folder / ALIGNER)
    return Checkpoint(config, state_dict, files, aligner=aligner)


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
