"""Audio files to text with times: `python -m fastconformer.transcribe AUDIO... --model M`.

    python -m fastconformer.transcribe talk.wav --model model.nemo --format srt -o talk.srt
    python -m fastconformer.transcribe recordings/ more.flac --model FOLDER --timestamps
    python -m fastconformer.transcribe archive/ --model FOLDER --format jsonl -o archive.jsonl

AUDIO are files, folders (searched for audio, deeply), patterns in quotes ("calls/**/*.wav"), NeMo
manifests (.jsonl, .json) and `-`: names from stdin, one a line. What cannot be read is told on
stderr, one line each; the rest goes on, and the exit status is 1.

Formats: `text` (several inputs: path, tab, text; with --timestamps then a line a word), `json` (all
fields of every Transcript), `jsonl` (the same, a line a clip, written as they come: started again,
a job that was killed goes on where it was; under torchrun the processes share the clips), `srt` and
`vtt` (subtitles), `ctm` (NIST word times). The writers are functions Transcript -> str, at the top.
"""

import argparse
import contextlib
import glob
import html
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import fastconformer

from .audio.files import load_audio
from .checkpoint.files import atomic_file
from .decoding import Confidence, read_arpa, read_phrases, token_bias
from .jobs.results import Progress, all_results, merge_results, part_path, read_ahead, read_results
from .model import ASRModel, Transcript
from .recordings import longform
from .recordings.timestamps import Span

# Subtitle limits that broadcasters share: two lines of 42 characters, seven seconds.
LINE_CHARACTERS, CUE_LINES, CUE_SECONDS = 42, 2, 7.0
READING_SPEED = 17.0  # characters a second that viewers read: a cue stays as long as it takes
PAUSE_SECONDS = 1.5  # a silence this long ends a cue even inside a segment
SHORTEST_CUE_SECONDS = 0.5  # a word of one frame would flash; held as far as the next cue allows
LEAST_CUE_SECONDS = 0.002  # whatever the times: players drop a cue that ends where it starts


def to_text(transcript: Transcript, name: str | None = None) -> str:
    """The text on a line, after `name` and a tab if there is a name. Where words have times, one
    line for each follows: start, end (seconds), word, after tabs where there is a name."""
    prefix = "" if name is None else "\t"
    lines = [f"{name or ''}{prefix}{transcript.text}"]
    lines += [f"{prefix}{w.start:.2f}\t{w.end:.2f}\t{w.text}" for w in transcript.words or ()]
    return "\n".join(lines) + "\n"


def to_srt(transcript: Transcript, **limits) -> str:
    """SubRip subtitles; empty for an empty text. `limits`: see `cues`. ValueError: the transcript
    has no times."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(transcript, **limits), start=1)
    ]
    return "\n".join(blocks)


def to_vtt(transcript: Transcript, **limits) -> str:
    """WebVTT subtitles. `limits`: see `cues`. ValueError: the transcript has no times."""
    blocks = ["WEBVTT\n"]
    blocks += [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n"
        f"{html.escape(cue.text, quote=False)}\n"
        for cue in cues(transcript, **limits)
    ]
    return "\n".join(blocks)


def to_ctm(transcript: Transcript, name: str, offset_s: float = 0.0) -> str:
    """NIST CTM, a line a word: `name 1 start duration word`, seconds counted from the start of the
    recording, in which the clip begins at `offset_s`. ValueError: the transcript has no times."""
    _need_times(transcript)
    name = "_".join(name.split()) or "-"
    return "".join(
        f"{name} 1 {offset_s + w.start:.3f} {max(w.end - w.start, 0):.3f} {w.text}\n"
        for w in transcript.words
        if w.text.strip()
    )


def to_json(transcript: Transcript, **fields) -> dict:
    """All fields of the transcript after `fields`, of types that JSON has; spans become objects
    with text, start, end and, where there is one, confidence. A score that is not finite becomes
    None. Confidences and retries are left out where there are none."""

    def of_span(span):
        sure = {} if span.confidence is None else {"confidence": round(span.confidence, 6)}
        times = {"start": round(span.start, 6), "end": round(span.end, 6)}
        return {"text": span.text} | times | sure

    def spans(items):
        return None if items is None else [of_span(item) for item in items]

    seldom = {}
    if transcript.confidences is not None:
        seldom["confidences"] = [round(value, 6) for value in transcript.confidences]
    if transcript.retries:
        seldom["retries"] = spans(transcript.retries)
    return (
        fields
        | {
            "text": transcript.text,
            "duration": round(transcript.duration, 6),
            "head": transcript.head,
            "score": float(transcript.score) if math.isfinite(transcript.score) else None,
            "tokens": transcript.tokens,
            "token_frames": transcript.token_frames,
            "token_durations": transcript.token_durations,
            "words": spans(transcript.words),
            "segments": spans(transcript.segments),
        }
        | seldom
    )


def cues(
    transcript: Transcript,
    line_characters: int = LINE_CHARACTERS,
    lines: int = CUE_LINES,
    reading_speed: float = READING_SPEED,
) -> list[Span]:
    """Subtitles: spans whose text has at most so many lines of so many characters and lasts at
    most seven seconds. They end with segments and at pauses, and are cut between words.

    They stay for as long as they take to read, `reading_speed` characters a second, or until the
    next cue. A single longer word stays whole. Cues are in order, do not overlap and are never of
    length 0. ValueError: a limit below 1, or no times.
    """
    if line_characters < 1 or lines < 1 or not reading_speed >= 1:
        raise ValueError(
            f"subtitles of {lines} lines of {line_characters} characters, {reading_speed} read a "
            "second: expected at least 1 of each"
        )
    _need_times(transcript)
    groups: list[list[Span]] = []
    for word, starts_segment in _words_of_segments(transcript):
        group = groups[-1] if groups else None
        if (
            group is None
            or starts_segment
            or word.start - group[-1].end >= PAUSE_SECONDS
            or word.end - group[0].start > CUE_SECONDS
            or len(_lines([*group, word], line_characters)) > lines
        ):
            groups.append([word])
        else:
            group.append(word)
    spans = []
    for k, group in enumerate(groups):
        start = group[0].start
        start = max(start, spans[-1].end if spans else 0.0)
        reading_s = sum(len(word.text) + 1 for word in group) / reading_speed
        end = max(group[-1].end, start + SHORTEST_CUE_SECONDS, start + reading_s)
        if transcript.duration > start:
            end = min(end, max(transcript.duration, start + LEAST_CUE_SECONDS))
        if k + 1 < len(groups):
            end = min(end, groups[k + 1][0].start)
        end = min(max(end, start + LEAST_CUE_SECONDS), start + CUE_SECONDS)
        spans.append(Span("\n".join(_lines(group, line_characters)), start, end))
    return spans


def _words_of_segments(transcript: Transcript) -> Iterator[tuple[Span, bool]]:
    """Each word, and whether a segment starts with it. Segments are words joined by spaces."""
    remaining = [len(segment.text.split()) for segment in transcript.segments or ()]
    starts = True
    for word in transcript.words:
        if not word.text.strip():
            continue
        yield word, starts
        starts = False
        if remaining:
            remaining[0] -= len(word.text.split())
            if remaining[0] <= 0:
                remaining.pop(0)
                starts = True


def _lines(words: list[Span], characters: int) -> list[str]:
    return textwrap.wrap(
        " ".join(word.text for word in words),
        characters,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _clock(seconds: float, decimal_mark: str) -> str:
    milliseconds = round(max(seconds, 0.0) * 1000)
    minutes, milliseconds = divmod(milliseconds, 60000)
    return (
        f"{minutes // 60:02d}:{minutes % 60:02d}:"
        f"{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"
    )


def _need_times(transcript: Transcript):
    if transcript.words is None:
        raise ValueError("the transcript has no times; transcribe with timestamps=True")


AUDIO_SUFFIXES = frozenset([
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".sph", ".nist",
])  # fmt: skip
MANIFEST_SUFFIXES = frozenset([".jsonl", ".json"])
ABSURD_DURATION_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Clip:
    """A file or a section of it; `audio` is its name as the user wrote it, `text` its reference,
    `place` the manifest and line that name it."""

    path: Path
    audio: str
    offset_s: float | None = None  # None: the whole file
    duration_s: float | None = None  # as declared
    text: str | None = None
    lang: str | None = None
    place: str | None = None


def read_manifest(
    path: str | os.PathLike, lang: str | None = None
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Clips of a NeMo manifest (JSON lines), and (place, reason) of each line that is no clip.

    `audio_filepath` is relative to the manifest's folder or absolute; `offset`, `duration`, `text`
    and `lang` may be absent. With `lang`, lines of another language are passed over. A line with an
    offset means the section [offset, offset + duration), one without it the whole file. Raises
    FileNotFoundError or ValueError if there is nothing to read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} is not a file")
    clips, problems = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                clip = _manifest_clip(line, path.parent, f"{path}:{number}")
                if lang is None or clip.lang in (None, lang):
                    clips.append(clip)
            except ValueError as error:
                problems.append((f"{path}:{number}", str(error)))
    if not clips and not problems:
        raise ValueError(f"manifest {path} is empty")
    return clips, problems


def _manifest_clip(line: bytes, folder: Path, place: str) -> Clip:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object: {type(entry).__name__}")
    audio = entry.get("audio_filepath")
    if not isinstance(audio, str) or not audio or "\0" in audio:
        raise ValueError(f"audio_filepath is {audio!r}, expected a path")
    seconds = {}
    for key, least in (("offset", "0 or more"), ("duration", "more than 0")):
        value = entry.get(key)
        if value is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            zero_length = key == "duration" and value == 0
            if not number or not 0 <= value <= ABSURD_DURATION_S or zero_length:
                raise ValueError(f"{key} is {value!r}, expected seconds, {least}")
        seconds[key] = None if value is None else float(value)
    text = entry.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text is {text!r}, expected a string")
    path, lang = folder / Path(audio).expanduser(), entry.get("lang")
    return Clip(path, audio, seconds["offset"], seconds["duration"], text, lang, place)


def find_clips(inputs: Iterable[str]) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Clips of files, folders and manifests, in order, and (name, reason) of what is none."""
    clips, problems = [], []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
            clips += [Clip(p, str(p)) for p in found if p.is_file()]
            if not found:
                problems.append((name, "the folder holds no audio file"))
        elif name == "-":
            some, bad = find_clips(line.rstrip("\r\n") for line in sys.stdin if line.strip())
            clips += some
            problems += bad
        elif glob.has_magic(name) and not path.exists():
            found = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
            some, bad = find_clips(found)
            clips += some
            problems += bad if found else [(name, "no file is named like this")]
        elif path.suffix.lower() in MANIFEST_SUFFIXES:
            try:
                some, bad = read_manifest(path)
            except (OSError, ValueError) as error:
                some, bad = [], [(name, str(error))]
            clips += some
            problems += bad
        else:
            clips.append(Clip(path, name))
    return clips, problems


ROUND_SECONDS = 3600.0  # of audio that is read into memory and sorted at a time


def transcribe_clips(
    model: ASRModel,
    clips: Iterable[Clip],
    head: str | None = None,
    batch_size: int = 16,
    timestamps: bool = False,
    workers: int = 2,
    **options,
) -> Iterator[tuple[Clip, Transcript | None, str]]:
    """(clip, transcript, "") of each clip in order, or (clip, None, reason) where it has no text.

    `workers` threads read about an hour of audio ahead; it is sorted by length into batches of at
    most `batch_size` clips. `options`: see `ASRModel.transcribe`.
    """
    options = {"head": head, "timestamps": timestamps} | options

    def read(clip: Clip) -> tuple[Clip, np.ndarray | None, str]:
        duration_s = None if clip.offset_s is None else clip.duration_s
        try:
            samples = load_audio(clip.path, model.sample_rate, clip.offset_s or 0.0, duration_s)
            return clip, samples, ""
        except (OSError, ValueError) as error:
            return clip, None, str(error)

    def full(round_) -> bool:
        n_samples = sum(len(samples) for _, samples, _ in round_ if samples is not None)
        return n_samples >= ROUND_SECONDS * model.sample_rate or len(round_) >= 16 * batch_size

    for round_ in read_ahead(clips, read, full, workers):
        yield from _transcribe_round(model, round_, batch_size, options)


def _transcribe_round(model, round_, batch_size, options):
    results = {k: (None, reason) for k, (_, _, reason) in enumerate(round_) if reason}
    order = sorted(
        (k for k in range(len(round_)) if k not in results), key=lambda k: -len(round_[k][1])
    )
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        results |= _transcribe_batch(model, batch, round_, options)
    for k, (clip, _, _) in enumerate(round_):
        yield clip, *results[k]


def _transcribe_batch(model, batch, round_, options):
    try:
        samples = [round_[k][1] for k in batch]
        transcripts = model.transcribe(samples, batch_size=len(batch), **options)
    except (RuntimeError, ValueError) as error:  # out of memory, mostly: then one by one
        if len(batch) == 1:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return {batch[0]: (None, f"transcription failed: {reason}")}
        results = {}
        for k in batch:
            results |= _transcribe_batch(model, [k], round_, options)
        return results
    return {k: (transcript, "") for k, transcript in zip(batch, transcripts, strict=True)}


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def add_model_arguments(parser: argparse.ArgumentParser):
    """The arguments that every command with a model has."""
    parser.add_argument("--model", required=True, help=".nemo archive or converted folder")
    parser.add_argument("--head", help="tdt, rnnt or ctc; default: the model's first")
    parser.add_argument("--batch-size", type=int, default=16, help="clips a pass (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")


def add_decoding_arguments(parser: argparse.ArgumentParser):
    """How to encode and decode, for commands that transcribe; `decoding_options` reads them."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (%(default)s)")
    group.add_argument("--lm", type=Path, metavar="FILE", help="ARPA language model, also .gz")
    group.add_argument("--lm-weight", type=float, default=0.3, help="of its scores (%(default)s)")
    group.add_argument(
        "--lm-bonus",
        type=float,
        help="nats added for each of its words (default: what an average word costs)",
    )
    group.add_argument(
        "--boost",
        type=Path,
        metavar="FILE",
        help="phrases to expect, one a line, each with a weight after a tab if it has its own",
    )
    group.add_argument(
        "--boost-weight", type=float, default=1.5, help="nats for each token (%(default)s)"
    )
    group.add_argument(
        "--languages",
        metavar="NAMES",
        help="only letters of these languages, or scripts: en,ru or latin,cyrillic",
    )
    group = parser.add_argument_group("long recordings")
    group.add_argument(
        "--long",
        choices=longform.MODES,
        default="auto",
        help="one pass, windows, or local attention; by memory (%(default)s)",
    )
    group.add_argument(
        "--memory-gb", type=float, help="what a pass may take beside the weights (what is free)"
    )
    group.add_argument(
        "--window-s",
        type=float,
        metavar="SECONDS",
        help="longer recordings go in windows of this length: as long as the clips in training",
    )


def decoding_options(args, model: ASRModel) -> dict:
    """Keyword arguments for `ASRModel.transcribe`. FileNotFoundError, or ValueError of a file that
    cannot be used; UsageError of arguments that do not fit."""
    if args.beam < 1:
        raise UsageError(f"--beam is {args.beam}, expected at least 1")
    if args.window_s is not None and not 0 < args.window_s < math.inf:
        raise UsageError(f"--window-s is {args.window_s}, expected seconds, more than 0")
    names = ("beam", "long", "memory_gb", "window_s")
    options = {name: getattr(args, name) for name in names}
    if args.lm is not None:
        options |= {"lm": read_arpa(args.lm), "lm_weight": args.lm_weight}
        options["lm_bonus"] = args.lm_bonus
    if args.boost is not None:
        options["boost"] = read_phrases(args.boost, args.boost_weight)
    if args.languages:
        options["allow"] = tuple(name for name in args.languages.split(",") if name)
        try:
            token_bias(model.tokenizer, options["allow"])
        except ValueError as error:
            raise UsageError(f"--languages: {error}") from None
    return options


class UsageError(ValueError):
    """Arguments that parse but do not fit the model or one another: exit status 2."""


def load_model(args) -> ASRModel:
    """The model of `add_model_arguments`. UsageError, or what fastconformer.load_model raises."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}, expected at least 1")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UsageError(f"--device is {args.device!r}, expected cpu, cuda or cuda:N") from None
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {args.device}, but this torch sees no GPU; use --device cpu")
    model = fastconformer.load_model(args.model, device=device, dtype=DTYPES[args.dtype])
    if args.head is not None and args.head not in model.heads:
        raise UsageError(f"--head is {args.head}, this model has {', '.join(model.heads)}")
    return model


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastconformer.transcribe",
        description="Transcribe audio files, folders and manifests.",
        epilog="example: python -m fastconformer.transcribe talk.wav --model model.nemo "
        "--format srt -o talk.srt",
    )
    parser.add_argument(
        "audio", nargs="+", metavar="AUDIO", help="file, folder, pattern, manifest, -"
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--timestamps", action="store_true", help="times of words and segments")
    parser.add_argument(
        "--workers", type=int, default=2, help="threads that read audio ahead (%(default)s)"
    )
    parser.add_argument(
        "--confidence",
        nargs="?",
        const="tsallis",
        metavar="MEASURE",
        choices=["tsallis", "gibbs", "renyi", "max_prob"],
        help="confidences of tokens and words, for --format json (tsallis, as NeMo)",
    )
    parser.add_argument(
        "--format",
        choices=["text", "json", "jsonl", "srt", "vtt", "ctm"],
        default="text",
        help="srt, vtt and ctm imply --timestamps (%(default)s)",
    )
    group = parser.add_argument_group("subtitles")
    group.add_argument(
        "--line-characters", type=int, default=LINE_CHARACTERS, help="of a line (%(default)s)"
    )
    group.add_argument("--lines", type=int, default=CUE_LINES, help="of a subtitle (%(default)s)")
    group.add_argument(
        "--reading-speed",
        type=float,
        default=READING_SPEED,
        help="characters a second that a subtitle stays for (%(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file instead of stdout; for srt and vtt of several inputs a folder, a file for each",
    )
    return parser.parse_args(argv)


def exit_status(command: str, run: Callable[[], int]) -> int:
    """What `run` gives; an error as one line and 2 for bad usage, 1 for a failed job."""
    try:
        return run()
    except UsageError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1


def main(argv=None) -> int:
    args = parse_arguments(argv)
    return exit_status("transcribe", lambda: run(args))


def run(args) -> int:
    clips, problems = find_clips(args.audio)
    several = len(clips) + len(problems) > 1 or Path(args.audio[0]).is_dir()
    subtitles = args.format in ("srt", "vtt")
    folder = args.output if subtitles and (several or _is_folder(args.output)) else None
    if subtitles and several and (folder is None or folder.is_file() or folder.suffix):
        raise UsageError(
            f"{len(clips)} recordings give as many {args.format} files; "
            "name a folder for them with -o FOLDER"
        )
    if args.output and not folder:
        check_output(args.output, args.model, *args.audio, *(clip.path for clip in clips))
    rank, world_size = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world_size > 1 and (args.format != "jsonl" or args.output is None):
        raise UsageError("several processes need --format jsonl and -o FILE")
    for name, reason in problems:
        _report(name, reason)
    failed = len(problems)
    if not clips:
        return 1
    model = load_model(args)
    decoding = decoding_options(args, model)
    if args.confidence:
        decoding["confidence"] = Confidence(args.confidence)
    if args.workers < 0:
        raise UsageError(f"--workers is {args.workers}, expected 0 or more")
    limits = {
        "line_characters": args.line_characters,
        "lines": args.lines,
        "reading_speed": args.reading_speed,
    }
    if subtitles and not all(value >= 1 for value in limits.values()):
        raise UsageError("--line-characters, --lines and --reading-speed are at least 1")
    timestamps = args.timestamps or args.format in ("srt", "vtt", "ctm")
    decoding["workers"] = args.workers
    if args.format == "jsonl":
        failed += run_job(args, model, clips, timestamps, decoding, rank, world_size)
        return 1 if failed else 0
    progress = Progress(len(clips), False if args.output is None else None)
    results = transcribe_clips(model, clips, args.head, args.batch_size, timestamps, **decoding)
    names = _Names()
    pieces, objects = [], []
    for clip, transcript, reason in results:
        if transcript is None:
            _report(clip.place or clip.audio, reason)
            failed += 1
            continue
        progress.add(transcript.duration)
        if args.format == "json":
            section = {} if clip.offset_s is None else {"offset": clip.offset_s}
            objects.append(to_json(transcript, audio=clip.audio, **section))
        elif args.format == "ctm":
            name = names.of_recording(clip.path)
            pieces.append(to_ctm(transcript, name, clip.offset_s or 0.0))
        elif subtitles:
            text = {"srt": to_srt, "vtt": to_vtt}[args.format](transcript, **limits)
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / f"{names.fresh(clip.path.stem)}.{args.format}", text)
            else:
                pieces.append(text)
        else:
            pieces.append(to_text(transcript, clip.audio if several else None))
            if args.output is None:  # a long run shows what it has
                print(pieces.pop(), end="", flush=True)
    progress.close()
    total = len(clips) + len(problems)
    if failed and total > 1:
        print(f"transcribe: {failed} of {total} inputs failed", file=sys.stderr)
    if failed == total:  # nothing to write: what an earlier run wrote stays
        return 1
    if args.format == "json":
        lines = (json.dumps(item, ensure_ascii=False, allow_nan=False) for item in objects)
        pieces.append("[\n" + ",\n".join(lines) + "\n]\n")
    if args.output is None:
        print("".join(pieces), end="", flush=True)
    elif not folder:
        write_text(args.output, "".join(pieces))
    return 1 if failed else 0


def run_job(args, model, clips, timestamps, options, rank: int, world_size: int) -> int:
    """Appends a JSON line for each clip that has none yet; the number of clips that failed.

    Every process of several takes its share and waits for the others, the first then merges.
    """

    def key(clip: Clip) -> tuple:
        return str(clip.path), clip.offset_s, None if clip.offset_s is None else clip.duration_s

    keys = list(dict.fromkeys(map(key, clips)))
    clips = list({key(clip): clip for clip in reversed(clips)}.values())[::-1]
    done = {} if args.output is None else all_results(args.output, mend=world_size == 1)
    if world_size > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()  # everyone has read what was there before anyone writes
    waiting = [clip for clip in clips if key(clip) not in done]
    if len(waiting) < len(clips) and rank == 0:
        n_done = len(clips) - len(waiting)
        print(f"transcribe: {n_done} of {len(clips)} clips are in {args.output}", file=sys.stderr)
    waiting = waiting[rank::world_size]
    progress, failed = Progress(len(waiting), False if args.output is None else None), 0
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if args.output is not None:
            part = part_path(args.output, rank, world_size)
            read_results(part, mend=True)
            out = stack.enter_context(open(part, "a", encoding="utf-8"))
        for clip, transcript, reason in transcribe_clips(
            model, waiting, args.head, args.batch_size, timestamps, **options
        ):
            if transcript is None:
                _report(clip.place or clip.audio, reason)
                failed += 1
                continue
            section = {}
            if clip.offset_s is not None:
                section = {"offset": clip.offset_s, "clip_duration": clip.duration_s}
            fields = {"audio": clip.audio, "path": str(clip.path)} | section
            line = json.dumps(to_json(transcript, **fields), ensure_ascii=False, allow_nan=False)
            print(line, file=out, flush=True)
            progress.add(transcript.duration)
    progress.close()
    if world_size > 1:
        failures = torch.tensor(failed)
        dist.all_reduce(failures)  # also waits for all
        failed = int(failures)
        if rank == 0:
            merge_results(args.output, keys)
        dist.destroy_process_group()
    elif args.output is not None and any(args.output.parent.glob(f"{args.output.name}.part-*")):
        merge_results(args.output, keys)  # of processes that were killed
    if failed and rank == 0:
        print(f"transcribe: {failed} of {len(clips)} inputs failed", file=sys.stderr)
    return failed


def _is_folder(path: Path | None) -> bool:
    return path is not None and path.is_dir()


def check_output(path: Path, *inputs: str | Path):
    """UsageError where a file cannot be written or is one of the inputs, told before the work and
    not after it."""
    if path.is_dir():
        raise UsageError(f"-o {path} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}")
    if path.exists() and any(os.path.exists(x) and path.samefile(x) for x in inputs):
        raise UsageError(f"-o {path} is an input, which would be lost; name another file")


class _Names:
    """Names of recordings in a CTM or a folder: file stems, numbered where they repeat."""

    def __init__(self):
        self.taken: set[str] = set()
        self.recordings: dict[Path, str] = {}

    def fresh(self, stem: str) -> str:
        name, number = stem, 1
        while name in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken.add(name)
        return name

    def of_recording(self, path: Path) -> str:
        if path not in self.recordings:
            self.recordings[path] = self.fresh(path.stem)
        return self.recordings[path]


def write_text(path: Path, text: str):
    """Writes a file whole or not at all. Raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _report(name: str, reason: str):
    reason = " ".join(str(reason).split())
    place = "" if name in reason else f"{name}: "
    print(f"transcribe: {place}{reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
