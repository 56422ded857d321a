"""The largest `data.batch_duration_s` that the device takes, found by trying.

    python -m training.find_batch recipes/finetune.yaml --write
    python -m training.find_batch recipes/finetune.yaml --memory-gb 24

`data.batch_duration_s: auto` does the same when a run starts. Whole optimizer steps are run on
batches of noise in the worst shapes that the data can make: for each limit, the longest clips, the
most tokens, and the most of both. What is tried doubles until a step does not fit, then the gap is
halved. Weights, BatchNorm's statistics and random numbers are afterwards as they were.

Source of the idea: NeMo's OOMptimizer, which does so bucket by bucket.
"""

import contextlib
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fastconformer import cli, process_memory
from fastconformer.checkpoint.files import atomic_file
from training.data.batching import effective_s
from training.data.sources import TrainingSet, load_data
from training.data.store import Batch, Utterance
from training.loop.console import Lines
from training.loop.ranks import ONE, Ranks
from training.loop.run_folder import json_line
from training.loop.step import is_out_of_memory
from training.objective.objective import Objective, batch_loss, objective_of
from training.objective.retain import make_retain, read_original
from training.optim.ema import EMA
from training.optim.optim import build_optimizer
from training.recipe.recipe import Recipe, load_recipe, recipe_to_yaml
from training.setup.freeze import train_mode
from training.setup.start import build_model, prepare

log = logging.getLogger("finetune")

DURATIONS_TRIED = 64  # lengths at which the shapes of a limit are compared
TOLERANCE = 0.03  # the search ends when the gap is this small
CUDA_SHARE = 0.95  # of the free memory: the allocator needs room between blocks
CPU_SHARE = 0.5  # of the available memory: other programs live there too


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
    recipe: Recipe,
    train: TrainingSet,
    model: torch.nn.Module,
    step: Callable[[Batch], None],
    memory_gb: float | None = None,
) -> float:
    """The largest `data.batch_duration_s`, in seconds, rounded down to whole ones.

    Args:
        step: one whole training step on a batch, the optimizer's included; may raise torch's
            out-of-memory errors. The model is on the device where it is run.
        memory_gb: the most memory, in 10^9 bytes: of torch's on CUDA, of the process on a CPU.
            None: nearly all that is free on CUDA, half of it on a CPU.
    Raises:
        ValueError: a single one of the longest clips does not fit.
    """
    data = recipe.data
    slowest = min(recipe.augment.speeds, default=1.0)
    durations_s = np.maximum(train.durations_s / min(slowest, 1.0), data.pad_to_s)
    n_tokens = np.array([len(utterance.tokens) for utterance in train.utterances])
    costs = effective_s(durations_s, data.quadratic_duration_s)
    smallest = float(costs.max())
    # Above this, nothing changes: all clips are in one batch, or batch_size is what limits it.
    largest = float(costs.sum())
    if data.batch_size is not None:
        largest = min(largest, smallest * data.batch_size)
    device = next(model.parameters()).device
    known: set[Shape] = set()  # that fit; limits that differ little often make the same

    def fits(limit: float) -> bool:
        shapes = worst_shapes(
            durations_s, n_tokens, limit, data.batch_size, data.quadratic_duration_s
        )
        for shape in shapes:
            if shape in known:
                continue
            batch = synthetic_batch(
                shape, model.sample_rate, model.config.vocab_size, recipe.retain.lang
            )
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


@contextlib.contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Weights, statistics, gradients, modes and random numbers are afterwards what they are now."""
    kept = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    cuda = torch.cuda.is_available()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(kept[name])
            for name, module in model.named_modules():
                module.training = modes[name]
            for parameter in model.parameters():
                parameter.grad = None


class Memory:
    """How much a call takes at most, where there is a limit."""

    def __init__(self, device: torch.device, limit_gb: float):
        self.device, self.limit_gb = device, limit_gb

    def peak_gb(self, call: Callable[[], None]) -> float | None:
        """Memory in use at the call's peak, in 10^9 bytes, or None when it is above the limit."""
        process_memory.give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            process_memory.forget_peak()
        try:
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the step's tensors
            return None
        if self.device.type == "cuda":
            peak_gb = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            peak_gb = process_memory.peak_bytes() / 1e9
        return peak_gb if peak_gb <= self.limit_gb else None


@contextlib.contextmanager
def device_memory(device: torch.device, memory_gb: float | None) -> Iterator[Memory]:
    """Memory of a device under a limit; on CUDA torch keeps to the limit itself."""
    if device.type != "cuda":
        if not process_memory.forget_peak():
            raise ValueError("the search on a CPU needs Linux; give data.batch_duration_s")
        if memory_gb is None:
            free, held = process_memory.free_bytes(), process_memory.resident_bytes()
            memory_gb = (CPU_SHARE * free + held) / 1e9
        yield Memory(device, memory_gb)
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if memory_gb is None:
        memory_gb = CUDA_SHARE * (free + torch.cuda.memory_reserved(device)) / 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total), device)
    try:
        yield Memory(device, memory_gb)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def write_batch_duration(path: str | Path, seconds: float) -> None:
    """Set `data.batch_duration_s` in a recipe file; its comments and the rest stay.

    Raises:
        ValueError: the file is written in a way in which the place cannot be found.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    value = f"batch_duration_s: {seconds}"
    changed, count = re.subn(r"(?<![\w.])batch_duration_s:\s*[^\s,}#]+", value, text, count=1)
    if not count:  # at the head of the section, in either of YAML's two styles
        changed, count = re.subn(r"^data:\s*\{", f"data: {{{value}, ", text, count=1, flags=re.M)
    if not count:
        pattern = r"^(data:[ \t]*(?:#.*)?\n)((?:[ \t]*(?:#.*)?\n)*)([ \t]+)"
        changed, count = re.subn(pattern, rf"\1\2\3{value}\n\3", text, count=1, flags=re.M)
    before = load_recipe(path)
    expected = dataclasses.replace(
        before, data=dataclasses.replace(before.data, batch_duration_s=float(seconds))
    )
    with atomic_file(path) as temporary:
        temporary.write_text(changed, encoding="utf-8")
        if not count or load_recipe(temporary) != expected:
            raise ValueError(
                f"{path}: no place found to write data.batch_duration_s; add {value} to it by hand"
            )


def training_step(model, objective: Objective, freezing, recipe: Recipe) -> Callable[[Batch], None]:
    """A step with all that a run keeps in memory: gradients of the batch before it, the
    optimizer's state, EMA's weights."""
    optimizer = build_optimizer(model, recipe.optim, recipe.trainer.seed)
    ema = None if recipe.trainer.ema_decay is None else EMA(model, recipe.trainer.ema_decay)

    def step(batch: Batch) -> None:
        train_mode(model, freezing, 0)
        optimizer.zero_grad(set_to_none=False)
        total, _ = batch_loss(model, batch, objective)
        total.backward()
        # What is learnt from noise is of no use, and a loss that is not finite would stop it.
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        if ema is not None:
            ema.update(model)

    return step


def settled(
    recipe: Recipe, train: TrainingSet, model, objective: Objective, freezing, ranks: Ranks = ONE
) -> Recipe:
    """The recipe with a number in place of `data.batch_duration_s: auto`: that of the run folder,
    where a run was there before, else the largest that all processes' devices take.

    Raises:
        ValueError: as find_batch_duration, on every process.
    """
    if recipe.data.batch_duration_s != "auto":
        return recipe
    kept = Path(recipe.output) / "batch_duration.json"
    found, error = None, None
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))["batch_duration_s"]
    else:
        try:
            step = training_step(model, objective, freezing, recipe)
            found = find_batch_duration(recipe, train, model, step, recipe.data.batch_memory_gb)
        except ValueError as caught:
            error = caught
    everywhere = ranks.gather(found)
    if error is not None or None in everywhere:
        raise error or ValueError("data.batch_duration_s: auto found nothing on another process")
    found = min(everywhere)
    log.info("data.batch_duration_s: auto is %g s", found)
    data = dataclasses.replace(recipe.data, batch_duration_s=found, batch_memory_gb=None)
    recipe = dataclasses.replace(recipe, data=data)
    if ranks.is_main:
        with atomic_file(kept) as temporary:
            temporary.write_text(json_line({"batch_duration_s": found}), encoding="utf-8")
        with atomic_file(kept.with_name("recipe.yaml")) as temporary:
            temporary.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    ranks.barrier()
    return recipe


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.find_batch",
        "Find the largest data.batch_duration_s that the device takes, on noise in the worst "
        "shapes that the recipe's data can make.",
        "my.yaml --memory-gb 24 --write",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. optim.name=adamw8bit"
    )
    parser.add_argument(
        "--memory-gb", type=float, help="most memory, in 10^9 bytes; else: all free"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the number into the recipe file"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()], force=True)
    return cli.run("error", lambda: run(options))


def run(options) -> None:
    from training.setup.run import choose_device  # which imports this file, for `auto`

    try:
        # The value that is searched for need not be there; a search needs none.
        recipe = load_recipe(options.recipe, [*options.overrides, "data.batch_duration_s=auto"])
    except (ValueError, FileNotFoundError) as error:
        raise cli.UsageError(str(error)) from None
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    device = choose_device(recipe.trainer.device)
    model = build_model(recipe.model, recipe.loss, recipe.trainer.seed, recipe.encoder)
    objective = objective_of(recipe, model)
    train, validation = load_data(recipe, model, objective.heads, None)
    original, change = read_original(recipe, model, train, validation, False)
    freezing = prepare(model, recipe, objective)
    model.to(device)
    retain = make_retain(model, original, change, recipe)
    if retain:
        objective = retain.objective(objective)
    step = training_step(model, objective, freezing, recipe)
    memory_gb = options.memory_gb or recipe.data.batch_memory_gb
    found = find_batch_duration(recipe, train, model, step, memory_gb)
    print(f"data.batch_duration_s: {found:g}")
    if options.write:
        write_batch_duration(options.recipe, found)
        print(f"written into {options.recipe}")


if __name__ == "__main__":
    sys.exit(main())
