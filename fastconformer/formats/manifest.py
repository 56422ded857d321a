"""NeMo manifests, JSON lines that name clips: the parser of transcription, scoring and training.

    {"audio_filepath": "a.wav", "duration": 2.5, "text": "hello", "lang": "en"}

`audio_filepath` is absolute or relative to the manifest's folder; with `offset` it is the section
[offset, offset + duration), else the whole file. `_skipme` leaves a line out, everywhere.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ABSURD_DURATION_S = 7 * 24 * 3600.0
# Sound that is this many times longer or shorter than its line says belongs to another line.
DURATION_MISMATCH = 2.0


@dataclass(frozen=True)
class Clip:
    """A file or a section of it; `audio` is its name as the user wrote it, `text` its reference,
    `channel` numbers from 0; `manifest` and `line` say what names it, `others` has the line's other
    keys."""

    path: Path
    audio: str
    offset_s: float | None = None  # None: the whole file
    duration_s: float | None = None  # as declared
    text: str | None = None
    lang: str | None = None
    channel: tuple[int, ...] | None = None  # None: as the command says
    manifest: str | None = None
    line: int | None = None  # from 1
    others: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str | None:
        return None if self.manifest is None else f"{self.manifest}:{self.line}"


@dataclass(frozen=True)
class LeftOut:
    """A manifest line that is no clip: `reason` is a short code, `detail` says what was found."""

    manifest: str
    line: int
    reason: str
    detail: str
    audio: str = ""

    @property
    def place(self) -> str:
        return f"{self.manifest}:{self.line}"

    @property
    def is_wanted(self) -> bool:
        """The manifest or the user asked for it; any other line is a fault in the manifest."""
        return self.reason in ("skipme", "other_language")


class BadLine(ValueError):
    """A manifest line that cannot be used: (code, what was found)."""


def read_manifest(
    path: str | os.PathLike, lang: str | None = None
) -> tuple[list[Clip], list[LeftOut]]:
    """Clips of a manifest, and the lines that are left out; with `lang`, those of another language
    too. FileNotFoundError, or ValueError of a manifest without lines."""
    clips, left_out = [], []
    for found in manifest_lines(path, lang):
        (clips if isinstance(found, Clip) else left_out).append(found)
    if not clips and not left_out:
        raise ValueError(f"manifest {path} is empty")
    return clips, left_out


def manifest_lines(path: str | os.PathLike, lang: str | None = None) -> Iterator[Clip | LeftOut]:
    """What each line that is not blank names, in order. FileNotFoundError: no such manifest."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} is not a file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = ""
            try:
                entry = _entry(line)
                name = str(entry.get("audio_filepath", ""))
                if lang is not None and entry.get("lang") not in (None, lang):
                    raise BadLine("other_language", f"lang is {entry['lang']!r}")
                if entry.get("_skipme"):
                    raise BadLine("skipme", "the manifest says _skipme")
                yield _clip(entry, path, number)
            except BadLine as error:
                yield LeftOut(str(path), number, *error.args, audio=name)


def _entry(line: bytes) -> dict:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadLine("not_json", f"not a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise BadLine("not_json", f"not a JSON object: {line.decode()[:80].strip()}")
    return entry


def _clip(entry: dict, manifest: Path, number: int) -> Clip:
    audio = entry.get("audio_filepath")
    if not isinstance(audio, str) or not audio:
        raise BadLine("no_audio_filepath", f"audio_filepath is {audio!r}, expected a path")
    if "\0" in audio:
        raise BadLine("missing_audio", f"no such file: {audio!r}")
    try:
        path = manifest.parent / Path(audio).expanduser()
    except RuntimeError:  # no user of that name
        path = manifest.parent / audio
    text, lang = entry.get("text"), entry.get("lang")
    if text is not None and not isinstance(text, str):
        raise BadLine("no_text", f"text is {text!r}, expected a string")
    known = ("audio_filepath", "offset", "duration", "text", "lang", "channel", "_skipme")
    return Clip(
        path=path,
        audio=audio,
        offset_s=_seconds(entry, "offset", "0 or more"),
        duration_s=_seconds(entry, "duration", "more than 0"),
        text=text,
        lang=lang if isinstance(lang, str) else None,
        channel=_channel(entry.get("channel")),
        manifest=str(manifest),
        line=number,
        others={key: value for key, value in entry.items() if key not in known},
    )


def _seconds(entry: dict, key: str, expected: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= ABSURD_DURATION_S or (key == "duration" and value == 0):
        raise BadLine(f"bad_{key}", f"{key} is {value!r}, expected seconds, {expected}")
    return float(value)


def _channel(value) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) and value else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise BadLine("bad_channel", f"channel is {value!r}, expected numbers from 0 on")
    return tuple(numbers)
