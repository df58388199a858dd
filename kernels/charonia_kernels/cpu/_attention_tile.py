"""One tile of attention on the CPU: scores, online softmax (Dao et al., 2022) and weighted values of some rows.

Few rows take their scores as dot products with the keys where they lie. From eight rows on, the keys of a tile are
transposed first, so that lanes hold keys and no lane sums are needed; the transposition is shared by all rows.
"""

from collections.abc import Callable

import numba
import numpy as np

from charonia_kernels.cpu._jit import jit
from charonia_kernels.cpu._math import exp_f32
from charonia_kernels.cpu._simd import LANES, largest, load, offset, pointer, prefetch
from charonia_kernels.cpu._tiles import dot_tile, outer_tile, transpose_tile

TILE_KEYS = 64
_MIN_TRANSPOSED_ROWS = 8
NEGATIVE_INFINITY = np.float32(-np.inf)
_F32 = numba.float32


def _score_strip(rows: int, width: int) -> Callable[..., None]:
    """Scores of a fixed number of rows against any number of consecutive keys."""
    tile, edge = dot_tile(rows, width), dot_tile(rows, 1)

    @jit
    def strip(q, keys, count, head_dim, null, scores):  # type: ignore[no-untyped-def]
        key = 0
        while key + width <= count:
            k = offset(keys, key * head_dim)
            tile(q, head_dim, k, head_dim, head_dim, null, offset(scores, key), TILE_KEYS)
            key += width
        while key < count:
            k = offset(keys, key * head_dim)
            edge(q, head_dim, k, head_dim, head_dim, null, offset(scores, key), TILE_KEYS)
            key += 1

    return strip


def _sum_strip(rows: int, vectors: int) -> Callable[..., None]:
    """``total[rows, width] += weights[rows, depth] @ values[depth, width]``, width a multiple of 8."""
    tile, edge = outer_tile(rows, vectors), outer_tile(rows, 1)

    @jit
    def strip(weights, weights_stride, values, values_stride, depth, total, width, total_stride):  # type: ignore[no-untyped-def]
        lane = 0
        while lane + LANES * vectors <= width:
            v, t = offset(values, lane), offset(total, lane)
            tile(weights, weights_stride, v, values_stride, depth, t, total_stride)
            lane += LANES * vectors
        while lane < width:
            v, t = offset(values, lane), offset(total, lane)
            edge(weights, weights_stride, v, values_stride, depth, t, total_stride)
            lane += LANES

    return strip


_SCORE_1, _SCORE_2, _SCORE_3, _SCORE_4 = (
    _score_strip(1, 4),
    _score_strip(2, 4),
    _score_strip(3, 3),
    _score_strip(4, 2),
)
_SUM_1, _SUM_2, _SUM_3, _SUM_4 = _sum_strip(1, 8), _sum_strip(2, 4), _sum_strip(3, 4), _sum_strip(4, 2)


@jit
def _dot_scores(q, rows, keys, count, head_dim, null, scores):  # type: ignore[no-untyped-def]
    """``scores[rows, count] = q[rows, head_dim] @ keys[count, head_dim].T``, rows of scores TILE_KEYS apart."""
    row = 0
    while row + 4 <= rows:
        _SCORE_4(offset(q, row * head_dim), keys, count, head_dim, null, offset(scores, row * TILE_KEYS))
        row += 4
    q_rest, scores_rest = offset(q, row * head_dim), offset(scores, row * TILE_KEYS)
    if rows - row == 3:
        _SCORE_3(q_rest, keys, count, head_dim, null, scores_rest)
    elif rows - row == 2:
        _SCORE_2(q_rest, keys, count, head_dim, null, scores_rest)
    elif rows - row == 1:
        _SCORE_1(q_rest, keys, count, head_dim, null, scores_rest)


@jit
def _transpose_keys(keys, count, head_dim, turned):  # type: ignore[no-untyped-def]
    """``turned[head_dim, count] = keys[count, head_dim].T`` in fp32, rows of turned TILE_KEYS apart."""
    key = 0
    while key + LANES <= count:
        for lane in range(0, head_dim, LANES):
            source = offset(keys, key * head_dim + lane)
            transpose_tile(source, head_dim, offset(turned, lane * TILE_KEYS + key), TILE_KEYS)
        key += LANES
    while key < count:
        for lane in range(head_dim):
            turned[lane * TILE_KEYS + key] = load(keys, key * head_dim + lane)
        key += 1


@jit
def _add_product(weights, weights_stride, rows, values, values_stride, depth, total, width, total_stride):  # type: ignore[no-untyped-def]
    """``total[rows, width] += weights[rows, depth] @ values[depth, width]``, width a multiple of 8."""
    row = 0
    while row + 4 <= rows:
        w, t = offset(weights, row * weights_stride), offset(total, row * total_stride)
        _SUM_4(w, weights_stride, values, values_stride, depth, t, width, total_stride)
        row += 4
    w, t = offset(weights, row * weights_stride), offset(total, row * total_stride)
    if rows - row == 3:
        _SUM_3(w, weights_stride, values, values_stride, depth, t, width, total_stride)
    elif rows - row == 2:
        _SUM_2(w, weights_stride, values, values_stride, depth, t, width, total_stride)
    elif rows - row == 1:
        _SUM_1(w, weights_stride, values, values_stride, depth, t, width, total_stride)


@jit
def _transposed_scores(q, rows, turned, count, head_dim, scores):  # type: ignore[no-untyped-def]
    """``scores[rows, count] = q[rows, head_dim] @ turned[head_dim, count]``; lanes up to the next 8 are undefined."""
    width = (count + LANES - 1) // LANES * LANES
    for row in range(rows):
        for key in range(width):
            scores[row * TILE_KEYS + key] = np.float32(0.0)
    _add_product(q, head_dim, rows, turned, TILE_KEYS, head_dim, scores, width, TILE_KEYS)


@jit
def _softmax_row(scores, low, high, count, soft_cap, maximum, row):  # type: ignore[no-untyped-def]
    """Turn one row's scores into weights; keys outside [low, high) weigh nothing.

    Updates the row's running maximum; returns the factor for what was summed before, and the sum of the new weights.
    """
    if soft_cap > np.float32(0.0):
        for key in range(count):
            # tanh(y) = 1 - 2 / (exp(2 * y) + 1)
            y = np.float32(2.0) / soft_cap * scores[key]
            scores[key] = soft_cap * (np.float32(1.0) - np.float32(2.0) / (exp_f32(y) + np.float32(1.0)))
    previous = maximum[row]
    peak = largest(offset(scores, low), high - low, previous)
    maximum[row] = peak
    added = np.float32(0.0)
    for key in range(low, high):
        weight = exp_f32(scores[key] - peak)
        scores[key] = weight
        added += weight
    for key in range(low):
        scores[key] = np.float32(0.0)
    for key in range(max(low, high), count):
        scores[key] = np.float32(0.0)
    factor = np.float32(0.0) if previous == NEGATIVE_INFINITY else exp_f32(previous - peak)
    return factor, added


@jit
def _clear_rows(total, maximum, denominator, rows, head_dim):  # type: ignore[no-untyped-def]
    """Start the running sums, maxima and denominators of ``rows`` rows."""
    for i in range(rows * head_dim):
        total[i] = np.float32(0.0)
    for row in range(rows):
        maximum[row] = NEGATIVE_INFINITY
        denominator[row] = np.float32(0.0)


@jit
def _place_of(a, table, kv_head, key):  # type: ignore[no-untyped-def]
    """Where a key lies in its cache, in elements, and how many keys of its block lie from there on."""
    place = key % a.block_size
    block = np.int64(table[key // a.block_size])
    return block * a.block_stride + (kv_head * a.block_size + place) * a.head_dim, a.block_size - place


@jit
def _score_tile(a, keys, values, table, tile, kv_head, rows, start, count):  # type: ignore[no-untyped-def]
    """Scores of the staged rows against keys [start, start + count); their values are fetched meanwhile."""
    q, _, scores, turned, _, _ = tile
    dim, null = a.head_dim, pointer(0, _F32)
    done = 0
    while done < count:
        place, left = _place_of(a, table, kv_head, start + done)
        piece = min(left, count - done)
        if rows < _MIN_TRANSPOSED_ROWS:
            prefetch(offset(values, place), piece * dim)
            _dot_scores(q, rows, offset(keys, place), piece, dim, null, offset(scores, done))
        else:
            _transpose_keys(offset(keys, place), piece, dim, offset(turned, done))
        done += piece
    if rows >= _MIN_TRANSPOSED_ROWS:
        _transposed_scores(q, rows, turned, count, dim, scores)


@jit
def _sum_tile(a, keys, values, table, tile, kv_head, rows, start, count, end):  # type: ignore[no-untyped-def]
    """Add the weighted values of keys [start, start + count); the next tile's keys are fetched meanwhile."""
    _, total, scores, _, _, _ = tile
    dim = a.head_dim
    done = 0
    while done < count:
        place, left = _place_of(a, table, kv_head, start + done)
        piece = min(left, count - done)
        following = start + count + done
        if rows < _MIN_TRANSPOSED_ROWS and following < end:
            ahead, left = _place_of(a, table, kv_head, following)
            prefetch(offset(keys, ahead), min(left, piece) * dim)
        _add_product(
            offset(scores, done), TILE_KEYS, rows, offset(values, place), dim, piece, total, dim, dim
        )
        done += piece


@jit
def attend(a, keys, values, table, tile, kv_head, rows, position, begin, end):  # type: ignore[no-untyped-def]
    """Attend ``rows`` staged query rows, the first at ``position``, to keys [begin, end) of the sequence of ``table``.

    ``tile`` is the worker's scratch: (q, total, scores, turned, maximum, denominator), see ``paged_attention.py``.
    Every key in [begin, end) is visible to at least one row, so no block that the sequence has given back is read.
    """
    _, total, scores, _, maximum, denominator = tile
    dim, group, soft_cap = a.head_dim, a.heads // a.kv_heads, np.float32(a.soft_cap)
    _clear_rows(total, maximum, denominator, rows, dim)
    start = begin
    while start < end:
        count = min(TILE_KEYS, end - start)
        _score_tile(a, keys, values, table, tile, kv_head, rows, start, count)
        for row in range(rows):
            own = position + row // group - start
            high = min(count, max(0, own + 1))
            low = min(high, max(0, own + 1 - a.window)) if a.window > 0 else 0
            row_scores = offset(scores, row * TILE_KEYS)
            factor, added = _softmax_row(row_scores, low, high, count, soft_cap, maximum, row)
            denominator[row] = denominator[row] * factor + added
            if factor != np.float32(1.0):
                for i in range(row * dim, (row + 1) * dim):
                    total[i] *= factor
        _sum_tile(a, keys, values, table, tile, kv_head, rows, start, count, end)
        start += count
