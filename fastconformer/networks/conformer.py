"""FastConformer encoder: subsampling, then Conformer layers. Source: NeMo's ConformerEncoder.

Features (B, M, T) and lengths (B,) in, (B, T', D) and lengths out.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import EncoderConfig
from .attention import (
    LocalRelPositionMultiHeadAttention,
    RelPositionMultiHeadAttention,
    position_encoding,
)
from .birwkv7 import BiRWKV7, Carry
from .linear import Linear, Pointwise, linear
from .subsampling import ConvSubsampling, Reduction
from .tiles import in_tiles


class FeedForward(nn.Module):
    """Linear, SiLU, dropout, linear."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, use_bias: bool):
        super().__init__()
        self.linear1 = Linear(d_model, d_ff, bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(d_ff, d_model, bias=use_bias)

    def forward(self, x):
        return self.linear2(self.dropout(self.linear1(x, "swish")))


class Convolution(nn.Module):
    """Pointwise GLU, depthwise convolution, norm, SiLU, pointwise.

    The norm is called `batch_norm` whatever its kind, as in NeMo's checkpoints.
    """

    def __init__(
        self, d_model: int, kernel: int, context: tuple[int, int], norm: str, use_bias: bool
    ):
        super().__init__()
        self.context = context
        self.pointwise_conv1 = Pointwise(d_model, 2 * d_model, 1, bias=use_bias)
        self.depthwise_conv = nn.Conv1d(d_model, d_model, kernel, groups=d_model, bias=use_bias)
        if norm == "batch_norm":
            self.batch_norm = nn.BatchNorm1d(d_model)
        elif norm == "layer_norm":
            self.batch_norm = nn.LayerNorm(d_model)
        elif norm == "instance_norm":
            self.batch_norm = nn.InstanceNorm1d(d_model)
        else:
            self.batch_norm = nn.GroupNorm(int(norm.removeprefix("group_norm")), d_model)
        self.pointwise_conv2 = Pointwise(d_model, d_model, 1, bias=use_bias)

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor) -> torch.Tensor:
        # width-1 convolutions as matrix products: no transposes, faster kernels
        x = linear(x, self.pointwise_conv1.weight, self.pointwise_conv1.bias)
        x = F.glu(x, dim=-1).masked_fill(pad_mask[..., None], 0.0)
        norm, conv = self.batch_norm, self.depthwise_conv
        # (B, D, T), on a CPU with the channels last in memory, as its fast kernel wants them
        on_cpu = x.device.type == "cpu" and not torch.is_grad_enabled()
        if on_cpu:
            x = F.pad(x, (0, 0, *self.context)).transpose(1, 2)
        else:
            x = F.pad(x.transpose(1, 2), self.context)
        if isinstance(norm, nn.BatchNorm1d) and not norm.training:
            # fixed statistics: fold the norm into the convolution's weights
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            bias = norm.bias - norm.running_mean * scale
            bias = bias if conv.bias is None else bias + conv.bias * scale
            weight = conv.weight * scale[:, None, None]
            # pure bfloat16 training keeps the norm in float32
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            if on_cpu:
                x = F.conv2d(x[:, :, None], weight[:, :, None], bias, groups=conv.groups)[:, :, 0]
            else:
                x = F.conv1d(x, weight, bias, groups=conv.groups)
            x = x.transpose(1, 2)
        elif isinstance(norm, nn.LayerNorm):
            x = norm(conv(x).transpose(1, 2))
        else:
            x = norm(conv(x)).transpose(1, 2)
        return linear(F.silu(x), self.pointwise_conv2.weight, self.pointwise_conv2.bias)


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm; residuals around each."""

    def __init__(self, config: EncoderConfig, pos_bias_u=None, pos_bias_v=None, layer_id: int = 0):
        super().__init__()
        d, dropout, bias = config.d_model, config.dropout, config.use_bias
        d_ff = d * config.ff_expansion_factor
        self.norm_feed_forward1 = nn.LayerNorm(d)
        self.feed_forward1 = FeedForward(d, d_ff, dropout, bias)
        self.norm_self_att = nn.LayerNorm(d)
        if config.self_attention_model == "rel_pos":
            self.self_attn = RelPositionMultiHeadAttention(
                d, config.n_heads, config.dropout_att, bias, pos_bias_u, pos_bias_v
            )
        elif config.self_attention_model == "rwkv7_attn":
            self.self_attn = BiRWKV7(
                d, config.n_heads, layer_id, config.n_layers, config.wkv_head_size
            )
        else:
            self.self_attn = LocalRelPositionMultiHeadAttention(
                d,
                config.n_heads,
                config.dropout_att,
                bias,
                config.att_contexts[0],
                config.global_tokens,
                config.global_tokens_spacing,
                config.global_attn_separate,
            )
        self.norm_conv = nn.LayerNorm(d)
        self.conv = Convolution(
            d, config.conv_kernel_size, config.conv_context, config.conv_norm_type, bias
        )
        self.norm_feed_forward2 = nn.LayerNorm(d)
        self.feed_forward2 = FeedForward(d, d_ff, dropout, bias)
        self.dropout = nn.Dropout(dropout)
        self.norm_out = nn.LayerNorm(d)

    def forward(self, x, pos_emb, att_mask, pad_mask, v_first=None, carry=None):
        """x (B, T, D); `att_mask` as the attention takes it; pad_mask (B, T), True on padding.

        Returns (B, T, D). With BiRWKV7 (where pos_emb and att_mask are None) a pair: it, and
        `v_first` (B, T, D), which the next layer takes; `carry` is of the frames before x.
        """
        x = self._half_step(x, self.norm_feed_forward1, self.feed_forward1)
        recurrent = isinstance(self.self_attn, BiRWKV7)
        if recurrent:
            mixed, v_first = self.self_attn(self.norm_self_att(x), v_first, pad_mask, carry)
        else:
            mixed = self.self_attn(self.norm_self_att(x), pos_emb, att_mask)
        x = x + self.dropout(mixed)
        del mixed
        x = self._convolve(x, pad_mask, carry)
        x = self.norm_out(self._half_step(x, self.norm_feed_forward2, self.feed_forward2))
        return (x, v_first) if recurrent else x

    def _half_step(self, x, norm, feed_forward):
        def piece(start, stop):
            y = x[:, start:stop]
            return (y + 0.5 * self.dropout(feed_forward(norm(y))),)

        return in_tiles(piece, x)[0]

    def _convolve(self, x, pad_mask, carry):
        left, right = self.conv.context
        if carry is not None:  # once more without one, over the frames before and these
            n, before = x.shape[1], carry.before_convolution
            if before is not None:
                x = torch.cat((before, x), dim=1)
                pad_mask = F.pad(pad_mask, (before.shape[1], 0))  # clips that end have no frames
            kept = x.shape[1] - n + carry.n_kept
            carry.before_convolution = x[:, max(0, kept - left) : kept]
            return self._convolve(x, pad_mask, None)[:, -n:]

        def piece(start, stop):
            first, last = max(0, start - left), min(x.shape[1], stop + right)
            y = self.conv(self.norm_conv(x[:, first:last]), pad_mask[:, first:last])
            return (x[:, start:stop] + self.dropout(y[:, start - first : stop - first]),)

        if isinstance(self.conv.batch_norm, (nn.GroupNorm, nn.InstanceNorm1d)):
            return piece(0, x.shape[1])[0]  # norms over all of time
        return in_tiles(piece, x)[0]


class ConformerEncoder(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        channels = config.subsampling_conv_channels
        self.pre_encode = ConvSubsampling(
            config.subsampling,
            config.subsampling_factor,
            config.feat_in,
            d,
            d if channels == -1 else channels,
            config.causal_downsampling,
        )
        biases = ()
        if not config.untie_biases and config.self_attention_model == "rel_pos":
            shape = (config.n_heads, d // config.n_heads)
            # tied biases: one pair, shared by (and saved with) every layer
            biases = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.layers = nn.ModuleList(
            ConformerLayer(config, *biases, layer_id=i) for i in range(config.n_layers)
        )
        self.out_proj = Linear(d, config.d_out) if config.d_out != d else None
        self.reduces_after = None  # a layer, -1: the output
        if config.reduces:
            self.reduces_after = config.reduction_position
            self.reduction_subsampling = Reduction(config.reduction, config.reduction_factor, d)
        self.dropout_input = nn.Dropout(
            config.dropout
            if config.self_attention_model == "rel_pos_local_attn"
            else config.dropout_pre_encoder
        )
        self.dropout_emb = nn.Dropout(config.dropout_emb)
        self.drop_probs = _layer_drop_probs(config)
        self.recompute = False  # in training: keep only each layer's input, for less memory

    def tie_biases(self):
        """Makes all layers share the first one's position biases, where the config ties them."""
        if not self.config.untie_biases and self.config.self_attention_model == "rel_pos":
            for layer in self.layers:
                layer.self_attn.pos_bias_u = self.layers[0].self_attn.pos_bias_u
                layer.self_attn.pos_bias_v = self.layers[0].self_attn.pos_bias_v

    def forward(self, features: torch.Tensor, lengths: torch.Tensor):
        """features (B, M, T), lengths (B,) -> encoded (B, T', D), lengths (B,)."""
        x, lengths = self.pre_encode(features, lengths)
        x, pos_emb, att_mask, pad_mask = self.prepare(x, lengths)
        v_first = None
        for i, (layer, drop_prob) in enumerate(zip(self.layers, self.drop_probs)):
            if self.recompute and torch.is_grad_enabled():
                layer = partial(_recomputed, layer)
            if self.training and drop_prob > 0.0:
                # stochastic depth (arXiv:2102.03216), expectation kept
                kept = (torch.rand(()) >= drop_prob).to(x.dtype)
                y, v_first = self._layer(layer, x, pos_emb, att_mask, pad_mask, v_first)
                x = x + (y - x) * kept / (1.0 - drop_prob)
            else:
                x, v_first = self._layer(layer, x, pos_emb, att_mask, pad_mask, v_first)
            if i == self.reduces_after:
                x, lengths = self.reduction_subsampling(x, lengths)
                pos_emb, att_mask, pad_mask = self._positions_and_masks(x, lengths)
        x = x if self.out_proj is None else self.out_proj(x)
        return self.reduction_subsampling(x, lengths) if self.reduces_after == -1 else (x, lengths)

    @torch.no_grad()
    def encode_in_chunks(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        chunk_frames: int,
        look_ahead_frames: int,
    ):
        """As `forward`, for BiRWKV7, with the layers' memory bounded whatever the length.

        Chunk after chunk, the forward states, and what the convolutions see, come from the chunks
        before as in one pass; what comes after is seen for `look_ahead_frames` (encoder frames)
        beyond the chunk. Equal to `forward` where that reaches the end.

        Raises:
            ValueError: an encoder with attention, or counts out of range.
        """
        if self.config.self_attention_model != "rwkv7_attn":
            raise ValueError(
                f"chunks with carried state need BiRWKV7, this encoder has "
                f"{self.config.self_attention_model}; convert it with converters.to_birwkv7"
            )
        if chunk_frames < 1 or look_ahead_frames < 0:
            raise ValueError(
                f"chunk_frames is {chunk_frames} and look_ahead_frames {look_ahead_frames}, "
                "expected at least 1 and 0"
            )
        whole, lengths = self.pre_encode(features, lengths)
        whole, _, _, pad_mask = self.prepare(whole, lengths)
        t = whole.shape[1]
        encoded = whole.new_empty(whole.shape[0], t, self.config.d_out)
        carries = [Carry() for _ in self.layers]
        for start in range(0, t, chunk_frames):
            stop = min(start + chunk_frames, t)
            last = min(stop + look_ahead_frames, t)
            x, v_first = whole[:, start:last], None
            for layer, carry in zip(self.layers, carries):
                carry.n_kept = stop - start
                x, v_first = layer(x, None, None, pad_mask[:, start:last], v_first, carry)
            x = x[:, : stop - start]
            encoded[:, start:stop] = x if self.out_proj is None else self.out_proj(x)
        return encoded, lengths

    def _layer(self, layer, x, pos_emb, att_mask, pad_mask, v_first):
        if self.config.self_attention_model == "rwkv7_attn":
            return layer(x, pos_emb, att_mask, pad_mask, v_first)
        return layer(x, pos_emb, att_mask, pad_mask), None

    def prepare(self, x: torch.Tensor, lengths: torch.Tensor):
        """Scales the subsampled frames; gives position encodings and masks for the layers."""
        config, t = self.config, x.shape[1]
        if config.self_attention_model == "rwkv7_attn":
            # no positions, and as in the fork no xscaling, which NeMo does where it adds them
            pad_mask = torch.arange(t, device=x.device) >= lengths[:, None]
            return self.dropout_input(x), None, None, pad_mask
        if config.xscaling:
            x = x * math.sqrt(config.d_model)
        positions_and_masks = self._positions_and_masks(x, lengths)
        return self.dropout_input(x), *positions_and_masks

    def _positions_and_masks(self, x: torch.Tensor, lengths: torch.Tensor):
        config, t = self.config, x.shape[1]
        left, right = self._context()
        local = config.self_attention_model == "rel_pos_local_attn"
        first, last = (left, -right) if local else (t - 1, 1 - t)
        positions = torch.arange(first, last - 1, -1, device=x.device)
        pos_emb = self.dropout_emb(position_encoding(positions, config.d_model).to(x.dtype))
        pad_mask = torch.arange(t, device=x.device) >= lengths[:, None]  # (B, T)
        att_mask = (
            pad_mask if local else pad_mask[:, None, None] | self._hidden(t, left, right, x.device)
        )
        return pos_emb, att_mask, pad_mask

    def _context(self) -> tuple[int, int]:
        contexts = self.config.att_contexts
        if not self.training or len(contexts) == 1:
            return contexts[0]
        weights = torch.tensor(self.config.att_context_probs or [1.0] * len(contexts))
        return contexts[int(torch.multinomial(weights, 1))]

    def _hidden(self, t: int, left: int, right: int, device) -> torch.Tensor:
        """(T or 1, T) True where the context forbids a key."""
        if left < 0 and right < 0:
            return torch.zeros((1, t), dtype=torch.bool, device=device)  # distances would be T x T
        frame = torch.arange(t, device=device)
        if self.config.att_context_style == "chunked_limited" and right >= 0:
            frame = frame // (right + 1)  # whole chunks see each other; right is the look-ahead
            left, right = (left // (right + 1) if left >= 0 else -1), 0
        distance = frame - frame[:, None]  # key minus query
        hidden = torch.zeros((1, t), dtype=torch.bool, device=device)
        if left >= 0:
            hidden = hidden | (distance < -left)
        if right >= 0:
            hidden = hidden | (distance > right)
        return hidden


def _recomputed(layer: nn.Module, *inputs):
    """layer(*inputs), whose inside is computed again in the backward pass (arXiv:1604.06174), with
    the same dropout."""
    return checkpoint(
        layer,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(layer)),
    )


@contextmanager
def _statistics_kept(layer: nn.Module):
    """BatchNorm normalises by the batch as ever, but its statistics do not see it a second time."""
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # their new value is the old one
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _layer_drop_probs(config: EncoderConfig) -> list[float]:
    """Probability of skipping each layer; the first `start_layer` layers are always kept."""
    n, start = config.n_layers, config.stochastic_depth_start_layer
    probability = config.stochastic_depth_drop_prob
    if config.stochastic_depth_mode == "uniform":
        rest = [probability] * (n - start)
    else:
        rest = [probability * i / (n - start) for i in range(1, n - start + 1)]
    return ([0.0] * start + rest)[:n]
