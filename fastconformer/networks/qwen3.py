"""Qwen3, a decoder-only language model: RMSNorm, rotary positions, grouped-query attention with
normalised queries and keys, SwiGLU, and a cache of keys and values.

Letters: B texts, S positions of this call, C positions in the cache with them, D width, H query
heads, G key/value heads, K head width, V vocabulary. Input are embeddings (B, S, D), so that rows
of another network can stand among them. Module names are those of transformers' Qwen3ForCausalLM.
Source: Qwen3's technical report (arXiv:2505.09388) and its config.json.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config.funasr import Qwen3Config


class KeyValueCache:
    """Keys and values of all layers: room for `size` positions, which grows as they are put, of
    which `length` are filled."""

    GROWTH = 64  # positions

    def __init__(self, config: Qwen3Config, batch: int, size: int, like: Tensor):
        shape = 2, config.n_layers, batch, config.n_kv_heads, size, config.head_dim
        self.keys, self.values = like.new_zeros(shape)
        self.length = 0

    def put(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, G, S, K) of one layer; gives all that it has, (B, G, C, K)."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[-2]:
            more = max(end - self.keys.shape[-2], self.GROWTH)
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these texts of the batch alone."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        scale = x.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (x.float() * scale).to(x.dtype)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions (B, S) -> cosines and sines, (B, 1, S, K) float32."""
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[:, None, :, None].float() * theta**-exponent  # (B, 1, S, K / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + K / 2) of the last dimension by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; groups of query heads share a key and a value head."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        d, k = config.hidden_size, config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.q_proj = nn.Linear(d, config.n_heads * k, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_heads * k, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_heads * k, bias=False)
        self.o_proj = nn.Linear(config.n_heads * k, d, bias=False)
        self.q_norm = RMSNorm(k, config.rms_norm_eps)
        self.k_norm = RMSNorm(k, config.rms_norm_eps)

    def forward(self, x: Tensor, turns, mask: Tensor, cache: KeyValueCache | None, layer: int):
        """(B, S, D), cosines and sines, mask (B, 1, S, C) -> (B, S, D)."""

        def split(projected, n_heads):
            return projected.unflatten(-1, (n_heads, -1))

        q = rotate(self.q_norm(split(self.q_proj(x), self.n_heads)).transpose(1, 2), *turns)
        k = rotate(self.k_norm(split(self.k_proj(x), self.n_kv_heads)).transpose(1, 2), *turns)
        v = split(self.v_proj(x), self.n_kv_heads).transpose(1, 2)  # (B, G, S, K)
        if cache is not None:
            k, v = cache.put(layer, k, v)
        repeats = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        attended = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and with a sum."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turns, mask: Tensor, cache: KeyValueCache | None, layer: int):
        """(B, S, D) -> (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), turns, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """transformers' `model`: embedding, layers, last norm."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """The language model. `lm_head` is stored beside the embedding; where the config ties them
    they are one tensor. With `recompute`, layers are run again in the backward pass."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config, self.recompute = config, False
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes the output layer the embedding again, where the config says so; to be called
        after tensors were assigned."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return self.model.embed_tokens(ids)

    def forward(
        self,
        embeds: Tensor,
        valid: Tensor,
        positions: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Last hidden states, normalised; `lm_head` makes logits of them.

        Args:
            embeds: (B, S, D).
            valid: (B, C), True where the cache's and this call's positions hold text, not padding.
            positions: (B, S), counted from the first token that is text.
            cache: takes these positions' keys and values; None: there is nothing before them.
        Returns:
            (B, S, D); rows of padding hold nothing of use.
        """
        n_past = 0 if cache is None else cache.length
        n_new = embeds.shape[1]
        reach = torch.arange(n_past + n_new, device=embeds.device)
        causal = reach[None, :] <= reach[n_past:, None]  # (S, C)
        # Padding sees itself: a row of the softmax without any key would be NaN.
        own = reach[None, :] == reach[n_past:, None]
        mask = ((valid[:, None, :] & causal) | own)[:, None]  # (B, 1, S, C)
        turns = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = embeds
        for number, layer in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, turns, mask, None, number, use_reentrant=False)
            else:
                x = layer(x, turns, mask, cache, number)
        if cache is not None:
            cache.length += n_new
        return self.model.norm(x)
