"""Greedy decoding of RNNT and TDT: all clips of a batch advance together, label by label.

A step looks at a window of frames at once, since the prediction network's state stays what it is
until a label is found: blanks inside the window are skipped by their durations with a few gathers,
then every clip that found a label feeds it to the prediction network. Steps are written to run
without asking the device anything, so that on a GPU several of them replay as one CUDA graph; on a
CPU the same steps run one by one.

Source: label looping (arXiv:2406.06220) and TDT (arXiv:2304.06795); gives NeMo's `greedy_batch`
tokens, frames and durations.
"""

import threading
from collections import OrderedDict

import numpy as np
import torch

from ..networks.heads import Joint, PredictionNetwork
from .confidence import Confidence
from .hypothesis import Hypothesis

# Clips longer than this are decoded in segments, side by side: one label after the other, an hour
# has more than ten thousand steps, each too small to fill a device.
LONG_FRAMES, SEGMENT_FRAMES = 2048, 512


@torch.no_grad()
def transducer_greedy(
    encoded: torch.Tensor,
    lengths: torch.Tensor,
    decoder: PredictionNetwork,
    joint: Joint,
    blank: int,
    durations: tuple[int, ...] = (),
    max_symbols: int | None = 10,
    bias: torch.Tensor | None = None,
    confidence: Confidence | None = None,
    graphs: "GraphCache | None" = None,
) -> list[Hypothesis]:
    """encoded (B, T', D), lengths (B,). Empty `durations`: RNNT.

    A blank of duration 0 advances one frame, so decoding always ends; after `max_symbols` tokens on
    one frame the frame is left (None: no limit). The score sums the log-probabilities of the
    emitted tokens.

    Args:
        bias: (V+1,) added to the token logits, -inf for tokens that must not occur.
        confidence: also give the confidence of each token.
        graphs: keeps CUDA graphs between calls; without it steps run one by one, as is better on a
            CPU.
    """
    options = decoder, joint, blank, durations, max_symbols, bias, confidence

    def run(projected, lengths):
        if graphs is not None:
            return graphs.run(projected, lengths, options)
        loop = _LabelLoop(*options, len(lengths), _window(len(lengths), encoded.device))
        return loop.run(projected, lengths)

    if max(lengths.tolist(), default=0) > LONG_FRAMES:
        arcs = _in_segments(encoded, lengths, options, run)
    else:
        arcs = _by_clip(*run(joint.enc(encoded), lengths)[:2], len(lengths))
    hypotheses = []
    for whole, real in arcs:
        tokens, frames, spans = whole.tolist()
        sure = real[1].tolist() if confidence is not None else None
        score = float(real[0].sum())
        hypotheses.append(Hypothesis(tokens, frames, spans if durations else None, score, sure))
    return hypotheses


def _window(batch: int, device: torch.device) -> int:
    """Frames a step looks at: more while the joint is bound by reading its weights."""
    return max(1, min(8, (512 if device.type == "cuda" else 32) // batch))


class _LabelLoop:
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
        self.steps = torch.tensor(durations, device=device) if durations else None
        longest = max(1, *durations) if durations else 1
        self.bias = None if bias is None else bias.to(weight)
        self.rows = torch.arange(batch, device=device)
        self.window = torch.arange(window, device=device)
        self.beyond = torch.arange(window, window + longest, device=device).expand(batch, longest)
        self.hops = (window - 1).bit_length()
        self.frame = torch.zeros(batch, dtype=torch.long, device=device)
        self.on_frame = torch.zeros_like(self.frame)  # tokens emitted on the current frame
        self.lengths = torch.zeros_like(self.frame)
        self.source = self.rows  # row of `projected` that each clip reads
        self.predicted = weight.new_zeros(batch, weight.shape[0])
        shape = decoder.n_layers, batch, decoder.hidden
        self.h, self.c = weight.new_zeros(shape), weight.new_zeros(shape)
        # of each step: token (-1: none), frame, duration; log-probability, confidence
        self.whole = torch.zeros(n_steps, 3, batch, dtype=torch.long, device=device)
        self.real = torch.zeros(n_steps, 2, batch, device=device)
        self.projected = None

    def begin(self, lengths: torch.Tensor):
        """To the first frame of every clip; `projected` is set by the caller."""
        self.frame.zero_()
        self.on_frame.zero_()
        self.lengths.zero_()
        self.lengths[: len(lengths)].copy_(lengths)
        output, state = self.decoder.start(len(self.rows))
        self.predicted.copy_(self.joint.pred(output))
        for layer, (h, c) in enumerate(state):
            self.h[layer].copy_(h)
            self.c[layer].copy_(c)

    def state(self):
        """What decoding goes on from: frame, tokens on it, prediction network's output and state;
        clips come last but one."""
        parts = self.frame[:, None], self.on_frame[:, None], self.predicted, self.h, self.c
        return [part.clone() for part in parts]

    def run(self, projected: torch.Tensor, lengths: torch.Tensor):
        """Step by step to the end -> records (S, 3, B) and (S, 2, B), the state at the end."""
        self.projected = projected
        self.begin(lengths)
        whole, real = [self.whole[:0]], [self.real[:0]]
        ended = not bool((self.frame < self.lengths).any())
        while not ended:
            self.whole[:, 0] = -1
            for i in range(self.n_steps):
                self.step(i, skip_idle=projected.device.type == "cpu")
                ended = i % 4 == 3 and not bool((self.frame < self.lengths).any())
                if ended:
                    break
            whole.append(self.whole[: i + 1].clone())
            real.append(self.real[: i + 1].clone())
        return torch.cat(whole), torch.cat(real), self.state()

    def step(self, i: int, skip_idle: bool = False):
        """Finds the next label of every clip within the window, and takes it in. Writes row `i` of
        the records. `skip_idle` asks the device whether there is a label at all."""
        frames = self.frame[:, None] + self.window  # (B, W)
        inside = torch.minimum(frames, (self.lengths - 1).clamp(min=0)[:, None])
        logits = self.joint.step(
            self.projected[self.source[:, None], inside], self.predicted[:, None]
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
        self.real[i, 0] = chosen.gather(1, token[:, None])[:, 0]
        if self.confidence is not None:
            sureness = self.confidence.of(chosen, self.blank + 1)
            if self.confidence.include_duration and self.durations:
                of_duration = self.confidence.of(
                    logits[self.rows, at, self.blank + 1 :].float().log_softmax(-1), self.blank + 1
                )
                sureness = _aggregate_two(self.confidence.aggregation, sureness, of_duration)
            self.real[i, 1] = sureness
        self.whole[i, 0] = torch.where(found, token, -1)
        self.whole[i, 1] = self.frame
        self.whole[i, 2] = skip

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


def _aggregate_two(aggregation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if aggregation == "mean":
        return (a + b) / 2
    return {"min": torch.minimum, "max": torch.maximum, "prod": torch.mul}[aggregation](a, b)


def _by_clip(whole: torch.Tensor, real: torch.Tensor, batch: int):
    """Sorts the steps' records by clip -> [(3, n) and (2, n) arrays] of the tokens of each: one
    transfer, no loop over tokens."""
    whole, real = whole[..., :batch].permute(2, 0, 1), real[..., :batch].permute(2, 0, 1)
    spoken = whole[..., 0] >= 0  # (B, S)
    ends = spoken.sum(1).cumsum(0).tolist()[:-1]
    whole, real = whole[spoken].cpu().numpy(), real[spoken].cpu().numpy()
    return [(w.T, r.T) for w, r in zip(np.split(whole, ends), np.split(real, ends))]


def _in_segments(encoded, lengths, options, run):
    """`_by_clip` of long clips: segments are decoded together, and their seams made right.

    Every segment is decoded from the start symbol. Then each is begun again from where the one
    before it ended, beside a replay of its first decoding, until both stand on the same frame with
    the same state of the prediction network: from there on they are one. A segment that ends
    otherwise than it did has the one after it begun again; at worst this is as long as decoding
    the clip in one go.
    """
    joint = options[1]
    spans = [
        (clip, first, min(SEGMENT_FRAMES, n - first))
        for clip, n in enumerate(lengths.tolist())
        for first in range(0, n, SEGMENT_FRAMES)
    ]
    limits = torch.tensor([n for _, _, n in spans], device=encoded.device)
    projected = joint.enc.weight.new_zeros(len(spans), SEGMENT_FRAMES, len(joint.enc.weight))
    for row, (clip, first, n) in zip(projected, spans):
        row[:n] = joint.enc(encoded[clip, first : first + n])
    whole, real, ended = run(projected, limits)
    ended = [part[..., : len(spans), :] for part in ended]
    fresh = _by_clip(whole, real, len(spans))
    found, fresh_ended = list(fresh), [part.clone() for part in ended]
    begun_again = [row for row, (_, first, _) in enumerate(spans) if first]
    while begun_again:
        rows = torch.tensor(begun_again, device=encoded.device)
        begun, replayed, met, after = _begin_again(projected, limits, rows, ended, options)
        # rounding may take the replay another way than the first decoding went: no meeting then
        strayed = [
            k
            for k, (row, arcs) in enumerate(zip(begun_again, replayed))
            if met[k] and not np.array_equal(arcs[0], fresh[row][0][:, : arcs[0].shape[1]])
        ]
        if strayed:
            alone = _begin_again(projected, limits, rows[strayed], ended, options, to_the_end=True)
            for k, arcs in zip(strayed, alone[0]):
                begun[k] = arcs
            met[strayed] = False
            for part, new in zip(after, alone[3]):
                part[..., strayed, :] = new
        # the state a segment ends in: that of its first decoding where the two have met
        after = [
            torch.where(met[:, None], old[..., rows, :], new)
            for old, new in zip(fresh_ended, after)
        ]
        same = _close(after, [part[..., rows, :] for part in ended])
        for part, new in zip(ended, after):
            part[..., rows, :] = new
        for row, arcs, replay, is_met in zip(begun_again, begun, replayed, met.tolist()):
            n_replayed = replay[0].shape[1]
            rest = [part[:, n_replayed:] for part in fresh[row]]
            found[row] = [np.concatenate(p, 1) for p in zip(arcs, rest)] if is_met else arcs
        begun_again = [
            row + 1
            for row, is_same in zip(begun_again, same.tolist())
            if not is_same and row + 1 < len(spans) and spans[row + 1][1]
        ]
    joined = []
    for clip in range(len(lengths)):
        parts = [(first, arcs) for (at, first, _), arcs in zip(spans, found) if at == clip]
        whole = [w + np.array([[0], [first], [0]]) for first, (w, _) in parts]
        real = [r for _, (_, r) in parts]
        joined.append(
            (np.concatenate([np.zeros((3, 0), int), *whole], 1),
             np.concatenate([np.zeros((2, 0)), *real], 1))
        )  # fmt: skip
    return joined


def _begin_again(projected, limits, rows, ended, options, to_the_end=False):
    """Decodes segments `rows` from where those before them ended, until they meet a replay of
    their first decoding or end; without a replay if `to_the_end`.

    Returns:
        (tokens of each as in `_by_clip`, tokens of the replay up to that moment, whether they met
        (n,), states).
    """
    n, device = len(rows), projected.device
    loop = _LabelLoop(*options, 2 * n, _window(2 * n, device))
    loop.projected, loop.source = projected, torch.cat((rows, rows))
    ends = limits[rows]
    loop.begin(torch.cat((ends, ends)))
    parts = loop.frame[:, None], loop.on_frame[:, None], loop.predicted, loop.h, loop.c
    for part, before in zip(parts, ended):
        part[..., n:, :] = before[..., rows - 1, :]
    loop.frame[n:] -= SEGMENT_FRAMES  # a segment with one after it is this long
    met = torch.zeros(n, dtype=torch.bool, device=device)
    whole, real, i = [], [], 0
    while True:
        replay, begun = loop.frame[:n], loop.frame[n:]
        open_ = ~met & (begun < ends)
        if i % 8 == 0 and not bool(open_.any()):
            break
        # whichever is behind goes on, so that they stand still where they can meet
        turns = torch.cat((open_ & (replay <= begun), open_ & (begun <= replay)))
        if to_the_end:
            turns = torch.cat((met, open_))
        loop.lengths.copy_(torch.where(turns, torch.cat((ends, ends)), 0))
        loop.whole[0, 0] = -1
        loop.step(0)
        whole.append(loop.whole[0].clone())
        real.append(loop.real[0].clone())
        i += 1
        state = loop.state()
        if to_the_end:
            continue
        met |= open_ & _close(*([part[..., k, :] for part in state] for k in _halves(n)))
    whole = torch.stack(whole) if whole else loop.whole[:0]
    real = torch.stack(real) if real else loop.real[:0]
    state = [part[..., n:, :] for part in loop.state()]
    return (*(_by_clip(whole[..., k], real[..., k], n) for k in (slice(n, None), slice(0, n))),
            met, state)  # fmt: skip


def _halves(n: int):
    return slice(0, n), slice(n, 2 * n)


def _close(a, b) -> torch.Tensor:
    """(n,) whether states are one: the same frame, and no further apart than rounding would put
    them before long."""
    tolerance = 1e-4 if a[2].dtype in (torch.float32, torch.float64) else 2**-7
    same = (a[0] == b[0]).all(-1) & (a[1] == b[1]).all(-1)
    for x, y in zip(a[3:], b[3:]):
        near = (x - y).abs() <= tolerance * (1 + y.abs())
        same = same & near.all(-1).all(0)
    return same


class GraphCache:
    """CUDA graphs of the label loop for a few batch shapes, kept by a model between calls.

    Shapes are rounded up, so that few graphs serve many batches; clips that are not there have
    length 0. One call at a time uses it. A copy of the model starts with an empty one.
    """

    SHAPES = 4  # graphs kept; each holds a batch of projected frames
    STEPS = 16  # steps in a graph: what is wasted at the end against what a launch costs

    def __init__(self):
        self.lock = threading.Lock()
        self.graphs: OrderedDict[tuple, tuple] = OrderedDict()

    def __deepcopy__(self, memo):
        return GraphCache()

    def __reduce__(self):
        return GraphCache, ()

    def run(self, projected: torch.Tensor, lengths: torch.Tensor, options: tuple):
        """As `_LabelLoop.run`, by replays. The host reads whether all clips have ended one replay
        late, and so never waits for the device while there is work."""
        with self.lock:
            loop, replay = self._loop(projected, options)
            loop.projected[: projected.shape[0], : projected.shape[1]].copy_(projected)
            loop.begin(lengths)
            whole, real, before = [], [], None
            while True:
                replay()
                whole.append(loop.whole.clone())
                real.append(loop.real.clone())
                flag = (loop.frame < loop.lengths).any()
                flag, event = _to_host(flag) if flag.is_cuda else (flag, None)
                if before is not None:
                    if before[1] is not None:
                        before[1].synchronize()
                    if not bool(before[0]):
                        break
                before = flag, event
            return torch.cat(whole), torch.cat(real), loop.state()

    def _loop(self, projected: torch.Tensor, options: tuple):
        """A loop with room for `projected`, and the function that replays its steps."""
        decoder, joint, blank, durations, max_symbols, bias, confidence = options
        batch, frames = (_round_up(max(1, n)) for n in projected.shape[:2])
        # a graph reads its weights where they lay when it was made
        weights = tuple(p.data_ptr() for m in (decoder, joint) for p in m.parameters())
        tokens = None if bias is None else tuple(bias.tolist())
        key = batch, frames, projected.dtype, projected.device, weights, tokens, confidence
        key += (blank, durations, max_symbols)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        while len(self.graphs) >= self.SHAPES:
            self.graphs.popitem(last=False)
        # kept for later calls, which may run outside of an inference mode that holds now
        with torch.inference_mode(False), torch.no_grad():
            loop = _LabelLoop(*options, batch, _window(batch, projected.device), self.STEPS)
            loop.projected = torch.zeros(
                batch, frames, projected.shape[2], dtype=projected.dtype, device=projected.device
            )

            def replay():
                for i in range(self.STEPS):
                    loop.step(i)

            if projected.is_cuda:
                replay = _captured(replay, projected.device)
        self.graphs[key] = loop, replay
        return self.graphs[key]


def _captured(function, device: torch.device):
    """The kernels of `function()` as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries choose and load their kernels before the capture
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def _to_host(flag: torch.Tensor):
    """(a copy that arrives when the event has, the event)."""
    copy = torch.empty((), dtype=torch.bool, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    # The copy runs on the flag's device, which need not be the current one.
    event.record(torch.cuda.current_stream(flag.device))
    return copy, event


def _round_up(n: int) -> int:
    """To a number with at most three leading binary digits: at most a fourth is padding."""
    unit = 1 << max(0, n.bit_length() - 3)
    return -(-n // unit) * unit
