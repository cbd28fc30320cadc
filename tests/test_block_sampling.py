"""Samples dropped between blocks, through torch.compile: exactly so many, really gone, and no bias."""

import functools
import math

import pytest
import torch
from reference_vcas import ToyBlock
from torch import nn

from sparse_compile import Sample, Schedule, sparse_backend

BATCH, TOKENS = 16, 3
F64 = torch.float64


class Net(nn.Module):
    """Two blocks between two linears, [B, T, 5] to [B, T, 4]; every parameter has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def batch(seed=0):
    """Samples of uneven size that share a direction, so that the gradient is no sum of noise."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 1, 5, generator=generator, dtype=F64)
    return common + torch.randn(BATCH, TOKENS, 5, generator=generator, dtype=F64)


def loss_of(out):
    """Samples weigh differently."""
    return (out - 1).square().sum((1, 2)) @ torch.linspace(0.2, 2, BATCH, dtype=out.dtype)


@pytest.fixture(autouse=True)
def _skip_whatever_is_zero(monkeypatch):
    """In layers as small as these, gathering the rows that are not zero costs more than it saves."""
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip", lambda *_, **__: 1)


class Run:
    """A model, its backend and its optimizer; ``seed`` is what the backend's random choices start from."""

    def __init__(self, schedule, seed=0) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Net().double()
        torch.manual_seed(seed)
        self.backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def backward(self, seed=0):
        """One backward; the gradient of the input."""
        x = batch(seed).requires_grad_()
        loss_of(self.compiled(x)).backward()
        return x.grad

    def train(self, start, stop):
        for step in range(start, stop):
            self.optimizer.zero_grad()
            self.backward(step)
            self.optimizer.step()
        return self

    def parts(self):
        return self.model, self.backend, self.optimizer

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def sites(self):
        return {site.name: site for site in self.backend.report().sites}

    def computed(self):
        """Samples behind each block in all backwards so far."""
        return [self.sites()[f"blocks.{i}"].rows_computed for i in range(2)]


def dense_gradients(model, *seeds):
    """Of all parameters, over one or more batches, by plain eager autograd."""
    total = sum(loss_of(model(batch(seed))) for seed in seeds)
    return torch.autograd.grad(total, list(model.parameters()))


def is_dense(run, *seeds):
    return all(
        torch.allclose(p.grad, g, rtol=1e-9, atol=1e-12)
        for p, g in zip(run.model.parameters(), dense_gradients(run.model, *seeds), strict=True)
    )


# What is dropped


def test_exactly_so_many_samples_go_on_and_the_others_are_zero_in_every_earlier_block():
    """Keep 0.25 of two blocks: 8 of 16 behind the second, 4 behind the first."""
    run = Run(Schedule(blocks=Sample(0.25)))
    chosen = set()
    for step in range(1, 21):
        live = run.backward(step).ne(0).any(2).any(1)
        assert int(live.sum()) == 4
        chosen.add(tuple(live.tolist()))
        sites = run.sites()
        assert run.computed() == [4 * step, 8 * step]
        zero = {name: site.rows_skipped / step for name, site in sites.items()}
        dropped = {"blocks.1": 8, "blocks.0": 12, "embed": 12}
        for name in ("head", "blocks.1.up", "blocks.1.down", "blocks.0.up", "blocks.0.down", "embed"):
            owner = name.rpartition(".")[0] or name
            assert zero[name] == TOKENS * dropped.get(owner, 0), name
            assert sites[name].rows_computed == step * TOKENS * (BATCH - dropped.get(owner, 0))
    assert sites["blocks.1"].keep == pytest.approx(0.5)
    assert sites["blocks.0"].keep == pytest.approx(0.25)
    assert sites["blocks.1"].method == "sample"
    assert len(chosen) > 10


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
def test_shares_fall_evenly_with_depth(keep):
    run = Run(Schedule(blocks=Sample(keep)))
    run.backward()
    assert run.computed() == [max(1, round(keep * BATCH)), max(1, round(keep**0.5 * BATCH))]


def test_what_is_behind_the_last_block_is_exact():
    run = Run(Schedule(blocks=Sample(0.25)))
    run.backward()
    for (name, p), g in zip(run.model.named_parameters(), dense_gradients(run.model, 0), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9) == name.startswith(("head", "norm")), name


def test_all_kept_is_dense():
    run = Run(Schedule(blocks=Sample(1.0)))
    run.backward()
    assert is_dense(run, 0)
    assert run.computed() == [BATCH, BATCH]


def test_a_clip_caps_the_weights_of_the_samples():
    """At 1 the samples that are kept stand for themselves alone: the input gradient is theirs, unscaled."""
    run = Run(Schedule(blocks=Sample(0.25, clip=1)))
    found = run.backward()
    x = batch().requires_grad_()
    (dense,) = torch.autograd.grad(loss_of(run.model(x)), x)
    live = found.ne(0).any(2).any(1)
    assert int(live.sum()) == 4
    torch.testing.assert_close(found[live], dense[live])


# No bias

UNBIASED = {
    "blocks": Schedule(blocks=Sample(0.5)),
    "linear": Schedule(linear=Sample(0.6)),
    "linear, input": Schedule(linear=Sample(0.6, gradients="input")),
    "linear, weight": Schedule(linear=Sample(0.6, gradients="weight")),
    "blocks and linear": Schedule(blocks=Sample(0.6), linear=Sample(0.7)),
}
DRAWS = 2000


@functools.cache
def shares_recovered(schedule):
    """Mean of ⟨ĝ, g⟩ / ⟨g, g⟩ over DRAWS backwards, for every parameter that varies, and its standard error.
    (1 if unbiased; g is the dense gradient.)"""
    run = Run(schedule)
    parameters = list(run.model.parameters())
    truth = dense_gradients(run.model, 0)
    loss = loss_of(run.compiled(batch()))
    values = torch.empty(DRAWS, len(truth), dtype=F64)
    for draw in range(DRAWS):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            values[draw, i] = (a * b).sum() / (b * b).sum()
    random = values.std(0) > 1e-9
    torch.testing.assert_close(values[:, ~random], torch.ones_like(values[:, ~random]))
    return values.mean(0)[random], values.std(0)[random] / math.sqrt(DRAWS)


# How many of the nine parameters vary: none behind the last block, no bias if only weights are sampled.
@pytest.mark.parametrize(("name", "varies"), [*zip(UNBIASED, (6, 9, 8, 6, 9), strict=True)])
def test_the_mean_of_many_backwards_is_the_dense_gradient_for_every_parameter(name, varies):
    mean, error = shares_recovered(UNBIASED[name])
    assert len(mean) == varies
    assert (error < 0.004).all()  # so that a bias of 2 % is five of them
    assert ((mean - 1).abs() <= 3 * error).all()


@pytest.mark.parametrize("name", ["blocks", "blocks and linear"])
def test_a_bias_of_two_percent_would_be_seen(name):
    mean, error = shares_recovered(UNBIASED[name])
    assert ((0.98 * mean - 1).abs() > 3 * error).all()


# From step to step

ADAPTIVE = {"cal_var_freq": 2, "act_tau": 0.5, "weight_tau": 0.5, "s_step": 0.2, "ratio_step": 0.7}
RUNS = {
    "blocks": Schedule(blocks=Sample(0.3)),
    "both": Schedule(blocks=Sample(0.5), linear=Sample(0.5)),
    "vcas": Schedule.vcas(**ADAPTIVE),
    "vcas, solved": Schedule.vcas(**{**ADAPTIVE, "update": "solve"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_equal_seeds_give_equal_runs_and_others_do_not(name):
    first, second, other = (Run(RUNS[name], seed).train(0, 6).weights() for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    whole = Run(RUNS[name]).train(0, 9)
    half = Run(RUNS[name]).train(0, 5)
    torch.save([part.state_dict() for part in half.parts()], tmp_path / "state.pt")
    resumed = Run(RUNS[name], seed=5)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip(resumed.parts(), states, strict=True):
        part.load_state_dict(state)
    resumed.train(5, 9)
    assert torch.equal(resumed.weights(), whole.weights())
    assert resumed.backend.state_dict()["controller"] == whole.backend.state_dict()["controller"]


def history(run):
    return run.backend.state_dict()["controller"]["history"]


def test_adaptive_sampling_measures_exactly_and_samples_in_between():
    """Measured steps are dense; after a few of them the others are not."""
    run = Run(Schedule.vcas(**ADAPTIVE))
    dense = []
    for step in range(10):
        run.optimizer.zero_grad()
        run.backward(step)
        dense.append(is_dense(run, step))
        run.optimizer.step()
    assert dense[0::2] == [True] * 5
    assert dense[5:10:2] == [False, False, False]
    assert [entry["step"] for entry in history(run)] == [0, 2, 4, 6, 8]
    last = history(run)[-1]
    assert list(last["sample_shares"]) == ["blocks.0", "blocks.1"]
    assert last["sample_shares"]["blocks.0"] <= last["sample_shares"]["blocks.1"] < 1
    linears = {"embed", "head", *(f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down"))}
    assert set(last["row_shares"]) == linears
    assert max(last["row_shares"].values()) < 1
    shares = {**last["sample_shares"], **last["row_shares"]}
    assert {name: site.keep for name, site in run.sites().items()} == pytest.approx(shares, abs=1e-6)


def test_gradients_of_micro_batches_are_added_and_only_the_first_is_measured():
    run = Run(Schedule.vcas(**ADAPTIVE))
    run.backward(0)
    run.backward(1)
    assert is_dense(run, 0, 1)
    run.optimizer.step()
    assert history(run) == history(Run(Schedule.vcas(**ADAPTIVE)).train(0, 1))


def test_micro_batches_are_drawn_independently():
    run = Run(Schedule(blocks=Sample(0.25)))
    first, second = run.backward(0), run.backward(0)
    assert not torch.equal(first, second)
    assert run.backend.step == 0


def test_phases_change_without_a_new_graph():
    run = Run(Schedule(blocks=Sample([(1.0, 0.0), (0.25, 0.5)]), total_steps=4))
    dense, computed = [], []
    for step in range(4):
        run.optimizer.zero_grad()
        run.backward(step)
        dense.append(is_dense(run, step))
        computed.append(run.computed()[0])
        run.optimizer.step()
    assert dense == [True, True, False, False]
    assert computed == [16, 32, 36, 40]
    assert len(run.backend.graphs) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exclude": "blocks.1"}, "matches the exclude pattern 'blocks.1'"),
        ({"include": ["blocks.0", "head"]}, "matches no include pattern"),
        ({"skip_layers": -1}, "block 1 of 2 is in skip_layers"),
    ],
)
def test_blocks_that_are_left_out_drop_nothing(options, reason):
    run = Run(Schedule(blocks=Sample(0.25), **options))
    run.backward()
    assert run.computed() == [4, 16]
    site = run.sites()["blocks.1"]
    assert reason in site.reason
    assert site.keep == 1.0


class Projection(nn.Module):
    """A block that multiplies by a weight of its own, so that both are called alike."""

    def __init__(self, features=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features) / features)
        self.inside = nn.Linear(features, features)

    def forward(self, x):
        return x + torch.tanh(self.inside(x) @ self.weight.t())


def test_a_block_that_is_called_like_a_linear_has_a_name_beside_it():
    model = nn.ModuleList([Projection(), Projection()])
    backend = sparse_backend(Schedule(blocks=Sample(0.5)), compiler="aot_eager")
    run = torch.compile(lambda x: model[1](model[0](x)), backend=backend)
    for _ in range(2):
        run(torch.randn(8, 3, 4)).square().sum().backward()
    kinds = {site.name: site.kind for site in backend.report().sites}
    assert [name for name, kind in kinds.items() if kind == "block"] == ["1 (end)", "0 (end)"]
    assert kinds["0"] == kinds["1"] == "linear"
    keeps = {site.name: site.keep for site in backend.report().sites}
    assert keeps["0 (end)"] == 0.5
    assert keeps["1 (end)"] == pytest.approx(0.5**0.5, abs=1e-6)


def test_a_where_that_matches_nothing_is_refused():
    backend = sparse_backend(Schedule(blocks=Sample(0.5, where="Projektion")), compiler="aot_eager")
    model = torch.compile(nn.Sequential(Projection()), backend=backend)
    with pytest.raises(
        ValueError, match=r"where='Projektion', which is no class .* near names: 'Projection'"
    ):
        model(torch.randn(8, 3, 4))


@pytest.mark.parametrize("name", ["blocks", "both", "vcas"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_reaches_the_gradient_and_is_no_measurement(name, bad):
    """So that a GradScaler sees it, and skips the step."""
    run = Run(RUNS[name])
    out = run.compiled(batch())
    dy = torch.ones_like(out)
    dy[3, 1, 2] = bad
    out.backward(dy)
    for parameter, p in run.model.named_parameters():
        assert not p.grad.isfinite().all(), parameter
    run.model.zero_grad()
    run.backward()
    run.optimizer.step()
    assert [entry["step"] for entry in history(run)] == ([0] if name == "vcas" else [])
    assert all(
        math.isfinite(value) for entry in history(run) for value in (entry["s"], entry["act_variance"])
    )


class CutBlock(ToyBlock):
    """A block of two graphs, of which the second ends where the block does."""

    def forward(self, h):
        h = h + 0
        torch._dynamo.graph_break()
        return super().forward(h)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("where", [None, "blocks.*"])
def test_blocks_that_are_compiled_one_by_one_draw_as_in_one_graph(where, cut):
    run = Run(Schedule(blocks=Sample(0.25)))
    expected = run.backward()
    torch._dynamo.reset()
    backend = sparse_backend(Schedule(blocks=Sample(0.25, where=where)), compiler="aot_eager", debug=True)
    for block in run.model.blocks:
        if cut:
            block.__class__ = CutBlock
        block.compile(backend=backend)
    x = batch().requires_grad_()
    loss_of(run.model(x)).backward()
    torch.testing.assert_close(x.grad, expected, atol=1e-12, rtol=1e-12)
    drawn = [site.name for site in backend.report().sites if site.kind == "block"]
    assert drawn == ["blocks.0", "blocks.1"]
    assert sum(graph.after.count("sample_weights.default(") for graph in backend.graphs) == 1
