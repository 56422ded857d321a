"""Long clips of a transducer: segments are decoded side by side, and their seams made right.

One label after the other, an hour has more than ten thousand steps, each too small to fill a
device.
"""

import numpy as np
import torch

from .label_loop import LabelLoop, by_clip, window_frames

SEGMENT_FRAMES = 512


def in_segments(encoded, lengths, options, run):
    """`by_clip` of long clips: segments are decoded together, and their seams made right.

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
    ints, floats, ended = run(projected, limits)
    ended = [part[..., : len(spans), :] for part in ended]
    fresh = by_clip(ints, floats, len(spans))
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
        ints = [w + np.array([[0], [first], [0]]) for first, (w, _) in parts]
        floats = [r for _, (_, r) in parts]
        joined.append(
            (np.concatenate([np.zeros((3, 0), int), *ints], 1),
             np.concatenate([np.zeros((2, 0)), *floats], 1))
        )  # fmt: skip
    return joined


def _begin_again(projected, limits, rows, ended, options, to_the_end=False):
    """Decodes segments `rows` from where those before them ended, until they meet a replay of
    their first decoding or end; without a replay if `to_the_end`.

    Returns:
        (tokens of each as in `by_clip`, tokens of the replay up to that moment, whether they met
        (n,), states).
    """
    n, device = len(rows), projected.device
    loop = LabelLoop(*options, 2 * n, window_frames(2 * n, device))
    loop.projected = projected.flatten(0, 1)
    loop.starts = torch.cat((rows, rows)) * projected.shape[1]
    ends = limits[rows]
    loop.begin(torch.cat((ends, ends)))
    parts = loop.frame[:, None], loop.on_frame[:, None], loop.predicted, loop.h, loop.c
    for part, before in zip(parts, ended):
        part[..., n:, :] = before[..., rows - 1, :]
    loop.frame[n:] -= SEGMENT_FRAMES  # a segment with one after it is this long
    met = torch.zeros(n, dtype=torch.bool, device=device)
    ints, floats, i = [], [], 0
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
        loop.int_records[0, 0] = -1
        loop.step(0)
        ints.append(loop.int_records[0].clone())
        floats.append(loop.float_records[0].clone())
        i += 1
        state = loop.state()
        if to_the_end:
            continue
        met |= open_ & _close(*([part[..., k, :] for part in state] for k in _halves(n)))
    ints = torch.stack(ints) if ints else loop.int_records[:0]
    floats = torch.stack(floats) if floats else loop.float_records[:0]
    state = [part[..., n:, :] for part in loop.state()]
    return (*(by_clip(ints[..., k], floats[..., k], n) for k in (slice(n, None), slice(0, n))),
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
