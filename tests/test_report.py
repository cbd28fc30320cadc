"""The report: what it lists, and its numbers against the sums done by hand."""

import json

import pytest
import torch
from reference import square_loss
from torch import nn

from sparse_compile import Reuse, Schedule, sparse_backend

SAMPLES, TOKENS, INPUTS, HIDDEN, OUTPUTS = 4, 16, 128, 256, 192
ROWS = SAMPLES * TOKENS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def run(schedule, *, backwards=1, model=None, mask=None, x=None):
    """Forward and backward of a new model; its backend."""
    backend = sparse_backend(schedule, compiler="aot_eager")
    compiled = torch.compile(Net() if model is None else model, backend=backend)
    for _ in range(backwards):
        out = compiled(torch.randn(SAMPLES, TOKENS, INPUTS) if x is None else x)
        square_loss(out if mask is None else out * mask + (1 - mask)).backward()
    return backend


def sites(backend):
    return {site.name: site for site in backend.report().sites}


# What a product of all rows costs. The first layer has no dX, the second has both.
UP, DOWN = 2 * ROWS * INPUTS * HIDDEN, 2 * ROWS * HIDDEN * OUTPUTS


def test_dense():
    backend = run(Schedule.exact(), backwards=2)
    up, down = sites(backend).values()
    assert (up.shape, down.shape) == ((ROWS, INPUTS, HIDDEN), (ROWS, HIDDEN, OUTPUTS))
    assert (up.flops_forward, up.flops_backward_dense, up.flops_backward) == (UP, UP, UP)
    assert (down.flops_forward, down.flops_backward_dense, down.flops_backward) == (DOWN, 2 * DOWN, 2 * DOWN)
    assert (down.flops_dense, down.flops) == (3 * DOWN, 3 * DOWN)
    for site in (up, down):
        assert (site.kind, site.method, site.keep, site.rewritten) == ("linear", "exact", 1.0, True)
        assert (site.rows, site.rows_skipped, site.rows_computed) == (2 * ROWS, 0, 2 * ROWS)


def test_zero_rows():
    """12 of 16 tokens of each sample are masked out of the loss."""
    mask = torch.zeros(SAMPLES, TOKENS, 1)
    mask[:, 3:7] = 1
    for site, product, products in zip(
        sites(run(Schedule.exact(), backwards=3, mask=mask)).values(), (UP, DOWN), (1, 2), strict=True
    ):
        assert (site.rows, site.rows_skipped, site.rows_computed) == (3 * ROWS, 3 * 48, 3 * 16)
        assert site.flops_backward_dense == products * product
        assert site.flops_backward == products * product / 4
        assert site.flops == product + products * product / 4
        assert site.method == "exact"


def test_reuse_averages_over_all_backwards():
    """The first backward is dense; then 16 of 64 rows are kept, and the base has 16 more."""
    for site, product, products in zip(
        sites(run(Schedule(linear=Reuse(0.75)), backwards=4)).values(), (UP, DOWN), (1, 2), strict=True
    ):
        assert (site.method, site.keep) == ("reuse", 0.25)
        assert site.rows == 4 * ROWS
        assert site.rows_computed == 64 + 3 * (16 + 16)
        assert site.flops_backward_dense == products * product
        assert site.flops_backward == products * product * (64 + 3 * 32) / 256


def test_a_layer_used_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(INPUTS, INPUTS)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    (site,) = sites(run(Schedule.exact(), backwards=3, model=Twice())).values()
    product = 2 * ROWS * INPUTS * INPUTS
    assert site.calls == 2
    assert site.flops_forward == 2 * product
    assert site.flops_backward_dense == site.flops_backward == 3 * product


def test_frozen_weight_needs_no_weight_gradient():
    model = Net()
    model.down.weight.requires_grad_(False)
    down = sites(run(Schedule.exact(), model=model))["down"]
    assert down.rewritten
    assert down.flops_backward == DOWN


def test_before_anything_ran():
    report = sparse_backend(Schedule.exact()).report()
    assert report.sites == ()
    assert report.to_dict()["sites"] == []
    assert report.totals["flops_saved"] == 0
    assert "nothing compiled has run yet" in str(report)


def test_before_any_backward_the_traced_graph_stands_in():
    backend = sparse_backend(Schedule(linear=Reuse(0.75)), compiler="aot_eager")
    torch.compile(Net(), backend=backend)(torch.randn(SAMPLES, TOKENS, INPUTS))
    up, down = sites(backend).values()
    assert (up.shape, down.shape) == ((ROWS, INPUTS, HIDDEN), (ROWS, HIDDEN, OUTPUTS))
    assert (up.flops, down.flops) == (2 * UP, 3 * DOWN)
    assert (up.flops_dense, down.flops_dense) == (2 * UP, 3 * DOWN)
    assert (up.rows, up.rows_skipped, up.rows_computed) == (0, 0, 0)
    assert up.rewritten
    assert up.keep == 0.25


def test_excluded_layers_are_listed_with_their_reason():
    sites_ = sites(run(Schedule(linear=Reuse(0.75), exclude="down"), backwards=2))
    down = sites_["down"]
    assert not down.rewritten
    assert down.reason == "matches the exclude pattern 'down'"
    assert (down.method, down.keep) == ("dense", 1.0)
    assert down.flops == down.flops_dense == 3 * DOWN
    assert sites_["up"].rewritten
    assert sites_["up"].method == "reuse"


def test_layers_that_are_not_included_are_listed_with_their_reason():
    down = sites(run(Schedule(linear=Reuse(0.75), include=["up"])))["down"]
    assert not down.rewritten
    assert down.reason == "matches no include pattern ('up')"


def test_skipped_blocks_are_listed_with_their_reason():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(INPUTS, INPUTS) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    schedule = Schedule(linear=Reuse(0.75), skip_layers=(0, -1))
    first, middle, last = sites(run(schedule, backwards=2, model=Blocks())).values()
    assert first.reason == "block 0 of 3 is in skip_layers: only zero rows are skipped"
    assert last.reason == "block 2 of 3 is in skip_layers: only zero rows are skipped"
    assert (first.method, first.keep, first.rewritten) == ("exact", 1.0, True)
    assert (middle.method, middle.keep, middle.reason) == ("reuse", 0.25, "")


def test_totals_are_sums():
    totals = run(Schedule(linear=Reuse(0.75), exclude="down"), backwards=2).report().totals
    assert totals["sites"] == 2
    assert totals["rewritten"] == 1
    assert totals["flops_forward"] == UP + DOWN
    assert totals["flops_backward_dense"] == UP + 2 * DOWN
    assert totals["flops_backward"] == UP * (64 + 32) / 128 + 2 * DOWN
    assert totals["flops_dense"] == 2 * UP + 3 * DOWN
    assert totals["flops"] == totals["flops_forward"] + totals["flops_backward"]
    assert totals["flops_saved"] == pytest.approx(0.25 * UP / (2 * UP + 3 * DOWN))


def test_to_dict_is_json_and_has_what_machines_need():
    schedule = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), exclude="down", total_steps=8)
    backend = run(schedule, backwards=2)
    backend.step = 5
    values = backend.report().to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["step"] == 5
    assert Schedule.from_dict(values["schedule"]) == schedule
    assert values["totals"]["flops_dense"] == 2 * UP + 3 * DOWN
    up, down = values["sites"]
    wanted = {"name", "kind", "shape", "method", "keep", "rewritten", "reason", "flops_dense", "flops"}
    assert wanted <= up.keys() == down.keys()
    assert (up["name"], up["kind"], up["shape"]) == ("up", "linear", [ROWS, INPUTS, HIDDEN])
    assert (up["keep"], up["rewritten"], down["rewritten"]) == (0.5, True, False)


class Deep(nn.Module):
    """Two linears whose module paths are 180 characters long."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"query_projection": nn.Linear(8, 8), "output_projection": nn.Linear(8, 8)})
        for level in range(8):
            inner = nn.ModuleDict({f"a_rather_long_name_{level}": inner})
        self.inner = inner

    def forward(self, x):
        module = self.inner
        while "query_projection" not in module:
            (module,) = module.values()
        return module["output_projection"](torch.relu(module["query_projection"](x)))


def test_every_name_is_in_the_table_however_long():
    backend = run(
        Schedule(linear=Reuse(0.5), exclude="query_projection"), model=Deep(), x=torch.randn(2, 3, 8)
    )
    report = backend.report()
    assert [len(site.name) > 150 for site in report.sites] == [True, True]
    lines = str(report).splitlines()
    for site in report.sites:
        (line,) = [line for line in lines if site.name in line]
        assert " × ".join(map(str, site.shape)) in line
        assert site.method in line
        assert site.reason in line


def test_table_says_what_was_saved():
    mask = torch.zeros(SAMPLES, TOKENS, 1)
    mask[:, :4] = 1
    text = str(run(Schedule.exact(), mask=mask).report())
    title, *lines = text.splitlines()
    up, down = (next(line for line in lines if line.split()[:1] == [name]) for name in ("up", "down"))
    assert title.startswith("step 0: 2 of 2 sites rewritten; ")
    assert " MFLOP a forward and backward" in title
    assert up.split()[:2] == ["up", "linear"]
    assert down.split()[:2] == ["down", "linear"]
    assert "75%" in up
    assert f"{2 * DOWN / 1e6:.3f}" in down
    assert f"{2 * DOWN / 4e6:.3f}" in down
    assert all(f"{column}:" in text for column in ("keep", "unneeded", "zero"))


def test_before_the_first_step_there_is_no_table():
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    assert str(backend.report()) == "step 0: nothing compiled has run yet that has a gradient."
    compiled = torch.compile(Net(), backend=backend)
    with torch.no_grad():
        compiled(torch.randn(SAMPLES, TOKENS, INPUTS))
    assert "up" not in str(backend.report())


def test_a_note_that_many_layers_share_is_written_once():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    backend = run(Schedule(linear=Reuse(0.5), exclude="*"), model=model, x=torch.randn(2, 3, 8))
    text, (site, *_) = str(backend.report()), backend.report().sites
    assert site.reason
    assert text.count(site.reason) == 1
    assert text.count("[1]") == 5


def test_it_says_that_no_optimizer_has_stepped():
    phases = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=10)
    assert "no step of a torch.optim optimizer" in str(run(phases, backwards=3).report())
    assert run(phases, backwards=3).report().note.startswith("3 backwards and no step")
    assert run(Schedule(linear=Reuse(0.5)), backwards=3).report().note == ""


@pytest.mark.parametrize("steady", [True, False])
def test_reuse_that_finds_nothing_to_reuse_is_said_to_be_exact(steady):
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager")
    compiled = torch.compile(Net(), backend=backend, dynamic=True)
    for length in (TOKENS, TOKENS - 4) * 2:
        square_loss(compiled(torch.randn(SAMPLES, TOKENS if steady else length, INPUTS))).backward()
    for site in backend.report().sites:
        assert (site.method, site.keep) == (("reuse", 0.5) if steady else ("exact", 1.0))
        assert ("another size" in site.reason) != steady
