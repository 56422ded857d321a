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
`vtt` (subtitles), `ctm` (NIST word times).
"""

import argparse
import json
import sys
from pathlib import Path

from . import cli
from .checkpoint.files import write_text
from .cli import UsageError
from .decoding import Confidence
from .formats.inputs import find_clips
from .formats.manifest import Clip
from .formats.subtitles import (
    CUE_LINES,
    LINE_CHARACTERS,
    READING_SPEED,
    cues,
    to_srt,
    to_vtt,
)
from .formats.transcripts import to_ctm, to_json, to_text
from .jobs.archive import processes, run_job
from .jobs.results import Progress
from .jobs.rounds import transcribe_clips
from .recordings.transcript import Transcript

__all__ = ["Transcript", "cues", "main"]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.parser(
        "fastconformer.transcribe",
        "Transcribe audio files, folders and manifests.",
        "talk.wav --model model.nemo --format srt -o talk.srt",
    )
    parser.add_argument(
        "audio", nargs="+", metavar="AUDIO", help="file, folder, pattern, manifest, -"
    )
    cli.add_model_arguments(parser)
    cli.add_decoding_arguments(parser)
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


def main(argv=None) -> int:
    return cli.run("transcribe", lambda: run(parse_arguments(argv)))


def run(args) -> int:
    found = find_clips(args.audio)
    clips, problems = found.clips, found.problems
    several = len(clips) + len(problems) > 1 or Path(args.audio[0]).is_dir()
    subtitles = args.format in ("srt", "vtt")
    folder = args.output if subtitles and (several or _is_folder(args.output)) else None
    if subtitles and several and (folder is None or folder.is_file() or folder.suffix):
        raise UsageError(
            f"{len(clips)} recordings give as many {args.format} files; "
            "name a folder for them with -o FOLDER"
        )
    if args.output and not folder:
        cli.check_output(args.output, args.model, *args.audio, *(clip.path for clip in clips))
    if processes()[1] > 1 and (args.format != "jsonl" or args.output is None):
        raise UsageError("several processes need --format jsonl and -o FILE")
    for name, reason in problems:
        cli.report("transcribe", name, reason)
    if found.n_skipme:
        print(f"transcribe: {found.n_skipme} lines say _skipme, left out", file=sys.stderr)
    failed = len(problems)
    if not clips:
        return 1
    model = cli.load_model(args)
    decoding = cli.decoding_options(args, model)
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
    decoding |= {
        "head": args.head,
        "batch_size": args.batch_size,
        "timestamps": args.timestamps or args.format in ("srt", "vtt", "ctm"),
        "workers": args.workers,
    }
    if args.format == "jsonl":
        failed += run_job(model, clips, args.output, _report_clip, **decoding)
        return 1 if failed else 0
    progress = Progress(len(clips), False if args.output is None else None)
    results = transcribe_clips(model, clips, **decoding)
    names = _Names()
    pieces, objects = [], []
    for clip, transcript, reason in results:
        if transcript is None:
            _report_clip(clip, reason)
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


def _is_folder(path: Path | None) -> bool:
    return path is not None and path.is_dir()


def _report_clip(clip: Clip, reason: str) -> None:
    cli.report("transcribe", clip.place or clip.audio, reason)


if __name__ == "__main__":
    sys.exit(main())
