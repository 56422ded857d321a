"""What the fused loss works on: the cells of a batch in one line, tiles of them, and what is kept
of each cell between the two visits. Letters as in fused.py."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transfers import sent

# Logits of a tile: large enough for full speed of the products, small beside everything else, and
# within the device's caches.
_TILE_BYTES = {"cpu": 16 << 20, "cuda": 32 << 20}
_TILE_CELLS = {"cpu": 1024, "cuda": 32768}
# Hidden rows of a tile where no logits are written: for each processor of a GPU some programs.
_HIDDEN_BYTES = 128 << 20
# Rows of the output layer are padded with zeros to a multiple of this: the products of a GPU want
# rows of logits that begin at multiples of 16 bytes.
PADDED_TO = {"cpu": 1, "cuda": 64}


class Options(NamedTuple):
    sigma: float
    omega: float
    fastemit_lambda: float
    clamp: float  # inf for none
    dropout: float
    eps: float


class Job(NamedTuple):
    """What the passes over tiles share. Tensors are contiguous, on one device."""

    enc: Tensor  # (B * T', H)
    pred: Tensor  # (B * R, H), of the same type
    weight: Tensor  # (outputs in use, padded, H), in the type of the products
    bias: Tensor
    targets: Tensor  # (B, R), int64, 0 where there is none
    frames: Tensor  # (B,), int64
    rows: Tensor  # (B,), U+1 of each clip
    offsets: Tensor  # (B,), first cell of each clip
    shapes: tuple[tuple[int, int], ...]  # frames and rows again, known to Python
    n_frames: int  # T' of the tensors
    n_rows: int  # R of the tensors
    n_cells: int
    blank: int
    n_classes: int  # V + 1
    durations: tuple[int, ...] | None
    sigma: float
    activation: str
    dropout: float
    seed: int

    @property
    def n_outputs(self) -> int:
        """Outputs in use, V+1+N or V+1."""
        return self.n_classes + len(self.durations or ())


class Tile(NamedTuple):
    """Cells that are worked on at once."""

    index: Tensor  # numbers of the cells, ascending, (n,)
    first: int  # of them
    last: int
    start: int = 0  # visited cells before the tile
    before: Tensor | None = None  # visited cells before each cell, (C + 1,); None: all before it


class Cells(NamedTuple):
    """What is kept of each cell, (C,) or (C, N); past the valid ones undefined."""

    top: Tensor  # maximum of the token logits
    total: Tensor  # sum of exp(logit - top)
    blank: Tensor  # log p(blank); after the lattice its occupancy
    label: Tensor
    duration: Tensor


def make_job(
    enc, pred, weight, bias, targets, logit_lengths, target_lengths, coin, seed, durations, blank,
    activation, options, dtype,
) -> Job:  # fmt: skip
    device, width, n_rows = enc.device, enc.shape[2], pred.shape[1]
    n_classes = len(weight) - len(durations or ())
    sigma = options.sigma
    if coin is not None and coin.item() < options.omega:
        durations, sigma = None, 0.0
        weight, bias = weight[:n_classes], bias[:n_classes]
    weight, bias = weight.to(dtype), bias.to(dtype)
    if more := -len(weight) % PADDED_TO.get(device.type, 1):
        weight, bias = F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more))
    frames = sent(logit_lengths.to(torch.int64), device)
    rows = sent(target_lengths.to(torch.int64), device) + 1
    ends = (frames * rows).cumsum(0)
    shapes = tuple((t, u + 1) for t, u in zip(logit_lengths.tolist(), target_lengths.tolist()))
    targets = F.pad(sent(targets.to(torch.int64), device), (0, max(0, n_rows - targets.shape[1])))
    none = torch.arange(n_rows, device=device) >= rows[:, None] - 1
    # As they are, also under autocast: rounded before their sum, a ReLU might take the other side.
    states = torch.promote_types(enc.dtype, pred.dtype)
    if dtype == torch.float64 or (states == torch.float16 and device.type == "cpu"):
        states = dtype
    return Job(
        enc.to(states).reshape(-1, width).contiguous(),
        pred.to(states).reshape(-1, width).contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        targets[:, :n_rows].masked_fill(none, 0).contiguous(),
        frames,
        rows,
        ends - frames * rows,
        shapes,
        enc.shape[1],
        n_rows,
        sum(t * r for t, r in shapes),
        blank,
        n_classes,
        None if durations is None else tuple(durations),
        sigma,
        activation,
        options.dropout,
        0 if seed is None else int(seed),
    )


def tiles(
    job: Job,
    tile_cells: int,
    lo: int = 0,
    hi: int | None = None,
    skipped: Tensor | None = None,
    logits: bool = True,
) -> Iterator[Tile]:
    """The cells from lo to hi, those that are not skipped (hi - lo,). `logits`: whether those of a
    tile are in memory."""
    hi = job.n_cells if hi is None else hi
    kind = "cpu" if job.enc.device.type == "cpu" else "cuda"
    itemsize = job.weight.element_size()
    if logits:
        most = _TILE_BYTES[kind] // (len(job.weight) * itemsize)
        most = min(_TILE_CELLS[kind], max(128, most))
    else:
        most = max(128, _HIDDEN_BYTES // (job.weight.shape[1] * itemsize))
    # On a CPU `tile_cells` may mean more, to be kept.
    tile_cells = min(tile_cells or most, most) if kind == "cpu" else tile_cells or most
    # Kernels have offsets of 32 bits inside a tile.
    tile_cells = min(tile_cells, ((1 << 31) - 1) // max(job.weight.shape))
    if skipped is None:
        for first in range(lo, hi, tile_cells):
            last = min(first + tile_cells, hi) - 1
            yield Tile(torch.arange(first, last + 1, device=job.enc.device), first, last)
        return
    before = F.pad((~skipped).cumsum(0, dtype=torch.int32), (1, 0))

    def cells(numbers: Tensor) -> Tensor:
        """The visited cells of these numbers, counted from 0."""
        return torch.searchsorted(before, numbers.to(torch.int32) + 1) - 1 + lo

    # One wait for the device, not one a tile: for how many cells there are, and where as many tiles
    # as there may be begin and end.
    count = before[-1:].long()
    starts = torch.arange(0, hi - lo, tile_cells, device=before.device)
    lasts = torch.minimum(starts + tile_cells, count) - 1
    count, *bounds = torch.cat((count, cells(starts), cells(lasts))).tolist()
    for i, start in enumerate(range(0, count, tile_cells)):
        numbers = torch.arange(start, min(start + tile_cells, count), device=before.device)
        yield Tile(cells(numbers), bounds[i], bounds[len(starts) + i], start, before)


def empty_cells(enc, size, n_durations, dtype) -> Cells:
    # As many as the padded batch has, so that the shapes follow from those of the inputs; on a CPU
    # memory that is not touched costs nothing.
    dtype = wide_type(dtype)
    one = [enc.new_empty(size, dtype=dtype) for _ in range(4)]
    return Cells(*one, enc.new_empty((size, n_durations), dtype=dtype))


def empty_sums(inputs, wants_states, wants_output, dtype) -> list[Tensor]:
    wanted = (wants_states, wants_states, wants_output, wants_output)
    dtype = wide_type(dtype)
    return [
        x.new_empty(x.shape if want else 0, dtype=dtype)
        for x, want in zip(inputs, wanted, strict=True)
    ]


def sums_of_clips(job: Job, values: Tensor) -> Tensor:
    """Of each clip's cells, (B,), in a fixed order (a cumsum of floats has none on a GPU)."""
    lengths = job.frames * job.rows
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
