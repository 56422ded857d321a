"""What the fused loss's Triton kernels share: clips of cells, dropout's hash, online softmax."""

import triton
import triton.language as tl

from .fused_vectorised import dropout_threshold

# Arguments that change from batch to batch. Compiled apart for values of 1 and multiples of 16, as
# is usual, kernels would take the first minutes of a run.
SIZES = ("n", "first", "last", "lowest", "start", "first_clip")
SIZES += ("n_frames", "n_rows", "n_clips", "n_cells", "max_frames", "max_rows")
SEEDS = ("seed_low", "seed_high", "threshold")
ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}


def clips_of(job):
    return job.offsets, job.rows, len(job.rows)


def clip_block(job) -> int:
    return max(64, triton.next_power_of_2(len(job.rows)))  # one kernel for most batches


def dropout_of(job):
    threshold = dropout_threshold(job.dropout)
    return job.seed & 0xFFFFFFFF, job.seed >> 32, threshold, 1.0 / (1.0 - job.dropout)


@triton.jit
def clip_of(cell, offsets_ptr, n_clips, CLIPS: tl.constexpr):
    """Clip of cells (M,), as the number of clips that start at or before each."""
    clip = tl.arange(0, CLIPS)
    offsets = tl.load(offsets_ptr + clip, mask=clip < n_clips, other=1 << 62)
    return tl.sum((cell[:, None] >= offsets[None, :]).to(tl.int32), 1) - 1


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(cell, channel, seed_low, seed_high, threshold):
    """Dropout's mask (M, H) of cells (M,) and channels (H,); `keep` in fused_vectorised.py."""
    key = _mix(cell.to(tl.uint32) ^ tl.cast(seed_low, tl.uint32)) ^ tl.cast(seed_high, tl.uint32)
    bits = _mix(key[:, None] + (channel.to(tl.uint32) * 0x9E3779B9)[None, :])
    return bits.to(tl.int64) >= threshold


@triton.jit
def wide(x):
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def fold(z, top, total):
    """Running maximum and sum of exponentials with these columns added."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
    return new, total
