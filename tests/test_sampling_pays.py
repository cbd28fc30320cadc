"""Adaptive sampling of rows is done where it saves time at the layer's shape, and is exact elsewhere."""

from __future__ import annotations

import pytest
import torch

from sparse_compile import Sample, Schedule
from sparse_compile.controller import Controller
from sparse_compile.linear_site import LinearSite
from sparse_compile.methods import exact, sample

SCHEDULE = Schedule(linear=Sample.adaptive())
PHASE = SCHEDULE.at(1)  # no step that measures


def site_with_share(share: float) -> LinearSite:
    controller = Controller(SCHEDULE)
    controller.load_state_dict({**controller.state_dict(), "row_shares": {"layer": share}})
    return LinearSite("layer", seed=1, controller=controller)


def backward(site: LinearSite, width: int, rows: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """dW and what it is without sampling."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(rows, width, generator=generator) for _ in range(2))
    _, dw = site.linear_backward(dy, x, None, tokens=16, dw_transposed=False, phase=PHASE)
    assert dw is not None
    return dw, dy.t() @ x


@pytest.mark.parametrize(("share", "width"), [(0.9, 64), (0.5, 64), (0.95, 512)])
def test_where_it_would_cost_more_than_it_saves_it_is_exact_and_says_so(share: float, width: int) -> None:
    site = site_with_share(share)
    dw, whole = backward(site, width)
    torch.testing.assert_close(dw, whole)
    assert (site.method, site.keep(PHASE), site.counters.rows_computed) == ("exact", 1.0, 256)
    assert "cost more than it saves" in site.note(PHASE)


@pytest.mark.parametrize(("share", "width"), [(0.1, 64), (0.5, 512)])
def test_where_it_saves_time_it_is_done(share: float, width: int) -> None:
    site = site_with_share(share)
    dw, whole = backward(site, width)
    assert not torch.allclose(dw, whole, rtol=0.01)
    assert (site.keep(PHASE), site.note(PHASE)) == (share, "")
    assert site.counters.rows_computed == round(share * 256)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_an_activation_that_is_not_finite_reaches_the_gradient(bad: float) -> None:
    """A GradScaler skips the step then. The row has no gradient of its own: 0 · inf is not a number, either.
    (3e38 is finite, and its norm is not.)"""
    site, phase = LinearSite("layer", seed=1), Schedule(linear=Sample(0.5)).at(0)
    dy, x = torch.randn(32, 4), torch.full((32, 4), 1.0)
    x[3], dy[3] = bad, 0 if bad != 3e38 else 4
    _, dw = site.linear_backward(dy, x, None, tokens=4, dw_transposed=False, phase=phase)
    assert dw is not None
    assert not bool(dw.isfinite().all())


@pytest.mark.parametrize(("dead", "method"), [(0.0, "adaptive"), (0.8, "exact")])
def test_rows_that_are_zero_anyhow_are_nothing_that_sampling_saves(dead: float, method: str) -> None:
    """Half of all rows would pay, and half of a fifth does not."""
    site = site_with_share(0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        dy, x = (torch.randn(256, 512, generator=generator) for _ in range(2))
        dy[torch.randperm(256, generator=generator)[: round(dead * 256)]] = 0
        _, dw = site.linear_backward(dy, x, None, tokens=16, dw_transposed=False, phase=PHASE)
    assert site.method == method
    assert torch.allclose(dw, dy.t() @ x, atol=1e-4) == (method == "exact")
    resumed = site_with_share(0.5)
    resumed.load_state_dict(site.state_dict())
    resumed.linear_backward(dy, x, None, tokens=16, dw_transposed=False, phase=PHASE)
    assert resumed.method == method, "in its first backward, too"


@pytest.mark.parametrize(("cap", "largest"), [(None, 2.0), (1.25, 1.25)])
def test_weights_are_capped_as_the_controller_says(
    cap: float | None, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, drawn = site_with_share(0.5), []
    caps = {} if cap is None else {"layer": cap}
    site.controller.load_state_dict({**site.controller.state_dict(), "caps": caps})
    rows = sample.rows
    monkeypatch.setattr(sample, "rows", lambda *of: drawn.append(rows(*of)) or drawn[-1])
    backward(site, 512)
    (found,) = drawn
    assert float(found.scale.max()) == pytest.approx(largest, rel=0.15 if cap is None else 1e-6)


def test_that_nothing_could_be_measured_is_said() -> None:
    """As of micro-batches of one sample."""
    site = LinearSite("layer", seed=1, controller=Controller(SCHEDULE))
    assert site.note(SCHEDULE.at(100)) == ""
    assert "no batch had two samples" in site.note(SCHEDULE.at(101))


def test_before_anything_was_measured_there_is_nothing_to_explain() -> None:
    site = site_with_share(1.0)
    backward(site, 64)
    assert (site.method, site.keep(PHASE), site.note(PHASE)) == ("exact", 1.0, "")


def test_fewer_products_take_more_rows_to_pay() -> None:
    assert exact.fewest_to_skip(2048, 768, 768, products=1) > exact.fewest_to_skip(2048, 768, 768)
