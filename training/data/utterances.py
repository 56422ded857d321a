"""Manifest lines that can be used, and those that cannot, each with its reason."""

import dataclasses
from pathlib import Path

from fastconformer.audio.files import audio_duration
from fastconformer.formats.manifest import BadLine, Clip, LeftOut, language_in, manifest_lines
from fastconformer.text.prompt import SLOTS
from training.data.tarred import shard_number


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One manifest line that can be used; `tokens` is empty until `limits.check_for_training`."""

    audio_path: str  # of the tar, where the clip lies in one
    text: str
    duration_s: float
    offset_s: float | None  # None: the whole file
    manifest: str
    line: int  # from 1
    tokens: tuple[int, ...] = ()
    tar_member: str | None = None
    lang: str | None = None
    others: dict = dataclasses.field(default_factory=dict, compare=False)  # the line's other keys
    prompt_length: int = 0  # of `tokens`, those of a prompt
    channel: tuple[int, ...] | None = None  # that are heard, mixed; None: all
    encoder_slots: dict = dataclasses.field(default_factory=dict, compare=False)  # said to it
    auto_share: float = 0.0  # of its draws, in which they are not said

    @property
    def audio_name(self) -> str:
        member = f":{self.tar_member}" if self.tar_member else ""
        return self.audio_path + member

    def as_line(self, defaults: dict) -> dict:
        """Text, language and slots as a manifest line has them; `defaults` are for slots that it
        lacks."""
        slots = {name: self.others[name] for name in SLOTS if name in self.others}
        return {**defaults, **slots, "text": self.text, "lang": self.lang}

    @property
    def name(self) -> str:
        return f"{self.audio_name} ({self.manifest}, line {self.line})"


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A manifest line that is left out: `reason` is a short code, `detail` says what was found."""

    manifest: str
    line: int
    reason: str
    detail: str
    audio_filepath: str = ""


def dropped_line(utterance: Utterance, reason: str, detail: str) -> Dropped:
    return Dropped(
        utterance.manifest, utterance.line, reason, detail, audio_filepath=utterance.audio_name
    )


@dataclasses.dataclass(frozen=True)
class Fields:
    """The manifest's keys of text and language, where they are not `text` and `lang`; a line
    without a language has `default_lang`, one without a channel `default_channel`."""

    text: str = "text"
    lang: str = "lang"
    default_lang: str | None = None
    default_channel: int | None = None

    def of(self, clip: Clip) -> Clip:
        """The clip with the text, language and channel that these keys and defaults say. BadLine: a
        language that is none."""
        changes = {}
        if self.text != "text":
            value = clip.others.get(self.text)
            changes["text"] = value if isinstance(value, str) else None
        if self.lang != "lang":
            changes["lang"] = language_in(clip.others, self.lang)
        if self.default_lang is not None and changes.get("lang", clip.lang) is None:
            changes["lang"] = self.default_lang
        if self.default_channel is not None and clip.channel is None:
            changes["channel"] = (self.default_channel,)
        return dataclasses.replace(clip, **changes) if changes else clip


class UnusableLine(ValueError):
    """One manifest line cannot be used: (reason, detail)."""


def read_utterances(
    path: str | Path,
    lang: str | None = None,
    tars: dict[int, str] | None = None,
    needs_text: bool = True,
    fields: Fields = Fields(),
) -> tuple[list[Utterance], list[Dropped]]:
    """Read a NeMo manifest: JSON lines with `audio_filepath`, `duration`, `text`, maybe `offset`.

    With `lang`, lines of another `lang` are left out. `audio_filepath` is absolute or relative to
    the manifest's folder; with `tars` ({shard id: tar file}) it is a member of the tar that the
    line's `shard_id`, or else the manifest's number, names. Where no text is needed, a line without
    one has an empty one. Every bad line is in the second list, with its reason; blank lines are
    ignored.

    Raises:
        FileNotFoundError: there is no such manifest.
    """
    utterances, dropped = [], []
    own_lang = fields.lang == "lang"
    for found in manifest_lines(path, lang if own_lang else None):
        try:
            if isinstance(found, LeftOut):
                raise UnusableLine(found.reason, found.detail)
            found = fields.of(found)
            if not own_lang and lang is not None and found.lang not in (None, lang):
                raise UnusableLine("other_language", f"{fields.lang} is {found.lang!r}")
            utterances.append(_utterance(found, tars, needs_text))
        except (UnusableLine, BadLine) as error:
            name = str(found.audio)
            dropped.append(Dropped(found.manifest, found.line, *error.args, audio_filepath=name))
    return utterances, dropped


def _utterance(clip: Clip, tars: dict[int, str] | None, needs_text: bool) -> Utterance:
    if clip.text is None and needs_text:
        raise UnusableLine("no_text", "text is None")
    seconds = clip.duration_s
    if seconds is None and "prompt" in clip.others and not tars:  # a chat need not say it
        seconds = _length_of(_audio_file(clip.path))
    if seconds is None:
        raise UnusableLine("bad_duration", "duration is None seconds")
    return Utterance(
        audio_path=_tar_of(clip, tars) if tars else str(_audio_file(clip.path)),
        text=clip.text or "",
        duration_s=seconds,
        offset_s=clip.offset_s,
        manifest=clip.manifest,
        line=clip.line,
        tar_member=clip.audio if tars else None,
        lang=clip.lang,
        others=clip.others,
        channel=clip.channel,
    )


def _audio_file(path: Path) -> Path:
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise UnusableLine("missing_audio", f"no such file: {path}")
    return path


def _length_of(path: Path) -> float:
    try:
        return audio_duration(path)
    except (OSError, ValueError) as error:
        raise UnusableLine("unreadable_audio", str(error)) from None


def _tar_of(clip: Clip, tars: dict[int, str]) -> str:
    shard = clip.others.get("shard_id", shard_number(Path(clip.manifest).name))
    if len(tars) == 1 and "shard_id" not in clip.others:
        shard = next(iter(tars))
    if shard not in tars:
        raise UnusableLine("missing_audio", f"shard_id is {shard!r}, and no tar has that number")
    return tars[shard]
