"""The streaming model that the benchmark starts from: its features' level, and what it streams."""

import torch
from conftest import SAMPLES
from torch.nn import functional as F

from benchmarks import look_ahead_learning
from fastconformer import load_model
from fastconformer.audio import load_audio
from fastconformer.recordings.stream import Stream


@torch.no_grad()
def test_the_start_is_a_streaming_model_on_the_bases_level():
    path = SAMPLES / "jfk.flac"
    model = look_ahead_learning.streaming_model([{"audio_filepath": str(path)}])
    base, clip = load_model(look_ahead_learning.BASE), load_audio(path, 16000)
    features, _ = model.featurize(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
    level = features[:, :, : len(clip) // 160]
    level = (level - level.mean()) / level.std()
    found, wanted = (
        F.conv2d(x[None], m.encoder.pre_encode.conv[0].weight, m.encoder.pre_encode.conv[0].bias)
        for x, m in ((features[:, :, : level.shape[2]], model), (level, base))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    for _, right in look_ahead_learning.CONTEXTS[::3]:
        stream = model.stream(look_ahead=right)
        assert isinstance(stream, Stream)
        stream.feed(clip[:20000])
        [offline] = model.transcribe([clip[:20000]], look_ahead=right, retry=False)
        assert stream.finish().tokens == offline.tokens
