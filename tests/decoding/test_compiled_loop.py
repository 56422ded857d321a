"""The compiled greedy loop against the plain one, whose steps test_decoding.py checks."""

import copy
import threading

import pytest
import torch
from test_decoding import DURATIONS, D, V, transducer

from fastconformer.config import JointConfig, PredictionConfig
from fastconformer.decoding import Confidence, transducer_greedy
from fastconformer.decoding import transducer as transducer_module
from fastconformer.networks.heads import Joint, PredictionNetwork
from fastconformer.networks.linear import quantize

compiled_loop = pytest.importorskip(
    "fastconformer.decoding.compiled_loop", reason="numba is not installed"
)


def plainly(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(transducer_module, "_compiled_loop", lambda: None)
        return transducer_greedy(*arguments, **options)


def batch_of(seed, lengths=(40, 0, 17, 1, 33)):
    encoded = torch.randn(len(lengths), max(lengths), D, generator=torch.manual_seed(seed))
    return encoded, torch.tensor(lengths)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("max_symbols", [1, 10])
@pytest.mark.parametrize("durations", DURATIONS)
def test_equals_the_plain_loop(monkeypatch, durations, max_symbols, activation):
    decoder, joint = transducer(len(durations), seed=1, layers=2)
    joint.activation = activation
    joint.joint_net[0] = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}.get(
        activation, torch.nn.Sigmoid
    )()
    encoded, lengths = batch_of(3)
    bias = torch.zeros(V + 1).index_fill(0, torch.tensor([2]), -torch.inf)
    for options in ({}, {"bias": bias}, {"confidence": Confidence(include_duration=True)}):
        arguments = encoded, lengths, decoder, joint, V, durations, max_symbols
        expected = plainly(monkeypatch, *arguments, **options)
        found = transducer_greedy(*arguments, **options)
        assert sum(len(h.tokens) for h in expected) > 10
        for a, e in zip(found, expected, strict=True):
            assert (a.tokens, a.frames, a.durations) == (e.tokens, e.frames, e.durations)
            assert a.score == pytest.approx(e.score, abs=1e-3)
            assert (a.confidences is None) == (e.confidences is None)
            assert a.confidences is None or a.confidences == pytest.approx(e.confidences, abs=1e-4)


def test_a_clip_alone_has_the_same_bits_as_in_a_batch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    decoder, joint = transducer(5, seed=2)
    encoded, lengths = batch_of(4)
    projected = joint.enc(encoded).detach()
    options = decoder, joint, V, (0, 1, 2, 3, 4), 10, None, None
    together = compiled_loop.run(projected, lengths, *options)
    for b in range(len(lengths)):
        (alone,) = compiled_loop.run(projected[b : b + 1], lengths[b : b + 1], *options)
        for a, e in zip(alone, together[b], strict=True):
            assert a.tobytes() == e.tobytes()


def wide_transducer():
    """Products of several pieces, the last ones not whole; two layers of int8 weights."""
    decoder = PredictionNetwork(
        PredictionConfig(vocab_size=150, pred_hidden=83, pred_rnn_layers=2, dropout=0.0)
    )
    joint = Joint(JointConfig(150, D, 83, 70, "relu", 0.0, 5))
    generator = torch.manual_seed(3)
    for parameter in (*decoder.parameters(), *joint.parameters()):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    for part in (decoder.eval(), joint.joint_net):
        quantize(part, plain=True)
    return decoder, joint.eval()


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_helpers_change_no_bit(monkeypatch, n_threads):
    decoder, joint = wide_transducer()
    encoded, lengths = batch_of(4, (60, 31))
    projected = joint.enc(encoded).detach()
    options = decoder, joint, 150, (0, 1, 2, 3, 4), 10, None, None
    helpers = []

    def counted(n, *arguments, real=compiled_loop._helped):
        helpers.append(n)
        return real(n, *arguments)

    monkeypatch.setattr(compiled_loop, "_helped", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = compiled_loop.run(projected, lengths, *options)
    assert helpers == [0] and all(len(ints[0]) > 10 for ints, _ in expected)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    compiled_loop.run(projected, lengths, *options)
    assert set(helpers) == {0}  # so small a network is as fast without
    monkeypatch.setattr(compiled_loop, "_WORTH_HELP", 0)
    before = threading.active_count()
    for b in (slice(0, 2), slice(0, 1), slice(1, 2)):
        compiled_loop._kept.clear()  # what the tokens give is computed anew
        helpers.clear()
        found = compiled_loop.run(projected[b], lengths[b], *options)
        n = b.stop - b.start
        assert helpers == [min(n_threads // n, 4) - 1] * n
        for a, e in zip(found, expected[b], strict=True):
            assert all(x.tobytes() == y.tobytes() for x, y in zip(a, e, strict=True))
    assert threading.active_count() == before


def test_more_tokens_than_frames(monkeypatch):
    """Records grow; nothing is lost where they were full."""
    decoder, joint = transducer(0, seed=6)
    joint.joint_net[-1].bias.data[V] -= 20  # never a blank: max_symbols on each frame
    arguments = (*batch_of(5), decoder, joint, V, (), 7)
    for confidence in (None, Confidence()):
        expected = plainly(monkeypatch, *arguments, confidence=confidence)
        found = transducer_greedy(*arguments, confidence=confidence)
        assert [len(h.tokens) for h in found] == [7 * n for n in (40, 0, 17, 1, 33)]
        assert [h.tokens for h in found] == [h.tokens for h in expected]


def test_weights_that_change_are_seen(monkeypatch):
    decoder, joint = transducer(5, seed=7)
    arguments = (*batch_of(6), decoder, joint, V, (0, 1, 2, 3, 4), 10)
    before = transducer_greedy(*arguments)
    with torch.no_grad():
        decoder.prediction["embed"].weight.mul_(-1)
    after = transducer_greedy(*arguments)
    assert [h.tokens for h in after] != [h.tokens for h in before]
    expected = plainly(monkeypatch, *arguments)
    assert [h.tokens for h in after] == [h.tokens for h in expected]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_other_weights_are_computed_with_in_float32(monkeypatch, kind):
    """Against the plain loop in float64 on the same, rounded weights: the error is float32's, of
    activations that are not rounded."""
    decoder, joint = transducer(5, seed=8)
    encoded, lengths = batch_of(7)
    encoded = encoded.bfloat16()
    exact = [copy.deepcopy(m) for m in (decoder, joint)]
    if kind == "bfloat16":
        decoder, joint = decoder.bfloat16(), joint.bfloat16()
        exact = [copy.deepcopy(m).double() for m in (decoder, joint)]
    else:
        encoded = encoded.float()
        for part in (decoder, joint.joint_net):
            quantize(part, plain=True)
        pairs = [(decoder.prediction["dec_rnn"].lstm, exact[0].prediction["dec_rnn"].lstm)]
        pairs += [(joint.joint_net[-1], exact[1].joint_net[-1])]
        for ours, theirs in pairs:
            for name, weight in vars(ours).items():
                if name.startswith("weight"):
                    rounded = weight.rounded.double() * weight.scale.double()[:, None]
                    getattr(theirs, name).data = rounded.float()
        exact = [m.double() for m in exact]
    # the projection of frames is torch's and rounded by it: the same for both
    projected = joint.enc(encoded)
    joint.enc = torch.nn.Identity()
    joint.enc.weight = torch.zeros((), dtype=projected.dtype)
    exact[1].enc = torch.nn.Identity()
    options = V, (0, 1, 2, 3, 4), 10
    found = transducer_greedy(projected, lengths, decoder, joint, *options)
    expected = plainly(monkeypatch, projected.double(), lengths, *exact, *options)
    for a, e in zip(found, expected, strict=True):
        assert a.tokens == e.tokens
        assert a.score == pytest.approx(e.score, rel=1e-5, abs=1e-4)


def test_float64_goes_the_plain_way():
    decoder, joint = (m.double() for m in transducer(5))
    assert not compiled_loop.fits(decoder, joint)
    encoded, lengths = batch_of(7)
    assert transducer_greedy(encoded.double(), lengths, decoder, joint, V, (0, 1, 2, 3, 4), 10)
