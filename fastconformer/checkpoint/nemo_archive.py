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
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

import torch

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
MAX_FILE_BYTES = 256 << 20  # of a tokenizer
MOST_UNPACKED = 20  # times an archive's size; more, of weights, is a trap
SMALL_WEIGHTS = 64 << 20  # bytes that are unpacked from any archive


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
        with path.open("rb") as file:
            mode = "r:gz" if file.read(2) == b"\x1f\x8b" else "r:"
        with (
            tarfile.open(path, mode) as tar,
            tempfile.TemporaryDirectory(prefix="nemo-", ignore_cleanup_errors=True) as folder,
        ):
            return _read_members(tar, Path(folder))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is truncated or not a tar archive: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {reason}") from error


def _read_members(tar: tarfile.TarFile, folder: Path) -> Checkpoint:
    members = _safe_members(tar)
    checkpoint, read = _read_model(tar, members, folder, CONFIG_MEMBER, WEIGHTS_MEMBER)
    if any(name in members for name in ALIGNER_MEMBERS):
        try:
            checkpoint.aligner, more = _read_model(tar, members, folder, *ALIGNER_MEMBERS)
        except ValueError as error:
            raise ValueError(f"the CTC model for times: {error}") from error
        read |= more
    checkpoint.dropped = tuple(name for name in members if name not in read)
    return checkpoint


def _read_model(
    tar: tarfile.TarFile, members: dict, folder: Path, config_member: str, weights_member: str
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

    _check_sizes(tar, members, weights_member, wanted.values())
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


def _check_sizes(tar: tarfile.TarFile, members: dict, weights_member: str, files) -> None:
    """ValueError of members that would fill the disk: weights are hardly compressible, so that
    megabytes which unpack to many times as much hold none."""
    packed = os.path.getsize(tar.name)
    most = max(MOST_UNPACKED * packed, SMALL_WEIGHTS)
    for name, limit in [(weights_member, most), *((name, MAX_FILE_BYTES) for name in files)]:
        if members[name].size > limit:
            raise ValueError(
                f"{name} unpacks to {members[name].size >> 20} MiB, out of an archive of "
                f"{packed >> 10} KiB; refusing more than {limit >> 20} MiB"
            )


def _safe_members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    members = {}
    for member in tar:
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
        shutil.copyfileobj(source, sink, 1 << 20)
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
