"""Fine-tuning a streaming checkpoint keeps every look-ahead: error rates of each, before and after.

    python -m training.synthesize runs/quickstart/train --vocabulary quickstart --count 1600 --seed 1
    python -m training.synthesize runs/quickstart/test --vocabulary quickstart --count 60 --seed 2 --voices heldout
    python -m benchmarks.look_ahead_learning

A streaming model is made of models/base_tiny.nemo: chunked attention with four look-aheads, causal
convolutions (the past half of each kernel stays), features without normalisation over the clip. It
learns to stream on half of the quickstart's clips, and is then fine-tuned on the other half by an
ordinary recipe; both draw a look-ahead for each step, as NeMo does. Measured on voices and sentences
that neither heard: each look-ahead and head, offline, and how many of the live texts equal these.

The work lies in `--folder`, and a second call goes on where the first was cut. The result goes to
`--out` as JSON.
"""  # noqa: E501 - commands

import copy
import json
import sys
from pathlib import Path

from benchmarks import REPOSITORY, add_out, machine, versions, write_result
from fastconformer import cli

BASE = REPOSITORY / "models" / "base_tiny.nemo"
CONTEXTS = [[70, 13], [70, 6], [70, 1], [70, 0]]  # chunks of 1.12, 0.56, 0.16 and 0.08 s
N_LEVEL = 40  # clips that the features' mean and deviation are taken from
PIECE_SAMPLES = 8000


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.look_ahead_learning", __doc__.split("\n\n")[0], "--folder runs/look_ahead"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/look_ahead"))
    parser.add_argument(
        "--corpus", type=Path, default=Path("runs/quickstart"), help="(%(default)s)"
    )
    parser.add_argument("--start-steps", type=int, default=240, help="of learning to stream")
    parser.add_argument("--steps", type=int, default=220, help="of fine-tuning (%(default)s)")
    add_out(parser, "look_ahead_learning")
    return cli.run("look_ahead_learning", lambda: run(parser.parse_args(argv)))


def run(arguments) -> None:
    from fastconformer.checkpoint.files import write_text
    from fastconformer.checkpoint.nemo_archive import write_nemo
    from training import finetune

    folder, train = arguments.folder, arguments.corpus / "train"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (train / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = str((train / line["audio_filepath"]).resolve())
    halves = {"streaming": lines[::2], "finetuned": lines[1::2]}
    init = folder / "start.nemo"
    if not init.is_file():
        write_nemo(init, streaming_model(halves["streaming"][:N_LEVEL]).to_checkpoint())
    result = {"machine": machine(), "versions": versions(), "contexts": CONTEXTS}
    result["steps"] = dict(zip(halves, (arguments.start_steps, arguments.steps), strict=True))
    for name, half in halves.items():
        manifest, trained = folder / f"{name}.jsonl", folder / name / "model.nemo"
        write_text(manifest, "".join(json.dumps(line) + "\n" for line in half))
        recipe = {
            "output": str(folder / name),
            "model": {"init_from": str(init)},
            "data": {"train": [str(manifest)], "batch_size": 32, "batch_duration_s": 30.0},
            "optim": {"lr": 1.5e-3},
            "schedule": {"name": "cosine", "warmup_steps": 20, "min_lr": 1e-5},
            "trainer": {
                "max_steps": result["steps"][name],
                "device": "cpu",
                "precision": "fp32",
                "threads": 2,
                "log_every_steps": 40,
            },
            "spec_augment": {"freq_masks": 0, "time_masks": 0},
        }
        path = folder / f"{name}.yaml"
        write_text(path, json.dumps(recipe))  # JSON is YAML
        if not trained.is_file() and finetune.main([str(path)]):
            raise cli.Failed(f"the run in {folder / name} did not end well")
        result[name] = measure(trained, arguments.corpus / "test")
        print(name, json.dumps(result[name]), flush=True)
        init = trained
    write_result(arguments.out, result)


def streaming_model(lines: list[dict]):
    """The base with causal convolutions and limited attention; it has to learn to live with that.
    The features' mean and deviation over some clips go into the first convolution."""
    import torch

    from fastconformer import ModelConfig, load_model
    from fastconformer.audio import load_audio

    base = load_model(BASE)
    nemo = copy.deepcopy(base.config.nemo)
    nemo["encoder"] |= {
        "att_context_style": "chunked_limited",
        "att_context_size": CONTEXTS,
        "conv_context_size": "causal",
    }
    nemo["preprocessor"]["normalize"] = "NA"
    model, features = base.changed(ModelConfig.from_nemo(nemo)), []
    for line in lines:
        clip = torch.from_numpy(load_audio(line["audio_filepath"], model.sample_rate))
        found, length = model.featurize(clip[None], torch.tensor([len(clip)]))
        features.append(found[0, :, : int(length)])
    level = torch.cat(features, 1)
    mean, deviation = float(level.mean()), float(level.std())
    with torch.no_grad():
        first = model.encoder.pre_encode.conv[0]
        first.weight.div_(deviation)
        first.bias.sub_(first.weight.sum((1, 2, 3)) * mean)
        for layer in model.encoder.layers:
            kernel = layer.conv.depthwise_conv.weight
            past = kernel[..., : kernel.shape[-1] // 2 + 1].clone()
            kernel.zero_()
            kernel[..., -past.shape[-1] :] = past
    return model


def measure(path: Path, test: Path) -> dict:
    """{"tdt 13": WER in percent ...}, and how many of the live texts are the offline ones."""
    import torch

    from fastconformer import load_model
    from fastconformer.audio import load_audio
    from fastconformer.text.metrics import word_errors

    torch.set_num_threads(2)
    model = load_model(path)
    lines = [json.loads(line) for line in (test / "manifest.jsonl").read_text().splitlines()]
    clips = [load_audio(test / line["audio_filepath"], model.sample_rate) for line in lines]
    texts, rates, equal, n_live = [line["text"] for line in lines], {}, 0, 0
    for head in model.heads:
        for _, right in CONTEXTS:
            offline = model.transcribe(clips, head, look_ahead=right, retry=False)
            said = [transcript.text for transcript in offline]
            rates[f"{head} {right}"] = round(100 * word_errors(texts, said).rate, 1)
            for clip, text in zip(clips[::3], said[::3], strict=True):
                stream = model.stream(head, look_ahead=right)
                for start in range(0, len(clip), PIECE_SAMPLES):
                    stream.feed(clip[start : start + PIECE_SAMPLES])
                equal, n_live = equal + (stream.finish().text == text), n_live + 1
    return {"wer": rates, "clips": len(clips), "live": n_live, "live_equal": equal}


if __name__ == "__main__":
    sys.exit(main())
