"""The SAN-M encoder of SenseVoice, and the small Transformer that FunASR puts behind it twice.

Attention in SAN-M is the usual one plus a memory: a depthwise convolution over the values. With
values v (B, T, D), before they are split into heads:

    memory = m * (conv(m * v) + m * v)          m: 1 on valid rows, 0 on padding
    output = linear_out(attention) + memory

Input and output are (B, T, D) and lengths (B,). Module names are FunASR's.
Source: Gao et al. 2020 (arXiv:2006.01713); FunASR's SenseVoiceEncoderSmall and adaptors.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def valid_rows(lengths: Tensor, n_rows: int) -> Tensor:
    """(B,) -> (B, T), True on rows inside each clip."""
    return torch.arange(n_rows, device=lengths.device) < lengths[:, None]


def sinusoids(n_rows: int, width: int, device: torch.device) -> Tensor:
    """Positions 1 ... T as (T, D): all sines, then all cosines; timescales 1 ... 10000 in
    D / 2 steps, of which the last is reached (so D / 2 - 1 divides)."""
    step = math.log(10000.0) / (width / 2 - 1)
    scales = torch.exp(torch.arange(width // 2, device=device, dtype=torch.float32) * -step)
    position = torch.arange(1, n_rows + 1, device=device, dtype=torch.float32)
    angles = position[:, None] * scales[None]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, H, T, K)


class FeedForward(nn.Module):
    """linear, ReLU, linear."""

    def __init__(self, d_model: int, d_inner: int, dropout: float):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d_model, d_inner), nn.Linear(d_inner, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


class SANMAttention(nn.Module):
    """Self-attention with the convolutional memory over its values."""

    def __init__(self, d_in: int, d_model: int, n_heads: int, kernel: int, dropout: float):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"width {d_model} is no multiple of {n_heads} heads")
        self.n_heads, self.kernel = n_heads, kernel
        self.linear_q_k_v = nn.Linear(d_in, 3 * d_model)
        self.linear_out = nn.Linear(d_model, d_model)
        self.fsmn_block = nn.Conv1d(d_model, d_model, kernel, groups=d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def memory(self, values: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, D)."""
        values = values * valid[:, :, None]
        left = (self.kernel - 1) // 2
        padded = F.pad(values.transpose(1, 2), (left, self.kernel - 1 - left))
        summed = self.fsmn_block(padded).transpose(1, 2) + values
        return self.dropout(summed) * valid[:, :, None]

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D_in), (B, T) -> (B, T, D)."""
        q, k, v = self.linear_q_k_v(x).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            *(_heads(part, self.n_heads) for part in (q, k, v)),
            attn_mask=valid[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        attended = self.linear_out(attended.transpose(1, 2).flatten(2))
        return attended + self.memory(v, valid)


class SANMLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and, where widths allow, a sum."""

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_heads: int,
        d_inner: int,
        kernel: int,
        dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.self_attn = SANMAttention(d_in, d_model, n_heads, kernel, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_inner, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d_in), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.sums = d_in == d_model

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D_in), (B, T) -> (B, T, D)."""
        attended = self.dropout(self.self_attn(self.norm1(x), valid))
        x = x + attended if self.sums else attended
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class SANMEncoder(nn.Module):
    """Rows of stacked features -> encoded rows, one for one.

    `encoders0` is a list of one layer, from the input's width to the model's; then `encoders`,
    `after_norm`, `tp_encoders` and `tp_norm`. With `recompute`, a layer's inner tensors are made
    again in the backward pass.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_heads: int,
        d_inner: int,
        n_blocks: int,
        n_tp_blocks: int,
        kernel: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.d_model, self.recompute = d_model, False

        def layer(width):
            shape = width, d_model, n_heads, d_inner, kernel
            return SANMLayer(*shape, dropout, attention_dropout)

        self.encoders0 = nn.ModuleList([layer(d_in)])
        self.encoders = nn.ModuleList([layer(d_model) for _ in range(n_blocks - 1)])
        self.tp_encoders = nn.ModuleList([layer(d_model) for _ in range(n_tp_blocks)])
        self.after_norm, self.tp_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    @property
    def layers(self) -> list[SANMLayer]:
        """All layers, in the order of the data."""
        return [*self.encoders0, *self.encoders, *self.tp_encoders]

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D_in), (B,) -> (B, T, D), (B,). Rows beyond a clip's end hold nothing of use."""
        valid = valid_rows(lengths, x.shape[1])
        positions = sinusoids(x.shape[1], x.shape[2], x.device)
        x = (x.float() * self.d_model**0.5 + positions).to(x.dtype)
        for layer in (*self.encoders0, *self.encoders):
            x = self._layer(layer, x, valid)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = self._layer(layer, x, valid)
        return self.tp_norm(x), lengths

    def _layer(self, layer: SANMLayer, x: Tensor, valid: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, x, valid, use_reentrant=False)
        return layer(x, valid)


class AdaptorAttention(nn.Module):
    """Plain self-attention."""

    def __init__(self, d_model: int, n_heads: int, dropout: float):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"width {d_model} is no multiple of {n_heads} heads")
        self.n_heads, self.dropout = n_heads, dropout
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            setattr(self, name, nn.Linear(d_model, d_model))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, D)."""
        attended = F.scaled_dot_product_attention(
            *(
                _heads(part(x), self.n_heads)
                for part in (self.linear_q, self.linear_k, self.linear_v)
            ),
            attn_mask=valid[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_out(attended.transpose(1, 2).flatten(2))


class AdaptorLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and with a sum."""

    def __init__(self, d_model: int, n_heads: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.self_attn = AdaptorAttention(d_model, n_heads, attention_dropout)
        self.feed_forward = FeedForward(d_model, d_model // 4, dropout)
        self.norm1 = nn.LayerNorm(d_model, eps=1e-12)
        self.norm2 = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.norm1(x), valid))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Adaptor(nn.Module):
    """Encoded rows -> rows of another width: to the language model's, and as CTC's decoder.

    `downsample` neighbouring rows become one (1 in all released models). No positions."""

    def __init__(
        self,
        d_in: int,
        d_inner: int,
        d_out: int,
        n_layers: int = 2,
        n_heads: int = 8,
        downsample: int = 1,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.downsample = downsample
        self.linear1 = nn.Linear(d_in * downsample, d_inner)
        self.linear2 = nn.Linear(d_inner, d_out)
        if n_layers:
            layers = (
                AdaptorLayer(d_out, n_heads, dropout, attention_dropout) for _ in range(n_layers)
            )
            self.blocks = nn.ModuleList(layers)
        self.n_layers = n_layers

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D_in), (B,) -> (B, T'', D_out), (B,)."""
        k = self.downsample
        if k > 1:
            # zeros instead of padding's garbage beside the last row: a clip is then the same alone
            # and in a batch (FunASR's is not)
            x = x * valid_rows(lengths, x.shape[1])[:, :, None]
            x = F.pad(x, (0, 0, 0, -x.shape[1] % k))
            x = x.reshape(len(x), -1, k * x.shape[2])
            lengths = (lengths + k - 1).div(k, rounding_mode="floor")
        x = self.linear2(F.relu(self.linear1(x)))
        valid = valid_rows(lengths, x.shape[1])
        for block in self.blocks if self.n_layers else ():
            x = block(x, valid)
        return x, lengths


class CTCOutput(nn.Module):
    """FunASR's `ctc`: one projection to the classes."""

    def __init__(self, d_model: int, n_classes: int):
        super().__init__()
        self.ctc_lo = nn.Linear(d_model, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> raw logits (B, T, V+1)."""
        return self.ctc_lo(x)
