"""Lhotse's cuts, in a CutSet's file or a Shar folder, as items of a manifest.

A cut of one plain file becomes a line about that file; what Lhotse computes (mixed, padded or
faster audio) is computed and written down. Texts are what NeMo's Lhotse data loader trains on:
those of all supervisions of a cut, in their order (`LhotseSpeechToTextBpeDataset`, NeMo 3.0.0).
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastconformer.audio.files import audio_duration, read_audio
from training.corpora.written import Item, Unusable, encoded, fields_of, suffix_of

CUTS = ("MonoCut", "MultiCut", "MixedCut", "Cut")
SAME_DURATION_S = 1e-3  # within which Lhotse takes a recording for the cut of all of it
OF_SHAR = ("shard_origin", "shar_epoch")  # fields that Lhotse's reader adds


def is_shar(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("cuts.*.jsonl*"))


def read_cuts(path: Path) -> Iterator[Item | Unusable]:
    """Of a file of JSON lines, gzipped or not, line by line.

    Relative paths of audio are looked for from the working folder on, as Lhotse does, then from the
    file's folder on, as NeMo does. ValueError: the file is of something else.
    """
    first = True
    with _own_reader():
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _of_line(line, f"{path}:{number}", path, first)
                        first = False
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Unusable(str(path), f"damaged, what follows is lost: {error}")


def read_shar(folder: Path) -> Iterator[Item | Unusable]:
    """Of the folder's shards, one after another; a damaged one is left where it breaks."""
    from lhotse import CutSet

    with _own_reader():
        for cuts_file, fields in _shards(folder):
            n_cuts = 0
            try:
                for cut in CutSet.from_shar(fields={"cuts": [cuts_file], **fields}):
                    n_cuts += 1
                    yield _of_cut(cut, f"{cuts_file}: {cut.id}")
                with gzip.open(cuts_file) if cuts_file.suffix == ".gz" else open(cuts_file) as file:
                    n_lines = sum(1 for line in file if line.strip())
            except Exception as error:  # lhotse, tarfile and gzip raise anything on damaged shards
                yield Unusable(str(cuts_file), f"left after {n_cuts} cuts: {_reason(error)}")
                continue
            if n_cuts < n_lines:
                yield Unusable(str(cuts_file), f"there is audio of {n_cuts} of its {n_lines} cuts")


def _shards(folder: Path) -> list[tuple[Path, dict[str, list[str]]]]:
    """Each shard's cuts, and its files of audio and of texts by field; arrays are left alone."""
    shards: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.*.*")):
        field, number, kind = path.name.split(".")[:3]
        if kind == "jsonl" or (kind == "tar" and field == "recording"):
            shards.setdefault(number, {})[field] = path
    found = [(files.pop("cuts"), files) for files in shards.values() if "cuts" in files]
    return [(cuts, {field: [str(p)] for field, p in files.items()}) for cuts, files in found]


def _of_line(line: bytes, name: str, path: Path, first: bool) -> Item | Unusable:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unusable(name, f"not a JSON object: {error}")
    kind = record.get("type") if isinstance(record, dict) else None
    if kind not in CUTS:
        if not first:
            return Unusable(name, f"its type is {kind!r}, expected one of {', '.join(CUTS)}")
        if isinstance(record, dict) and "audio_filepath" in record:
            raise ValueError(f"{path} is a NeMo manifest already")
        raise ValueError(
            f"{path} holds no cuts; of recordings and supervisions Lhotse makes them: "
            "lhotse cut simple -r RECORDINGS -s SUPERVISIONS cuts.jsonl.gz"
        )
    from lhotse.serialization import deserialize_item

    try:
        _as_read_here(record, path.parent)
        cut = deserialize_item(record)
    except Exception as error:  # a cut that is none breaks Lhotse anywhere
        return Unusable(name, _reason(error))
    return _of_cut(cut, name)


def _of_cut(cut, name: str) -> Item | Unusable:
    try:
        if not cut.has_recording:
            raise ValueError("it has no recording")
        said, left = _said(cut)
        source, place = _plain_source(cut)
        if source is None:
            for part in _mappings(cut.to_dict()):
                if "source" in part:
                    _check(part["type"], part["source"])
            samples = cut.load_audio()
            content, suffix = encoded(samples, cut.sampling_rate)
            line = {"duration": samples.shape[1] / cut.sampling_rate} | said
            return Item(name, line, content, suffix, left)
        line = place | said
        if source.type == "memory":
            audio_duration(source.source)  # it is audio
            return Item(name, line, source.source, suffix_of(source.source, None), left)
        _check(source.type, source.source)
        if not os.path.isfile(source.source):
            raise ValueError(f"no such audio file: {source.source}")
        return Item(name, line, Path(source.source), left=left)
    except Exception as error:  # Lhotse raises what its parts raise, as its type may be
        return Unusable(name, _reason(error))


def _plain_source(cut) -> tuple:
    """(source, what the line says of the section) where the cut is a section of one source, in some
    of its channels; (None, {}) where its audio has to be computed."""
    from lhotse import MonoCut, MultiCut

    if not isinstance(cut, MonoCut | MultiCut) or cut.recording.transforms:
        return None, {}
    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    sources = [s for s in cut.recording.sources if set(channels) & set(s.channels)]
    if len(sources) != 1 or not set(channels) <= set(sources[0].channels):
        return None, {}
    line, [source] = {}, sources
    whole = math.isclose(cut.duration, cut.recording.duration, abs_tol=SAME_DURATION_S)
    if cut.start or not whole:
        line["offset"] = cut.start
    line["duration"] = cut.duration
    if set(channels) != set(source.channels):  # their places in the file
        places = [source.channels.index(channel) for channel in channels]
        line["channel"] = places if len(places) > 1 else places[0]
    return source, line


def _said(cut) -> tuple[dict, frozenset[str]]:
    """Text, language and further fields of a line, and the names of fields that it cannot take."""
    supervisions = cut.supervisions
    line = {}
    if any(s.text is not None for s in supervisions):
        line["text"] = " ".join(s.text for s in supervisions if s.text)
    lang = next((s.language for s in supervisions if s.language), None)
    if lang is not None:
        line["lang"] = lang
    own = {"id": cut.id}
    if supervisions:
        own |= {"speaker": supervisions[0].speaker} | (supervisions[0].custom or {})
    own |= getattr(cut, "custom", None) or {}
    kept, left = fields_of({key: value for key, value in own.items() if key not in OF_SHAR})
    return line | kept, left


def _check(kind: str, source) -> None:
    """ValueError: audio that no file has. What a command prints or another machine sends is not
    asked for: a data set that someone sent would say what runs here."""
    if kind == "shar":
        raise ValueError("its audio is not in the folder")
    if kind not in ("file", "memory"):
        raise ValueError(f"its audio is the {kind} {source!r}; save it as a file")


def _as_read_here(record: dict, folder: Path) -> None:
    """Changes a cut's record: a path that leads to a file only from `folder` on is that file's, and
    what Lhotse would resample, with scipy or torchaudio, is read at the new rate."""
    for part in _mappings(record):
        source, transforms = part.get("source"), part.get("transforms")
        if isinstance(source, str) and not os.path.exists(source):
            beside = folder / source
            part["source"] = str(beside) if beside.exists() else source
        if isinstance(transforms, list):
            part["transforms"] = [t for t in transforms if t.get("name") != "Resample"]


def _mappings(node) -> Iterator[dict]:
    """All that lie in a cut's record, however deep: recordings and sources of tracks, of rooms."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _mappings(value)


@contextmanager
def _own_reader() -> Iterator[None]:
    """Lhotse reads audio as everything here does, and starts no process for it."""
    from lhotse.audio.backend import (
        AudioBackend,
        get_current_audio_backend,
        set_current_audio_backend,
    )

    class Reader(AudioBackend):
        def read_audio(self, path_or_fd, offset=0.0, duration=None, force_opus_sampling_rate=None):
            rate_hz = force_opus_sampling_rate  # the recording's
            audio = read_audio(path_or_fd, rate_hz, offset, duration, apart=True)
            if audio.damage:
                raise ValueError(f"{path_or_fd} is damaged: {audio.damage}")
            return audio.samples, rate_hz

    before = get_current_audio_backend()
    set_current_audio_backend(Reader())
    try:
        yield
    finally:
        set_current_audio_backend(before)


def _reason(error: Exception) -> str:
    """The first line: Lhotse adds the whole cut to it."""
    text = str(error).strip().partition("\n")[0][:300]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
