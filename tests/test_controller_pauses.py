"""Measurements become rare where they cost more than what they allow saves, and only there."""

import json
from collections.abc import Collection

import pytest
import torch
from recorded import BATCH, F64, TOKENS, Recorded, observe
from test_block_sampling import ADAPTIVE, Run, history

from sparse_compile import Sample, Schedule
from sparse_compile.controller import Controller
from sparse_compile.methods import sample


def show_equal_samples(controller: Controller, step: int) -> None:
    """SGD has no variance over these, so none may be added: every share stays 1."""
    dy, x = torch.ones(BATCH * TOKENS, 4, dtype=F64), torch.ones(BATCH * TOKENS, 5, dtype=F64)
    controller.observe_samples("layer.0", torch.ones(BATCH, dtype=F64), sample.Draw(f"{step}"))
    observe(controller, "layer.0.up", dy, x)


def measured(
    controller: Controller, steps: range, show=show_equal_samples, acting: Collection[int] = ()
) -> list[int]:
    found = []
    for step in steps:
        if controller.measures(step):
            found.append(step)
            show(controller, step)
        elif step in acting:
            controller.saved(COST / 4)  # 4 steps lie between two measurements
        controller.end_of_step(step)
    return found


def solving(**settings) -> Controller:
    return Controller(Schedule.vcas(update="solve", cal_var_freq=5, **settings))


COST = BATCH * TOKENS * 2 * TOKENS * (4 + 5)  # of measuring the one linear that is shown

RARER = [0, 5, 10, 20, 40, 80, 120]


def test_where_nothing_is_affordable_measurements_come_ever_more_rarely():
    assert measured(solving(), range(125)) == RARER


def test_the_rows_alone_do_so_too():
    controller = Controller(Schedule(linear=Sample.adaptive(update="solve", cal_var_freq=5)))
    assert measured(controller, range(125)) == RARER


def test_the_papers_update_measures_on():
    controller = Controller(Schedule.vcas(cal_var_freq=5))
    assert measured(controller, range(31)) == [0, 5, 10, 15, 20, 25, 30]


def test_sites_that_save_what_a_measurement_costs_keep_them_coming():
    assert measured(solving(), range(31), acting=range(31)) == [0, 5, 10, 15, 20, 25, 30]


def test_sites_that_save_less_do_not():
    """All but one of the steps between two measurements."""
    acting = [step for step in range(125) if step % 5 != 1]
    assert measured(solving(), range(125), acting=acting) == RARER


def test_sites_that_save_it_over_a_whole_pause_bring_them_back():
    assert measured(solving(), range(100), acting=range(41, 100)) == [*RARER[:6], 85, 90, 95]


@pytest.mark.parametrize(("count", "expected"), [(2, [0, 5, 10, 15]), (1, [0, 5, 10])])
def test_blocks_that_drop_a_tenth_of_the_samples_keep_them_coming(count, expected):
    controller = solving()

    def show(controller, step):
        show_equal_samples(controller, step)
        controller.end_of_step(step)
        controller.dropped(count, BATCH)

    assert measured(controller, range(16), show) == expected


def test_blocks_with_a_fixed_share_do_not():
    linear = Sample.adaptive(update="solve", cal_var_freq=5)
    controller = Controller(Schedule(blocks=Sample(0.5), linear=linear))

    def show(controller, step):
        show_equal_samples(controller, step)
        controller.dropped(BATCH // 2, BATCH)

    assert measured(controller, range(125), show) == RARER


def test_so_do_samples_that_will_be_dropped_once_shares_have_followed():
    """With much smoothing no site saves anything yet, but the controller is on its way."""
    controller = solving(act_tau=0.5, smoothing=0.999)

    def show(controller, step):
        Recorded(step).show(controller)

    assert measured(controller, range(26), show) == [0, 5, 10, 15, 20, 25]
    assert min(controller.history[-1]["sample_shares"].values()) > 0.99


@pytest.mark.parametrize("acting", [range(32, 60), range(60)])
@pytest.mark.parametrize("stop", [8, 17, 30])
def test_a_resumed_controller_pauses_as_an_uninterrupted_one(stop, acting):
    first = solving()
    steps = measured(first, range(stop), acting=acting)
    second = solving()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    steps += measured(second, range(stop, 60), acting=acting)
    assert steps == measured(solving(), range(60), acting=acting)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, list(range(0, 17, 2))), (1e-9, [0, 2, 4, 8, 16])])
def test_a_model_that_trains_is_measured_as_often(tau, expected):
    run = Run(Schedule.vcas(**{**ADAPTIVE, "update": "solve", "act_tau": tau, "weight_tau": tau}))
    run.train(0, 17)
    assert [entry["step"] for entry in history(run)] == expected
    assert (min(run.computed()) < 17 * 16) == (tau == 0.5)
