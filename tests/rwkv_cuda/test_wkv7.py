"""The WKV7 operator against its definition: golden data, gradients, lengths, decays, errors."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_cuda import chunked, wkv7, wkv7_bidirectional
from rwkv_cuda.reference import wkv7_reference
from tests.conftest import load_case

NAMES = ("r", "w", "k", "v", "a", "b")


def inputs(batch, frames, heads, width, dtype=torch.float32, w_mean=-1.0, w_scale=1.0, seed=0):
    """As a BiRWKV7 block makes them: a = -kappa, b = kappa * rate with kappa a unit vector."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(batch, frames, heads, width, generator=generator, dtype=torch.float64)

    kappa = F.normalize(normal(), dim=-1)
    w = w_mean + w_scale * normal()
    tensors = (
        normal(),
        w,
        normal() / width**0.5,
        normal(),
        -kappa,
        kappa * torch.sigmoid(normal()),
    )
    return [x.to(dtype) for x in tensors]


def error(x, expected):
    """Largest difference, relative to the largest value."""
    assert x.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 1.0
    return (x.double() - expected).abs().max().item() / max(scale, 1e-30) if x.numel() else 0.0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", ["t1", "t7", "t16", "t21_masked"])
def test_golden(case, backend):
    data = load_case("birwkv7_parts")
    shape = data.expected["op"][case]
    split = (shape["B"], shape["T"], shape["H"], shape["N"])
    tensors = {
        name.split("/")[2]: x.view(split)
        for name, x in data.tensors.items()
        if name.startswith(f"op/{case}/")
    }
    args = [tensors[name].requires_grad_() for name in NAMES]
    # The fork masks a frame by k = v = 0 and decay 1, which the stored inputs hold already.
    y = wkv7(*args, backend=backend)
    tolerance = data.expected["suggested_tolerance"]
    torch.testing.assert_close(y, tensors["y"], rtol=0, atol=tolerance["op_y"])
    for name, grad in zip(NAMES, torch.autograd.grad(y, args, tensors["dy"])):
        torch.testing.assert_close(grad, tensors[f"grad_{name}"], rtol=0, atol=tolerance["op_grad"])


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    args = [x.requires_grad_() for x in inputs(2, 5, 1, 3, torch.float64)]
    state = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        *tensors, entry = tensors
        return wkv7(
            *tensors,
            reverse,
            torch.tensor([5, 2]),
            "chunked",
            initial_state=entry,
            return_state=True,
        )

    assert torch.autograd.gradcheck(run, (*args, state))


@pytest.fixture(params=["walk", "chunked"])
def either_forward(request, monkeypatch):
    """The compiled walk over frames, and the chunked form that serves where numba is not."""
    if request.param == "walk":
        pytest.importorskip("numba", reason="numba is not installed")
    else:
        monkeypatch.setattr(sys.modules["rwkv_cuda.wkv7"], "_walk", lambda: chunked.forward)


@pytest.mark.parametrize("decay", ["nearly 0", "mixed", "of the fork", "nearly 1", "exactly 1"])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunked_is_the_recurrence(decay, reverse, either_forward):
    """float32 against the loop in float64: y, last state and all gradients, over many chunks."""
    mean, scale = {
        "nearly 0": (3, 1),
        "mixed": (0, 10),
        "of the fork": (-1, 0.3),
        "nearly 1": (-9, 1),
        "exactly 1": (-1000, 1),
    }[decay]
    for frames, heads, width in ((1, 2, 32), (31, 1, 48), (65, 2, 64), (140, 1, 128)):
        args = [
            x.requires_grad_() for x in inputs(2, frames, heads, width, w_mean=mean, w_scale=scale)
        ]
        exact = [x.detach().double().requires_grad_() for x in args]
        lengths = torch.tensor([frames, (frames + 1) // 2])
        entry = torch.randn(2, heads, width, width, requires_grad=True)
        options = dict(reverse=reverse, lengths=lengths)
        y, state = wkv7(*args, **options, backend="chunked", initial_state=entry, return_state=True)
        exact_entry = entry.detach().double().requires_grad_()
        exact_y, exact_state = wkv7_reference(*exact, **options, initial_state=exact_entry)
        assert error(y, exact_y) < 1e-5
        assert error(state, exact_state) < 1e-5
        grads = (torch.randn_like(y), torch.randn_like(state))
        found = torch.autograd.grad((y, state), (*args, entry), grads)
        expected = torch.autograd.grad(
            (exact_y, exact_state), (*exact, exact_entry), [x.double() for x in grads]
        )
        for name, x, z in zip((*NAMES, "state"), found, expected):
            if z.abs().max() > 1e-20:
                assert error(x, z) < 2e-5, name


def test_threads_change_nothing():
    """Two threads share heads; clips, pieces in time, saved states, more heads than one copy's."""
    walk = pytest.importorskip("rwkv_cuda.walk", reason="numba is not installed")
    assert walk.MOST_HEADS < 17 and walk.PIECE // (3 * 2 * 48) < 9000
    the_same_on_two_threads(walk, inputs(3, 9000, 2, 48, w_mean=-4.0), [9000, 0, 8193])
    the_same_on_two_threads(walk, inputs(1, 1300, 17, 32, w_mean=-4.0), [1290])
    the_same_on_two_threads(walk, inputs(1, 20_100, 1, 64, w_mean=-4.0), [20_001])  # its columns


def the_same_on_two_threads(walk, args, lengths):
    batch, frames, heads, width = args[0].shape
    lengths, entry = torch.tensor(lengths), torch.randn(batch, heads, width, width)
    assert batch * frames * heads >= 2 * walk.SMALLEST_SHARE
    threads = torch.get_num_threads()
    try:
        for reverse in (False, True):
            found = []
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append(walk.forward(*args, reverse, lengths, entry, True))
            expected = chunked.forward(*args, reverse, lengths, entry, True)
            for one, two, z in zip(*found, expected):
                assert torch.equal(one, two) and error(one, z.double()) < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_without_numba():
    """One logged line, then the chunked form; and importing the operator does not import numba."""
    code = """
import logging, sys, torch
logging.basicConfig(format="%(message)s")
from rwkv_cuda import chunked, wkv7
assert "numba" not in sys.modules
sys.modules["numba"] = None
args = [torch.randn(1, 40, 1, 32) / 6 for _ in range(6)]
for _ in range(2):
    assert torch.equal(wkv7(*args), chunked.forward(*args)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("numba is not usable") == 1 and len(done.stderr.splitlines()) == 1


def test_equal_keys_do_not_amplify():
    """The hardest I - A_ab: one kappa for all frames, rate 1, decay 1; its powers are huge."""
    args = inputs(1, 200, 1, 64)
    args[4] = args[4][:, :1].expand_as(args[4]).contiguous()
    args[5] = -args[4]
    args[1].fill_(-30.0)
    expected, _ = wkv7_reference(*(x.double() for x in args))
    assert error(wkv7(*args, backend="chunked"), expected) < 1e-5


def test_strong_decay_hides_no_weak_one():
    """A single frame that forgets all must not blur the sums of log decays after it."""
    args = [x.requires_grad_() for x in inputs(1, 64, 1, 32, w_mean=-4.0)]
    args[1].data[:, 7::13] = 20.0  # decay exp(-5e8)
    exact = [x.detach().double().requires_grad_() for x in args]
    y, expected = wkv7(*args, backend="chunked"), wkv7(*exact, backend="reference")
    assert error(y, expected) < 1e-6
    for x, z in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(expected.sum(), exact)):
        assert error(x, z) < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    padding=st.integers(0, 40),
    reverse=st.booleans(),
    w_mean=st.floats(-8, 4),
    seed=st.integers(0, 1000),
)
def test_clip_alone_equals_clip_in_batch(lengths, padding, reverse, w_mean, seed):
    frames = max(lengths) + padding
    args = inputs(len(lengths), frames, 2, 32, w_mean=w_mean, seed=seed)
    for x in args:
        for row, length in zip(x, lengths):
            row[length:] = float("nan")
        x.requires_grad_()
    y, state = wkv7(*args, reverse, torch.tensor(lengths), "chunked", return_state=True)
    grads = torch.autograd.grad((y.sum() + state.sum()), args)
    both = wkv7_bidirectional(*args, torch.tensor(lengths))
    torch.testing.assert_close(both[reverse], y, rtol=0, atol=0)
    for i, length in enumerate(lengths):
        alone = [x[i : i + 1, :length].detach().requires_grad_() for x in args]
        y_alone, state_alone = wkv7(*alone, reverse, return_state=True)
        torch.testing.assert_close(y[i, :length], y_alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[i], state_alone[0], rtol=1e-5, atol=1e-5)
        assert not y[i, length:].any()
        exact, _ = wkv7_reference(*(x.double() for x in alone), reverse)
        # one frame may be a sum that nearly cancels: the recurrence itself then loses as much
        plain, _ = wkv7_reference(*alone, reverse)
        assert error(y[i, :length], exact[0]) < max(1e-5, 2 * error(plain[0], exact[0]))
        of_alone = torch.autograd.grad(y_alone.sum() + state_alone.sum(), alone)
        for grad, expected in zip(grads, of_alone):
            torch.testing.assert_close(grad[i, :length], expected[0], rtol=1e-4, atol=1e-4)
            assert not grad[i, length:].any()


def test_reverse_is_flip():
    args = inputs(1, 77, 2, 64)
    flipped = wkv7(*(x.flip(1) for x in args), backend="reference").flip(1)
    for backend in ("reference", "chunked"):
        assert error(wkv7(*args, reverse=True, backend=backend), flipped.double()) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_state_carries_over_a_cut(reverse):
    args = inputs(2, 150, 1, 32)
    whole, last = wkv7(*args, reverse, return_state=True)
    head, tail = [x[:, :70] for x in args], [x[:, 70:] for x in args]
    first, second = (tail, head) if reverse else (head, tail)
    y_first, state = wkv7(*first, reverse, return_state=True)
    y_second, state = wkv7(*second, reverse, initial_state=state, return_state=True)
    parts = (y_second, y_first) if reverse else (y_first, y_second)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_5000_frames():
    args = inputs(1, 5000, 1, 64, w_mean=-2.0, w_scale=2.0)
    expected, _ = wkv7_reference(*(x.double() for x in args))
    assert error(wkv7(*args), expected) < 1e-5
    backwards, _ = wkv7_reference(*(x.double() for x in args), reverse=True)
    assert error(wkv7(*args, reverse=True), backwards) < 1e-5


def test_bfloat16_keeps_a_float32_state():
    args = inputs(1, 300, 1, 64, torch.bfloat16, w_mean=-3.0)
    y, state = wkv7(*args, return_state=True)
    expected, _ = wkv7_reference(*(x.double() for x in args))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert error(y, expected) < 2**-8  # the rounding of y itself
    rounded = [x.requires_grad_() for x in args]
    assert all(
        x.dtype == torch.bfloat16 for x in torch.autograd.grad(wkv7(*rounded).sum(), rounded)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert wkv7(*(x.float() for x in args)).dtype == torch.bfloat16


def test_empty():
    assert wkv7(*inputs(0, 7, 1, 32)).shape == (0, 7, 1, 32)
    args = [x.requires_grad_() for x in inputs(2, 0, 1, 32)]
    y, state = wkv7(*args, return_state=True)
    assert y.shape == (2, 0, 1, 32) and not state.any()


def test_operator_contract():
    """Schema, fake tensors, autograd and compiled autograd agree: torch's own checks."""
    args = [x.requires_grad_() for x in inputs(2, 40, 1, 32)]
    entry = torch.randn(2, 2, 1, 32, 32, requires_grad=True)
    lengths = torch.tensor([40, 3])
    operator = torch.ops.rwkv_cuda.wkv7
    torch.library.opcheck(operator, (*args, lengths, entry, [False, True], "chunked", True))
    torch.library.opcheck(operator, (*args, None, None, [True], "chunked", True))
    *detached, entry = [x.detach() for x in (*args, entry)]
    y, state, saved = operator(*detached, lengths, entry, [False, True], "chunked", True)
    torch.library.opcheck(
        torch.ops.rwkv_cuda.wkv7_backward,
        (y, state, *detached, saved, lengths, [False, True], "chunked"),
    )


def test_compiled_equals_eager():
    args = [x.requires_grad_() for x in inputs(1, 50, 1, 32)]

    def run(*tensors):
        forward, backward = wkv7_bidirectional(*tensors)
        return (forward * 2 + backward).sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), run(*args))
    for x, expected in zip(
        torch.autograd.grad(compiled(*args), args), torch.autograd.grad(run(*args), args)
    ):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backend="fast"), "backend is 'fast'"),
        (dict(lengths=torch.tensor([9, 1])), "lengths holds 9, expected 0 to 8"),
        (dict(lengths=torch.tensor([-1, 1])), "lengths holds -1"),
        (dict(lengths=torch.tensor([8.0, 1.0])), "expected integers"),
        (dict(lengths=torch.tensor([8])), r"shape \(1,\), expected integers of shape \(2,\)"),
        (dict(k=torch.zeros(2, 8, 1, 16)), r"k has shape \(2, 8, 1, 16\)"),
        (dict(w=torch.zeros(2, 8, 1, 32).double()), "w is torch.float64 and r torch.float32"),
        (dict(r=torch.zeros(8, 1, 32)), "expected \\(B, T, H, N\\)"),
        (dict(initial_state=torch.zeros(2, 32, 32)), "initial_state has shape"),
        (dict(initial_state=torch.zeros(2, 1, 32, 32).int()), "initial_state is torch.int32"),
        (dict(backend="cuda"), "r on cpu; move the inputs to a CUDA device"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(zip(NAMES, inputs(2, 8, 1, 32))) | change
    with pytest.raises(ValueError, match=message):
        wkv7(**arguments)


@pytest.mark.parametrize(
    "card", [(8, 6), (8, 9), (12, 0), (12, 1), (8, 0), (8, 7), (9, 0), (10, 0)]
)
def test_wide_heads_where_shared_memory_is_little(monkeypatch, card):
    module = importlib.import_module("rwkv_cuda.wkv7")  # the package has a function of this name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(module, "_kernels_usable", lambda device: True)
    little = card in ((8, 6), (8, 9), (12, 0), (12, 1))
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda", 0))
    for width in (64, 65, 128):
        x.shape = 1, 9, 2, width
        assert module._choose(x) == ("chunked" if little and width > 64 else "cuda")
