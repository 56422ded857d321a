"""The whole model: holds the parts, and takes audio to text or to losses."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .audio.features import Preprocessor
from .audio.files import load_audio
from .checkpoint.contents import Checkpoint
from .checkpoint.folder import write_folder
from .checkpoint.read import read_checkpoint
from .config import ModelConfig, config_errors
from .decoding import (
    Confidence,
    DecodingOptions,
    Hypothesis,
    ctc_align,
    loudness,
    silent_stretches,
    speaks,
    splice,
)
from .heads import HEADS, Head
from .losses.checks import check_batch, check_targets
from .networks.conformer import ConformerEncoder
from .networks.heads import CTCHead
from .networks.linear import Int8Weight, quantize
from .recordings import longform
from .recordings.timestamps import (
    Span,
    in_seconds,
    segment_spans,
    without_collection,
    word_spans,
)
from .text.tokenizer import Tokenizer, load_tokenizer

CPU_FRAMES = 1500  # feature frames of clips that a CPU encodes together


@dataclass
class Transcript:
    """The text of one clip.

    tokens: ids; token_frames: encoder frame of each; token_durations: frames each spans (None for
    RNNT); words and segments: times in seconds, None unless asked for; score: log-probability of
    the path that was taken; head: which head spoke; duration: the clip's seconds; confidences: of
    each token, None unless asked for (words then have theirs); retries: stretches of speech over
    which the head had gone silent, with the text that a second try found there.
    """

    text: str
    tokens: list[int]
    token_frames: list[int]
    token_durations: list[int] | None
    words: list[Span] | None
    segments: list[Span] | None
    score: float
    head: str
    duration: float
    confidences: list[float] | None = None
    retries: list[Span] = field(default_factory=list)


class ASRModel(nn.Module):
    """A FastConformer with its heads. Attribute names are NeMo's, so that the state dict is the
    checkpoint's own. Built with random weights; `load_model` reads trained ones.

    aligner: a second model, with a CTC head, that some checkpoints hold for words' times.
    """

    aligner: "ASRModel | None"

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        tokenizer_files: dict[str, bytes] | None = None,
        stft_pad: str = "zeros",
    ):
        super().__init__()
        for name in config.heads:
            HEADS[name].check_vocabulary(config, tokenizer)
        self.config, self.tokenizer = config, tokenizer
        self.tokenizer_files = tokenizer_files or {}
        self.preprocessor = Preprocessor(config.preprocessor, stft_pad)
        self.encoder = ConformerEncoder(config.encoder)
        for name in config.heads:
            for attribute, module in HEADS[name].networks(config).items():
                setattr(self, attribute, module)
        self.__dict__["aligner"] = None  # not a module of this one: its weights are its own

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.pre_encode.out.weight.device

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads' names, the default first."""
        return self.config.heads

    def head(self, name: str | None = None) -> Head:
        """A head by its name, None: the default; what it answers says `fastconformer.heads`.
        ValueError: no such head."""
        name = name or self.heads[0]
        if name not in self.heads:
            raise ValueError(f"head is {name!r}, this model has {', '.join(self.heads)}")
        return HEADS[name](self, name)

    @property
    def frame_head(self) -> Head | None:
        """The head that gives each frame's distribution by itself, None where there is none."""
        heads = (self.head(name) for name in self.heads)
        return next((head for head in heads if head.has_frame_posteriors), None)

    @property
    def ctc_head(self) -> CTCHead:
        return self.head("ctc").module

    @property
    def blank_id(self) -> int:
        return self.config.vocab_size

    def featurize(self, audio: torch.Tensor, audio_lengths: torch.Tensor):
        """audio (B, L) float32 in [-1, 1] or int16, lengths (B,) in samples -> features (B, M, T)
        float32, lengths (B,) in frames. ValueError: shapes that do not fit."""
        if audio.dim() != 2 or audio_lengths.shape != audio.shape[:1]:
            raise ValueError(
                f"audio is {tuple(audio.shape)} and its lengths {tuple(audio_lengths.shape)}, "
                "expected (B, L) and (B,)"
            )
        return self.preprocessor(_as_float(audio), audio_lengths)

    def encode(self, features: torch.Tensor, lengths: torch.Tensor):
        """features (B, M, T), lengths (B,) -> encoded (B, T', D) in the model's dtype, lengths.
        ValueError: shapes that do not fit."""
        n_mels = self.config.encoder.feat_in
        if features.shape != (len(lengths), n_mels, features.shape[-1]):
            raise ValueError(
                f"features are {tuple(features.shape)} and their lengths {tuple(lengths.shape)}, "
                f"expected (B, {n_mels}, T) and (B,)"
            )
        return self.encoder(features.to(self.encoder.pre_encode.out.weight.dtype), lengths)

    def ctc_log_probs(self, encoded: torch.Tensor) -> torch.Tensor:
        """(B, T', D) -> (B, T', V+1) float32, blank last. ValueError: the model has no CTC head."""
        return self.head("ctc").log_probs(encoded)

    def joint_logits(self, encoded: torch.Tensor, targets: torch.Tensor, target_lengths=None):
        """Raw logits (B, T', U+1, V+1+N) of all pairs of frame and prefix; for small inputs only.

        targets (B, U); values beyond `target_lengths` are read as token 0 and give rows that no
        loss looks at. ValueError: the model has no transducer head.
        """
        heads = [head for head in map(self.head, self.heads) if head.has_lattice]
        head = heads[0] if heads else self.head("rnnt or tdt")
        return head.lattice_logits(encoded, targets, target_lengths)

    def aed_log_probs(self, encoded, encoded_lengths, decoder_ids) -> torch.Tensor:
        """What the attention decoder says after each token: encoded (B, T', D), decoder_ids (B, U),
        right-padded with anything -> (B, U, V8) float32. ValueError: no such head."""
        return self.head("aed").decoder_log_probs(encoded, encoded_lengths, decoder_ids)

    @property
    def prompted_head(self) -> Head:
        """The head that is told what to do. ValueError: none of this model's is."""
        for head in map(self.head, self.heads):
            if head.prompt is not None:
                return head
        raise ValueError(f"this model's heads ({', '.join(self.heads)}) take no prompt")

    def prompt_ids(self, **slots) -> list[int]:
        """The decoder's prompt as token ids; slots that are left out have the model's defaults.
        ValueError: an unknown slot or value (the message lists what there is), or no such head."""
        return self.prompted_head.prompt.ids(**slots)

    def decoder_ids(self, line: dict) -> tuple[list[int], int]:
        """A manifest line (text, and slots of the prompt) -> prompt + text + end, and how many ids
        are the prompt's. ValueError: a key that it needs is missing, an unknown value, too long."""
        return self.prompted_head.decoder_ids(line)

    def losses(
        self,
        encoded: torch.Tensor,
        encoded_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
        heads: tuple[str, ...] | None = None,
        eps: float = 0.0,
        report: dict[str, torch.Tensor] | None = None,
        **arguments,
    ) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of each clip in nats, (B,) per head, with the config's sigma,
        FastEmit and clamp (and omega while training). `eps` and `report` as in
        `fused_transducer_loss`, for heads with a lattice; `arguments`: what a head's
        `loss_arguments` names. ValueError: no such head, or shapes, lengths or targets that do not
        fit."""
        # First of all: torch's CTC loss reads whatever memory a wrong target names.
        batch, n_frames = encoded.shape[:2]
        lengths = targets, encoded_lengths, target_lengths
        given = f"encoded is {tuple(encoded.shape)}"
        check_batch(given, batch, n_frames, targets.shape[-1] + 1, *lengths)
        check_targets(targets, target_lengths, self.blank_id + 1, self.blank_id)
        asked = [self.head(name) for name in heads or self.heads]
        _check_taken(arguments, {name for head in asked for name in head.loss_arguments})
        arguments |= {"eps": eps, "report": report}
        return {
            head.name: head.loss(
                encoded,
                encoded_lengths,
                targets,
                target_lengths,
                **{name: arguments[name] for name in head.loss_arguments if name in arguments},
            )
            for head in asked
        }

    def decode_greedy(
        self, encoded: torch.Tensor, lengths: torch.Tensor, head: str | None = None
    ) -> list[Hypothesis]:
        """Greedy tokens, frames and durations of each clip; `head` defaults to the first."""
        return self.decode(encoded, lengths, head)

    @torch.no_grad()
    def decode(
        self,
        encoded: torch.Tensor,
        lengths: torch.Tensor,
        head: str | None = None,
        options: DecodingOptions | None = None,
        **arguments,
    ) -> list[Hypothesis]:
        """encoded (B, T', D), lengths (B,) -> what `head` (default: the first) finds in each clip,
        greedily or as `options` say; `arguments`: what its `decode_arguments` names. ValueError: no
        such head."""
        chosen = self.head(head)
        _check_taken(arguments, chosen.decode_arguments)
        options = options or DecodingOptions()
        options.check(chosen.refused_options, chosen.name)
        return chosen.decode(encoded, lengths, options, **arguments)

    def retry_stuck(
        self,
        hypothesis: Hypothesis,
        encoded: torch.Tensor,
        samples: torch.Tensor,
        head: str,
        options: DecodingOptions | None = None,
    ) -> list[tuple[int, int, str]]:
        """Where a transducer went silent over speech, decodes the stretch again from a fresh state
        and puts what it finds into the hypothesis. In a hybrid the CTC head must hear tokens there
        too, and is believed where the transducer still finds less than half as many.

        Args:
            encoded: (T', D) of the clip, samples: (L,) its audio.
        Returns:
            (first frame, end frame, text found) of each stretch that was mended.
        """
        frame_s = self.config.frame_seconds
        stretches = silent_stretches(hypothesis, len(encoded), frame_s)
        if not (self.head(head).can_stall and stretches):
            return []
        frame_samples = self.config.preprocessor.hop_samples * self.config.encoder.frame_factor
        levels = loudness(_as_float(samples.cpu()), frame_samples, len(encoded))
        beside, mended = self.frame_head, []
        for first, end in stretches:
            if not speaks(levels, first, end, frame_s):
                continue
            part, length = encoded[None, first:end], torch.tensor([end - first])
            length = length.to(encoded.device)
            (found,) = self.decode(part, length, head, options)
            if beside is not None:
                (heard,) = self.decode(part, length, beside.name, options)
                if not heard.tokens:
                    continue  # loud, but no speech to either head
                if 2 * len(found.tokens) < len(heard.tokens):
                    found = heard
            if found.tokens:
                splice(hypothesis, found, first)
                mended.append((first, end, self.tokenizer.decode(found.tokens)))
        return mended

    @torch.no_grad()
    def align(self, audio, text: str, confidence: Confidence | bool | None = None) -> list[Span]:
        """When each word of a known text was said, by the CTC head.

        Args:
            audio: a path or mono samples, as for `transcribe`; text: words between spaces.
            confidence: also give each word's confidence; True takes NeMo's defaults.
        Returns:
            One Span for each word of `text.split()`, times in seconds. A word of which the
            tokenizer knows nothing has no extent.
        Raises:
            ValueError: no CTC head, no words, or more tokens than the clip has frames for.
        """
        self.head("ctc")
        words = text.split()
        if not words:
            raise ValueError("the text to align is empty")
        clip = self._samples(audio)
        samples, lengths, (shift,) = self._collate([clip], 1.0)
        device = self.encoder.pre_encode.out.weight.device
        training = self.training
        self.eval()
        try:
            encoded, lengths = self.encode(*self.featurize(samples.to(device), lengths.to(device)))
        finally:
            self.train(training)
        options = DecodingOptions(confidence=confidence)
        tokens, ends = self._tokens_of_words(words)
        (found,) = ctc_align(self.ctc_log_probs(encoded), lengths, [tokens], options.confidence)
        if len(found.frames) < len(tokens):
            raise ValueError(
                f"the text has {len(tokens)} tokens, too many for the {int(lengths)} frames of a "
                f"clip of {len(clip) / self.sample_rate:.2f} s"
            )
        spans, first, time = [], 0, 0
        for word, end in zip(words, ends):
            while first < end and tokens[first] in self._space_ids():
                first += 1
            start = found.frames[first] if first < end else time
            time = found.frames[end - 1] + found.durations[end - 1] if first < end else time
            sure = found.confidences[first:end] if found.confidences else None
            span = Span(word, start, time)
            if sure:
                span.confidence = options.confidence.aggregate(sure)
            spans.append(span)
            first = end
        return in_seconds(spans, self.config.frame_seconds, shift, len(clip) / self.sample_rate)

    def _tokens_of_words(self, words: list[str]) -> tuple[list[int], list[int]]:
        """Tokens of words said one after the other, and the number of tokens after each word."""
        tokens, ends = [], []
        space = self._space_ids() if self.tokenizer.kind == "char" else []
        for word in words:
            ids = self.tokenizer.encode(word)
            tokens += (space if tokens and ids else []) + ids
            ends.append(len(tokens))
        return tokens, ends

    def _space_ids(self) -> list[int]:
        return [i for i, piece in enumerate(self.tokenizer.pieces) if piece in (" ", "▁")]

    @torch.no_grad()
    def transcribe(
        self,
        inputs,
        head: str | None = None,
        batch_size: int = 16,
        timestamps: bool = False,
        min_duration_s: float = 1.0,
        long: str = "auto",
        memory_gb: float | None = None,
        window_s: float | None = None,
        **decoding,
    ) -> list[Transcript]:
        """Text of each input, in their order. Threads may call it together.

        Args:
            inputs: paths, or mono sample arrays at `sample_rate` (numpy or torch, float in [-1, 1]
                or int16); a single one is taken as a list of one.
            head: "tdt", "rnnt" or "ctc"; None: the model's default.
            batch_size: most clips per pass; clips of similar length go together.
            timestamps: also give words and segments with times.
            min_duration_s: shorter clips get silence on both sides, as in NeMo 3.0; times stay the
                input's.
            long: how a clip goes through the encoder. "full": in one pass. "chunks": in windows
                with context on both sides (BiRWKV7: all of the past, and context ahead), decoded
                as one sequence. "auto": "full" where it fits the memory (see
                longform.choose_mode), "chunks" where not. "local": in one pass of local attention
                over 128 frames on both sides, with the same weights; as "auto" where attention is
                not full.
            memory_gb: what a pass may take beside the weights; None: most of what is free now.
            window_s: of windows, the part that is kept; None: 120. Given, "auto" takes windows for
                all that is longer: for full attention that was trained on clips no longer.
            decoding: fields of DecodingOptions: beam, lm, lm_weight, boost, allow, confidence ...
        Raises:
            ValueError, FileNotFoundError: unreadable audio, an empty clip, an unknown head, a
                decoding option that does not fit.
        """
        head = self.head(head).name
        options = DecodingOptions(**decoding)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if not 0 <= min_duration_s < math.inf:
            raise ValueError(f"min_duration_s is {min_duration_s}, expected seconds, 0 or more")
        if window_s is not None and not 0 < window_s < math.inf:
            raise ValueError(f"window_s is {window_s}, expected seconds, more than 0")
        if long not in longform.MODES:
            raise ValueError(f"long is {long!r}, expected one of {', '.join(longform.MODES)}")
        if isinstance(inputs, (str, os.PathLike, np.ndarray, torch.Tensor)):
            inputs = [inputs]
        clips = [self._samples(item) for item in inputs]
        transcripts: list[Transcript | None] = [None] * len(clips)
        model = longform.with_local_attention(self) if long == "local" else self
        if long == "local" and model is self:
            long = "auto"
        device, dtype = self.device, self.encoder.pre_encode.out.weight.dtype
        budget = longform.available_bytes(device) if memory_gb is None else int(memory_gb * 1e9)
        training = self.training
        if training:
            model.eval()
        try:
            for batch, chunked in longform.batches(
                model.config,
                [max(len(clip) / self.sample_rate, min_duration_s) for clip in clips],
                batch_size,
                budget,
                dtype,
                long,
                window_s,
            ):
                audio, lengths, shifts = self._collate([clips[i] for i in batch], min_duration_s)
                # without `pad_to`, as in NeMo's `transcribe`: norms over time would see it
                features, lengths = model.preprocessor(
                    _as_float(audio.to(device, non_blocking=True)), lengths.to(device), pad=False
                )
                if chunked and lengths[0]:  # a clip shorter than a frame has no window
                    encoded = longform.encode_in_windows(
                        model, features[0, :, : lengths[0]], batch_size, window_s, None, budget
                    )
                    lengths = torch.tensor([encoded.shape[1]], device=device)
                else:
                    encoded, lengths = model._encode_batch(features, lengths)
                found = self.decode(encoded, lengths, head, options)
                for row, (i, shift, hypothesis) in enumerate(zip(batch, shifts, found)):
                    retries = []
                    if options.retry:
                        valid = encoded[row, : int(lengths[row])]
                        retries = self.retry_stuck(hypothesis, valid, audio[row], head, options)
                    seconds = len(clips[i]) / self.sample_rate
                    transcripts[i] = self.transcript(
                        hypothesis, head, seconds, timestamps, shift, options.confidence, retries
                    )
        finally:
            if training:
                self.train()
        return transcripts

    def _encode_batch(self, features: torch.Tensor, lengths: torch.Tensor):
        """`encode`, on a CPU a few clips at a time, as many as its caches like: they gain nothing
        from one another, and are padded less. Clips come longest first."""
        by_clip = self.config.encoder.conv_norm_type in ("batch_norm", "layer_norm")
        if features.device.type != "cpu" or not by_clip:
            return self.encode(features, lengths)
        parts, rows = [], list(range(len(lengths)))
        while rows:
            longest = max(1, int(lengths[rows[0]]))  # a clip shorter than a frame has none
            group = rows[: max(1, CPU_FRAMES // longest)]
            parts.append(self.encode(features[group][:, :, :longest], lengths[group]))
            rows = rows[len(group) :]
        encoded = [clip for part, _ in parts for clip in part]
        encoded = nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        return encoded, torch.cat([part_lengths for _, part_lengths in parts])

    def transcript(
        self,
        hypothesis: Hypothesis,
        head: str,
        duration_s: float,
        timestamps: bool = False,
        shift_s: float = 0.0,
        confidence: Confidence | None = None,
        retries: Sequence[tuple[int, int, str]] = (),
    ) -> Transcript:
        """Text and, if asked for, times of what a decoder found; `shift_s` is silence that was put
        in front of the clip; `confidence` is how tokens' confidences become words'; `retries` is
        what `retry_stuck` gave."""
        words = segments = None
        spans = [Span(text, first, end) for first, end, text in retries]
        times = self.config.frame_seconds, shift_s, duration_s
        if timestamps:
            config, tokenizer = self.config, self.tokenizer
            pieces = tokenizer.ids_to_pieces(hypothesis.tokens)
            aggregate = confidence.aggregate if confidence else min
            ends = config.segment_separators, config.segment_gap_frames
            with without_collection():
                tokens = self.head(head).token_spans(hypothesis, tokenizer)
                words = word_spans(tokens, pieces, tokenizer, aggregate)
                segments = segment_spans(words, *ends)
                words, segments = in_seconds(words, *times), in_seconds(segments, *times)
        return Transcript(
            text=self.tokenizer.decode(hypothesis.tokens),
            tokens=hypothesis.tokens,
            token_frames=hypothesis.frames,
            token_durations=hypothesis.durations,
            words=words,
            segments=segments,
            score=hypothesis.score,
            head=head,
            duration=duration_s,
            confidences=hypothesis.confidences,
            retries=in_seconds(spans, *times),
        )

    def _samples(self, item) -> np.ndarray:
        if isinstance(item, (str, os.PathLike)):
            return load_audio(item, self.sample_rate)
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu()
            item = (item.float() if item.dtype == torch.bfloat16 else item).numpy()
        samples = np.asarray(item)
        if samples.ndim != 1 or samples.size == 0:
            raise ValueError(
                f"an audio array has shape {samples.shape}, expected (samples,), not empty"
            )
        if np.issubdtype(samples.dtype, np.int16):  # of either byte order
            return samples.astype(np.int16, copy=False)  # to the device as they are: half the bytes
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"an audio array has type {samples.dtype}, expected float or int16")
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
            samples = samples.astype(np.float32, copy=False)
        if not np.isfinite(samples).all():
            raise ValueError("an audio array holds NaN or infinite samples")
        return samples

    def _collate(self, clips: list[np.ndarray], min_duration_s: float):
        """(audio (B, L), lengths (B,), seconds of silence put in front of each)."""
        shortest = int(min_duration_s * self.sample_rate)
        lengths = [max(len(clip), shortest) for clip in clips]
        whole = all(clip.dtype == np.int16 for clip in clips)
        audio = torch.zeros(len(clips), max(lengths), dtype=torch.int16 if whole else torch.float32)
        shifts = []
        # Through numpy: torch takes no array that is read-only or runs backwards.
        for row, clip, length in zip(audio.numpy(), clips, lengths):
            left = (length - len(clip)) // 2
            as_float = clip.dtype == np.int16 and not whole
            row[left : left + len(clip)] = clip / np.float32(32768) if as_float else clip
            shifts.append(left / self.sample_rate)
        return audio, torch.tensor(lengths), shifts

    def to_checkpoint(self) -> Checkpoint:
        """Config, weights and tokenizer files, as `save` and `write_nemo` take them. ValueError:
        the weights are int8."""
        if any(isinstance(getattr(m, "weight", None), Int8Weight) for m in self.modules()):
            raise ValueError("an int8 model cannot be saved; load it with another dtype for that")
        return Checkpoint(self.config.nemo, self.state_dict(), self.tokenizer_files)

    def save(self, folder: str | Path):
        """Writes config.json, model.safetensors and the tokenizer's files to `folder`."""
        write_folder(folder, self.to_checkpoint())


def _as_float(samples: torch.Tensor) -> torch.Tensor:
    return samples.float() / 32768.0 if samples.dtype == torch.int16 else samples


def _check_taken(given: dict, known) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is an argument of none of the heads that were asked")


def check_state_dict(config: ModelConfig, state_dict: dict[str, torch.Tensor]):
    """Raises ValueError naming the tensors that are missing, unexpected or of another shape."""
    _check_tensors(_skeleton(config, state_dict), state_dict)


def _skeleton(
    config: ModelConfig, state_dict: dict[str, torch.Tensor], stft_pad: str = "zeros"
) -> ASRModel:
    """The model without memory for its weights, and without a tokenizer."""
    with torch.device("meta"), _NoInitialisation(), config_errors():
        heads = [HEADS[name] for name in config.heads]
        n_layers = config.encoder.n_layers + sum(head.n_layers(config) for head in heads)
        if n_layers > len(state_dict):  # before they are built
            raise ValueError(
                f"the config has {n_layers} layers, the weights {len(state_dict)} tensors"
            )
        model = ASRModel(config, _NoTokenizer(config.vocab_size), stft_pad=stft_pad)
        for head in heads:
            head.fit(model, state_dict)
    return model


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it does nothing, but imports half of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass
class _NoTokenizer:
    vocab_size: int


def _check_tensors(model: nn.Module, state_dict: dict[str, torch.Tensor]):
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state_dict.items()}
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "the checkpoint does not fit its config: " + "; ".join(problems[:5]) + more
        )


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stft_pad: str = "zeros",
) -> ASRModel:
    """Reads a `.nemo` archive or a converted folder; gives the model in eval mode.

    Args:
        dtype: precision of the encoder and the heads; features are always float32. torch.int8, on
            a CPU and for inference: 8-bit weights and inputs in the encoder's matrix products.
        stft_pad: "zeros" (NeMo 2.5 and newer) or "reflect" (features as before NeMo 2.5).
    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a damaged archive, an unsupported option, tensors that do not fit.
    """
    checkpoint = read_checkpoint(path)
    try:
        return model_of(checkpoint, device, dtype, stft_pad)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def model_of(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stft_pad: str = "zeros",
) -> ASRModel:
    """The model of a checkpoint in memory, whose tensors it takes; see `load_model`."""
    config = ModelConfig.from_nemo(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.config, checkpoint.tokenizer_files)
    model = _skeleton(config, checkpoint.state_dict, stft_pad)
    _check_tensors(model, checkpoint.state_dict)
    for name in config.heads:
        HEADS[name].check_vocabulary(config, tokenizer)
    model.tokenizer, model.tokenizer_files = tokenizer, checkpoint.tokenizer_files
    # the tensors become the parameters: no second copy of the weights
    model.load_state_dict(checkpoint.state_dict, assign=True)
    model.encoder.tie_biases()
    for name in model.heads:
        model.head(name).tie()
    model.requires_grad_(True)
    if not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise ValueError(f"dtype is {dtype!r}, expected torch.float32, bfloat16 or int8")
    if dtype == torch.int8 and torch.device(device).type != "cpu":
        raise ValueError(f"dtype int8 is for CPUs, device is {device}; use bfloat16 there")
    _cast(model, dtype)
    return model.to(device).eval()


def _cast(model: ASRModel, dtype: torch.dtype):
    """Parameters and statistics to `dtype`; the front end stays in float32. int8: the matrix
    products of the encoder's layers, the prediction network and the joint's output, all else in
    float32."""
    if dtype == torch.int8:
        _cast(model, torch.float32)
        quantize(model.encoder.layers)
        for name in model.heads:
            for part in model.head(name).int8_parts():
                quantize(part)
        return
    model.preprocessor.float()
    for child in (
        model.encoder,
        *(m for name, m in model.named_children() if name != "preprocessor"),
    ):
        child.to(dtype)
