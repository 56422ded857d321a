"""Chunks against a single pass over a long recording: words that agree, their times, borders.

    python -m benchmarks.longform --model model.nemo --attention local

`--attention local` gives the model local attention over 128 frames on both sides, by which a chunk
with enough context sees all that the single pass sees; `own` leaves it what it has. Windows of
`--window` seconds with `--context` on both sides are compared with the single pass: the share of
the single pass's words that are said alike, the largest difference of their times, and over the
first minute, with one border put on every encoder frame of `--sweep` seconds of speech, how many
words are lost or doubled. The result goes to `--out` as JSON.
"""

import difflib
import sys
import time
from pathlib import Path

from benchmarks import SPEECH, add_out, machine, versions, write_result
from fastconformer import cli


def compare(single, other) -> dict:
    """How two transcripts of one recording agree, word by word."""
    a, b = ([w.text for w in t.words] for t in (single, other))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    pairs = [(single.words[m.a + i], other.words[m.b + i]) for m in blocks for i in range(m.size)]
    differences = [max(abs(v.start - w.start), abs(v.end - w.end)) for v, w in pairs]
    return {
        "words": len(a),
        "alike": len(pairs),
        "share": round(len(pairs) / max(1, len(a)), 5),
        "lost": len(a) - len(pairs),
        "more": len(b) - len(pairs),
        "largest_time_difference_s": round(max(differences, default=0.0), 3),
    }


def transcribe(model, samples, window_s: float | None, context_s=None, border=None) -> dict:
    """{head: transcript}, in one pass or in windows; `border`: one at this encoder frame alone."""
    import torch

    from fastconformer.recordings import longform

    audio = torch.as_tensor(samples)[None]
    with torch.no_grad():
        features, lengths = model.featurize(audio, torch.tensor([len(samples)]))
        features = features[:, :, : int(lengths[0])]
        plan = longform.plan_windows
        if window_s is None:
            encoded, lengths = model.encode(features, lengths)
        else:
            if border is not None:
                longform.plan_windows = lambda n, _, context, factor, total, *rest: two_windows(
                    longform, n, border, -(-context // factor), factor, total
                )
            try:
                encoded = longform.encode_in_windows(model, features[0], 4, window_s, context_s)
            finally:
                longform.plan_windows = plan
            lengths = torch.tensor([encoded.shape[1]])
        found = {head: model.decode(encoded, lengths, head)[0] for head in model.heads}
    seconds = len(samples) / model.sample_rate
    return {head: model.transcript(h, head, seconds, timestamps=True) for head, h in found.items()}


def sweep_borders(model, minute, arguments) -> list[dict]:
    """A border on every encoder frame of `--sweep` seconds in the middle of the minute."""
    single = transcribe(model, minute, None)
    frame_s = model.config.frame_seconds
    words = single[model.heads[0]].words
    first = int(words[len(words) // 2].start / frame_s)
    borders = range(first, first + int(arguments.sweep / frame_s))
    found = [transcribe(model, minute, 60.0, arguments.context, border) for border in borders]
    rows = []
    for head in model.heads:
        each = [compare(single[head], f[head]) for f in found]
        row = {"head": head, "borders": len(borders), "words": each[0]["words"]}
        row |= {key: sum(e[key] for e in each) for key in ("lost", "more")}
        row["worst_share"] = min(e["share"] for e in each)
        row["largest_time_difference_s"] = max(e["largest_time_difference_s"] for e in each)
        rows.append(row)
        print(row, flush=True)
    return rows


def two_windows(longform, n_frames: int, border: int, context: int, factor: int, total: int):
    """Windows before and after one border, an encoder frame of `total`."""
    start = max(0, border - context)
    return [
        longform.Window(0, min(n_frames, (border + context) * factor), 0, border),
        longform.Window(start * factor, n_frames, border - start, total - border),
    ]


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.longform",
        __doc__.split("\n\n")[0],
        "--model models/base_tiny.nemo --attention local",
    )
    parser.add_argument("--model", required=True, help=".nemo archive or converted folder")
    parser.add_argument("--audio", type=Path, default=SPEECH, help="(samples/talk.ogg)")
    parser.add_argument("--seconds", type=float, help="only so much of it")
    parser.add_argument("--times", type=int, default=1, help="the recording so many times over")
    parser.add_argument("--attention", choices=["own", "local"], default="own")
    parser.add_argument("--window", type=float, nargs="+", default=[120.0], metavar="SECONDS")
    parser.add_argument("--context", type=float, metavar="SECONDS", help="(as transcribe)")
    parser.add_argument("--sweep", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=1)
    add_out(parser, "longform")
    arguments = parser.parse_args(argv)
    return cli.run("longform", lambda: run(arguments))


def run(arguments) -> None:
    import numpy as np
    import torch

    import fastconformer
    from fastconformer.audio.files import load_audio
    from fastconformer.recordings import longform
    from fastconformer.surgery.local_attention import with_local_attention

    torch.set_num_threads(arguments.threads)
    model = fastconformer.load_model(arguments.model)
    if arguments.attention == "local":
        model = with_local_attention(model)
    samples = load_audio(arguments.audio, model.sample_rate, 0.0, arguments.seconds)
    samples = np.tile(samples, arguments.times)
    context_s = arguments.context
    rows = []
    started = time.perf_counter()
    single = transcribe(model, samples, None)
    single_s = round(time.perf_counter() - started, 1)
    for window_s in arguments.window:
        found = transcribe(model, samples, window_s, context_s)
        for head, transcript in found.items():
            row = {"head": head, "window_s": window_s, "single_pass_s": single_s}
            rows.append(row | compare(single[head], transcript))
            print(rows[-1], flush=True)
    if arguments.sweep:
        rows += sweep_borders(model, samples[: 60 * model.sample_rate], arguments)
    result = {
        "machine": machine(),
        "versions": versions(),
        "model": Path(arguments.model).name,
        "attention": arguments.attention,
        "context_s": context_s or longform.context_seconds(model.config),
        "audio_s": round(len(samples) / model.sample_rate, 1),
        "rows": rows,
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    sys.exit(main())
