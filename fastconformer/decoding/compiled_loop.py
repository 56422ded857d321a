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

import contextlib
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
from .compiled_products import (
    BEFORE,
    BELOW,
    COUNT,
    HELPERS,
    OUTPUT,
    PREDICTED,
    STOP,
    TICKET,
    TOKEN,
    Products,
    help_out,
    multiply,
)
from .confidence import Confidence

_MOST_OF_A_GROUP = 4  # threads for one clip, whose pieces take microseconds
_WORTH_HELP = 500_000  # numbers in the weights of a step; reading fewer is as fast as sharing them
_ACTIVATIONS = {"relu": 0, "tanh": 1, "sigmoid": 2}


class Weights(NamedTuple):
    """The prediction network and the joint as arrays, the matrices as in `Products`."""

    predicted: tuple
    others: tuple
    biases: np.ndarray  # (layers, 4H), both of PyTorch's together
    predicted_bias: np.ndarray  # (J,)
    output_bias: np.ndarray  # (V+1+N,)
    embedded: np.ndarray  # (V+1, H) float32
    gates: np.ndarray  # (V+1, 4H): the first layer's share of a token, where `known`
    known: np.ndarray  # (V+1,)


class Room(NamedTuple):
    """What a step writes and the next one reads or writes again: views of `Products.floats`."""

    h: np.ndarray  # (layers, clips, H)
    c: np.ndarray
    state: np.ndarray  # (clips, J)
    active: np.ndarray
    gates: np.ndarray  # (clips, 4H)
    more: np.ndarray
    logits: np.ndarray  # (clips, V+1+N)
    token: np.ndarray  # (1, H) an embedding, and
    share: np.ndarray  # (1, 4H) what the first layer makes of it


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
    alike = len({w.dtype for w in weights[1:]}) == 1
    return plain and alike and joint.enc.weight.dtype in kinds[:2]


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
    n_outputs = len(weights.output_bias)
    ends = lengths.numpy().astype(np.int64)
    # The kernel looks at no bounds.
    assert len(durations) == n_outputs - blank - 1 and max(ends, default=0) <= n_frames
    added = np.zeros(0, np.float32) if bias is None else bias.float().numpy()
    frames = array(projected.contiguous())
    n_threads = torch.get_num_threads()
    n_groups = max(1, min(n_threads, batch))
    matrices = weights.predicted, *weights.others
    worth = sum(numbers.size for numbers, _ in matrices) >= _WORTH_HELP
    n_helpers = min(n_threads // n_groups, _MOST_OF_A_GROUP) - 1 if worth else 0

    def decode(clips: slice):
        n, capacity = len(ends[clips]), n_frames + 16
        at = np.zeros((3, n), np.int64)  # frame, tokens on it, tokens in all
        ints, floats = np.zeros((n, capacity, 3), np.int64), np.zeros((n, capacity), np.float32)
        logits = np.zeros((n, capacity if confidence else 0, n_outputs), np.float32)
        products, room = _room(n, weights)
        tokens = np.full(n, -1)  # the last of each clip, the start symbol
        begin = True
        with _helped(n_helpers, products):
            while _decode(
                frames[clips], ends[clips], weights.embedded, weights.gates, weights.known,
                weights.biases, weights.predicted_bias, weights.output_bias, blank,
                np.array(durations, np.int64), max_symbols or 0, added,
                _ACTIVATIONS[joint.activation], at, ints, floats, logits, tokens, products, room,
                begin,
            ):  # fmt: skip
                ints, floats, logits = (
                    np.concatenate((x, np.zeros_like(x)), 1) for x in (ints, floats, logits)
                )
                begin = False
        return at[2], ints, floats, logits

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


def _room(n: int, weights: Weights) -> tuple[Products, Room]:
    """For n clips, all zeros."""
    layers, hidden = len(weights.biases), weights.embedded.shape[1]
    width, n_outputs = len(weights.predicted_bias), len(weights.output_bias)
    shapes = Room(
        (layers, n, hidden), (layers, n, hidden), (n, width), (n, width), (n, 4 * hidden),
        (n, 4 * hidden), (n, n_outputs), (1, hidden), (1, 4 * hidden),
    )  # fmt: skip
    starts = list(itertools.accumulate(map(math.prod, shapes), initial=0))
    floats, at = np.zeros(starts.pop(), np.float32), Room(*starts)
    room = Room(
        *(
            floats[start : start + math.prod(shape)].reshape(shape)
            for start, shape in zip(at, shapes, strict=True)
        )
    )
    state = [at.h + layer * n * hidden for layer in range(layers)]
    places = [
        (state[-1], at.state, width),
        (at.active, at.logits, n_outputs),
        (state[0], at.gates, 4 * hidden),
        (at.token, at.share, 4 * hidden),
    ]
    for below, here in itertools.pairwise(state):
        places += [(here, at.gates, 4 * hidden), (below, at.more, 4 * hidden)]
    products = Products(
        weights.predicted, weights.others, floats, np.array(places), np.zeros(n + 1, np.int64),
        np.zeros(HELPERS + 1, np.int64),
    )  # fmt: skip
    return products, room


@contextlib.contextmanager
def _helped(n: int, products: Products):
    """While inside, n threads beside the caller's take pieces of what it multiplies."""
    products.board[HELPERS] = n
    threads = [threading.Thread(target=_help, args=(products,)) for _ in range(n)]
    try:
        with contextlib.suppress(RuntimeError):  # the system starts no more
            for thread in threads:
                thread.start()
        yield
    finally:
        products.board[TICKET] = STOP
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _matrices(decoder) -> list:
    """Each layer's for the state before and for what is below."""
    lstm = decoder.prediction["dec_rnn"].lstm
    names = ("weight_hh", "weight_ih")
    return [getattr(lstm, f"{name}_l{i}") for i in range(decoder.n_layers) for name in names]


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
    biases = [
        (getattr(lstm, f"bias_ih_l{i}").float() + getattr(lstm, f"bias_hh_l{i}").float()).detach()
        for i in range(decoder.n_layers)
    ]
    embed = decoder.prediction["embed"]
    embedded = embed(torch.arange(embed.num_embeddings, device="cpu")).detach().float().numpy()
    output = joint.joint_net[-1]
    others = [output.weight, *_matrices(decoder)]
    return Weights(
        _matrix(joint.pred.weight), tuple(_matrix(w) for w in others),
        torch.stack(biases).numpy(), joint.pred.bias.detach().float().numpy(),
        output.bias.detach().float().numpy(), embedded,
        # untouched pages take no memory
        np.empty((len(embedded), 4 * decoder.hidden), np.float32),
        np.zeros(len(embedded), np.bool_),
    )  # fmt: skip


# Arrays are made in Python and indexed element by element here: each of numpy's functions and each
# slice would be compiled along, which takes numba some seconds in all.


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
def _add_share(products, room, embedded, shares, known, token, b):
    """Adds what the first layer makes of the token to the gates of clip b."""
    if not known[token]:
        for k in range(embedded.shape[1]):
            room.token[0, k] = embedded[token, k]
        multiply(products, TOKEN)
        for k in range(shares.shape[1]):
            shares[token, k] = room.share[0, k]
        known[token] = True
    for k in range(shares.shape[1]):
        room.gates[b, k] += shares[token, k]


@kept()
def _decode(
    frames, ends, embedded, shares, known, biases, predicted_bias, output_bias, blank, durations,
    max_symbols, added, activation, at, ints, floats, logits_of, tokens, products, room, begin,
):  # fmt: skip
    """Advances clips to their ends; True where a clip's records are full before that: to be called
    again with more room. All arrays from `at` on are written."""
    n_clips, n_outputs = len(ends), len(output_bias)
    which, board, logits, gates = products.which, products.board, room.logits, room.gates
    n_found = 0
    if begin:
        for b in range(n_clips):
            which[b] = b
        n_found = n_clips
    while True:
        # the prediction network takes in the token of the first n_found clips in `which`
        board[COUNT] = n_found
        for layer in range(len(biases) if n_found > 0 else 0):
            multiply(products, BEFORE + 2 * layer)
            if layer > 0:
                multiply(products, BELOW + 2 * layer)
            for j in range(n_found):
                b = which[j]
                if layer > 0:
                    for k in range(gates.shape[1]):
                        gates[b, k] += room.more[b, k]
                elif tokens[b] >= 0:
                    _add_share(products, room, embedded, shares, known, tokens[b], b)
            _add(which, n_found, biases[layer], gates)
            for j in range(n_found):
                _cells(gates, room.h, room.c, layer, which[j])
        if n_found > 0:
            multiply(products, PREDICTED)
            _add(which, n_found, predicted_bias, room.state)
        n, full = 0, False
        for b in range(n_clips):
            if at[0, b] < ends[b]:
                full = full or at[2, b] == ints.shape[1]
                _activate(frames, b, at[0, b], room.state, activation, room.active)
                which[n] = b
                n += 1
        if n == 0 or full:
            return full
        board[COUNT] = n
        multiply(products, OUTPUT)
        _add(which, n, output_bias, logits)
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
            tokens[b] = token
            which[n_found] = b
            n_found += 1


# Compiled here, since numba's cache looks at this file alone: an old `_decode` beside a new helper
# would wait for ever.
@kept()
def _help(products):
    help_out(products)
