"""Two real DDP processes (gloo, CPU) against a single one, against each other, and what each draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import run_two

WORKER = Path(__file__).with_name("ddp_worker.py")
PATIENCE = 480  # seconds: more than the workers have, which tell where they stand when theirs are over


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two has found."""
    return run_two(WORKER, tmp_path_factory.mktemp("ddp"), PATIENCE)


def test_at_ratio_0_gradients_equal_those_of_a_single_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, theirs = rank["reuse"]["steps"][0]["gradients"], rank["reuse"]["alone"]
        assert len(ours) == len(theirs) > 30
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_ranks_agree_on_the_phase_and_stay_in_step_under_reuse(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["reuse"]["steps"] for rank in ranks)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a["step"] == b["step"] == number + 1
        assert a["methods"] == b["methods"]
        # The phase begins with the third step, which has nothing to reuse yet.
        assert ("reuse" in a["methods"].values()) == (number >= 3)
        assert torch.equal(a["weights"], b["weights"])


def test_sites_keep_their_names_when_buckets_split_the_graph(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["reuse"]
        assert found["graphs"] > 1
        assert sorted(name for name, kind in found["sites"] if kind == "linear") == sorted(found["linears"])
        attentions = [name for name, kind in found["sites"] if kind == "attention"]
        assert attentions == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]


def test_each_rank_has_bases_of_its_own(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["reuse"]["bases"] for rank in ranks)
    assert first.keys() == second.keys()
    assert len(first) >= 12
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_ranks_draw_different_rows_and_the_same_ones_again(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for rank in ranks:
        assert len(rank["drawn"]) > 10
        assert all(torch.equal(a, b) for a, b in zip(rank["drawn"], rank["drawn again"], strict=True))
    same = [torch.equal(a, b) for a, b in zip(first["drawn"], second["drawn"], strict=True)]
    assert sum(same) <= 1  # 6 rows of 20: by chance, almost never
