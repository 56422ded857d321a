"""One Conformer layer: feed-forwards, attention or BiRWKV7, convolution. Source: NeMo's
ConformerLayer and its modules."""

import torch
from torch import nn
from torch.nn import functional as F

from ..config import EncoderConfig
from ..config.encoder import ADAPTER_ACTIVATIONS, AdapterConfig
from . import kernels
from .attention import RelPositionMultiHeadAttention
from .birwkv7 import BiRWKV7
from .linear import Linear, Pointwise, linear
from .local_attention import LocalRelPositionMultiHeadAttention
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
        self._folded = None, None  # what they were made of, weights with the norm in them

    def forward(self, x: torch.Tensor, pad_mask: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), pad_mask (B, T) True on padding -> (B, T, D)."""
        norm = self.batch_norm
        fixed = isinstance(norm, nn.BatchNorm1d) and not norm.training
        if fixed and kernels.usable(x):
            conv, x = self.depthwise_conv, self._widened(x)
            norms = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
            arguments = conv.weight, conv.bias, norms, norm.eps, self.context[0]
            x = kernels.gated_convolution(x, pad_mask, *arguments)
            return linear(x, self.pointwise_conv2.weight, self.pointwise_conv2.bias)
        compiled = kernels.for_cpu(x) if fixed else None
        if compiled is not None:
            x, left = self._widened(x), self.context[0]
            x = compiled.gated_convolution(x, pad_mask, *self._kept_fold(), left)
            return linear(x, self.pointwise_conv2.weight, self.pointwise_conv2.bias)
        x = self._gated(x, pad_mask)
        if fixed:
            x = self._with_fixed_statistics(x)
        else:
            x = self._normed(self.depthwise_conv(self._padded(x)))
        return linear(F.silu(x), self.pointwise_conv2.weight, self.pointwise_conv2.bias)

    def after(self, x: torch.Tensor, pad_mask: torch.Tensor, before: torch.Tensor):
        """The same for a causal convolution, in eval mode, of frames that follow others: `before`
        (B, D, K-1) is what the depthwise convolution saw last. Returns (B, T, D) and what it has
        seen last now."""
        x = self._gated(x, pad_mask)
        seen = torch.cat((before, x.transpose(1, 2)), 2)
        x = self._normed(self.depthwise_conv(seen))
        x = linear(F.silu(x), self.pointwise_conv2.weight, self.pointwise_conv2.bias)
        return x, seen[:, :, seen.shape[2] - before.shape[2] :]

    def _gated(self, x: torch.Tensor, pad_mask: torch.Tensor) -> torch.Tensor:
        return F.glu(self._widened(x), dim=-1).masked_fill(pad_mask[..., None], 0.0)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        # width-1 convolutions as matrix products: no transposes, faster kernels
        return linear(x, self.pointwise_conv1.weight, self.pointwise_conv1.bias)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, T) -> (B, T, D)."""
        norm = self.batch_norm
        over_channels = isinstance(norm, nn.LayerNorm)
        return norm(x.transpose(1, 2)) if over_channels else norm(x).transpose(1, 2)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, D, T + context), on a CPU with the channels last in memory, as its fast
        kernel wants them."""
        if _is_inference_on_cpu(x):
            return F.pad(x, (0, 0, *self.context)).transpose(1, 2)
        return F.pad(x.transpose(1, 2), self.context)

    def _with_fixed_statistics(self, x: torch.Tensor) -> torch.Tensor:
        """Depthwise convolution and BatchNorm in one. (B, T, D) -> (B, T, D)."""
        conv, on_cpu = self.depthwise_conv, _is_inference_on_cpu(x)
        x = self._padded(x)
        weight, bias = self._folded_norm()
        # pure bfloat16 training keeps the norm in float32
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if on_cpu:
            x = F.conv2d(x[:, :, None], weight[:, :, None], bias, groups=conv.groups)[:, :, 0]
        else:
            x = F.conv1d(x, weight, bias, groups=conv.groups)
        return x.transpose(1, 2)

    def _kept_fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`_folded_norm` as (K, D) and (D,) float32, kept while its weights stay what they are."""
        norm, conv = self.batch_norm, self.depthwise_conv
        weights = norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight
        weights = weights if conv.bias is None else (*weights, conv.bias)
        made_of = None
        if not any(w.is_inference() for w in weights):  # which have no version
            made_of = [(id(w), w.data_ptr(), w._version, w.dtype) for w in weights]
        before, kept = self._folded
        if made_of is None or before != made_of:
            weight, bias = self._folded_norm()
            kept = weight[:, 0].t().float().contiguous(), bias.float()
            self._folded = made_of, kept
        return kept

    def _folded_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm, which is a line for each channel, folded into the depthwise convolution: its
        weight (D, 1, K), its bias (D,)."""
        norm, conv = self.batch_norm, self.depthwise_conv
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        bias = bias if conv.bias is None else bias + conv.bias * scale
        return conv.weight * scale[:, None, None], bias


def _is_inference_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class LinearAdapter(nn.Module):
    """NeMo's, behind a layer whose weights are frozen: a norm, to few features, an activation, and
    back. (B, T, D) -> (B, T, D), which is added to the input."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        d, norm = config.in_features, nn.LayerNorm(config.in_features)
        parts = [
            nn.Linear(d, config.dim, bias=False),
            getattr(nn, ADAPTER_ACTIVATIONS[config.activation])(),
            nn.Linear(config.dim, d, bias=False),
        ]
        self.module = nn.Sequential(
            *([norm, *parts] if config.norm_position == "pre" else [*parts, norm])
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.module(x))


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
        self.adapter_layer = nn.ModuleDict({a.name: LinearAdapter(a) for a in config.adapters})

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
        x = self.finish(x)
        return (x, v_first) if recurrent else x

    def finish(self, x):
        """What follows the convolution: the second half step, the norm, adapters."""
        x = self.norm_out(self._half_step(x, self.norm_feed_forward2, self.feed_forward2))
        for adapter in self.adapter_layer.values():
            x = x + adapter(x)
        return x

    def _half_step(self, x, norm, feed_forward):
        def piece(start, stop):
            y = x[:, start:stop]
            return (torch.add(y, self.dropout(feed_forward(norm(y))), alpha=0.5),)

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
