"""Recordings to text with times: `python -m fastconformer.transcribe AUDIO... --model M`.

    python -m fastconformer.transcribe talk.wav --model model.nemo -o talk.srt
    python -m fastconformer.transcribe recordings/ more.m4a --model FOLDER --format text,srt -o out
    python -m fastconformer.transcribe archive/ --model FOLDER --format jsonl -o archive.jsonl
    python -m fastconformer.transcribe call.flac --model FOLDER --channels each --format vtt

AUDIO are files, folders (searched for audio, deeply), patterns in quotes ("calls/**/*.wav"), NeMo
manifests (.jsonl, .json) and `-`: a recording from stdin, or names, one a line. What cannot be read
is told on stderr, one line each; the rest goes on, and the exit status is 1.

Formats: `text` (several inputs: path, tab, text; with --timestamps then a line a word), `json` (all
fields of every Transcript), `jsonl` (the same, a line a clip, written as they come: started again,
a job that was killed goes on where it was, and tries again what failed; under torchrun the
processes share the clips), `srt` and `vtt` (subtitles), `ctm` (NIST word times). The suffix of the
output names one; several of them need a folder, or --beside.
"""

import argparse
import sys
from pathlib import Path

from . import cli
from .cli import UsageError
from .decoding import Confidence
from .formats.inputs import Found, find_clips, read_names
from .formats.subtitles import CUE_LINES, LINE_CHARACTERS, READING_SPEED, cues
from .jobs.archive import fingerprint, processes, run_job
from .jobs.outputs import SUBTITLES, SUFFIXES, WITH_TIMES, Outputs, formats_of
from .jobs.results import Progress
from .jobs.rounds import Channels, transcribe_clips
from .recordings.transcript import Transcript

__all__ = ["Transcript", "cues", "main"]

# Arguments that say what is transcribed, where and how fast, not what is heard in it.
SAME_TEXT = frozenset([
    "audio", "from_file", "model", "head", "batch_size", "device", "memory_gb", "workers", "format",
    "output", "beside", "line_characters", "lines", "reading_speed", "highlight_words",
])  # fmt: skip


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.parser(
        "fastconformer.transcribe",
        "Transcribe audio files, folders and manifests.",
        "talk.wav --model model.nemo --format srt -o talk.srt",
    )
    parser.add_argument(
        "audio", nargs="*", metavar="AUDIO", help="file, folder, pattern, manifest, -"
    )
    parser.add_argument(
        "--from-file", metavar="FILE", help="names of further recordings, one a line; - is stdin"
    )
    cli.add_model_arguments(parser)
    cli.add_decoding_arguments(parser)
    parser.add_argument("--timestamps", action="store_true", help="times of words and segments")
    parser.add_argument(
        "--channels",
        type=_channels,
        default="mix",
        metavar="mix|each|0|1,3",
        help="their average, or each of all or of these as a transcript of its own (%(default)s)",
    )
    parser.add_argument(
        "--track", type=int, default=0, metavar="N", help="which sound of a video, from 0"
    )
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
        type=_formats,
        metavar="LIST",
        help=f"of {', '.join(SUFFIXES)}; srt, vtt and ctm imply --timestamps (what the suffix of "
        "-o names, else text)",
    )
    group = parser.add_argument_group("subtitles")
    group.add_argument(
        "--line-characters",
        type=int,
        default=LINE_CHARACTERS,
        help="of a line, of which Chinese ones take two (%(default)s)",
    )
    group.add_argument("--lines", type=int, default=CUE_LINES, help="of a subtitle (%(default)s)")
    group.add_argument(
        "--reading-speed",
        type=float,
        default=READING_SPEED,
        help="characters a second that a subtitle stays for (%(default)s)",
    )
    group.add_argument(
        "--highlight-words", action="store_true", help="underline each word as it is said"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file instead of stdout; or a folder, for a file a recording, in the inputs' tree",
    )
    parser.add_argument(
        "--beside", action="store_true", help="write a file beside each recording instead"
    )
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)  # behind it all are names, as -a.wav
    args = parser.parse_intermixed_args(argv[:end])  # AUDIO may stand behind options too
    args.audio += argv[end + 1 :]
    if not args.audio and args.from_file is None:
        parser.error("name at least one AUDIO, or --from-file")
    return args


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SUFFIXES:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {name!r} (choose from {', '.join(SUFFIXES)})"
            )
    return names


def _channels(text: str) -> Channels:
    if text in ("mix", "each"):
        return text
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not mix, each, or numbers from 0: 0 or 1,3")
    return tuple(dict.fromkeys(map(int, numbers)))


def main(argv=None) -> int:
    return cli.run("transcribe", lambda: run(parse_arguments(argv)))


def run(args) -> int:
    found = find_clips(args.audio)
    if args.from_file is not None:
        found.add(find_clips(read_names(args.from_file)))
    outputs = choose_outputs(args, found)
    is_job = outputs.formats == ("jsonl",)
    if processes()[1] > 1 and not (is_job and args.output):
        raise UsageError("several processes need --format jsonl and -o FILE")
    for name, reason in found.problems:
        cli.report("transcribe", name, reason)
    if found.n_skipme:
        print(f"transcribe: {found.n_skipme} lines say _skipme, left out", file=sys.stderr)
    if not found.clips:
        return 1
    for name in ("workers", "track"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    if args.confidence and not {"json", "jsonl"} & set(outputs.formats):
        raise UsageError("--confidence is for --format json or jsonl")
    model = cli.load_model(args)
    timestamps = args.timestamps or any(name in WITH_TIMES for name in outputs.formats)
    options = cli.decoding_options(args, model, timestamps) | {
        "head": args.head,
        "batch_size": args.batch_size,
        "timestamps": timestamps,
        "workers": args.workers,
        "channels": args.channels,
        "track": args.track,
    }
    if args.confidence:
        options["confidence"] = Confidence(args.confidence)
    progress = Progress(len(found.clips))

    def tell(clip, reason):
        progress.clear()
        cli.report("transcribe", clip.place or clip.audio, reason)

    if is_job:
        made = made_by(args, model)
        failed = run_job(model, found.clips, args.output, made, tell, progress, **options)
    else:
        results = transcribe_clips(model, found.clips, **options, **progress.options)
        failed = write_all(results, outputs, tell, progress)
    if args.output or args.beside:
        progress.close()
    progress.clear()
    failed += len(found.problems)
    total = len(found.clips) + len(found.problems)
    if failed and total > 1 and processes()[0] == 0:
        print(f"transcribe: {failed} of {total} inputs failed", file=sys.stderr)
    return 1 if failed else 0


def write_all(results, outputs: Outputs, tell, progress: Progress) -> int:
    """Writes results as they come; the number of those that failed. Where all did, nothing is
    written: what an earlier run wrote stays."""
    failed = written = 0
    for clip, transcript, reason in results:
        for note in clip.notes:
            tell(clip, note)
        if transcript is None:
            tell(clip, reason)
            failed += 1
            continue
        progress.clear()
        outputs.add(clip, transcript)
        if transcript.doubtful:
            tell(clip, f"the text is doubtful: {transcript.doubtful}")
        progress.add(transcript.duration)
        written += 1
    progress.clear()
    if written:
        outputs.close()
    return failed


def choose_outputs(args, found: Found) -> Outputs:
    """What --format, -o and --beside mean for these inputs. UsageError: they do not fit."""
    n_inputs, output = len(found.clips) + len(found.problems), args.output
    several = n_inputs > 1 or any(Path(name).is_dir() for name in args.audio)
    if args.beside and output:
        raise UsageError("--beside writes beside each recording; leave out -o")
    with cli.usage():
        formats = formats_of(args.format, output)
    subtitles = any(name in SUBTITLES for name in formats)
    if formats == ("jsonl",) and (args.beside or (output and output.is_dir())):
        raise UsageError("jsonl alone is one file for all recordings, with -o FILE")
    is_folder = bool(output) and (output.is_dir() or len(formats) > 1 or (subtitles and several))
    if not args.beside and not is_folder and (len(formats) > 1 or (subtitles and several)):
        what = f"{len(found.clips)} recordings give as many {formats[0]} files"
        what = "several formats are several files" if len(formats) > 1 else what
        raise UsageError(f"{what}; name a folder for them with -o FOLDER")
    if is_folder and not output.is_dir() and (output.exists() or output.suffix):
        raise UsageError(f"-o {output} is no folder; name one for all files with -o FOLDER")
    limits = {
        "line_characters": args.line_characters,
        "lines": args.lines,
        "reading_speed": args.reading_speed,
    }
    usual = LINE_CHARACTERS, CUE_LINES, READING_SPEED
    if not subtitles and (args.highlight_words or tuple(limits.values()) != usual):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in limits)
        raise UsageError(f"{names} and --highlight-words are for --format srt or vtt")
    if not all(value >= 1 for value in limits.values()):
        raise UsageError("--line-characters, --lines and --reading-speed are at least 1")
    named = several or args.channels != "mix"
    folder = is_folder or args.beside
    outputs = Outputs(
        formats,
        output,
        is_folder=is_folder,
        beside=args.beside,
        named=named,
        timed=args.timestamps,
        highlight=args.highlight_words,
        limits=limits,
    )
    inputs = [args.model, *args.audio, *(clip.path for clip in found.clips)]
    if output and not folder:
        cli.check_output(output, *inputs)
    for path in outputs.paths(found.clips) if folder else ():
        if args.beside and path.exists():
            raise UsageError(f"{path} is there already; move it, or name a folder with -o FOLDER")
        if path.exists():
            cli.check_output(path, *inputs)
    return outputs


def made_by(args, model) -> dict:
    """What the lines of a job tell of the model and of the options that change a text."""
    given = {name: value for name, value in vars(args).items() if name not in SAME_TEXT and value}
    given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    head = args.head or model.heads[0]
    return {"model": args.model, "model_id": fingerprint(model), "head": head, "options": options}


if __name__ == "__main__":
    sys.exit(main())
