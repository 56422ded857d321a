"""How much memory one clip takes at inference, told before the start."""

import functools

import torch

from ..audio import fbank
from ..config import EncoderConfig, ModelConfig
from ..config.encoder import output_length
from ..config.funasr import FunASRConfig
from ..decoding.ctc import LOG_PROBS
from ..heads import HEADS
from ..networks import tiles

# The counts below are from peaks on a CPU: benchmarks/results/birwkv7_memory.json
SAFETY = 1.1  # allocators round up
# Once a large array was freed, glibc takes arrays of up to 32 MB from its heap, where holes stay
# between them: the second pass of one clip took 122 MB where the first took 79, and 79 each time
# with MALLOC_MMAP_THRESHOLD_ set, which ends this.
HEAP_HOLES, HEAP_HOLES_OF_PEAK = 32e6, 0.4  # bytes, and of what is in use at most
PROMPT_TOKENS, ANSWER_TOKENS = 128, 512  # of a language model, beside the speech
FRONT_PIECES, ENCODER_PIECES = 30e6, 24e6  # bytes: spectra in flight, convolutions in flight


def memory_estimate(config, seconds: float, dtype: torch.dtype) -> int:
    """Peak bytes that one clip of `seconds` takes on a CPU beside the weights, from the samples
    to the decoder, without gradients. An upper bound in practice, within half as much again for
    clips of minutes, twice for shorter ones.

    Everything grows linearly with the duration: full attention holds the scores of a piece of its
    queries at a time, local attention its window's, BiRWKV7 what its recurrence takes.

    Raises:
        ValueError: seconds is negative.
    """
    if seconds < 0:
        raise ValueError(f"seconds is {seconds}, expected 0 or more")
    peak = _peak_bytes(config, seconds, dtype.itemsize)
    return int(SAFETY * peak + min(HEAP_HOLES, HEAP_HOLES_OF_PEAK * peak))


@functools.singledispatch
def _peak_bytes(config, seconds: float, size: int) -> float:
    """Of a clip, by the kind of its model's config; `size`: bytes of a number of its weights."""
    raise TypeError(f"{type(config).__name__} is no model's config")


@_peak_bytes.register
def _(config: ModelConfig, seconds: float, size: int) -> float:
    encoder = config.encoder
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
    return max(front_end, layer, audio + decoding)


@_peak_bytes.register
def _(config: FunASRConfig, seconds: float, size: int) -> float:
    encoder, llm, front = config.encoder, config.llm, config.frontend
    samples = int(seconds * config.sample_rate)
    n_frames = samples // front.hop_samples + 1
    rows = n_frames // front.stride + 1
    audio, features = 4 * samples, 4 * front.row_size * rows
    # a frame's samples twice, those padded for the spectrum and the spectrum, in pieces; the bins
    spectra = min(n_frames, fbank.TILE_FRAMES) * 8 * (front.window_samples + front.fft_size)
    front_end = audio + spectra + 8 * front.n_mels * n_frames + 2 * features
    layer = features + rows * (14 * encoder.d_model + 2 * encoder.d_inner) * size
    # the prompt's speech, its words and the answer; keys and values twice where they grow
    prompt = rows // 8 + PROMPT_TOKENS
    cache = 4 * llm.n_layers * llm.n_kv_heads * llm.head_dim * (prompt + ANSWER_TOKENS) * size
    inner = prompt * (8 * llm.hidden_size + 3 * llm.intermediate_size) * size
    decoding = rows * (encoder.d_model + llm.hidden_size) * size + cache + inner
    decoding += 12 * llm.vocab_size + (12 * min(rows * config.ctc_classes, LOG_PROBS))
    return max(front_end, layer, audio + decoding)


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
