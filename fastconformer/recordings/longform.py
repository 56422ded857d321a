"""Recordings too long for one pass: the encoder runs over windows, the decoder over their seams.

A window is a piece of the features with context on both sides; of what the encoder makes of it only
the middle is kept, and the middles are joined to one sequence. (BiRWKV7 carries its past along and
sees context ahead only.) The decoder then reads that sequence
once, from its first frame to its last, with its state carried along. So no text is merged: a word
across a border is neither lost nor doubled, whatever the border. Borders are moved to the quietest
place nearby. Features are normalised over the whole recording, as in a single pass.

Source of the idea: buffered inference with partial hypotheses in NeMo
(`examples/asr/asr_chunked_inference`), which carries the decoder's state in the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..networks.subsampling import encoded_length
from ..process_memory import free_bytes
from .memory import memory_estimate

MODES = ("auto", "full", "chunks", "local", "quiet")
WINDOW_S, CONTEXT_S = 120.0, 20.0  # kept, and seen on each side of it
CUT_SEARCH = 0.2  # share of a window in which its end looks for silence
PIECES_GPU = 2 << 30  # scores and convolutions in flight, larger there than memory_estimate says
FULL_ATTENTION_S = 24 * 60.0  # beyond it full attention is neither trained nor worth its time
# On a CPU shorter windows are cheaper than full attention; below a minute it is left as it is.
CPU_WINDOWS_S, CPU_WHOLE_S, WORTH = (30.0, 60.0, WINDOW_S), 60.0, 0.8
# Operations of a layer: of a frame, 50 d^2; of a pair of frames 8 d, and as much time as 260 for
# each head, since scores are moved more than they are computed with. Fitted to CPU times of the
# base model (62 s: 1.15 s, 123 s: 4.0 s).
OF_FRAME, OF_PAIR, OF_PAIR_AND_HEAD = 50, 8, 260


@dataclass(frozen=True)
class Window:
    """Feature frames [start, end) that the encoder sees; of its output, `count` encoder frames from
    `first` on are kept."""

    start: int
    end: int
    first: int
    count: int


def available_bytes(device: torch.device) -> int:
    """What a pass may take: most of the GPU's free memory, or half of the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, int(0.85 * (free + cached)) - PIECES_GPU)
    return free_bytes() // 2


def choose_window(
    config, duration_s: float, budget_bytes: int, dtype: torch.dtype, on_cpu: bool = False
) -> float | None:
    """How a clip of this length goes through the encoder: None, in one pass, or the seconds of a
    window that are kept.

    One pass where its memory fits the budget. An encoder of linear cost (local attention, BiRWKV7)
    goes through in one pass at any length that fits; full attention only up to 24 minutes, since
    beyond it the scores cost more than all else and no checkpoint was trained for it. On a CPU full
    attention of more than a minute takes the cheapest window, if that is a fifth cheaper.
    """
    encoder = config.encoder
    fits = memory_estimate(config, duration_s, dtype) <= budget_bytes
    if not encoder.attends_to_all:
        return None if fits else WINDOW_S
    whole = fits and duration_s <= FULL_ATTENTION_S
    if not on_cpu or encoder.mixes_clips or duration_s <= CPU_WHOLE_S:
        return None if whole else WINDOW_S
    window_s = min(CPU_WINDOWS_S, key=lambda s: attention_cost(config, duration_s, s))
    saved = attention_cost(config, duration_s, window_s) / attention_cost(config, duration_s)
    return None if whole and saved > WORTH else window_s


def attention_cost(config, duration_s: float, window_s: float | None = None) -> float:
    """What full attention costs in one pass, or in windows, in seconds of audio that would cost as
    much without attention."""
    encoder = config.encoder
    pair = OF_PAIR * encoder.d_model + OF_PAIR_AND_HEAD * encoder.n_heads
    balance_s = OF_FRAME * encoder.d_model**2 / pair * config.frame_seconds
    if window_s is None:
        return duration_s * (1 + duration_s / balance_s)
    seen_s = window_s + 2 * context_seconds(config, window_s)
    return duration_s / window_s * seen_s * (1 + seen_s / balance_s)


def batches(
    config,
    durations_s: Sequence[float],
    batch_size: int,
    budget_bytes: int,
    dtype: torch.dtype,
    long: str = "auto",
    window_s: float | None = None,
    on_cpu: bool = False,
) -> Iterator[tuple[list[int], float | None]]:
    """(clips, the window's seconds or None) of every pass, longest first; a clip in windows goes
    alone.

    A pass takes at most `batch_size` clips, and no more than fit the budget, each padded to the
    longest; a clip that alone is too much for it and may not be cut goes alone. With "auto" what is
    longer than `window_s`, where given, goes in windows.
    """

    def window_of(duration_s):
        if long != "auto":
            return (window_s or WINDOW_S) if long == "chunks" else None
        if window_s is not None and duration_s > window_s:
            return window_s
        return choose_window(config, duration_s, budget_bytes, dtype, on_cpu and window_s is None)

    order = sorted(range(len(durations_s)), key=lambda i: -durations_s[i])
    while order:
        longest_s = durations_s[order[0]]
        window, count = window_of(longest_s), 1
        if window is None:
            fitting = budget_bytes // memory_estimate(config, longest_s, dtype)
            count = max(1, min(batch_size, len(order), fitting))
        yield order[:count], window
        order = order[count:]


def plan_windows(
    n_frames: int,
    window_frames: int,
    context_frames: int,
    factor: int,
    total: int,
    energy: torch.Tensor | None = None,
) -> list[Window]:
    """Windows over `n_frames` feature frames whose kept parts follow one another without a gap.

    Args:
        window_frames: length of the kept part; with `energy` at most a fifth less.
        context_frames: frames that the encoder sees before and after it.
        factor: the encoder's subsampling; borders are multiples of it.
        total: encoder frames of all.
        energy: (n_frames,) loudness; a border moves back to where it is least.
    Raises:
        ValueError: the window is shorter than one encoder frame.
    """
    if window_frames < factor or context_frames < 0:
        raise ValueError(
            f"a window of {window_frames} frames with a context of {context_frames}: expected at "
            f"least {factor}, one encoder frame, and 0"
        )
    # two frames at least: what the convolutions of the subsampling see
    window, context = window_frames // factor, max(2, -(-context_frames // factor))
    if energy is not None and n_frames > 5 * factor:  # smoothed over five encoder frames
        energy = F.avg_pool1d(energy[None, None].float(), 5 * factor, 1)
        energy = F.pad(energy, (2 * factor, 3 * factor), mode="replicate")[0, 0]
    windows, begin = [], 0
    while begin < total:
        end = min(begin + window, total)
        if energy is not None and end < total:
            earliest = max(begin + 1, end - int(window * CUT_SEARCH))
            quiet = energy[earliest * factor : end * factor + 1 : factor]
            end = earliest + int(quiet.argmin()) if len(quiet) else end
        start = max(0, begin - context) * factor
        stop = min(n_frames, (end + context) * factor)
        windows.append(Window(start, stop, begin - start // factor, end - begin))
        begin = end
    return windows


def context_seconds(config, window_s: float = WINDOW_S) -> float:
    """What an encoder frame should see on each side: all that it depends on where that is at most a
    minute (local attention of few layers), else CONTEXT_S, and with full attention, which looks as
    far as it can, its share of the window."""
    encoder = config.encoder
    if encoder.self_attention_model == "rel_pos":
        return window_s * CONTEXT_S / WINDOW_S
    if encoder.self_attention_model != "rel_pos_local_attn" or encoder.global_tokens:
        return CONTEXT_S
    frames = encoder.n_layers * (max(encoder.att_contexts[0]) + encoder.conv_kernel_size) + 2
    return frames * config.frame_seconds if frames * config.frame_seconds <= 60 else CONTEXT_S


def encode_in_windows(model, features: torch.Tensor, *arguments, **named) -> torch.Tensor:
    """`encoded_windows`, joined: encoded (1, T', D)."""
    return torch.cat(list(encoded_windows(model, features, *arguments, **named)), 1)


@torch.no_grad()
def encoded_windows(
    model,
    features: torch.Tensor,
    batch_size: int = 16,
    window_s: float | None = None,
    context_s: float | None = None,
    budget_bytes: int | None = None,
    **for_encoder,
) -> Iterator[torch.Tensor]:
    """features (M, T) of one recording, all valid -> encoded (1, frames of some windows, D) as they
    are done; together as one pass would give where `context_s` (None: `context_seconds`) holds all
    that a frame depends on. `window_s`, None: WINDOW_S, is the part of a window that is kept.

    Windows are encoded at most `batch_size` at a time, as the budget allows, so that memory does
    not grow with T but for the result. BiRWKV7 goes through one after another instead, with all of
    the past in its carried states, and `context_s` of look-ahead. `for_encoder`: of `model.encode`.
    """
    config = model.config
    stride_s = config.preprocessor.hop_samples / model.sample_rate
    window_s = WINDOW_S if window_s is None else window_s
    if context_s is None:
        context_s = context_seconds(config, window_s)
    if config.encoder.self_attention_model == "rwkv7_attn":
        window, ahead = (round(s / config.frame_seconds) for s in (window_s, context_s))
        features = features[None].to(model.dtype)
        lengths = torch.tensor([features.shape[2]], device=features.device)
        for part in model.encoder.chunks(features, lengths, max(1, window), ahead):
            yield model.conditioned(part, **for_encoder)
        return
    if budget_bytes is not None:
        dtype = model.dtype
        largest = memory_estimate(config, window_s + 2 * context_s, dtype)
        batch_size = max(1, min(batch_size, budget_bytes // largest))
    windows = plan_windows(
        features.shape[1],
        int(window_s / stride_s),
        int(context_s / stride_s),
        config.encoder.frame_factor,
        encoded_length(config.encoder, features.shape[1]),
        features.mean(0),
    )
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        lengths = torch.tensor([w.end - w.start for w in group], device=features.device)
        batch = features.new_zeros(len(group), features.shape[0], int(lengths.max()))
        for row, window in zip(batch, group, strict=True):
            row[:, : window.end - window.start] = features[:, window.start : window.end]
        encoded, _ = model.encode(batch, lengths, **for_encoder)
        kept = [e[w.first : w.first + w.count] for e, w in zip(encoded, group, strict=True)]
        yield torch.cat(kept)[None]
