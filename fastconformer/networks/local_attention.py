"""Self-attention with relative positions over a sliding window, with global tokens.

Source: NeMo's RelPositionMultiHeadAttentionLongformer.
Letters: B clips, T frames, D width, H heads, K head width, G global tokens.
"""

import torch
from torch.nn import functional as F

from . import kernels
from .attention import RelPositionMultiHeadAttention, masked_value
from .linear import Linear


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
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        drops = self.training and self.dropout > 0
        # the plain form keeps a quirk where left != right
        simple = self.left == self.right and not self.global_tokens and not drops
        compiled = kernels.for_cpu(q) if simple else None
        if compiled is not None:
            p, context = self._project(pos_emb), (self.left, self.right)
            if t <= self.left:  # all see all
                p, context = p[self.left + 1 - t : self.left + t], None
            hidden = pad_mask[:, None, None]
            out = self._compiled(q, k, v, p, hidden, compiled.softmax_of_sums, context)
            return self.linear_out(out.masked_fill_(pad_mask[..., None], 0.0))
        q, k, v, p = (self._heads(y) for y in (q, k, v, self.linear_pos(pos_emb)[None]))
        scale = self.d_head**-0.5
        low = masked_value(q.dtype)

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
