"""A stream of a model that was not made for it: windows over what was heard last.

A window holds the next part of the recording with some seconds before it and the look-ahead behind
it; of what the encoder makes of it, the part in the middle is kept, and decoded once, with the
decoder's state carried along. What stands in the look-ahead is told as well, and may change. Every
window is normalised by itself, since the clip's end is not known: the text is near `transcribe`'s,
and not always equal to it. BiRWKV7 does not hear the seconds before again: its layers carry what
they keep of all of the past, and only the backward direction begins at the look-ahead's end.

Source of the idea: buffered inference in NeMo (`examples/asr/asr_chunked_inference`).
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from ..decoding import Hypothesis
from ..networks.birwkv7 import Carry
from ..networks.subsampling import encoded_length
from .modes import evaluating
from .partial import Partial, RunningText
from .samples import as_float, read_piece
from .silence import silent, sounds
from .transcribe import transcribe
from .transcript import Transcript, transcript


@dataclass
class WindowState:
    """All that such a stream keeps: samples from the `first_frame`th encoder frame on, frames kept
    so far, the decoder's state, what was found, what the look-ahead adds to it, and whether not all
    was digital silence."""

    hypothesis: Hypothesis
    samples: torch.Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu")
    )
    n_samples: int = 0
    first_frame: int = 0
    n_encoded: int = 0
    decoder: list[torch.Tensor] | None = None
    carries: list[Carry] | None = None  # BiRWKV7's
    tentative: Hypothesis | None = None
    sounds: bool = False

    def copy(self) -> "WindowState":
        return copy.deepcopy(self)


class WindowStream:
    """One stream of a model; `open_stream` makes it, and its methods are those of `Stream`."""

    def __init__(
        self,
        model,
        head: str | None,
        look_ahead: int | None,
        state: WindowState | None,
        part_s: float,
        back_s: float,
        **slots,
    ):
        self.model, self.head, self.slots = model, model.head(head), slots
        self.for_encoder, _ = self.head.parted(self.head.asked(slots, True))
        self.finished = False
        config = model.config
        frame_s = config.frame_seconds
        self.part_frames = max(1, round(part_s / frame_s))
        self.back_frames = max(0, round(back_s / frame_s))
        self.look_ahead = max(1, round(1.0 / frame_s)) if look_ahead is None else look_ahead
        self.frame_samples = config.preprocessor.hop_samples * config.encoder.frame_factor
        self.state = state or WindowState(self.head.first_hypothesis())
        self._running = RunningText(self.head)

    def feed(self, samples) -> Partial:
        """See `Stream.feed`."""
        self.take(samples)
        self.advance()
        return self.partial()

    def partial(self) -> Partial:
        """What has been heard so far; what only the look-ahead holds is not stable. As long as
        nothing sounds at all, nothing is told."""
        state, seconds = self.state, self.state.n_samples / self.model.sample_rate
        if not state.sounds:
            return self._running.partial(self.head.first_hypothesis(), None, seconds)
        return self._running.partial(state.hypothesis, state.tentative, seconds)

    @staticmethod
    def together(streams: "list[WindowStream]", to_the_end: bool = False) -> None:
        """Encodes and decodes what streams have taken, one after the other."""
        for stream in streams:
            stream.advance(to_the_end)

    def take(self, samples) -> None:
        """Keeps samples for the next `together`; see `Stream.feed`."""
        if self.finished:
            raise ValueError("this stream is finished; open another")
        samples = read_piece(samples, self.model.sample_rate)
        if not len(samples):
            return
        self.state.n_samples += len(samples)
        self.state.sounds = self.state.sounds or sounds(samples)
        heard = as_float(torch.from_numpy(np.ascontiguousarray(samples)))
        self.state.samples = torch.cat((self.state.samples, heard))

    @torch.no_grad()
    def advance(self, to_the_end: bool = False) -> None:
        """Encodes and decodes every window that is full, or, `to_the_end`, all that is left."""
        state, rate = self.state, self.frame_samples
        with evaluating(self.model):
            while True:
                end = state.n_encoded + self.part_frames + self.look_ahead
                is_full = (end - state.first_frame) * rate <= len(state.samples)
                if not is_full and not to_the_end:
                    return
                length = (end - state.first_frame) * rate if is_full else len(state.samples)
                encoded = self._encode(state.samples[:length], is_full)
                count = self.part_frames if is_full else encoded.shape[1]
                if count > 0:
                    self._decode(encoded, count)
                if not is_full:
                    return
                first = max(0, state.n_encoded - self.back_frames)
                state.samples = state.samples[(first - state.first_frame) * rate :]
                state.first_frame = first

    def _encode(self, samples: torch.Tensor, is_full: bool) -> torch.Tensor:
        """A window's samples -> encoded (1, frames from the first that is not decoded, D); where it
        is not full, these are the recording's last."""
        model, state = self.model, self.state
        before = state.n_encoded - state.first_frame
        lengths = torch.tensor([len(samples)], device=model.device)
        features, lengths = model.featurize(samples[None].to(model.device), lengths)
        n_frames = int(encoded_length(model.config.encoder, lengths))
        if model.config.encoder.self_attention_model != "rwkv7_attn":
            encoded, _ = model.encode(features, lengths, **self.for_encoder)
            return encoded[:, before:n_frames]
        if n_frames <= before:
            return samples.new_zeros(1, 0, model.config.encoder.d_out)
        encoder = model.encoder
        state.carries = state.carries or encoder.first_carries()
        x, _ = encoder.pre_encode(features.to(model.dtype), lengths)
        x = x[:, before:n_frames]
        no_padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        kept = self.part_frames if is_full else x.shape[1]
        encoded = encoder.carried(x, no_padding, state.carries, kept)
        return model.conditioned(encoded, **self.for_encoder)

    def _decode(self, encoded: torch.Tensor, count: int) -> None:
        state = self.state
        frames = [state.n_encoded]
        state.decoder = self.head.decode_next(
            [state.hypothesis], encoded[:, :count], frames, state.decoder
        )
        state.n_encoded += count
        state.tentative = None
        if encoded.shape[1] > count:
            # a run of CTC's that goes on wants the token before; no other is looked at
            n_tokens = len(state.hypothesis.tokens)
            found = state.hypothesis.part(max(0, n_tokens - 1))
            ahead, after = encoded[:, count:], [part.clone() for part in state.decoder]
            self.head.decode_next([found], ahead, [state.n_encoded], after)
            state.tentative = found.part(min(1, n_tokens))

    @torch.no_grad()
    def finish(self) -> Transcript:
        """The text of all that was fed, with times. ValueError: it was finished before."""
        self.take(np.zeros(0, np.float32))
        state, seconds = self.state, self.state.n_samples / self.model.sample_rate
        if state.n_samples and seconds < self.model.min_duration_s:
            options = {"timestamps": True, "retry": False} | self.slots
            (found,) = transcribe(self.model, [state.samples], self.head.name, **options)
        else:
            self.advance(to_the_end=True)
            found = transcript(self.model, state.hypothesis, self.head.name, seconds, True)
            found = found if state.sounds else silent(found)
        self.finished = True
        return found
