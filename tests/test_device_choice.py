"""How often what multiplies on a GPU is chosen, once for sizes that are about the same; and when dense is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile import Reuse, Sample, Schedule
from sparse_compile.device_attention import DeviceAttention
from sparse_compile.device_linear import DeviceLinear
from sparse_compile.kernels import choice, on_device
from sparse_compile.kernels import linear as aten
from sparse_compile.kernels.attention_cuda import CudaFused, Queries
from sparse_compile.linear_site import LinearSite
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


def test_nor_is_an_attention_over_fewer_samples() -> None:
    """The last batch of an epoch, or one of a length of its own."""

    def key(samples: int, tokens: int) -> object:
        q = torch.empty(samples, 2, tokens, 8)
        forward = CudaFused("flash", q, q, q, q, q[..., 0], False, None, None, ())
        return DeviceAttention()._key(q, forward, Queries(torch.empty(0), None, 0.5))

    assert key(32, 100) == key(29, 120) != key(4, 100)


SHARES = {"sample": Sample(0.25), "sample dW": Sample(0.25, gradients="weight"), "reuse": Reuse(0.75)}


class Timed:
    """Stands in for the clock: choosing rows takes so many times as long as the dense products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chosen: float) -> None:
        self.questions, self.chosen = 0, chosen
        monkeypatch.setattr(choice, "_chosen", {})
        monkeypatch.setattr(choice, "_time", self)
        monkeypatch.setattr(on_device, "usable", lambda dy: True)

    def __call__(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for run in candidates.values():
            run()
        if "dense" not in candidates:
            return dict.fromkeys(candidates, 1.0)
        self.questions += 1
        assert [*candidates] == ["dense", "chosen"]
        return {"dense": 1.0, "chosen": self.chosen}


def train(site: LinearSite, method: Reuse | Sample, steps: int = 3, rows: int = 24) -> list[str]:
    """The methods of so many backwards."""
    done = []
    for step in range(steps):
        dy, x, w = (torch.randn(size) for size in ((rows, 4), (rows, 3), (4, 3)))
        phase = Schedule(linear=method).at(step)
        dx, dw = site.linear_backward(dy, x, w, tokens=4, dw_transposed=False, phase=phase)
        if site.method == "exact":
            torch.testing.assert_close(aten.written_out(dx), dy @ w)
            torch.testing.assert_close(dw, dy.t() @ x)
        done.append(site.method)
    return done


@pytest.mark.parametrize("name", SHARES)
def test_where_choosing_rows_is_slower_than_dense_the_site_is_exact(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, method = Timed(monkeypatch, chosen=1.5), SHARES[name]
    site, phase = LinearSite("layer"), Schedule(linear=method).at(0)
    backwards = ["exact", "reuse", "exact"] if name == "reuse" else ["sample", "exact", "exact"]
    assert train(site, method)[-2:] == backwards[-2:]
    assert clock.questions == 1
    assert site.keep(phase) == 1.0
    what = "reuse" if name == "reuse" else "sampling"
    assert site.note(phase) == (
        f"{what} would cost more than it saves at this size and share: only zero rows are skipped"
    )
    # Another layer of this shape need not find out.
    assert train(LinearSite("next"), method)[1:] == ["exact", "exact"]
    assert clock.questions == 1


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("seconds", [0.5, 0.9])
def test_where_it_is_faster_rows_are_chosen(
    name: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, method = Timed(monkeypatch, chosen=seconds), SHARES[name]
    site, phase = LinearSite("layer"), Schedule(linear=method).at(0)
    assert train(site, method, steps=4)[1:] == [method.method] * 3
    assert clock.questions == 1
    assert site.note(phase) == ""
    assert site.keep(phase) == 0.25


def test_that_is_asked_once_for_sizes_that_are_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, site = Timed(monkeypatch, chosen=0.5), LinearSite("layer")
    for rows in (20, 24, 28, 32):
        train(site, Sample(0.25), rows=rows)
    assert clock.questions == 1
    train(site, Sample(0.25), rows=200)
    train(site, Sample(0.75), rows=200)
    assert clock.questions == 3


def test_exact_steps_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, site = Timed(monkeypatch, chosen=0.5), LinearSite("layer")
    assert train(site, Sample(1.0)) == ["exact"] * 3
    assert clock.questions == 0
