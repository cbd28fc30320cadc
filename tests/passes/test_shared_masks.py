"""Masks that say the same, or less than another, share what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint import calls, trace
from padded import CASES
from sparse_compile.passes import forward, shared_masks
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

ops = torch.ops.sparse_compile

B, T = 3, 4


def masks_of(function: Callable[..., Any], *inputs: Tensor) -> list[Node]:
    graph: Graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def shared(function: Callable[..., Any], *inputs: Tensor) -> list[int]:
    """For each mask that a function makes, the number of the one that takes its place."""
    masks = masks_of(function, *inputs)
    found = shared_masks.shared(masks)
    return [masks.index(found[mask]) for mask in masks]


def some(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


def test_shapes_do_not_matter() -> None:
    def masks(a: Tensor) -> list[Tensor]:
        heads = a.view(B, T, 1, 1).permute(0, 2, 1, 3)  # what moves has one entry
        back = torch.squeeze(heads.permute(0, 2, 1, 3).clone().view(B, T, 1), [2])
        return [a.view(B * T), heads.clone().view(B * T), back.view(B * T), (a | back).view(B * T)]

    assert shared(masks, some(B, T)) == [0, 0, 0, 0]


def test_what_is_laid_out_in_another_order_is_another_mask() -> None:
    def masks(a: Tensor) -> list[Tensor]:
        turned = a.permute(1, 0).clone(memory_format=torch.contiguous_format)
        return [a.view(B * T), turned.view(B * T)]

    assert shared(masks, some(B, T)) == [0, 1]


def test_what_is_broadcast_is_a_part_of_its_own() -> None:
    """Of a union with one flag for each sample, or each token, the entries do not follow each other alike."""

    def masks(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        return [(a | b).view(B * T), (a | c).view(B * T), a.view(B * T)]

    assert shared(masks, some(B, T), some(B, 1), some(1, T)) == [0, 1, 2]


def test_masks_above_every_attention_stay_as_they_are() -> None:
    """Though others hold them; and what an attention adds becomes the largest that holds it."""

    def masks(top: Tensor, seen: Tensor) -> list[Tensor]:
        keys = (top.unsqueeze(2) & seen).any(1)
        below = top | keys
        more = below | (below.unsqueeze(2) & seen).any(1)
        return [each.view(B * T) for each in (top, keys, below, more)]

    top, seen = some(B, T), some(B, T, T)
    assert shared(masks, top, seen) == [0, 3, 3, 3]
    own = masks(top, seen)
    assert all(bool((own[3] >= each).all()) for each in own)


def test_masks_that_nothing_is_known_of_are_not_shared() -> None:
    def masks(a: Tensor, b: Tensor) -> list[Tensor]:
        return [a & b, a, b, a | b]

    assert shared(masks, some(B), some(B)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["some tokens", "last token, llama", "next token, gpt2"])
def test_a_model_has_a_few_whatever_its_depth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CPU", ())
    monkeypatch.setattr(forward, "_GPU", ("cpu",))
    monkeypatch.setattr(forward, "_WORTH_ASKING", 0)
    build, batch = CASES[name]

    def count(more: int) -> list[int]:
        traced = trace(lambda: deeper(build(), more), batch, decomposed=False)
        module, _ = traced.rewritten(skip_unneeded="loss")
        return [len(calls(module, op)) for op in (ops.linear_forward_rows, ops.needed_slots)]

    found = [count(0), count(1)]
    assert found[1][0] > found[0][0]
    assert found[0][1] == found[1][1] <= 5


def deeper(model: nn.Module, more: int) -> nn.Module:
    """A model, the last of whose layers comes so many times more."""
    layers = next(each for each in model.modules() if isinstance(each, nn.ModuleList))
    layers.extend([layers[-1]] * more)
    for each in model.modules():
        if hasattr(each, "config"):
            each.config.num_hidden_layers = len(layers)
    return model
