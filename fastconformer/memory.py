"""How much memory one clip takes at inference, told before the start."""

import torch

from .config import EncoderConfig, ModelConfig
from .subsampling import output_length

SAFETY = 1.15  # allocators round up and keep pieces
SCRATCH_BYTES = 400 << 20  # pieces of features, convolutions, feed-forwards and scores in flight


def memory_estimate(config: ModelConfig, seconds: float, dtype: torch.dtype) -> int:
    """Peak bytes that one clip of `seconds` takes beyond the weights, from samples in memory to
    the decoder, without gradients. An upper bound in practice, rarely twice what is taken.

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
    front_end = 7 * audio + 3 * features  # pre-emphasis, its mask, padding; normalisation
    held = audio + features + (features * size // 4 if size < 4 else 0)  # and in the dtype
    # the frames, their projection in the joint, and a piece of CTC's log-probabilities
    decoding = (
        frames * (encoder.d_model + (config.joint.joint_hidden if config.joint else 0)) * size
    )
    decoding += (8 + size) * min(frames * (config.vocab_size + 1), 1 << 26)
    layer = frames * _frame_bytes(encoder, size)
    small = min(SCRATCH_BYTES, 16 * frames * encoder.d_model * size * encoder.subsampling_factor)
    return int(SAFETY * (max(front_end, held + layer, audio + decoding) + small))


def _frame_bytes(encoder: EncoderConfig, size: int) -> int:
    """Of one encoder frame: one layer at its worst moment, and what is kept beside it."""
    d = encoder.d_model
    beside = 4 * d * size  # the layer's input, sum and normalised sum; the subsampled frames
    if encoder.self_attention_model == "rwkv7_attn":
        # r, w, k, v, a, kappa and two products, the first layer's values, both results,
        # one direction's copies in its own layout
        return beside + 18 * d * size
    if encoder.self_attention_model == "rel_pos_local_attn":
        left, right = encoder.att_contexts[0]
        window = 3 * max(left, right)
        return beside + 14 * d * size + 6 * encoder.n_heads * window * size
    # q, k, v, three sums, the result; encodings and projections of 2 T distances
    return beside + 8 * d * size + 2 * d * (4 + 3 * size)
