"""Reuse of attention's rows is done where that costs less than all of them; the report says where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_reference import FEATURES, HEADS, Model, fused
from torch import Tensor

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods.attention import reuse_pays
from sparse_compile.report import SiteReport

SHORT, LONG = 40, 200
REASON = "reuse would cost more than it saves at this size and keep: only zero rows are skipped"


# (stored probabilities, tokens, features) and the share at which both took the same processor time: 12 heads
# (4 of 128 features), about 2048 rows, one core, AVX-512, float32.
@pytest.mark.parametrize(
    ("stored", "tokens", "features", "measured"),
    [
        *((False, 128, 64, 0.51), (False, 256, 64, 0.69), (False, 512, 64, 0.80), (False, 128, 128, 0.49)),
        *((True, 128, 64, 0.28), (True, 256, 64, 0.58), (True, 512, 64, 0.67)),
        (False, 64, 32, 0.19),
    ],
)
def test_where_it_stops_to_pay(stored: bool, tokens: int, features: int, measured: float) -> None:
    def pays(keep: float) -> bool:
        return reuse_pays(keep, 2048, tokens, features, stored=stored)

    assert pays(measured - 0.07)
    assert not pays(measured + 0.07)


def test_at_64_tokens_of_small_heads_a_chain_never_pays() -> None:
    assert not reuse_pays(0.1, 2048, 64, 32, stored=True)


def attentions(backend: SparseBackend) -> list[SiteReport]:
    return [site for site in backend.report().sites if site.kind == "attention"]


class Trained:
    """Two small attentions with a schedule that reuses."""

    def __init__(self, method: Reuse, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Model(fused).double()
        self.backend = sparse_backend(Schedule(attention=method, **options), compiler="aot_eager")
        self.compiled = torch.compile(self.model, backend=self.backend, dynamic=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def is_exact(self, tokens: int) -> bool:
        """Whether the gradients of one step are the true ones."""
        x = torch.randn(4, tokens, FEATURES, dtype=torch.float64)
        mask = torch.ones(4, 1, tokens, tokens, dtype=torch.bool)
        ours, true = (self._gradients(run, x, mask) for run in (self.compiled, self.model))
        self.optimizer.step()
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(ours, true, strict=True))

    def _gradients(self, run: Any, x: Tensor, mask: Tensor) -> list[Tensor]:
        loss = (run(x, mask) - 1).square().mean()
        return list(torch.autograd.grad(loss, list(self.model.parameters())))


def test_what_does_not_pay_is_exact_and_the_report_says_so() -> None:
    trained = Trained(Reuse(0.5))
    assert [site.reason for site in attentions(trained.backend)] == []
    assert [trained.is_exact(SHORT) for _ in range(3)] == [True] * 3
    for site in attentions(trained.backend):
        assert (site.method, site.keep, site.reason) == ("exact", 1.0, REASON)


def test_long_sequences_pay_and_short_ones_between_them_leave_nothing_behind() -> None:
    assert not reuse_pays(0.3, 4 * SHORT, SHORT, FEATURES // HEADS, stored=False)
    assert reuse_pays(0.3, 4 * LONG, LONG, FEATURES // HEADS, stored=False)
    trained = Trained(Reuse(0.7))
    assert [trained.is_exact(tokens) for tokens in (LONG, LONG, SHORT, LONG, LONG)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    for site in attentions(trained.backend):
        assert (site.method, site.keep, site.reason) == ("reuse", 0.3, "")


def test_another_phase_may_pay() -> None:
    trained = Trained(Reuse([(0.1, 0.0), (0.7, 0.5)]), total_steps=4)
    assert [trained.is_exact(LONG) for _ in range(2)] == [True, True]
    assert [site.keep for site in attentions(trained.backend)] == [0.3, 0.3]  # of the step that comes
    assert [trained.is_exact(LONG) for _ in range(2)] == [True, False]


def test_single_entries_are_chosen_at_any_size() -> None:
    trained = Trained(Reuse(0.5, granularity="element"))
    assert [trained.is_exact(SHORT) for _ in range(2)] == [True, False]
