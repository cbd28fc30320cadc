"""How often what multiplies on a GPU is chosen: once for sizes that are about the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.device_linear import DeviceLinear
from sparse_compile.kernels import choice
from sparse_compile.methods.rows import Neighbours, Rows

ROWS = 512


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """All keys that were asked for."""
    asked: set[object] = set()
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: asked.add(key) or "aten")
    return asked


def multiply(kept: int, tokens: int | None = None, rows: int = ROWS) -> None:
    """A backward with so many rows kept, and a base of so many tokens."""
    dy, x, w = (torch.ones(size) for size in ((rows, 4), (rows, 3), (4, 3)))
    count = torch.tensor([kept], dtype=torch.int32)
    some = torch.arange(kept)
    chosen = Rows(some, scale=torch.ones(kept), count=count)
    if tokens is not None:
        dropped = torch.ones(rows, dtype=torch.bool).index_fill(0, some, False)
        chosen = Rows(some, base=torch.ones(tokens, 4), dropped=dropped, count=count)
    DeviceLinear().backward(dy, x, w, chosen, chosen, dw_transposed=False)


def test_a_share_that_changes_a_little_is_not_timed_anew(keys: set[object]) -> None:
    for kept in (100, 101, 97, 103, 110):
        multiply(kept)
    assert len(keys) == 1
    multiply(20)
    multiply(400)
    assert len(keys) == 3


def test_all_shares_that_there_are_have_a_handful_of_keys(keys: set[object]) -> None:
    for kept in range(1, ROWS, 7):
        multiply(kept)
    assert len(keys) <= 10


def test_batches_of_about_as_many_tokens_are_not_timed_anew(keys: set[object]) -> None:
    for tokens in (100, 110, 120, 128):
        multiply(3 * tokens // 4, tokens, rows=2 * tokens)
    assert len(keys) == 1
    multiply(24, 32, rows=64)
    assert len(keys) == 2


def test_neither_are_four_neighbours(keys: set[object]) -> None:
    for tokens in (100, 104, 128):
        dy, x, w = (torch.ones(size) for size in ((2 * tokens, 4), (2 * tokens, 3), (4, 3)))
        live = torch.ones(len(dy), dtype=torch.bool)
        pair = (Neighbours(part, torch.ones(tokens, 4), live, t) for part, t in ((dy, False), (dy.t(), True)))
        DeviceLinear().backward(dy, x, w, *pair, dw_transposed=False)
    assert len(keys) == 1
