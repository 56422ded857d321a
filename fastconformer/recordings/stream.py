"""A recording that is still being made: samples in as they come, running text out.

`Stream` runs a causal encoder chunk by chunk (`networks/state.py`): every frame is computed once,
and at the end the text is that of the whole clip offline. The work is cut by chunks, not by what
`feed` is given, so that the text does not depend on how the samples arrive.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from ..config.encoder import output_length
from ..decoding import Hypothesis
from ..networks.state import (
    EncoderState,
    encode_next,
    first_state,
    frames_beside,
    why_not_in_chunks,
)
from ..surgery.look_ahead import with_look_ahead
from .modes import evaluating
from .partial import Partial, RunningText
from .samples import as_float, read_piece
from .silence import silent, sounds
from .transcribe import transcribe
from .transcript import Transcript, transcript
from .window_stream import WindowState, WindowStream


@dataclass
class StreamState:
    """All that a stream keeps: copy or pickle it, and `Stream(..., state=...)` goes on from there.

    samples (n,): padded and pre-emphasised, from the first that the next feature frame needs; last:
    the sample before, for the pre-emphasis; features (M, n): from the first that the next encoder
    frame needs, the `first_feature`th; n_features, n_encoded: frames made so far. whole: the
    samples, as long as the clip is shorter than what is padded. sounds: not all of them were
    digital silence.
    """

    samples: torch.Tensor
    features: torch.Tensor
    encoder: EncoderState
    hypothesis: Hypothesis
    last: float | None = None
    n_samples: int = 0
    first_feature: int = 0
    n_features: int = 0
    n_encoded: int = 0
    decoder: list[torch.Tensor] | None = None
    whole: list[np.ndarray] = field(default_factory=list)
    sounds: bool = False

    def copy(self) -> "StreamState":
        return copy.deepcopy(self)


class Stream:
    """One stream of a causal model; see `open_stream`."""

    def __init__(self, model, head: str | None = None, state: StreamState | None = None, **slots):
        self.model, self.head, self.slots = model, model.head(head), slots
        for_encoder, _ = self.head.parted(self.head.asked(slots, True))
        self.prompt_index = for_encoder.get("prompt_indices")
        self.finished = False
        encoder = model.config.encoder
        self.chunk_frames = encoder.att_contexts[0][1] + 1
        if state is None:
            preprocessor = model.config.preprocessor
            state = StreamState(
                torch.zeros(preprocessor.fft_size // 2, dtype=torch.float32, device="cpu"),
                torch.zeros(preprocessor.n_features, 0, dtype=torch.float32, device="cpu"),
                first_state(model.encoder, 1),
                self.head.first_hypothesis(),
            )
        self.state, self._running = state, RunningText(self.head)

    @property
    def look_ahead(self) -> int:
        """Encoder frames between what is heard and what is told, at most."""
        return self.chunk_frames - 1

    def feed(self, samples) -> Partial:
        """Mono samples at the model's rate (float in [-1, 1] or int16), any number of them -> what
        has been heard so far. ValueError: not such samples, or the stream is finished."""
        self.take(samples)
        self.together([self])
        return self.partial()

    def take(self, samples) -> None:
        """Keeps samples for the next `together`; see `feed`."""
        if self.finished:
            raise ValueError("this stream is finished; open another")
        samples = read_piece(samples, self.model.sample_rate)
        if not len(samples):
            return
        state, preprocessor = self.state, self.model.config.preprocessor
        state.n_samples += len(samples)
        state.sounds = state.sounds or sounds(samples)
        if self._is_short(state.n_samples - len(samples)):
            state.whole.append(samples)
        if not self._is_short(state.n_samples):
            state.whole = []
        x = as_float(torch.from_numpy(np.ascontiguousarray(samples)))
        if preprocessor.preemph is not None:
            before = x[:1] * 0 if state.last is None else x.new_tensor([state.last])
            state.last = float(x[-1])
            x = x - preprocessor.preemph * torch.cat((before, x[:-1]))
        state.samples = torch.cat((state.samples, x))

    def partial(self) -> Partial:
        """What has been heard so far; nothing of it changes later. As long as all is digital
        silence, nothing is told: the text of such a clip is empty."""
        state, seconds = self.state, self.state.n_samples / self.model.sample_rate
        found = state.hypothesis if state.sounds else self.head.first_hypothesis()
        return self._running.partial(found, None, seconds)

    @torch.no_grad()
    def finish(self) -> Transcript:
        """The text of all that was fed, with times; as `transcribe` gives it for the whole clip
        with this look-ahead (and `retry=False`). ValueError: it was finished before."""
        self.take(np.zeros(0, np.float32))
        state = self.state
        if state.n_samples and self._is_short(state.n_samples):
            whole = np.concatenate([_as_float32(part) for part in state.whole])
            options = {"timestamps": True, "retry": False} | self.slots
            (found,) = transcribe(self.model, [whole], self.head.name, **options)
        else:
            self.together([self], to_the_end=True)
            seconds = state.n_samples / self.model.sample_rate
            found = transcript(self.model, state.hypothesis, self.head.name, seconds, True)
            found = found if state.sounds else silent(found)
        self.finished = True
        return found

    @staticmethod
    @torch.no_grad()
    def together(streams: "list[Stream]", to_the_end: bool = False) -> None:
        """Encodes and decodes what streams have taken, chunks of several in a batch; they are of
        one model, head and look-ahead. `to_the_end`: no more samples will come."""
        if not streams:
            return
        model, head = streams[0].model, streams[0].head
        with evaluating(model):
            while True:
                ready = [(s, s.next_features(to_the_end)) for s in streams]
                ready = [(s, *found) for s, found in ready if found is not None]
                if not ready:
                    return
                for group in _alike(ready):
                    _advance(model, head, group)

    def _is_short(self, n_samples: int) -> bool:
        # such a clip is padded on both sides offline, and so told at its end only
        return n_samples < int(self.model.min_duration_s * self.model.sample_rate)

    def next_features(self, to_the_end: bool) -> tuple[torch.Tensor, int, int] | None:
        """Feature frames of the next chunk (M, T), how many encoder frames of theirs come before
        it, and how many it has; None: it is not all there yet."""
        config, state = self.model.config, self.state
        encoder = config.encoder
        factor, causal = encoder.subsampling_factor, encoder.causal_downsampling
        end = state.n_encoded + self.chunk_frames
        # an encoder frame sees the features up to this one
        needed = factor * (end - 1) + (0 if causal else factor - 1) + 1
        if to_the_end:
            total = int(
                self.model.preprocessor.featurizer.feature_lengths(
                    torch.tensor(state.n_samples, device="cpu")
                )
            )
            end = min(end, output_length(total, factor, causal) if total else 0)
            needed = min(needed, total)
            if end <= state.n_encoded:
                return None
        if not self._featurize(needed, to_the_end):
            return None
        beside = frames_beside(encoder)
        first = max(0, state.n_encoded - beside)
        features = state.features[:, first * factor - state.first_feature :]
        count = end - state.n_encoded
        before = state.n_encoded - first
        state.n_encoded = end
        kept = max(0, end - beside) * factor
        state.features = state.features[:, kept - state.first_feature :]
        state.first_feature = kept
        return features, before, count

    def _featurize(self, needed: int, to_the_end: bool) -> bool:
        """Makes feature frames up to `needed`; False where samples for them are missing."""
        state, c = self.state, self.model.config.preprocessor
        count = needed - state.n_features
        if count <= 0:
            return True
        length = (count - 1) * c.hop_samples + c.fft_size
        samples = state.samples
        if len(samples) < length:
            if not to_the_end:
                return False
            samples = torch.nn.functional.pad(samples, (0, length - len(samples)))
        featurizer = self.model.preprocessor.featurizer
        made = featurizer.features(samples[None, :length].to(self.model.device))[0]
        state.features = torch.cat((state.features, made.to(state.features)), 1)
        state.samples = state.samples[count * c.hop_samples :]
        state.n_features = needed
        return True


def why_not_streamed(model) -> str | None:
    """What keeps a model from going chunk by chunk, None where nothing does."""
    config = model.config.preprocessor
    if model.config.looks_at_all:
        return f"its features are normalised over the clip ({config.normalize})"
    if config.exact_pad or config.frame_splicing > 1:
        return "its features are padded or spliced"
    if model.preprocessor.featurizer.stft_pad != "zeros":
        return "its features mirror a clip's end"
    return why_not_in_chunks(model.config.encoder)


def open_stream(
    model,
    head: str | None = None,
    look_ahead: int | None = None,
    state: StreamState | WindowState | None = None,
    part_s: float = 1.0,
    back_s: float = 10.0,
    **slots,
) -> Stream | WindowStream:
    """A stream: `feed(samples)` gives the running text, `finish()` the transcript.

    A causal model goes chunk by chunk, each frame computed once; any other one that can go on from
    piece to piece in windows (`window_stream.py`).

    Args:
        head: one of `model.heads`; None: the default.
        look_ahead: in encoder frames. Of a causal model one of the checkpoint's att_context_size,
            None: the first; else how much is heard before a text is stable, None: 1 s.
        state: of an earlier stream of the same model and arguments, to go on from.
        part_s, back_s: of windows: the part that is told at a time, and what the model hears
            before it.
        slots: of the head's prompt, such as target_lang.
    Raises:
        ValueError: the head reads a clip as a whole, no such head, look-ahead, slot or value.
    """
    chosen = model.head(head)
    if chosen.first_hypothesis() is None:
        raise ValueError(f"the head {chosen.name} reads a clip as a whole and cannot be streamed")
    if why_not_streamed(model) is None:
        return Stream(with_look_ahead(model, look_ahead), head, state, **slots)
    if not (part_s > 0 and back_s >= 0 and (look_ahead is None or look_ahead >= 0)):
        raise ValueError(
            f"part_s is {part_s}, back_s {back_s}, look_ahead {look_ahead}: expected more than 0, "
            "and 0 or more"
        )
    return WindowStream(model, head, look_ahead, state, part_s, back_s, **slots)


def _alike(ready):
    """Groups of streams whose chunks have the same shape, and are or are not their first."""
    groups: dict[tuple, list] = {}
    for stream, features, before, count in ready:
        is_first = stream.state.decoder is None
        key = features.shape[1], before, count, is_first
        groups.setdefault(key, []).append((stream, features, before, count))
    return groups.values()


def _advance(model, head, group) -> None:
    states = [stream.state for stream, *_ in group]
    _, features, before, count = group[0]
    features = torch.stack([f for _, f, *_ in group]).to(model.device, model.dtype)
    encoder = EncoderState(
        torch.cat([state.encoder.channel for state in states], 1),
        torch.cat([state.encoder.time for state in states], 1),
        torch.cat([state.encoder.filled for state in states]),
    )
    encoded, encoder = encode_next(model.encoder, features, before, count, encoder)
    if model.config.prompts is not None:
        encoded = model.conditioned(encoded, [stream.prompt_index for stream, *_ in group])
    decoder = None
    if states[0].decoder is not None:
        decoder = [torch.cat(parts, -2) for parts in zip(*(state.decoder for state in states))]
    decoder = head.decode_next(
        [state.hypothesis for state in states],
        encoded,
        [state.n_encoded - count for state in states],
        decoder,
    )
    for i, state in enumerate(states):
        own = slice(i, i + 1)
        state.encoder = EncoderState(
            encoder.channel[:, own], encoder.time[:, own], encoder.filled[own]
        )
        state.decoder = [part[..., own, :] for part in decoder]


def _as_float32(samples: np.ndarray) -> np.ndarray:
    return as_float(torch.from_numpy(samples)).numpy()
