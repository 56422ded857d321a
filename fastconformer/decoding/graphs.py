"""The label loop by CUDA graphs, kept between calls."""

import weakref

import torch

from ..networks.graphs import GraphCache
from .label_loop import LabelLoop, window_frames

# Graphs are for a few numbers of clips: it is rounded up, and their frames lie in one line of fixed
# size, so that one serves nearly all batches of a run; clips that are not there have length 0.
KEPT = 4  # each holds a batch of projected frames
FRAMES = 512  # of a clip, that a graph has room for: 40 s; the whole line is shared
ROWS = 2048  # of a graph, at least
STEPS = 16  # steps in a graph: what is wasted at the end against what a launch costs


def run_loop(graphs: GraphCache, projected: torch.Tensor, lengths: torch.Tensor, options: tuple):
    """As `LabelLoop.run`, by replays. The host reads whether all clips have ended one replay late,
    and so never waits for the device while there is work."""
    with graphs.turn(projected.device):
        loop, replay = loop_for(graphs, projected, options)
        batch, n_frames = projected.shape[:2]
        loop.projected[: batch * n_frames].copy_(projected.flatten(0, 1))
        loop.starts.zero_()
        loop.starts[:batch].copy_(loop.rows[:batch] * n_frames)
        loop.begin(lengths)
        ints, floats, before = [], [], None
        while True:
            replay()
            ints.append(loop.int_records.clone())
            floats.append(loop.float_records.clone())
            flag = (loop.frame < loop.lengths).any()
            flag, event = _to_host(flag) if flag.is_cuda else (flag, None)
            if before is not None:
                if before[1] is not None:
                    before[1].synchronize()
                if not bool(before[0]):
                    break
            before = flag, event
        return torch.cat(ints), torch.cat(floats), loop.state()


def loop_for(graphs: GraphCache, projected: torch.Tensor, options: tuple):
    """A loop with room for `projected`, and the function that replays its steps."""
    decoder, joint, blank, durations, max_symbols, bias, confidence = options
    batch = _round_up(max(1, len(projected)))
    # a graph reads its weights where they lay when it was made
    weights = tuple(p.data_ptr() for m in (decoder, joint) for p in m.parameters())
    tokens = None if bias is None else tuple(bias.tolist())
    key = batch, projected.dtype, projected.device, weights, tokens, confidence
    key += (blank, durations, max_symbols)
    rows = max(ROWS, FRAMES * batch)
    while rows < projected.shape[0] * projected.shape[1]:
        rows *= 2
    if key in graphs.graphs and len(graphs.graphs[key][0].projected) < rows:
        del graphs.graphs[key]  # it has too little room

    # as the joint holds the graphs: a model that nobody has leaves the device's memory at once
    networks = decoder, weakref.proxy(joint)

    def make():
        window = window_frames(batch, projected.device)
        loop = LabelLoop(*networks, *options[2:], batch, window, STEPS)
        shape = rows, projected.shape[2]
        loop.projected = torch.zeros(shape, dtype=projected.dtype, device=projected.device)

        def steps():
            for i in range(STEPS):
                loop.step(i)

        return loop, steps

    return graphs.get(key, make, KEPT, projected.device)


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
