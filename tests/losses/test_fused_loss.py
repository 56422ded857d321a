# ruff: noqa: B023, E731 (closures that are called within their loop's turn)
"""The fused transducer loss: equal to the loss of the whole joint, in tiles of any size."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import golden, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastconformer
from fastconformer import losses
from fastconformer.losses import (
    fused_cells,
    fused_operator,
    fused_transducer_loss,
    fused_vectorised,
    reference,
)

fused_cpu = pytest.importorskip("fastconformer.losses.fused_cpu", reason="numba is not installed")

NAMES = ("enc_proj", "pred_proj", "out_weight", "out_bias")


@pytest.fixture(params=[fused_cpu, fused_vectorised], ids=["cpu", "vectorised"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(fused_operator, "_backend", lambda device: request.param)
    return request.param


def make(n_frames=(6, 4), n_tokens=(3, 2), n_tokens_v=7, n_durations=0, width=5, seed=0, scale=1.5):
    """Random float64 inputs, targets and lengths; the output layer has V+1+N rows."""
    generator = torch.Generator().manual_seed(seed)
    batch, n_outputs = len(n_frames), n_tokens_v + 1 + n_durations
    shapes = [(batch, max(n_frames), width), (batch, max(n_tokens) + 1, width)]
    shapes += [(n_outputs, width), (n_outputs,)]
    inputs = [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    targets = torch.randint(0, n_tokens_v, (batch, max(n_tokens)), generator=generator)
    return inputs, targets, torch.tensor(n_frames), torch.tensor(n_tokens)


def joint(enc, pred, weight, bias, activation="relu", keep=None):
    hidden = getattr(torch, activation)(enc[:, :, None] + pred[:, None])
    return F.linear(hidden if keep is None else hidden * keep, weight, bias)


def run(loss, inputs, weights=None):
    """Losses of `loss(*inputs)` and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    (value * (torch.ones(()) if weights is None else weights)).sum().backward()
    return value.detach(), [x.grad for x in leaves]


def materialised(targets, n_frames, n_tokens, blank, durations=None, activation="relu", **options):
    """The reference: the whole joint in float64, the loss in plain loops, autograd."""

    def loss(*inputs):
        logits = joint(*inputs, activation=activation)
        if durations is None:
            return reference.rnnt_loss(logits, targets, n_frames, n_tokens, blank, **options)
        return reference.tdt_loss(logits, targets, n_frames, n_tokens, durations, blank, **options)

    return loss


def assert_near(actual, expected, tolerance, weights=None):
    """Losses relative to each, gradients relative to the largest entry of each tensor, and to 0.1
    at least: an alignment that is nearly certain leaves 1 - p, which rounds as p does."""
    for name, a, e in zip(("loss", *NAMES), (actual[0], *actual[1]), (expected[0], *expected[1])):
        size = e.abs() if name == "loss" else e.abs().max()
        assert ((a.double() - e).abs() <= tolerance * size.clamp(min=0.1)).all(), name


# The numbers


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (2, 0, 1), (1, 0, 9)])
def test_equals_the_reference(durations, activation):
    """T=1, U=0, U>T, a duration longer than T, ragged; tiles that cut frames and clips apart."""
    inputs, *batch = make((6, 1, 3, 5), (3, 4, 0, 1), n_durations=len(durations or ()))
    options = {"fastemit_lambda": 0.03, "clamp": 0.2} | ({"sigma": 0.05} if durations else {})
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
    expected = run(materialised(*batch, 7, durations, activation, **options), inputs, weights)
    for dtype, tile in itertools.product((torch.float64, torch.float32), (1, 5, None)):
        actual = run(
            lambda *x: fused_transducer_loss(
                *x, *batch, durations, activation=activation, tile_cells=tile, **options
            ),
            [x.to(dtype) for x in inputs],
            weights.to(dtype),
        )
        assert actual[0].dtype == dtype and all(g.dtype == dtype for g in actual[1])
        assert_near(actual, expected, 1e-12 if dtype == torch.float64 else 2e-6)


def test_gradcheck():
    inputs, *batch = make((3, 2), (2, 1), 3, 3, width=3)
    leaves = [x.requires_grad_() for x in inputs]
    for options in (
        {"durations": (0, 1, 3), "sigma": 0.1, "activation": "tanh"},
        {"durations": (0, 1, 3), "omega": 1.0, "reduction": "mean_volume"},
        {"durations": (0, 1, 2), "activation": "sigmoid", "reduction": "mean", "tile_cells": 4},
        {"reduction": "mean_batch", "blank": 2},
    ):
        batch[0].masked_fill_(batch[0] == 2, 0)
        loss = lambda *x, options=options: fused_transducer_loss(*x, *batch, **options)
        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("n_frames", "n_tokens"), [(1, 0), (1, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize("durations", [None, (0, 1, 2), (2, 0, 1), (0, 7, 1)])
def test_sum_over_all_alignments(n_frames, n_tokens, durations):
    inputs, targets, *lengths = make((n_frames,), (n_tokens,), 4, len(durations or ()))
    logits = joint(*inputs)[0]
    tokens = logits[..., :5].log_softmax(-1) - (0.05 if durations else 0.0)
    of_duration = logits[..., 5:].log_softmax(-1)
    totals, open_alignments = [], [(0, 0, 0.0)]
    while open_alignments:
        t, u, score = open_alignments.pop()
        arcs = [(d, i, True) for i, d in enumerate(durations)] if durations else [(0, None, True)]
        arcs += (
            [(d, i, False) for i, d in enumerate(durations) if d] if durations else [(1, None, 0)]
        )
        for frames, of_class, emits in arcs:
            if emits and u == n_tokens:
                continue
            step = tokens[t, u, targets[0, u] if emits else 4].item()
            step += 0.0 if of_class is None else of_duration[t, u, of_class].item()
            if t + frames == n_frames and u == n_tokens and not emits:
                totals.append(score + step)
            elif t + frames < n_frames:
                open_alignments.append((t + frames, u + bool(emits), score + step))
    expected = -torch.tensor(totals, dtype=torch.float64).logsumexp(0)
    sigma = 0.05 if durations else 0.0
    value = fused_transducer_loss(*inputs, targets, *lengths, durations, sigma=sigma)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


@st.composite
def problems(draw):
    batch = draw(st.integers(1, 4))
    n_frames = draw(st.lists(st.integers(1, 7), min_size=batch, max_size=batch))
    n_tokens = draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
    durations = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda x: not x or max(x) > 0))
    shape = {"n_tokens_v": draw(st.integers(2, 40)), "width": draw(st.integers(1, 33))}
    tensors = make(
        n_frames, n_tokens, n_durations=len(durations), seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])), **shape,
    )  # fmt: skip
    options = {
        "fastemit_lambda": draw(st.sampled_from([0.0, 0.3])),
        "clamp": draw(st.sampled_from([-1.0, 0.05])),
    }
    return (
        tensors, durations, shape["n_tokens_v"], options, draw(st.integers(1, 50)),
        draw(st.sampled_from(["relu", "tanh", "sigmoid"])),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(problems())
def test_any_shape(problem):
    (inputs, *batch), durations, blank, options, tile, activation = problem
    options |= {"sigma": 0.05} if durations else {}
    definition = materialised(*batch, blank, durations or None, activation, **options)
    impossible = definition(*inputs).isinf()
    weights = torch.linspace(0.5, -2.0, len(impossible), dtype=torch.float64)
    weights = weights.masked_fill(impossible, 0.0)
    if impossible.any():  # the reference's gradient is not a number there
        weights[:] = 0.0
    expected = run(definition, inputs, weights)
    for dtype in (torch.float64, torch.float32):
        actual = run(
            lambda *x: fused_transducer_loss(
                *x, *batch, durations or None, tile_cells=tile, activation=activation, **options
            ),
            [x.to(dtype) for x in inputs],
            weights.to(dtype),
        )
        if impossible.any():
            assert torch.equal(actual[0].isinf(), impossible)
            assert all((g == 0).all() for g in actual[1])
        else:
            logits = joint(*inputs, activation=activation).abs().max().item()
            assert_near(actual, expected, 1e-11 if dtype == torch.float64 else 5e-6 + 4e-7 * logits)


@pytest.mark.parametrize("n_tokens_v", [5, 1024, 16384])
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4)])
def test_vocabularies(n_tokens_v, durations):
    """float32 against float64 autograd; bfloat16 beside plain PyTorch's own error in it."""
    inputs, *batch = make((9, 13), (5, 3), n_tokens_v, len(durations or ()), width=48, scale=0.5)
    of_type = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cast = [x.to(dtype) for x in inputs]

        def plain(*x):
            logits = joint(*x)
            options = {"blank": n_tokens_v, "reduction": "none"}
            if durations is None:
                return losses.rnnt_loss(logits, *batch, **options)
            return losses.tdt_loss(logits, *batch, durations, sigma=0.02, **options)

        sigma = 0.02 if durations else 0.0
        actual = run(lambda *x: fused_transducer_loss(*x, *batch, durations, sigma=sigma), cast)
        of_type[dtype] = run(plain, cast), actual
    truth = of_type[torch.float64][0]
    assert_near(of_type[torch.float64][1], truth, 1e-11)
    assert_near(of_type[torch.float32][1], truth, 1e-5)
    plain, actual = of_type[torch.bfloat16]
    assert (actual[0] - truth[0]).abs().max() <= 2 * (plain[0] - truth[0]).abs().max() + 1e-3
    for name, a, p, t in zip(NAMES, actual[1], plain[1], truth[1], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - t).norm() <= 2 * (p - t).norm(), name


@pytest.mark.parametrize("name", ["loss_tdt", "loss_rnnt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_losses(name, dtype):
    """An output layer that passes the stored logits through: frames and rows one-hot."""
    case = load_case(name)
    bits = "f64" if dtype == torch.float64 else "f32"
    for config_name, config in case.expected["configs"].items():
        logits, targets, logit_lens, target_lens, loss, grad = (
            case.tensors[f"{config_name}/{key}"]
            for key in ("logits", "targets", "logit_lens", "target_lens", "loss", "grad")
        )
        durations = config.get("durations")
        options = {key: config[key] for key in ("fastemit_lambda", "clamp")}
        if durations:
            options |= {"sigma": config["sigma"], "omega": float(config.get("branch") == "rnnt")}
        for b in range(len(logits)):
            # hidden(t, u) = relu(e_t + e_u - 1) is one-hot at the cell (t, u).
            n_frames, n_rows, n_outputs = logits[b].shape
            frame = torch.arange(n_frames * n_rows) // n_rows == torch.arange(n_frames)[:, None]
            row = torch.arange(n_frames * n_rows) % n_rows == torch.arange(n_rows)[:, None]
            enc, pred = frame[None].to(dtype), row[None].to(dtype) - 1.0
            weight = logits[b].reshape(-1, n_outputs).t().to(dtype).clone().requires_grad_()
            value = fused_transducer_loss(
                enc, pred, weight, None, targets[b : b + 1], logit_lens[b : b + 1],
                target_lens[b : b + 1], durations, blank=config["V"], **options,
            )  # fmt: skip
            value.sum().backward()
            tolerance = case.expected["suggested_tolerance"]
            assert value.item() == pytest.approx(
                loss[b].item(), rel=tolerance[f"loss_relative_{bits}"]
            )
            actual = weight.grad.t().view_as(logits[b]).double()
            assert (actual - grad[b]).abs().max() <= tolerance[f"grad_abs_{bits}"], config_name


# Dropout, omega, eps


def test_dropout_is_replayed():
    """The gradient is that of the very mask the forward pass drew; the seed is torch's."""
    inputs, *batch = make((30, 21), (6, 9), 11, 2, width=64)
    for activation in ("relu", "tanh", "sigmoid"):

        def loss(*x, tile=None):
            return fused_transducer_loss(
                *x,
                *batch,
                (0, 1),
                activation=activation,
                dropout=0.3,
                tile_cells=tile,
            )

        torch.manual_seed(5)
        value, grads = run(loss, inputs)
        after = torch.random.get_rng_state()
        torch.manual_seed(5)
        again, _ = run(lambda *x: loss(*x, tile=17), inputs)
        assert torch.equal(torch.random.get_rng_state(), after)
        torch.testing.assert_close(again, value, rtol=1e-12, atol=0.0)
        different, _ = run(loss, inputs)
        assert (different != value).all()
        # The mask itself, through the whole joint.
        torch.manual_seed(5)
        seed = int(torch.randint(0, 2**62, ()))
        n_cells = 30 * 7 + 21 * 10
        job = fused_cells.Job(*[None] * 17, 0.3, seed)._replace(enc=torch.empty(1, 64))
        mask = fused_vectorised.keep(job, torch.arange(n_cells)).double() / 0.7
        keep = torch.zeros(2, 30, 10, 64, dtype=torch.float64)
        keep[0, :, :7] = mask[: 30 * 7].view(30, 7, 64)
        keep[1, :21] = mask[30 * 7 :].view(21, 10, 64)

        def whole(*x):
            logits = joint(*x, activation=activation, keep=keep)
            return losses.tdt_loss(logits, *batch, (0, 1), 11, reduction="none")

        assert_near((value, grads), run(whole, inputs), 1e-11)
        assert (mask == 0).double().mean() == pytest.approx(0.3, abs=0.01)
        by_channel = (mask == 0).double().mean(0)
        assert by_channel.min() > 0.15 and by_channel.max() < 0.45
        pairs = (mask[:-1] == 0) & (mask[1:] == 0)  # neighbours are independent
        assert pairs.double().mean() == pytest.approx(0.09, abs=0.01)


def test_omega_tosses_the_same_coin_as_tdt_loss():
    inputs, *batch = make((6, 4), (3, 2), 7, 3)
    logits = joint(*inputs)
    options = {"sigma": 0.05, "omega": 0.4, "reduction": "mean_batch"}
    torch.manual_seed(3)
    expected = [losses.tdt_loss(logits, *batch, (0, 1, 2), 7, **options) for _ in range(20)]
    torch.manual_seed(3)
    actual = [fused_transducer_loss(*inputs, *batch, (0, 1, 2), **options) for _ in range(20)]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)
    assert len({round(x.item(), 6) for x in actual}) == 2
    _, grads = run(
        lambda *x: fused_transducer_loss(*x, *batch, (0, 1, 2), sigma=0.05, omega=1.0), inputs
    )
    assert (grads[2][8:] == 0).all() and (grads[3][8:] == 0).all() and (grads[2][:8] != 0).any()


def test_skipped_cells_stay_within_the_bound():
    inputs, *batch = make((40, 25), (12, 20), 30, 5, width=16, scale=1.0)
    durations, lam = (0, 1, 2, 3, 4), 0.1
    dense = run(
        lambda *x: fused_transducer_loss(*x, *batch, durations, fastemit_lambda=lam), inputs
    )
    for eps in (1e-9, 1e-4, 1e-2):
        report = {}
        value, grads = run(
            lambda *x: fused_transducer_loss(
                *x,
                *batch,
                durations,
                fastemit_lambda=lam,
                eps=eps,
                report=report,
            ),
            inputs,
        )
        assert torch.equal(value, dense[0])
        share, lost = report["active_share"], report["skipped_occupancy"].max().item()
        assert share.shape == (2,) and (share > 0.0).all() and (share < 1.0).all()
        for clip, (t, u) in enumerate(zip(*(x.tolist() for x in batch[1:]), strict=True)):
            bound = 4 * (1 + lam) * eps * t * (u + 1) * inputs[2].abs().max()
            assert (grads[0][clip] - dense[1][0][clip]).abs().sum(0).max() <= bound
        difference = [(a - b).norm() / b.norm() for a, b in zip(grads, dense[1], strict=True)]
        assert max(difference) <= 100 * max(lost, 1e-12)
        if eps == 1e-2:
            assert max(difference) > 0.0 and lost > 0.0
    assert (share < 0.5).all()


# What training needs


def test_scaled_loss_and_half_types():
    """A loss scaled by 2^16 does not overflow in half types; weights of 0 leave a clip out."""
    inputs, *batch = make((20, 12), (6, 4), 40, 5, width=32, scale=0.5)
    durations = (0, 1, 2, 3, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = [x.to(dtype) for x in inputs]
        loss = lambda *x: fused_transducer_loss(*x, *batch, durations)
        _, plain = run(loss, cast, torch.tensor([1.0, 0.0]) / 2**10)
        _, scaled = run(loss, cast, torch.tensor([1.0, 0.0]) * 2**6)
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a.float() / 2**16, b.float(), rtol=1e-6, atol=1e-7)
        assert (scaled[0][1] == 0).all() and (scaled[1][1] == 0).all()


def test_autocast_casts_the_products_only():
    inputs, *batch = make((20, 12), (6, 4), 40, 5, width=32, scale=0.5)
    inputs = [x.float() for x in inputs]
    loss = lambda *x: fused_transducer_loss(*x, *batch, (0, 1, 2, 3, 4))
    value, grads = run(loss, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_grads = run(loss, inputs)
        mixed, _ = run(loss, [inputs[0].bfloat16(), *inputs[1:]])
    assert half.dtype == mixed.dtype == torch.float32
    assert not torch.equal(half, value)
    torch.testing.assert_close(half, value, rtol=1e-2, atol=0.0)
    for a, b in zip(half_grads, grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_states_are_not_rounded_before_their_sum():
    """Under autocast they come as they are: a sum near 0 is on the side of ReLU it is on in plain
    PyTorch, so that the gradient is as near the truth as plain PyTorch's."""
    inputs, *batch = make((20, 12), (6, 4), 40, 0, width=64)
    inputs = [inputs[0].float(), 0.01 * inputs[1].float() - inputs[0][:, :1].float(), *inputs[2:]]
    inputs = [x.float() for x in inputs]
    plain = lambda *x: losses.rnnt_loss(joint(*x), *batch, 40, reduction="none")
    _, truth = run(plain, [x.double() for x in inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, usual = run(plain, inputs)
        _, grads = run(lambda *x: fused_transducer_loss(*x, *batch), inputs)
    for g, u, t in zip(grads, usual, truth, strict=True):
        assert (g - t).norm() <= 2 * (u - t).norm()


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_the_slope_of_a_saturated_activation_is_not_rounded(activation):
    inputs, *batch = make((3, 2), (2, 1), 12, 0, width=64)
    inputs = [x.float() for x in (3 + inputs[0], 2 + inputs[1], *inputs[2:])]
    plain = lambda *x: losses.rnnt_loss(joint(*x, activation), *batch, 12, reduction="none")
    _, truth = run(plain, [x.double() for x in inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, usual = run(plain, inputs)
        _, grads = run(lambda *x: fused_transducer_loss(*x, *batch, activation=activation), inputs)
    for g, u, t in zip(grads, usual, truth, strict=True):
        assert (g - t).norm() <= 2 * (u - t).norm()


def test_the_same_call_gives_the_same_bits():
    inputs, *batch = make((40, 35), (12, 9), 150, 5, width=64)
    inputs = [x.float() for x in inputs]
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 2):
            torch.set_num_threads(n_threads)
            results.append(
                run(lambda *x: fused_transducer_loss(*x, *batch, (0, 1, 2, 3, 4)), inputs)
            )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0][0], results[2][0], rtol=1e-6, atol=0.0)
    assert torch.equal(results[1][0], results[2][0])
    assert all(torch.equal(a, b) for a, b in zip(results[1][1], results[2][1], strict=True))


def test_frozen_inputs_cost_nothing():
    inputs, *batch = make()
    everything = run(lambda *x: fused_transducer_loss(*x, *batch), inputs)
    for wanted in ((0,), (1,), (2,), (0, 1), (2, 3)):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        fused_transducer_loss(*leaves, *batch).sum().backward()
        for i, (leaf, grad) in enumerate(zip(leaves, everything[1], strict=True)):
            assert leaf.grad is None if i not in wanted else torch.equal(leaf.grad, grad)
    with torch.no_grad():
        value = fused_transducer_loss(*inputs, *batch)
    assert torch.equal(value, everything[0]) and not value.requires_grad
    no_bias = run(
        lambda *x: fused_transducer_loss(*x, torch.zeros_like(inputs[3]), *batch), inputs[:3]
    )
    assert torch.equal(no_bias[0], fused_transducer_loss(*inputs[:3], None, *batch))


def test_reductions():
    inputs, *batch = make((6, 4), (3, 2))
    each = fused_transducer_loss(*inputs, *batch)
    logits = joint(*inputs)
    for reduction in ("mean_batch", "mean", "mean_volume", "sum"):
        expected = losses.rnnt_loss(logits, *batch, 7, reduction=reduction)
        actual = fused_transducer_loss(*inputs, *batch, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)
    assert each.shape == (2,)


def test_padding_does_not_matter():
    inputs, targets, *lengths = make((6, 4), (3, 2), 7, 3)
    expected = run(lambda *x: fused_transducer_loss(*x, targets, *lengths, (0, 1, 2)), inputs)
    wide = [
        F.pad(inputs[0], (0, 0, 0, 3), value=math.nan),
        F.pad(inputs[1], (0, 0, 0, 2), value=math.inf),
    ]
    wide[0][1, 4:], wide[1][1, 3:] = math.nan, -math.inf
    wide_targets = F.pad(targets, (0, 5), value=-100)
    actual = run(
        lambda *x: fused_transducer_loss(*x, wide_targets, *lengths, (0, 1, 2)),
        [*wide, *inputs[2:]],
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0][:, :6], expected[1][0])
    assert (actual[1][0][:, 6:] == 0).all() and (actual[1][1][:, 4:] == 0).all()
    assert torch.equal(actual[1][2], expected[1][2])


@pytest.mark.parametrize("backend", [fused_cpu], indirect=True)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile(fullgraph):
    inputs, *batch = make((6, 4), (3, 2), 7, 3, width=8)

    def step(*x):
        return (
            fused_transducer_loss(x[0] * 2.0, *x[1:], *batch, (0, 1, 2), sigma=0.05, eps=1e-9) * 3
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=fullgraph)
    assert_near(run(compiled, inputs), run(step, inputs), 1e-12)


@pytest.mark.parametrize("backend", [fused_cpu], indirect=True)
def test_operators_are_declared_right(monkeypatch):
    inputs, *batch = make((6, 4), (3, 2), 7, 3, width=8)
    leaves = [x.requires_grad_() for x in inputs]
    seen = []
    true = fused_operator.transducer_forward
    monkeypatch.setattr(fused_operator, "transducer_forward", lambda *a: seen.append(a) or true(*a))
    fused_transducer_loss(*leaves, *batch, (0, 1, 2), dropout=0.1, omega=0.5)
    fused_transducer_loss(*leaves, *batch)
    for arguments in seen:
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(true, arguments, test_utils=tests)


class Joint(torch.nn.Module):
    """Both projections and the output layer, as in training, down to the losses."""

    def __init__(self, wide, width, n_outputs):
        super().__init__()
        self.enc, self.pred = torch.nn.Linear(wide, width), torch.nn.Linear(wide, width)
        self.out = torch.nn.Linear(width, n_outputs)

    def forward(self, frames, states, *batch, **options):
        inputs = self.enc(frames), self.pred(states), self.out.weight, self.out.bias
        return fused_transducer_loss(*inputs, *batch, (0, 1, 2), reduction="mean_batch", **options)


def gradients_in_a_process(rank, n_processes, folder, problem):
    """Gradients of the mean loss over this process's clips, averaged by DDP, into a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=n_processes)
    results = []
    for eps, kwargs in (
        (0.0, {}), (1e-7, {"static_graph": True}), (1e-7, {"find_unused_parameters": True}),
    ):  # fmt: skip
        torch.manual_seed(0)
        joint = torch.nn.parallel.DistributedDataParallel(Joint(9, 16, 44), **kwargs)
        for _ in range(2):  # a static graph is learnt in the first pass
            joint.zero_grad()
            joint(*(x[rank::n_processes] for x in problem), eps=eps).backward()
        results.append([p.grad for p in joint.parameters()])
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", [fused_cpu], indirect=True)
def test_two_processes_have_the_gradients_of_one(tmp_path):
    (frames, states, *_), *batch = make((20, 12, 17, 9), (6, 4, 3, 0), 40, 3, width=9)
    problem = frames.float(), states.float(), *batch
    torch.multiprocessing.spawn(gradients_in_a_process, (2, str(tmp_path), problem), nprocs=2)
    torch.manual_seed(0)
    joint = Joint(9, 16, 44)
    joint(*problem).backward()
    for rank in range(2):
        for grads in torch.load(tmp_path / f"{rank}.pt"):
            for (name, parameter), grad in zip(joint.named_parameters(), grads, strict=True):
                limit = 1e-5 * parameter.grad.abs().max()
                assert (grad - parameter.grad).abs().max() <= limit, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """The second forward pass draws the same dropout mask and tosses the same coin."""
    inputs, *batch = make((20, 12), (6, 4), 11, 3, width=8)
    options = {"dropout": 0.3, "omega": 0.5, "eps": 1e-9}
    loss = lambda *x: fused_transducer_loss(*x, *batch, (0, 1, 2), **options)
    saved = lambda *x: checkpoint(loss, *x, use_reentrant=reentrant)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = run(loss, inputs)
        torch.manual_seed(seed)
        assert_near(run(saved, inputs), expected, 1e-12)


# In the model


@pytest.mark.parametrize(
    "name", ["tdt_bpe", "rnnt_bpe", "hybrid_tdt_ctc_bpe", "hybrid_rnnt_ctc_bpe"]
)
def test_the_model_does_not_build_the_joint(name, monkeypatch):
    """Losses and gradients of the golden models, with a joint that refuses to be called."""
    case = load_case(name)
    model = fastconformer.load_model(golden(name) / "model.nemo")

    def refuse(*_):
        raise AssertionError("the joint tensor was built")

    monkeypatch.setattr(fastconformer.networks.heads.Joint, "forward", refuse)
    t, head = case.tensors, model.heads[0]
    for eps in (0.0, 1e-7):
        encoded = t["encoded"].clone().requires_grad_()
        report = {}
        model.zero_grad()
        value = model.losses(
            encoded, t["encoded_len"], t["targets"], t["targets_len"], (head,), eps, report
        )[head]
        torch.testing.assert_close(value.double(), t[f"{head}_loss"], rtol=1e-5, atol=0.0)
        value.mean().backward()
        output = model.joint.joint_net[-1]
        for key, actual in (
            ("grad_encoded", encoded.grad), ("grad_joint_out", output.weight.grad),
            ("grad_joint_out_bias", output.bias.grad),
            ("grad_embed", model.decoder.prediction["embed"].weight.grad),
        ):  # fmt: skip
            limit = case.expected["suggested_tolerance"]["grad_relative_to_max"]
            assert (actual - t[key]).abs().max() <= limit * t[key].abs().max(), key
        assert (report["active_share"] == 1.0).all() == (eps == 0.0)


def test_dropout_of_the_model_follows_its_mode():
    model = fastconformer.load_model(golden("tdt_bpe") / "model.nemo")
    t = load_case("tdt_bpe").tensors
    batch = (t["encoded"], t["encoded_len"], t["targets"], t["targets_len"])
    expected = model.losses(*batch)["tdt"]
    model.joint.joint_net.insert(1, torch.nn.Dropout(0.5).eval())
    assert torch.equal(model.losses(*batch)["tdt"], expected)
    model.joint.train()
    assert (model.losses(*batch)["tdt"] != expected).all()


# Errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enc_proj": torch.zeros(2, 6)}, r"enc_proj is float32 \(2, 6\), expected floats"),
        ({"pred_proj": torch.zeros(2, 4, 9)}, r"pred_proj \(2, 4, 9\), expected .* same B and H"),
        ({"out_weight": torch.zeros(11, 4)}, r"out_weight is float32 \(11, 4\), expected .*, 5\)"),
        ({"out_bias": torch.zeros(3)}, r"out_bias is float32 \(3,\), expected floats \(11,\)"),
        ({"durations": (0, 1)}, "2 durations, which leaves 9.* blank is 7"),
        ({"durations": 3}, "durations are 3, expected integers of at least 0"),
        ({"durations": torch.tensor([0.0, 1.5, 2.0])}, "durations are .*, expected integers"),
        ({"durations": (0, 0, 0)}, r"durations are \(0, 0, 0\), expected .* one of them positive"),
        ({"out_weight": torch.zeros(11, 5).int()}, "out_weight is int32 .*, expected floats"),
        ({"out_bias": torch.zeros(11).long()}, "out_bias is int64 .*, expected floats"),
        (
            {"enc_proj": torch.zeros(0, 6, 5)},
            r"enc_proj is float32 \(0, 6, 5\), expected .* not empty",
        ),
        ({"blank": 7.0}, "blank is 7.0, expected an integer"),
        ({"targets": torch.zeros(2, 3)}, r"targets are float32 \(2, 3\), expected integers"),
        ({"logit_lengths": torch.tensor([6, 0])}, r"logit_lengths\[1\] is 0, expected 1 to 6"),
        ({"logit_lengths": torch.tensor([[6, 4]])}, r"logit_lengths are int64 \(1, 2\), expected"),
        ({"target_lengths": torch.tensor([3.0, 2.0])}, "target_lengths are float32"),
        ({"tile_cells": 2.5}, "tile_cells is 2.5"),
        ({"eps": math.nan}, "eps is nan"),
        ({"blank": 11}, "blank is 11"),
        ({"sigma": 0.1, "durations": None}, "sigma is 0.1 .* without durations"),
        ({"omega": 2.0}, "omega is 2.0"),
        ({"activation": "gelu"}, "activation is 'gelu', expected relu, tanh, sigmoid"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"tile_cells": 0}, "tile_cells is 0"),
        ({"logit_lengths": torch.tensor([6, 7])}, r"logit_lengths\[1\] is 7, expected 1 to 6"),
        ({"target_lengths": torch.tensor([4, 2])}, r"target_lengths\[0\] is 4, expected 0 to 3"),
        ({"targets": torch.full((2, 3), 7)}, r"targets\[0, 0\] is 7.* blank 7"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
    ],
)
def test_errors(change, words):
    inputs, targets, n_frames, n_tokens = make((6, 4), (3, 2), 7, 3)
    arguments = dict(zip(NAMES, inputs, strict=True)) | {
        "targets": targets, "logit_lengths": n_frames, "target_lengths": n_tokens,
        "durations": (0, 1, 2), "blank": 7,
    }  # fmt: skip
    fused_transducer_loss(**arguments)
    with pytest.raises(ValueError, match=words):
        fused_transducer_loss(**arguments | change)


def test_no_more_logits_than_a_tile(monkeypatch):
    inputs, *batch = make((20, 12), (6, 4), 40, 5)
    sizes, true = [], F.linear

    def linear(x, weight, bias=None):
        sizes.append((len(x), len(weight)))
        return true(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    run(lambda *x: fused_transducer_loss(*x, *batch, (0, 1, 2, 3, 4), tile_cells=16), inputs)
    n_cells = 20 * 7 + 12 * 5
    assert max(cells for cells, _ in sizes) == 16
    assert sum(cells for cells, outputs in sizes if outputs == 46) == 2 * n_cells  # twice each
    assert sum(cells for cells, outputs in sizes if outputs == 5) == n_cells


def test_a_clip_that_fits_is_visited_once(monkeypatch):
    """Its logits are made once, and again only where the clips' weights turn out unequal."""
    inputs, *batch = make((20, 12, 9), (6, 4, 0), 40, 5)
    loss = lambda *x, cells=150: fused_transducer_loss(
        *x, *batch, (0, 1, 2, 3, 4), eps=1e-3, tile_cells=cells
    )
    made, linear = [], F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, b: made.append((len(x), len(w))) or linear(x, w, b)
    )
    unequal = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    n_cells = 20 * 7 + 12 * 5 + 9
    for cells, weights, visits in (
        (150, None, 1), (None, -2 * torch.ones(3), 1), (139, None, 2), (150, unequal, 2),
    ):  # fmt: skip
        made.clear()
        actual = run(lambda *x: loss(*x, cells=cells), inputs, weights)
        assert max(n for n, outputs in made if outputs == 46) <= (cells or n_cells)
        n_made = sum(n for n, outputs in made if outputs == 46)
        assert n_made == n_cells if visits == 1 else n_cells < n_made < 2 * n_cells
        assert_near(actual, run(lambda *x: loss(*x, cells=7), inputs, weights), 1e-12)
    # A weight of 0 hides even what is not a number.
    inputs[0][0, 0] = math.nan
    _, grads = run(loss, inputs, torch.zeros(3))
    assert (grads[0] == 0).all() and (grads[1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [fused_cpu], indirect=True)
def test_peak_memory_is_a_fraction_of_the_joint_tensor():
    """In a process of its own: beside its inputs the loss takes under a third of one joint."""
    program = """
import resource, torch
from fastconformer.losses import fused_transducer_loss
torch.set_num_threads(1)
def run(b, t, u, h, v):
    inputs = [torch.randn(*s, requires_grad=True) for s in ((b, t, h), (b, u + 1, h), (v + 6, h))]
    targets = torch.randint(0, v, (b, u))
    lengths = torch.full((b,), t), torch.full((b,), u)
    loss = fused_transducer_loss(*inputs, None, targets, *lengths, (0, 1, 2, 3, 4), tile_cells=512)
    loss.sum().backward()
run(1, 4, 3, 16, 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4, 100, 40, 16, 512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    joint_kib = 4 * 100 * 41 * 518 * 4 / 1024
    assert int(result.stdout) < joint_kib / 3
