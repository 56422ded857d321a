"""LoRA: low-rank updates beside frozen matrices (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + (alpha / rank) * B A dropout(x)        A (rank, D_in), B (D_out, rank)

A is random and B zero, so that the model starts as it was. The adapters live in the model as
`<layer>.lora_a` and `<layer>.lora_b` while it trains; what is saved and measured has them merged
into W, and is a plain checkpoint (`training.optim.ema`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconformer import ASRModel
from fastconformer.networks.linear import AFTER, Linear
from training.recipe.sections import LoraRecipe

# What a target means beside the name of a linear layer or the path of a part: (pieces of a path).
TARGETS = {
    "attention": (".self_attn.", "_net.", ".out_projection."),
    "feed_forward": (".feed_forward1.", ".feed_forward2.", ".mlp.", ".dense_in.", ".dense_out."),
}


class LoRALinear(Linear):
    """A Linear that keeps its weight and bias, with an adapter beside it."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = scale
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.lora_dropout = nn.Dropout(dropout)
        self.merged = False  # True while W holds the product (training.optim.ema.plain_weights)
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor, after: str = "none") -> Tensor:
        """(..., D_in) -> (..., D_out), then what `networks.linear.linear` names `after`."""
        if self.merged:
            return super().forward(x, after)
        low = F.linear(self.lora_dropout(x), self.lora_a)
        y = super().forward(x) + self.scale * F.linear(low, self.lora_b)
        return AFTER[after](y)


def add_lora(model: ASRModel, recipe: LoraRecipe, seed: int) -> list[str]:
    """Puts adapters beside the matrices that a LoraRecipe names; gives their paths.

    Raises:
        ValueError: a target that is none of TARGETS, no linear layer's name and no part's path.
    """
    chosen = []
    for target in recipe.targets:
        paths = [path for path in linear_layers(model) if is_target(path, target)]
        if not paths:
            known = sorted({path.rpartition(".")[2] for path in linear_layers(model)})
            raise ValueError(
                f"lora.targets: {target!r} is no linear layer of {' or '.join(model.adaptable)}; "
                f"expected one of {', '.join((*TARGETS, *known))}, or a part's path"
            )
        chosen += [path for path in paths if path not in chosen]
    torch.manual_seed(seed)
    scale = lora_scale(recipe.rank, recipe.alpha)
    for path in chosen:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, LoRALinear(getattr(owner, name), recipe.rank, scale, recipe.dropout))
    return chosen


def linear_layers(model: ASRModel) -> list[str]:
    """Paths of the linear layers inside the layers that may be adapted."""
    lists = tuple(f"{path}." for path in model.adaptable)
    return [p for p, m in model.named_modules() if p.startswith(lists) and isinstance(m, nn.Linear)]


def is_target(path: str, target: str) -> bool:
    if target in TARGETS:
        return any(part in f"{path}." for part in TARGETS[target])
    return f"{path}.".endswith(f".{target}.") or path.startswith(f"{target}.")


def lora_paths(model: nn.Module) -> list[str]:
    """Paths of what LoRA added: adapters' matrices, and the modules of their dropout."""
    paths = [path for path, _ in (*model.named_parameters(), *model.named_modules())]
    return [path for path in paths if path.rpartition(".")[2].startswith("lora_")]


def merge_lora(state_dict: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same tensors without adapters: `W + scale * B A`, computed in float32 and of W's type, in
    place of each W; everything else is passed on as it is. `scale` is `lora_scale` of the recipe.
    """
    merged = {k: v for k, v in state_dict.items() if not k.rpartition(".")[2].startswith("lora_")}
    for name, a in state_dict.items():
        path, _, last = name.rpartition(".")
        if last == "lora_a":
            weight, b = state_dict[f"{path}.weight"], state_dict[f"{path}.lora_b"]
            product = b.float() @ a.float()
            merged[f"{path}.weight"] = (weight.float() + scale * product).to(weight.dtype)
    return merged


def lora_scale(rank: int, alpha: float | None) -> float:
    """What the product of the two matrices is multiplied by."""
    return 1.0 if alpha is None or not rank else alpha / rank
