"""The weights that are measured and saved: the moving average where there is one, LoRA merged.

Training goes on with the raw weights; `plain_weights` puts the others in place for an evaluation,
and `plain_checkpoint` gives them to be written, always as an ordinary model.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastconformer import ASRModel
from fastconformer.checkpoint.contents import Checkpoint
from training.loop.ranks import local
from training.setup.lora import LoRALinear, merge_lora


class EMA:
    """Exponential moving average: `average = decay * average + (1 - decay) * weight` after every
    step, in float32, over all weights that ever move and BatchNorm's statistics.

    It starts at the weights that training starts from. Source: as NeMo's EMA callback.
    """

    def __init__(self, model: ASRModel, decay: float):
        self.decay = decay
        self.average = {name: tensor.float().clone() for name, tensor in self._moving(model)}

    def _moving(self, model: ASRModel) -> list[tuple[str, Tensor]]:
        parameters = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
        buffers = [
            (name, buffer)
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and not name.startswith("preprocessor.")
        ]
        return parameters + buffers

    @torch.no_grad()
    def update(self, model: ASRModel) -> None:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        now = [local(tensors[name].detach()).float() for name in self.average]
        torch._foreach_lerp_([local(a) for a in self.average.values()], now, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], model: ASRModel) -> None:
        """What a changed recipe averages or moves since starts from the model's weights.

        Raises:
            ValueError: a shape is another.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in self.average.items():
            value = state.get(name, tensors[name])
            if value.shape != tensor.shape:
                raise ValueError(f"the moving average of {name} is of another shape")
            tensor.copy_(value)


@torch.no_grad()
def plain_state_dict(model: ASRModel, ema: EMA | None = None) -> dict[str, Tensor]:
    """The model's tensors under a stock model's names: averaged, merged, in float32 where training
    holds them in bfloat16."""
    scales = [m.scale for m in model.modules() if isinstance(m, LoRALinear)]
    average = None if ema is None else ema.average
    return plain_tensors(model.state_dict(), average, scales[0] if scales else 1.0)


@torch.no_grad()
def plain_tensors(
    state: dict[str, Tensor], average: dict[str, Tensor] | None, lora_scale: float
) -> dict[str, Tensor]:
    """`plain_state_dict` of a checkpoint's tensors. Of tensors that are one under several names the
    average has only the first."""
    average, first = dict(average or {}), {}
    for name, tensor in state.items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if same != name and tensor.numel() and same in average:
            average[name] = average[same]
    state = merge_lora(state | average, lora_scale)
    return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}


def plain_checkpoint(model: ASRModel, ema: EMA | None = None) -> Checkpoint:
    """What `fastconformer.checkpoint.folder.write_folder` and `write_nemo` take."""
    return dataclasses.replace(model.to_checkpoint(), state_dict=plain_state_dict(model, ema))


@contextlib.contextmanager
@torch.no_grad()
def plain_weights(model: ASRModel, ema: EMA | None = None) -> Iterator[None]:
    """The model holds the plain weights inside, and bit for bit its own again after."""
    adapted = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    changed = {f"{path}.weight" for path in adapted} | set(ema.average if ema else ())
    own = model.state_dict()
    plain = plain_state_dict(model, ema) if changed else {}
    before = {name: own[name].clone() for name in changed if name in plain}
    try:
        for name in before:
            own[name].copy_(plain[name])
        for module in adapted.values():
            module.merged = True
        yield
    finally:
        for name, tensor in before.items():
            own[name].copy_(tensor)
        for module in adapted.values():
            module.merged = False
