"""Which rows count as zero, and when skipping them pays."""

import pytest
import torch

from sparse_compile.methods import exact

# The smallest number above zero that each type holds; its square is zero in every one of them.
SMALLEST = {
    torch.float16: 6e-8,
    torch.bfloat16: 9.2e-41,
    torch.float32: 1e-45,
    torch.float64: 5e-324,
}
DTYPES = list(SMALLEST)


def gradient(rows=12, outputs=20, dtype=torch.float32):
    return torch.randn(rows, outputs, generator=torch.Generator().manual_seed(0)).abs().add(0.1).to(dtype)


def live_by_definition(dy):
    return torch.tensor([any(bool(value != 0) for value in row) for row in dy])


def check(dy):
    """`live_rows` says what the definition says, and leaves its argument alone."""
    before = dy.clone()
    live = exact.live_rows(dy)
    assert torch.equal(torch.nan_to_num(dy), torch.nan_to_num(before))
    expected = live_by_definition(dy)
    assert (live is None) if bool(expected.all()) else torch.equal(live, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 3, 7, 8, 9, 20])
def test_rows_that_are_all_zero_are_found(dtype, outputs):
    dy = gradient(outputs=outputs, dtype=dtype)
    check(dy)  # all live
    dy[[0, 4, 5, 11]] = 0
    check(dy)
    check(torch.zeros_like(dy))  # none live


def test_all_live_is_none():
    assert exact.live_rows(gradient()) is None


@pytest.mark.parametrize(
    "dead", [(), (2,), (2, 4, 5, 8), (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11), tuple(range(12))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_among_others(dead, dtype):
    """Rows that nobody names are not looked at, whatever they hold."""
    dy = gradient(dtype=dtype)
    dy[list(dead)] = 0
    dy[4, :8], dy[4, 15] = 0, SMALLEST[dtype]
    dy[5, :] = -0.0
    rows = torch.tensor([1, 2, 4, 5, 7, 8, 11])
    live = live_by_definition(dy)
    assert exact.live_among(dy, rows).tolist() == [int(row) for row in rows if live[row]]
    assert exact.live_among(dy, rows[:0]).tolist() == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_live_among_others(value):
    dy = torch.zeros(12, 20)
    dy[3, 17] = value
    assert exact.live_among(dy, torch.tensor([2, 3, 5])).tolist() == [3]


def test_none_live():
    assert exact.live_rows(torch.zeros(5, 9)).tolist() == [False] * 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [8, 13, 19])
def test_rows_that_are_zero_only_in_the_first_columns_are_live(dtype, column):
    dy = gradient(dtype=dtype)
    dy[3] = 0
    dy[7] = 0
    dy[7, column] = 1
    check(dy)
    dy[3, column] = 1
    assert exact.live_rows(dy) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_live(dtype, column, value):
    dy = torch.zeros(4, 20, dtype=dtype)
    dy[2, column] = value
    assert exact.live_rows(dy).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [*SMALLEST.items(), *((dtype, -1e-30) for dtype in DTYPES[1:]), (torch.float64, 1e-200)],
)
@pytest.mark.parametrize("column", [0, 19])
def test_values_whose_square_is_zero_are_live(dtype, value, column):
    dy = torch.zeros(4, 20, dtype=dtype)
    dy[1, column] = value
    assert dy[1, column] != 0
    assert exact.live_rows(dy).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_whose_square_overflows_are_live(dtype):
    dy = torch.zeros(4, 20, dtype=dtype)
    dy[1, 12] = torch.finfo(dtype).max
    assert exact.live_rows(dy).tolist() == [False, True, False, False]


def test_minus_zero_is_zero():
    assert exact.live_rows(torch.full((2, 9), -0.0)).tolist() == [False, False]


def test_transposed_gradient():
    dy = gradient(20, 12)
    dy[:, [2, 3]] = 0
    check(dy.t())


def test_no_rows():
    assert exact.live_rows(torch.zeros(0, 9)) is None


def test_rows_lists_the_live_ones():
    dy = gradient()
    dy[[0, 4]] = 0
    estimate = exact.rows(exact.live_rows(dy))
    assert estimate.kept.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(estimate.dense(dy), dy)
    assert estimate.computed == 10


def test_rows_of_a_zero_gradient_are_none():
    dy = torch.zeros(6, 9)
    estimate = exact.rows(exact.live_rows(dy))
    assert estimate.computed == 0
    assert torch.equal(estimate.dense(dy), dy)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (8, 8), (64, 64), (384, 1536), (3072, 768)])
def test_skipping_pays_from_the_number_on_at_which_it_saves_more_than_it_moves(inputs, outputs):
    fewest = exact.fewest_to_skip(256, inputs, outputs)
    for skipped in range(257):
        saved = 4 * skipped * inputs * outputs
        moved = 80 * ((256 - skipped) * (outputs + inputs) + 256 * inputs)
        assert (skipped >= fewest) == (saved > moved)


def test_skipping_pays_for_wide_layers_and_not_for_narrow_ones():
    assert exact.fewest_to_skip(2048, 768, 768) < 512
    assert exact.fewest_to_skip(2048, 4, 4) > 2048


@pytest.mark.parametrize("zero", [0, 3, 4, 5, 30, 50])
def test_too_few_zero_rows_are_not_told_of(zero):
    dy = gradient(rows=60)
    dy[:zero] = 0
    dy[zero : zero + 2, :8] = 0  # these only seem to be zero
    wanted = [False] * zero + [True] * (60 - zero)
    live = exact.live_rows(dy, fewest=5)
    assert live is None if zero < 5 else live.tolist() == wanted


@pytest.mark.parametrize("tokens", [64, 100, 128])
def test_padded_samples_are_found_by_a_look_at_some_of_the_rows(tokens):
    """Where skipping 60 rows of 2048 would pay, a tenth of the tokens of every sample is not overlooked."""
    samples = 2048 // tokens
    dy = gradient(rows=samples * tokens)
    assert exact.live_rows(dy, fewest=60) is None
    dy.view(samples, tokens, -1)[:, -(tokens // 10) :] = 0
    assert torch.equal(exact.live_rows(dy, fewest=60), live_by_definition(dy))


def test_a_guess_that_too_few_rows_are_zero_looks_at_few_rows():
    dy = gradient(rows=1280)
    dy[1::11] = 0  # none of those that are looked at: every 11th
    assert exact.live_rows(dy, fewest=50) is None
    assert int(exact.live_rows(dy).sum()) == 1280 - 117
