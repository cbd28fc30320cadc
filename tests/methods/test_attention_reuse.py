"""What stands in for the query rows that are dropped; whole steps are in tests/test_attention_training.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.methods import attention

SAMPLES, HEADS, QUERIES, KEYS, FEATURES = 3, 2, 5, 4, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_rows_farthest_from_the_mean_are_computed_and_the_rest_are_dropped_with_their_share_of_the_norm() -> (
    None
):
    mean, far = random(HEADS, QUERIES, FEATURES), [(0, 1), (0, 4), (2, 0)]
    do = mean.expand(SAMPLES, -1, -1, -1) + 1e-3 * random(SAMPLES, HEADS, QUERIES, FEATURES)
    for b, t in far:
        do[b, 1, t] += 10
    do[1, :, 3] = 0
    live = torch.ones(SAMPLES, QUERIES, dtype=torch.bool)
    live[1, 3] = False
    rows = attention.choose_rows(do, mean, keep=0.2, live=live)
    assert rows.computed.nonzero().tolist() == [list(row) for row in far]
    assert torch.equal(rows.dropped, live & ~rows.computed)
    norms = torch.stack([do[:, :, t].flatten(1).norm(dim=1) for t in range(QUERIES)], 1)
    torch.testing.assert_close(rows.share, (norms * rows.dropped).sum(1) / norms.sum(1))


def test_a_sample_without_a_gradient_has_no_share() -> None:
    do = random(SAMPLES, HEADS, QUERIES, FEATURES)
    do[1] = 0
    live = torch.tensor([[True], [False], [True]]).expand(-1, QUERIES)
    rows = attention.choose_rows(do, torch.zeros(HEADS, QUERIES, FEATURES).double(), keep=0.1, live=live)
    assert float(rows.share[1]) == 0
    assert not rows.dropped[1].any()


def test_keys_that_no_computed_row_attends_to_get_nothing() -> None:
    dropped = torch.zeros(SAMPLES, QUERIES, dtype=torch.bool)
    dropped[0, 2] = dropped[2, 4] = True
    rows = attention.ChosenRows(~dropped, dropped, share=torch.tensor([0.5, 0.0, 1.0]).double())
    means = {name: random(HEADS, n, FEATURES) for name, n in (("dq", QUERIES), ("dk", KEYS), ("dv", KEYS))}
    before = tuple(random(SAMPLES, HEADS, n, FEATURES) for n in (QUERIES, KEYS, KEYS))
    attended = torch.ones(SAMPLES, KEYS, dtype=torch.bool)
    attended[0, 3] = False
    dq, dk, dv = attention.fill_in(tuple(x.clone() for x in before), rows, means, attended)  # type: ignore[arg-type]
    weight = rows.share.view(-1, 1, 1, 1).repeat(1, 1, KEYS, 1)
    weight[0, 0, 3] = 0
    torch.testing.assert_close(dk, before[1] + weight * means["dk"])
    torch.testing.assert_close(dv, before[2] + weight * means["dv"])
    assert torch.equal(dq[0, :, 2], means["dq"][:, 2])
    assert torch.equal(dq[2, :, 4], means["dq"][:, 4])
    assert torch.equal(dq.transpose(1, 2)[~dropped], before[0].transpose(1, 2)[~dropped])


@pytest.mark.parametrize("apart", [False, True])
def test_means_have_the_layout_of_what_they_are_of(apart: bool) -> None:
    x = random(SAMPLES, QUERIES, HEADS, FEATURES).transpose(1, 2)
    x = x.contiguous() if apart else x
    for sample, expected in ((None, x.mean(0)), (1, x[1])):
        means = attention.means_for_rows(x, (x, x, x), sample)
        assert list(means) == ["do", "dq", "dk", "dv"]
        for mean in means.values():
            torch.testing.assert_close(mean, expected)
            assert mean.stride() == x[0].stride()
