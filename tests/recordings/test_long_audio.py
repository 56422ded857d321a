"""Long inputs in pieces: the same numbers as whole, and memory that does not grow with the rest."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import golden

import fastconformer
from fastconformer.audio import features
from fastconformer.audio.features import FilterbankFeatures
from fastconformer.config import PreprocessorConfig
from fastconformer.config.encoder import output_length
from fastconformer.decoding import Hypothesis
from fastconformer.decoding.confidence import Confidence
from fastconformer.decoding.ctc import ctc_greedy
from fastconformer.networks import subsampling, tiles
from fastconformer.networks.subsampling import ConvSubsampling
from fastconformer.recordings import longform
from fastconformer.recordings.memory import memory_estimate


@pytest.fixture
def small_pieces(monkeypatch):
    """Calls a function whole, then in small pieces; gives both results."""

    def run(function, **sizes):
        whole = function()
        with monkeypatch.context() as patch:
            patch.setattr(features, "TILE_FRAMES", sizes.get("features", 1 << 14))
            patch.setattr(subsampling, "TILE_BYTES", sizes.get("bytes", 1 << 26))
            patch.setattr(tiles, "TILE_FRAMES", sizes.get("frames", 4096))
            return whole, function()

    return run


@pytest.mark.parametrize("stft_pad", ["zeros", "reflect"])
@pytest.mark.parametrize(
    "options", [{}, {"exact_pad": True, "normalize": "all_features"}, {"window_size": 0.025}]
)
def test_features(small_pieces, options, stft_pad):
    torch.manual_seed(0)
    front = FilterbankFeatures(PreprocessorConfig(**options), stft_pad).eval()
    audio, lengths = torch.randn(3, 30011), torch.tensor([30011, 9600, 17003])
    (whole, n), (pieces, m) = small_pieces(lambda: front(audio, lengths), features=51)
    assert n.tolist() == m.tolist() and whole.shape == pieces.shape
    assert (whole - pieces).abs().max() <= 2e-5  # logarithms of nearly empty bins


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind, factor", [("dw_striding", 8), ("striding", 4), ("striding", 2)])
@pytest.mark.parametrize("t", [1283, 1288, 2049])
def test_subsampling(small_pieces, kind, factor, causal, t):
    torch.manual_seed(t)
    layer = ConvSubsampling(kind, factor, 20, 12, 8, causal).eval()
    x, lengths = torch.randn(3, 20, t), torch.tensor([t, t - 7, 130])
    (whole, n), (pieces, m) = small_pieces(lambda: layer(x, lengths), bytes=1)
    assert n.tolist() == m.tolist() == output_length(lengths, factor, causal).tolist()
    assert whole.shape == pieces.shape and whole.shape[1] > 64  # the least piece: 32 frames
    assert (whole - pieces).abs().max() <= 1e-6 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("case", ["birwkv7_encoder", "tdt_bpe", "local_attn_g0"])
def test_encoder(small_pieces, case):
    model = fastconformer.load_model(golden(case) / "model.nemo").double()
    n_mels = model.config.preprocessor.features
    torch.manual_seed(0)
    x, lengths = torch.randn(2, n_mels, 1700, dtype=torch.float64), torch.tensor([1700, 900])
    (whole, n), (pieces, _) = small_pieces(lambda: model.encode(x, lengths), bytes=1, frames=64)
    for row, valid in enumerate(n.tolist()):
        assert (whole[row, :valid] - pieces[row, :valid]).abs().max() <= 1e-9


@torch.no_grad()
def test_chunks_with_carried_state():
    model = fastconformer.load_model(golden("birwkv7_encoder") / "model.nemo").double()
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 80, 480, dtype=torch.float64), torch.tensor([480, 400, 90])
    whole, n = model.encode(x, lengths)  # 60, 50 and 12 frames
    valid = torch.arange(whole.shape[1]) < n[:, None]

    def error(chunk, ahead):
        chunks, m = model.encoder.encode_in_chunks(x, lengths, chunk, ahead)
        assert m.tolist() == n.tolist() and chunks.shape == whole.shape
        return float((chunks - whole)[valid].norm() / whole[valid].norm())

    # where the look-ahead reaches the end nothing is lost, whatever the chunks
    assert error(60, 0) <= 1e-9 and error(9, 60) <= 1e-9 and error(7, 53) <= 1e-9
    # with less it is lost at the chunks' ends only: more look-ahead, less error
    errors = [error(15, ahead) for ahead in (0, 8, 30)]
    assert errors == sorted(errors, reverse=True) and 1e-9 < errors[-1] < 0.5 * errors[0]
    # and the carried past counts: a chunk that knows nothing of it is far worse
    alone, _ = model.encoder(x[:2, :, 240:], lengths[:2] - 240)
    carried, _ = model.encoder.encode_in_chunks(x, lengths, 30, 30)
    wrong = (alone[:, :20] - whole[:2, 30:50]).norm()
    assert (carried[:2, 30:50] - whole[:2, 30:50]).norm() < 0.2 * wrong
    with pytest.raises(ValueError, match="need BiRWKV7"):
        attention = fastconformer.load_model(golden("ctc_bpe") / "model.nemo").encoder
        attention.encode_in_chunks(x.float(), lengths, 10, 10)


@torch.no_grad()
def test_transcribe_carries_the_past():
    """Chunks of `transcribe` for BiRWKV7: the last, whose look-ahead reaches the end, knows all
    of the past. With one layer it is then as in a single pass; windows with context are not."""
    model = fastconformer.load_model(golden("birwkv7_encoder") / "model.nemo")
    model.encoder.layers = model.encoder.layers[:1]
    torch.manual_seed(0)
    features = torch.randn(80, 4000)  # 500 frames of 80 ms
    whole, _ = model.encode(features[None], torch.tensor([4000]))
    windows = longform.encode_in_windows(model, features, window_s=16.0, context_s=2.0)
    assert windows.shape == whole.shape and not torch.allclose(windows, whole, atol=1e-4)
    # the convolution of the first frames sees frames before, which lacked some of their future
    torch.testing.assert_close(windows[:, 404:], whole[:, 404:], rtol=0, atol=1e-5)
    alone, _ = model.encode(features[None, :, 3040:], torch.tensor([960]))  # with context, no state
    assert not torch.allclose(alone[:, 24:], whole[:, 404:], atol=1e-4)


@pytest.mark.parametrize("case", ["ctc_bpe", "local_attn_g0", "birwkv7_encoder"])
def test_memory_estimate(case):
    config = fastconformer.load_model(golden(case) / "model.nemo").config
    hour = memory_estimate(config, 3600, torch.float32)
    ten = memory_estimate(config, 36000, torch.float32)
    assert ten < 10 * hour and memory_estimate(config, 72000, torch.float32) - ten > 8 * hour
    assert memory_estimate(config, 0, torch.float32) < 1 << 20
    with pytest.raises(ValueError, match="seconds is -1"):
        memory_estimate(config, -1, torch.float32)


@pytest.mark.parametrize("attention", ["rel_pos", "rwkv7_attn"])
def test_memory_estimate_is_a_bound(attention):
    """Two minutes through the base in a process of its own, beside its peak resident set: with
    holes in glibc's heap, as a process has them, and with what is in use alone."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of the resident set cannot be reset on this system")
    command = [sys.executable, "-m", "benchmarks.birwkv7", "--memory", "2", "--worker", attention]
    found = {}
    for holes, setting in ((True, {}), (False, {"MALLOC_MMAP_THRESHOLD_": "1000000"})):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | setting,
        )
        assert done.returncode == 0, done.stderr
        found[holes] = json.loads(done.stdout.splitlines()[-1])
    assert found[True]["bytes"] <= found[True]["estimated_bytes"]
    in_use, estimated = found[False].values()
    assert 0.5 * estimated < in_use <= 0.8 * estimated


def test_times_of_hours_wake_no_collector():
    """Python's garbage collector would look through all that is alive as the spans add up."""
    model = fastconformer.load_model(golden("ctc_bpe") / "model.nemo")
    torch.manual_seed(0)
    tokens = torch.randint(1, model.tokenizer.vocab_size, (20000,)).tolist()
    hypothesis = Hypothesis(tokens, list(range(20000)), [1] * 20000, 0.0)
    before = gc.get_stats()[0]["collections"]
    transcript = model.transcript(hypothesis, "ctc", 1600.0, timestamps=True)
    assert gc.get_stats()[0]["collections"] - before < 10 and transcript.words
    assert gc.isenabled()


@torch.no_grad()
@pytest.mark.parametrize("confidence", [None, Confidence()])
def test_ctc_greedy_in_pieces(confidence):
    """Runs of a token across a seam stay one."""
    torch.manual_seed(0)
    log_probs = torch.randn(3, 200, 5).repeat_interleave(3, dim=1).log_softmax(-1)
    lengths = torch.tensor([600, 431, 0])
    whole = ctc_greedy(log_probs, lengths, confidence=confidence)
    for size in (1, 7, 599):
        assert ctc_greedy(log_probs.split(size, 1), lengths, confidence=confidence) == whole
    assert len(whole[0].tokens) > 100 and not whole[2].tokens
