"""A causal encoder, chunk by chunk: what its layers keep between chunks, and the step over one.

For encoders whose attention looks back over a bounded number of frames and ahead to the end of its
own chunk ("chunked_limited", or "regular" without look-ahead), with causal convolutions: every
frame comes out as in one pass over the whole clip. Source: NeMo's cache-aware streaming (Noroozi et
al. 2023, arXiv:2312.17279), whose caches these are.

Letters: B streams, C frames of a chunk, L frames of the left context, D width, K kernel.
"""

import math
from dataclasses import dataclass

import torch

from .attention import position_encoding
from .conformer import ConformerEncoder
from .graphs import MOST_FRAMES


@dataclass(frozen=True)
class EncoderState:
    """What an encoder keeps of the frames that it has seen; never written in place.

    channel (layers, B, L, D): the attention's inputs; time (layers, B, D, K - 1): the depthwise
    convolutions'; filled (B,): how many of the L frames there have been.
    """

    channel: torch.Tensor
    time: torch.Tensor
    filled: torch.Tensor


def why_not_in_chunks(config) -> str | None:
    """What keeps an encoder from being run chunk by chunk, None where nothing does."""
    left, right = config.att_contexts[0]
    if config.self_attention_model != "rel_pos":
        return f"its attention is {config.self_attention_model}"
    if left < 0 or right < 0:
        return "its attention is not limited"
    if right > 0 and config.att_context_style != "chunked_limited":
        return "its look-ahead adds up from layer to layer"
    if config.conv_context != (config.conv_kernel_size - 1, 0):
        return "its convolutions are not causal"
    if config.conv_norm_type not in ("batch_norm", "layer_norm"):
        return f"its norm, {config.conv_norm_type}, looks at all of time"
    return "it reduces frames between layers" if config.reduces else None


def frames_beside(config) -> int:
    """Encoder frames before a chunk whose features its first frame sees."""
    return 2 if config.causal_downsampling else 1


def first_state(encoder: ConformerEncoder, batch: int) -> EncoderState:
    """The state before the first frame. ValueError: an encoder that cannot be run in chunks."""
    config = encoder.config
    reason = why_not_in_chunks(config)
    if reason is not None:
        raise ValueError(f"this encoder cannot be run chunk by chunk: {reason}")
    weight, n = encoder.pre_encode.out.weight, config.n_layers
    return EncoderState(
        weight.new_zeros(n, batch, config.att_contexts[0][0], config.d_model),
        weight.new_zeros(n, batch, config.d_model, config.conv_kernel_size - 1),
        torch.zeros(batch, dtype=torch.long, device=weight.device),
    )


@torch.no_grad()
def encode_next(
    encoder: ConformerEncoder, features: torch.Tensor, before: int, count: int, state: EncoderState
):
    """features (B, M, T), all valid, of a chunk's `count` frames and of the `before` frames that
    they see -> encoded (B, count, D'), the state after it; on a GPU, of chunks amid a clip, by a
    CUDA graph."""

    def chunk(features, channel, time, filled):
        lengths = torch.full((len(features),), features.shape[2], device=features.device)
        x, _ = encoder.pre_encode(features, lengths)
        state = EncoderState(channel, time, filled)
        x, state = encode_chunk(encoder, x[:, before : before + count], state)
        return x, state.channel, state.time, state.filled

    inputs = features, state.channel, state.time, state.filled
    n_streams, found, config = len(features), None, encoder.config
    rows = 1 << (n_streams - 1).bit_length()
    amid = count == config.att_contexts[0][1] + 1 and before == frames_beside(config)
    small = rows * features.shape[2] <= MOST_FRAMES
    if amid and small and encoder.graphs.usable(features):

        def own(x, channel, time, filled):
            of_layers = (y[:, :n_streams].clone() for y in (channel, time))
            return x[:n_streams].clone(), *of_layers, filled[:n_streams].clone()

        def room(x, dim):
            return *x.shape[:dim], rows, *x.shape[dim + 1 :]

        shapes = [room(x, dim) for x, dim in zip(inputs, (0, 1, 1, 0), strict=True)]
        found = encoder.graphs.run("chunk", encoder, chunk, inputs, shapes, own)
    x, *after = chunk(*inputs) if found is None else found
    return x, EncoderState(*after)


@torch.no_grad()
def encode_chunk(encoder: ConformerEncoder, x: torch.Tensor, state: EncoderState):
    """x (B, C, D), subsampled frames of one chunk, all valid; C is the look-ahead + 1, or less in
    the last chunk of a clip -> encoded (B, C, D'), the state after it."""
    config, n_new = encoder.config, x.shape[1]
    if config.xscaling:
        x = x * math.sqrt(config.d_model)
    left = state.channel.shape[2]
    positions = torch.arange(left + n_new - 1, -n_new, -1, device=x.device)
    pos_emb = position_encoding(positions, config.d_model).to(x.dtype)
    # of the left context, only what there has been; within a chunk everything sees everything
    hidden = torch.arange(left, device=x.device) < left - state.filled[:, None]
    hidden = torch.cat((hidden, hidden.new_zeros(len(x), n_new)), 1)[:, None, None]
    no_padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    channel, time = [], []
    for layer, before, convolved in zip(encoder.layers, state.channel, state.time):
        x = layer._half_step(x, layer.norm_feed_forward1, layer.feed_forward1)
        memory = torch.cat((before, layer.norm_self_att(x)), 1)
        channel.append(memory[:, n_new:])
        x = x + layer.self_attn.last_queries(memory, n_new, pos_emb, hidden)
        y, kept = layer.conv.after(layer.norm_conv(x), no_padding, convolved)
        time.append(kept)
        x = layer.finish(x + y)
    if encoder.out_proj is not None:
        x = encoder.out_proj(x)
    filled = (state.filled + n_new).clamp(max=left)
    return x, EncoderState(torch.stack(channel), torch.stack(time), filled)
