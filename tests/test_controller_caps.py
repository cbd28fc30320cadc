"""Caps on the weights of drawn rows, as the controller of adaptive sampling chooses them."""

import math

import pytest
import reference_vcas as reference
from recorded import TOKENS, WEIGHTS, Recorded, count, per_item

from sparse_compile import Sample, Schedule
from sparse_compile.controller import Controller
from sparse_compile.methods import vcas


@pytest.mark.parametrize("clip", [1.5, 4.0, "auto"])
@pytest.mark.parametrize("tau", [0.005, 0.02, 0.05])
def test_solved_shares_with_a_cap_are_the_smallest_that_the_squared_error_allows(tau, clip):
    controller = Controller(Schedule(linear=Sample.adaptive(update="solve", weight_tau=tau, clip=clip)))
    seen = Recorded(0)
    seen.show(controller)
    controller.end_of_step(0)
    chosen = set()
    for name, (dy, x) in {"head": seen.head, **seen.linears}.items():
        scores = [float(g.norm()) for g in per_item(dy, x, 1)]
        live = sum(score > 0 for score in scores)
        allowed = tau * reference.variance_of_batches(per_item(dy, x, TOKENS))
        share, cap = controller.row_share(name), controller.cap(name) or math.inf
        chosen.add(cap)

        def error(share, cap, dy=dy, x=x, scores=scores, live=live):
            q = reference.keep_probabilities(scores, count(share, live))
            return reference.error_of_capped_rows(dy, x, q, cap)

        assert 1 / live < share < 1
        assert error(share, cap) <= allowed
        caps = vcas.CAPS if clip == "auto" else [clip]
        assert min(error(share * 0.95, c) for c in caps if c <= cap) > allowed
        assert all(error(share, c) > allowed for c in caps if c > cap), "a larger cap has less bias"
    assert len(chosen) > 1 or clip != "auto"


def test_a_cap_that_is_chosen_allows_a_smaller_share():
    shares = []
    for clip in (None, "auto"):
        controller = Controller(Schedule(linear=Sample.adaptive(update="solve", weight_tau=0.1, clip=clip)))
        Recorded(0).show(controller)
        controller.end_of_step(0)
        shares.append([controller.row_share(name) for name in WEIGHTS])
        assert all(controller.cap(name) is None for name in WEIGHTS) == (clip is None)
    assert all(capped <= free for free, capped in zip(*shares, strict=True))
    assert sum(shares[1]) < 0.97 * sum(shares[0])


def test_by_steps_the_cap_is_that_of_the_least_error_at_the_present_share():
    """And the share goes up or down by that error."""
    controller = Controller(Schedule(linear=Sample.adaptive(weight_tau=0.1, clip="auto")))
    share = dict.fromkeys(["head", *WEIGHTS], 1.0)
    for step in range(40):
        seen = Recorded(step)
        seen.show(controller)
        controller.end_of_step(step)
        if step == 0:  # nothing was dropped, and no cap has an error: none is the least biased
            assert [controller.cap(name) for name in share] == [None] * len(share)
        for name, (dy, x) in {"head": seen.head, **seen.linears}.items():
            scores = [float(g.norm()) for g in per_item(dy, x, 1)]
            live = sum(score > 0 for score in scores)
            q = reference.keep_probabilities(scores, count(share[name], live))
            errors = {cap: reference.error_of_capped_rows(dy, x, q, cap) for cap in vcas.CAPS}
            cap = min(errors, key=errors.__getitem__)
            assert errors[controller.cap(name) or math.inf] == pytest.approx(errors[cap])
            allowed = 0.1 * reference.variance_of_batches(per_item(dy, x, TOKENS))
            share[name] = min(1.0, share[name] / 0.95) if errors[cap] > allowed else share[name] * 0.95
            assert controller.row_share(name) == pytest.approx(share[name])
    assert min(share.values()) < 0.5
