"""WKV7 in chunks: matrix products in plain PyTorch, forward and backward, on any device.

A chunk of C frames turns its entry state M = S^T (key, value) into its outputs and exit state by

    U  = T (A~ M + A_ak V)          T = (I - A_ab)^-1, the triangular (WY) form of the a b^T updates
    Y  = R~ M + A_rk V + A_rb U
    M' = diag(d) M + K-^T V + B-^T U

where A_xy[t, s] = sum_n x_tn y_sn prod(decay_jn, s < j < t) for s < t (r also takes in its own
decay, and the diagonal), A~ and R~ carry the decay since the chunk's start, K- and B- that to its
end, and d that of the whole chunk.

Decays may be anything in [0, 1]. The usual factorisation, exp(G_t) times exp(-G_s) of a cumulative
log decay G, overflows for strong ones. Here the scores come from a binary tree: two frames whose
paths part at a node have between them (product over the right block's frames before t) times
(product over the left block's frames after s). Both are products of decays, never a quotient or a
difference of sums: nothing overflows and errors stay relative. The same tree inverts I - A_ab.

Rows are chunks of one clip and head, (M, C, N). Clips are sorted by falling length and the chunk
index is outermost, so the clips still running are a prefix, and padding is not computed. States are
kept every SEGMENT frames; backward computes those between again.
Letters: B clips, T frames, H heads, N head width, C frames of a chunk, M rows. An axis of 2 holds
the queries (a, r), the keys (k, b) or the values (v, u).
Source of the chunk form: RWKV-7 (arXiv:2503.14456), Yang et al. 2024 (arXiv:2406.06484).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32  # frames; a power of two
SEGMENT = 512  # frames between saved states: N * N / 512 numbers a frame and head
ROWS = 128  # chunks at work at once, about: 1 MiB a tensor for heads 64 wide, for caches' sake
LARGEST_W = 80.0  # exp of more is no float32; the decay is exactly 0 from w = 5 on


def n_segments(frames: int) -> int:
    """How many states `forward` saves for a clip of so many frames."""
    return -(-frames // SEGMENT)


def forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    reverse: bool = False,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    save_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `wkv7_reference`; also returns the states that `backward` starts from.

    Returns:
        y (B, T, H, N) in the dtype of r; the last state (B, H, N, N), [value, key]; the states at
        the start of each segment in the order of the recurrence, (segments, B, H, N, N), [key,
        value], 0 where the clip has ended; none unless save_states. States are float32, or float64
        if r is.
    """
    batch, frames, heads, width = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)
    inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
    y = torch.zeros_like(inputs[0])
    state = r.new_zeros(batch, heads, width, width, dtype=dtype)
    if initial_state is not None:
        state.copy_(initial_state.mT)
    saved = state.new_zeros(n_segments(frames) if save_states else 0, *state.shape)
    for stretch in _stretches(r, lengths, reverse, step=1):
        entry = state[stretch.clips]
        part = stretch.part(inputs, dtype, False)
        outputs, before, exit_state = part.run(stretch.rows_of_chunk, entry.flatten(0, 1))
        stretch.scatter(outputs, y)
        state[stretch.clips] = exit_state.view_as(entry)
        if save_states:
            for chunk, states in enumerate(before, start=stretch.first_chunk):
                if chunk % (SEGMENT // CHUNK) == 0:
                    states = states.unflatten(0, (-1, heads))
                    saved[chunk // (SEGMENT // CHUNK), stretch.clips[: len(states)]] = states
    return y, state.mT.contiguous(), saved


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    saved: Tensor,
    reverse: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of r, w, k, v, a, b, in their dtypes, and of the initial state, in that of states.

    Args:
        grad_y: (B, T, H, N).
        grad_state: gradient of the last state, (B, H, N, N), [value, key]; None for zero.
        saved: from `forward` with save_states and the same other arguments.
    """
    dtype = saved.dtype
    inputs = [x.contiguous() for x in (r, w, k, v, a, b)]
    grad_y = grad_y.contiguous()
    grads = [torch.zeros_like(x) for x in inputs]
    if grad_state is None:
        grad_state = saved.new_zeros(saved.shape[1:])
    else:
        grad_state = grad_state.to(dtype).mT.contiguous()
    for stretch in reversed(list(_stretches(r, lengths, reverse, SEGMENT // CHUNK))):
        part = stretch.part(inputs, dtype, True)
        entry = saved[stretch.first_chunk // (SEGMENT // CHUNK), stretch.clips]
        _, before, _ = part.run(stretch.rows_of_chunk, entry.flatten(0, 1))
        exit_grad = grad_state[stretch.clips]
        *input_grads, entry_grad = part.run_backward(
            stretch.rows_of_chunk,
            before,
            stretch.gather(grad_y, dtype),
            exit_grad.flatten(0, 1),
        )
        for rows, grad in zip(input_grads, grads):
            stretch.scatter(rows, grad)
        grad_state[stretch.clips] = entry_grad.view_as(exit_grad)
    return *grads, grad_state.mT.contiguous()


@dataclass(frozen=True)
class _Stretch:
    """Consecutive chunks of some clips: as much as is worked on at once."""

    clips: Tensor  # (clips,) those that run at its start, longest first
    first_chunk: int
    rows_of_chunk: list[int]  # rows of each chunk index: running clips times heads
    frames: Tensor  # (chunks * C,) index into B * T of every frame, any valid one for padding
    padding: Tensor | None  # which of `frames` are padding
    present: Tensor | None  # the others; None for both: no padding

    def gather(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """(B, T, H, N) to (M, C, N), `fill` on padding."""
        rows = x.flatten(0, 1).index_select(0, self.frames)
        if self.padding is not None:
            rows.index_fill_(0, self.padding, fill)
        rows = rows.unflatten(0, (-1, CHUNK)).transpose(1, 2)
        return rows.to(dtype).contiguous().flatten(0, 1)

    def part(self, inputs: list[Tensor], dtype: torch.dtype, differentiable: bool) -> "_Part":
        """A raw decay of -inf on padding: it keeps the state."""
        r, w, k, v, a, b = inputs
        w = self.gather(w, dtype, fill=-torch.inf)
        r, k, v, a, b = (self.gather(x, dtype) for x in (r, k, v, a, b))
        return _Part(r, w, k, v, a, b, differentiable)

    def scatter(self, rows: Tensor, x: Tensor) -> None:
        """(M, C, N) into the frames of x, (B, T, H, N); frames of padding stay."""
        rows = rows.unflatten(0, (-1, x.shape[2])).transpose(1, 2).to(x.dtype).flatten(0, 1)
        frames = self.frames
        if self.present is not None:
            rows, frames = rows[self.present], frames[self.present]
        x.view(-1, *x.shape[2:]).index_copy_(0, frames, rows)


def _stretches(x: Tensor, lengths: Tensor | None, reverse: bool, step: int) -> Iterator[_Stretch]:
    """Cut (B, T, H, N) into stretches of a multiple of `step` chunks, in each clip's order."""
    batch, frames, heads, _ = x.shape
    known = [frames] * batch if lengths is None else lengths.tolist()
    order = sorted(range(batch), key=lambda clip: -known[clip])
    clips_at_once = max(1, ROWS // (heads * step))
    within = torch.arange(CHUNK, device=x.device)
    for first_clip in range(0, batch, clips_at_once):
        group = order[first_clip : first_clip + clips_at_once]
        counts = [-(-known[clip] // CHUNK) for clip in group]
        first = 0
        while (running := sum(count > first for count in counts)) > 0:
            # Few clips and heads take more chunks at once, so that no operator is tiny.
            last = min(first + step * max(1, ROWS // (running * heads * step)), counts[0])
            rows_of_chunk, clip_of_row, start_of_row = [], [], []
            for chunk in range(first, last):
                present = sum(count > chunk for count in counts)
                rows_of_chunk.append(present * heads)
                clip_of_row += group[:present]
                start_of_row += [chunk * CHUNK] * present
            clip = torch.tensor(clip_of_row, device=x.device)[:, None]
            position = torch.tensor(start_of_row, device=x.device)[:, None] + within
            padded = any(
                start + CHUNK > known[clip] for clip, start in zip(clip_of_row, start_of_row)
            )
            valid, frame = None, position
            if padded or reverse:
                length = torch.tensor([known[clip] for clip in clip_of_row], device=x.device)
                length = length[:, None]
                frame = length - 1 - position if reverse else position
                if padded:
                    valid = (position < length).flatten()
                    frame = frame.clamp(0, frames - 1)
            yield _Stretch(
                torch.tensor(group[:running], device=x.device),
                first,
                rows_of_chunk,
                (clip * frames + frame).flatten(),
                None if valid is None else (~valid).nonzero()[:, 0],
                None if valid is None else valid.nonzero()[:, 0],
            )
            first = last


@dataclass(frozen=True)
class _Level:
    """A level of the tree: pairs of blocks of `size` frames; P pairs in all."""

    size: int
    queries: Tensor  # (P, 2 * size, N), of the right blocks, with the decay since their start
    keys: Tensor  # (P, 2 * size, N), of the left blocks, with the decay to their end
    prefix: Tensor  # (P, size, N), that decay: before each frame of the right block
    suffix: Tensor  # (P, size, N), after each frame of the left block


class _Part:
    """The chunks of a stretch: what the recurrence needs of them, all of them at once.

    Axes of 2 stand before those of frames, so that rows to multiply lie together and elementwise
    work runs over many numbers on end.
    """

    def __init__(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        differentiable: bool,
    ) -> None:
        """Inputs (M, C, N); differentiable keeps what `run_backward` needs."""
        rows, chunk, width = r.shape
        self.r = r
        self.log_decay = torch.exp(w.clamp(max=LARGEST_W)).neg_()
        self.decay = torch.exp(self.log_decay)
        self.raw_queries = torch.stack([a, r * self.decay], dim=1)  # (M, 2, C, N)
        self.raw_keys = torch.stack([k, b], dim=1)
        scores = r.new_zeros(rows, 2 * chunk, 2 * chunk)  # row: query, frame; column: key, frame
        diagonal = scores.view(rows, 2, chunk, 2, chunk).diagonal(dim1=2, dim2=4)  # (M, 2, 2, C)
        diagonal[:, 1] = (r[:, None] * self.raw_keys).sum(-1)
        prefix, suffix = torch.ones_like(r), torch.ones_like(r)
        total = self.decay.view(-1, width)  # of each block
        inverse = r.new_ones(rows * chunk, 1, 1)
        self.levels = []
        size = 1
        while size < chunk:
            left, right = total.view(-1, 2, 1, width).unbind(1)
            before = prefix.view(-1, 2, size, width)[:, 1]
            after = suffix.view(-1, 2, size, width)[:, 0]
            queries = _scaled(_halves(self.raw_queries, size, 1), before)
            keys = _scaled(_halves(self.raw_keys, size, 0), after)
            if differentiable:
                self.levels.append(_Level(size, queries, keys, before.clone(), after.clone()))
            block = torch.bmm(queries, keys.mT).view(-1, 2, size, 2, size)
            _lower_blocks(scores, size).copy_(block.unflatten(0, (rows, -1)))
            inverse = _join(inverse, block[:, 0, :, 1])
            before *= left
            after *= right
            total = (left * right)[:, 0]
            size *= 2
        self.prefix, self.suffix = prefix[:, None], suffix[:, None]  # (M, 1, C, N)
        self.total = total[..., None]  # (M, N, 1)
        self.queries = self.raw_queries * self.prefix
        self.keys = self.raw_keys * self.suffix
        self.inverse = inverse
        self.scores_r = scores[:, chunk:]  # (M, C, 2 * C)
        self.scores_ak = scores[:, :chunk, :chunk]
        # u = inverse (a~ M + scores_ak v), of which only the product with M waits for the state.
        self.values = torch.stack([v, inverse @ (self.scores_ak @ v)], dim=1)
        self.to_u = inverse @ self.queries[:, 0]

    def run(
        self, rows_of_chunk: list[int], state: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """From the entry state (rows, N, N), [key, value], through all chunks. Once only.

        Returns: y (M, C, N), the entry state of each chunk index, the exit state.
        """
        values = self.values.flatten(1, 2)
        parts = (self.to_u, self.values[:, 1], self.keys.flatten(1, 2).mT, values, self.total)
        before = []
        for to_u, u, keys, both, total in zip(*(x.split(rows_of_chunk) for x in parts)):
            ended = None
            if len(state) > len(u):
                state, ended = state[: len(u)], state[len(u) :]
            before.append(state)
            u.baddbmm_(to_u, state)
            state = torch.baddbmm(total * state, keys, both)
            if ended is not None:
                state = torch.cat([state, ended])
        y = torch.bmm(self.scores_r, values).baddbmm_(self.queries[:, 1], torch.cat(before))
        return y, tuple(before), state

    def run_backward(
        self,
        rows_of_chunk: list[int],
        before: tuple[Tensor, ...],
        grad_y: Tensor,
        grad_state: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b, (M, C, N), and of the entry state, after `run`.

        Args:
            before: each chunk's entry state, from `run`.
            grad_y: (M, C, N).
            grad_state: of the exit state, (rows, N, N), [key, value].
        """
        rows, chunk, width = self.decay.shape
        values = self.values.flatten(1, 2)  # (M, 2 * C, N)
        grad_values = self.scores_r.mT @ grad_y  # (M, 2 * C, N)
        # Gradient of (a~ M + scores_ak v, y), the queries' products. As in `run`, the first of them
        # waits only for the gradient of the chunk's exit state.
        inverse = self.inverse.mT
        grad_products = torch.stack([inverse @ grad_values[:, chunk:], grad_y], dim=1)
        from_state = inverse @ self.keys[:, 1]
        parts = (
            from_state,
            grad_products[:, 0],
            self.queries.flatten(1, 2).mT,
            grad_products.flatten(1, 2),
            self.total,
        )
        after = []  # gradient of each chunk's exit state
        for from_exit, first, queries, both, total in reversed(
            list(zip(*(x.split(rows_of_chunk) for x in parts)))
        ):
            ended = None
            if len(grad_state) > len(first):
                grad_state, ended = grad_state[: len(first)], grad_state[len(first) :]
            after.append(grad_state)
            first.baddbmm_(from_exit, grad_state)
            grad_state = torch.baddbmm(total * grad_state, queries, both)
            if ended is not None:
                grad_state = torch.cat([grad_state, ended])
        before, after = torch.cat(before), torch.cat(after[::-1])
        grad_v = torch.baddbmm(grad_values[:, :chunk], self.keys[:, 0], after)
        grad_v.baddbmm_(self.scores_ak.mT, grad_products[:, 0])
        grad_products = grad_products.flatten(1, 2)
        grad_scores = grad_products @ values.mT
        shape = (rows, 2, chunk, width)
        grad_queries = (grad_products @ before.mT).view(shape)  # of those with decay
        grad_keys = (values @ after.mT).view(shape)
        # From here on the gradients of decays are those of their logarithms, x * dx: a decay of 0
        # needs no care, and sums run within a block, so no large parts cancel.
        by_prefix = (grad_queries * self.queries).sum(1)
        by_suffix = (grad_keys * self.keys).sum(1)
        by_total = (before * after).sum(-1) * self.total[..., 0]  # of each block
        grad_queries *= self.prefix
        grad_keys *= self.suffix
        for level in reversed(self.levels):
            size = level.size
            right = by_prefix.view(-1, 2, size, width)[:, 1]
            left = by_suffix.view(-1, 2, size, width)[:, 0]
            by_total = torch.stack([right.sum(1), left.sum(1)], 1) + by_total.view(-1, 1, width)
            block = _lower_blocks(grad_scores, size).reshape(-1, 2 * size, 2 * size)
            of_queries, of_keys = torch.bmm(block, level.keys), torch.bmm(block.mT, level.queries)
            right += (of_queries * level.queries).view(-1, 2, size, width).sum(1)
            left += (of_keys * level.keys).view(-1, 2, size, width).sum(1)
            pairs = (rows, -1, 2, size, width)
            _halves(grad_queries, size, 1).addcmul_(
                of_queries.view(pairs), level.prefix.unflatten(0, (rows, -1, 1))
            )
            _halves(grad_keys, size, 0).addcmul_(
                of_keys.view(pairs), level.suffix.unflatten(0, (rows, -1, 1))
            )
        grad_a, grad_decayed_r = grad_queries.unbind(1)
        by_decay = by_total.view(rows, chunk, width) + grad_decayed_r * self.raw_queries[:, 1]
        diagonal = grad_scores.view(rows, 2, chunk, 2, chunk).diagonal(dim1=2, dim2=4)[:, 1]
        diagonal = diagonal[..., None]  # (M, 2, C, 1)
        grad_r = grad_decayed_r * self.decay + (diagonal * self.raw_keys).sum(1)
        grad_keys.addcmul_(diagonal, self.r[:, None])
        grad_k, grad_b = grad_keys.unbind(1)
        return grad_r, by_decay * self.log_decay, grad_k, grad_v, grad_a, grad_b, grad_state


def _halves(x: Tensor, size: int, half: int) -> Tensor:
    """View of (M, 2, C, N): each pair's left (0) or right (1) block, (M, pairs, 2, size, N)."""
    return x.unflatten(2, (-1, 2, size))[:, :, :, half].transpose(1, 2)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """(M, pairs, 2, size, N) times (P, size, N): (P, 2 size, N), its rows together."""
    out = x.new_empty(x.shape)  # else it would take the strides of x
    torch.mul(x, factor.unflatten(0, (len(x), -1, 1)), out=out)
    return out.flatten(2, 3).flatten(0, 1)


def _lower_blocks(scores: Tensor, size: int) -> Tensor:
    """View of (M, 2C, 2C): each pair's right queries by left keys, (M, pairs, 2, size, 2, size)."""
    pairs = scores.shape[1] // (4 * size)
    blocks = scores.view(-1, 2, pairs, 2, size, 2, pairs, 2, size)
    return blocks[:, :, :, 1, :, :, :, 0].diagonal(dim1=2, dim2=5).movedim(-1, 1)


def _join(inverse: Tensor, block: Tensor) -> Tensor:
    """Inverses of I - L of blocks, (2P, s, s), to those of pairs, (P, 2s, 2s), `block` below."""
    left, right = inverse.unflatten(0, (-1, 2)).unbind(1)
    size = block.shape[-1]
    joined = inverse.new_zeros(len(left), 2 * size, 2 * size)
    joined[:, :size, :size] = left
    joined[:, size:, size:] = right
    joined[:, size:, :size] = torch.bmm(torch.bmm(right, block), left)
    return joined
