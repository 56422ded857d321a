"""What a recipe will do, before it costs anything: against its start, or another recipe.

    python -m training.compare recipes/finetune.yaml                 # beside the pretrained model
    python -m training.compare recipes/finetune.yaml other.yaml
    python -m training.compare recipes/finetune.yaml model.nemo trainer.max_steps=2000

First what differs and what each difference means. Then a preflight of the recipe: the weights
load, the tokenizer covers the text, durations and lengths fit, memory and disk suffice, and one
batch goes forward and backward. A check that fails ends with status 1; nothing is written.
"""

import dataclasses
import math
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import soundfile
import torch

from fastconformer import ASRModel, cli
from fastconformer.audio.files import load_audio
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.text.tokenizer import AggregateTokenizer
from training.data.sources import TrainingSet, batch_order, load_data, read_source
from training.data.store import Utterance
from training.find_batch import device_memory, find_batch_duration, training_step
from training.objective.objective import Objective, batch_loss, objective_of
from training.recipe.data_sections import SourceRecipe
from training.recipe.recipe import Recipe, load_recipe, recipe_differences
from training.setup.freeze import Freezing
from training.setup.run import choose_device
from training.setup.start import build_model, prepare

UNKNOWN_SHARE, LEFT_OUT_SHARE = 0.01, 0.1  # above these the preflight fails
MEANINGS = {  # prefixes of keys; the longest decides
    "output": "results go to another folder",
    "resume": "whether a run folder that is there is gone on with",
    "model.init_from": "another start: nothing else is comparable before the first evaluation",
    "model.tokenizer": "another vocabulary: losses per token are not comparable, WER is",
    "model.transfer": "whether pieces keep what they learnt",
    "model.dropout": "more dropout fits small data, and slows learning",
    "model.sample_rate": "another front end; what lies above half the rate is not heard",
    "encoder": "another attention: longer audio, and weights that must be learnt again",
    "data.train": "other training data",
    "data.validation": "numbers are measured on other clips: not comparable",
    "data.batch": "other batches: with a larger one a step is surer, and there are fewer an epoch",
    "data.m": "other clips are left out",
    "data.num_workers": "speed only",
    "data.cache_gb": "speed only",
    "loss.heads": "which heads learn; one that does not stays as it was while the encoder moves",
    "loss": "another objective: loss values are not comparable, WER is",
    "freeze": "other parts stay as they are; frozen layers keep the old domain, and cost less",
    "lora": "adapters instead of whole weights: less memory, less capacity to change",
    "optim.name": "8-bit states save about 6 bytes a parameter",
    "optim.lr": "how far a step goes; too high forgets the checkpoint in the first hundred steps",
    "optim": "how the optimizer moves",
    "schedule": "how the rate rises and falls",
    "retain": "how much of the original is held on to",
    "trainer.max_steps": "how long it learns",
    "trainer.epochs": "how long it learns",
    "trainer.accumulate": "batches in a step: a larger effective batch, slower steps",
    "trainer.precision": "memory and speed; bf16 has 8 bits of precision",
    "trainer.seed": "another order and other masks: the spread between seeds is the noise",
    "trainer": "how it runs, not what it learns",
    "spec_augment": "how much of the features is hidden: against overfitting, for longer training",
    "augment": "how the audio is changed: for conditions that the data lacks",
    "keep": "which of the evaluated models is kept",
    "guard": "whether forgetting the general set disqualifies a model",
    "stages": "another sequence of stages",
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe with its model and data in memory, as the run's first step would find them."""

    recipe: Recipe
    model: ASRModel
    objective: Objective
    freezing: Freezing
    train: TrainingSet


def prepared(recipe: Recipe) -> Prepared:
    """Raises what the run itself would raise. `data.batch_duration_s: auto` becomes a number."""
    model = build_model(recipe.model, recipe.loss, recipe.trainer.seed, recipe.encoder)
    objective = objective_of(recipe, model)
    train, _ = load_data(recipe, model, objective.heads, None)
    freezing = prepare(model, recipe, objective)
    if recipe.data.batch_duration_s == "auto":
        step = training_step(model, objective, freezing, recipe)
        model.to(choose_device(recipe.trainer.device))
        found = find_batch_duration(recipe, train, model, step, recipe.data.batch_memory_gb)
        data = dataclasses.replace(recipe.data, batch_duration_s=found, batch_memory_gb=None)
        recipe = dataclasses.replace(recipe, data=data)
    return Prepared(recipe, model, objective, freezing, train)


def facts(job: Prepared) -> dict[str, str]:
    """What the recipe amounts to, in numbers that two runs can be compared by."""
    recipe, trainer = job.recipe, job.recipe.trainer
    order = batch_order(job.train, recipe, 0)
    hours = float(job.train.durations_s.sum()) / 3600
    drawn = float(job.train.durations_s[[i for batch in order for i in batch]].sum())
    step_s = drawn / len(order) * trainer.accumulate
    if trainer.max_steps is not None:
        steps, epochs = trainer.max_steps, trainer.max_steps * trainer.accumulate / len(order)
    else:
        steps, epochs = trainer.epochs * len(order) // trainer.accumulate, float(trainer.epochs)
    moving = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in job.model.parameters())
    later = f", more at steps {sorted(recipe.freeze.until.values())}" if recipe.freeze.until else ""
    lr = recipe.optim.lr
    relative = lr_beside_scratch(job.model, recipe)
    return {
        "heads trained": "+".join(job.objective.heads),
        "parameters that move": f"{moving / 1e6:.2f} M of {total / 1e6:.2f} M{later}",
        "training audio": f"{hours:.2f} h in {len(job.train.utterances)} clips",
        "audio in a step": f"{step_s:.0f} s",
        "steps": f"{steps}",
        "epochs": f"{epochs:.1f}",
        "audio heard": f"{steps * step_s / 3600:.1f} h",
        "highest lr": f"{lr:g}" + (f", {relative:.3g} x from scratch" if relative else ""),
        "SpecAugment": _spec_augment(job),
        "other augmentation": _augmentation(recipe),
    }


def lr_beside_scratch(model: ASRModel, recipe: Recipe) -> float | None:
    """The recipe's highest rate over that of the checkpoint's own training; None if unknown."""
    own = model.config.nemo.get("optim") or {}
    peak = peak_lr(own, model.config.encoder.d_model)
    mine = recipe.optim.lr
    if recipe.schedule.name == "noam":
        warm_up = recipe.schedule.warmup_steps or 1
        mine *= (recipe.schedule.d_model or model.config.encoder.d_model) ** -0.5 * warm_up**-0.5
    return mine / peak if peak else None


def peak_lr(optim: dict, d_model: int) -> float | None:
    """Highest rate of a NeMo `optim` section; Noam's factor is not a rate."""
    lr, sched = optim.get("lr"), optim.get("sched") or {}
    if lr is None or not isinstance(lr, int | float):
        return None
    if sched.get("name") != "NoamAnnealing":
        return float(lr)
    warm_up, width = sched.get("warmup_steps") or 0, sched.get("d_model")
    width = width if isinstance(width, int) else d_model
    return float(lr) * width**-0.5 * warm_up**-0.5 if warm_up else None


def _spec_augment(job: Prepared) -> str:
    section = job.model.config.nemo.get("spec_augment") or {}
    given = dataclasses.asdict(job.recipe.spec_augment)
    options = {k: v if v is not None else section.get(k) for k, v in given.items()}
    if job.objective.augment is None:
        return "none"
    return ", ".join(f"{k} {v}" for k, v in options.items() if v)


def _augmentation(recipe: Recipe) -> str:
    augment, parts = recipe.augment, []
    if augment.speeds:
        parts.append(f"speeds {list(augment.speeds)}")
    if augment.gain_db:
        parts.append("gain")
    if augment.shift_s:
        parts.append("shift")
    for name in ("white_noise", "noise", "rir", "babble", "hum", "telephone"):
        if probability := getattr(augment, name).probability:
            parts.append(f"{name} on {probability:.0%} of clips")
    return ", ".join(parts) or "none"


def meaning(key: str) -> str:
    """What a difference of this recipe key means, in words."""
    known = [prefix for prefix in MEANINGS if key.startswith(prefix)]
    return MEANINGS[max(known, key=len)] if known else ""


def beside_checkpoint(job: Prepared, config: dict) -> list[tuple[str, str, str, str]]:
    """(what, theirs, ours, meaning) where a recipe departs from the training that a checkpoint's
    own config tells of."""
    ours, rows = job.model.config.nemo, []
    theirs_optim, sched = config.get("optim") or {}, (config.get("optim") or {}).get("sched") or {}
    width = job.model.config.encoder.d_model
    peak = peak_lr(theirs_optim, width)
    recipe = job.recipe
    data = config.get("train_ds") or {}
    encoder, own = config.get("encoder") or {}, ours.get("encoder") or {}
    pairs = [
        ("optimizer", theirs_optim.get("name"), recipe.optim.name, "optim.name"),
        ("highest lr", peak and f"{peak:.3g}", f"{recipe.optim.lr:g}", "optim.lr"),
        ("schedule", sched.get("name"), recipe.schedule.name, "schedule"),
        ("weight decay", theirs_optim.get("weight_decay"), recipe.optim.weight_decay, "optim"),
        ("longest clip, s", data.get("max_duration"), recipe.data.max_duration_s, "data.max"),
        ("dropout", encoder.get("dropout"), own.get("dropout"), "model.dropout"),
        ("attention", encoder.get("self_attention_model"), own["self_attention_model"], "encoder"),
        ("pieces", _vocabulary(config), job.model.config.vocab_size, "model.tokenizer"),
        ("sample rate", _rate(config), job.model.sample_rate, "model.sample_rate"),
        ("SpecAugment", _masks(config), _spec_augment(job), "spec_augment"),
        ("loss", _loss(config), _loss(ours), "loss"),
    ]
    for what, theirs, mine, key in pairs:
        if theirs is not None and str(theirs) != str(mine):
            rows.append((what, str(theirs), str(mine), meaning(key)))
    return rows


def _vocabulary(config: dict) -> int | None:
    labels = (config.get("joint") or config.get("decoder") or {}).get("vocabulary")
    return len(labels) if labels else None


def _rate(config: dict):
    return (config.get("preprocessor") or {}).get("sample_rate") or config.get("sample_rate")


def _masks(config: dict) -> str:
    section = config.get("spec_augment") or {}
    keys = ("freq_masks", "time_masks", "freq_width", "time_width", "rect_masks")
    return ", ".join(f"{k} {section[k]}" for k in keys if section.get(k)) or "none"


def _loss(config: dict) -> str | None:
    section = config.get("loss") or {}
    kwargs = section.get(f"{section.get('loss_name')}_kwargs") or {}
    options = [f"{k} {kwargs[k]}" for k in ("sigma", "omega") if k in kwargs]
    return " ".join(part for part in (section.get("loss_name"), *options) if part) or None


# --- preflight -----------------------------------------------------------------------------------


def preflight(job: Prepared) -> list[tuple[bool, str]]:
    """(passed, what was found) of each check, cheap ones first."""
    recipe = job.recipe
    checks = [(True, f"weights: {sum(p.numel() for p in job.model.parameters()) / 1e6:.2f} M load")]
    lines = [
        line for entry in recipe.data.train for line in read_source(entry, recipe.data.lang)[0]
    ]
    checks += [tokenizer_covers(job, lines), lengths_fit(job, lines), clips_can_be_read(job)]
    checks += [disk_suffices(job), batch_goes_through(job)]
    if recipe.guard.set is not None and recipe.guard.set not in recipe.data.validation:
        checks.append((False, f"guard.set {recipe.guard.set} is not in data.validation"))
    return checks


def tokenizer_covers(job: Prepared, lines: list[Utterance]) -> tuple[bool, str]:
    """Whether at most one character in a hundred of the training text is unknown; a line with one
    is left out."""
    tokenizer = job.model.tokenizer
    by_lang = isinstance(tokenizer, AggregateTokenizer)
    characters = Counter((line.lang if by_lang else None, c) for line in lines for c in line.text)
    unknown = {key: n for key, n in characters.items() if _is_unknown(tokenizer, *key)}
    share = sum(unknown.values()) / max(1, sum(characters.values()))
    listed = " ".join(c for _, c in sorted(unknown, key=lambda key: -unknown[key])[:20])
    text = f"tokenizer: {tokenizer.vocab_size} pieces, {share:.3%} of characters unknown"
    return share <= UNKNOWN_SHARE, text + (f": {listed}" if unknown else "")


def _is_unknown(tokenizer, lang: str | None, character: str) -> bool:
    if character.isspace():
        return False
    try:
        tokenizer = tokenizer.of_language(lang)
        tokens = tokenizer.encode(character)
    except ValueError:
        return True
    return not tokens or tokenizer.unk_id in tokens


def lengths_fit(job: Prepared, lines: list[Utterance]) -> tuple[bool, str]:
    """Whether the recipe's limits leave out at most a tenth of the lines."""
    seconds, kept = job.train.durations_s, len(job.train.utterances)
    text = f"lengths: {seconds.min():.1f} to {seconds.max():.1f} s"
    entries = [e for e in job.recipe.data.train if isinstance(e, SourceRecipe)]
    if any(e.max_hours or e.max_clips for e in entries):
        return True, f"{text}; {kept} clips after the caps"
    share = 1 - kept / max(1, len(lines))
    text += f"; {share:.1%} of {len(lines)} lines left out"
    return share <= LEFT_OUT_SHARE, text + (", see dropped.jsonl of a run" if share else "")


def clips_can_be_read(job: Prepared, count: int = 8) -> tuple[bool, str]:
    """Whether clips spread over the data open, and what their rates are."""
    wanted, rates, trouble = job.model.sample_rate, set(), []
    in_files = [u for u in job.train.utterances if u.tar_member is None]
    for utterance in in_files[:: max(1, len(in_files) // count)]:
        try:
            load_audio(utterance.audio_path, wanted, utterance.offset_s or 0.0, 0.1)
            rates.add(soundfile.info(utterance.audio_path).samplerate)
        except (OSError, ValueError) as error:
            trouble.append(str(error))
    if trouble:
        return False, f"audio: {trouble[0]}"
    text = f"audio: model at {wanted} Hz, clips at {', '.join(f'{r} Hz' for r in sorted(rates))}"
    if min(rates, default=wanted) < wanted:
        text += "; slower ones are resampled up and hold nothing above half their rate"
    return True, text


def disk_suffices(job: Prepared) -> tuple[bool, str]:
    """Whether checkpoints (weights and two moments each) and models have room."""
    recipe = job.recipe
    parameters = sum(p.numel() for p in job.model.parameters())
    state = 2 if recipe.optim.name == "adamw8bit" else 8
    copies = 4 * (3 + max(0, recipe.keep.top_k - 1)) + (4 if recipe.trainer.ema_decay else 0)
    needed = parameters * ((recipe.trainer.keep_last + 1) * (4 + state) + copies)
    folder = Path(recipe.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return free > needed, f"disk: {needed / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free"


def batch_goes_through(job: Prepared) -> tuple[bool, str]:
    """One training step on the batch of the longest clips: its loss, and the memory it took."""
    recipe = job.recipe
    order = batch_order(job.train, recipe, 0)
    seconds = job.train.durations_s
    worst = max(order, key=lambda batch: (seconds[batch].max() * len(batch), len(batch)))
    batch = job.train.store.batch(worst)
    if batch is None:
        return False, "batch: no clip of the largest batch can be read"
    device = choose_device(recipe.trainer.device)
    model = job.model.to(device)
    batch = batch.to(device)
    clips = f"batch: {len(worst)} clips of up to {seconds[worst].max():.1f} s"
    with torch.no_grad():
        loss = float(batch_loss(model.eval(), batch, job.objective)[0])
    step = training_step(model, job.objective, job.freezing, recipe)
    with device_memory(device, None) as memory:
        peak_gb = memory.peak_gb(lambda: step(batch))
    if peak_gb is None:
        return False, (
            f"{clips} need more than the {memory.limit_gb:.1f} GB that are free; lower "
            "data.batch_duration_s, or let training.find_batch find it"
        )
    text = f"{clips}, loss {loss:.3f}, {peak_gb:.2f} GB in use at most"
    return math.isfinite(loss), text


# --- the command ---------------------------------------------------------------------------------


def table(rows: list[tuple], header: tuple) -> str:
    rows = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [min(44, max(len(row[i]) for row in rows)) for i in range(len(header))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def short(value) -> str:
    text = str(value)
    return text if len(text) <= 44 else text[:41] + "..."


def compare(recipe: Recipe, other: Recipe | None, checkpoint: Path | None) -> bool:
    """Prints what differs and the preflight; whether all checks passed."""
    job = prepared(recipe)
    mine = facts(job)
    if other is not None:
        theirs = facts(prepared(other))
        rows = [(k, theirs[k], v) for k, v in mine.items()]
        print(table(rows, ("what it amounts to", "other", "this recipe")))
        differences = recipe_differences(other, recipe).items()
        rows = [(key, short(a), short(b), meaning(key)) for key, (a, b) in differences]
        header = ("key", "other", "this recipe", "which means")
        print("\n" + (table(rows, header) if rows else "the recipes are the same"))
    else:
        print(table(list(mine.items()), ("what it amounts to", "this recipe")))
        if checkpoint is not None:
            rows = beside_checkpoint(job, read_checkpoint(checkpoint).config)
            header = ("what", "the checkpoint's", "this recipe", "which means")
            same = "nothing differs from what the checkpoint's config says of its training"
            print(f"\nbeside {checkpoint}:\n" + (table(rows, header) if rows else same))
    print("\npreflight:")
    passed = True
    for ok, text in preflight(job):
        passed &= ok
        print(f"  {'ok  ' if ok else 'FAIL'}  {text}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.compare",
        "What a recipe changes, against its pretrained model or another recipe, what each change "
        "means, and whether the run can start.",
        "recipes/finetune.yaml other.yaml",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "other",
        nargs="*",
        metavar="OTHER | key=value",
        help="another recipe, folder or .nemo, and overrides of the first recipe",
    )
    return cli.run("error", lambda: run(parser.parse_args(arguments)))


def run(options) -> int:
    overrides = [item for item in options.other if "=" in item and not os.path.exists(item)]
    others = [item for item in options.other if item not in overrides]
    try:
        if len(others) > 1:
            raise ValueError(f"compares two things, got {', '.join(others)} beside the recipe")
        recipe = load_recipe(options.recipe, overrides)
        is_recipe = others and Path(others[0]).suffix in (".yaml", ".yml")
        other = load_recipe(others[0]) if is_recipe else None
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from None
    start = recipe.model.init_from
    checkpoint = Path(others[0]) if others and not is_recipe else start and Path(start)
    return cli.run("preflight failed", lambda: int(not compare(recipe, other, checkpoint or None)))


if __name__ == "__main__":
    sys.exit(main())
