"""Fun-ASR-Nano learns the telephone: the tests' tiny model through recipes/telephone_llm.yaml.

    python -m benchmarks.funasr_learning --folder runs/funasr_learning

eSpeak speaks the sentences of at most four words of the quickstart's vocabulary; tests have voices
and sentences that training does not, as they are at 16 kHz, and after a telephone line (its band,
G.711, up to 5 % lost packets) at 8 kHz. Since the tiny model knows nothing, a first run trains all
of it on clean speech and stands in for pretraining. Then come the recipe's two stages, with what a
tiny model and a small corpus need other numbers for: rates, steps, batches. All runs go on where
they were stopped.

Error rates of both heads, of the start and after each stage, and how many tensors of each part a
stage moved, are printed and written to `--out`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import REPOSITORY, add_out, machine, versions, write_result

CASE = REPOSITORY / "tests" / "golden" / "fun_asr_nano_tiny"
RECIPE = REPOSITORY / "recipes" / "telephone_llm.yaml"
WORDS = 4  # in the longest sentence
CORPORA = {"train": (800, 1), "dev": (48, 3), "test": (40, 2)}  # clips, seed
LINE_HZ, PACKET_LOSS = 8000, 0.05
PARTS = ("audio_encoder", "audio_adaptor", "llm", "ctc_decoder", "ctc")


def sentences(count: int, seed: int, heldout: bool) -> list[str]:
    import numpy as np

    from training.speech.texts import is_heldout, quickstart_text

    rng, texts = np.random.default_rng(seed), []
    while len(texts) < count:
        text = quickstart_text(rng)
        if len(text.split()) <= WORDS and is_heldout(text) == heldout:
            texts.append(text)
    return texts


def speak(folder: Path) -> None:
    """folder/NAME of `CORPORA`, and folder/NAME_line after a telephone line."""
    import numpy as np
    import soundfile

    from fastconformer.audio.files import load_audio
    from training.augment.telephone import telephone
    from training.speech.corpus import synthesize

    for name, (count, seed) in CORPORA.items():
        out, line = folder / name, folder / f"{name}_line"
        if not (out / "manifest.jsonl").exists():
            heldout = name != "train"
            synthesize(out, sentences(count, seed, heldout), seed, heldout)
        if name == "train" or (line / "manifest.jsonl").exists():
            continue
        (line / "audio").mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        manifest = (out / "manifest.jsonl").read_text()
        for entry in map(json.loads, manifest.splitlines()):
            samples = load_audio(out / entry["audio_filepath"], LINE_HZ).astype(np.float32)
            heard = telephone(samples, LINE_HZ, rng, packet_loss=PACKET_LOSS)
            soundfile.write(line / entry["audio_filepath"], heard, LINE_HZ)
        (line / "manifest.jsonl").write_text(manifest)


def recipes(folder: Path, steps: list[int], rate: float) -> tuple[dict, dict]:
    """Of the start, and of the two stages: trees of recipes."""
    import yaml

    common = {"batch_size": 10, "num_workers": 0}
    train = {"train": [str(folder / "train" / "manifest.jsonl")]}
    cpu = {"precision": "fp32", "device": "cpu", "threads": 1, "log_every_steps": 50}
    start = yaml.safe_load(RECIPE.read_text())
    two = yaml.safe_load(RECIPE.read_text())

    del start["stages"], start["augment"]
    start["output"] = str(folder / "start")
    start["model"] = {"init_from": str(CASE), "dropout": 0.0}
    clean = {"validation": {"dev": str(folder / "dev" / "manifest.jsonl")}}
    start["data"] |= common | train | clean
    start["spec_augment"] = {"time_masks": 0, "freq_masks": 0}
    start["optim"] |= {"lr": 3 * rate, "betas": [0.9, 0.98]}
    start["schedule"] = {"name": "cosine", "warmup_steps": steps[0] // 10, "min_lr": 1e-5}
    start["loss"] = {"heads": "all", "ctc_weight": 1.0}
    epochs = start["trainer"].pop("epochs")
    assert epochs == two["trainer"].pop("epochs")  # steps instead, here and in the stages
    start["trainer"] |= cpu | {"max_steps": steps[0], "val_every_steps": steps[0]}

    two["output"] = str(folder / "telephone")
    two["model"] |= {"init_from": str(folder / "start" / "best"), "dropout": 0.0}
    line = {"validation": {"line": str(folder / "dev_line" / "manifest.jsonl")}}
    two["data"] |= common | train | line
    two["optim"] |= {"lr": rate}
    two["schedule"]["warmup_steps"] = min(steps[1:]) // 10
    two["trainer"] |= cpu | {"max_steps": steps[1]}
    for stage, count in zip(two["stages"], steps[1:], strict=True):
        stage["trainer"] = {"max_steps": count, "val_every_steps": count}
        if "optim" in stage:
            stage["optim"] = {"lr": rate / 2}
    return start, two


def train(recipe: dict, path: Path) -> None:
    import yaml

    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "training.finetune", str(path)]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def rates(model, folder: Path, name: str) -> dict:
    """{head: {"wer", "cer"}} in percent."""
    from fastconformer.formats.manifest import read_manifest
    from fastconformer.jobs.scores import evaluate

    clips, _ = read_manifest(folder / name / "manifest.jsonl")
    found = {}
    for head in model.heads:
        scores = evaluate(model, clips, head)["raw"]
        found[head] = {rate: round(100 * scores[rate], 1) for rate in ("wer", "cer")}
    return found


def moved(before: dict, after: dict) -> dict:
    """{part: "how many of its tensors differ/all"}."""
    import torch

    counts = {}
    for part in PARTS:
        names = [name for name in before if name.startswith(f"{part}.")]
        changed = sum(not torch.equal(before[name], after[name]) for name in names)
        counts[part] = f"{changed}/{len(names)}"
    return counts


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.funasr_learning",
        description=__doc__,
        epilog="example: python -m benchmarks.funasr_learning --steps 500 60 60",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/funasr_learning"))
    parser.add_argument("--steps", type=int, nargs=3, default=[500, 60, 60],
                        help="of the start and of the two stages (%(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=1e-3, help="of stage 1 (%(default)s)")
    add_out(parser, "funasr_learning")
    args = parser.parse_args(argv)

    import torch

    from fastconformer import load_model

    torch.set_num_threads(1)
    folder = args.folder.resolve()
    result = {"machine": machine(), **versions(), "steps": args.steps, "rate": args.rate}
    folder.mkdir(parents=True, exist_ok=True)
    speak(folder)
    for recipe in recipes(folder, args.steps, args.rate):
        train(recipe, folder / f"{Path(recipe['output']).name}.yaml")

    stages = [folder / "telephone" / f"stage_{number}" for number in (1, 2)]
    start = load_model(folder / "start" / "best")
    models = {
        "start, clean 16 kHz": (start, "test"),
        "start, the line resampled to 16 kHz": (start, "test_line"),
        "start, the line at 8 kHz": (start.with_sample_rate(LINE_HZ), "test_line"),
    }
    for number, stage in enumerate(stages, start=1):
        models[f"after stage {number}, the line"] = (load_model(stage / "best"), "test_line")
    result["rates"] = {name: rates(model, folder, where) for name, (model, where) in models.items()}
    for name, heads in result["rates"].items():
        said = (f"{head} WER {r['wer']:5.1f} CER {r['cer']:5.1f}" for head, r in heads.items())
        print(f"{name:38} {'  '.join(said)}")

    states = [load_model(path / "best").state_dict() for path in (folder / "start", *stages)]
    last = [load_model(stage / "last").state_dict() for stage in stages]
    result["moved"] = {
        f"stage {number}": moved(before, after)
        for number, (before, after) in enumerate(zip(states, last), start=1)
    }
    for name, counts in result["moved"].items():
        print(name, "moved", ", ".join(f"{part} {count}" for part, count in counts.items()))
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
