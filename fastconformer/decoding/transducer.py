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

import torch

from ..heads import Joint, PredictionNetwork
from .confidence import Confidence
from .hypothesis import Hypothesis


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
    projected = joint.enc(encoded)  # (B, T', J)
    options = decoder, joint, blank, durations, max_symbols, bias, confidence
    if graphs is not None:
        records = graphs.run(projected, lengths, options)
    else:
        loop = _LabelLoop(*options, len(lengths), _window(len(lengths), encoded.device))
        records = loop.run(projected, lengths)
    return _hypotheses(*records, len(lengths), bool(durations), confidence)


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
        self.score = torch.zeros(batch, device=device)
        self.predicted = weight.new_zeros(batch, weight.shape[0])
        shape = decoder.n_layers, batch, decoder.hidden
        self.h, self.c = weight.new_zeros(shape), weight.new_zeros(shape)
        # token (-1: none), frame, duration of each step
        self.record = torch.zeros(n_steps, 3, batch, dtype=torch.long, device=device)
        self.sureness = torch.zeros(n_steps, batch, device=device)
        self.projected = None

    def begin(self, lengths: torch.Tensor):
        """To the first frame of every clip; `projected` is set by the caller."""
        for tensor in (self.frame, self.on_frame, self.score):
            tensor.zero_()
        self.lengths.zero_()
        self.lengths[: len(lengths)].copy_(lengths)
        output, state = self.decoder.start(len(self.rows))
        self.predicted.copy_(self.joint.pred(output))
        for layer, (h, c) in enumerate(state):
            self.h[layer].copy_(h)
            self.c[layer].copy_(c)

    def run(self, projected: torch.Tensor, lengths: torch.Tensor):
        """Step by step to the end -> records (S, 3, B) and confidences (S, B)."""
        self.projected = projected
        self.begin(lengths)
        records, surenesses = [], []
        ended = not bool((self.frame < self.lengths).any())
        while not ended:
            self.record[:, 0] = -1
            for i in range(self.n_steps):
                self.step(i, skip_idle=projected.device.type == "cpu")
                ended = i % 4 == 3 and not bool((self.frame < self.lengths).any())
                if ended:
                    break
            records.append(self.record[: i + 1].clone())
            surenesses.append(self.sureness[: i + 1].clone())
        if not records:
            return self.record[:0], self.sureness[:0], self.score
        return torch.cat(records), torch.cat(surenesses), self.score

    def step(self, i: int, skip_idle: bool = False):
        """Finds the next label of every clip within the window, and takes it in. Writes row `i` of
        the records. `skip_idle` asks the device whether there is a label at all."""
        frames = self.frame[:, None] + self.window  # (B, W)
        inside = torch.minimum(frames, (self.lengths - 1).clamp(min=0)[:, None])
        logits = self.joint.step(
            self.projected[self.rows[:, None], inside], self.predicted[:, None]
        )
        token_logits = logits[..., : self.blank + 1]
        if self.bias is not None:
            token_logits = token_logits + self.bias
        tokens = token_logits.argmax(-1)  # (B, W)
        if self.steps is None:
            skips = (tokens == self.blank).long()
        else:
            skips = self.steps[logits[..., self.blank + 1 :].argmax(-1)]
        # where each frame of the window leads: a label stays, a blank moves on, doubling the hops
        moves = torch.where(tokens == self.blank, skips.clamp(min=1), 0)
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
        self.score += torch.where(found, chosen.gather(1, token[:, None])[:, 0], 0.0)
        if self.confidence is not None:
            sureness = self.confidence.of(chosen, self.blank + 1)
            if self.confidence.include_duration and self.durations:
                of_duration = self.confidence.of(
                    logits[self.rows, at, self.blank + 1 :].float().log_softmax(-1), self.blank + 1
                )
                sureness = _aggregate_two(self.confidence.aggregation, sureness, of_duration)
            self.sureness[i] = sureness
        self.record[i, 0] = torch.where(found, token, -1)
        self.record[i, 1] = self.frame
        self.record[i, 2] = skip

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


def _hypotheses(records, surenesses, scores, batch, with_durations, confidence):
    """Sorts the steps' records by clip: one transfer, no loop over tokens."""
    tokens, frames, spans = records.transpose(0, 1)[:, :, :batch].transpose(1, 2)  # (B, S) each
    spoken = tokens >= 0
    counts = spoken.sum(1).tolist()
    packed = torch.stack((tokens[spoken], frames[spoken], spans[spoken])).tolist()
    sure = surenesses[:, :batch].T[spoken].tolist() if confidence is not None else None
    hypotheses, first = [], 0
    for count, score in zip(counts, scores[:batch].tolist()):
        part = slice(first, first + count)
        hypotheses.append(
            Hypothesis(
                packed[0][part],
                packed[1][part],
                packed[2][part] if with_durations else None,
                score,
                sure[part] if sure is not None else None,
            )
        )
        first += count
    return hypotheses


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
            records, surenesses, before = [], [], None
            while True:
                replay()
                records.append(loop.record.clone())
                surenesses.append(loop.sureness.clone())
                flag = (loop.frame < loop.lengths).any()
                flag, event = _to_host(flag) if flag.is_cuda else (flag, None)
                if before is not None:
                    if before[1] is not None:
                        before[1].synchronize()
                    if not bool(before[0]):
                        break
                before = flag, event
            return torch.cat(records), torch.cat(surenesses), loop.score.clone()

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
    event.record()
    return copy, event


def _round_up(n: int) -> int:
    """To a number with at most three leading binary digits: at most a fourth is padding."""
    unit = 1 << max(0, n.bit_length() - 3)
    return -(-n // unit) * unit
