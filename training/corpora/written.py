"""Items of a data set, written as a NeMo manifest beside the audio that lies in no file."""

import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from fastconformer.checkpoint.files import naming_file, sync, work_folder
from fastconformer.formats.manifest import ABSURD_DURATION_S

# Keys of a manifest that an item's own fields must not stand for.
RESERVED = {"audio_filepath", "audio_filename", "offset", "duration", "channel"}
RESERVED |= {"text", "text_filepath", "lang", "messages"}
LOUDEST = 32768  # of 16 bits
SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"}


@dataclass(frozen=True)
class Item:
    """One item that can be used. line: of the manifest, without `audio_filepath`; audio: the file
    that the line will name, or what is to be written as one, with its suffix; left: names of its
    fields that a manifest does not take."""

    name: str
    line: dict
    audio: Path | bytes
    suffix: str = ""
    left: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unusable:
    name: str
    reason: str


@dataclass
class Written:
    """What a manifest became."""

    n_clips: int = 0
    seconds: float = 0.0
    n_files: int = 0  # of audio that were written
    left_fields: set[str] = field(default_factory=set)
    unusable: list[Unusable] = field(default_factory=list)


def write_manifest(items: Iterable[Item | Unusable], folder: Path, lang: str | None) -> Written:
    """Writes `manifest.jsonl`, audio/NNNNNN.* and, where something cannot be used, `left_out.jsonl`
    into a new folder, which appears whole or not at all. lang: of lines that have none.

    ValueError: there is something in the folder, or no item can be used. OSError: as writing does.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"-o {folder} is there already; name a new folder, or delete it")
    done = Written()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.parent, folder.name) as work:
        new = work / "new"
        (new / "audio").mkdir(parents=True)
        manifest = new / "manifest.jsonl"
        with naming_file(manifest), open(manifest, "w", encoding="utf-8", newline="\n") as file:
            for item in items:
                line = _line(item, lang, done)
                if line is None:
                    continue
                if isinstance(item.audio, bytes):
                    path = new / "audio" / f"{done.n_files:06d}{item.suffix}"
                    with naming_file(path):
                        path.write_bytes(item.audio)
                    done.n_files += 1
                file.write(line)
        if not done.n_clips:
            first = f": {done.unusable[0].name}: {done.unusable[0].reason}" if done.unusable else ""
            raise ValueError(f"nothing in it can be used{first}")
        if done.unusable:
            lines = (json.dumps({"item": x.name, "reason": x.reason}) for x in done.unusable)
            (new / "left_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if not done.n_files:
            (new / "audio").rmdir()
        sync(manifest)
        if hasattr(os, "sync"):
            os.sync()  # the audio, at once: a call for each file takes longer than to write it
        if folder.exists():
            folder.rmdir()
        os.rename(new, folder)
        sync(folder.parent)
    return done


def _line(item: Item | Unusable, lang: str | None, done: Written) -> str | None:
    """The item's line, None where it cannot be used; counted in `done`."""
    if isinstance(item, Item):
        name = f"audio/{done.n_files:06d}{item.suffix}"
        if isinstance(item.audio, Path):
            name = os.path.abspath(item.audio)
        line = {"audio_filepath": name} | item.line
        if lang is not None and not line.get("lang"):
            line["lang"] = lang
        text = json.dumps(line, ensure_ascii=False) + "\n"
        reason = _why_not(line, text)
        if reason is None:
            done.n_clips += 1
            done.seconds += line["duration"]
            done.left_fields |= item.left
            return text
        item = Unusable(item.name, reason)
    done.unusable.append(item)
    return None


def _why_not(line: dict, text: str) -> str | None:
    """Why a manifest's reader would not take the line; None: it will."""
    start, duration = line.get("offset", 0), line["duration"]
    if not (start >= 0 and 0 < duration <= ABSURD_DURATION_S):
        return f"it starts at {start} s and lasts {duration} s"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair
        return "its text holds half of a character"
    return None


def fields_of(values: dict) -> tuple[dict, frozenset[str]]:
    """What a line takes of an item's own fields: texts, numbers and truth values under names that
    mean nothing else there; and the names of the rest."""
    kept = {
        key: value
        for key, value in values.items()
        if key not in RESERVED
        and isinstance(value, str | int | float)
        and (not isinstance(value, float) or math.isfinite(value))
    }
    return kept, frozenset(key for key in values.keys() - kept.keys() if values[key] is not None)


def encoded(samples: np.ndarray, rate_hz: int) -> tuple[bytes, str]:
    """(C, L) samples as a file's content and its suffix: FLAC of 16 bits, to the nearest step; of
    samples louder than 1, which 16 bits do not hold, WAV of 32-bit floats."""
    scaled = np.rint(samples.T.astype(np.float64) * LOUDEST)
    content = io.BytesIO()
    if np.abs(scaled).max(initial=0) > LOUDEST:
        soundfile.write(content, samples.T, rate_hz, format="WAV", subtype="FLOAT")
        return content.getvalue(), ".wav"
    steps = np.clip(scaled, -LOUDEST, LOUDEST - 1).astype(np.int16)
    soundfile.write(content, steps, rate_hz, format="FLAC", subtype="PCM_16")
    return content.getvalue(), ".flac"


def suffix_of(content: bytes, name: str | None) -> str:
    """A suffix for a file of this content, which another file's name may tell."""
    for head, suffix in SUFFIXES.items():
        if content.startswith(head):
            return suffix
    suffix = Path(name or "").suffix
    return suffix if re.fullmatch(r"\.\w{1,5}", suffix, re.ASCII) else ""
