"""A transducer's greedy step in few kernels, for a GPU; `LabelLoop.step` is the plain form.

Products are torch's; what lies between them are four operators, whose kernels `triton_step` has.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..networks import kernels
from ..networks.heads import is_plain, lstm_weight_names


def usable(loop) -> bool:
    """Whether this step can take the place of the loop's: confidences, HAT joints and stateless
    prediction networks are left to that."""
    plain = is_plain(loop.decoder, loop.joint) and loop.confidence is None
    return plain and kernels.usable(loop.predicted)


def step(loop, i: int) -> None:
    """As `LabelLoop.step`."""
    joint, window, blank = loop.joint, len(loop.window), loop.blank
    place = loop.frame, loop.lengths, loop.starts
    hidden = window_hidden(loop.projected, loop.predicted, *place, window, joint.activation)
    logits = joint.joint_net[-1](hidden.flatten(0, 1))
    found, label = take_label(
        *read_logits(logits, loop.bias, blank + 1),
        *(loop.steps, loop.frame, loop.on_frame, loop.lengths),
        *(loop.int_records[i], loop.float_records[i], blank, loop.max_symbols or 0),
    )
    x = loop.decoder.prediction["embed"](label)
    lstm = loop.decoder.prediction["dec_rnn"].lstm
    for layer, (h, c) in enumerate(zip(loop.h, loop.c, strict=True)):
        w_ih, w_hh, b_ih, b_hh = (getattr(lstm, f"{name}_l{layer}") for name in lstm_weight_names)
        x = lstm_state(F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), h, c, found)
    torch.where(found[:, None], joint.pred(x), loop.predicted, out=loop.predicted)


@torch.library.custom_op("fastconformer::window_hidden", mutates_args=())
def window_hidden(
    projected: Tensor,
    predicted: Tensor,
    frame: Tensor,
    lengths: Tensor,
    starts: Tensor,
    window: int,
    activation: str,
) -> Tensor:
    from .triton_step import window_hidden

    with torch.cuda.device_of(predicted):
        return window_hidden(projected, predicted, frame, lengths, starts, window, activation)


@window_hidden.register_fake
def _(projected, predicted, frame, lengths, starts, window, activation):
    return predicted.new_empty(len(predicted), window, predicted.shape[1])


@torch.library.custom_op("fastconformer::read_logits", mutates_args=())
def read_logits(
    logits: Tensor, bias: Tensor | None, n_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_step import read_logits

    with torch.cuda.device_of(logits):
        return read_logits(logits, bias, n_tokens)


@read_logits.register_fake
def _(logits, bias, n_tokens):
    tokens = logits.new_empty(len(logits), dtype=torch.long)
    return tokens, torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.float32)


@torch.library.custom_op(
    "fastconformer::take_label", mutates_args=("frame", "on_frame", "int_record", "float_record")
)
def take_label(
    tokens: Tensor,
    classes: Tensor,
    scores: Tensor,
    durations: Tensor | None,
    frame: Tensor,
    on_frame: Tensor,
    lengths: Tensor,
    int_record: Tensor,
    float_record: Tensor,
    blank: int,
    max_symbols: int,
) -> tuple[Tensor, Tensor]:
    from .triton_step import take_label

    with torch.cuda.device_of(tokens):
        return take_label(
            tokens, classes, scores, durations, frame, on_frame, lengths, int_record, float_record,
            blank, max_symbols,
        )  # fmt: skip


@take_label.register_fake
def _(tokens, classes, scores, durations, frame, *_):
    return torch.empty_like(frame, dtype=torch.bool), torch.empty_like(frame)


@torch.library.custom_op("fastconformer::lstm_state", mutates_args=("h", "c"))
def lstm_state(of_input: Tensor, of_state: Tensor, h: Tensor, c: Tensor, found: Tensor) -> Tensor:
    from .triton_step import lstm_state

    with torch.cuda.device_of(h):
        return lstm_state(of_input, of_state, h, c, found)


@lstm_state.register_fake
def _(of_input, of_state, h, c, found):
    return torch.empty_like(h)
