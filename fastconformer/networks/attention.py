"""Self-attention with relative positions: full (also limited and chunked by a mask) and local.

Source: Transformer-XL (arXiv:1901.02860) as in NeMo's RelPositionMultiHeadAttention, and the
sliding window with global tokens of NeMo's RelPositionMultiHeadAttentionLongformer.
Letters: B clips, T frames, D width, H heads, K head width, G global tokens.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .linear import Linear

KEPT_FRAMES = 512  # the longest clip whose projected positions are kept between calls
SCORE_BYTES, SCORE_BYTES_GPU = 1 << 21, 1 << 29  # of the scores that are in memory at once


def position_encoding(positions: torch.Tensor, d_model: int) -> torch.Tensor:
    """Sines and cosines of `positions` (P,), interleaved: (P, D) float32."""
    rate = torch.exp(
        torch.arange(0, d_model, 2, dtype=torch.float32, device=positions.device)
        * -(math.log(10000.0) / d_model)
    )
    angle = positions.float()[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def _masked_value(dtype: torch.dtype) -> float:
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
        q, k, v = (self._heads(f(x)) for f in (self.linear_q, self.linear_k, self.linear_v))
        p = self._heads(self._project(pos_emb)[None]) * self.d_head**-0.5  # (1, H, 2T-1, K)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
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
                unseen, _masked_value(position.dtype)
            )
            out = F.scaled_dot_product_attention(
                query + self.pos_bias_u[:, None],
                k,
                v,
                attn_mask=position,
                dropout_p=self.dropout if self.training else 0.0,
            )
            pieces.append(out.transpose(1, 2).flatten(2))
        return self.linear_out(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))

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
                scores.unflatten(0, (b, h)).masked_fill_(unseen, _masked_value(scores.dtype))
            heads = (scores.softmax(-1) @ v).unflatten(0, (b, h))
            out[:, start:stop] = heads.transpose(1, 2)
        return out.flatten(2)


def _relative_shift(x: torch.Tensor, t: int) -> torch.Tensor:
    """Scores of N successive queries by falling distance, (B, H, N, T+N-1), -> by key,
    (B, H, N, T): row i takes columns N-1-i ... N-1-i+T-1."""
    b, h, n, w = x.shape
    x = x.contiguous()
    return x.as_strided((b, h, n, t), (h * n * w, n * w, w - 1, 1), x.storage_offset() + n - 1)


class LocalRelPositionMultiHeadAttention(RelPositionMultiHeadAttention):
    """Each frame sees `left` frames before and `right` after it, and G global tokens; the global
    tokens see all. Work and memory grow linearly with T."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float,
        use_bias: bool,
        context: tuple[int, int],
        global_tokens: int = 0,
        global_tokens_spacing: int = 1,
        global_attn_separate: bool = False,
    ):
        super().__init__(d_model, n_heads, dropout, use_bias)
        self.left, self.right = context
        self.global_tokens, self.global_spacing = global_tokens, global_tokens_spacing
        self.separate = global_attn_separate
        if global_attn_separate:
            self.global_q = Linear(d_model, d_model, bias=use_bias)
            self.global_k = Linear(d_model, d_model, bias=use_bias)
            self.global_v = Linear(d_model, d_model, bias=use_bias)

    def forward(
        self, x: torch.Tensor, pos_emb: torch.Tensor, pad_mask: torch.Tensor
    ) -> torch.Tensor:
        """x (B, T, D), pos_emb (left+right+1, D), pad_mask (B, T) True on padding -> (B, T, D)."""
        t, w = x.shape[1], max(self.left, self.right)
        q, k, v = (self._heads(f(x)) for f in (self.linear_q, self.linear_k, self.linear_v))
        p = self._heads(self.linear_pos(pos_emb)[None])
        scale = self.d_head**-0.5
        low = _masked_value(q.dtype)

        # blocks of w queries see 3w keys: the block before, their own and the next
        extra = -t % w
        n_blocks = (t + extra) // w

        def blocks(y):  # (B, H, T, ...) -> (B, H, blocks, w, ...)
            return F.pad(y, (0, 0, 0, extra)).unflatten(2, (n_blocks, w))

        def windows(y):  # (B, H, T, K) -> (B, H, blocks, 3w, K)
            return F.pad(y, (0, 0, w, w + extra)).unfold(2, 3 * w, w).transpose(-1, -2)

        scores = (blocks(q + self.pos_bias_u[:, None]) * scale) @ windows(k).transpose(-1, -2)
        band = blocks(
            (q + self.pos_bias_v[:, None]) * scale @ p.transpose(-1, -2)
        )  # (.., left+right+1)
        # NeMo quirk kept: where left != right it adds the position scores to the outermost columns
        before = F.pad(band[..., : self.left], (0, 2 * w + 1 - self.left))
        columns = before + F.pad(band[..., self.left :], (2 * w - self.right, 0))
        scores = scores + _skew(columns)
        distance = (
            torch.arange(3 * w, device=x.device) - w - torch.arange(w, device=x.device)[:, None]
        )
        key_pad = F.pad(pad_mask, (w, w + extra), value=True).unfold(1, 3 * w, w)  # (B, blocks, 3w)
        hidden = key_pad[:, None, :, None] | (distance < -self.left) | (distance > self.right)
        scores = scores.masked_fill(hidden, low)

        n_global = 0
        if self.global_tokens:
            index = torch.arange(0, t, self.global_spacing, device=x.device)[: self.global_tokens]
            n_global = len(index)
            gq, gk, gv = q, k, v
            if self.separate:
                gq, gk, gv = (
                    self._heads(f(x)) for f in (self.global_q, self.global_k, self.global_v)
                )
            to_global = blocks(gq * scale @ gk[:, :, index].transpose(-1, -2))
            scores = torch.cat((to_global, scores), dim=-1)
        query_pad = F.pad(pad_mask, (0, extra), value=True).unflatten(1, (n_blocks, w))
        weights = scores.softmax(-1).masked_fill(query_pad[:, None, :, :, None], 0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        out = weights[..., n_global:] @ windows(v)
        if n_global:
            out = out + weights[..., :n_global] @ v[:, :, None, index]
        out = out.flatten(2, 3)[:, :, :t]
        if n_global:
            # NeMo quirk kept: its reshape mixes the global queries over the batch where G > 1
            g_query = gq[:, :, index].permute(2, 0, 1, 3).reshape(*gq.shape[:2], n_global, -1)
            seen = g_query * scale @ gk.transpose(-1, -2)
            seen = seen.masked_fill(pad_mask[:, None, None], low)
            seen = F.dropout(seen.softmax(-1), self.dropout, self.training)
            out = out.index_copy(2, index, seen @ gv)
        return self.linear_out(out.transpose(1, 2).flatten(2))


def _skew(x: torch.Tensor) -> torch.Tensor:
    """(..., w, 2w+1) -> (..., w, 3w): row r is moved r columns to the right."""
    w = x.shape[-2]
    x = F.pad(x, (0, w)).flatten(-2)  # rows of 3w+1
    return x[..., : w * 3 * w].unflatten(-1, (w, 3 * w))
