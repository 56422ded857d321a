"""Where transcripts go: to stdout, to one file, or to a file a recording, in several formats."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.files import write_text
from ..formats.manifest import Clip
from ..formats.subtitles import subtitles_of
from ..formats.transcripts import escaped, to_ctm, to_json, to_text

if TYPE_CHECKING:
    from ..recordings.transcript import Transcript

    Part = tuple[Clip, Transcript]

SUFFIXES = {
    "text": ".txt",
    "json": ".json",
    "jsonl": ".jsonl",
    "srt": ".srt",
    "vtt": ".vtt",
    "ctm": ".ctm",
}
OF_OTHER_PROGRAMS = frozenset([
    ".ass", ".csv", ".lrc", ".rttm", ".sbv", ".ssa", ".stl", ".stm", ".sub", ".textgrid", ".trs",
    ".tsv", ".ttml",
])  # fmt: skip
SUBTITLES = ("srt", "vtt")
WITH_TIMES = ("srt", "vtt", "ctm")


def formats_of(given: tuple[str, ...] | None, output: Path | None) -> tuple[str, ...]:
    """The formats to write: those that are given, else what the suffix of the output names.
    ValueError: the two contradict each other, or the suffix is that of another program's format."""
    of_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    named = of_suffix.get(output.suffix.lower()) if output and not output.is_dir() else None
    if given is None:
        if output and not output.is_dir() and output.suffix.lower() in OF_OTHER_PROGRAMS:
            raise ValueError(
                f"-o {output}: {output.suffix} is no format of ours "
                f"({', '.join(SUFFIXES.values())}); --format text writes the text alone"
            )
        return (named or "text",)
    if named and given != (named,):
        raise ValueError(
            f"-o {output} names the format {named}, --format is {','.join(given)}; "
            + ("leave one out" if len(given) == 1 else "several formats need -o FOLDER")
        )
    return given


@dataclass
class Outputs:
    """Takes transcripts in the order of the recordings and writes them.

    target: a file for all, a folder for a file a recording, None for stdout; `beside`: a file
    beside each recording. named: the text format tells whose text it is; timed: and when each word
    was said. limits, highlight: see `subtitles_of`. Results of the channels of one recording follow
    one another.
    """

    formats: tuple[str, ...]
    target: Path | None = None
    is_folder: bool = False
    beside: bool = False
    named: bool = False
    timed: bool = True
    highlight: bool = False
    limits: dict = field(default_factory=dict)

    def __post_init__(self):
        self._group: list[Part] = []
        self._texts: list[str] = []
        self._names = Names()

    @property
    def is_each(self) -> bool:
        """Whether each recording has files of its own."""
        return self.beside or self.is_folder

    def paths(self, clips: list[Clip]) -> list[Path]:
        """What will be written for these clips, where each recording has files of its own."""
        names = Names()
        return [path for clip in clips for path in self._paths(clip, names)]

    def add(self, clip: Clip, transcript: "Transcript") -> None:
        """Raises OSError where its file cannot be written."""
        if self._group and _recording(self._group[0][0]) != _recording(clip):
            self._flush()
        self._group.append((clip, transcript))
        if clip.channel is None:
            self._flush()

    def close(self) -> None:
        """Writes what is left."""
        self._flush()
        if self.is_each:
            return
        text = "".join(self._texts)
        if self.formats == ("json",):
            text = "[\n" + ",\n".join(self._texts) + "\n]\n"
        if self.target is not None:
            write_text(self.target, text)
        else:
            self._print(text)

    def _flush(self) -> None:
        group, self._group = self._group, []
        if not group:
            return
        if self.is_each:
            for path in self._paths(group[0][0], self._names):
                style = next(name for name in self.formats if SUFFIXES[name] == path.suffix)
                items = self._render(style, group)
                text = "[\n" + ",\n".join(items) + "\n]\n" if style == "json" else "".join(items)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)
            return
        self._texts += self._render(self.formats[0], group)
        if self.target is None and self.formats != ("json",):  # a long run shows what it has
            self._print("".join(self._texts))
            self._texts = []

    def _paths(self, clip: Clip, names: "Names") -> list[Path]:
        if self.beside:
            name = clip.path.parent / names.fresh(clip.path, clip.path.stem)
        else:
            name = self.target / names.fresh(self.target, _name_in_folder(clip))
        return [name.with_name(name.name + SUFFIXES[style]) for style in self.formats]

    def _render(self, style: str, group: "list[Part]") -> list[str]:
        """The items of one recording in a format."""
        if style in ("json", "jsonl"):
            lines = [json_line(clip, transcript) for clip, transcript in group]
            return lines if style == "json" else [line + "\n" for line in lines]
        if style == "ctm":
            name = self._names.of_recording(group[0][0].path)
            return [
                to_ctm(transcript, name, clip.offset_s or 0.0, (clip.channel or (0,))[0] + 1)
                for clip, transcript in group
            ]
        if style in SUBTITLES:
            parts = [(f"channel {c.channel[0]}" if len(group) > 1 else "", t) for c, t in group]
            return [subtitles_of(parts, style, self.highlight, **self.limits)]
        is_named = self.named and not (self.is_each and len(group) == 1)
        if not self.timed:  # the times were wanted by another format
            group = [(clip, replace(transcript, words=None)) for clip, transcript in group]
        return [to_text(found, name_of(clip) if is_named else None) for clip, found in group]

    def _print(self, text: str) -> None:
        print(escaped(text) if sys.stdout.isatty() else text, end="", flush=True)


def name_of(clip: Clip) -> str:
    """A clip's name as the user gave it, with its channels where not all were heard."""
    if clip.channel is None:
        return clip.audio
    return f"{clip.audio} [{','.join(map(str, clip.channel))}]"


def json_line(clip: Clip, transcript: "Transcript", **fields) -> str:
    """A transcript as a JSON object on one line: what names the clip, `fields`, the transcript."""
    found = to_json(transcript, **naming(clip), **fields)
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def naming(clip: Clip) -> dict:
    """What names a clip in JSON, and what is odd about its recording."""
    named: dict = {"audio": clip.audio}
    if clip.offset_s is not None:
        named["offset"] = clip.offset_s
    if clip.channel is not None:
        named["channel"] = clip.channel[0] if len(clip.channel) == 1 else list(clip.channel)
    if clip.n_channels is not None:
        named["n_channels"] = clip.n_channels
    if clip.notes:
        named["notes"] = list(clip.notes)
    return named


class Names:
    """Names of recordings in a CTM or a folder: file stems, numbered where they repeat."""

    def __init__(self):
        self.taken: set[tuple] = set()
        self.recordings: dict[Path, str] = {}

    def fresh(self, place: Path, stem: str) -> str:
        name, number = stem, 1
        while (place.parent, name) in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken.add((place.parent, name))
        return name

    def of_recording(self, path: Path) -> str:
        if path not in self.recordings:
            self.recordings[path] = self.fresh(Path("ctm/"), path.stem)
        return self.recordings[path]


def _name_in_folder(clip: Clip) -> str:
    if clip.content is not None:
        return "stdin"
    if clip.folder is None:
        return clip.path.stem
    return str(clip.path.relative_to(clip.folder).with_suffix(""))


def _recording(clip: Clip) -> tuple:
    return clip.path, clip.offset_s, clip.duration_s
