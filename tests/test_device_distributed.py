"""DDP and FSDP2 on a GPU: the kernels, and plans, of a single process. Two processes share what GPU there is;
without one the CPU is taken for it, and kernels are interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import run_two

pytest.importorskip("triton")

WORKER = Path(__file__).with_name("device_worker.py")
PATIENCE = 480  # seconds: more than the workers have, which tell where they stand when theirs are over
LINEARS = {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two has found."""
    return run_two(WORKER, tmp_path_factory.mktemp("devices"), PATIENCE)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_exact_gradients_are_those_of_a_single_process(how: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank[f"{how}, exact"]
        assert len(found["gradients"]) == len(found["alone"]) == 12
        for ours, theirs in zip(found["gradients"], found["alone"].values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["exact", "sample", "reuse"])
def test_linears_are_planned_and_run_on_triton(how: str, name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank[f"{how}, {name}"]
        assert {site: found["sites"][site] for site in LINEARS} == dict.fromkeys(LINEARS, (name, "triton"))
        # FSDP2 compiles a layer, whose graph is the other's, too; the head it leaves alone.
        assert found["planned"] == (5 if how == "ddp" else len(LINEARS))
        assert found["called"] == 0


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_share_the_sum_of_what_they_drew(how: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[f"{how}, sample"] for rank in ranks)
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(one, other)
    exact = first["alone"]["layers.0.up.weight"]
    position = list(first["alone"]).index("layers.0.up.weight")
    assert (first["gradients"][position] - exact).norm() > 0.05 * exact.norm()
