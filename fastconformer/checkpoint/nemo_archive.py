"""NeMo's `.nemo` archive: a tar of `model_config.yaml`, `model_weights.ckpt` and the files that
the config names as "nemo:<member>". The only file that knows this layout.

An archive is untrusted: members are streamed one by one to names of ours in a temporary folder,
never extracted under their own; anything but plain files and folders is refused.

Source: NeMo's SaveRestoreConnector.
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch

from ..config import ModelConfig
from ..config.checks import config_errors
from .contents import (
    ALIGNER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    artifacts,
    check_files,
    dense_tensors,
    rename_artifacts,
)
from .files import sync, work_folder
from .pickled import load_tensors
from .yaml_config import CONFIG_MEMBER, dump_config, load_config

WEIGHTS_MEMBER = "model_weights.ckpt"
ALIGNER_MEMBERS = f"{ALIGNER}_config.yaml", f"{ALIGNER}_weights.ckpt"
MAX_CONFIG_BYTES = 64 << 20
MAX_FILE_BYTES = 256 << 20  # of all tokenizers
MOST_UNPACKED = 20  # times an archive's size: weights are hardly compressible, more is a trap
SMALL_ARCHIVE = 64 << 20  # bytes that any archive may unpack to
BYTES_OF_WEIGHT = 8  # twice those of float32, what torch.save writes about them included
COPY_BYTES = 1 << 20


def read_nemo(path: str | os.PathLike) -> Checkpoint:
    """Reads a `.nemo` archive, plain or gzip. Weights are mapped from a temporary file that is
    already unlinked; their dtypes are the archive's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tar, truncated, unsafe, incomplete, or a config or weights file that
            cannot be read; the message names the file and the member or key.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a .nemo file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such .nemo file or folder")
    try:
        with (
            _opened(path) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
            tempfile.TemporaryDirectory(prefix="nemo-", ignore_cleanup_errors=True) as folder,
        ):
            return _read_members(tar, Path(folder), path.stat().st_size)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is truncated or not a tar archive: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {reason}") from error


class _Unzipped(gzip.GzipFile):
    """What tarfile reads at once it holds in memory: the header of a member, above all."""

    def read(self, size=-1):
        if not 0 <= size <= COPY_BYTES:
            raise ValueError(f"refusing a header of {size >> 10} KiB")
        return super().read(size)


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
    return _Unzipped(path) if is_zipped else path.open("rb")


def _read_members(tar: tarfile.TarFile, folder: Path, packed: int) -> Checkpoint:
    """packed: bytes of the archive."""
    members = _safe_members(tar, packed)
    checkpoint, read = _read_model(tar, members, folder, packed)
    if any(name in members for name in ALIGNER_MEMBERS):
        try:
            aligner = _read_model(tar, members, folder, packed, *ALIGNER_MEMBERS)
            checkpoint.aligner, more = aligner
        except ValueError as error:
            raise ValueError(f"the CTC model for times: {error}") from error
        read |= more
    checkpoint.dropped = tuple(name for name in members if name not in read)
    return checkpoint


def _read_model(
    tar: tarfile.TarFile,
    members: dict,
    folder: Path,
    packed: int,
    config_member: str = CONFIG_MEMBER,
    weights_member: str = WEIGHTS_MEMBER,
) -> tuple[Checkpoint, set[str]]:
    """One model of the archive, and the members that were read for it."""
    for name in (config_member, weights_member):
        if name not in members:
            raise ValueError(_missing(name, members))
    if members[config_member].size > MAX_CONFIG_BYTES:
        raise ValueError(f"{config_member} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    config_path = folder / "config"
    _extract(tar, members[config_member], config_path)
    config = load_config(config_path.read_bytes())

    wanted = {}
    for key, name in artifacts(config).items():
        wanted[key] = str(PurePosixPath(name))
        if wanted[key] not in members.keys() - {config_member, weights_member}:
            raise ValueError(f"{key} names {name}, which the archive does not hold")
    tokenizer = config.get("tokenizer")
    if isinstance(tokenizer, dict) and not any(key.startswith("tokenizer.") for key in wanted):
        raise ValueError(
            'tokenizer names no file of the archive (expected tokenizer.model_path: "nemo:...")'
        )

    _check_size(members[weights_member], packed, _most_bytes(config), ", which its config allows")
    n_bytes = sum(members[name].size for name in set(wanted.values()))
    if n_bytes > MAX_FILE_BYTES:
        raise ValueError(f"its tokenizers unpack to {n_bytes >> 20} MiB")
    clean = _clean_names(wanted.values())
    needed = {weights_member, *clean}
    # In the archive's order: a compressed one is read once, not once a member.
    for index, name in enumerate(name for name in members if name in needed):
        target = folder / (weights_member if name == weights_member else f"file{index}")
        _extract(tar, members[name], target)
        if name != weights_member:
            clean[name] = (clean[name], target.read_bytes())
            target.unlink()
    files = dict(clean.values())
    config = rename_artifacts(config, lambda key, _: clean[wanted[key]][0])
    weights = load_tensors(folder / weights_member, weights_member)
    return Checkpoint(config, weights, files), needed | {config_member}


def _most_bytes(config: dict) -> int:
    """Of the weights that a model of this config has."""
    try:
        with config_errors():
            return int(BYTES_OF_WEIGHT * ModelConfig.from_nemo(config).most_weights) + COPY_BYTES
    except ValueError:  # no model of ours: refused later, by what it is
        return sys.maxsize


def _check_size(member: tarfile.TarInfo, packed: int, most: int, why: str = "") -> None:
    """ValueError of a member that would fill the disk: it is larger than `most`, and more than the
    archive itself."""
    if member.size > max(most, packed):
        raise ValueError(
            f"{member.name} unpacks to {member.size >> 20} MiB, out of an archive of "
            f"{packed >> 10} KiB; refusing more than {most >> 20} MiB{why}"
        )


def _safe_members(tar: tarfile.TarFile, packed: int) -> dict[str, tarfile.TarInfo]:
    """The plain files by name. ValueError of others, and of more than the archive can hold, told
    before that is unpacked."""
    members, left = {}, max(MOST_UNPACKED * packed, SMALL_ARCHIVE)
    for member in tar:
        _check_size(member, packed, left)
        left -= member.size
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"refusing member {member.name!r}: it points outside the archive")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(f"refusing member {member.name!r}: it is not a plain file")
        if str(name) in members:
            raise ValueError(f"refusing member {member.name!r}: it appears twice")
        members[str(name)] = member
    return members


def _missing(name: str, members: dict) -> str:
    parts = [m for m in members if m.startswith("model_weights/") or m.endswith(f"/{name}")]
    if parts and name == WEIGHTS_MEMBER:
        return (
            f"the weights are sharded or distributed ({parts[0]}), expected one {name}; "
            "save the model on a single device with NeMo first"
        )
    found = ", ".join(list(members)[:5]) or "nothing"
    return f"no {name} at the top of the archive (it holds {found}); truncated, or not NeMo's"


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    with tar.extractfile(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, COPY_BYTES)
        if sink.tell() != member.size:
            raise ValueError(f"truncated inside {member.name}")


def _clean_names(names) -> dict[str, str]:
    """Member name -> file name without folder and without NeMo's `<32 hex>_` prefix, unique."""
    clean = {}
    taken = {"", ".", "..", CONFIG_FILE, WEIGHTS_FILE}
    for name in dict.fromkeys(names):
        base = re.sub(r"^[0-9a-f]{32}_(?=.)", "", PurePosixPath(name).name)
        base = re.sub(r"[\\:\x00-\x1f]", "_", base)
        stem, suffix = os.path.splitext(base)
        candidate, count = base, 1
        while candidate.casefold() in taken:  # tokenizers of several languages
            count += 1
            candidate = f"{stem}_{count}{suffix}"
        taken.add(candidate.casefold())
        clean[name] = candidate
    return clean


def write_nemo(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a `.nemo` that NeMo's `restore_from` takes: a plain tar whose bytes depend on the
    checkpoint alone. The file appears whole or not at all.

    Raises:
        ValueError: the config's files and tokenizer_files differ, or path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a .nemo file")
    if checkpoint.kind != "nemo":
        raise ValueError("this is no model of NeMo's; see converters.st2funasr")
    models = [(checkpoint, CONFIG_MEMBER, WEIGHTS_MEMBER)]
    if checkpoint.aligner:
        models.append((checkpoint.aligner, *ALIGNER_MEMBERS))
    for model, _, _ in models:
        check_files(model)
    written = set()  # files of the same name and content are one member
    with work_folder(path.parent, path.name) as work:
        archive = work / "archive"
        with tarfile.open(archive, "w:") as tar:
            for model, config_member, weights_member in models:
                text, files = _config_and_files(model)
                _add(tar, config_member, io.BytesIO(text), len(text))
                for name in (name for name in files if name not in written):
                    _add(tar, name, io.BytesIO(files[name]), len(files[name]))
                written |= files.keys()
                # torch.save puts the file's stem inside the file: the name is part of the bytes
                weights = work / weights_member
                torch.save(dense_tensors(model.state_dict), weights)
                with weights.open("rb") as file:
                    _add(tar, weights_member, file, weights.stat().st_size)
                weights.unlink()
        sync(archive)
        os.replace(archive, path)
        sync(path.parent)


def _config_and_files(checkpoint: Checkpoint) -> tuple[bytes, dict[str, bytes]]:
    """The config as YAML, and the files that it names, as members of an archive."""
    files = checkpoint.tokenizer_files
    members = {name: f"{hashlib.md5(files[name]).hexdigest()}_{name}" for name in files}
    config = rename_artifacts(checkpoint.config, lambda _, name: members[name])
    return dump_config(config), {members[name]: content for name, content in files.items()}


def _add(tar: tarfile.TarFile, name: str, file, size: int) -> None:
    member = tarfile.TarInfo(f"./{name}")
    member.size = size
    tar.addfile(member, file)
