"""Self-attention with relative positions, full, also limited and chunked by a mask.

Source: Transformer-XL (arXiv:1901.02860) as in NeMo's RelPositionMultiHeadAttention.
Letters: B clips, T frames, D width, H heads, K head width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from . import kernels
from .linear import Linear

KEPT_FRAMES = 512  # the longest clip whose projected positions are kept between calls
SCORE_BYTES, SCORE_BYTES_GPU = 1 << 21, 1 << 29  # of the scores that are in memory at once
LOCAL_BYTES = 256  # of a column of a block's queries, where each sees a window: 64 in float32


def position_encoding(positions: torch.Tensor, d_model: int) -> torch.Tensor:
    """Sines and cosines of `positions` (P,), interleaved: (P, D) float32."""
    rate = torch.exp(
        torch.arange(0, d_model, 2, dtype=torch.float32, device=positions.device)
        * -(math.log(10000.0) / d_model)
    )
    angle = positions.float()[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def masked_value(dtype: torch.dtype) -> float:
    # finite, so that a row with nothing to see stays finite; its exponential is exactly zero
    return torch.finfo(dtype).min / 2


class RelPositionMultiHeadAttention(nn.Module):
    """Full attention: scores (q + u) k^T + (q + v) p^T over sqrt(K)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float,
        use_bias: bool,
        pos_bias_u: nn.Parameter | None = None,
        pos_bias_v: nn.Parameter | None = None,
    ):
        super().__init__()
        self.n_heads, self.d_head, self.dropout = n_heads, d_model // n_heads, dropout
        self.linear_q = Linear(d_model, d_model, bias=use_bias)
        self.linear_k = Linear(d_model, d_model, bias=use_bias)
        self.linear_v = Linear(d_model, d_model, bias=use_bias)
        self.linear_out = Linear(d_model, d_model, bias=use_bias)
        self.linear_pos = Linear(d_model, d_model, bias=False)
        # one pair per layer, or the encoder's own pair tied across layers
        if pos_bias_u is None:
            pos_bias_u = nn.Parameter(torch.zeros(n_heads, self.d_head))
            pos_bias_v = nn.Parameter(torch.zeros(n_heads, self.d_head))
        self.pos_bias_u, self.pos_bias_v = pos_bias_u, pos_bias_v
        self._projected = None, None  # what they were made of, projected positions (2T-1, D)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)  # (B, H, T, K)

    def forward(self, x: torch.Tensor, pos_emb: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), pos_emb (2T-1, D) for distances T-1 ... -(T-1); `hidden` (B, 1, 1 or T, T)
        is True where a key may not be seen. Returns (B, T, D)."""
        drops = self.training and self.dropout > 0
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        p = self._project(pos_emb)
        if kernels.takes(x) and kernels.take_heads(q, self.d_head):
            dropout = (self.dropout, kernels.dropout_seed()) if drops else ()
            inputs = q, k, v, p, self.pos_bias_u, self.pos_bias_v, hidden
            return self.linear_out(kernels.rel_pos_attention(*inputs, *dropout)[0])
        # in float32 PyTorch's softmax is as fast
        bf16 = q.dtype == torch.bfloat16 and not drops
        compiled = kernels.for_cpu(q) if bf16 else None
        if compiled is not None:
            return self.linear_out(self._compiled(q, k, v, p, hidden, compiled.softmax_of_sums))
        q, k, v = (self._heads(y) for y in (q, k, v))
        p = self._heads(p[None]) * self.d_head**-0.5  # (1, H, 2T-1, K)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not drops:
            return self.linear_out(self._in_cache(q, k, v, p, hidden))
        t, pieces = x.shape[1], []
        rows = t
        if not torch.is_grad_enabled():  # queries in pieces: memory does not grow with T's square
            rows = max(
                16, SCORE_BYTES_GPU // (x.shape[0] * self.n_heads * 2 * t * x.element_size())
            )
        for start in range(0, t, rows):
            stop = min(start + rows, t)
            query = q[:, :, start:stop]
            # the distances between these queries and any key
            position = (query + self.pos_bias_v[:, None]) @ p[
                :, :, t - stop : 2 * t - 1 - start
            ].transpose(-2, -1)
            unseen = hidden if hidden.shape[2] == 1 else hidden[:, :, start:stop]
            position = _relative_shift(position, t).masked_fill(
                unseen, masked_value(position.dtype)
            )
            out = F.scaled_dot_product_attention(
                query + self.pos_bias_u[:, None],
                k,
                v,
                attn_mask=position,
                dropout_p=self.dropout if drops else 0.0,
            )
            pieces.append(out.transpose(1, 2).flatten(2))
        return self.linear_out(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))

    def last_queries(
        self, x: torch.Tensor, n: int, pos_emb: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """What `forward` gives for the last n of x's frames, (B, n, D). x (B, T, D); pos_emb
        (T+n-1, D) for distances T-1 ... -(n-1); `hidden` (B, 1, 1, T)."""
        t = x.shape[1]
        q = self._heads(self.linear_q(x[:, t - n :]))
        k, v = self._heads(self.linear_k(x)), self._heads(self.linear_v(x))
        p = self._heads(self.linear_pos(pos_emb)[None])  # (1, H, T+n-1, K)
        position = (q + self.pos_bias_v[:, None]) @ p.transpose(-2, -1)
        scores = (q + self.pos_bias_u[:, None]) @ k.transpose(-2, -1) + _relative_shift(position, t)
        scores = (scores * self.d_head**-0.5).masked_fill(hidden, masked_value(scores.dtype))
        return self.linear_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def _project(self, pos_emb: torch.Tensor) -> torch.Tensor:
        """linear_pos(pos_emb), which depends on T alone: for inference on a CPU, where it is a
        twentieth of the work, the longest seen is kept, and shorter ones are its middle."""
        weight, t = self.linear_pos.weight, (len(pos_emb) + 1) // 2
        if pos_emb.is_cuda or torch.is_grad_enabled() or t > KEPT_FRAMES:
            return self.linear_pos(pos_emb)
        made_of = weight, pos_emb.dtype
        if isinstance(weight, torch.Tensor):
            if weight.is_inference() or torch.is_autocast_enabled("cpu"):
                return self.linear_pos(pos_emb)
            made_of = weight.data_ptr(), weight._version, pos_emb.dtype
        before, kept = self._projected
        if before != made_of or len(kept) < len(pos_emb):
            kept = self.linear_pos(pos_emb)
            self._projected = made_of, kept
        beside = (len(kept) - len(pos_emb)) // 2
        return kept[beside : beside + len(pos_emb)]

    def _compiled(self, q, k, v, p, hidden, softmax_of_sums, context=None) -> torch.Tensor:
        """The same for a CPU with numba: as `_in_cache`, with all that lies between the products in
        one pass. q, k, v (B, T, D); p (2T-1, D), or with `context` (left, right), the frames that a
        query sees around it, (left+right+1, D) -> (B, T, D)."""
        (b, t, _), h = q.shape, self.n_heads
        left, right = context or (t, t)
        q, k, v = (self._heads(y) for y in (q, k, v))
        to_key, to_position = q.new_empty(b, h, t, self.d_head), q.new_empty(h, b, t, self.d_head)
        torch.add(q, self.pos_bias_u[:, None], out=to_key)
        torch.add(q.transpose(0, 1), self.pos_bias_v[:, None, None], out=to_position)
        # heads apart in memory: oneDNN's bfloat16 product of them takes a third of the time
        k, v = k.contiguous().flatten(0, 1).transpose(1, 2), v.contiguous().flatten(0, 1)
        p, to_key = self._heads(p[None])[0].contiguous(), to_key.flatten(0, 1)
        hidden = hidden if bool(hidden.any()) else None
        if context is None:
            rows = SCORE_BYTES // (b * h * t * q.element_size())
            rows, farthest = max(16, min(rows, 512 // q.element_size())), t - 1
        else:  # zeros for the distances that the first and last queries of a block alone have
            rows = LOCAL_BYTES // q.element_size()
            farthest, p = left + rows - 1, F.pad(p, (0, 0, rows - 1, rows - 1))
        p = p.transpose(1, 2)  # (H, K, distances from `farthest` on)
        out = q.new_empty(b, t, h, self.d_head)
        for start in range(0, t, rows):
            stop = min(start + rows, t)
            first, last = max(0, start - left), min(t, stop + right)  # keys that any of them sees
            distances = p[:, :, farthest - (stop - 1 - first) : farthest - (start - last)]
            position = to_position[:, :, start:stop].flatten(1, 2) @ distances
            scores = to_key[:, start:stop] @ k[:, :, first:last]
            unseen = hidden
            if hidden is not None:
                queries = slice(start, stop) if hidden.shape[2] > 1 else slice(None)
                unseen = hidden[:, :, queries, first:last]
            by_clip = scores.unflatten(0, (b, h)), position.unflatten(1, (b, -1))
            reach = left - start + first, right + start - first
            softmax_of_sums(*by_clip, unseen, self.d_head**-0.5, reach)
            out[:, start:stop] = (scores @ v[:, first:last]).unflatten(0, (b, h)).transpose(1, 2)
        return out.flatten(2)

    def _in_cache(self, q, k, v, p, hidden) -> torch.Tensor:
        """The same for a CPU: few queries at a time, so that their scores stay in its caches, and
        no more distances than these queries have. q, k, v (B, H, T, K), p (1, H, 2T-1, K) scaled
        -> (B, T, D)."""
        b, h, t, _ = q.shape
        to_key = (q + self.pos_bias_u[:, None]).mul_(self.d_head**-0.5).flatten(0, 1)
        to_position = (q + self.pos_bias_v[:, None]).flatten(0, 1)
        k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
        p = p.expand(b, -1, -1, -1).flatten(0, 1).transpose(1, 2)  # (B H, K, 2T-1)
        masked = bool(hidden.any())
        rows = SCORE_BYTES // (b * h * t * q.element_size())
        rows = max(16, min(rows, 512 // q.element_size()))
        out = q.new_empty(b, t, h, q.shape[3])
        for start in range(0, t, rows):
            stop = min(start + rows, t)
            position = to_position[:, start:stop] @ p[:, :, t - stop : 2 * t - 1 - start]
            position = _relative_shift(position.unflatten(0, (b, h)), t)
            scores = torch.baddbmm(position.flatten(0, 1), to_key[:, start:stop], k)
            if masked:
                unseen = hidden if hidden.shape[2] == 1 else hidden[:, :, start:stop]
                scores.unflatten(0, (b, h)).masked_fill_(unseen, masked_value(scores.dtype))
            heads = (scores.softmax(-1) @ v).unflatten(0, (b, h))
            out[:, start:stop] = heads.transpose(1, 2)
        return out.flatten(2)


def _relative_shift(x: torch.Tensor, t: int) -> torch.Tensor:
    """Scores of N successive queries by falling distance, (B, H, N, T+N-1), -> by key,
    (B, H, N, T): row i takes columns N-1-i ... N-1-i+T-1."""
    n, w = x.shape[2:]
    # Rows of w - 1 in a row, from N - 1 on: a view, which torch.compile follows.
    return x.flatten(2)[..., n - 1 :].unfold(2, t, max(1, w - 1))[:, :, :n]
