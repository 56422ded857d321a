"""The state of a transducer's greedy decoding, and the step that advances all clips by a label.

A step looks at a window of frames at once, since the prediction network's state stays what it is
until a label is found: blanks inside the window are skipped by their durations with a few gathers,
then every clip that found a label feeds it to the prediction network. Steps are written to run
without asking the device anything, so that on a GPU several of them replay as one CUDA graph; on a
CPU the same steps run one by one.

Source: label looping (arXiv:2406.06220) and TDT (arXiv:2304.06795).
"""

import numpy as np
import torch

from ..transfers import sent
from . import fused_step


def window_frames(batch: int, device: torch.device) -> int:
    """Frames a step looks at: more while the joint is bound by reading its weights."""
    return max(1, min(8, (512 if device.type == "cuda" else 32) // batch))


class LabelLoop:
    """The state of a batch and the step that advances it. All tensors are written in place.

    B clips, W frames of the window, S steps between two looks at the device.
    """

    def __init__(
        self, decoder, joint, blank, durations, max_symbols, bias, confidence, batch, window,
        n_steps=32,
    ):  # fmt: skip
        self.decoder, self.joint, self.blank, self.max_symbols = decoder, joint, blank, max_symbols
        self.confidence, self.durations, self.n_steps = confidence, durations, n_steps
        weight = joint.pred.weight
        device = weight.device
        self.steps = sent(torch.tensor(durations, device="cpu"), device) if durations else None
        longest = max(1, *durations) if durations else 1
        self.bias = None if bias is None else bias.to(weight)
        self.rows = torch.arange(batch, device=device)
        self.window = torch.arange(window, device=device)
        self.beyond = torch.arange(window, window + longest, device=device).expand(batch, longest)
        self.hops = (window - 1).bit_length()
        self.frame = torch.zeros(batch, dtype=torch.long, device=device)
        self.on_frame = torch.zeros_like(self.frame)  # tokens emitted on the current frame
        self.lengths = torch.zeros_like(self.frame)
        self.starts = torch.zeros_like(self.frame)  # row of `projected` with a clip's first frame
        self.predicted = weight.new_zeros(batch, weight.shape[0])
        shape = decoder.n_layers, batch, decoder.hidden
        self.h, self.c = weight.new_zeros(shape), weight.new_zeros(shape)
        # of each step: token (-1: none), frame, duration; log-probability, confidence
        self.int_records = torch.zeros(n_steps, 3, batch, dtype=torch.long, device=device)
        self.float_records = torch.zeros(n_steps, 2, batch, dtype=torch.float32, device=device)
        self.projected = None  # (rows, J): the frames of all clips, in one line

    def begin(self, lengths: torch.Tensor, state: list[torch.Tensor] | None = None):
        """To the first frame of every clip, or where `state` (as of `state()`) says; `projected` is
        set by the caller."""
        self.frame.zero_()
        self.on_frame.zero_()
        self.lengths.zero_()
        self.lengths[: len(lengths)].copy_(lengths)
        if state is not None:
            parts = self.frame[:, None], self.on_frame[:, None], self.predicted, self.h, self.c
            for part, before in zip(parts, state, strict=True):
                part.copy_(before)
            return
        output, started = self.decoder.start(len(self.rows))
        self.predicted.copy_(self.joint.pred(output))
        for layer, (h, c) in enumerate(started):
            self.h[layer].copy_(h)
            self.c[layer].copy_(c)

    def state(self):
        """What decoding goes on from: frame, tokens on it, prediction network's output and state;
        clips come last but one."""
        parts = self.frame[:, None], self.on_frame[:, None], self.predicted, self.h, self.c
        return [part.clone() for part in parts]

    def run(self, projected: torch.Tensor, lengths: torch.Tensor, state=None):
        """Step by step, from `state` or the start, to the end -> records (S, 3, B) and (S, 2, B),
        the state at the end."""
        self.projected = projected.flatten(0, 1)
        self.starts.copy_(self.rows * projected.shape[1])
        self.begin(lengths, state)
        ints, floats = [self.int_records[:0]], [self.float_records[:0]]
        ended = not bool((self.frame < self.lengths).any())
        while not ended:
            self.int_records[:, 0] = -1
            for i in range(self.n_steps):
                self.step(i, skip_idle=projected.device.type == "cpu")
                ended = i % 4 == 3 and not bool((self.frame < self.lengths).any())
                if ended:
                    break
            ints.append(self.int_records[: i + 1].clone())
            floats.append(self.float_records[: i + 1].clone())
        return torch.cat(ints), torch.cat(floats), self.state()

    def step(self, i: int, skip_idle: bool = False):
        """Finds the next label of every clip within the window, and takes it in. Writes row `i` of
        the records. `skip_idle` asks the device whether there is a label at all."""
        if fused_step.usable(self):
            return fused_step.step(self, i)
        frames = self.frame[:, None] + self.window  # (B, W)
        inside = torch.minimum(frames, (self.lengths - 1).clamp(min=0)[:, None])
        logits = self.joint.step(
            self.projected[self.starts[:, None] + inside], self.predicted[:, None]
        )
        token_logits = logits[..., : self.blank + 1]
        if self.bias is not None:
            token_logits = token_logits + self.bias
        tokens = token_logits.argmax(-1)  # (B, W)
        if self.steps is None:
            skips = (tokens == self.blank).long()
        else:
            skips = self.steps[logits[..., self.blank + 1 :].argmax(-1)]
        # where each frame of the window leads: a blank moves on, a label and the end stay; then
        # the hops are doubled
        moving = (tokens == self.blank) & (frames < self.lengths[:, None])
        moves = torch.where(moving, skips.clamp(min=1), 0)
        leads = torch.cat((self.window + moves, self.beyond), 1)
        for _ in range(self.hops):
            leads = leads.gather(1, leads)
        moved = leads[:, 0]
        self.frame += moved
        self.on_frame.masked_fill_(moved > 0, 0)
        found = (moved < len(self.window)) & (self.frame < self.lengths)
        if skip_idle and not bool(found.any()):
            return

        at = moved.clamp(max=len(self.window) - 1)
        token, skip = tokens[self.rows, at], skips[self.rows, at]
        chosen = token_logits[self.rows, at].float().log_softmax(-1)
        self.float_records[i, 0] = chosen.gather(1, token[:, None])[:, 0]
        if self.confidence is not None:
            of_duration = logits[self.rows, at, self.blank + 1 :]
            self.float_records[i, 1] = self.confidence.of_symbol(chosen, of_duration)
        self.int_records[i, 0] = torch.where(found, token, -1)
        self.int_records[i, 1] = self.frame
        self.int_records[i, 2] = skip

        skip = torch.where(found, skip, 0)
        self.on_frame.add_(found).masked_fill_(skip > 0, 0)
        if self.max_symbols is not None:
            stuck = self.on_frame >= self.max_symbols
            skip = skip + stuck
            self.on_frame.masked_fill_(stuck, 0)
        self.frame += skip
        state = list(zip(self.h, self.c))
        output, after = self.decoder.step(torch.where(found, token, 0), state)
        keep = found[:, None]
        self.predicted.copy_(torch.where(keep, self.joint.pred(output), self.predicted))
        for (h, c), (h_after, c_after) in zip(state, after):
            h.copy_(torch.where(keep, h_after, h))
            c.copy_(torch.where(keep, c_after, c))


def by_clip(ints: torch.Tensor, floats: torch.Tensor, batch: int):
    """Sorts the steps' records by clip -> [(3, n) and (2, n) arrays] of the tokens of each: one
    transfer, no loop over tokens."""
    bits = floats.contiguous().view(torch.int32).long()  # to the host with the others
    records = torch.cat((ints, bits), 1)[..., :batch].permute(2, 0, 1).cpu().numpy()  # (B, S, 5)
    floats = records[..., 3:].astype(np.int32).view(np.float32)
    found = []
    for clip, scores, spoken in zip(records[..., :3], floats, records[..., 0] >= 0):
        found.append((clip[spoken].T, scores[spoken].T))
    return found
