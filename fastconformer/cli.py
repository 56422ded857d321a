"""What every command shares: exit statuses, the line that tells an error, checks of what it writes,
and the arguments of a model and of decoding.

Exit statuses: 0 done; 1 a job that failed, with one line on stderr that says what to do; 2 bad
usage; 130 stopped by Ctrl-C. Nothing here loads torch before a model is asked for.
"""

import argparse
import contextlib
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .formats.transcripts import escaped
from .process_memory import is_out_of_memory

DTYPES = ("float32", "bfloat16", "float16", "int8")
TRAIN_PACKAGES = ("bitsandbytes", "rich", "tensorboard")  # imported in the middle of a run


class UsageError(ValueError):
    """Arguments that parse but do not fit the model or one another: exit status 2."""


class Failed(Exception):
    """A job that could not do what was asked, with the line that says why: exit status 1."""


def run(command: str, job: Callable[[], int | None]) -> int:
    """Runs a command's job and gives its exit status, None as 0; what a user can cause becomes one
    line on stderr that begins with `command`."""
    use_utf8()
    try:
        status = job() or 0
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _told(command, error, 2)
    except BrokenPipeError:  # `| head` has read enough
        _close_stdout()
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, Failed) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error = OSError(error.errno, error.strerror, "what is printed")
            _close_stdout()  # else the rest is tried again at the end, and told once more
        return _told(command, error, 1)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_PACKAGES:
            raise
        return _told(command, f"{error.name} is missing: pip install 'fastconformer[train]'", 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _told(command, f"out of memory: {error}"[:300], 1)


@contextlib.contextmanager
def usage(option: str = ""):
    """A ValueError in here is of arguments that do not fit: a UsageError, said of `option`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{option}{error}") from None


def _told(command: str, error: Exception | str, status: int) -> int:
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        error = f"{error.filename}: {error.strerror}"  # without Python's number
    print(f"{command}: {one_line(error)}", file=sys.stderr)
    return status


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_utf8() -> None:
    """What goes to a file or a pipe is UTF-8 whatever the locale; a terminal keeps its own, and
    gets what it lacks as escapes. So no name and no text can end a run, and neither can streams
    that were closed (`>&-`), which Python has as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = {} if stream.isatty() else {"encoding": "utf-8"}
            stream.reconfigure(errors="backslashreplace", **encoding)


def report(command: str, name: str, reason: object) -> None:
    """A line on stderr about one input; its name stands there once."""
    name, reason = one_line(name), one_line(reason)
    named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reason)
    place = "" if named else f"{name}: "
    print(f"{command}{'' if ':' in command else ':'} {place}{reason}", file=sys.stderr)


def one_line(text: object) -> str:
    """A message on one line, without what would steer a terminal."""
    return escaped(" ".join(str(text).split()))


def check_above_zero(args: argparse.Namespace, *names: str) -> None:
    """UsageError where one of these arguments is given and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:  # nor is what is no number
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected more than 0")


def check_output(path: Path, *inputs: str | Path) -> None:
    """UsageError where a file cannot be written or is one of the inputs, told before the work and
    not after it."""
    if path.is_dir():
        raise UsageError(f"-o {path} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}")
    if path.exists() and any(os.path.exists(x) and path.samefile(x) for x in inputs):
        raise UsageError(f"-o {path} is an input, which would be lost; name another file")


def parser(module: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`; `example` follows that name in its help."""
    prog = f"python -m {module}"
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example: {prog} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command with a model has; `load_model` reads them."""
    parser.add_argument("--model", required=True, help=".nemo archive or converted folder")
    parser.add_argument("--head", help="tdt, rnnt, ctc ...; default: the model's first")
    parser.add_argument("--batch-size", type=int, default=16, help="clips a pass (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """How to encode and decode, for commands that transcribe; `decoding_options` reads them."""
    from .decoding import DecodingOptions  # with torch
    from .recordings.longform import MODES

    group = parser.add_argument_group("decoding")
    group.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (%(default)s)")
    group.add_argument("--lm", type=Path, metavar="FILE", help="ARPA language model, also .gz")
    group.add_argument(
        "--lm-weight", type=float, help=f"of its scores ({DecodingOptions.lm_weight})"
    )
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
        "--boost-weight",
        type=float,
        help=f"nats for each token ({DecodingOptions.boost_weight})",
    )
    group.add_argument(
        "--languages",
        metavar="NAMES",
        help="only letters of these languages, or scripts: en,ru or latin,cyrillic",
    )
    group.add_argument(
        "--look-ahead",
        type=int,
        metavar="FRAMES",
        help="encoder frames, of those that a streaming model was trained with (its first)",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        default=0.0,
        metavar="A",
        help="attention decoders: texts compete by score / length ** A (%(default)s)",
    )
    group.add_argument(
        "--max-repeats",
        type=int,
        metavar="N",
        help="attention decoders: a phrase may come again so often right after itself",
    )
    group = parser.add_argument_group("prompt, of models that take one")
    for name, text in (
        ("--source-lang", "what is spoken: de"),
        ("--target-lang", "what is to be written: en; another one translates"),
        ("--pnc", "punctuation and capital letters: yes or no"),
        ("--task", "asr or ast (translate), where the prompt has it"),
    ):
        group.add_argument(name, help=text)
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="SLOT=VALUE",
        help="any slot of the model's prompt, such as itn=yes; may be given several times",
    )
    group = parser.add_argument_group("long recordings")
    group.add_argument(
        "--long",
        choices=MODES,
        default="auto",
        help="one pass, windows, local attention, or pieces cut in pauses; by memory (%(default)s)",
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


def decoding_options(args, model, timestamps: bool = False) -> dict:
    """Keyword arguments for `model.transcribe`. FileNotFoundError, or ValueError of a file that
    cannot be used; UsageError of arguments that do not fit."""
    from .decoding import DecodingOptions, read_arpa, read_phrases, token_bias, unwritable
    from .surgery.look_ahead import with_look_ahead

    if args.beam < 1:
        raise UsageError(f"--beam is {args.beam}, expected at least 1")
    for flag, unit in (("window_s", "seconds"), ("memory_gb", "gigabytes")):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} is {value}, expected {unit}, more than 0")
    if args.window_s is not None and args.long in ("full", "local"):
        raise UsageError(f"--window-s is {args.window_s}, but --long {args.long} has no windows")
    names = ("beam", "long", "memory_gb", "window_s", "look_ahead", "length_penalty", "max_repeats")
    options = {name: getattr(args, name) for name in names}
    for flag, needs in (("lm_weight", "lm"), ("lm_bonus", "lm"), ("boost_weight", "boost")):
        value = getattr(args, flag)
        if value is not None and getattr(args, needs) is None:
            raise UsageError(f"--{flag.replace('_', '-')} is {value}, but there is no --{needs}")
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{flag.replace('_', '-')} is {value}, expected a number")
    if args.lm is not None:
        options |= {"lm": read_arpa(args.lm), "lm_bonus": args.lm_bonus}
        if args.lm_weight is not None:
            options["lm_weight"] = args.lm_weight
    if args.boost is not None:
        weight = DecodingOptions.boost_weight if args.boost_weight is None else args.boost_weight
        options["boost"] = read_phrases(args.boost, weight)
        lost = unwritable(options["boost"], model.head(args.head).tokenizer)
        if lost:
            told = f"no text of this model can hold {', '.join(map(repr, lost))}"
            print(one_line(f"{args.boost}: {told}"), file=sys.stderr)
    if args.languages is not None:
        options["allow"] = tuple(name for name in args.languages.split(",") if name)
        if not options["allow"]:
            raise UsageError(f"--languages is {args.languages!r} and names none")
        with usage("--languages: "):
            token_bias(model.tokenizer, options["allow"])
    slots, head = prompt_slots(args), model.head(args.head)
    fields = {name: options[name] for name in ("beam", "length_penalty", "max_repeats")}
    with usage():  # what no recording can be transcribed with, said once
        head.asked(slots, timestamps)
        DecodingOptions(**fields).check(head.refused_options, head.name)
        with_look_ahead(model, args.look_ahead)
    return options | slots


def prompt_slots(args) -> dict[str, str]:
    """The slots that the arguments of a prompt name. UsageError of one that is no SLOT=VALUE."""
    slots = {
        name: getattr(args, name)
        for name in ("source_lang", "target_lang", "pnc", "task")
        if getattr(args, name) is not None
    }
    for pair in args.prompt:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--prompt is {pair!r}, expected SLOT=VALUE, such as itn=yes")
        slots[name] = value
    return slots


def load_model(args):
    """The model of `add_model_arguments`. UsageError, or what fastconformer.load_model raises."""
    import torch

    import fastconformer

    if args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size}, expected at least 1")
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    if device.index is not None and device.type != "cpu":
        # The current device: what is made or launched there without a word lands beside the model.
        getattr(torch, device.type).set_device(device)
    model = fastconformer.load_model(args.model, device=device, dtype=dtype)
    if args.head is not None:
        with usage("--"):
            model.head(args.head)
    return model


def choose_device(name: str):
    """The torch.device that --device names; "gpu" is whichever this torch has, and a process of
    torchrun takes its own. UsageError: no such kind. ValueError: this machine has none."""
    import torch

    from .load import DEVICES, find_device

    if name == "gpu":
        found = torch.accelerator.current_accelerator()
        if found is None:
            raise ValueError("--device is gpu, but this torch sees only cpu")
        name = found.type
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (":" in name and not index.isdecimal()):
        raise UsageError(f"--device is {name!r}, expected one of {', '.join(DEVICES)}, cuda:N, gpu")
    if name == kind != "cpu" and "LOCAL_RANK" in os.environ:
        name = f"{kind}:{os.environ['LOCAL_RANK']}"
    return find_device(name, "--device")
