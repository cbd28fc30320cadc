"""`Rows`: an estimate of dY by few distinct rows, written out."""

import torch

from sparse_compile.methods.rows import Rows, number_kept

DY = torch.arange(1.0, 13.0).view(6, 2)  # two samples of three tokens
BASE = torch.tensor([[100.0, 101.0], [200.0, 201.0], [300.0, 301.0]])


def indices(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_without_a_base_the_other_rows_are_zero():
    rows = Rows(kept=indices(1, 4))
    assert rows.computed == 2
    assert rows.dense(DY).tolist() == [[0, 0], [3, 4], [0, 0], [0, 0], [9, 10], [0, 0]]


def test_dropped_rows_are_the_base_of_their_token_and_the_rest_is_zero():
    dropped = torch.tensor([True, False, False, True, False, True])
    rows = Rows(kept=indices(1, 4), base=BASE, dropped=dropped)
    assert rows.computed == 2 + 3
    assert rows.dense(DY).tolist() == [[100, 101], [3, 4], [0, 0], [100, 101], [9, 10], [300, 301]]


def test_nothing_kept():
    assert not Rows(kept=indices()).dense(DY).any()
    rows = Rows(kept=indices(), base=BASE, dropped=torch.ones(6, dtype=torch.bool))
    assert rows.computed == 3
    assert torch.equal(rows.dense(DY), torch.cat([BASE, BASE]))


def test_all_kept_is_the_gradient_itself():
    assert torch.equal(Rows(kept=torch.arange(6)).dense(DY), DY)


def test_writing_out_changes_neither_gradient_nor_base():
    dy, base = DY.clone(), BASE.clone()
    rows = Rows(kept=indices(0), base=base, dropped=torch.tensor([False] + [True] * 5))
    rows.dense(dy).fill_(-1)
    assert torch.equal(dy, DY)
    assert torch.equal(base, BASE)


def test_of_any_share_at_least_one_is_kept():
    assert [number_kept(keep, 10) for keep in (1e-9, 0.24, 0.26, 1.0)] == [1, 2, 3, 10]
