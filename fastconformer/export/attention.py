"""Self-attention written with operations that ONNX has, over the weights of the trained modules.

The networks' own forms cut long inputs into pieces by Python loops and use strided views; a trace
would keep both as they were for the example. Here every size is computed in the graph, positions
too, so that a graph takes clips of any length.
Letters: B clips, T frames, D width, H heads, K head width.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..networks.attention import RelPositionMultiHeadAttention
from ..networks.conformer import ConformerEncoder
from ..networks.linear import Pointwise
from ..networks.local_attention import LocalRelPositionMultiHeadAttention

MASKED = torch.finfo(torch.float32).min / 2  # finite: a row with nothing to see stays finite


def traceable(encoder: ConformerEncoder) -> ConformerEncoder:
    """A copy over the same tensors whose attention ONNX can express.

    ValueError: it cannot.
    """
    config = encoder.config
    if config.self_attention_model == "rwkv7_attn":
        raise ValueError(
            "encoder.self_attention_model is rwkv7_attn: BiRWKV7 walks over the frames one by one, "
            "forwards and backwards, which is not written in ONNX's operations here; export the "
            "model it was made from"
        )
    if config.global_tokens > 1:
        raise ValueError(
            f"encoder.global_tokens is {config.global_tokens}: with more than one a clip's result "
            "depends on the clips beside it (as in NeMo), and is not exported"
        )
    tensors = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
    encoder = copy.deepcopy(encoder, tensors)
    for layer in encoder.layers:
        local = isinstance(layer.self_attn, LocalRelPositionMultiHeadAttention)
        layer.self_attn = (LocalAttention if local else FullAttention)(layer.self_attn)
    for module in encoder.modules():
        if isinstance(module, Pointwise):  # as matrices, which a trace turns where they lie
            module.weight = nn.Parameter(module.weight.detach().flatten(1))
    return encoder.eval()


def relative_scores(query, p, n_queries, n_keys):
    """(B, H, N, K) of the last N of T frames, p (1, H, N+T, K) for distances T ... -(N-1)
    -> (B, H, N, T): row i takes columns N-i ... N-i+T-1, by reading rows of one less."""
    x = (query @ p.transpose(-1, -2)).flatten(2)[:, :, n_queries:]
    return x.reshape(-1, x.shape[1], n_queries, n_queries + n_keys - 1)[..., :n_keys]


def heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(B, T, D) -> (B, H, T, K)."""
    return x.unflatten(-1, (n_heads, x.shape[-1] // n_heads)).transpose(1, 2)


class FullAttention(nn.Module):
    """As RelPositionMultiHeadAttention; limited and chunked context come in its mask."""

    def __init__(self, trained: RelPositionMultiHeadAttention):
        super().__init__()
        self.trained = trained

    def forward(self, x: torch.Tensor, pos_emb: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), pos_emb (2T-1, D), hidden (B, 1, 1 or T, T) -> (B, T, D)."""
        return self.last_queries(x, x.shape[1], pos_emb, hidden)

    def last_queries(
        self, memory: torch.Tensor, n_queries: int, pos_emb: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Of the last N frames alone over all of memory (B, T, D): pos_emb (N+T-1, D) for distances
        T-1 ... -(N-1) -> (B, N, D)."""
        a, t = self.trained, memory.shape[1]
        q = heads(a.linear_q(memory[:, t - n_queries :]), a.n_heads)
        k, v = heads(a.linear_k(memory), a.n_heads), heads(a.linear_v(memory), a.n_heads)
        p = heads(F.pad(a.linear_pos(pos_emb), (0, 0, 1, 0))[None], a.n_heads)
        scale = a.d_head**-0.5
        scores = ((q + a.pos_bias_u[:, None]) * scale) @ k.transpose(-1, -2)
        position = relative_scores((q + a.pos_bias_v[:, None]) * scale, p, n_queries, t)
        weights = (scores + position).masked_fill(hidden, MASKED).softmax(-1)
        return a.linear_out((weights @ v).transpose(1, 2).flatten(2))


class LocalAttention(nn.Module):
    """As LocalRelPositionMultiHeadAttention, with at most one global token."""

    def __init__(self, trained: LocalRelPositionMultiHeadAttention):
        super().__init__()
        self.trained = trained

    def forward(
        self, x: torch.Tensor, pos_emb: torch.Tensor, pad_mask: torch.Tensor
    ) -> torch.Tensor:
        """x (B, T, D), pos_emb (left+right+1, D), pad_mask (B, T) -> (B, T, D)."""
        a, t = self.trained, x.shape[1]
        w = max(a.left, a.right)
        q, k, v = (heads(f(x), a.n_heads) for f in (a.linear_q, a.linear_k, a.linear_v))
        p = heads(a.linear_pos(pos_emb)[None], a.n_heads)
        scale = a.d_head**-0.5
        extra = (w - t % w) % w

        def blocks(y):  # (B, H, T, ...) -> (B, H, blocks, w, ...)
            y = F.pad(y, (0, 0, 0, extra))
            return y.reshape(y.shape[0], y.shape[1], -1, w, y.shape[3])

        def windows(y):  # (B, H, T, K) -> (B, H, blocks, 3w, K): the block before, own and next
            y = F.pad(y, (0, 0, w, w + extra))
            y = y.reshape(y.shape[0], y.shape[1], -1, w, y.shape[3])
            return torch.cat((y[:, :, :-2], y[:, :, 1:-1], y[:, :, 2:]), dim=3)

        scores = (blocks(q + a.pos_bias_u[:, None]) * scale) @ windows(k).transpose(-1, -2)
        band = blocks((q + a.pos_bias_v[:, None]) * scale @ p.transpose(-1, -2))
        before = F.pad(band[..., : a.left], (0, 2 * w + 1 - a.left))
        scores = scores + _skew(before + F.pad(band[..., a.left :], (2 * w - a.right, 0)), w)
        distance = (
            torch.arange(3 * w, device=x.device) - w - torch.arange(w, device=x.device)[:, None]
        )
        padding = pad_mask.to(x.dtype)[:, None, :, None]  # ONNX pads no booleans
        key_pad = windows(1.0 - padding)[..., 0][:, :, :, None] < 0.5  # (B, 1, blocks, 1, 3w)
        hidden = key_pad | (distance < -a.left) | (distance > a.right)
        scores = scores.masked_fill(hidden, MASKED)
        if a.global_tokens:
            gq, gk, gv = q, k, v
            if a.separate:
                gq, gk, gv = (heads(f(x), a.n_heads) for f in (a.global_q, a.global_k, a.global_v))
            to_global = blocks(gq * scale @ gk[:, :, :1].transpose(-1, -2))
            scores = torch.cat((to_global, scores), dim=-1)
        weights = scores.softmax(-1).masked_fill(blocks(1.0 - padding) < 0.5, 0.0)
        out = weights[..., 1 if a.global_tokens else 0 :] @ windows(v)
        if a.global_tokens:
            out = out + weights[..., :1] @ v[:, :, None, :1]
        out = out.flatten(2, 3)[:, :, :t]
        if a.global_tokens:
            seen = gq[:, :, :1] * scale @ gk.transpose(-1, -2)
            seen = seen.masked_fill(pad_mask[:, None, None], MASKED).softmax(-1)
            out = torch.cat((seen @ gv, out[:, :, 1:]), dim=2)
        return a.linear_out(out.transpose(1, 2).flatten(2))


def _skew(x: torch.Tensor, w: int) -> torch.Tensor:
    """(..., w, 2w+1) -> (..., w, 3w): row r is moved r columns to the right."""
    return F.pad(x, (0, w)).flatten(-2)[..., : 3 * w * w].unflatten(-1, (w, 3 * w))
