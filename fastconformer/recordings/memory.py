"""How much memory one clip takes at inference, told before the start."""

import torch

from ..config import EncoderConfig, ModelConfig
from ..decoding.ctc import LOG_PROBS
from ..heads import HEADS
from ..networks import tiles
from ..networks.subsampling import output_length

# The counts below are from peaks on a CPU: benchmarks/results/birwkv7_memory.json
SAFETY = 1.1  # allocators round up and keep pieces
FRONT_PIECES, ENCODER_PIECES = 30e6, 24e6  # bytes: spectra in flight, convolutions in flight


def memory_estimate(config: ModelConfig, seconds: float, dtype: torch.dtype) -> int:
    """Peak bytes that one clip of `seconds` takes on a CPU beside the weights, from the samples
    to the decoder, without gradients. An upper bound in practice, within half as much again.

    Everything grows linearly with the duration: full attention holds the scores of a piece of its
    queries at a time, local attention its window's, BiRWKV7 what its recurrence takes.

    Raises:
        ValueError: seconds is negative.
    """
    if seconds < 0:
        raise ValueError(f"seconds is {seconds}, expected 0 or more")
    encoder, size = config.encoder, dtype.itemsize
    samples = int(seconds * config.sample_rate)
    n_features = samples // config.preprocessor.hop_samples + 1
    frames = output_length(n_features, encoder.subsampling_factor, encoder.causal_downsampling)
    audio, features = 4 * samples, 4 * config.preprocessor.n_features * n_features
    front_end = 5 * audio + features + min(FRONT_PIECES, 8 * audio)
    held = audio + features + (features * size // 4 if size < 4 else 0)  # and in the dtype
    if encoder.self_attention_model == "rwkv7_attn":
        piece = 22 * min(frames, tiles.CLIP_FRAMES) * encoder.d_model * size
    else:  # more than a piece of a clip holds, but so were the peaks
        piece = 10 * min(frames, tiles.TILE_FRAMES) * encoder.d_model * size
    layer = held + frames * _frame_bytes(encoder, size) + piece + min(ENCODER_PIECES, 8 * audio)
    # the frames, what the heads make of them, and a piece of CTC's log-probabilities
    of_heads = sum(HEADS[name].frame_bytes(config, size) for name in config.heads)
    decoding = frames * (encoder.d_model * size + of_heads)
    decoding += (8 + size) * min(frames * (config.vocab_size + 1), LOG_PROBS)
    return int(SAFETY * max(front_end, layer, audio + decoding))


def _frame_bytes(encoder: EncoderConfig, size: int) -> int:
    """Of one encoder frame, in a layer at its worst moment."""
    d = encoder.d_model
    if encoder.self_attention_model == "rwkv7_attn":
        # the layer's input and its normalised form, r, w, k, v, a, kappa and two products, the
        # first layer's values, both results twice; in bfloat16 some are float32, some twice there
        return 80 * d
    if encoder.self_attention_model == "rel_pos_local_attn":
        window = 3 * max(encoder.att_contexts[0])
        return 18 * d * size + 6 * encoder.n_heads * window * size
    # the same two, q, k, v, three sums, the result; encodings and projections of 2 T distances; a
    # product of bfloat16 is summed in float32 beside
    return 20 * d * size + (4 * d if size < 4 else 0)
