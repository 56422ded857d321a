"""RNNT and TDT losses: NeMo's numbers, brute force over alignments, and what users may do wrong.

Every test runs on CPU tensors with both implementations, numba and vectorised PyTorch.
"""

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import losses
from fastconformer.losses import reference, rnnt_loss, tdt_loss, vectorised

numba = pytest.importorskip("numba", reason="numba is not installed")
from fastconformer.losses import cpu  # noqa: E402, it needs numba

FLOATS = [torch.float64, torch.float32]


@pytest.fixture(params=[cpu, vectorised], ids=["cpu", "vectorised"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(losses, "_cpu_backend", lambda: request.param)
    return request.param


def make(n_frames=(6, 4), n_tokens=(3, 2), n_outputs=5, n_tokens_max=None, seed=0, scale=2.0):
    """Random float64 logits, targets and lengths for V+1+N = n_outputs; ids 0 and 1 as targets."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = (n_tokens_max or max(n_tokens)) + 1
    shape = (len(n_frames), max(n_frames), n_rows, n_outputs)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (len(n_frames), n_rows - 1), generator=generator)
    return logits, targets, torch.tensor(n_frames), torch.tensor(n_tokens)


def loss_and_grad(loss, logits, *arguments, weights=1.0, **options):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *arguments, **options)
    (value * weights).sum().backward()
    return value.detach(), logits.grad


def assert_near(actual, expected, rtol=0.0, atol=0.0, name=""):
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda m: f"{name} {m}"
    )


def run_python(program):
    """The program in a fresh process that can import the repository."""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# NeMo's numbers


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["loss_tdt", "loss_rnnt"])
def test_golden_losses_and_gradients(name, dtype):
    case = load_case(name)
    bits = "f64" if dtype == torch.float64 else "f32"
    rtol = case.expected["suggested_tolerance"][f"loss_relative_{bits}"]
    atol = case.expected["suggested_tolerance"][f"grad_abs_{bits}"]
    for config_name, config in case.expected["configs"].items():
        stored = {
            key.removeprefix(f"{config_name}/"): value
            for key, value in case.tensors.items()
            if key.startswith(f"{config_name}/")
        }
        inputs = [stored["logits"].to(dtype)]
        inputs += [stored[key] for key in ("targets", "logit_lens", "target_lens")]
        options = {key: config[key] for key in ("fastemit_lambda", "clamp")}
        if name == "loss_rnnt":
            loss, inputs = rnnt_loss, [*inputs, config["V"]]
        else:
            loss, inputs = tdt_loss, [*inputs, config["durations"], config["V"]]
            # NeMo drew its coin from Python's generator: take the side on which it fell.
            options |= {"sigma": config["sigma"], "omega": float(config.get("branch") == "rnnt")}
        value, grad = loss_and_grad(loss, *inputs, **options, reduction="none")
        assert_near(value, stored["loss"], rtol=rtol, name=config_name)
        assert_near(grad, stored["grad"], atol=atol, name=config_name)
        for reduction, expected in config["reductions"].items():
            reduced = loss(*inputs, **options, reduction=reduction).item()
            assert reduced == pytest.approx(float(expected), rel=rtol), (config_name, reduction)
        if name == "loss_tdt":  # the other branch, stored without FastEmit and clamp
            options = {"sigma": config["sigma"], "omega": 1.0}
            value, grad = loss_and_grad(loss, *inputs, **options, reduction="none")
            assert_near(value, stored["rnnt_branch_loss"], rtol=rtol, name=config_name)
            assert_near(grad, stored["rnnt_branch_grad"], atol=atol, name=config_name)


@pytest.mark.parametrize(
    "name", ["rnnt_bpe", "tdt_bpe", "hybrid_rnnt_ctc_bpe", "hybrid_tdt_ctc_bpe"]
)
def test_golden_model_losses(name):
    case = load_case(name)
    settings_of_loss = case.expected["transducer"]
    blank, durations = settings_of_loss["blank_id"], settings_of_loss["durations"]
    inputs = [case.tensors[k] for k in ("joint_logits", "targets", "encoded_len", "targets_len")]
    if durations is None:
        value = rnnt_loss(*inputs, blank, reduction="none")
        assert_near(value, case.tensors["rnnt_loss"], rtol=1e-5)
    else:
        sigma = settings_of_loss["loss_kwargs"]["sigma"]
        value = tdt_loss(*inputs, durations, blank, sigma, reduction="none")
        assert_near(value, case.tensors["tdt_loss"], rtol=1e-5)
        value = tdt_loss(*inputs, durations, blank, sigma, omega=1.0, reduction="none")
        assert_near(value, case.tensors["rnnt_branch_loss"], rtol=1e-5)


# The definition


def sum_over_alignments(log_probs, duration_log_probs, arcs, targets, n_frames, blank):
    """-log of the sum over all alignments, each followed from (0, 0) to its end on its own."""
    totals = []
    open_alignments = [(0, 0, 0.0)]
    while open_alignments:
        t, u, score = open_alignments.pop()
        for duration_class, frames, symbol in arcs:
            emits = symbol == "token"
            if emits and u == len(targets):
                continue
            step = log_probs[t, u, targets[u] if emits else blank].item()
            step += duration_log_probs[t, u, duration_class].item()
            end = (t + frames, u + emits)
            if end == (n_frames, len(targets)) and not emits:
                totals.append(score + step)
            elif end[0] < n_frames:
                open_alignments.append((*end, score + step))
    return -torch.tensor(totals, dtype=torch.float64).logsumexp(0)


@pytest.mark.parametrize(
    ("n_frames", "n_tokens"), [(1, 0), (1, 3), (2, 1), (3, 0), (3, 3), (4, 2), (2, 4)]
)
@pytest.mark.parametrize("blank", [0, 3])
def test_sum_over_all_alignments(n_frames, n_tokens, blank):
    token = 1 if blank == 0 else 0
    logits, _, *lengths = make([n_frames], [n_tokens], 4 + 3)
    targets = torch.full((1, n_tokens), token)
    if n_tokens > 1:
        targets[0, 1] = 2
    log_probs = logits[..., :4].log_softmax(-1)
    duration_log_probs = logits[0, ..., 4:].log_softmax(-1)
    arcs = [(0, 0, "token"), (0, 1, "blank")]
    expected = sum_over_alignments(
        log_probs[0], torch.zeros_like(logits[0]), arcs, targets[0], n_frames, blank
    )
    inputs = (targets, *lengths)
    assert_near(rnnt_loss(logits[..., :4], *inputs, blank), expected, rtol=1e-12)
    assert_near(reference.rnnt_loss(logits[..., :4], *inputs, blank)[0], expected, rtol=1e-12)
    for durations in ((0, 1, 2), (2, 0, 1), (1, 0, 7)):
        arcs = [(i, d, s) for i, d in enumerate(durations) for s in ("token", "blank")]
        arcs = [arc for arc in arcs if arc[1:] != (0, "blank")]
        expected = sum_over_alignments(
            log_probs[0] - 0.05, duration_log_probs, arcs, targets[0], n_frames, blank
        )
        assert_near(tdt_loss(logits, *inputs, durations, blank, 0.05), expected, rtol=1e-12)
        value = reference.tdt_loss(logits, *inputs, durations, blank, 0.05)
        assert_near(value[0], expected, rtol=1e-12)


def test_gradcheck():
    logits, *inputs = make((3, 2), (2, 1), 3 + 3)
    logits.requires_grad_()
    for loss in (
        lambda x: tdt_loss(x, *inputs, (0, 1, 3), 2, 0.1, reduction="none"),
        lambda x: tdt_loss(x, *inputs, (0, 1, 3), 2, omega=1.0, reduction="mean_volume"),
        lambda x: rnnt_loss(x[..., :3], *inputs, 2, reduction="mean"),
    ):
        assert torch.autograd.gradcheck(loss, logits)


@st.composite
def problems(draw):
    n_clips = draw(st.integers(1, 3))
    n_frames = draw(st.lists(st.integers(1, 6), min_size=n_clips, max_size=n_clips))
    n_tokens = draw(st.lists(st.integers(0, 4), min_size=n_clips, max_size=n_clips))
    durations = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda x: not x or max(x) > 0))
    n_classes = draw(st.integers(3, 20))
    tensors = make(
        n_frames, n_tokens, n_classes + len(durations), seed=draw(st.integers(0, 1000)),
        scale=draw(st.sampled_from([0.1, 2.0, 50.0])),
        n_tokens_max=max(n_tokens) + draw(st.integers(0, 1)),
    )  # fmt: skip
    options = {
        "fastemit_lambda": draw(st.sampled_from([0.0, 0.3])),
        "clamp": draw(st.sampled_from([-1.0, 0.0, 0.05])),
    }
    return tensors, durations, n_classes - 1, options


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equals_the_reference(problem):
    (logits, *inputs), durations, blank, options = problem
    weights = torch.linspace(0.5, -2.0, len(logits), dtype=torch.float64)
    if durations:
        inputs += [durations, blank, 0.05]
        definition = reference.tdt_loss
        loss = tdt_loss
    else:
        inputs += [blank]
        definition, loss = reference.rnnt_loss, rnnt_loss
    impossible = definition(logits, *inputs).isinf()
    expected, expected_grad = loss_and_grad(
        definition, logits, *inputs, **options, weights=weights.masked_fill(impossible, 0.0)
    )
    expected_grad[impossible] = 0.0
    for dtype in FLOATS:
        tolerance = 1e-11 if dtype == torch.float64 else 2e-6
        value, grad = loss_and_grad(
            loss, logits.to(dtype), *inputs, **options, weights=weights, reduction="none"
        )
        assert value.dtype == grad.dtype == dtype
        # Logits of up to 150 are themselves rounded by 1e-5 in float32.
        rounding = 0.0 if dtype == torch.float64 else 6e-8 * logits.abs().max().item()
        assert_near(value, expected, rtol=tolerance + rounding, atol=tolerance + rounding)
        assert_near(grad, expected_grad, atol=tolerance + 4 * rounding, rtol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_longer_lattice_against_autograd(dtype):
    logits, *inputs = make((60, 41), (11, 14), 40)
    for definition, loss, options in (
        (reference.rnnt_loss, rnnt_loss, {}),
        (reference.tdt_loss, tdt_loss, {"durations": (0, 1, 2, 3, 4), "sigma": 0.02}),
    ):
        options["blank"] = 39 if loss is rnnt_loss else 34
        expected = loss_and_grad(definition, logits, *inputs, **options)
        actual = loss_and_grad(loss, logits.to(dtype), *inputs, **options, reduction="none")
        tolerance = 1e-11 if dtype == torch.float64 else 2e-6
        assert_near(actual[0], expected[0], rtol=tolerance)
        assert_near(actual[1], expected[1], atol=tolerance)


# What a batch may look like


@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_does_not_matter(dtype):
    """NaN and infinity beyond the lengths, in wider tensors, give the very same clip."""
    logits, targets, n_frames, n_tokens = make((6, 4, 1), (3, 2, 0), 5 + 3)
    durations = (0, 1, 3)
    wide = torch.full((3, 9, 6, 8), torch.nan, dtype=dtype)
    wide[:, 7:] = torch.inf
    for clip, (frames, tokens) in enumerate(zip(n_frames.tolist(), n_tokens.tolist(), strict=True)):
        wide[clip, :frames, : tokens + 1] = logits[clip, :frames, : tokens + 1]
    wide_targets = torch.full((3, 11), -100)  # more columns than rows of logits
    wide_targets[:, :3] = targets.masked_fill(torch.arange(3) >= n_tokens[:, None], 4)
    options = {"sigma": 0.05, "fastemit_lambda": 0.01, "clamp": 0.5, "reduction": "none"}
    value, grad = loss_and_grad(
        tdt_loss, wide, wide_targets, n_frames, n_tokens, durations, 4, **options
    )
    for clip, (frames, tokens) in enumerate(zip(n_frames.tolist(), n_tokens.tolist(), strict=True)):
        alone = loss_and_grad(
            tdt_loss, logits[clip : clip + 1, :frames, : tokens + 1].to(dtype),
            targets[clip : clip + 1, :tokens], n_frames[clip : clip + 1], n_tokens[clip : clip + 1],
            durations, 4, **options,
        )  # fmt: skip
        assert_near(value[clip], alone[0][0], rtol=1e-12)
        assert_near(grad[clip, :frames, : tokens + 1], alone[1][0], atol=1e-12)
        grad[clip, :frames, : tokens + 1] = 0.0
    assert (grad == 0.0).all()


def test_strides_and_integer_types():
    logits, targets, n_frames, n_tokens = make((6, 4), (3, 2), 5)
    expected = loss_and_grad(rnnt_loss, logits, targets, n_frames, n_tokens, 4)
    layouts = [
        logits.transpose(1, 3).contiguous().transpose(1, 3),  # last stride not 1
        logits.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),  # rows in another order
        torch.cat([logits, logits], -1)[..., :5],  # gaps
    ]
    for view in layouts:
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        value = rnnt_loss(
            leaf, targets.int(), n_frames.to(torch.int32), n_tokens.to(torch.int16), 4
        )
        value.backward()
        assert_near(value, expected[0], rtol=1e-14)
        assert_near(leaf.grad, expected[1], atol=1e-14)
    same = logits[:1].expand(3, -1, -1, -1)  # clips share memory
    value = rnnt_loss(
        same, targets[:1].expand(3, -1), n_frames[:1].expand(3), n_tokens[:1].expand(3), 4
    )
    assert_near(value, rnnt_loss(logits[:1], targets[:1], n_frames[:1], n_tokens[:1], 4), 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    logits, *inputs = make((12, 7), (5, 3), 9 + 5)
    inputs += [(0, 1, 2, 3, 4), 8]
    logits = logits.to(dtype)
    value, grad = loss_and_grad(tdt_loss, logits, *inputs)
    expected, expected_grad = loss_and_grad(tdt_loss, logits.float(), *inputs)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad.to(dtype))


def test_gradient_scales_with_each_clips_weight():
    logits, *inputs = make((6, 4, 5), (3, 2, 4), 5 + 2)
    inputs += [(0, 1), 4]
    options = {"clamp": 0.1, "reduction": "none"}
    _, plain = loss_and_grad(tdt_loss, logits, *inputs, **options)
    assert plain[..., :5].abs().max() == pytest.approx(0.1, abs=1e-12)  # clamped before weighted
    weights = torch.tensor([3.0, 0.0, -0.5], dtype=torch.float64)
    _, grad = loss_and_grad(tdt_loss, logits, *inputs, **options, weights=weights)
    assert_near(grad, plain * weights[:, None, None, None], atol=1e-15)


def test_reductions():
    logits, *inputs = make((6, 4, 5), (3, 2, 4), 5)
    each, grad_of_sum = loss_and_grad(rnnt_loss, logits, *inputs, 4, reduction="none")
    assert torch.equal(each, rnnt_loss(logits, *inputs, 4, reduction=None))
    lengths = inputs[-1]
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    for reduction, weights in (
        ("sum", torch.ones(3)), ("mean_batch", third), ("mean", third / lengths),
        ("mean_volume", torch.full((3,), 1 / 9)),
    ):  # fmt: skip
        value, grad = loss_and_grad(rnnt_loss, logits, *inputs, 4, reduction=reduction)
        assert value.shape == ()
        assert_near(value, (each * weights).sum(), rtol=1e-7)
        assert_near(grad, grad_of_sum * weights[:, None, None, None], atol=1e-8)
    assert torch.equal(rnnt_loss(logits, *inputs, 4), each.mean())  # the default


def test_without_gradient():
    logits, *inputs = make((6, 4), (3, 2), 5 + 3)
    inputs += [(0, 1, 2), 4]
    expected, _ = loss_and_grad(tdt_loss, logits, *inputs)
    assert torch.equal(tdt_loss(logits, *inputs), expected)
    with torch.no_grad():
        value = tdt_loss(logits.requires_grad_(), *inputs)
    assert torch.equal(value, expected) and not value.requires_grad
    with torch.inference_mode():
        assert torch.equal(tdt_loss(logits, *inputs), expected)


def test_no_alignment_gives_infinity_and_no_gradient():
    """Only even frames can be reached; the clip of 5 frames has no alignment, its neighbour has."""
    logits, *inputs = make((5, 6), (1, 1), 5 + 2)
    options = {"durations": (2, 4), "blank": 4, "sigma": 0.05, "reduction": "none"}
    value, grad = loss_and_grad(tdt_loss, logits, *inputs, **options, fastemit_lambda=0.1)
    assert value[0] == torch.inf and value[1].isfinite()
    assert (grad[0] == 0).all() and grad[1].isfinite().all() and (grad[1] != 0).any()
    # More tokens than frames, and none may share a frame.
    logits, *inputs = make((2,), (4,), 5 + 2)
    value, grad = loss_and_grad(tdt_loss, logits, *inputs, (1, 2), 4)
    assert value == torch.inf and (grad == 0).all()
    # All durations longer than the clip.
    value, grad = loss_and_grad(tdt_loss, logits, *inputs, (9, 8), 4)
    assert value == torch.inf and (grad == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("forbidden", [0, 3])
def test_extreme_logits(dtype, forbidden):
    logits, targets, *lengths = make((5, 6), (2, 3), 6, scale=3000.0)
    value, grad = loss_and_grad(rnnt_loss, logits.to(dtype), targets, *lengths, 5, reduction="none")
    assert (value > 1000).all() and value.isfinite().all() and grad.isfinite().all()
    # A forbidden class (logit -inf) that no target needs is as if it were not there.
    logits, targets, *lengths = make((5, 6), (2, 3), 6)
    logits = logits.to(dtype)
    targets[targets == forbidden] = 1
    others = [v for v in range(6) if v != forbidden]
    logits[..., forbidden] = -torch.inf
    value, grad = loss_and_grad(rnnt_loss, logits, targets, *lengths, 5)
    expected, expected_grad = loss_and_grad(
        rnnt_loss, logits[..., others], targets - (targets > forbidden).long(), *lengths, 4
    )
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_near(value, expected, rtol=tolerance)
    assert (grad[..., forbidden] == 0).all()
    assert_near(grad[..., others], expected_grad, atol=tolerance)
    # A needed one that is forbidden everywhere leaves no alignment.
    logits[0, ..., targets[0, 0]] = -torch.inf
    value, grad = loss_and_grad(rnnt_loss, logits, targets, *lengths, 5, reduction="none")
    assert value[0] == torch.inf and value[1].isfinite()
    assert (grad[0] == 0).all() and grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_seen(dtype):
    logits, *inputs = make((5, 6), (2, 3), 40)
    logits[0, 2, 1, 7] = torch.nan
    value = rnnt_loss(logits.to(dtype), *inputs, 39, reduction="none")
    assert value[0].isnan() and value[1].isfinite()


# Omega


def test_omega_tosses_torchs_coin():
    logits, *inputs = make((6, 4), (3, 2), 5 + 3)
    logits[1] = logits[0]
    inputs += [(0, 1, 2), 4]
    tdt = tdt_loss(logits, *inputs, sigma=0.05)
    rnnt = rnnt_loss(logits[..., :5], *inputs[:3], 4)

    def run(omega, n=40):
        torch.manual_seed(7)
        return [tdt_loss(logits, *inputs, 0.05, omega).item() for _ in range(n)]

    values = run(0.3)
    assert set(values) == {tdt.item(), rnnt.item()}
    assert values == run(0.3)
    torch.manual_seed(7)
    coins = [torch.rand(()).item() < 0.3 for _ in range(40)]
    assert [value == rnnt.item() for value in values] == coins
    state = torch.random.get_rng_state()
    assert set(run(0.0)) == {tdt.item()}
    torch.manual_seed(7)
    untouched = torch.random.get_rng_state()
    tdt_loss(logits, *inputs, 0.05, 0.0)
    assert torch.equal(torch.random.get_rng_state(), untouched)
    torch.random.set_rng_state(state)


def test_omega_branch_leaves_durations_alone():
    logits, *inputs = make((6, 4), (3, 2), 5 + 3)
    value, grad = loss_and_grad(
        tdt_loss, logits, *inputs, (0, 1, 2), 4, 0.05, 1.0, fastemit_lambda=0.01, clamp=0.2
    )
    expected, expected_grad = loss_and_grad(
        rnnt_loss, logits[..., :5], *inputs, 4, fastemit_lambda=0.01, clamp=0.2
    )
    assert_near(value, expected, rtol=1e-14)
    assert_near(grad[..., :5], expected_grad, atol=1e-15)
    assert (grad[..., 5:] == 0).all()


# Errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(2, 6, 4)}, r"logits are float32 \(2, 6, 4\), expected"),
        ({"logits": torch.zeros(2, 6, 4, 8, dtype=torch.int64)}, "non-empty float tensor"),
        ({"logits": torch.zeros(2, 0, 4, 8)}, "non-empty float tensor"),
        ({"logits": torch.zeros(2, 6, 4, 5)}, "5 outputs and there are 3 durations.* blank is 4"),
        ({"logits": torch.zeros(2, 6, 4, 9)}, "9 outputs and there are 3 durations.* blank is 4"),
        ({"durations": (0, 1)}, "8 outputs and there are 2 durations"),
        ({"blank": 5}, "blank is 5"),
        ({"blank": -1}, "blank is -1"),
        ({"durations": ()}, r"durations are \(\), expected"),
        ({"durations": (0, 0, 0)}, r"durations are \(0, 0, 0\).*one of them positive"),
        ({"durations": (0, -1, 2)}, "integers of at least 0"),
        ({"durations": (0, 0.5, 2)}, "integers of at least 0"),
        ({"targets": torch.tensor([[0, 1, 4], [0, 1, 0]])}, r"targets\[0, 2\] is 4.* blank 4"),
        ({"targets": torch.tensor([[0, 1, 2], [0, 7, 0]])}, r"targets\[1, 1\] is 7.* 0 to 4"),
        ({"targets": torch.tensor([[0, 1, 2], [-1, 0, 0]])}, r"targets\[1, 0\] is -1"),
        ({"targets": torch.zeros(2, 3)}, "targets are float32"),
        ({"targets": torch.zeros(3, 3, dtype=torch.int64)}, r"expected integers \(2, U\)"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, r"target_lengths\[0\] is 3.* 0 to 2"),
        ({"logit_lengths": torch.tensor([6, 7])}, r"logit_lengths\[1\] is 7, expected 1 to 6"),
        ({"logit_lengths": torch.tensor([0, 4])}, r"logit_lengths\[0\] is 0, expected 1 to 6"),
        ({"logit_lengths": torch.tensor([6])}, r"logit_lengths are int64 \(1,\)"),
        ({"logit_lengths": torch.tensor([6.0, 4.0])}, "logit_lengths are float32"),
        ({"target_lengths": torch.tensor([4, 2])}, r"target_lengths\[0\] is 4, expected 0 to 3"),
        ({"target_lengths": torch.tensor([3, -1])}, r"target_lengths\[1\] is -1"),
        ({"omega": 1.5}, "omega is 1.5"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"fastemit_lambda": -0.1}, "fastemit_lambda is -0.1"),
        ({"clamp": math.nan}, "clamp is nan"),
        ({"reduction": "avg"}, "reduction is 'avg', expected mean_batch"),
    ],
)
def test_tdt_errors(change, words):
    logits, targets, n_frames, n_tokens = make((6, 4), (3, 2), 5 + 3)
    arguments = {
        "logits": logits, "targets": targets, "logit_lengths": n_frames, "target_lengths": n_tokens,
        "durations": (0, 1, 2), "blank": 4,
    }  # fmt: skip
    tdt_loss(**arguments)
    with pytest.raises(ValueError, match=words):
        tdt_loss(**arguments | change)


def test_rnnt_errors():
    logits, targets, n_frames, n_tokens = make((6, 4), (3, 2), 5)
    for blank in (5, -1):
        with pytest.raises(ValueError, match=f"blank is {blank}, expected 0 to 4"):
            rnnt_loss(logits, targets, n_frames, n_tokens, blank)
    with pytest.raises(ValueError, match=r"targets\[0, 1\] is 2, .* other than the blank 2"):
        rnnt_loss(logits, torch.tensor([[0, 2, 0], [0, 1, 2]]), n_frames, n_tokens, 2)
    with pytest.raises(ValueError, match="fastemit_lambda is inf"):
        rnnt_loss(logits, targets, n_frames, n_tokens, 4, fastemit_lambda=math.inf)


# Where it runs


def test_python_threads_share_the_kernels():
    """Calls from several threads neither crash nor mix, and numba's own setting is left alone."""
    n_threads = numba.get_num_threads()
    logits, *inputs = make((40, 30), (9, 12), 30)
    expected = loss_and_grad(rnnt_loss, logits, *inputs, 29)
    results = []

    def work():
        for _ in range(5):
            results.append(loss_and_grad(rnnt_loss, logits, *inputs, 29))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    for value, grad in results:
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])
    assert numba.get_num_threads() == n_threads


def test_thread_count_does_not_change_the_numbers():
    logits, *inputs = make((40, 30, 35), (9, 12, 4), 150 + 5)
    inputs += [(0, 1, 2, 3, 4), 149, 0.02]
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(loss_and_grad(tdt_loss, logits.float(), *inputs))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    if losses._cpu_backend() is cpu:
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    assert_near(results[0][1], results[1][1], atol=1e-6)


@pytest.mark.parametrize("backend", [cpu], indirect=True)
def test_torchs_threads_are_left_alone_by_the_first_call(backend):
    """When numba starts its OpenMP pool it changes torch's setting, in a fresh process only."""
    program = """
import torch
from fastconformer.losses import rnnt_loss
torch.set_num_threads(1)
rnnt_loss(torch.zeros(1, 2, 2, 3), torch.tensor([[0]]), torch.tensor([2]), torch.tensor([1]), 2)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    result = run_python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", [cpu], indirect=True)  # the program chooses for itself
def test_without_numba(backend):
    """One logged line, then the same numbers; and importing the losses does not import numba."""
    program = """
import sys, logging, torch
logging.basicConfig(format="%(message)s", level=logging.INFO)
import fastconformer.losses as losses
assert "numba" not in sys.modules
sys.modules["numba"] = None
logits = torch.zeros(1, 2, 2, 3)
lengths = torch.tensor([2]), torch.tensor([1])
for _ in range(3):
    print(losses.rnnt_loss(logits, torch.tensor([[0]]), *lengths, 2).item())
"""
    result = run_python(program)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("numba not usable") == 1 and len(result.stderr.splitlines()) == 1
    # Two alignments of three symbols, each of probability 1/3.
    expected = -math.log(2 / 27)
    assert [float(line) for line in result.stdout.split()] == pytest.approx(
        [expected] * 3, rel=1e-6
    )
