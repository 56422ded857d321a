"""The greedy transducer loop on a CPU as one compiled function (numba), beside `label_loop`.

A step of `label_loop` is some forty operations on small tensors, whose overheads are as long as
their arithmetic. Here clips advance together through the same steps: the joint of every clip's
frame, its best token and duration, and for clips that found a token the prediction network. Each
weight is read once for all clips; sums of a clip do not depend on the others. What the first LSTM
layer makes of a token is kept once computed, as the same tokens come again.

Weights are float32, bfloat16 or int8 (with a scale a row); all arithmetic is float32, so that
bfloat16 and int8 models are nearer to float32 here than in `label_loop`, which rounds activations.

Importing this module needs numba. The kernel compiles at its first call, for some seconds, and is
cached on disk.
"""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import njit

from ..compiled import REORDER, array, exp_of, kept, sigmoid, wide
from ..networks.heads import is_plain
from ..networks.linear import Int8Weight
from .confidence import Confidence

_ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}


class Weights(NamedTuple):
    """The prediction network and the joint as arrays; a matrix is (numbers, scale of each row,
    empty where it has none)."""

    embedded: np.ndarray  # (V+1, H) float32
    from_below: tuple  # of each layer: matrix (4H, H)
    from_before: tuple
    biases: np.ndarray  # (layers, 4H), both of PyTorch's together
    predicted: tuple  # matrix (J, H)
    predicted_bias: np.ndarray
    output: tuple  # matrix (V+1+N, J)
    output_bias: np.ndarray
    gates: np.ndarray  # (V+1, 4H): the first layer's share of a token, where `known`
    known: np.ndarray  # (V+1,)


class Room(NamedTuple):
    """What a step writes and the next one writes again."""

    which: np.ndarray  # clips that a product is of
    one: np.ndarray
    tokens: np.ndarray  # the last of each clip
    gates: np.ndarray  # (clips, 4H)
    more: np.ndarray
    active: np.ndarray  # (clips, J)
    logits: np.ndarray  # (clips, V+1+N)


_kept: WeakKeyDictionary = WeakKeyDictionary()  # joint -> (what its weights were, Weights)
_lock = threading.Lock()


def fits(decoder, joint) -> bool:
    """Whether the weights are of kinds that the kernel knows, and lie still between calls."""
    if getattr(joint, "weights_in_shards", False):
        return False
    if not is_plain(decoder, joint):
        return False
    weights = [joint.pred.weight, joint.joint_net[-1].weight, *_matrices(decoder)]
    kinds = (torch.float32, torch.bfloat16, torch.int8)
    plain = all(w.dtype in kinds and not hasattr(w, "parametrizations") for w in weights)
    return plain and joint.enc.weight.dtype in kinds[:2]


def run(
    projected: torch.Tensor,
    lengths: torch.Tensor,
    decoder,
    joint,
    blank: int,
    durations: tuple[int, ...],
    max_symbols: int | None,
    bias: torch.Tensor | None,
    confidence: Confidence | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """projected (B, T', J), lengths (B,) -> what `label_loop.by_clip` gives: of each clip tokens,
    frames and durations (3, n); log-probabilities and confidences (2, n)."""
    weights = _weights(decoder, joint)
    batch, n_frames = projected.shape[:2]
    n_outputs, hidden = len(weights.output_bias), decoder.hidden
    ends = lengths.numpy().astype(np.int64)
    # The kernel looks at no bounds.
    assert len(durations) == n_outputs - blank - 1 and max(ends, default=0) <= n_frames
    added = np.zeros(0, np.float32) if bias is None else bias.float().numpy()
    frames = array(projected.contiguous())
    n_groups = max(1, min(torch.get_num_threads(), batch))

    def decode(clips: slice):
        def floats_of(*shape):
            return np.zeros(shape, np.float32)

        n, width = len(ends[clips]), len(weights.predicted_bias)
        capacity = n_frames + 16
        at = np.zeros((3, n), np.int64)  # frame, tokens on it, tokens in all
        h, c = (floats_of(decoder.n_layers, n, hidden) for _ in range(2))
        state = floats_of(n, width)
        ints, floats = np.zeros((n, capacity, 3), np.int64), floats_of(n, capacity)
        logits = floats_of(n, capacity if confidence else 0, n_outputs)
        room = Room(
            *(np.zeros(size, np.int64) for size in (n, 1, n)),
            floats_of(n, 4 * hidden), floats_of(n, 4 * hidden), floats_of(n, width),
            floats_of(n, n_outputs),
        )  # fmt: skip
        begin = True
        while True:
            full = _decode(
                frames[clips], ends[clips], weights, blank, np.array(durations, np.int64),
                max_symbols or 0, added, _ACTIVATIONS[joint.activation], at, h, c, state, ints,
                floats, logits, room, begin,
            )  # fmt: skip
            if not full:
                return at[2], ints, floats, logits
            ints, floats, logits = (
                np.concatenate((x, np.zeros_like(x)), 1) for x in (ints, floats, logits)
            )
            begin = False

    bounds = [batch * i // n_groups for i in range(n_groups + 1)]
    groups = [slice(lo, hi) for lo, hi in itertools.pairwise(bounds)]
    if len(groups) == 1:
        parts = [decode(groups[0])]
    else:
        with ThreadPoolExecutor(len(groups)) as pool:
            parts = list(pool.map(decode, groups))
    found = []
    for counts, ints, floats, logits_of in parts:
        for b, n in enumerate(counts):
            sure = np.zeros(n, np.float32)
            if confidence is not None:
                logits = torch.from_numpy(logits_of[b, :n])
                chosen = logits[:, : blank + 1].log_softmax(-1)
                sure = confidence.of_symbol(chosen, logits[:, blank + 1 :]).numpy()
            found.append((ints[b, :n].T.copy(), np.stack((floats[b, :n], sure))))
    return found


def _matrices(decoder) -> list:
    lstm = decoder.prediction["dec_rnn"].lstm
    names = ("weight_ih", "weight_hh")
    return [getattr(lstm, f"{n}_l{i}") for n in names for i in range(decoder.n_layers)]


def _matrix(weight) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(weight, Int8Weight):
        return weight.rounded.numpy(), weight.scale.numpy()
    return array(weight.contiguous()), np.zeros(0, np.float32)


def _weights(decoder, joint) -> Weights:
    """The arrays, kept while the weights stay what they are."""
    tensors = [p for m in (decoder, joint) for p in m.parameters()]
    state = None
    if not any(t.is_inference() for t in tensors):  # which have no version
        state = tuple((t.data_ptr(), t._version) for t in tensors)
    with _lock:
        before, weights = _kept.get(joint, (None, None))
        if state is None or before != state:
            weights = _prepare(decoder, joint)
            _kept[joint] = state, weights
        return weights


def _prepare(decoder, joint) -> Weights:
    lstm = decoder.prediction["dec_rnn"].lstm
    matrices = [_matrix(w) for w in _matrices(decoder)]
    n = decoder.n_layers
    biases = [
        (getattr(lstm, f"bias_ih_l{i}").float() + getattr(lstm, f"bias_hh_l{i}").float()).detach()
        for i in range(n)
    ]
    embed = decoder.prediction["embed"]
    embedded = embed(torch.arange(embed.num_embeddings)).detach().float().numpy()
    output = joint.joint_net[-1]
    return Weights(
        embedded, tuple(matrices[:n]), tuple(matrices[n:]), torch.stack(biases).numpy(),
        _matrix(joint.pred.weight), joint.pred.bias.detach().float().numpy(),
        _matrix(output.weight), output.bias.detach().float().numpy(),
        # untouched pages take no memory
        np.empty((len(embedded), 4 * decoder.hidden), np.float32),
        np.zeros(len(embedded), np.bool_),
    )  # fmt: skip


# Arrays are made in Python and indexed element by element here: each of numpy's functions and each
# slice would be compiled along, which takes numba some seconds in all.


@njit(fastmath=REORDER, error_model="numpy")
def _dots(weight, i, x, b):
    """Four rows of the weight, from i on, times x[b]."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(x.shape[1]):
        v = x[b, k]
        s0 += wide(weight[i, k]) * v
        s1 += wide(weight[i + 1, k]) * v
        s2 += wide(weight[i + 2, k]) * v
        s3 += wide(weight[i + 3, k]) * v
    return s0, s1, s2, s3


@njit(fastmath=REORDER, error_model="numpy")
def _dot(weight, i, x, b):
    total = np.float32(0)
    for k in range(x.shape[1]):
        total += wide(weight[i, k]) * x[b, k]
    return total


@njit(error_model="numpy")
def _multiply(matrix, x, which, n, out):
    """out[b] = matrix x[b] for the first n clips b in `which`; four rows are in the cache for all
    clips."""
    weight, scale = matrix
    n_rows = weight.shape[0]
    fours = n_rows - n_rows % 4
    for i in range(0, fours, 4):
        for j in range(n):
            b = which[j]
            out[b, i], out[b, i + 1], out[b, i + 2], out[b, i + 3] = _dots(weight, i, x, b)
    for i in range(fours, n_rows):
        for j in range(n):
            out[which[j], i] = _dot(weight, i, x, which[j])
    if len(scale) > 0:
        for j in range(n):
            b = which[j]
            for i in range(n_rows):
                out[b, i] *= scale[i]


@njit(error_model="numpy")
def _add(which, n, bias, out):
    for j in range(n):
        b = which[j]
        for k in range(len(bias)):
            out[b, k] += bias[k]


@njit(fastmath={"contract"}, error_model="numpy")
def _tanh(x):
    e = exp_of(np.float32(-2) * abs(x))
    y = (np.float32(1) - e) / (np.float32(1) + e)
    return y if x >= 0 else -y


@njit(fastmath={"contract"}, error_model="numpy")
def _cells(gates, h, c, layer, b):
    """A layer's new state of clip b from its gates (4H,), in PyTorch's order."""
    hidden = h.shape[2]
    for k in range(hidden):
        kept_share = sigmoid(gates[b, hidden + k]) * c[layer, b, k]
        c[layer, b, k] = kept_share + sigmoid(gates[b, k]) * _tanh(gates[b, 2 * hidden + k])
        h[layer, b, k] = sigmoid(gates[b, 3 * hidden + k]) * _tanh(c[layer, b, k])


@njit(fastmath={"contract"}, error_model="numpy")
def _activate(frames, b, t, state, activation, out):
    for k in range(out.shape[1]):
        total = wide(frames[b, t, k]) + state[b, k]
        if activation == 0:
            out[b, k] = total if total > 0 else total * np.float32(0)  # NaN stays
        elif activation == 1:
            out[b, k] = _tanh(total)
        else:
            out[b, k] = sigmoid(total)


@njit(error_model="numpy")
def _best(x, b, first, last):
    """Where in x[b, first:last] the largest number is, the first of equals."""
    best = first
    for v in range(first + 1, last):
        if x[b, v] > x[b, best]:
            best = v
    return best - first


@njit(fastmath=REORDER, error_model="numpy")
def _log_sum_exp(x, b, last, top):
    total = 0.0
    for v in range(last):
        total += exp_of(x[b, v] - top)
    return np.float32(math.log(total))


@njit(error_model="numpy")
def _predict(weights, room, n, h, c, state):
    """Takes in the token of the first n clips in `room.which` (-1: the start symbol)."""
    which, gates = room.which, room.gates
    for layer in range(len(h)):
        _multiply(weights.from_before[layer], h[layer], which, n, gates)
        if layer == 0:
            for j in range(n):
                token = room.tokens[which[j]]
                if token < 0:
                    continue
                if not weights.known[token]:
                    room.one[0] = token
                    _multiply(
                        weights.from_below[0], weights.embedded, room.one, 1,
                        weights.gates,
                    )  # fmt: skip
                    weights.known[token] = True
                for k in range(gates.shape[1]):
                    gates[which[j], k] += weights.gates[token, k]
        else:
            _multiply(weights.from_below[layer], h[layer - 1], which, n, room.more)
            for j in range(n):
                for k in range(gates.shape[1]):
                    gates[which[j], k] += room.more[which[j], k]
        _add(which, n, weights.biases[layer], gates)
        for j in range(n):
            _cells(gates, h, c, layer, which[j])
    _multiply(weights.predicted, h[len(h) - 1], which, n, state)
    _add(which, n, weights.predicted_bias, state)


@kept()
def _decode(
    frames, ends, weights, blank, durations, max_symbols, added, activation, at, h, c, state, ints,
    floats, logits_of, room, begin,
):  # fmt: skip
    """Advances clips to their ends; True where a clip's records are full before that: to be called
    again with more room. All arrays from `at` on are written."""
    n_clips, n_outputs = len(ends), len(weights.output_bias)
    which, logits = room.which, room.logits
    if begin:
        for b in range(n_clips):
            which[b] = b
            room.tokens[b] = -1
        _predict(weights, room, n_clips, h, c, state)
    while True:
        n, full = 0, False
        for b in range(n_clips):
            if at[0, b] < ends[b]:
                full = full or at[2, b] == ints.shape[1]
                _activate(frames, b, at[0, b], state, activation, room.active)
                which[n] = b
                n += 1
        if n == 0 or full:
            return full
        _multiply(weights.output, room.active, which, n, logits)
        _add(which, n, weights.output_bias, logits)
        _add(which, n, added, logits)
        n_found = 0
        for j in range(n):
            b = which[j]
            token = _best(logits, b, 0, blank + 1)
            skip = 1 if token == blank else 0
            if len(durations) > 0:
                skip = durations[_best(logits, b, blank + 1, n_outputs)]
            if token == blank:
                at[0, b] += max(skip, 1)
                at[1, b] = 0
                continue
            i = at[2, b]
            top = logits[b, token]
            ints[b, i, 0], ints[b, i, 1], ints[b, i, 2] = token, at[0, b], skip
            floats[b, i] = -_log_sum_exp(logits, b, blank + 1, top)
            if logits_of.shape[1] > 0:
                for v in range(n_outputs):
                    logits_of[b, i, v] = logits[b, v]
            at[2, b] += 1
            at[1, b] = at[1, b] + 1 if skip == 0 else 0
            if max_symbols > 0 and at[1, b] >= max_symbols:
                skip += 1
                at[1, b] = 0
            at[0, b] += skip
            room.tokens[b] = token
            which[n_found] = b
            n_found += 1
        _predict(weights, room, n_found, h, c, state)
