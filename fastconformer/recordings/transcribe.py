"""Recordings of any length -> transcripts: batches or windows through the encoder, then a head."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..decoding import DecodingOptions
from ..surgery.local_attention import with_local_attention
from ..surgery.look_ahead import with_look_ahead
from ..transfers import ahead
from . import longform
from .cuts import cut_in_pauses, join_pieces
from .modes import evaluating
from .overlaps import LONGEST_S, cut_with_overlap, join_overlapping
from .retry import retry_stuck
from .samples import as_float, collate, is_one, read_samples
from .silence import judged, sounding
from .timestamps import Span
from .transcript import Transcript, transcript

CPU_FRAMES = 1500  # feature frames of clips that a CPU encodes together


def transcribe(
    model,
    inputs,
    head: str | None = None,
    batch_size: int = 16,
    timestamps: bool = False,
    min_duration_s: float | None = None,
    long: str = "auto",
    memory_gb: float | None = None,
    window_s: float | None = None,
    look_ahead: int | None = None,
    errors: str = "raise",
    progress: bool | Callable[[float, float], None] = False,
    **decoding,
) -> list[Transcript]:
    """Text of each input, in their order. Threads may call it together.

    Args:
        inputs: paths, bytes or binary files of recordings, mono sample arrays at `sample_rate`
            (numpy or torch, float in [-1, 1] or int16), or pairs (samples, their rate in Hz); a
            single one is taken as a list of one.
        head: one of `model.heads`; None: the model's default.
        batch_size: most clips per pass; clips of similar length go together.
        timestamps: also give words and segments with times.
        min_duration_s: shorter clips get silence on both sides; times stay the input's. None:
            `model.min_duration_s`, which is 1.0 for NeMo's models, as in NeMo 3.0, and 0.0 (nothing
            is added) for Fun-ASR's.
        long: how a clip goes through the encoder. "full": in one pass. "chunks": in windows
            with context on both sides (BiRWKV7: all of the past, and context ahead), decoded
            as one sequence. "auto": "full" where it fits the memory and, on a CPU, where shorter
            windows are not plainly cheaper (see longform.choose_window), "chunks" elsewhere.
            "local": in one pass of local attention over 128 frames on both sides, with the same
            weights; as "auto" where attention is not full. A head that cannot read windows as one
            sequence is given a long clip in pieces ("full": whole): Canary's share a second and are
            joined where their tokens agree, as in NeMo, others are cut in pauses. "quiet": in
            pieces cut in pauses, whatever the head.
        memory_gb: what a pass may take beside the weights; None: most of what is free now.
        window_s: of windows, the part that is kept; None: 120 (of pieces, the longest; None: the
            head's own). Given, "auto" takes windows for
            all that is longer: for full attention that was trained on clips no longer.
        look_ahead: in encoder frames, one of a streaming checkpoint's att_context_size; None: the
            first.
        errors: "raise", or "keep": an input that cannot be read gets a Transcript with an empty
            text and its `error`.
        progress: True: a line on stderr, in a notebook too, that tells how much is done; or what is
            called with the seconds of audio that are done and those of all, after each batch and
            each group of windows.
        decoding: fields of DecodingOptions (beam, lm, lm_weight, boost, allow, confidence ...) and
            slots of the head's prompt (source_lang, target_lang, pnc, prompt; language, hotwords
            ...), see its `asked`.
    Raises:
        ValueError, FileNotFoundError: unreadable audio, an empty clip, an unknown head, a
            decoding option that does not fit.
    """
    options = {"head": head, "batch_size": batch_size, "timestamps": timestamps}
    options |= {"min_duration_s": min_duration_s, "long": long, "memory_gb": memory_gb}
    options |= {"window_s": window_s, "look_ahead": look_ahead, "progress": progress} | decoding
    if errors not in ("raise", "keep"):
        raise ValueError(f"errors is {errors!r}, expected raise or keep")
    if is_one(inputs):
        inputs = [inputs]
    if errors == "keep":
        return _keep_errors(model, inputs, options)
    found = dict(transcribe_each(model, inputs, **options))
    return [found[i] for i in range(len(found))]


@torch.no_grad()
def transcribe_each(
    model,
    inputs,
    head: str | None = None,
    batch_size: int = 16,
    timestamps: bool = False,
    min_duration_s: float | None = None,
    long: str = "auto",
    memory_gb: float | None = None,
    window_s: float | None = None,
    look_ahead: int | None = None,
    progress: bool | Callable[[float, float], None] = False,
    **decoding,
) -> Iterator[tuple[int, Transcript]]:
    """As `transcribe`: (place, transcript) of each input when its batch is done. While a device
    works on a batch, a thread collates and sends the next, and the texts of the one before are
    made."""
    model = with_look_ahead(model, look_ahead)
    chosen = model.head(head)
    fields = {field.name for field in dataclasses.fields(DecodingOptions)}
    options = DecodingOptions(**{n: v for n, v in decoding.items() if n in fields})
    slots = {name: value for name, value in decoding.items() if name not in fields}
    head, arguments = chosen.name, chosen.asked(slots, timestamps)
    options.check(chosen.refused_options, head)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    min_duration_s = model.min_duration_s if min_duration_s is None else min_duration_s
    if not 0 <= min_duration_s < math.inf:
        raise ValueError(f"min_duration_s is {min_duration_s}, expected seconds, 0 or more")
    if window_s is not None:
        _check_window(window_s)
    if long not in longform.MODES:
        raise ValueError(f"long is {long!r}, expected one of {', '.join(longform.MODES)}")
    if long == "full" and window_s is not None:
        raise ValueError(f"window_s is {window_s}, but long is full, which has no windows")
    rate, device, dtype = model.sample_rate, model.device, model.dtype
    recordings = [read_samples(item, rate) for item in inputs]
    frame_s = model.config.frame_seconds
    bounds = [sounding(model, clip) for clip in recordings]
    # of silence a frame goes through as well, so that its transcript is like the others
    whole = [clip[a : max(a + 1, b)] for clip, (a, b) in zip(recordings, bounds, strict=True)]
    cuts, overlap = [[(0, len(clip))] for clip in whole], False
    if long == "quiet" or (chosen.longest_s is not None and long != "full"):
        overlap = chosen.overlaps and long != "quiet" and window_s is None
        longest_s = window_s or chosen.longest_s or LONGEST_S
        cuts = [
            cut_with_overlap(len(clip), rate) if overlap else cut_in_pauses(clip, rate, longest_s)
            for clip in whole
        ]
        long = "full"
    clips = [clip[a:b] for clip, pieces in zip(whole, cuts, strict=True) for a, b in pieces]
    recording = [i for i, pieces in enumerate(cuts) for _ in pieces]  # of each clip
    transcripts: dict[int, Transcript] = {}  # of clips whose recordings are not done
    budget = longform.available_bytes(device) if memory_gb is None else int(memory_gb * 1e9)
    first_piece = list(itertools.accumulate((len(pieces) for pieces in cuts), initial=0))
    on_gpu = device.type == "cuda"
    told, done_s = _show if progress is True else progress or None, 0.0
    all_s = sum(len(clip) for clip in clips) / rate

    def collated(item):
        batch, _ = item
        *tensors, shifts = collate([clips[i] for i in batch], min_duration_s, rate, on_gpu)
        return (*item, tensors[0], shifts), tensors

    def finished(batch, shifts, audio, encoded, counts, found) -> Iterator[tuple[int, Transcript]]:
        nonlocal done_s
        for row, (i, shift, hypothesis) in enumerate(zip(batch, shifts, found)):
            retries = []
            if options.retry:
                valid = encoded[row, : counts[row]]
                retries = retry_stuck(model, hypothesis, valid, audio[row], head, options)
            seconds = len(clips[i]) / rate
            # an aligner looks at pieces that overlap together
            later = overlap and chosen.aligner is not None and len(cuts[recording[i]]) > 1
            transcripts[i] = transcript(
                *(model, hypothesis, head, seconds, timestamps and not later, shift),
                *(options.confidence, retries, clips[i]),
            )
        done_s += sum(len(clips[i]) for i in batch) / rate
        if told:
            told(done_s, all_s)
        for place in dict.fromkeys(recording[i] for i in batch):
            first, n = first_piece[place], len(cuts[place])
            of_clip = [transcripts[i] for i in range(first, first + n) if i in transcripts]
            if len(of_clip) == n:
                yield place, joined(place, of_clip, clips[first : first + n])
                for i in range(first, first + n):
                    del transcripts[i]

    def joined(place, of_clip, samples) -> Transcript:
        starts_s = [(bounds[place][0] + first) / rate for first, _ in cuts[place]]
        if overlap and len(samples) > 1:
            of_clip = [join_overlapping(model, of_clip, samples, cuts[place], timestamps)]
        seconds = len(recordings[place]) / rate
        whole_text = join_pieces(of_clip, starts_s[: len(of_clip)], frame_s, seconds)
        (first, end), heard = bounds[place], whole[place]
        return judged(whole_text, end > 0, heard, rate, first / rate, frame_s)

    with evaluating(model):
        encoder_of = with_local_attention(model) if long == "local" else model
        if long == "local" and encoder_of is model:
            long = "auto"
        passes = longform.batches(
            encoder_of.config,
            [max(len(clip) / rate, min_duration_s) for clip in clips],
            batch_size,
            budget,
            dtype,
            long,
            window_s,
            device.type == "cpu",
        )
        before = None  # the batch whose texts are to be made
        for (batch, window, audio, shifts), tensors in ahead(passes, collated, device):
            asked = chosen.for_clips(arguments, [recording[i] for i in batch])
            for_encoder, asked = chosen.parted(asked)
            samples, lengths = tensors
            # without `pad_to`, as in NeMo's `transcribe`: norms over time would see it
            features, lengths = model.preprocessor(as_float(samples), lengths, pad=False)
            if window is not None and lengths[0]:  # a clip shorter than a frame has no window
                of_windows = []
                for part in longform.encoded_windows(
                    *(encoder_of, features[0, :, : lengths[0]], batch_size, window, None, budget),
                    **for_encoder,
                ):
                    of_windows.append(part)
                    heard_s = frame_s * sum(p.shape[1] for p in of_windows)
                    if told and heard_s < len(clips[batch[0]]) / rate - frame_s:
                        told(done_s + heard_s, all_s)
                encoded = torch.cat(of_windows, 1)
                lengths = torch.tensor([encoded.shape[1]], device=device)
            else:
                encoded, lengths = _encode_batch(encoder_of, features, lengths, chosen, for_encoder)
            if before is not None:
                yield from finished(*before)
            found = model.decode(encoded, lengths, head, options, **asked)
            counts = lengths.tolist()  # one wait for the device, not one a clip
            before = batch, shifts, audio, encoded, counts, found
            if device.type == "cpu":  # which has nothing else to do meanwhile
                yield from finished(*before)
                before = None
        if before is not None:
            yield from finished(*before)


def transcribe_iter(
    model, item, head: str | None = None, window_s: float = LONGEST_S, **options
) -> Iterator[Span]:
    """The segments of one recording, with times in seconds, as they come: it is cut in pauses into
    pieces of at most `window_s`, which are transcribed one after another. `item`, `options` and
    errors: see `transcribe`."""
    _check_window(window_s)
    rate = model.sample_rate
    samples = read_samples(item, rate)
    for first, end in cut_in_pauses(samples, rate, window_s):
        [found] = transcribe(model, [samples[first:end]], head, timestamps=True, **options)
        start_s = first / rate
        for span in found.segments or ():
            yield dataclasses.replace(span, start=span.start + start_s, end=span.end + start_s)


def _check_window(window_s: float) -> None:
    if not 0 < window_s < math.inf:
        raise ValueError(f"window_s is {window_s}, expected seconds, more than 0")


def _show(done_s: float, all_s: float) -> None:
    """A line on stderr that is written over, and left at the end."""
    share = done_s / all_s if all_s else 1.0
    end = "\n" if done_s > all_s - 1e-3 else ""
    text = f"\r{share:4.0%} of {all_s / 60:.1f} minutes"
    print(text, end=end, file=sys.stderr, flush=True)


def _keep_errors(model, inputs, options: dict) -> list[Transcript]:
    """`transcribe` of what can be read; an empty Transcript with its `error` for the rest."""
    read = []
    for item in inputs:
        try:
            read.append(read_samples(item, model.sample_rate))
        except (ValueError, OSError) as error:
            read.append(str(error))
    good = [item for item in read if not isinstance(item, str)]
    prompts = options.get("prompt")
    if isinstance(prompts, list) and len(prompts) == len(read):  # one for each input
        kept = [p for p, item in zip(prompts, read) if not isinstance(item, str)]
        options = options | {"prompt": kept}
    found = iter(transcribe(model, good, **options))
    head = model.head(options["head"]).name
    return [
        Transcript("", [], [], None, None, None, 0.0, head, 0.0, error=item)
        if isinstance(item, str)
        else next(found)
        for item in read
    ]


def _encode_batch(model, features: torch.Tensor, lengths: torch.Tensor, head, for_encoder: dict):
    """`encode`, on a CPU a few clips at a time, as many as its caches like: they gain nothing
    from one another, and are padded less. Clips come longest first."""
    if features.device.type != "cpu" or model.config.encoder.mixes_clips:
        return model.encode(features, lengths, **for_encoder)
    parts, rows = [], list(range(len(lengths)))
    while rows:
        longest = max(1, int(lengths[rows[0]]))  # a clip shorter than a frame has none
        group = rows[: max(1, CPU_FRAMES // longest)]
        own = head.for_clips(for_encoder, group)
        parts.append(model.encode(features[group][:, :, :longest], lengths[group], **own))
        rows = rows[len(group) :]
    encoded = [clip for part, _ in parts for clip in part]
    encoded = nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    return encoded, torch.cat([part_lengths for _, part_lengths in parts])
