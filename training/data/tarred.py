"""NeMo's tarred data sets: manifests whose audio lies in tar files, read in place.

A set is one manifest, or one for each shard, and tar files `audio_0.tar`, `audio_1.tar`, ...; the
line's `shard_id` (or its manifest's number) says in which. Nothing is extracted: a tar's headers
are read once, when its first clip is wanted, and clips are read from where they lie.

Names follow NeMo's convert_to_tarred_audio_dataset: a recording with several segments lies in the
tar once, and the manifest calls the second and later ones `name-sub1.wav`, `name-sub2.wav`.
"""

import collections
import io
import re
import tarfile
import threading
from pathlib import Path

TARS_INDEXED = 64  # how many tars' tables of contents are kept
BRACES = re.compile(r"\{([^{}]*)\}")
SUB = re.compile(r"^(?P<stem>.+)-sub\d+(?P<ext>\.\w+)?$")


def expand_braces(path: str) -> list[str]:
    """`a_{0..2}.tar` -> a_0.tar, a_1.tar, a_2.tar; also {x,y}, and what NeMo takes for braces:
    `_OP_0..2_CL_`, and (0..2), [0..2], <0..2>. {000..511} keeps its zeros."""
    path = path.replace("_OP_", "{").replace("_CL_", "}")
    path = re.sub(r"[(\[<](\d+\.\.\d+)[)\]>]", r"{\1}", path)
    found = BRACES.search(path)
    if not found:
        return [path]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        zeros = any(len(end) > 1 and end.startswith("0") for end in ends.groups())
        width = max(map(len, ends.groups())) if zeros else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        options = [str(number).zfill(width) for number in numbers]
    elif "," in found[1]:
        options = found[1].split(",")
    else:
        raise ValueError(f"{path}: {found[0]} is neither {{first..last}} nor {{one,other}}")
    before, after = path[: found.start()], path[found.end() :]
    return [name for option in options for name in expand_braces(before + option + after)]


def shard_number(path: str) -> int | None:
    """The last number of a file's name: 3 of `audio_3.tar` and of `manifest_3_clean.json`."""
    numbers = re.findall(r"\d+", Path(path).name.split(".", 1)[0])
    return int(numbers[-1]) if numbers else None


def tar_shards(paths: str) -> dict[int, str]:
    """{shard id: tar file} of NeMo's `tarred_audio_filepaths`.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: two have the same number.
    """
    tars = expand_braces(paths)
    missing = [tar for tar in tars if not Path(tar).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"tarred_audio_filepaths: {missing[0]} is not a file{more}")
    if len(tars) == 1:
        return {shard_number(tars[0]) or 0: tars[0]}
    shards = {shard_number(tar): tar for tar in tars}
    if None in shards or len(shards) < len(tars):
        raise ValueError(
            f"tarred_audio_filepaths {paths}: the tar files' names need a number each, "
            "such as audio_0.tar"
        )
    return shards


class TarredAudio(io.BytesIO):
    """A member's content, which error messages call by its tar and name."""

    def __init__(self, tar: str, member: str, content: bytes):
        super().__init__(content)
        self._name = f"{tar}:{member}"

    def __str__(self) -> str:
        return self._name


class TarReader:
    """Clips out of tar files, by name. Threads may share it."""

    def __init__(self):
        self._tables: collections.OrderedDict[str, dict] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, tar: str, member: str) -> TarredAudio:
        """A member's content, to be read like a file.

        Raises:
            FileNotFoundError: there is no tar, or none of its members has that name.
            ValueError: it is compressed or no tar, or ends too early.
        """
        table = self._table(tar)
        place = table.get(member) or table.get(stem(member))
        whole = SUB.match(member)
        if place is None and whole:
            name = whole["stem"] + (whole["ext"] or "")
            place = table.get(name) or table.get(stem(name))
        if place is None:
            raise FileNotFoundError(f"{tar} holds no {member}")
        offset, size = place
        with open(tar, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{tar} ends within {member}; it is truncated")
        return TarredAudio(tar, member, content)

    def _table(self, tar: str) -> dict[str, tuple[int, int]]:
        with self._lock:
            if tar not in self._tables:
                self._tables[tar] = _contents(tar)
                if len(self._tables) > TARS_INDEXED:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(tar)
            return self._tables[tar]


def stem(member: str) -> str:
    """What NeMo's older loaders know a clip by: its name without folder and extension."""
    return Path(member).name.rsplit(".", 1)[0]


def _contents(path: str) -> dict[str, tuple[int, int]]:
    """{name, and stem: (where the content begins, its size)}; a torn tar gives what it has."""
    table = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    place = member.offset_data, member.size
                    table.setdefault(stem(member.name), place)
                    table[member.name.removeprefix("./")] = place
    except (tarfile.TarError, EOFError) as error:
        if not table:
            raise ValueError(f"{path} is not an uncompressed tar file: {error}") from None
    return table
