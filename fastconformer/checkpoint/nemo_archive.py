"""NeMo's `.nemo` archive: a tar of `model_config.yaml`, `model_weights.ckpt` and the files that
the config names as "nemo:<member>". The only file that knows this layout, and the only one that
reads pickle (tensors and nothing else).

An archive is untrusted: members are streamed one by one to names of ours in a temporary folder,
never extracted under their own; anything but plain files and folders is refused.

The YAML is OmegaConf's dialect (omegaconf itself is a training dependency): YAML 1.1 where 1e-5
is a number and a date is a string, and `${a.b}` stands for another value of the same document.

Source: NeMo's SaveRestoreConnector; OmegaConf 2.3 for YAML and interpolations.
"""

import gzip
import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch
import yaml

from .files import sync, work_folder
from .folder import (
    Checkpoint,
    artifacts,
    check_files,
    dense_tensors,
    rename_artifacts,
)

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
MAX_CONFIG_BYTES = 64 << 20
MAX_CONFIG_VALUES = 500_000  # aliases and interpolations can grow without bound
MAX_STRING_CHARS = 1 << 20
MAX_YAML_DEPTH = 100

logger = logging.getLogger(__name__)


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
    for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
        if name not in members:
            raise ValueError(_missing(name, members))
    if members[CONFIG_MEMBER].size > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_MEMBER} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    config_path = folder / "config"
    _extract(tar, members[CONFIG_MEMBER], config_path)
    config = load_config(config_path.read_bytes())

    wanted = {}
    for key, name in artifacts(config).items():
        wanted[key] = str(PurePosixPath(name))
        if wanted[key] not in members.keys() - {CONFIG_MEMBER, WEIGHTS_MEMBER}:
            raise ValueError(f"{key} names {name}, which the archive does not hold")
    tokenizer = config.get("tokenizer")
    if isinstance(tokenizer, dict) and not any(key.startswith("tokenizer.") for key in wanted):
        raise ValueError(
            'tokenizer names no file of the archive (expected tokenizer.model_path: "nemo:...")'
        )

    clean = _clean_names(wanted.values())
    needed = {WEIGHTS_MEMBER, *clean}
    # In the archive's order: a compressed one is read once, not once a member.
    for index, name in enumerate(name for name in members if name in needed):
        target = folder / ("weights" if name == WEIGHTS_MEMBER else f"file{index}")
        _extract(tar, members[name], target)
        if name != WEIGHTS_MEMBER:
            clean[name] = (clean[name], target.read_bytes())
            target.unlink()
    files = dict(clean.values())
    config = rename_artifacts(config, lambda key, _: clean[wanted[key]][0])
    dropped = tuple(name for name in members if name not in needed | {CONFIG_MEMBER})
    return Checkpoint(config, _load_weights(folder / "weights"), files, dropped)


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
    taken = {"", ".", "..", "config.json", "model.safetensors"}
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


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        mappable = _is_stored_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they hint at is an error below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {names[1]}" if names else "it holds more than that"
        raise ValueError(
            f"refusing {WEIGHTS_MEMBER}: only plain tensors are unpickled, and {reason}"
        ) from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # torch raises anything on damaged bytes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{WEIGHTS_MEMBER} is damaged: {reason}") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{WEIGHTS_MEMBER} holds a {type(state).__name__}, expected tensors by name"
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{WEIGHTS_MEMBER}: {name!r} is a {type(tensor).__name__}, expected a tensor"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{WEIGHTS_MEMBER}: tensor {name} is not dense")
        # A stride of zero lets a few bytes claim any size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{WEIGHTS_MEMBER}: tensor {name} is larger than its data")
    if not mappable:
        logger.warning("%s is in an old format: it was copied into memory", WEIGHTS_MEMBER)
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_stored_zip(path: Path) -> bool:
    """True for what torch.save has written since 1.6: mapping needs uncompressed zip records."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def write_nemo(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a `.nemo` that NeMo's `restore_from` takes: a plain tar whose bytes depend on the
    checkpoint alone. The file appears whole or not at all.

    Raises:
        ValueError: the config's files and tokenizer_files differ, or path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a .nemo file")
    check_files(checkpoint)
    files = checkpoint.tokenizer_files
    members = {name: f"{hashlib.md5(files[name]).hexdigest()}_{name}" for name in files}
    text = dump_config(rename_artifacts(checkpoint.config, lambda _, name: members[name]))

    with work_folder(path.parent, path.name) as work:
        # torch.save puts the file's stem inside the file, so the name is part of the bytes.
        weights, archive = work / WEIGHTS_MEMBER, work / "archive"
        torch.save(dense_tensors(checkpoint.state_dict), weights)
        with tarfile.open(archive, "w:") as tar:
            _add(tar, CONFIG_MEMBER, io.BytesIO(text), len(text))
            for name, content in files.items():
                _add(tar, members[name], io.BytesIO(content), len(content))
            with weights.open("rb") as file:
                _add(tar, WEIGHTS_MEMBER, file, weights.stat().st_size)
        sync(archive)
        os.replace(archive, path)
        sync(path.parent)


def _add(tar: tarfile.TarFile, name: str, file, size: int) -> None:
    member = tarfile.TarInfo(f"./{name}")
    member.size = size
    tar.addfile(member, file)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """SafeLoader with OmegaConf's scalars; a key that appears twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in getattr(node, "value", ()):
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key and key[0] != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key[1]!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which _Loader would read as something else."""

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):
        # PyYAML's single quotes turn Unicode's other line breaks into blanks.
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


# OmegaConf's floats: unlike YAML 1.1's they need no dot or sign in 1e5, and allow no sign in .5
_FLOAT = re.compile(
    r"""(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))\Z""",
    re.VERBOSE,
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":float"))]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def check_yaml_depth(text: bytes) -> None:
    """Raises YAMLError where the text is none, or is nested so deeply that loading it, which takes
    the C stack, could end the process."""
    depth = 0
    for event in yaml.parse(text, _Loader):  # takes no stack
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested too deeply, in more than {MAX_YAML_DEPTH} levels")


def load_config(text: bytes) -> dict:
    """model_config.yaml -> dict of plain values, every interpolation resolved.

    Raises ValueError naming the line, or the key and the interpolation.
    """
    try:
        check_yaml_depth(text)
        config = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_MEMBER} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_MEMBER} is not a mapping")
    try:
        config = _Interpolations(config).resolve()
    except RecursionError:
        raise ValueError(f"{CONFIG_MEMBER} is nested too deeply or contains itself") from None
    except ValueError as error:
        raise ValueError(f"{CONFIG_MEMBER}: {error}") from None
    # A training script's whole config: NeMo's restore_from takes its `model` section too.
    return config["model"] if isinstance(config.get("model"), dict) else config


def dump_config(config: dict) -> bytes:
    """dict of plain values -> YAML that load_config and OmegaConf read as the same values."""
    return yaml.dump(
        _escape(config), Dumper=_Dumper, allow_unicode=True, sort_keys=False, encoding="utf-8"
    )


def _escape(value):
    """A literal `${` is `\\${` in OmegaConf, and backslashes right before it are doubled."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


class _Interpolations:
    """Resolves OmegaConf interpolations over one document.

    `${a.b}`, `${a[0].b}` from the top; `${.x}` beside the value, `${..x}` one level up; inside a
    string, nested (`${a.${b}}`), through other interpolations. `${name:...}` calls a function of
    the process that wrote the file and is refused. A node is named by its path, a tuple of keys.
    """

    def __init__(self, config: dict):
        self.config = config
        self.values = {}  # path -> resolved value
        self.active = []  # paths being resolved, to find a cycle

    def resolve(self) -> dict:
        self.count = 0
        value = self._value(())
        self.count = 0
        return self._copy(value)

    def _copy(self, value):
        self._count()
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        return value

    def _count(self):
        self.count += 1
        if self.count > MAX_CONFIG_VALUES:
            raise ValueError(f"expands to more than {MAX_CONFIG_VALUES} values")

    def _value(self, path: tuple):
        if path in self.values:
            return self.values[path]
        self._enter(path)
        self._count()
        raw = self._node(path)
        if isinstance(raw, dict):
            value = {key: self._value((*path, key)) for key in raw}
        elif isinstance(raw, list):
            value = [self._value((*path, index)) for index in range(len(raw))]
        elif isinstance(raw, str):
            value = self._string(raw, path)
        elif raw is None or isinstance(raw, int | float):
            value = raw
        else:
            raise ValueError(f"{_dotted(path)} is a {type(raw).__name__}, expected plain values")
        self.active.pop()
        self.values[path] = value
        return value

    def _enter(self, path: tuple) -> None:
        if path in self.active:
            circle = [*self.active[self.active.index(path) :], path]
            raise ValueError(f"interpolation cycle {' -> '.join(map(_dotted, circle))}")
        self.active.append(path)

    def _node(self, path: tuple):
        node = self.config
        for key in path:
            node = node[key]
        return node

    def _string(self, text: str, path: tuple):
        if "${" not in text:
            return text
        parts = _split(text, path)
        if len(parts) == 1 and parts[0][1]:
            return self._refer(parts[0][0], path)
        joined = ""
        for part, is_reference in parts:
            value = self._refer(part, path) if is_reference else part
            if isinstance(value, dict | list):
                raise ValueError(f"{_dotted(path)}: {text} puts a mapping or list into a string")
            joined += str(value)
            if len(joined) > MAX_STRING_CHARS:
                raise ValueError(f"{_dotted(path)} expands to over {MAX_STRING_CHARS} characters")
        return joined

    def _refer(self, reference: str, path: tuple):
        target = self._locate(reference, path)
        value = self._value(target)
        if value == "???":
            raise ValueError(f"{_dotted(path)}: ${{{reference}}} refers to a missing value (???)")
        return value

    def _locate(self, reference: str, path: tuple) -> tuple:
        """Path of the node that `${reference}` at path stands for."""
        where = f"{_dotted(path)}: ${{{reference}}}"
        text = self._string(reference, path) if "${" in reference else reference
        if ":" in text:
            raise ValueError(
                f"{where} calls a resolver, which only the program that wrote it has; "
                "replace it by its value"
            )
        match = _REFERENCE.fullmatch(text.strip(" \t"))
        if not match:
            raise ValueError(f"{where} is not an interpolation that OmegaConf knows")
        levels = len(match[1])
        if levels > len(path):
            raise ValueError(f"{where} leads above the top of the config")
        target = path[: len(path) - levels] if levels else ()
        for name in re.findall(_KEY, match[2]):
            node = self._node(target := self._follow(target))
            keys = [name, int(name)] if re.fullmatch(r"-?[0-9]+", name) else [name]
            if isinstance(node, list):
                keys = [key % len(node) for key in keys[1:] if -len(node) <= key < len(node)]
            elif isinstance(node, dict):
                keys = [key for key in keys if key in node]
            else:
                keys = []
            if not keys:
                raise ValueError(f"{where} does not exist: no {name} in {_dotted(target)}")
            target = (*target, keys[0])
        return target

    def _follow(self, path: tuple) -> tuple:
        """path, or, where an interpolation stands there alone, the path that it stands for."""
        node = self._node(path)
        parts = _split(node, path) if isinstance(node, str) and "${" in node else []
        if len(parts) != 1 or not parts[0][1]:
            return path
        self._enter(path)
        target = self._follow(self._locate(parts[0][0], path))
        self.active.pop()
        return target


_KEY = r"[^\\{}()\[\]:. \t'\"]+"
_REFERENCE = re.compile(rf"(\.*)((?:{_KEY}|\[{_KEY}\])(?:\.{_KEY}|\[{_KEY}\])*)")


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path)) or "the top level"


def _split(text: str, path: tuple) -> list[tuple[str, bool]]:
    """Text with `${...}` -> [(text, False) or (inside of the braces, True)], empty texts left out.
    `\\${` is a literal; of other backslashes before `${`, two stand for one."""
    parts, literal, position = [], "", 0
    while match := re.compile(r"(\\*)\$\{").search(text, position):
        literal += text[position : match.start()] + "\\" * (len(match[1]) // 2)
        position = match.end()
        if len(match[1]) % 2:
            literal += "${"
            continue
        depth = 1
        for brace in re.compile(r"\$?\{|\}").finditer(text, position):
            depth += -1 if brace[0] == "}" else 1
            if depth == 0:
                break
        if depth:
            raise ValueError(f"{_dotted(path)}: {text!r} has a ${{ without its }}")
        parts += [(literal, False), (text[position : brace.start()], True)]
        literal, position = "", brace.end()
    parts.append((literal + text[position:], False))
    return [part for part in parts if part[0] or part[1]]
