"""What a student with BiRWKV7 learns from its teacher with attention: each block's output, then the
encoder's output and the distributions over tokens.

Letters of shapes: B clips, T frames of the encoder, D its width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconformer import ASRModel


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared error over the valid frames, as a share of the teacher's squares; a scalar.

    student, teacher: (B, T, D); valid: (B, T).
    """
    teacher = teacher.float() * valid[..., None]
    difference = student.float() * valid[..., None] - teacher
    return difference.square().sum() / teacher.square().sum().clamp(min=1e-9)


@contextlib.contextmanager
def attention_taps(model: ASRModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that a forward pass fills with (input, output) of each layer's attention."""
    taps = []

    def note(module, inputs, output):
        taps.append((inputs[0], output))

    handles = [layer.self_attn.register_forward_hook(note) for layer in model.encoder.layers]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def block_losses(
    teacher: ASRModel, student: ASRModel, features: Tensor, lengths: Tensor
) -> Iterator[Tensor]:
    """Relative error of each block on the teacher's attention, one after another, so that each
    may go backward before the next is made. Blocks do not pull on the first one's values."""
    with torch.no_grad(), attention_taps(teacher) as taps:
        encoded, encoded_lengths = teacher.encode(features, lengths)
    pad_mask = torch.arange(encoded.shape[1], device=encoded.device) >= encoded_lengths[:, None]
    v_first = None
    for layer, (given, expected) in zip(student.encoder.layers, taps, strict=True):
        given = given.to(layer.self_attn.x_r.dtype)
        out, values = layer.self_attn(given, v_first, pad_mask)
        v_first = values.detach()
        yield relative_error(out, expected, ~pad_mask)


def model_losses(
    teacher: ASRModel, student: ASRModel, features: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """{"encoder": relative error of the encoder's output, "frames": mean over the frames of the
    Kullback-Leibler divergence from the teacher's distribution over tokens to the student's (nats),
    where a head has one for each frame}."""
    with torch.no_grad():
        expected, encoded_lengths = teacher.encode(features, lengths)
    encoded, _ = student.encode(features, lengths)
    valid = torch.arange(encoded.shape[1], device=encoded.device) < encoded_lengths[:, None]
    losses = {"encoder": relative_error(encoded, expected, valid)}
    if teacher.frame_head is not None:
        with torch.no_grad():
            target = teacher.frame_head.log_probs(expected)
        guess = student.frame_head.log_probs(encoded)
        divergence = F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
        losses["frames"] = (divergence * valid).sum() / valid.sum()
    return losses
