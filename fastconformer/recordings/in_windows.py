"""A long recording whose text is told while it goes through the encoder, window by window."""

from collections.abc import Callable

import numpy as np
import torch

from . import longform
from .cuts import join_pieces
from .modes import evaluating
from .partial import RunningText
from .samples import as_float, read_samples
from .silence import judged, sounding
from .transcript import Transcript, transcript


@torch.no_grad()
def transcribe_in_windows(
    model,
    samples: np.ndarray,
    tell: Callable[[str], None],
    head: str | None = None,
    window_s: float | None = None,
    **slots,
) -> Transcript:
    """What `transcribe(..., long="chunks", retry=False, timestamps=True)` gives for the samples of
    one recording, (L,) at the model's rate.

    After each window, the kept part of which has `window_s` (None: 120 s), `tell` is given the
    words at the text's beginning that stay. What it raises ends the work. `slots`: of the head's
    prompt, such as target_lang.

    Raises:
        ValueError: not such samples, a head that cannot go on from window to window, no such slot.
    """
    chosen = model.head(head)
    found, state = chosen.first_hypothesis(), None
    if found is None:
        raise ValueError(f"the head {chosen.name} reads a clip as a whole, not window by window")
    for_encoder, _ = chosen.parted(chosen.asked(slots, True))
    rate, frame_s = model.sample_rate, model.config.frame_seconds
    samples = read_samples(samples, rate)
    first, end = sounding(model, samples)
    heard = samples[first : max(first + 1, end)]
    running, heard_s, n_frames = RunningText(chosen), len(heard) / rate, 0
    audio = torch.from_numpy(np.ascontiguousarray(heard))[None].to(model.device)
    with evaluating(model):
        features, lengths = model.preprocessor(
            as_float(audio), torch.tensor([audio.shape[1]], device=model.device), pad=False
        )
        features = features[0, :, : lengths[0]]
        for encoded in longform.encoded_windows(model, features, 1, window_s, **for_encoder):
            state = chosen.decode_next([found], encoded, [n_frames], state)
            n_frames += encoded.shape[1]
            tell(running.partial(found, None, heard_s).stable_text)
    whole = transcript(model, found, chosen.name, heard_s, timestamps=True)
    whole = join_pieces([whole], [first / rate], frame_s, len(samples) / rate)
    return judged(whole, end > 0, heard, rate, first / rate, frame_s)
