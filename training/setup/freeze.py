"""Which parameters of a model move, and from which step on.

`freeze` reads it from the recipe, `train_mode` puts it into the model before each step.
"""

import dataclasses
import difflib
import re
from fnmatch import fnmatchcase

from torch import nn

from fastconformer import ASRModel
from training.objective.objective import Objective
from training.recipe.sections import FreezeRecipe, LoraRecipe
from training.setup.lora import lora_paths

# --- names of parts -----------------------------------------------------------------------------


def friendly_names(model: ASRModel) -> dict[str, str]:
    """Names for parts that a recipe may use beside module paths -> paths."""
    names = {}
    for head in map(model.head, model.heads):
        names |= head.modules
    return names | model.parts


def matching(model: ASRModel, name: str, key: str) -> list[str]:
    """Paths of the modules or parameters that a recipe's name means.

    A name is a module path (`encoder.layers.3.conv`), one of `friendly_names`, a range of layers
    (`encoder.layers.0-7` or `layers.0-7`, both ends included), or a pattern with `*`. `key` is the
    recipe's key, for errors.

    Raises:
        ValueError: the model has nothing of that name; the nearest name is given.
    """
    friendly = friendly_names(model)
    first, _, rest = name.partition(".")
    path = ".".join(filter(None, (friendly.get(first, first), rest)))
    paths = [path for path, _ in (*model.named_modules(), *model.named_parameters()) if path]
    span = re.search(r"\.(\d+)-(\d+)(?=\.|$)", path)
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    patterns = [f"{path[: span.start()]}.{i}{path[span.end() :]}" for i in numbers] or [path]
    for pattern in patterns:
        if not any(fnmatchcase(candidate, pattern) for candidate in paths):
            close = difflib.get_close_matches(pattern, [*friendly, *paths], n=1)
            hint = f"did you mean {close[0]}?" if close else "use e.g. encoder, prediction or joint"
            raise ValueError(f"{key}: the model has no {pattern!r}; {hint}")
    return [p for p in paths if any(fnmatchcase(p, pattern) for pattern in patterns)]


def depth_of(model: ASRModel, name: str) -> int:
    """Layers above a parameter: 0 for the heads, 1 for the last encoder layer, up to the number of
    layers + 1 for the subsampling."""
    blocks = model.encoder_blocks
    below = (i for i, path in enumerate(blocks) if name.startswith(f"{path}."))
    return len(blocks) - next(below, len(blocks))


# --- what moves ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Freezing:
    """What of a model moves, and from which optimizer step on (None: never).

    parameters: {name: first step}, in the model's order.
    modules: {path: first step}, for what a module does in training, such as dropout.
    batch_norm: of BatchNorm that is frozen: "fixed", "adapt" or "affine".
    unused: paths of the parts that the loss cannot reach; they never move.
    dropout: whether what is frozen drops as if it moved.
    """

    parameters: dict[str, int | None]
    modules: dict[str, int | None]
    batch_norm: str = "fixed"
    unused: tuple[str, ...] = ()
    dropout: bool = False

    def changes(self) -> list[int]:
        """Steps after 0 at which something begins to move."""
        return sorted({step for step in self.parameters.values() if step})


def ancestors(path: str) -> list[str]:
    """ "a.b.c" -> "a.b.c", "a.b", "a", ""."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)  # the synchronised one too


def unreached(model: ASRModel, objective: Objective) -> tuple[str, ...]:
    """Paths of the parts that the losses, with their weights, cannot reach: heads that are not
    trained, and where InterCTC is all there is, the layers above it."""
    used = set(objective.heads)
    if len(used) > 1:
        used = {head for head in used if model.head(head).share > 0}
    inner = [layer for layer, weight in objective.interctc.items() if weight > 0]
    unused = ()
    if sum(objective.interctc.values()) >= 1:
        used = set()
        above = range(max(inner) + 1, len(model.encoder.layers))
        unused = tuple(f"encoder.layers.{i}" for i in above)
    if inner:
        used.add(model.frame_head.name)
    paths = {head: set(model.head(head).modules.values()) for head in model.heads}
    needed = set().union(*(paths[head] for head in used))
    return unused + tuple(sorted(set().union(*paths.values()) - needed))


def freeze(
    model: ASRModel,
    recipe: FreezeRecipe,
    lora: LoraRecipe | None = None,
    unused: tuple[str, ...] = (),
) -> Freezing:
    """What moves when, as the recipe says; `requires_grad` is left True on all that ever moves, as
    `build_optimizer` wants it, until `train_mode` sets it for a step.

    With LoRA nothing moves but its matrices and `lora.also`; call it after `add_lora`. `unused` are
    the parts that `unreached` gives.

    Raises:
        ValueError: more layers than there are, or a module that does not exist (the nearest is
            named).
    """
    n_layers = len(model.encoder.layers)
    count = n_layers // 2 if recipe.encoder_layers == "half" else recipe.encoder_layers
    if count > n_layers:
        raise ValueError(f"freeze.encoder_layers is {count}, the encoder has {n_layers} layers")
    blocks = model.encoder_blocks
    bottom = blocks[: count + len(blocks) - n_layers] if count else []
    # The most specific path that covers a part decides; what none covers moves from step 0.
    since = dict.fromkeys(bottom)
    for name in recipe.modules:
        since |= dict.fromkeys(matching(model, name, "freeze.modules"))
    if lora is not None and lora.rank:
        since[""] = None
        since |= dict.fromkeys(lora_paths(model), 0)
        for name in lora.also:
            since |= dict.fromkeys(matching(model, name, "lora.also"), 0)
    for name, step in recipe.until.items():
        if name == "encoder_layers" and not bottom:
            raise ValueError("freeze.until.encoder_layers: freeze.encoder_layers is 0")
        paths = bottom if name == "encoder_layers" else matching(model, name, "freeze.until")
        since |= dict.fromkeys(paths, step)
    since |= dict.fromkeys(unused)

    def first_step(path: str) -> int | None:
        return next((since[p] for p in ancestors(path) if p in since), 0)

    modules = {path: first_step(path) for path, _ in model.named_modules()}
    parameters = {name: first_step(name) for name, _ in model.named_parameters()}
    if recipe.batch_norm == "affine":
        for path, module in model.named_modules():
            if is_batch_norm(module):
                parameters |= {f"{path}.{name}": 0 for name, _ in module.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters[name] is not None)
    return Freezing(parameters, modules, recipe.batch_norm, unused, recipe.dropout)


def new_rows_first(freezing: Freezing, rows: list[str], n_steps: int) -> Freezing:
    """The freezing, but that nothing except these parameters moves before step `n_steps`."""

    def later(first: int | None) -> int | None:
        return None if first is None else max(first, n_steps)

    parameters = {
        name: first if name in rows else later(first) for name, first in freezing.parameters.items()
    }
    modules = {path: later(first) for path, first in freezing.modules.items()}
    return dataclasses.replace(freezing, parameters=parameters, modules=modules)


def train_mode(model: ASRModel, freezing: Freezing | None = None, step: int = 0) -> None:
    """Training mode as optimizer step `step` (from 0) needs it.

    What is frozen takes no gradient and stays as in evaluation: no dropout, and BatchNorm keeps its
    statistics. With `batch_norm` "adapt" frozen BatchNorm normalises by the batch and its
    statistics follow; with "affine" its scale and shift move too, as the `enable_bn_se` of many
    NeMo scripts makes them (that also frees squeeze-and-excite blocks, which a FastConformer does
    not have).
    """
    model.train()
    if freezing is None:
        return

    def moves(first: int | None) -> bool:
        return first is not None and first <= step

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(moves(freezing.parameters[name]))
    for path, module in model.named_modules():
        adapts = freezing.batch_norm != "fixed" and is_batch_norm(module)
        drops = freezing.dropout and not is_batch_norm(module)
        module.training = adapts or drops or moves(freezing.modules[path])
    # These two draw for a whole step: omega, and attention contexts and skipped layers.
    model.training = True
    encoder = f"{model.encoder_blocks[0].partition('.')[0]}."
    model.encoder.training = any(
        moves(first) for path, first in freezing.modules.items() if path.startswith(encoder)
    )
