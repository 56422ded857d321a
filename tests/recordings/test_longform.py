"""Long recordings: windows against a single pass, the choice between them, memory, threads."""

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import fastconformer
from fastconformer.audio.files import load_audio
from fastconformer.config import ModelConfig
from fastconformer.config.encoder import output_length
from fastconformer.model import ASRModel
from fastconformer.networks import attention
from fastconformer.networks.subsampling import encoded_length
from fastconformer.recordings import longform
from fastconformer.recordings.in_windows import transcribe_in_windows
from fastconformer.recordings.memory import memory_estimate
from fastconformer.surgery.local_attention import with_local_attention

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "base_tiny.nemo"


@pytest.fixture(scope="module")
def base():
    return fastconformer.load_model(BASE)


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts of coloured noise between pauses: no speech, but a decoder says something to it."""
    rng = np.random.default_rng(seed)
    samples = np.cumsum(rng.standard_normal(int(seconds * 16000))).astype(np.float32)
    samples -= np.convolve(samples, np.ones(64) / 64, "same")
    bursts = np.repeat(rng.random(int(seconds * 4) + 1) > 0.3, 4000)[: len(samples)]
    return (0.05 * samples * bursts / samples.std()).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4000),
    window=st.integers(8, 1500),
    context=st.integers(0, 600),
    factor=st.sampled_from([4, 8]),
    causal=st.booleans(),
    seed=st.none() | st.integers(0, 99),
)
def test_windows_keep_every_encoder_frame_once(n, window, context, factor, causal, seed):
    energy = None if seed is None else torch.rand(n, generator=torch.Generator().manual_seed(seed))
    total = output_length(n, factor, causal)
    windows = longform.plan_windows(n, window, context, factor, total, energy)
    at = 0
    for w in windows:
        assert w.start % factor == 0 and 0 <= w.start < w.end <= n
        assert w.start // factor + w.first == at and 1 <= w.count <= window // factor
        assert w.first + w.count <= output_length(w.end - w.start, factor, causal)
        assert w.first * factor >= min(context, at * factor)
        at += w.count
    assert at == total


def test_borders_lie_where_it_is_quiet():
    energy = torch.ones(4000)
    energy[870:900] = 0
    windows = longform.plan_windows(4000, 1000, 100, 8, 500, energy)
    assert 870 - 8 <= windows[0].count * 8 <= 900


@pytest.mark.parametrize("context", [[-1, -1], [20, 5]])
def test_attention_in_pieces_equals_attention_at_once(base, monkeypatch, context):
    layer = base.encoder.layers[0].self_attn
    x = torch.randn(2, 150, layer.linear_q.in_features)
    positions = torch.arange(149, -150, -1)
    pos_emb = attention.position_encoding(positions, x.shape[2])
    hidden = (torch.arange(150) >= torch.tensor([[150], [91]]))[:, None, None]
    if context != [-1, -1]:
        hidden = hidden | base.encoder._hidden(150, *context, x.device)
    with torch.no_grad():
        whole = layer(x, pos_emb, hidden)
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)  # 16 queries at a time
        pieces = layer(x, pos_emb, hidden)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window_s", [3.0, 3.04, 3.4, 5.0, 7.7, 30.0])
def test_windows_equal_a_single_pass_of_local_attention(base, window_s):
    """With all that a frame depends on as context, borders anywhere change nothing."""
    local = with_local_attention(base, 8)
    weights = [m.encoder.layers[0].self_attn.linear_q.weight.data_ptr() for m in (base, local)]
    assert weights[0] == weights[1]
    audio = torch.from_numpy(babble(20.0))[None]
    features, lengths = local.featurize(audio, torch.tensor([audio.shape[1]]))
    with torch.no_grad():
        whole, encoded_lengths = local.encode(features, lengths)
        whole = whole[:, : encoded_lengths[0]]
    windows = longform.encode_in_windows(local, features[0, :, : lengths[0]], 4, window_s)
    torch.testing.assert_close(windows, whole, rtol=1e-4, atol=1e-4)
    for head in base.heads:
        expected = local.decode_greedy(whole, encoded_lengths, head)[0]
        found = local.decode_greedy(windows, encoded_lengths, head)[0]
        assert found.tokens == expected.tokens and found.frames == expected.frames


@pytest.mark.parametrize("reduction, position", [("striding", 0), ("pooling", 1), ("pooling", -1)])
def test_windows_with_a_reduction_between_layers(base, reduction, position):
    """Half of the frames, twice as long; windows give what a single pass gives."""
    nemo = copy.deepcopy(with_local_attention(base, 8).config.nemo)
    nemo["encoder"] |= {"reduction": reduction, "reduction_position": position}
    nemo["encoder"]["reduction_factor"] = 2
    torch.manual_seed(0)
    model = ASRModel(ModelConfig.from_nemo(nemo), base.tokenizer).eval()
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".reduction_enc." in name for name in found.missing_keys)
    assert model.config.frame_seconds == 2 * base.config.frame_seconds
    samples = torch.from_numpy(babble(20.03))[None]
    lengths = torch.tensor([samples.shape[1]])
    features, lengths = model.featurize(samples, lengths)
    with torch.no_grad():
        whole, encoded_lengths = model.encode(features, lengths)
    n = int(encoded_lengths)
    assert n == encoded_length(model.config.encoder, int(lengths))
    windows = longform.encode_in_windows(model, features[0, :, : lengths[0]], 4, 3.4)
    torch.testing.assert_close(windows, whole[:, :n], rtol=1e-4, atol=1e-4)


def test_limited_attention_stays_as_it_was_trained(monkeypatch):
    """A streaming checkpoint has not been trained to see 128 frames ahead."""
    model = fastconformer.load_model(golden("stream_chunked_hybrid_rnnt") / "model.nemo")
    assert with_local_attention(model) is model
    samples = babble(3.0)
    [local], [full] = (model.transcribe(samples, long=mode) for mode in ("local", "full"))
    assert local.text == full.text
    cut, in_windows = [], longform.encoded_windows
    monkeypatch.setattr(
        longform, "encoded_windows", lambda *a, **k: cut.append(a) or in_windows(*a, **k)
    )
    model.transcribe(samples, long="local", memory_gb=1e-3)
    assert cut  # what does not fit goes in windows, as with "auto"


def test_a_border_anywhere_in_a_word_neither_loses_nor_doubles_it(base, monkeypatch):
    """A border on every encoder frame of a second, in the middle of what is said."""
    local = with_local_attention(base, 4)
    clips = load_file(golden("hybrid_tdt_ctc_bpe") / "golden.safetensors")
    spoken = [clip[:n] for clip, n in zip(clips["audio"], clips["audio_len"], strict=True)]
    samples = np.tile(np.concatenate(spoken), 3)[: 9 * 16000]
    audio = torch.from_numpy(samples)[None]
    features, lengths = local.featurize(audio, torch.tensor([len(samples)]))
    features = features[:, :, : lengths[0]]
    whole, lengths = local.encode(features, lengths)
    factor, total = local.config.encoder.subsampling_factor, int(lengths[0])
    context = round(longform.context_seconds(local.config) / local.config.frame_seconds)
    assert context < total // 2

    def words(encoded, head):
        (found,) = local.decode_greedy(encoded, lengths, head)
        return local.transcript(found, head, 9.0, timestamps=True).words

    expected = {head: words(whole, head) for head in base.heads}
    assert all(len(words) > 20 for words in expected.values())
    middle = expected["ctc"][len(expected["ctc"]) // 2]
    first = round((middle.start + middle.end) / 2 / local.config.frame_seconds) - 12
    kept = {True: 0, False: 0}  # texts that stay the same, with context and without
    for border in range(first, first + 25):
        for seen in (context, 2):
            start, stop = max(0, border - seen), min(total, border + seen)
            plan = [
                longform.Window(0, stop * factor, 0, border),
                longform.Window(start * factor, features.shape[2], border - start, total - border),
            ]
            monkeypatch.setattr(longform, "plan_windows", lambda *_, plan=plan: plan)
            joined = longform.encode_in_windows(local, features[0])
            kept[seen == context] += all(words(joined, h) == expected[h] for h in base.heads)
    assert kept[True] == 25 > kept[False]


def test_kept_positions_follow_the_weights():
    """Attention without gradients keeps its projected positions; they are those of other lengths
    and of weights that changed."""
    torch.manual_seed(0)
    layer = attention.RelPositionMultiHeadAttention(32, 4, 0.0, True)
    for t in (20, 33, 20, 7, 33):
        x = torch.randn(1, t, 32)
        pos_emb = attention.position_encoding(torch.arange(t - 1, -t, -1), 32)
        hidden = torch.zeros(1, 1, 1, t, dtype=torch.bool)
        expected = layer(x, pos_emb, hidden).detach()  # with gradients nothing is kept
        with torch.no_grad():
            torch.testing.assert_close(layer(x, pos_emb, hidden), expected, rtol=1e-5, atol=1e-5)
            layer.linear_pos.weight.mul_(1.5)


def test_batches_hold_every_clip_once_within_the_budget(base):
    durations = [3.0, 700.0, 1.0, 90.0, 12.0, 12.0, 3000.0]
    budget = memory_estimate(base.config, 100.0, torch.float32)
    passes = list(longform.batches(base.config, durations, 4, budget, torch.float32))
    assert sorted(i for clips, _ in passes for i in clips) == list(range(len(durations)))
    for clips, window in passes:
        longest = max(durations[i] for i in clips)
        too_large = memory_estimate(base.config, longest, torch.float32) > budget
        assert window == (longform.WINDOW_S if too_large else None)
        assert len(clips) <= (1 if window else 4)


def test_full_attention_is_not_used_beyond_what_models_are_trained_for(base):
    assert longform.choose_window(base.config, 600.0, 1 << 40, torch.float32) is None
    assert longform.choose_window(base.config, 3600.0, 1 << 40, torch.float32) == 120.0
    local = with_local_attention(base, 8).config
    assert longform.choose_window(local, 3600.0, 1 << 40, torch.float32) is None


def test_a_cpu_takes_the_cheapest_way(base):
    """Whatever the model's width: what is chosen never costs more than one pass by the estimate,
    short clips are left whole, linear encoders too, and memory still forbids."""
    wide = golden("hybrid_tdt_ctc_bpe") / "model.nemo"
    raw = dict(fastconformer.load_model(wide).config.nemo)
    raw["encoder"] = raw["encoder"] | {"d_model": 512, "n_heads": 8, "n_layers": 17}
    wide = ModelConfig.from_nemo(raw)
    least = {}
    for name, config in (("base", base.config), ("wide", wide)):
        for seconds in (30.0, 60.0, 61.0, 90.0, 120.0, 180.0, 300.0, 1200.0, 3600.0):
            found = longform.choose_window(config, seconds, 1 << 40, torch.float32, on_cpu=True)
            if seconds <= 60.0:
                assert found is None
            elif found is not None:
                least.setdefault(name, seconds)
                costs = {w: longform.attention_cost(config, seconds, w) for w in (30, 60, 120)}
                assert costs[found] == min(costs.values())
                assert costs[found] <= 0.8 * longform.attention_cost(config, seconds)
    assert least["base"] <= 120.0 < least["wide"] <= 300.0
    assert longform.choose_window(base.config, 70.0, 1 << 20, torch.float32, on_cpu=True) == 30.0
    local = with_local_attention(base, 8).config
    assert longform.choose_window(local, 300.0, 1 << 40, torch.float32, on_cpu=True) is None


def test_segments_and_progress_as_they_come(base, capsys):
    clip = load_audio(ROOT / "samples/espeak.wav", 16000)
    long, told = np.concatenate([clip, clip, clip]), []
    [whole] = base.transcribe([clip], timestamps=True)
    spans = list(base.transcribe_iter(long, window_s=len(clip) / 16000 + 0.4))
    assert len(spans) >= 3 and spans[0].text == whole.segments[0].text
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    assert spans[-1].end <= len(long) / 16000
    for wrong in (0, float("nan")):
        with pytest.raises(ValueError, match="expected seconds, more than 0"):
            next(base.transcribe_iter(long, window_s=wrong))
    base.transcribe(
        [long, clip], long="chunks", window_s=3.0, batch_size=1, progress=lambda *a: told.append(a)
    )
    seconds = [done for done, _ in told]
    assert seconds == sorted(seconds) and len(told) > 4
    assert told[-1] == pytest.approx((4 * len(clip) / 16000,) * 2)
    base.transcribe([clip], progress=True)
    assert capsys.readouterr().err.endswith("\r100% of 0.1 minutes\n")


def test_a_window_bounds_what_full_attention_sees(base, monkeypatch):
    """For models trained on short clips: a longer one goes in windows, shorter ones whole."""
    seen, encode = [], fastconformer.ASRModel.encode

    def watched(model, features, lengths):
        seen.append(int(lengths.max()) * base.config.preprocessor.window_stride)
        return encode(model, features, lengths)

    monkeypatch.setattr(fastconformer.ASRModel, "encode", watched)
    long, short = babble(20.0), babble(5.0)
    found = base.transcribe([long, short], window_s=6.0)
    assert max(seen) <= 6.0 * (1 + 2 / 6) + 0.1 and len(seen) > 1
    assert found[1].text == base.transcribe(short)[0].text
    context = 6.0 * longform.CONTEXT_S / longform.WINDOW_S
    monkeypatch.setattr(longform, "WINDOW_S", 6.0)
    monkeypatch.setattr(longform, "CONTEXT_S", context)
    assert found[0].text == base.transcribe(long, long="chunks")[0].text
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="window_s is"):
            base.transcribe(short, window_s=wrong)


def test_unknown_mode_is_refused(base):
    with pytest.raises(ValueError, match="long is 'windows', expected one of auto"):
        base.transcribe(np.zeros(16000, np.float32), long="windows")


def test_times_of_windows_are_those_of_the_recording(base):
    audio = babble(30.0)
    whole = base.transcribe(audio, long="full", timestamps=True)[0]
    chunks = base.transcribe(audio, long="chunks", timestamps=True)[0]
    assert chunks.tokens == whole.tokens and chunks.words == whole.words  # one window holds it
    assert chunks.duration == 30.0 and all(0 <= w.start <= w.end <= 30 for w in chunks.words)


def test_a_budget_is_kept(tmp_path):
    """Five minutes under a budget that one pass would break: peak memory beside the weights."""
    script = (
        "import json, resource, sys, numpy as np, torch, fastconformer\n"
        "torch.set_num_threads(1)\n"
        f"model = fastconformer.load_model({str(BASE)!r})\n"
        "rng = np.random.default_rng(0)\n"
        "short, long = (rng.standard_normal(16000 * s).astype('float32') for s in (1, 300))\n"
        "model.transcribe(short, head='ctc')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "model.transcribe(long, head='ctc', memory_gb=float(sys.argv[1]))\n"
        "print(json.dumps(peak() - before))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "0.5"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) < 0.5e9


def test_eight_threads_give_what_one_gives(base):
    clips = [babble(2.0 + i / 3, seed=i) for i in range(16)]
    alone = base.transcribe(clips, timestamps=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda clip: base.transcribe(clip, timestamps=True)[0], clips * 2))
    assert [t.text for t in found] == [t.text for t in alone] * 2
    assert any(t.text for t in alone)
    assert [t.words for t in found] == [t.words for t in alone] * 2


def test_golden_clip_in_windows(base):
    """A recorded model's text stays the same when its clip goes through windows."""
    model = fastconformer.load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    audio = babble(8.0)
    for head in model.heads:
        chunks, full = (model.transcribe(audio, head, long=mode)[0] for mode in ("chunks", "full"))
        assert chunks.tokens == full.tokens and chunks.token_frames == full.token_frames


@pytest.mark.parametrize("head", ["tdt", "ctc"])
def test_a_text_told_by_windows_is_that_of_chunks(base, head):
    clip, told = np.pad(babble(20.0), (24000, 12000)), []  # digital silence around it
    found = transcribe_in_windows(base, clip, told.append, head, window_s=4.0)
    options = {"long": "chunks", "window_s": 4.0, "retry": False, "timestamps": True}
    (wanted,) = base.transcribe([clip], head, **options)
    assert found.score == pytest.approx(wanted.score)  # summed in another order
    assert dataclasses.replace(found, score=wanted.score) == wanted
    assert len(told) >= 5 and told[1]
    for before, after in itertools.pairwise([*told, found.text]):
        assert after.startswith(before)

    def stop(text):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        transcribe_in_windows(base, clip, stop)
