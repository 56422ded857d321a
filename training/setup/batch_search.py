"""The largest `data.batch_duration_s` that the device takes, found by trying.

Whole optimizer steps are run on batches of noise in the worst shapes that the data can make: for
each limit, the longest clips, the most tokens, and the most of both. What is tried doubles until a
step does not fit, then the gap is halved. Weights, BatchNorm's statistics and random numbers are
afterwards as they were.

Source of the idea: NeMo's OOMptimizer, which does so bucket by bucket.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastconformer.checkpoint.files import atomic_file
from training.data.batching import BatchRules, effective_s
from training.data.json_lines import json_line
from training.data.sources import TrainingSet
from training.data.store import Batch
from training.data.utterances import Utterance
from training.loop.ranks import ONE, Ranks
from training.objective.objective import batch_loss
from training.optim.ema import EMA
from training.optim.optim import build_optimizer
from training.recipe.recipe import recipe_to_yaml
from training.setup.device import as_it_was, device_memory
from training.setup.freeze import train_mode
from training.setup.prepare import Prepared

log = logging.getLogger("finetune")

DURATIONS_TRIED = 64  # lengths at which the shapes of a limit are compared
TOLERANCE = 0.03  # the search ends when the gap is this small


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch in which every clip is as long as the longest, and has as many tokens as any."""

    clips: int
    seconds: float
    tokens: int


def worst_shapes(
    durations_s: np.ndarray,
    n_tokens: np.ndarray,
    batch_duration_s: float,
    batch_size: int | None = None,
    quadratic_duration_s: float | None = None,
) -> list[Shape]:
    """Shapes that no batch under a limit exceeds, and that cost the most: of sound, of attention
    (seconds squared), of the transducer's loss (seconds times tokens); the costliest first.

    Args:
        durations_s, n_tokens: of every clip, padding included.
    """
    order = np.argsort(durations_s, kind="stable")
    longest = np.asarray(durations_s, dtype=np.float64)[order]
    # A batch holds clips of similar length: the most tokens of any that is not longer.
    most_tokens = np.maximum.accumulate(np.asarray(n_tokens)[order])
    at = np.unique(np.linspace(0, len(order) - 1, DURATIONS_TRIED).astype(int))
    # For each number of tokens, the shortest clips that have it are in the largest batches.
    at = np.union1d(at, np.flatnonzero(np.diff(most_tokens, prepend=-1)))
    clips = np.maximum(1, batch_duration_s // effective_s(longest[at], quadratic_duration_s))
    if batch_size is not None:
        clips = np.minimum(clips, batch_size)
    sound = clips * longest[at]
    costs = (sound, sound * longest[at], sound * most_tokens[at], clips * most_tokens[at])
    picked = dict.fromkeys(int(np.argmax(cost)) for cost in costs)
    shapes = [Shape(int(clips[i]), float(longest[at[i]]), int(most_tokens[at[i]])) for i in picked]
    return sorted(set(shapes), key=lambda s: (-s.clips * s.seconds * (1 + s.tokens), s.seconds))


def synthetic_batch(
    shape: Shape, sample_rate_hz: int, vocab_size: int, lang: str | None = None
) -> Batch:
    """Noise and random tokens in a shape, all said to be of one language."""
    generator = torch.Generator().manual_seed(0)
    samples = round(shape.seconds * sample_rate_hz)
    audio = 0.1 * torch.randn(shape.clips, samples, generator=generator)
    size = (shape.clips, shape.tokens)
    targets = torch.randint(vocab_size, size, generator=generator)
    lengths = [torch.full((shape.clips,), count) for count in (samples, shape.tokens)]
    noise = Utterance("noise", "", shape.seconds, None, "", 0, lang=lang)
    return Batch((noise,) * shape.clips, audio, lengths[0], targets, lengths[1])


def largest_limit(
    fits: Callable[[float], bool], smallest: float, largest: float, tolerance: float = TOLERANCE
) -> float | None:
    """The largest limit in [smallest, largest] that fits, within the tolerance; None: not even the
    smallest does. `fits` must be true below a point and false above it."""
    if not fits(smallest):
        return None
    low, high = smallest, None
    while high is None:
        if low >= largest:
            return largest
        trial = min(2 * low, largest)
        if fits(trial):
            low = trial
        else:
            high = trial
    while high > (1 + tolerance) * low:
        middle = (low * high) ** 0.5
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def find_batch_duration(
    train: TrainingSet,
    model: torch.nn.Module,
    step: Callable[[Batch], None],
    rules: BatchRules,
    memory_gb: float | None = None,
    lang: str | None = None,
) -> float:
    """The largest `data.batch_duration_s`, in seconds, rounded down to whole ones.

    Args:
        step: one whole training step on a batch, the optimizer's included; may raise torch's
            out-of-memory errors. The model is on the device where it is run.
        memory_gb: the most memory, in 10^9 bytes: of torch's on CUDA, of the process on a CPU.
            None: nearly all that is free on CUDA, half of it on a CPU.
        lang: what language the noise is said to be of.
    Raises:
        ValueError: a single one of the longest clips does not fit.
    """
    slowest = min(rules.speeds, default=1.0)
    durations_s = np.maximum(train.durations_s / min(slowest, 1.0), rules.pad_to_s)
    n_tokens = np.array([len(utterance.tokens) for utterance in train.utterances])
    costs = effective_s(durations_s, rules.quadratic_duration_s)
    smallest = float(costs.max())
    # Above this, nothing changes: all clips are in one batch, or batch_size is what limits it.
    largest = float(costs.sum())
    if rules.batch_size is not None:
        largest = min(largest, smallest * rules.batch_size)
    device = next(model.parameters()).device
    known: set[Shape] = set()  # that fit; limits that differ little often make the same

    def fits(limit: float) -> bool:
        shapes = worst_shapes(
            durations_s, n_tokens, limit, rules.batch_size, rules.quadratic_duration_s
        )
        for shape in shapes:
            if shape in known:
                continue
            batch = synthetic_batch(shape, model.sample_rate, model.config.vocab_size, lang)
            used_gb = memory.peak_gb(lambda batch=batch: step(batch.to(device)))
            log.info(
                "  %6.0f s: %4d clips of %5.1f s with %3d tokens: %s",
                *(limit, shape.clips, shape.seconds, shape.tokens),
                "does not fit" if used_gb is None else f"{used_gb:.2f} GB",
            )
            if used_gb is None:
                return False
            known.add(shape)
        return True

    with as_it_was(model), device_memory(device, memory_gb) as memory:
        log.info("searching data.batch_duration_s: %.2f GB may be used", memory.limit_gb)
        found = largest_limit(fits, smallest, largest)
    if found is None:
        raise ValueError(
            f"a single clip of {durations_s.max():.1f} s does not fit into "
            f"{memory.limit_gb:.2f} GB; lower data.max_duration_s"
        )
    if found == largest:
        log.info("memory is not what limits a batch, but data.batch_size or the amount of data")
    return float(int(found)) if found >= max(10, smallest + 1) else round(found + 5e-4, 3)


def training_step(prepared: Prepared) -> Callable[[Batch], None]:
    """A step with all that a run keeps in memory: gradients of the batch before it, the
    optimizer's state, EMA's weights."""
    model, trainer = prepared.model, prepared.recipe.trainer
    optimizer = build_optimizer(model, prepared.recipe.optim, trainer.seed)
    ema = None if trainer.ema_decay is None else EMA(model, trainer.ema_decay)

    def step(batch: Batch) -> None:
        train_mode(model, prepared.freezing, 0)
        optimizer.zero_grad(set_to_none=False)
        total, _ = batch_loss(model, batch, prepared.objective)
        total.backward()
        # What is learnt from noise is of no use, and a loss that is not finite would stop it.
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        if ema is not None:
            ema.update(model)

    return step


def find_for(prepared: Prepared, memory_gb: float | None = None) -> float:
    """`find_batch_duration` of a run, within `data.batch_memory_gb` unless another is given."""
    recipe = prepared.recipe
    return find_batch_duration(
        prepared.train,
        prepared.model,
        training_step(prepared),
        prepared.rules,
        memory_gb or recipe.data.batch_memory_gb,
        recipe.retain.lang,
    )


def settled(prepared: Prepared, ranks: Ranks = ONE, out: Path | None = None) -> Prepared:
    """With a number in place of `data.batch_duration_s: auto`: that of the run folder, where a run
    was there before, else the largest that all processes' devices take; noted in the folder.

    Raises:
        ValueError: as find_batch_duration, on every process.
    """
    recipe = prepared.recipe
    if recipe.data.batch_duration_s != "auto":
        return prepared
    noted = None if out is None else out / "batch_duration.json"
    found, error = None, None
    if noted is not None and noted.exists():
        found = json.loads(noted.read_text(encoding="utf-8"))["batch_duration_s"]
    else:
        try:
            found = find_for(prepared)
        except ValueError as caught:
            error = caught
    everywhere = ranks.gather(found)
    if error is not None or None in everywhere:
        raise error or ValueError("data.batch_duration_s: auto found nothing on another process")
    found = min(everywhere)
    log.info("data.batch_duration_s: auto is %g s", found)
    data = dataclasses.replace(recipe.data, batch_duration_s=found, batch_memory_gb=None)
    recipe = dataclasses.replace(recipe, data=data)
    if noted is not None and ranks.is_main:
        with atomic_file(noted) as temporary:
            temporary.write_text(json_line({"batch_duration_s": found}), encoding="utf-8")
        with atomic_file(noted.with_name("recipe.yaml")) as temporary:
            temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    ranks.barrier()
    return dataclasses.replace(prepared, recipe=recipe)
