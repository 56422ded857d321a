"""Features (B, M, T) -> (B, T', D): strided convolutions. Source: NeMo's ConvSubsampling (2.5+).

Every stage halves time and frequency; frames beyond a clip's length are zeroed before every
convolution, so that padding never reaches valid frames. Without gradients long inputs go through
in pieces with the neighbouring frames that they need: the first convolution's output of an hour
would be 12 GB.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..config.encoder import EncoderConfig, output_length
from . import kernels, tiles
from .linear import Linear, linear


def encoded_length(config: EncoderConfig, length):
    """Frames of the encoder's output for a number of feature frames, an int or a tensor."""
    length = output_length(length, config.subsampling_factor, config.causal_downsampling)
    if not config.reduces:
        return length
    pooling = config.reduction == "pooling"
    return length // 2 if pooling else output_length(length, config.reduction_factor, False)


# Of the first convolution's output in one piece; what fits a CPU's caches takes half the time. A
# GPU's kernels write a quarter of it at most, and may fill a share of its memory.
TILE_BYTES, TILE_BYTES_GPU = 1 << 21, 1 << 28
# Elements of a convolution's input on a GPU, whose depthwise kernels in torch count them in 32 bits
# (pytorch issue 152816).
MOST_ELEMENTS_GPU = (1 << 31) - 1


class StridedConv2d(nn.Conv2d):
    """3x3, stride 2. Causal: two frames (and bins) of padding before, one after, as in NeMo."""

    def __init__(self, c_in: int, c_out: int, causal: bool, groups: int = 1):
        super().__init__(c_in, c_out, 3, stride=2, padding=0 if causal else 1, groups=groups)
        self.causal = causal

    def forward(self, x):
        return super().forward(F.pad(x, (2, 1, 2, 1)) if self.causal else x)


class ConvSubsampling(nn.Module):
    """`dw_striding`: one full convolution, then depthwise + pointwise; `striding`: full ones."""

    def __init__(
        self, kind: str, factor: int, feat_in: int, d_model: int, channels: int, causal: bool
    ):
        super().__init__()
        layers = [StridedConv2d(1, channels, causal), nn.ReLU()]
        for _ in range(factor.bit_length() - 2):
            if kind == "dw_striding":
                layers.append(StridedConv2d(channels, channels, causal, groups=channels))
                layers.append(nn.Conv2d(channels, channels, 1))
            else:
                layers.append(StridedConv2d(channels, channels, causal))
            layers.append(nn.ReLU())
        self.conv = nn.Sequential(*layers)
        self.out = Linear(channels * output_length(feat_in, factor, causal), d_model)
        self.factor, self.causal = factor, causal
        self.separable = kind == "dw_striding" and factor > 2

    def forward(self, features: torch.Tensor, lengths: torch.Tensor):
        """(B, M, T), (B,) -> (B, T', D), (B,)."""
        if features.is_cuda and torch.is_grad_enabled():
            return self._by_clips(features, lengths)
        b, m, t = features.shape
        n_out = output_length(t, self.factor, self.causal)
        frame_bytes = b * self.factor // 2 * (m // 2) * self.conv[0].out_channels
        frame_bytes *= features.element_size()
        tile_bytes = TILE_BYTES
        if features.is_cuda:
            share = tiles.gpu_memory(features.device) // tiles.SHARE
            tile_bytes = 4 * share if self._takes_kernels(features) else TILE_BYTES_GPU
        elif self.separable and kernels.for_cpu(features):
            tile_bytes = 4 * TILE_BYTES
        tile = max(tile_bytes // max(1, frame_bytes), 32)
        if n_out <= tile or torch.is_grad_enabled():
            return self._piece(features, lengths)
        whole = None
        # Beside an output frame a piece holds what that frame sees: in the non-causal form one
        # output frame's worth on either side, in the causal one two before.
        beside = 2 if self.causal else 1
        for start in range(0, n_out, tile):
            stop = min(start + tile, n_out)
            first = max(0, start - beside)
            last = min(t, (stop + beside) * self.factor)
            offset = first * self.factor
            piece, _ = self._piece(features[:, :, offset:last], lengths - offset)
            if whole is None:
                whole = piece.new_empty(b, n_out, piece.shape[2])
            whole[:, start:stop] = piece[:, start - first : stop - first]
        return whole, output_length(lengths, self.factor, self.causal)

    def _by_clips(self, features: torch.Tensor, lengths: torch.Tensor):
        """The same with gradients on a GPU, so many clips at once as its kernels can count: 2,460 s
        of audio with 128 mels and 256 channels."""
        m, t = features.shape[1:]
        elements = self.conv[0].out_channels * (t // 2 + 4) * (m // 2 + 4)  # padded, of a clip
        n_clips = max(1, MOST_ELEMENTS_GPU // elements)
        if len(features) <= n_clips:
            return self._piece(features, lengths)
        parts = zip(features.split(n_clips), lengths.split(n_clips), strict=True)
        encoded, counts = zip(*(self._piece(*part) for part in parts), strict=True)
        return torch.cat(encoded), torch.cat(counts)

    def _takes_kernels(self, features: torch.Tensor) -> bool:
        return self.separable and kernels.usable(features)

    def _piece(self, features: torch.Tensor, lengths: torch.Tensor):
        if self._takes_kernels(features):
            return self._in_kernels(features, lengths)
        x = features.transpose(1, 2)[:, None]  # (B, 1, T, M)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return self._channels_last(x, lengths)
        x = _mask_time(x, lengths)
        for layer in self.conv:
            if isinstance(layer, StridedConv2d):
                x = _mask_time(x, lengths)
                lengths = output_length(lengths, 2, self.causal)
            x = layer(x)
        x = _mask_time(x, lengths).transpose(1, 2)  # (B, T', C, M')
        return self.out(x.flatten(2)), lengths

    def _channels_last(self, x: torch.Tensor, lengths: torch.Tensor):
        """The same with the channels last in memory, for a CPU: the first convolution and those of
        width 1 are matrix products with the ReLU in them, and padding alone is masked."""
        masked, layers = int(lengths.min()) < x.shape[2], self.conv
        before = 2 if self.causal else 1
        compiled = kernels.for_cpu(x) if self.separable else None
        if compiled is not None:
            x = compiled.subsampling_start(x[:, 0], lengths, layers[0], layers[2], self.causal)
            x, lengths = x.permute(0, 3, 1, 2), output_length(lengths, 4, self.causal)
            layers = layers[3:]
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.ReLU):
                continue
            after = "relu" if isinstance(after, nn.ReLU) else "none"
            if isinstance(layer, StridedConv2d):
                if masked:
                    x = _mask_time(x, lengths)
                lengths = output_length(lengths, 2, self.causal)
            if layer.in_channels == 1:
                x = linear(_patches(x, before), layer.weight, layer.bias, after).permute(0, 3, 1, 2)
            elif layer.kernel_size == (1, 1):
                x = x.permute(0, 2, 3, 1)
                x = linear(x, layer.weight, layer.bias, after).permute(0, 3, 1, 2)
            else:
                x = layer(x)
                x = F.relu_(x) if after == "relu" else x
        x = _mask_time(x, lengths) if masked else x
        return self.out(x.transpose(1, 2).flatten(2)), lengths

    def _in_kernels(self, features: torch.Tensor, lengths: torch.Tensor):
        """The same on a GPU, channels last: matrix products, and one kernel between two of them."""
        first, depthwise = self.conv[0], self.conv[2]
        weights = first.weight, first.bias, depthwise.weight, depthwise.bias
        x = kernels.subsampling_start(features, lengths, *weights, self.causal)
        factor = 4
        for i in range(3, len(self.conv), 3):  # the products: a depthwise convolution before each
            if i > 3:
                weight, bias = self.conv[i - 1].weight, self.conv[i - 1].bias
                x = kernels.subsampling_stage(x, lengths, weight, bias, factor, self.causal)
                factor *= 2
            x = linear(x, self.conv[i].weight, self.conv[i].bias)
        x = kernels.subsampling_end(x, lengths, factor, self.causal)
        return self.out(x), output_length(lengths, factor, self.causal)


class Reduction(nn.Module):
    """A second subsampling, between layers: strided convolutions, or the largest of two frames.
    Source: NeMo's SubsamplingReductionModule."""

    def __init__(self, kind: str, factor: int, d_model: int):
        super().__init__()
        if kind == "striding":
            self.reduction_enc = ConvSubsampling(kind, factor, d_model, d_model, d_model, False)
        else:
            self.reduction_enc = nn.MaxPool1d(factor)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        """(B, T, D), (B,) -> (B, T', D), (B,)."""
        x = x.transpose(1, 2)
        if isinstance(self.reduction_enc, ConvSubsampling):
            return self.reduction_enc(x, lengths)
        return self.reduction_enc(x).transpose(1, 2), lengths // self.reduction_enc.kernel_size


def _patches(x: torch.Tensor, before: int) -> torch.Tensor:
    """(B, 1, T, M) -> (B, T', M', 9): what each output of a 3x3 convolution of stride 2 sees, with
    `before` zeros before the input and one after it."""
    x = F.pad(x[:, 0], (before, 1, before, 1))
    return x.unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)


def _mask_time(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    valid = torch.arange(x.shape[2], device=x.device) < lengths[:, None]  # (B, T)
    return x * valid[:, None, :, None].to(x.dtype)
