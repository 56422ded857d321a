"""The matrix products of a greedy step on a CPU (numba), for `compiled_loop`.

A product is cut into pieces of rows. The thread that decodes posts it on a board; it and its
helpers, which wait there, take pieces until none is left. So one clip's weights are read through
the caches of several cores, and a row's sum is the same whoever computes it. Nobody waits for a
helper that the system has put aside between pieces.

Importing this module needs numba.
"""

import os
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled import REORDER, wide

_ROWS = 64  # of a piece: 160 KB in float32 where a row is 640 wide, some 5 us
_SPINS = 1000  # looks at the board before a thread lets others run, some us

# Products, by their number; of layer i BEFORE + 2 i and BELOW + 2 i. The first layer's BELOW, which
# is kept, is a token's share. (For each plain int numba would compile what it is given to again.)
PREDICTED, OUTPUT, BEFORE, BELOW = np.arange(4)
TOKEN = BELOW

# Slots of the board, those that change while threads wait in cache lines of their own: the ticket;
# pieces done by helpers; clips that a product is of; helpers. A ticket is one number: the product,
# how many pieces it has, how many helpers took from the end, how many the thread that decodes took
# from the start. So each reads the same rows at every step, from caches of its own.
TICKET, _DONE, COUNT, HELPERS = 0, 8, 16, 17
STOP = -(1 << 62)
_BITS = 16  # of each of the last three
_MASK = (1 << _BITS) - 1
_FROM_START, _FROM_END = 1, 1 << _BITS


class Products(NamedTuple):
    """What every thread that multiplies has to know; a matrix is (numbers, scale of each row, empty
    where it has none). Few arrays, for the compiler's sake."""

    predicted: tuple  # matrix (J, H)
    others: tuple  # matrices of the products from OUTPUT on: (V+1+N, J), then (4H, H)
    floats: np.ndarray  # what is multiplied, and what comes of it, clip behind clip
    places: np.ndarray  # of each product: where in `floats` these two begin, rows of the matrix
    which: np.ndarray  # clips that a product is of, the first `COUNT`; the last is 0
    board: np.ndarray


# --- the board: numbers that several threads change ---------------------------------------------


def _place(context, builder, signature, arguments):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def _look(typing_context, board, i):
    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(board, i), generate


@intrinsic
def _put(typing_context, board, i, value):
    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(board, i, types.int64), generate


@intrinsic
def _add(typing_context, board, i, value):
    """Gives what was there before."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(board, i, types.int64), generate


@intrinsic
def _let_others_run(typing_context):
    def generate(context, builder, signature, arguments):
        if os.name == "posix":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


# --- products -----------------------------------------------------------------------------------


@njit(fastmath=REORDER, error_model="numpy")
def _dots(weight, i, x):
    """Four rows of the weight, from i on, times x."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(weight.shape[1]):
        v = x[k]
        s0 += wide(weight[i, k]) * v
        s1 += wide(weight[i + 1, k]) * v
        s2 += wide(weight[i + 2, k]) * v
        s3 += wide(weight[i + 3, k]) * v
    return s0, s1, s2, s3


@njit(fastmath=REORDER, error_model="numpy")
def _dot(weight, i, x):
    total = np.float32(0)
    for k in range(weight.shape[1]):
        total += wide(weight[i, k]) * x[k]
    return total


@njit(error_model="numpy")
def _rows(matrix, products, product, piece):
    """A piece of the product for each clip."""
    weight, scale = matrix
    floats, which, (n_rows, width) = products.floats, products.which, weight.shape
    at, to = products.places[product, 0], products.places[product, 1]
    start, n = (len(which) - 1, 1) if product == TOKEN else (0, products.board[COUNT])
    first, end = piece * _ROWS, min((piece + 1) * _ROWS, n_rows)
    weight, scale = weight[first:end], scale[first:end]
    fours = len(weight) - len(weight) % 4
    for j in range(n):
        b = which[start + j]
        x, out = floats[at + b * width :], floats[to + b * n_rows + first :]
        for i in range(0, fours, 4):
            out[i], out[i + 1], out[i + 2], out[i + 3] = _dots(weight, i, x)
        for i in range(fours, len(weight)):
            out[i] = _dot(weight, i, x)
        for i in range(len(scale)):
            out[i] *= scale[i]


@njit(error_model="numpy")
def _part(products, product, piece):
    if product == PREDICTED:
        _rows(products.predicted, products, product, piece)
    else:
        _rows(products.others[product - OUTPUT], products, product, piece)


@njit(error_model="numpy")
def multiply(products, product):
    """The product for the clips in `which`; TOKEN: for one token."""
    board, n_pieces = products.board, -(-products.places[product, 2] // _ROWS)
    if board[HELPERS] == 0:
        for piece in range(n_pieces):
            _part(products, product, piece)
        return
    _put(board, _DONE, 0)
    _put(board, TICKET, ((product << _BITS) + n_pieces) << (2 * _BITS))
    by_helpers, spins = n_pieces, 0
    while True:
        piece, taken, _, _ = _parts(_add(board, TICKET, _FROM_START))
        if taken >= n_pieces:
            break
        _part(products, product, piece)
        by_helpers -= 1
    while _look(board, _DONE) < by_helpers:
        spins = _wait(spins)


@njit
def _parts(ticket):
    """Pieces taken from the start, taken in all, number of pieces, product."""
    first, last = ticket & _MASK, ticket >> _BITS & _MASK
    return first, first + last, ticket >> (2 * _BITS) & _MASK, ticket >> (3 * _BITS)


@njit
def _wait(spins):
    if spins == _SPINS:
        _let_others_run()
        return 0
    return spins + 1


@njit(error_model="numpy")
def help_out(products):
    """A helper's life, until STOP is on the board."""
    board, spins = products.board, 0
    while True:
        ticket = _look(board, TICKET)
        _, taken, n_pieces, _ = _parts(ticket)
        if ticket >= 0 and taken >= n_pieces:
            spins = _wait(spins)
            continue
        # Another product may have been posted since; then this is a piece of that one.
        ticket = _add(board, TICKET, _FROM_END)
        if ticket < 0:
            return
        first, taken, n_pieces, product = _parts(ticket)
        if taken < n_pieces:
            _part(products, product, n_pieces - 1 - (taken - first))
            _add(board, _DONE, 1)
        spins = 0
