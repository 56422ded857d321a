"""BiRWKV7 in the place of attention: position encodings go, all else stays.

The new time mixing starts from the attention's projections and has to be trained:
`python -m training.distill`, or fine-tuning.
"""

import copy
import dataclasses
import math

import torch
from torch import Tensor

from ..checkpoint.contents import Checkpoint
from ..config import ModelConfig
from ..networks.birwkv7 import BiRWKV7

ATTENTION = "encoder.layers.{}.self_attn."
HEAD_WIDTHS = (32, 128)  # of the recurrence, what its kernels take
OWN_VALUE_SHARE = -4.0  # v0 of a warm start: sigmoid gives 2 % of the first layer's v


def to_birwkv7(
    checkpoint: Checkpoint, warm_start: bool = True, head_size: int | None = None, seed: int = 0
) -> Checkpoint:
    """The checkpoint with BiRWKV7 in the place of full or local attention.

    `n_heads` becomes d_model / head_size, so that the heads of the recurrence, of the norms and of
    the gate are the same. Scaling of the subsampled frames (`xscaling`, which BiRWKV7 encoders do
    not do) goes into the subsampling's last layer, which gives the same numbers.

    Args:
        warm_start: r, k, v and output from the attention's projections; see `warm_up`.
        head_size: None: 64 where it divides d_model, else the attention's if it has 32 to 128,
            else the smallest divisor of d_model among these.
        seed: of the random parts, which depend on nothing else.
    Raises:
        ValueError: the model has BiRWKV7 already, or head_size does not divide d_model.
    """
    before = ModelConfig.from_nemo(checkpoint.config).encoder
    if before.self_attention_model == "rwkv7_attn":
        raise ValueError("encoder.self_attention_model is rwkv7_attn: the model is BiRWKV7 already")
    default = default_head_size(before.d_model, before.n_heads)
    width = default if head_size is None else head_size
    if width < 1 or before.d_model % width:
        raise ValueError(
            f"the head size is {width}, expected a divisor of d_model, {before.d_model}"
        )
    n_heads = before.d_model // width
    config, state = copy.deepcopy(checkpoint.config), dict(checkpoint.state_dict)
    config["encoder"] |= {
        "self_attention_model": "rwkv7_attn",
        "n_heads": n_heads,
        "att_context_size": None,
        "att_context_style": "regular",
        "xscaling": False,
    }
    if width != 64 and before.d_model % 64 == 0:
        config["encoder"]["wkv_head_size"] = width  # the fork's rule would say 64
    if before.xscaling:
        for name in ("encoder.pre_encode.out.weight", "encoder.pre_encode.out.bias"):
            state[name] = state[name] * math.sqrt(before.d_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in range(before.n_layers):
            prefix = ATTENTION.format(index)
            old = {n[len(prefix) :]: state.pop(n) for n in list(state) if n.startswith(prefix)}
            block = BiRWKV7(before.d_model, n_heads, index, before.n_layers, width)
            if warm_start:
                warm_up(block, old, before.n_heads)
            state |= {prefix + name: tensor for name, tensor in block.state_dict().items()}
    return dataclasses.replace(checkpoint, config=config, state_dict=state)


def default_head_size(d_model: int, n_heads: int) -> int:
    """See `to_birwkv7`."""
    low, high = HEAD_WIDTHS
    if d_model % 64 == 0:
        return 64
    if low <= d_model // n_heads <= high:
        return d_model // n_heads
    fitting = [width for width in range(low, high + 1) if d_model % width == 0]
    return fitting[0] if fitting else d_model // n_heads


def warm_up(block: BiRWKV7, attention: dict[str, Tensor], n_heads: int) -> None:
    """Starts a block from the attention that it replaces.

    r, k, v and output are q, k, v and out: without a softmax, y = sum over the past of
    v (k . r) decayed, which is attention's own sum with other weights. So that they see what the
    attention saw, r, k and v look at no frame before; v takes next to nothing of the first layer's;
    the output gate is 1; both directions count the same; v's bias comes in after the norm.
    """
    with torch.no_grad():
        rows = attention["linear_q.weight"].shape[0]
        block.receptance.weight.copy_(attention["linear_q.weight"] * (n_heads / rows) ** 0.5)
        block.key.weight.copy_(attention["linear_k.weight"])
        block.value.weight.copy_(attention["linear_v.weight"])
        block.output.weight.copy_(attention["linear_out.weight"])
        if "linear_v.bias" in attention:
            block.ln_x.bias.copy_(attention["linear_v.bias"])
        for shift in (block.x_r, block.x_k, block.x_v, block.gate.weight):
            shift.zero_()
        block.v0.fill_(OWN_VALUE_SHARE)
        # g = sigmoid(0) times the sum of g2's rows: moved to 1 with the rows still different
        block.g2.add_((2.0 - block.g2.sum(0)) / block.g2.shape[0])
