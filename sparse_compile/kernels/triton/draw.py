"""Drawing: k rows at random, with probability in proportion to a score; see ``methods/sample.py``.

    p_i = min(1, rate · s_i)       with the rate at which Σ p_i = k
    drawn: the rows that hold u, u + 1, … u + k − 1 on a line on which the p_i lie end to end, in random order
    weight_i = 1 / p_i             or 1 for all, if no more than k rows have a score

Four launches make a draw, from scores to an index buffer, where eager PyTorch takes sixty. One program a draw
finds the rate; of the rest, each block of rows has a program: a single one would take an H100 some 50 µs for
16 k rows, by its instructions, which is as long as the products of a layer of 1,024 × 1,024.

    rates    rows that are certain (p = 1) leave the others less to share; until there are no more of them
    lengths  of the blocks of the line. Places on it are computed: a random order is a Feistel network (Luby
             and Rackoff, 1988) over the numbers of as many bits as N has; those beyond N have no length
    weights  along the line, from where the blocks before have ended
    gather   the drawn rows, ascending; then, if there are fewer than k, rows that have no score. How many
             there are in the blocks before, each program counts itself

k may be a share of the rows that have a score, which are counted first: then there is room for more.

Lengths on the line are whole multiples of 2⁻⁴⁰, of which sums are exact: where one block of rows ends, the
next begins. (In float32, sums would be off by more than the p_i of many rows. A row with p below 2⁻⁴¹ is not
drawn.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.triton import cdiv, launch

# Of the rate, and of the others; and how many rows are counted at a time.
_BLOCK, _WARPS = 2048, 16
BLOCK, WARPS = 512, 4
AT_ONCE = 4096
ROUNDS = 6  # of the Feistel network


@triton.jit
def _hashed(x):
    # 32 bits, each of which depends on all 32 of x (Wellons' lowbias32).
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _shuffled(x, key, low, high, ROUNDS: tl.constexpr):
    # The place of number x, uint32, of low + high bits in a random order.
    lower_bits = (tl.full((), 1, tl.uint32) << low) - 1
    upper_bits = (tl.full((), 1, tl.uint32) << high) - 1
    lower = x & lower_bits
    upper = x >> low
    for turn in tl.static_range(ROUNDS):
        mixed = _hashed(tl.full((), turn, tl.uint32) + key)
        if turn % 2 == 0:
            lower ^= _hashed(upper ^ mixed) & lower_bits
        else:
            upper ^= _hashed(lower ^ mixed) & upper_bits
    return (upper << low) | lower


@triton.jit
def _rate(scores, n, k, BLOCK: tl.constexpr):
    # Of more than k scores above zero: the rate, and that of the step before, at which rows are certain if
    # their score times it is 1. Also how many are above zero, and whether all are finite.
    none = tl.zeros((BLOCK,), tl.float64)
    alive = 0
    certain = -1
    before = -2
    total = tl.full((), 0.0, tl.float64)
    sure_at = tl.full((), 0.0, tl.float64)
    rate = tl.full((), 0.0, tl.float64)
    while certain > before:
        # With these rows certain, the others share what is left of k.
        before = certain
        sure_at = rate
        sums, rest = none, none
        sure, above = none.to(tl.int32), none.to(tl.int32)
        for start in range(0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            s = tl.load(scores + rows, mask=rows < n, other=0.0).to(tl.float64)
            sums += s
            rest += tl.where(s * rate >= 1, 0.0, s)
            sure += (s * rate >= 1).to(tl.int32)
            above += (s != 0).to(tl.int32)
        total = tl.sum(sums, axis=0)
        left = tl.sum(rest, axis=0)
        certain = tl.sum(sure, axis=0)
        alive = tl.sum(above, axis=0)
        # If nothing is left to share, the others are too small to be seen in the sum.
        rate = tl.where(certain < k, (k - certain).to(tl.float64) / tl.where(left > 0, left, 1.0), rate)
    return alive, sure_at, rate, total < float("inf")


@triton.jit
def _part_of(scores, n, share, BLOCK: tl.constexpr):
    # The share, in units of 2⁻³⁰, of those that are not zero: the nearest number, but at least one.
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        above += (tl.load(scores + rows, mask=rows < n, other=0.0) != 0).to(tl.int32)
    part = (tl.sum(above, axis=0).to(tl.int64) * share + (1 << 29)) >> 30
    return tl.maximum(part, 1).to(tl.int32)


@triton.jit(do_not_specialize=["k", "share"])
def _rates(scores, rates, shares, above, tally, n, k, share, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    # rates float64 [D, 2], shares int32 [D, 2]: of each draw what _rate gives, and how many rows are drawn.
    draw = tl.program_id(0)
    scores += draw.to(tl.int64) * n
    if SHARED:
        k = tl.minimum(_part_of(scores, n, share, BLOCK), k)
    alive, sure_at, rate, finite = _rate(scores, n, k, BLOCK)
    tl.store(rates + 2 * draw, sure_at)
    tl.store(rates + 2 * draw + 1, rate)
    tl.store(shares + 2 * draw, k)
    tl.store(shares + 2 * draw + 1, finite.to(tl.int32))
    tl.store(above + draw, alive)
    if draw == 0:
        tl.store(tally, tl.load(tally) + (n - alive))


@triton.jit
def _on_the_line(scores, rates, n, key, low, high, places, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    # Of a block of places on the line: the rows there, whether there are, their scores, probabilities and
    # lengths.
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = _shuffled(place.to(tl.uint32), key, low, high, ROUNDS).to(tl.int32)
    there = (place < places) & (row < n)
    s = tl.load(scores + row, mask=there, other=0.0).to(tl.float64)
    p = tl.where(s * tl.load(rates) >= 1, 1.0, tl.minimum(s * tl.load(rates + 1), 1.0))
    return row, there, s, p, (p * 1099511627776.0 + 0.5).to(tl.int64)


@triton.jit
def _numbers(given, key_0, key_1, start_0, start_1, draw, GIVEN: tl.constexpr):
    # The key of the order, and the first reading in units of 2⁻⁴⁰.
    if GIVEN:
        key = tl.load(given + 2 * draw).to(tl.uint32)
        reading = tl.load(given + 2 * draw + 1)
    else:
        key = tl.where(draw == 0, key_0, key_1).to(tl.uint32)
        reading = tl.where(draw == 0, start_0, start_1)
    return key, reading.to(tl.int64) << 9


_NOT_SPECIALIZED = ["key_0", "key_1", "start_0", "start_1", "low", "high", "places"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _lengths(
    scores,
    rates,
    lines,
    given,
    n,
    key_0,
    key_1,
    start_0,
    start_1,
    low,
    high,
    places,
    GIVEN: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # lines int64 [D, blocks]: how long each block of places is.
    draw = tl.program_id(1)
    key, _ = _numbers(given, key_0, key_1, start_0, start_1, draw, GIVEN)
    of_draw = scores + draw.to(tl.int64) * n
    _, _, _, _, length = _on_the_line(of_draw, rates + 2 * draw, n, key, low, high, places, ROUNDS, BLOCK)
    tl.store(lines + draw * tl.num_programs(0) + tl.program_id(0), tl.sum(length, axis=0))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _weights(
    scores,
    rates,
    shares,
    above,
    lines,
    weights,
    given,
    n,
    key_0,
    key_1,
    start_0,
    start_1,
    low,
    high,
    places,
    cap,
    CAPPED: tl.constexpr,
    GIVEN: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    draw = tl.program_id(1)
    block = tl.program_id(0)
    key, first = _numbers(given, key_0, key_1, start_0, start_1, draw, GIVEN)
    of_draw = scores + draw.to(tl.int64) * n
    row, there, s, p, length = _on_the_line(
        of_draw, rates + 2 * draw, n, key, low, high, places, ROUNDS, BLOCK
    )
    line = tl.full((), 0, tl.int64)
    for start in range(0, block, AT_ONCE):
        before = start + tl.arange(0, AT_ONCE)
        ends = tl.load(lines + draw * tl.num_programs(0) + before, mask=before < block, other=0)
        line += tl.sum(ends, axis=0)
    end = line + tl.cumsum(length, axis=0)
    # Readings first, first + 2⁴⁰, … that lie before a place on the line.
    drawn = ((end - 1 - first) >> 40) > ((end - length - 1 - first) >> 40)
    weight = tl.where(drawn, 1 / tl.where(drawn, p, 1.0), 0.0)
    if CAPPED:
        weight = tl.minimum(weight, cap)
    k = tl.load(shares + 2 * draw)
    weight = tl.where(tl.load(above + draw) > k, weight, (s != 0).to(tl.float64))
    # What is not finite has no probabilities. It must reach the gradients, for a GradScaler to see.
    finite = tl.load(shares + 2 * draw + 1) != 0
    weight = tl.where(finite, weight, tl.where(row < k, float("nan"), 0.0))
    tl.store(weights + draw.to(tl.int64) * n + row, weight.to(tl.float32), mask=there)


@triton.jit
def _drawn_and_spare(scores, weights, rows, n):
    # Of rows: their weights, whether they are drawn, and whether they may fill the buffer.
    there = rows < n
    weight = tl.load(weights + rows, mask=there, other=0.0)
    spare = there & (tl.load(scores + rows, mask=there, other=1.0) == 0)
    return weight, weight != 0, spare


@triton.jit(do_not_specialize=["space"])
def _gather(
    scores,
    weights,
    shares,
    above,
    kept,
    scale,
    count,
    slot,
    n,
    space,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    block = tl.program_id(0)
    draw = tl.program_id(1)
    scores += draw.to(tl.int64) * n
    weights += draw.to(tl.int64) * n
    kept += draw.to(tl.int64) * space
    scale += draw.to(tl.int64) * space
    k = tl.load(shares + 2 * draw)
    finite = tl.load(shares + 2 * draw + 1) != 0
    chosen = tl.where(finite, tl.minimum(tl.load(above + draw), k), k)
    found = 0
    without = 0
    for start in range(0, block * BLOCK, AT_ONCE):
        rows = start + tl.arange(0, AT_ONCE)
        _, drawn, spare = _drawn_and_spare(scores, weights, rows, tl.minimum(block * BLOCK, n))
        found += tl.sum(drawn.to(tl.int32), axis=0)
        without += tl.sum(spare.to(tl.int32), axis=0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    weight, drawn, spare = _drawn_and_spare(scores, weights, rows, n)
    place = found + tl.cumsum(drawn.to(tl.int32), axis=0) - 1
    found += tl.sum(drawn.to(tl.int32), axis=0)
    drawn = drawn & (place < k)
    tl.store(kept + place, rows, mask=drawn)
    tl.store(scale + place, weight, mask=drawn)
    if SLOTS and draw == 0:
        tl.store(slot + rows, tl.where(drawn, place, n - 1).to(tl.int64), mask=rows < n)
    # What fills the buffer has no weight.
    behind = chosen + without + tl.cumsum(spare.to(tl.int32), axis=0) - 1
    tl.store(kept + behind, rows, mask=spare & (behind < k))
    tl.store(scale + behind, tl.zeros((BLOCK,), tl.float32), mask=spare & (behind < k))
    if block == tl.num_programs(0) - 1:
        # Sums of rounded lengths may fall short of the last reading, once in a hundred million draws. The
        # places that are left get a row number, too.
        for start in range(found, chosen, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(kept + place, tl.zeros((BLOCK,), tl.int32), mask=place < chosen)
            tl.store(scale + place, tl.zeros((BLOCK,), tl.float32), mask=place < chosen)
        # So does the room that is left, should somebody multiply all of it.
        for start in range(k, space, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(kept + place, tl.zeros((BLOCK,), tl.int32), mask=place < space)
            tl.store(scale + place, tl.zeros((BLOCK,), tl.float32), mask=place < space)
        # They may hold one reading more, too, as rarely; there is no place for its row.
        tl.store(count + draw, tl.minimum(found, k))


def draw(
    scores: Tensor,
    k: int,
    cap: float | None,
    numbers: list[tuple[int, int]] | Tensor,
    *,
    slots: bool,
    tally: Tensor,
    share: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One draw by each row of ``scores``; see :func:`reference.draw`.

    Args:
        scores: s, float32 [D, N], contiguous, none negative; D is 1 or 2.
        k: how many rows are drawn, from 1 to N.
        cap: on the weights, or None.
        numbers: for each draw the key of its order and u · 2³¹, both from 0 to 2³¹ − 1; or int64 [2 · D] on
            the device, where a recorded launch finds new ones at each replay.
        slots: whether ``slot`` is wanted, of the first draw.
        tally: int64, to whose first number the rows without a score are added, of the first draw.
        share: from 0 to 1: not k rows are drawn, but this share of those with a score, as
            :func:`methods.rows.number_kept` (of a half, the larger number), and at most k.

    Returns:
        kept int32 [D, k], ascending; then rows without a score, or any.
        scale float32 [D, k]: their weights, zero for those without a score.
        count int32 [D]: how many of these have one.
        slot int64 [N]: where in ``kept`` a row stands, or N − 1 if it does not; or empty.
        weights float32 [D, N]: the weight of every row, zero if it was not drawn.
        alive int32 [D]: how many of the N rows have a score.
    """
    draws, n = scores.shape
    device = scores.device
    kept = torch.empty(draws, k, dtype=torch.int32, device=device)
    scale = torch.empty(draws, k, dtype=torch.float32, device=device)
    count = torch.empty(draws, dtype=torch.int32, device=device)
    slot = torch.empty(n if slots else 0, dtype=torch.int64, device=device)
    weights = torch.empty(draws, n, dtype=torch.float32, device=device)
    alive = torch.empty(draws, dtype=torch.int32, device=device)
    given = isinstance(numbers, Tensor)
    (key_0, start_0), (key_1, start_1) = ((0, 0), (0, 0)) if given else (numbers[0], numbers[-1])
    bits = max(2, (n - 1).bit_length())
    places = 1 << bits
    rates = torch.empty(draws, 2, dtype=torch.float64, device=device)
    shares = torch.empty(draws, 2, dtype=torch.int32, device=device)
    lines = torch.empty(draws, cdiv(places, BLOCK), dtype=torch.int64, device=device)
    of = {"GIVEN": given, "ROUNDS": ROUNDS, "BLOCK": BLOCK}
    random = (
        numbers if given else tally,
        n,
        key_0,
        key_1,
        start_0,
        start_1,
        bits // 2,
        bits - bits // 2,
        places,
    )
    launch(
        *(_rates, (draws,)),
        *(scores, rates, shares, alive, tally, n, k, 0 if share is None else round(share * 2**30)),
        SHARED=share is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    grid = cdiv(places, BLOCK), draws
    launch(_lengths, grid, scores, rates, lines, *random, **of, num_warps=WARPS)
    launch(
        *(_weights, grid),
        *(scores, rates, shares, alive, lines, weights, *random, 0.0 if cap is None else cap),
        CAPPED=cap is not None,
        **of,
        AT_ONCE=AT_ONCE,
        num_warps=WARPS,
    )
    launch(
        *(_gather, (cdiv(n, BLOCK), draws)),
        *(scores, weights, shares, alive, kept, scale, count, slot if slots else tally, n, k),
        SLOTS=slots,
        BLOCK=BLOCK,
        AT_ONCE=AT_ONCE,
        num_warps=WARPS,
    )
    return kept, scale, count, slot, weights, alive
