"""One window of a cache-aware stream as a graph: features and caches in, frames and caches out.

The protocol of NeMo's cache-aware exports, which sherpa-onnx's online recogniser follows: windows
of R+1 encoder frames with the feature frames before them that the subsampling needs, zeros before
the first; each layer's caches are inputs and outputs, the batch first in both. Windows start with a
full chunk, so the grid of chunks is shifted against the offline one: NeMo calls it `pad_and_drop`.

Letters: B streams, L frames of left context, C = R+1 frames of a chunk, K convolution kernel.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..config import EncoderConfig
from ..model import ASRModel
from ..networks.attention import position_encoding
from ..networks.state import why_not_in_chunks
from .graphs import Encoded, Graph

DROPPED = 2  # encoder frames of the feature frames before a window


@dataclass(frozen=True)
class Windows:
    """Sizes of a stream's windows, in feature frames, and the shapes of its caches."""

    size: int
    shift: int
    n_out: int
    channel: tuple[int, int, int]  # layers, L, width
    time: tuple[int, int, int]  # layers, width, K-1


def windows_of(config: EncoderConfig) -> Windows:
    """ValueError: an encoder that cannot be run window by window, with the reason."""
    reason = why_not_in_chunks(config)
    if reason is None and not config.causal_downsampling:
        reason = "its subsampling is not causal"
    if reason is not None:
        raise ValueError(f"the encoder is not cache-aware: {reason}")
    left, right = config.att_contexts[0]
    n, d, factor = config.n_layers, config.d_model, config.subsampling_factor
    shift = factor * (right + 1)
    time = (n, d, config.conv_kernel_size - 1)
    return Windows(shift + factor + 1, shift, right + 1, (n, left, d), time)


class StreamingEncoder(Encoded):
    """See the module's docstring."""

    def __init__(self, model: ASRModel):
        super().__init__(model)
        self.windows = windows_of(model.config.encoder)

    def forward(self, audio_signal, length, channel, time, filled, prompt_index=None):
        """(B, M, window), (B,), (B, layers, L, D), (B, layers, D, K-1), (B,), of a model that is
        told one of several languages (B,) -> (B, C, D), (B,), and the caches after it."""
        encoder, n_new, left = self.encoder, self.windows.n_out, self.windows.channel[1]
        config = encoder.config
        x, lengths = encoder.pre_encode(audio_signal, length)
        x, lengths = x[:, DROPPED : DROPPED + n_new], (lengths - DROPPED).clamp(0, n_new)
        if config.xscaling:
            x = x * math.sqrt(config.d_model)
        positions = torch.arange(left + n_new - 1, -n_new, -1, device=x.device)
        pos_emb = position_encoding(positions, config.d_model)
        pad_mask = torch.arange(n_new, device=x.device) >= lengths[:, None]
        hidden = torch.arange(left, device=x.device) < left - filled[:, None]
        hidden = torch.cat((hidden, pad_mask), 1)[:, None, None]
        channels, times = [], []
        for i, layer in enumerate(encoder.layers):
            x = layer._half_step(x, layer.norm_feed_forward1, layer.feed_forward1)
            memory = torch.cat((channel[:, i], layer.norm_self_att(x)), 1)
            channels.append(memory[:, n_new:])
            x = x + layer.self_attn.last_queries(memory, n_new, pos_emb, hidden)
            y, kept = layer.conv.after(layer.norm_conv(x), pad_mask, time[:, i])
            times.append(kept)
            x = layer.finish(x + y)
        x = x if encoder.out_proj is None else encoder.out_proj(x)
        x = self.told(x, lengths, prompt_index)
        filled = (filled + n_new).clamp(max=left)
        return x, lengths, torch.stack(channels, 1), torch.stack(times, 1), filled


class StreamingTransducer(StreamingEncoder):
    """Gives encoded frames (B, D, C)."""

    def forward(self, *inputs):
        x, *rest = super().forward(*inputs)
        return x.transpose(1, 2), *rest


class StreamingCTC(StreamingEncoder):
    """Gives log-probabilities (B, C, V+1)."""

    def __init__(self, model: ASRModel):
        super().__init__(model)
        layer = model.frame_head.module.decoder_layers[0]
        self.weight, self.bias = nn.Parameter(layer.weight.detach()[..., 0]), layer.bias

    def forward(self, *inputs):
        x, *rest = super().forward(*inputs)
        return nn.functional.linear(x, self.weight, self.bias).log_softmax(-1), *rest


def streaming_encoder_graph(model: ASRModel) -> Graph:
    """-> outputs (B, D, C), encoded_lengths (B,), cache_last_*_next. The last input is
    `prompt_index` (B,) where the model knows several languages."""
    prompts = model.config.prompts
    asks = prompts is not None and prompts.are_several
    return _graph(StreamingTransducer(model), model, "outputs", asks)


def streaming_ctc_graph(model: ASRModel) -> Graph:
    """-> logprobs (B, C, V+1), encoded_lengths (B,), cache_last_*_next."""
    return _graph(StreamingCTC(model), model, "logprobs")


def _graph(module: StreamingEncoder, model: ASRModel, output: str, asks: bool = False) -> Graph:
    windows = module.windows
    example = (
        torch.randn(2, model.config.encoder.feat_in, windows.size),
        torch.tensor([windows.size, windows.size - 8]),
        torch.zeros(2, *windows.channel),
        torch.zeros(2, *windows.time),
        torch.tensor([0, 1]),
    )
    caches = ("cache_last_channel", "cache_last_time", "cache_last_channel_len")
    inputs = ("audio_signal", "length", *caches)
    if asks:
        inputs, example = (*inputs, "prompt_index"), (*example, torch.tensor([0, 0]))
    after = ("cache_last_channel_next", "cache_last_time_next", "cache_last_channel_next_len")
    outputs = (output, "encoded_lengths", *after)
    dynamic = {name: {0: "batch"} for name in (*inputs, *outputs)}
    return Graph(module, example, inputs, outputs, dynamic)
