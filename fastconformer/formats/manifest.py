"""NeMo manifests, JSON lines that name clips: the parser of transcription, scoring and training.

    {"audio_filepath": "a.wav", "duration": 2.5, "text": "hello", "lang": "en"}

`audio_filepath` (older: `audio_filename`) is absolute or relative to the manifest's folder; with
`offset` it is the section [offset, offset + duration), else the whole file. `text_filepath` names a
file with the text. `_skipme` leaves a line out, everywhere.

A line may be a chat of one turn instead, as FunASR trains on:

    {"messages": [{"role": "user", "content": "ASK<|startofspeech|>!a.wav<|endofspeech|>"},
                  {"role": "assistant", "content": "TEXT"}], "speech_length": 250}

ASK is what the model is asked, `others["prompt"]`; a system message may stand before it.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..text.chat import SYSTEM

ABSURD_DURATION_S = 7 * 24 * 3600.0
# Sound that is this many times longer or shorter than its line says belongs to another line.
DURATION_MISMATCH = 2.0
JUNK_LINES = 1000  # without one that is JSON: not a manifest
CHAT_FRAME_S = 0.01  # of a chat's speech_length
_SPEECH = re.compile(r"(?P<prompt>.*)<\|startofspeech\|>!(?P<path>[^!].*)<\|endofspeech\|>", re.S)


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
    folder: Path | None = field(default=None, compare=False)  # that was searched for it
    n_channels: int | None = field(default=None, compare=False)  # of those that are taken apart
    content: bytes | None = field(default=None, repr=False)  # of what is no file
    notes: tuple[str, ...] = field(default=(), compare=False)  # what is odd about the recording

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
    """What each line that is not blank names, in order. FileNotFoundError: no such manifest.
    ValueError: a file of something else, not one of whose first lines is JSON; see `_lines`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} is not a file")
    junk = 0  # lines that are no JSON, as long as there is nothing else
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name = ""
        try:
            entry = _of_chat(_entry(line))
            name = str(_audio(entry) or "")
            if entry.get("_skipme"):
                raise BadLine("skipme", "the manifest says _skipme")
            if lang is not None and language_in(entry) not in (None, lang):
                raise BadLine("other_language", f"lang is {entry['lang']!r}")
            yield _clip(entry, path, number)
            junk = -1
        except BadLine as error:
            is_junk = error.args[0] == "not_json"
            junk = junk + 1 if is_junk and junk >= 0 else -1
            if junk == JUNK_LINES:
                raise ValueError(
                    f"{path} is no manifest: none of its first {junk} lines is a JSON object"
                ) from None
            yield LeftOut(str(path), number, *error.args, audio=name)


def _lines(path: Path) -> Iterator[bytes]:
    """Its lines; gzipped ones, as Lhotse writes, are unpacked. ValueError: UTF-16, damaged gzip."""
    with open(path, "rb") as file:
        head = file.read(2)
        file.seek(0)
        if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is UTF-16, as PowerShell's > writes; write it as UTF-8")
        if head != b"\x1f\x8b":
            yield from file
            return
        try:
            with gzip.open(file) as unpacked:
                yield from unpacked
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is cut or damaged: {error}") from None


def _entry(line: bytes) -> dict:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadLine("not_json", f"not a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise BadLine("not_json", f"not a JSON object: {line.decode()[:80].strip()}")
    return entry


def _of_chat(entry: dict) -> dict:
    """A chat as a line with `audio_filepath`; any other line as it is."""
    messages = entry.get("messages")
    if messages is None or "audio_filepath" in entry:
        return entry
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadLine("bad_chat", "messages is no list of messages with role and content")
    said = {"system": [], "user": [], "assistant": []}
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in said or not isinstance(content, str):
            raise BadLine("bad_chat", f"a message of role {role!r} whose content is {content!r}")
        said[role].append(content)
    if len(said["user"]) != 1 or len(said["assistant"]) != 1:
        raise BadLine("bad_chat", f"{len(said['user'])} turns, expected one")
    if said["system"] not in ([], [SYSTEM]):
        raise BadLine("bad_chat", f"the system message is {said['system']}, expected {SYSTEM!r}")
    found = _SPEECH.fullmatch(said["user"][0])
    if found is None:
        raise BadLine("no_audio_filepath", f"no <|startofspeech|>!PATH in {said['user'][0]!r}")
    rest = {key: value for key, value in entry.items() if key != "messages"}
    frames = rest.pop("speech_length", None)
    if "duration" not in rest and frames is not None:
        if not isinstance(frames, int | float) or isinstance(frames, bool) or frames <= 0:
            raise BadLine("bad_duration", f"speech_length is {frames!r}, expected frames of 10 ms")
        rest["duration"] = frames * CHAT_FRAME_S
    text = {"text": said["assistant"][0], "prompt": found["prompt"]}
    return rest | text | {"audio_filepath": found["path"]}


def _clip(entry: dict, manifest: Path, number: int) -> Clip:
    audio = _audio(entry)
    if not isinstance(audio, str) or not audio:
        raise BadLine("no_audio_filepath", f"audio_filepath is {audio!r}, expected a path")
    if "\0" in audio:
        raise BadLine("missing_audio", f"no such file: {audio!r}")
    try:
        path = manifest.parent / Path(audio).expanduser()
    except RuntimeError:  # no user of that name
        path = manifest.parent / audio
    text = entry.get("text")
    if text is None and isinstance(entry.get("text_filepath"), str):
        text = _text_of_file(manifest.parent / entry["text_filepath"])
    if isinstance(text, str) and not _is_text(text):
        raise BadLine("bad_text", f"text holds half of a character: {ascii(text)[:80]}")
    if text is not None and not isinstance(text, str):
        raise BadLine("no_text", f"text is {text!r}, expected a string")
    known = ("audio_filepath", "offset", "duration", "text", "lang", "channel", "_skipme")
    return Clip(
        path=path,
        audio=audio,
        offset_s=_seconds(entry, "offset", "0 or more"),
        duration_s=_seconds(entry, "duration", "more than 0"),
        text=text,
        lang=language_in(entry),
        channel=_channel(entry.get("channel")),
        manifest=str(manifest),
        line=number,
        others={key: value for key, value in entry.items() if key not in known},
    )


def language_in(entry: dict, key: str = "lang") -> str | None:
    """BadLine: it is no string, and the line would go as one without a language."""
    lang = entry.get(key)
    if lang is not None and not (isinstance(lang, str) and _is_text(lang)):
        raise BadLine("bad_lang", f"{key} is {ascii(lang)[:40]}, expected a string")
    return lang


def _audio(entry: dict):
    return entry.get("audio_filepath", entry.get("audio_filename"))


def _text_of_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\n", "")  # as NeMo reads it
    except (OSError, ValueError) as error:
        raise BadLine("no_text", f"text_filepath {path}: {error}") from None


def _is_text(text: str) -> bool:
    """JSON can write half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds(entry: dict, key: str, expected: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= ABSURD_DURATION_S or (key == "duration" and value == 0):
        raise BadLine(f"bad_{key}", f"{key} is {repr(value)[:40]}, expected seconds, {expected}")
    return float(value)


def _channel(value) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) and value else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise BadLine("bad_channel", f"channel is {value!r}, expected numbers from 0 on")
    return tuple(numbers)
