"""When each token of a known text is heard, from the attention that a decoder pays to the sound.

Floor 2. Pure numpy, computes for up to 0.2 s: not for the event loop.

Source: openai-whisper's ``timing.py`` for the steps; T. Giorgino, "Computing and Visualizing Dynamic Time Warping
Alignments in R" (Journal of Statistical Software, 2009) for the warping.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

MEDIAN_WIDTH = 7
_ROWS_AT_ONCE = 16
"""The median's intermediate values then stay in the cache: a quarter of the time."""

_DIAGONAL, _UP, _LEFT = range(3)


def align(attention: Floats, *, num_skipped: int, num_positions: int) -> npt.NDArray[np.int64]:
    """At which position of the encoder each token begins to be heard.

    Per head: the softmax over positions, each position normalised over all tokens, a median over seven positions. The
    sum of the heads is what the best monotone path through tokens and positions gains most of.

    Args:
        attention: (A, S, P), scaled products of the alignment heads before the softmax; A is at least 1.
        num_skipped: tokens at the start that say nothing; they and the last one (the end) have no place on the path.
        num_positions: of sound, at least 1 and at most P.

    Returns:
        (S - num_skipped - 1), never falling, from 0 on.
    """
    num_tokens = attention.shape[1]
    kept = slice(num_skipped, num_tokens - 1)
    total = np.zeros((num_tokens - 1 - num_skipped, num_positions), np.float32)
    for head in attention:  # one at a time: a window of large-v3 has 27 MB of them
        weights = _softmax(head[:, :num_positions])
        weights -= weights.mean(axis=0)
        spread = np.sqrt((weights * weights).mean(axis=0))
        # No spread: every token is as sure of this position as any other. It then says nothing.
        total += median_filter(np.divide(weights, spread, out=weights, where=spread > 0)[kept], MEDIAN_WIDTH)
    return row_starts(-total)


def _softmax(x: Floats) -> Floats:
    """Over the last axis."""
    powers: Floats = np.exp(x - x.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def median_filter(x: Floats, width: int) -> Floats:
    """The median of each value and its neighbours in the row; at both ends the row is mirrored.

    Args:
        x: (rows, columns); rows too short to be mirrored stay as they are.
        width: odd.
    """
    edge, num_columns = width // 2, x.shape[1]
    if num_columns <= edge:
        return x
    padded = np.pad(x, ((0, 0), (edge, edge)), mode="reflect")
    result = np.empty_like(x)
    for begin in range(0, len(x), _ROWS_AT_ONCE):
        rows = padded[begin : begin + _ROWS_AT_ONCE]
        result[begin : begin + _ROWS_AT_ONCE] = _median([rows[:, i : i + num_columns] for i in range(width)])
    return result


def _median(arrays: list[Floats]) -> Floats:
    """Of each place of an odd number of arrays.

    Of any n // 2 + 2 values neither the least nor the greatest can be the median of all n: both are dropped for the
    next value, until one is left. A tenth of the time that sorting takes.
    """
    num_kept = len(arrays) // 2 + 2
    kept, rest = arrays[:num_kept], arrays[num_kept:]
    while len(kept) > 1:
        for i in range(1, len(kept)):
            kept[0], kept[i] = np.minimum(kept[0], kept[i]), np.maximum(kept[0], kept[i])
        for i in range(1, len(kept) - 1):
            kept[-1], kept[i] = np.maximum(kept[-1], kept[i]), np.minimum(kept[-1], kept[i])
        kept = kept[1:-1] + rest[:1]
        rest = rest[1:]
    return kept[0]


def row_starts(costs: Floats) -> npt.NDArray[np.int64]:
    """The first column of each row on the cheapest path from the first to the last place of a matrix.

    A path goes one column right, one row down, or both at once; of ways that cost the same, the first in this order.

    Args:
        costs: (N, M), both at least 1, finite.

    Returns:
        (N)
    """
    num_rows, num_columns = costs.shape
    moves = _moves(costs)
    starts = np.zeros(num_rows, np.int64)
    row, column = num_rows - 1, num_columns - 1
    while row > 0:
        starts[row] = column
        # On the first column the only way back is up, even where costs are no numbers.
        move = moves[row + column, row] if column else _UP
        row -= move != _LEFT
        column -= move != _UP
    return starts


def _moves(costs: Floats) -> npt.NDArray[np.uint8]:
    """How the cheapest path gets to row i and column j: at [i + j, i], for i and j from 1 on.

    Places of one anti-diagonal depend on those of the last two only, so that each is one step of numpy.
    """
    num_rows, num_columns = costs.shape
    # Anti-diagonal d as a row: skewed[d, i] = costs[i, d - i], infinite outside of the matrix.
    skewed = np.full((num_rows + num_columns - 1, num_rows), np.inf, np.float64)
    row_indices = np.arange(num_rows)
    skewed[row_indices[:, None] + np.arange(num_columns), row_indices[:, None]] = costs
    moves = np.empty(skewed.shape, np.uint8)
    # Totals of an anti-diagonal by row, with the row above the matrix in front.
    before, last = np.full((2, num_rows + 1), np.inf)
    before[0] = 0.0
    for diagonal, here in enumerate(skewed):
        across, up, left = before[:-1], last[:-1], last[1:]
        best = np.minimum(up, left)
        move = np.where(up < left, _UP, _LEFT).astype(np.uint8)
        is_across = across < best
        move[is_across] = _DIAGONAL
        moves[diagonal] = move
        total = np.full(num_rows + 1, np.inf)
        np.add(here, np.where(is_across, across, best), out=total[1:])
        before, last = last, total
    return moves
