"""Two real FSDP2 processes (gloo, CPU) against a single one, against each other, and resumed against not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrun import run_two

WORKER = Path(__file__).with_name("fsdp_worker.py")
PATIENCE = 1500  # seconds: more than the workers have, which tell where they stand when theirs are over

ways = pytest.mark.parametrize("how", ["in place", "replaced", "checkpointed", "whole"])

OF_A_LAYER = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LINEARS = {f"model.layers.{i}.{name}" for i in range(2) for name in OF_A_LAYER}
ATTENTIONS = {f"model.layers.{i}.self_attn" for i in range(2)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two has found."""
    return run_two(WORKER, tmp_path_factory.mktemp("fsdp"), PATIENCE)


def whole(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The shards of both ranks, which FSDP2 cuts along the first dimension, put together."""
    return [torch.cat(halves) for halves in zip(first, second, strict=True)]


def ops(rank: dict[str, Any], how: str, op: str) -> int:
    return sum(graph.count(f"torch.ops.sparse_compile.{op}.default(") for graph in rank[how]["graphs"])


@ways
@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_equals_a_single_process(ranks: list[dict[str, Any]], how: str, what: str) -> None:
    """Float64; the gradients of the first of three steps, and the weights after the last."""
    ours, theirs = whole(*(rank[how][what] for rank in ranks)), ranks[0]["alone"][what]
    assert len(ours) == len(theirs) == 21
    for a, b in zip(ours, theirs, strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-10)


@ways
def test_every_site_keeps_its_name_and_is_rewritten(ranks: list[dict[str, Any]], how: str) -> None:
    head = {"lm_head"} if how == "whole" else set()  # else nobody has compiled it
    for rank in ranks:
        sites = rank[how]["sites"]
        rewritten = [(site["kind"], site["name"]) for site in sites if site["rewritten"]]
        linears = {("linear", name) for name in LINEARS | head}
        assert sorted(rewritten) == sorted(linears | {("attention", name) for name in ATTENTIONS})
        assert {site["name"] for site in sites} == LINEARS | ATTENTIONS | {"lm_head"}
        # Each layer has run its own three steps, of 2 samples of 10 tokens.
        assert all(site["rows"] == 60 for site in sites if site["rewritten"])


@pytest.mark.parametrize("how", ["in place", "replaced", "checkpointed", "whole", "bfloat16"])
def test_one_graph_serves_all_layers_and_has_every_op(ranks: list[dict[str, Any]], how: str) -> None:
    for rank in ranks:
        assert ops(rank, how, "linear_backward") == 7 + (how == "whole")
        assert ops(rank, how, "fused_attention_backward") == 1


def test_mixed_precision_gives_the_gradients_of_fsdp_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        ours, theirs = rank["bfloat16"], rank["bfloat16 eager"]
        assert {s["name"] for s in ours["sites"] if s["rewritten"]} == LINEARS | ATTENTIONS
        assert '"bf16[32, 64]" = linear_backward' in ours["graphs"][0]
        assert not theirs["graphs"]
        for a, b in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert a.dtype == torch.float32
            # bfloat16 has 8 bits; a product may add its terms in another order.
            torch.testing.assert_close(a, b, atol=2**-8 * float(b.abs().max()), rtol=0)


def test_each_backend_counts_the_steps_of_its_own_model(ranks: list[dict[str, Any]]) -> None:
    """Two sharded models, each with two micro-batches a step: one step at each optimizer's own."""
    for rank in ranks:
        assert rank["clocks"] == [(1, 0), (1, 1), (2, 1), (2, 2)]
        assert all(rank[how]["step"] == 3 for how in ("in place", "replaced", "checkpointed", "whole"))


def test_ranks_agree_on_the_phase(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["reuse"]["steps"] for rank in ranks)
    assert first == second
    for number, taken in enumerate(first):
        assert taken["step"] == number + 1
        reusing = {name for name, method in taken["methods"].items() if method == "reuse"}
        # The phase begins with the third step, which has nothing to reuse yet.
        assert reusing == (LINEARS if number >= 3 else set())


def test_each_rank_has_bases_of_its_own(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["reuse"]["bases"] for rank in ranks)
    assert first.keys() == second.keys() == LINEARS
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_ranks_draw_different_rows(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["drawn"] for rank in ranks)
    assert len(first) == len(second) > 10
    assert sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) <= 1  # 6 rows of 20


@pytest.mark.parametrize("method", ["reuse", "sample"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(ranks: list[dict[str, Any]], method: str) -> None:
    for rank in ranks:
        resumed, through = rank[f"{method} resumed"], rank[method]
        assert method in through["steps"][-1]["methods"].values()
        assert resumed["steps"] == through["steps"]
        assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], through["weights"], strict=True))


def test_sparse_weight_gradients_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"].startswith(
            "Schedule.weight_gradients was given a model that fully_shard has sharded, whose optimizer never "
            "has a whole gradient; allowed is a model that is not sharded."
        )
