"""How late a stream's words come, how many streams one machine holds, and what batching brings.

    python -m benchmarks.live --threads 2

A causal model of parakeet-tdt_ctc-110m's sizes with random weights (`random_model.py`), and chunks
of each look-ahead. Latency: speech comes in pieces of 80 ms, as a microphone gives it. A token is
late by the time from the end of its frame's audio to the moment when a partial holds it: first the
audio of its chunk must be there, then the machine works. Streams: the share of real time that a
second of each takes where many advance together. Throughput: clips asked of the server's line one
after the other, and all at once. `--cpu-time` counts the seconds of the processor in place of the
clock's, for a machine that has other work; with one thread alone.
"""

import concurrent.futures
import os
import statistics
import sys
import time

from benchmarks import SPEECH, add_out, machine, versions, write_result

PIECE_S = 0.08  # of audio, as a microphone gives it
LEFT_FRAMES = 70


def parse_arguments(argv=None):
    from benchmarks.random_model import SIZES
    from fastconformer.cli import parser

    made = parser("benchmarks.live", "Latency and capacity of streams.", "--threads 2")
    made.add_argument("--seconds", type=float, default=30.0, help="of speech (%(default)s)")
    made.add_argument("--look-aheads", type=int, nargs="+", default=[0, 6, 13], metavar="FRAMES")
    made.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    made.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=SIZES["random-110m"],
        metavar=("LAYERS", "WIDTH", "MELS", "LSTMS"),
        help="(%(default)s)",
    )
    made.add_argument("--clips", type=int, default=16, help="asked of the server (%(default)s)")
    made.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    made.add_argument("--cpu-time", action="store_true", help="see above; needs --threads 1")
    add_out(made, "live")
    args = made.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        made.error("--cpu-time sums up all threads: it needs --threads 1")
    return args


def causal_model(clip, look_aheads, shape):
    """A random model of this shape that was made for streaming, with these look-aheads."""
    from benchmarks.random_model import random_model

    contexts = [[LEFT_FRAMES // (right + 1) * (right + 1), right] for right in look_aheads]
    encoder = {
        "att_context_style": "chunked_limited",
        "att_context_size": contexts,
        "causal_downsampling": True,
        "conv_context_size": "causal",
        "conv_norm_type": "layer_norm",
    }
    preprocessor = {"normalize": "NA"}
    model, _ = random_model([clip], 4.0, shape, encoder=encoder, preprocessor=preprocessor)
    return model


def lateness(model, speech, look_ahead: int, clock) -> dict:
    """Milliseconds from the end of a token's frame to the partial that holds it, as if the speech
    were spoken: a piece is there when it has been said, and its work begins when the one before is
    done."""
    model.stream(look_ahead=look_ahead).feed(speech[: 3 * model.sample_rate])  # all is compiled
    stream = model.stream(look_ahead=look_ahead)
    size, rate = round(PIECE_S * model.sample_rate), model.sample_rate
    frame_s = model.config.frame_seconds
    late, steps, now, n_tokens = [], [], 0.0, 0
    for start in range(0, len(speech), size):
        piece = speech[start : start + size]
        now = max(now, (start + len(piece)) / rate)
        began = clock()
        partial = stream.feed(piece)
        took = clock() - began
        steps.append(took)
        now += took
        ends = [(frame + 1) * frame_s for frame in partial.token_frames[n_tokens:]]
        n_tokens = len(partial.tokens)
        late += [1000 * (now - end) for end in ends]
    busy = sum(steps) / (len(speech) / rate)
    return {
        "look_ahead": look_ahead,
        "chunk_ms": round(1000 * (look_ahead + 1) * frame_s),
        "tokens": len(late),
        "median_ms": round(statistics.median(late)),
        "p95_ms": round(statistics.quantiles(late, n=20)[-1]),
        "busy": round(busy, 3),
    }


def capacity(model, speech, look_ahead: int, counts, clock) -> list[dict]:
    """Of so many streams together, the share of real time that they take."""
    size, rows = round(PIECE_S * model.sample_rate), []
    speech = speech[: 3 * model.sample_rate]
    for count in counts:
        streams = [model.stream(look_ahead=look_ahead) for _ in range(count)]
        began = clock()
        for start in range(0, len(speech), size):
            for stream in streams:
                stream.take(speech[start : start + size])
            streams[0].together(streams)
        took = clock() - began
        rows.append({"streams": count, "busy": round(took * model.sample_rate / len(speech), 3)})
        if rows[-1]["busy"] > 1:
            break
    return rows


def throughput(model, clips, clock) -> dict:
    """Seconds of audio a second through the server's line: asked one after the other, and at once.
    The same clips in both; the texts are equal."""
    from fastconformer.serving.batcher import Batcher

    seconds = sum(len(clip) for clip in clips) / model.sample_rate
    batcher = Batcher(model, 16, len(clips))

    def ask(clip):
        return batcher.submit(clip, {"head": None}).result().text

    ask(clips[0])
    began = clock()
    alone = [ask(clip) for clip in clips]
    one_by_one = clock() - began
    with concurrent.futures.ThreadPoolExecutor(len(clips)) as pool:
        began = clock()
        together = list(pool.map(ask, clips))
        at_once = clock() - began
    batcher.close()
    return {
        "clips": len(clips),
        "one_by_one_rtfx": round(seconds / one_by_one, 1),
        "at_once_rtfx": round(seconds / at_once, 1),
        "equal_texts": alone == together,
    }


def main(argv=None) -> int:
    import torch

    from benchmarks.random_model import cut_clips

    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    (speech,) = cut_clips(SPEECH, 1, args.seconds, args.seconds)
    model = causal_model(speech, args.look_aheads, args.shape)
    result = {"machine": machine(), **versions(), "threads": args.threads, "dtype": "float32"}
    result["clock"] = "cpu" if args.cpu_time else "wall"
    result |= {"shape": list(args.shape), "parameters": sum(p.numel() for p in model.parameters())}
    result |= {"latency": [], "capacity": []}
    for look_ahead in args.look_aheads:
        result["latency"].append(lateness(model, speech, look_ahead, clock))
        print(result["latency"][-1], flush=True)
        rows = capacity(model, speech, look_ahead, args.streams, clock)
        result["capacity"].append({"look_ahead": look_ahead, "rows": rows})
        print(rows, flush=True)
    result["throughput"] = throughput(model, cut_clips(SPEECH, args.clips, 3.0, 12.0), clock)
    print(result["throughput"])
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
