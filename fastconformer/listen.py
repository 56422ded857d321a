"""What a microphone hears, as text in the terminal: `python -m fastconformer.listen --model M`.

    python -m fastconformer.listen --model model.nemo
    python -m fastconformer.listen --model model.nemo --input talk.wav
    arecord -t raw -f S16_LE -r 16000 | python -m fastconformer.listen --model model.nemo --input -

A line is one utterance: it ends where the model says so (<EOU>), where nothing was recognised for a
while, and at Ctrl-C. In a terminal, what may still change stands dim at its end; elsewhere only
words are written that stay.
"""

import contextlib
import itertools
import queue
import shutil
import sys
from collections.abc import Iterator

import numpy as np

from . import cli

BLOCK_S = 0.1  # of audio, at a time
LAG_S = 5.0  # of audio that waits before it is said that the model is too slow


def parse_arguments(argv=None):
    parser = cli.parser(
        "fastconformer.listen",
        "Write what a microphone hears as text, while it is spoken.",
        "--model model.nemo",
    )
    cli.add_model_arguments(parser)
    parser.add_argument(
        "--look-ahead",
        type=int,
        metavar="FRAMES",
        help="encoder frames that are heard before a text is told (the model's first; 1 s)",
    )
    parser.add_argument("--target-lang", help="of models that are told a language: de-DE")
    parser.add_argument(
        "--part-s",
        type=float,
        metavar="SECONDS",
        help="models that are not made for streaming: told at a time (1)",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="a recording in the microphone's place; - is 16-bit mono PCM from stdin",
    )
    parser.add_argument("--rate", type=int, metavar="HZ", help="of that PCM (the model's)")
    parser.add_argument(
        "--microphone", metavar="NAME", help="its number or a part of its name (the system's)"
    )
    parser.add_argument(
        "--pause-s",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="a line ends when nothing was recognised for so long (%(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    return cli.run("listen", lambda: listen(args))


def listen(args) -> int:
    cli.check_above_zero(args, "part_s", "pause_s")
    if args.rate is not None and not 8000 <= args.rate <= 192000:
        raise cli.UsageError(f"--rate is {args.rate}, expected 8000 to 192000")
    if args.rate is not None and args.input != "-":
        raise cli.UsageError("--rate is of PCM from stdin: it needs --input -")
    if args.input is not None and args.microphone is not None:
        raise cli.UsageError("--input takes the microphone's place: leave out --microphone")
    model = cli.load_model(args)
    from .recordings.stream import Stream  # with torch

    slots = {} if args.target_lang is None else {"target_lang": args.target_lang}

    options = slots if args.part_s is None else slots | {"part_s": args.part_s}

    def open_stream():
        return model.stream(args.head, args.look_ahead, **options)

    with cli.usage():  # what cannot be is told before anything is heard
        by_chunks = isinstance(open_stream(), Stream)
    if by_chunks and args.part_s is not None:
        raise cli.UsageError("--part-s: this model is made for streaming; see --look-ahead")
    blocks = _blocks(args, model.sample_rate)
    write_lines(blocks, open_stream, args.pause_s, model.sample_rate)
    return 0


def write_lines(blocks: Iterator[np.ndarray], open_stream, pause_s: float, rate_hz: int) -> None:
    """Writes the text of samples as they come, an utterance a line; Ctrl-C ends the last one."""
    line, stream = Line(), open_stream()
    n_tokens, quiet_s = 0, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        for samples in blocks:
            partial = stream.feed(samples)
            line.show(partial.stable_text, partial.text)
            is_new = len(partial.tokens) != n_tokens
            quiet_s = 0.0 if is_new else quiet_s + len(samples) / rate_hz
            n_tokens = len(partial.tokens)
            if partial.ended_s is not None or (n_tokens and quiet_s >= pause_s):
                line.end(stream.finish().text)
                stream, n_tokens, quiet_s = open_stream(), 0, 0.0
    line.end(stream.finish().text)


class Line:
    """The line that is being written."""

    def __init__(self):
        self.is_terminal = sys.stdout.isatty()
        self.written = ""  # what stays

    def show(self, stable: str, text: str) -> None:
        """The text so far, whose beginning stays."""
        if self.is_terminal:  # one row: its end, if it is longer than the terminal is wide
            width = shutil.get_terminal_size().columns - 1
            room = max(0, width - (len(text) - len(stable)))
            start = stable[len(stable) - room :] if len(stable) > room else stable
            print(
                f"\r\x1b[K{start}\x1b[2m{text[len(stable) :][-width:]}\x1b[0m", end="", flush=True
            )
        elif stable.startswith(self.written) and stable != self.written:
            print(stable[len(self.written) :], end="", flush=True)
            self.written = stable

    def end(self, text: str) -> None:
        """The whole text of the line, and the next one."""
        if self.is_terminal:
            print(f"\r\x1b[K{text}" if text else "\r\x1b[K", end="\n" if text else "", flush=True)
        elif text:
            rest = text[len(self.written) :] if text.startswith(self.written) else f"\n{text}"
            print(rest, flush=True)
        self.written = ""


def _blocks(args, rate_hz: int) -> Iterator[np.ndarray]:
    """Samples at the model's rate, a block at a time. ValueError: no such input."""
    if args.input is None:
        return _microphone(args.microphone, rate_hz)
    if args.input == "-":
        return _pcm(sys.stdin.buffer, args.rate or rate_hz, rate_hz)
    from .audio import load_audio

    samples, size = load_audio(args.input, rate_hz), round(BLOCK_S * rate_hz)
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _pcm(file, from_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """16-bit samples of a pipe, as they come."""
    resample = _resampler(from_hz, to_hz)
    size, kept = 2 * round(BLOCK_S * from_hz), b""
    while data := file.read1(size):
        data = kept + data
        kept = data[len(data) // 2 * 2 :]
        samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
        yield resample(samples, False)
    yield resample(np.zeros(0, np.float32), True)


def _microphone(name: str | None, rate_hz: int) -> Iterator[np.ndarray]:
    """Samples as a microphone gives them, until the program is stopped."""
    try:
        import sounddevice
    except ImportError:
        raise cli.Failed("sounddevice is missing: pip install 'fastconformer[listen]'") from None
    except OSError as error:  # its library
        raise cli.Failed(f"the microphone needs PortAudio: {error}") from None
    device = int(name) if name is not None and name.isdigit() else name
    try:
        found = sounddevice.query_devices(device, "input")
        own_hz = round(found["default_samplerate"])
        heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        stream = sounddevice.InputStream(
            own_hz,
            round(BLOCK_S * own_hz),
            device,
            channels=1,
            dtype="float32",
            callback=lambda samples, frames, times, status: heard.put(samples[:, 0].copy()),
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        raise cli.Failed(f"no microphone: {error}") from None
    print(f"listen: {found['name']}; Ctrl-C ends", file=sys.stderr)
    resample, is_told = _resampler(own_hz, rate_hz), False
    with stream:
        for _ in itertools.count():
            parts = [heard.get()]
            while not heard.empty():
                parts.append(heard.get())
            samples = np.concatenate(parts)
            if len(parts) * BLOCK_S > LAG_S and not is_told:
                cli.report("listen", found["name"], "the model is slower than the speech")
                is_told = True
            yield resample(samples, False)


def _resampler(from_hz: int, to_hz: int):
    """(samples, whether they are the last) -> samples at the other rate, across pieces."""
    if from_hz == to_hz:
        return lambda samples, is_last: samples
    import soxr

    stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32")
    return lambda samples, is_last: stream.resample_chunk(samples, last=is_last).reshape(-1)


if __name__ == "__main__":
    sys.exit(main())
