"""Greedy decoding against loops written one token at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer.config import JointConfig, PredictionConfig
from fastconformer.decoding import Confidence, ctc_greedy, segments, transducer_greedy
from fastconformer.decoding import graphs as graphs_module
from fastconformer.decoding import transducer as transducer_module
from fastconformer.decoding.label_loop import LabelLoop
from fastconformer.networks.graphs import GraphCache
from fastconformer.networks.heads import Joint, PredictionNetwork

V, D = 6, 5


def transducer(n_durations, seed=0, layers=1):
    """A random prediction network and joint that emit tokens, blanks and all durations."""
    generator = torch.Generator().manual_seed(seed)
    decoder = PredictionNetwork(
        PredictionConfig(vocab_size=V, pred_hidden=7, pred_rnn_layers=layers, dropout=0.0)
    )
    joint = Joint(JointConfig(V, D, 7, 8, "relu", 0.0, n_durations))
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *joint.parameters()):
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return decoder.eval(), joint.eval()


@torch.no_grad()
def one_by_one(encoded, decoder, joint, durations, max_symbols, forbidden=()):
    """(tokens, frames, durations, score) of one clip (T', D); stops where `max_symbols` is None and
    the decoder would stay on a frame for ever."""
    tokens, frames, spans, score = [], [], [], 0.0
    output, state = decoder.start(1)
    frame = on_frame = 0
    projected = joint.enc(encoded)
    while frame < len(encoded):
        logits = joint.step(projected[frame], joint.pred(output)[0])
        token_logits = logits[: V + 1].clone()
        token_logits[list(forbidden)] = -torch.inf
        token = int(token_logits.argmax())
        skip = durations[int(logits[V + 1 :].argmax())] if durations else int(token == V)
        if token == V:
            skip = max(skip, 1)
        else:
            score += float(token_logits.log_softmax(-1)[token])
            tokens.append(token)
            frames.append(frame)
            spans.append(skip)
            output, state = decoder.step(torch.tensor([token]), state)
            on_frame += 1
        if skip:
            on_frame = 0
        if max_symbols and on_frame >= max_symbols:
            skip, on_frame = 1, 0
        frame += skip
    return tokens, frames, spans if durations else None, score


DURATIONS = [(), (0, 1, 2, 3, 4), (0, 1), (1, 2, 4, 8), (2, 0, 7)]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    durations=st.sampled_from(DURATIONS),
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    max_symbols=st.sampled_from([1, 2, 10]),
    layers=st.integers(1, 2),
    forbidden=st.sampled_from([(), (0,), (1, 3)]),
)
def test_label_looping_equals_one_token_at_a_time(
    seed, durations, lengths, max_symbols, layers, forbidden
):
    decoder, joint = transducer(len(durations), seed, layers)
    encoded = torch.randn(len(lengths), max(lengths), D, generator=torch.manual_seed(seed))
    bias = torch.zeros(V + 1).index_fill(0, torch.tensor(forbidden, dtype=torch.long), -torch.inf)
    arguments = (decoder, joint, V, durations, max_symbols, bias if forbidden else None)
    expected = [
        one_by_one(encoded[b, :n], decoder, joint, durations, max_symbols, forbidden)
        for b, n in enumerate(lengths)
    ]
    for graphs in (None, GraphCache()):
        found = transducer_greedy(encoded, torch.tensor(lengths), *arguments, graphs=graphs)
        for hypothesis, (tokens, frames, spans, score) in zip(found, expected, strict=True):
            assert hypothesis.tokens == tokens
            assert hypothesis.frames == frames
            assert hypothesis.durations == spans
            assert hypothesis.score == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("durations", DURATIONS)
def test_every_window_gives_the_same(window, durations):
    decoder, joint = transducer(len(durations), seed=3)
    encoded, lengths = torch.randn(3, 50, D), torch.tensor([50, 17, 33])
    joint.joint_net[-1].bias.data[V] += 3  # long runs of blanks
    with torch.no_grad():
        loop = LabelLoop(decoder, joint, V, durations, 5, None, None, 3, window)
        records = loop.run(joint.enc(encoded), lengths)[0]
    for b, n in enumerate(lengths.tolist()):
        tokens, frames, _, _ = one_by_one(encoded[b, :n], decoder, joint, durations, 5)
        spoken = records[:, 0, b] >= 0
        assert records[spoken, 0, b].tolist() == tokens
        assert records[spoken, 1, b].tolist() == frames


def test_kept_graphs_serve_other_shapes_and_weights():
    decoder, joint = transducer(5)
    graphs, durations = GraphCache(), (0, 1, 2, 3, 4)
    for batch, length in ((5, 30), (5, 31), (3, 29), (17, 64), (1, 1), (2, 300), (5, 30)):
        encoded, lengths = torch.randn(batch, length, D), torch.randint(1, length + 1, (batch,))
        arguments = (encoded, lengths, decoder, joint, V, durations, 10)
        kept = transducer_greedy(*arguments, graphs=graphs)
        assert [h.tokens for h in kept] == [h.tokens for h in transducer_greedy(*arguments)]
        assert len(graphs.graphs) <= graphs_module.KEPT
    decoder, joint = transducer(5, seed=9)
    arguments = (encoded, lengths, decoder, joint, V, durations, 10)
    kept = transducer_greedy(*arguments, graphs=graphs)
    assert [h.tokens for h in kept] == [h.tokens for h in transducer_greedy(*arguments)]
    assert not copy.deepcopy(graphs).graphs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 5), frames=st.integers(0, 12))
def test_ctc_greedy_equals_one_frame_at_a_time(seed, batch, frames):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(batch, frames, 4, generator=generator).mul(2).log_softmax(-1)
    lengths = torch.randint(0, frames + 1, (batch,), generator=generator)
    found = ctc_greedy(log_probs, lengths, confidence=Confidence(aggregation="mean"))
    for hypothesis, rows, n in zip(found, log_probs, lengths.tolist(), strict=True):
        runs, score, before = [], 0.0, 3
        for t in range(n):
            best, label = (float(x) for x in rows[t].max(0))
            label = int(label)
            if label != 3:
                score += best
                if label != before:
                    runs.append([label, t, 0, []])
                runs[-1][2] += 1
                runs[-1][3].append(float(Confidence().of(rows[t], 4)))
            before = label
        assert hypothesis.tokens == [run[0] for run in runs]
        assert hypothesis.frames == [run[1] for run in runs]
        assert hypothesis.durations == [run[2] for run in runs]
        assert hypothesis.score == pytest.approx(score, abs=1e-4)
        means = [sum(run[3]) / len(run[3]) for run in runs]
        assert hypothesis.confidences == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("durations", DURATIONS[:2])
@pytest.mark.parametrize("forgetful", [True, False])
def test_segments_decoded_side_by_side_equal_one_after_the_other(durations, forgetful, monkeypatch):
    """Whether the prediction network forgets what it read in another segment, or never does. In
    float64: a random network may blow up the last bit of float32 to another text."""
    decoder, joint = transducer(len(durations), seed=5)
    lstm = decoder.prediction["dec_rnn"].lstm
    lstm.weight_hh_l0.data *= 0.2
    if not forgetful:
        lstm.bias_ih_l0.data[7:14] += 12  # the forget gate stays open
    decoder, joint = decoder.double(), joint.double()
    lengths = torch.tensor([300, 0, 33, 64])
    encoded = torch.randn(4, 300, D, generator=torch.manual_seed(1)).double()
    arguments = (encoded, lengths, decoder, joint, V, durations, 3, None, Confidence())
    expected = transducer_greedy(*arguments)
    met = []

    def counted(*arguments, begin_again=segments._begin_again, **options):
        found = begin_again(*arguments, **options)
        met.append(found[2].float().mean().item())
        return found

    monkeypatch.setattr(segments, "_begin_again", counted)
    for long, segment, graphs in ((60, 64, GraphCache()), (60, 30, None), (290, 128, None)):
        monkeypatch.setattr(transducer_module, "LONG_FRAMES", long)
        monkeypatch.setattr(segments, "SEGMENT_FRAMES", segment)
        for a, b in zip(expected, transducer_greedy(*arguments, graphs=graphs), strict=True):
            assert (a.tokens, a.frames, a.durations) == (b.tokens, b.frames, b.durations)
            assert a.score == pytest.approx(b.score, abs=1e-2)
            assert a.confidences == pytest.approx(b.confidences, abs=1e-3)
    assert max(met) > 0.5 if forgetful else len(met) > 3  # else nothing was gained or tried


def test_an_hour_of_clips_makes_few_graphs(monkeypatch):
    """Batches of 64, sorted by length, with clips tried again alone: a graph serves them whatever
    their frames; a longer clip than it has room for makes a larger one."""
    decoder, joint = transducer(5)
    graphs, built = GraphCache(), []
    build = graphs_module.LabelLoop
    monkeypatch.setattr(
        graphs_module, "LabelLoop", lambda *a: built.append(a[7]) or build(*a)
    )  # fmt: skip
    seconds = torch.exp(2.3 + 0.6 * torch.randn(2000, generator=torch.manual_seed(0)))
    seconds = seconds.clamp(1.5, 35.0)
    seconds = seconds[: int((seconds.cumsum(0) < 3600).sum())].sort(descending=True).values
    frames = (seconds * 12.5).long() + 1
    options = decoder, joint, V, (0, 1, 2, 3, 4), 10, None, None
    for batch in frames.split(64):
        for lengths in (batch, batch[:1] // 2 + 1):
            projected = torch.zeros(len(lengths), int(lengths.max()), 8)
            graphs_module.loop_for(graphs, projected, options)
    assert len(built) <= 8 and max(built) == 64
    before = len(built)
    assert (
        len(graphs_module.loop_for(graphs, torch.zeros(1, 5000, 8), options)[0].projected) >= 5000
    )
    graphs_module.loop_for(graphs, torch.zeros(1, 400, 8), options)
    assert len(built) == before + 1
