"""Looks for rows that are zero become rare where they find none, and a resumed run goes on with them."""

from __future__ import annotations

import torch

from sparse_compile import Sample, Schedule
from sparse_compile.linear_site import LinearSite
from sparse_compile.looks import Looks


def steps_with_a_look(found: list[bool], longest: int = 7) -> list[int]:
    looks, at = Looks(longest), []
    for step, enough in enumerate(found):
        if looks.due():
            at.append(step)
            looks.found(enough)
    return at


def test_every_step_while_they_find_enough() -> None:
    assert steps_with_a_look([True] * 5) == [0, 1, 2, 3, 4]


def test_ever_longer_pauses_up_to_the_longest_while_they_do_not() -> None:
    assert steps_with_a_look([False] * 40) == [0, 2, 6, 14, 22, 30, 38]


def test_at_once_again_when_one_has_found_enough() -> None:
    assert steps_with_a_look([False, False, False, False, False, False, True, True, False, True, True]) == [
        *(0, 2, 6, 7, 8, 10)
    ]


def skipped(site: LinearSite, *, padded: bool) -> bool:
    """Whether a backward skips rows."""
    dy, x = (torch.randn(512, 256, dtype=torch.float64) for _ in range(2))
    if padded:
        dy[::2] = 0
    before = site.counters.rows_computed
    _, dw = site.linear_backward(dy, x, None, tokens=1, dw_transposed=False, phase=None)
    torch.testing.assert_close(dw, dy.t() @ x)
    return site.counters.rows_computed - before < 512


def test_a_layer_skips_what_it_looked_for_and_goes_on_where_it_was_saved() -> None:
    site, resumed = LinearSite("layer"), LinearSite("layer")
    assert [skipped(site, padded=padded) for padded in (True, False, True, True)] == [
        True,
        False,
        False,
        True,
    ]
    assert not skipped(site, padded=False)
    resumed.load_state_dict(site.state_dict())
    assert [skipped(resumed, padded=True) for _ in range(2)] == [False, True]
    resumed.load_state_dict({})
    assert skipped(resumed, padded=True)


def test_backwards_between_two_looks_are_counted_and_exact() -> None:
    """They take a short way, which another input, shape or product must not."""
    site = LinearSite("layer")
    counted = []
    for rows, gradients in [(512, "dX dW")] * 4 + [(512, "dW"), (256, "dW"), (256, "dX"), (512, "dX dW")]:
        dy, x, w = (torch.randn(*s, dtype=torch.float64) for s in ((rows, 256), (rows, 128), (256, 128)))
        before = site.counters.flops_backward
        dx, dw = site.linear_backward(
            *(dy, x if "dW" in gradients else None, w if "dX" in gradients else None),
            tokens=1,
            dw_transposed=False,
            phase=None,
        )
        assert (dx is None, dw is None) == ("dX" not in gradients, "dW" not in gradients)
        if dx is not None:
            torch.testing.assert_close(dx[0], dy @ w)
        if dw is not None:
            torch.testing.assert_close(dw, dy.t() @ x)
        counted.append((site.counters.flops_backward - before) // (2 * 256 * 128))
    assert counted == [1024] * 4 + [512, 256, 256, 1024]
    assert (site.counters.backwards, site.counters.rows) == (8, 512 * 6 + 256 * 2)


def test_a_method_that_begins_between_two_looks_is_followed() -> None:
    """Of exact backwards in a row the second asks nothing, the third looks, and the fourth asks nothing."""
    site = LinearSite("layer")
    dy, x = torch.randn(512, 256), torch.randn(512, 256)
    exact, sampled = Schedule.exact().at(0), Schedule(linear=Sample(0.25)).at(0)
    methods = []
    for phase in [exact] * 4 + [sampled] * 2 + [exact] * 2 + [sampled]:
        _, dw = site.linear_backward(dy, x, None, tokens=1, dw_transposed=False, phase=phase)
        assert dw is not None
        assert torch.allclose(dw, dy.t() @ x, rtol=1e-3, atol=1e-3) == (phase is exact)
        methods.append(site.method)
    assert methods == ["exact"] * 4 + ["sample"] * 2 + ["exact"] * 2 + ["sample"]
