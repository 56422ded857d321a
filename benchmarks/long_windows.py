"""One pass, windows and `long="auto"` on recordings of minutes: word errors and CPU time.

    python -m benchmarks.long_windows --model models/base_tiny.nemo --near 8

eSpeak NG (the extra quickstart) speaks the texts of `--texts`, each recording by one voice that the
shipped base has not heard, with pauses of 0.3 s. Checkpoints that were trained on clips of seconds
lose words in one pass of minutes, which says nothing about windows. `--near SECONDS` makes one that
bears them out of such a checkpoint, without training: a term of the distance alone is added to its
scores, about 0 within these seconds and -10 from twice as many on. The attention stays full, and
its cost.
"""

import json
import random
import sys
import time
from pathlib import Path

from benchmarks import REPOSITORY, add_out, machine, versions, write_result
from fastconformer import cli

DEPTH = 10.0  # subtracted from scores of frames far apart
UNUSED = 30.0  # of the positional bias in the direction that carries the new term


def attend_near(model, seconds: float, reach_s: float = 400.0) -> None:
    """Adds f(distance) to the scores of every head, exactly as its rel_pos attention can: f is a
    sum of the position encoding's cosines, fitted up to distances of `reach_s`. It enters by
    linear_pos W and pos_bias_v along the direction u of a head in which positions say least:
    v' = v + a u and W' = W + u (c - a u W) / (a + u v) give v' W' = v W + c."""
    import torch

    from fastconformer.networks.attention import RelPositionMultiHeadAttention, position_encoding

    near, reach = (s / model.config.frame_seconds for s in (seconds, reach_s))
    d_model = model.config.encoder.d_model
    distances = torch.cat([torch.arange(0, 3 * near), torch.arange(3 * near, reach, 4)])
    cosines = position_encoding(distances, d_model)[:, 1::2].double()
    wanted = -DEPTH * torch.sigmoid((distances - 1.6 * near) / (0.15 * near)).double()
    weight = torch.where(distances < near, 5.0, 1.0).double()[:, None]
    square = (cosines * weight).T @ (cosines * weight)
    square += 1e-6 * torch.eye(len(square), dtype=square.dtype)
    fitted = torch.linalg.solve(square, (cosines * weight).T @ (wanted[:, None] * weight))[:, 0]
    frames = position_encoding(torch.arange(-200.0, 201.0), d_model).double()
    for module in model.modules():
        if not isinstance(module, RelPositionMultiHeadAttention):
            continue
        term = torch.zeros(d_model, dtype=torch.float64)
        term[1::2] = fitted * module.d_head**0.5  # scores are divided by it
        weights = module.linear_pos.weight.data.unflatten(0, (module.n_heads, module.d_head))
        for w, v in zip(weights, module.pos_bias_v.data, strict=True):
            u = torch.linalg.svd(w.double() @ frames.T, full_matrices=False)[0][:, -1]
            row = (term - UNUSED * (u @ w.double())) / (UNUSED + v.double() @ u)
            w += torch.outer(u, row)
            v += UNUSED * u


def speak(texts: list[str], lengths_s: list[float], seed: int) -> list[tuple]:
    """(samples at 16 kHz, what is said) of each length, by a voice of its own."""
    import numpy as np
    import soxr

    from training.speech.voices import ACCENTS, HELDOUT_VARIANTS, the_speaker

    rng, speaker, left, found = random.Random(seed), the_speaker(), [], []
    for length_s in lengths_s:
        voice = f"{rng.choice(ACCENTS['en'])}+{rng.choice(HELDOUT_VARIANTS)}"
        rate, parts, said = rng.randint(130, 165), [], []
        while sum(map(len, parts)) < length_s * 16000:
            left = left or rng.sample(texts, len(texts))
            said.append(left.pop())
            samples = speaker.speak(said[-1], voice, rate_wpm=rate, word_gap=3)
            samples = soxr.resample(samples, speaker.sample_rate_hz, 16000)
            parts += [samples, np.zeros(4800, np.float32)]
        samples = np.concatenate(parts)
        noise = np.random.default_rng(seed).standard_normal(len(samples), np.float32)
        found.append((samples + 5e-4 * noise, " ".join(said)))
    return found


def main(argv=None) -> int:
    example = "--model models/base_tiny.nemo --near 8"
    parser = cli.parser("benchmarks.long_windows", __doc__.split("\n\n")[0], example)
    parser.add_argument("--model", required=True, help=".nemo archive or converted folder")
    parser.add_argument("--near", type=float, metavar="SECONDS", help="limit its attention so")
    texts = REPOSITORY / "samples" / "talk_sentences.jsonl"
    parser.add_argument("--texts", type=Path, default=texts, help="manifest (samples/talk)")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 1, 1, 1, 2, 2, 3, 5])
    parser.add_argument("--modes", nargs="+", default=["full", "30", "auto"], metavar="full|auto|S")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_out(parser, "long_windows")
    return cli.run("long_windows", lambda: run(parser.parse_args(argv)))


def run(arguments) -> None:
    import torch

    import fastconformer
    from fastconformer.text.metrics import word_errors

    torch.set_num_threads(arguments.threads)
    began, model = machine(), fastconformer.load_model(arguments.model)
    if arguments.near:
        attend_near(model, arguments.near)
    texts = [json.loads(line)["text"] for line in arguments.texts.read_text().splitlines()]
    spoken = speak(texts, [60 * minutes for minutes in arguments.minutes], arguments.seed)
    rows = []
    for head in model.heads:
        model.transcribe([spoken[0][0][:32000]], head=head)  # what is compiled at the first call
        for mode in arguments.modes:
            options = {"long": mode} if mode in ("full", "auto") else {"long": "chunks"}
            options |= {} if mode in ("full", "auto") else {"window_s": float(mode)}
            for minutes in dict.fromkeys(arguments.minutes):
                pairs, cpu_s = [], 0.0
                for length, (samples, said) in zip(arguments.minutes, spoken, strict=True):
                    if length == minutes:
                        started = time.process_time()
                        heard = model.transcribe([samples], head=head, **options)[0].text
                        cpu_s += time.process_time() - started
                        pairs.append((said, heard))
                counts = word_errors(*zip(*pairs, strict=True))
                row = {"head": head, "mode": mode, "minutes": minutes, "clips": len(pairs)}
                row |= {"words": counts.words, "errors": counts.errors}
                rows.append(row | {"wer": round(100 * counts.rate, 2), "cpu_s": round(cpu_s, 2)})
                print(rows[-1], flush=True)
    result = {
        "machine": began,
        "versions": versions(),
        "model": Path(arguments.model).name,
        "near_s": arguments.near,
        "texts": arguments.texts.name,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "rows": rows,
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    sys.exit(main())
