"""Query rows of attention drawn at random: what is computed, that nothing is missing on average, and when."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from attention_reference import FEATURES, HEADS, Model, chain, dense, fused
from torch import Tensor

from sparse_compile import Monitor, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods import attention as method
from sparse_compile.methods.attention import sampling_pays
from sparse_compile.methods.sample import Draw
from sparse_compile.report import SiteReport

SAMPLES, TOKENS, DRAWS = 4, 6, 3000
F64 = torch.float64


@pytest.fixture
def sample_however_little_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compile.methods.attention.sampling_pays", lambda *_, **__: True)


small = pytest.mark.usefixtures("sample_however_little_it_saves")


def masks(causal: bool = False) -> Tensor:
    mask = torch.ones(SAMPLES, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    return mask.tril() if causal else mask


class Run:
    """Two small attentions under a schedule that samples their queries."""

    def __init__(self, schedule: Schedule, core: Any = fused, seed: int = 0, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Model(core).double()
        torch.manual_seed(seed)
        self.backend: SparseBackend = sparse_backend(schedule, compiler="aot_eager", **options)
        self.compiled = torch.compile(self.model, backend=self.backend)
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(SAMPLES, TOKENS, FEATURES, generator=generator, dtype=F64)

    def loss(self, run: Any, x: Tensor | None = None) -> Tensor:
        """Tokens weigh differently, and those of the second sample's padding do not count."""
        weights = torch.linspace(0.2, 2.0, TOKENS, dtype=F64).repeat(SAMPLES, 1)
        weights[1, 4:] = 0.0
        out = run(self.x if x is None else x, masks())
        return ((out - 1.0).square().sum(2) * weights).sum()

    def gradients(self, run: Any = None) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(run or self.compiled), list(self.model.parameters())))

    def sites(self) -> list[SiteReport]:
        return [site for site in self.backend.report().sites if site.kind == "attention"]


def drawn_weights(do: Tensor, keep: float, clip: float | None, seed: str) -> Tensor:
    found = method.draw_rows(do, keep, clip, Draw(seed))
    assert found is not None
    return found[0]


@small
@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("core", [fused, chain])
def test_gradients_are_those_of_the_drawn_rows_scaled(
    core: Any, causal: bool, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reference's backward of dO times the weights that were drawn."""
    seen: list[Tensor] = []

    def draw_rows(do: Tensor, *arguments: Any) -> Any:
        found = original(do, *arguments)
        assert found is not None
        seen.append(found[0])
        return found

    original = method.draw_rows
    monkeypatch.setattr(method, "draw_rows", draw_rows)
    q, k, v = (torch.randn(SAMPLES, HEADS, TOKENS, 4, dtype=F64).requires_grad_() for _ in range(3))
    mask, do = masks(causal), torch.randn(SAMPLES, HEADS, TOKENS, 4, dtype=F64)
    do[0, :, 2] = 0.0
    schedule = Schedule(attention=Sample(0.5, clip=clip))
    run = torch.compile(
        lambda *heads: core(None, *heads, mask), backend=sparse_backend(schedule, compiler="aot_eager")
    )
    ours = torch.autograd.grad(run(q, k, v), (q, k, v), do)
    (weights,) = seen
    assert int((weights != 0).sum()) == SAMPLES * TOKENS // 2
    assert weights[0, 2] == 0
    assert weights.max() <= (clip or math.inf)
    a = torch.softmax((q @ k.mT / 2).masked_fill(~mask, -torch.inf), -1)
    theirs = dense(do * weights[:, None, :, None], *(t.detach() for t in (a, q, k, v)), 0.5)
    for found, name in zip(ours, ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(found, theirs[name])


def test_rows_are_drawn_by_their_norm_over_all_heads_and_never_where_they_are_zero() -> None:
    torch.manual_seed(1)
    do = torch.randn(2, 3, 8, 4, dtype=F64) * torch.linspace(0.5, 2, 8, dtype=F64)[:, None]
    do[1, :, 3:] = 0.0
    weights = torch.stack([drawn_weights(do, 0.25, None, f"{draw}") for draw in range(DRAWS)])
    norms = torch.linalg.vector_norm(do, dim=(1, 3))
    drawn = (weights != 0).double().mean(0)
    assert ((weights != 0).sum((1, 2)) == 4).all()
    assert (drawn[norms == 0] == 0).all()
    expected = norms * (4 / norms.sum())
    assert expected.max() < 1  # so that no row is certain
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((drawn - expected).abs() <= 4 * error).all()
    some = weights != 0
    torch.testing.assert_close(weights[some], (1 / expected).expand_as(weights)[some])


@small
@pytest.mark.parametrize("core", [fused, chain])
def test_the_mean_of_many_backwards_is_the_dense_gradient_and_two_percent_of_bias_would_be_seen(
    core: Any,
) -> None:
    run = Run(Schedule(attention=Sample(0.85)), core)
    truth, parameters = run.gradients(run.model), list(run.model.parameters())
    loss = run.loss(run.compiled)
    values = torch.empty(DRAWS, len(truth), dtype=F64)
    for draw in range(DRAWS):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        values[draw] = torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(found, truth, strict=True)])
    random = values.std(0) > 1e-9
    # All of both attentions but the output of the second, whose gradient comes before any drawing.
    assert [
        name for (name, _), varies in zip(run.model.named_parameters(), random, strict=True) if not varies
    ] == [
        "second.out.weight",
        "second.out.bias",
    ]
    mean, error = values.mean(0)[random], values.std(0)[random] / math.sqrt(DRAWS)
    assert (error < 0.004).all()
    assert ((mean - 1).abs() <= 3 * error).all()
    assert ((0.98 * mean - 1).abs() > 3 * error).all()


@small
def test_report_counts_the_rows_and_flops() -> None:
    run = Run(Schedule(attention=Sample(0.5)))
    run.loss(run.compiled).backward()
    for site in run.sites():
        assert (site.method, site.keep, site.rewritten) == ("sample", 0.5, True)
        assert site.rows == SAMPLES * TOKENS
        assert 12 <= site.rows_computed < SAMPLES * TOKENS  # samples with fewer rows are filled up
        assert site.flops_backward < site.flops_backward_dense
    assert [site.rows_skipped for site in run.sites()] == [2, 2]  # nothing reads the padding


@small
def test_a_resumed_run_draws_what_the_other_would_have_drawn() -> None:
    schedule = Schedule(attention=Sample(0.5))
    first = Run(schedule)
    first.gradients()
    state = first.backend.state_dict()
    expected = first.gradients()
    second = Run(schedule, seed=7)
    second.backend.load_state_dict(state)
    for ours, theirs in zip(second.gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not all(torch.equal(a, b) for a, b in zip(second.gradients(), expected, strict=True))


@small
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_gradients(bad: float) -> None:
    run = Run(Schedule(attention=Sample(0.5)))
    (run.loss(run.compiled) * bad).backward()
    assert not any(bool(p.grad.isfinite().all()) for p in run.model.parameters() if p.grad is not None)


@small
def test_rows_begin_to_be_drawn_when_the_schedule_says() -> None:
    run = Run(Schedule(attention=Sample([(1.0, 0.0), (0.5, 0.5)]), total_steps=4))
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0)
    truth, methods = run.gradients(run.model), []
    for _ in range(4):
        optimizer.zero_grad()
        run.loss(run.compiled).backward()
        same = [torch.allclose(p.grad, g) for p, g in zip(run.model.parameters(), truth, strict=True)]
        methods.append("exact" if all(same) else "sample")
        optimizer.step()
    assert methods == ["exact", "exact", "sample", "sample"]


@small
def test_a_monitor_sees_how_far_the_gradients_are_off_and_changes_nothing() -> None:
    schedule = Schedule(attention=Sample(0.5))
    plain, watched = Run(schedule), Run(schedule, monitor=Monitor(every=1))
    for a, b in zip(plain.gradients(), watched.gradients(), strict=True):
        assert torch.equal(a, b)
    found = {(m.site, m.gradient) for m in watched.backend.report().measurements}
    assert found == {(site.name, name) for site in watched.sites() for name in ("dQ", "dK", "dV")}


def test_where_it_would_cost_more_than_it_saves_the_gradients_are_exact_and_the_report_says_so() -> None:
    run = Run(Schedule(attention=Sample(0.5)))
    for ours, theirs in zip(run.gradients(), run.gradients(run.model), strict=True):
        torch.testing.assert_close(ours, theirs)
    for site in run.sites():
        assert site.keep == 1.0
        assert (
            site.reason
            == "sampling would cost more than it saves at this size and keep: only zero rows are skipped"
        )


# (stored probabilities, tokens) and the share at which both took the same processor time: 12 heads of 64,
# 2048 rows, one core, AVX-512, float32. The formula is up to 0.1 above it and, for long chains, 0.18 below.
@pytest.mark.parametrize(
    ("stored", "tokens", "measured"),
    [
        *((False, 128, 0.67), (False, 256, 0.70), (False, 512, 0.84)),
        *((True, 128, 0.46), (True, 256, 0.70), (True, 512, 0.85)),
    ],
)
def test_where_it_stops_to_pay(stored: bool, tokens: int, measured: float) -> None:
    assert sampling_pays(measured - 0.19, 2048, tokens, 64, stored=stored)
    assert not sampling_pays(measured + 0.11, 2048, tokens, 64, stored=stored)


def test_with_few_keys_it_never_pays() -> None:
    assert not sampling_pays(0.1, 2048, 8, 64, stored=False)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(0.5, gradients="weight"), "Schedule.attention's gradients is 'weight'; allowed is \"both\""),
        (Sample(0.5, where="a"), "Schedule.attention's where is 'a'; allowed is None"),
    ],
)
def test_settings_that_attention_has_no_use_for_are_refused(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(attention=sample)


def test_json_round_trip() -> None:
    schedule = Schedule(attention=Sample(0.25, clip=2))
    assert Schedule.from_dict(schedule.to_dict()) == schedule
