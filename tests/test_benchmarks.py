"""The benchmarks' arithmetic, baseline and models at toy sizes; no time is asserted, nothing is compiled."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

import eager_resprop
import fresh_process
import results
import step_time
import timing
import variants
from presets import PRESETS, Preset

TINY: dict[str, Any] = {
    "batch": 2,
    "tokens": 5,
    "layers": 1,
    "hidden": 16,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 24,
}
RANDOM_PRESETS = [name for name in PRESETS if not name.startswith("minilm-")]


def tiny(name: str) -> Preset:
    preset = PRESETS[name]
    return replace(preset, **TINY, vocab=min(preset.vocab, 50), classes=min(preset.classes, 3))


# --- eager ReSprop -----------------------------------------------------------------------------------------


def formula_step(dy: Tensor, x: Tensor, w: Tensor, base: Tensor | None, keep: float) -> dict[str, Tensor]:
    """DESIGN 3.1 for dY [B, T, O] and X [B, T, I], in fp64, with a sort in place of a k-th value."""
    dy, x, w = dy.double(), x.double(), w.double()
    base = torch.zeros_like(dy[0]) if base is None else base.double()
    residual = dy - base
    count = round(keep * residual.numel()) if base.any() else residual.numel()
    chosen = residual.abs().flatten().topk(count).indices
    sparse = torch.zeros(residual.numel(), dtype=torch.double)
    sparse[chosen] = residual.flatten()[chosen]
    sparse = sparse.view_as(residual)
    return {
        "x": sparse @ w + base @ w,
        "w": torch.einsum("bto,bti->oi", sparse, x) + base.t() @ x.sum(0),
        "b": dy.sum((0, 1)),
    }


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_eager_resprop_equals_the_formula_over_moving_bases(ratio: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = eager_resprop.ReSpropLinear(linear, ratio, seed=3)
    base: Tensor | None = None
    for _ in range(4):
        x = torch.randn(4, 7, 6, requires_grad=True)
        dy = torch.randn(4, 7, 5)
        layer.zero_grad()
        layer(x).backward(dy)
        expected = formula_step(dy, x.detach(), linear.weight.detach(), base, 1 - ratio)
        for got, name in ((x.grad, "x"), (linear.weight.grad, "w"), (linear.bias.grad, "b")):
            torch.testing.assert_close(got, expected[name].float(), atol=1e-5, rtol=1e-5)
        base = layer.base.value
        assert base is not None
        assert any(torch.equal(base, sample) for sample in dy)


def test_eager_resprop_at_ratio_0_is_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False))
    ours = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False))
    ours.load_state_dict(model.state_dict())
    assert eager_resprop.swap_linears(ours, 0.0) == 2
    for _ in range(3):
        x = torch.randn(4, 7, 6)
        for net in (model, ours):
            net.zero_grad()
            net(x).square().mean().backward()
        for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_eager_resprop_is_dense_when_the_token_count_changes() -> None:
    linear = nn.Linear(6, 5)
    layer = eager_resprop.ReSpropLinear(linear, 0.9, seed=0)
    layer(torch.randn(4, 7, 6)).sum().backward()
    layer.zero_grad()
    x, dy = torch.randn(4, 3, 6), torch.randn(4, 3, 5)
    layer(x).backward(dy)
    torch.testing.assert_close(linear.weight.grad, torch.einsum("bto,bti->oi", dy, x))


def test_largest_entries_keeps_the_share_with_the_largest_magnitude() -> None:
    values = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 0.5, 4.0]])
    kept = eager_resprop.largest_entries(values, 0.5)
    assert torch.equal(kept, torch.tensor([[0.0, -5.0, 0.0], [-3.0, 0.0, 4.0]]))


def test_swap_leaves_other_modules_and_shares_parameters() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))
    weight = model[0].weight
    assert eager_resprop.swap_linears(model, 0.5) == 2
    assert isinstance(model[0], eager_resprop.ReSpropLinear)
    assert model[0].weight is weight
    assert isinstance(model[1], nn.LayerNorm)
    assert isinstance(model[2][0], eager_resprop.ReSpropLinear)
    with pytest.raises(ValueError, match=r"ratio=1\.0: allowed is 0 <= ratio < 1"):
        eager_resprop.swap_linears(model, 1.0)


# --- arithmetic --------------------------------------------------------------------------------------------


def site(
    name: str, *, kept: float, products: int = 2, rewritten: bool = True, **other: Any
) -> dict[str, Any]:
    """A report's site of shape (10, 20, 30), of which `kept` of the backward is executed."""
    forward = 2 * 10 * 20 * 30
    return {
        "name": name,
        "kind": "linear",
        "shape": [10, 20, 30],
        "rewritten": rewritten,
        "flops_forward_dense": forward,
        "flops_forward": forward,
        "flops_backward_dense": products * forward,
        "flops_backward": products * forward * kept,
        "flops_dense": forward + products * forward,
        "flops": forward + products * forward * kept,
        **other,
    }


def test_spread_and_paired_ratios() -> None:
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert timing.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    # Within rounds: the slow second round halves nothing.
    assert timing.paired_ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])["median"] == 2.0
    with pytest.raises(ValueError, match="no values"):
        timing.spread([])


def test_rotated_gives_everyone_every_place_and_both_neighbours() -> None:
    orders = [timing.rotated("abc", turn) for turn in range(6)]
    assert [order[0] for order in orders[:3]] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    followers = {(a, b) for order in orders for a, b in itertools.pairwise(order)}
    assert followers == {(a, b) for a in "abc" for b in "abc" if a != b}


def test_ideal_saving_is_the_skipped_share_of_the_sites_own_matmuls() -> None:
    seconds = {(10, 20, 30): 8.0}  # dX and dW together
    assert timing.ideal_saving([site("a", kept=0.25)], seconds) == pytest.approx(6.0)
    assert timing.ideal_saving([site("a", kept=0.25, products=1)], seconds) == pytest.approx(3.0)
    assert timing.ideal_saving([site("a", kept=0.25, products=4)], seconds) == pytest.approx(12.0)
    assert timing.ideal_saving([site("a", kept=1.0), site("b", kept=0.5)], seconds) == pytest.approx(4.0)
    assert timing.ideal_saving([site("a", kept=0.5, rewritten=False)], seconds) == 0.0
    assert timing.ideal_saving([site("a", kept=0.5, kind="block", shape=[3])], seconds) == 0.0


@pytest.mark.parametrize("products", [4, 5])
def test_ideal_saving_of_an_attention_is_the_skipped_share_of_its_own_backward(products: int) -> None:
    shape = (2, 3, 8, 4, products)
    forward = 4 * 2 * 3 * 8 * 8 * 4
    attention = {"name": "att", "kind": "attention", "shape": [2, 3, 8, 4], "rewritten": True}
    attention |= {"flops_forward_dense": forward, "flops_backward_dense": products * forward / 2}
    attention |= {"flops_dense": forward + products * forward / 2}
    attention |= {"flops": forward + products * forward / 2 * 0.25}
    assert timing.shape_of(attention) == shape
    assert timing.ideal_saving([attention], {shape: 8.0}) == pytest.approx(6.0)
    timer = timing.DenseTimer()
    timer.add({shape})
    assert timer.round({shape})[shape] > 0


def test_last_step_undoes_the_reports_average() -> None:
    steps = [site("a", kept=kept) for kept in (1.0, 0.5, 0.2)]  # dense first, as reuse is

    def average(count: int) -> list[dict[str, Any]]:
        return [{**steps[0], "flops": sum(s["flops"] for s in steps[:count]) / count}]

    (last,) = timing.last_step(average(2), average(3), steps=3)
    assert last["flops"] == pytest.approx(steps[2]["flops"])
    assert last["flops_dense"] == pytest.approx(steps[2]["flops_dense"])


def measurements(sites: list[dict[str, Any]]) -> timing.Measurements:
    """Two rounds: a dense step takes 10 s and then 20 s, ours 7 s and 14 s; the matmuls 4 s and 8 s."""
    dense, ours = [10.0, 20.0], [7.0, 14.0]
    return timing.Measurements(
        seconds={
            "dense": dict.fromkeys(variants.PHASES, dense),
            "ours": dict.fromkeys(variants.PHASES, ours),
        },
        sites={"dense": [[], []], "ours": [sites, sites]},
        dense=[{(10, 20, 30): 4.0}, {(10, 20, 30): 8.0}],
        losses={"dense": 1.0, "ours": 1.5},
    )


def test_summary_pairs_rounds() -> None:
    summary = measurements([site("a", kept=0.0)]).summary("ours")
    assert summary["speedup"]["step"]["median"] == pytest.approx(10 / 7)
    assert summary["seconds"]["step"]["median"] == pytest.approx(10.5)
    assert summary["merit"]["realised"]["median"] == pytest.approx(3 / 4)  # and 6 / 8
    assert summary["merit"]["backward_flops_executed"] == 0.0
    assert summary["loss"] == 1.5
    assert measurements([]).summary("dense")["merit"] is None


def test_no_realised_over_ideal_where_it_would_mean_nothing() -> None:
    nothing = measurements([site("a", kept=0.999)]).summary("ours")["merit"]
    assert nothing["realised"] is None
    assert nothing["why_not"] == "there was next to nothing to skip"


def test_fresh_process_ratios_are_of_the_least() -> None:
    measured = {"dense": {"seconds": [4.0, 2.0, 9.0]}, "exact": {"seconds": [3.0, 5.0, 4.0]}}
    summary = fresh_process.summarise(measured, "seconds")
    assert summary["exact"]["ratio"] == pytest.approx(1.5)
    assert summary["exact"]["seconds"]["median"] == 4.0


# --- presets, methods, and a round -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM_PRESETS)
def test_presets_train_at_a_tiny_size(name: str) -> None:
    preset = tiny(name)
    model = preset.model()
    batches = preset.batches(preset, 2, 0)
    assert len(batches) == 2
    for batch in batches:
        model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    again = preset.model()
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_every_row_of_bert_base_has_a_loss() -> None:
    preset = tiny("bert-base")
    (batch,) = preset.batches(preset, 1, 0)
    rows: list[Tensor] = []
    model: Any = preset.model()
    model.classifier.register_full_backward_hook(lambda _, __, grad_out: rows.append(grad_out[0]))
    model(**batch).loss.backward()
    assert rows[0].abs().sum(-1).gt(0).all()


def test_presets_say_their_sizes_and_refuse_fixed_ones() -> None:
    preset = PRESETS["bert-base"].resized(batch=3, layers=None)
    assert preset.sizes()["batch"] == 3
    assert preset.sizes()["layers"] == 2
    with pytest.raises(ValueError, match="layers=2: preset 'minilm-reviews' has layers 6"):
        PRESETS["minilm-reviews"].resized(layers=2)


def test_pruning_is_parsed() -> None:
    plain, joined = variants.parse_methods("prune:0.9,prune:0.5/int8/plain+reuse:0.9")
    assert plain.schedule == {"saved_activations": {"method": "prune_saved", "ratio": 0.9}}
    assert joined.schedule["saved_activations"] == {
        "method": "prune_saved",
        "ratio": 0.5,
        "values": "int8",
        "as_published": True,
    }
    assert joined.schedule["linear"]["method"] == "reuse"
    for wrong in ("prune", "prune:", "prune:x", "prune:0.5/int8/fp16"):
        with pytest.raises(ValueError, match="methods: "):
            variants.parse_methods(wrong)


def test_methods_are_parsed() -> None:
    exact, reuse, pattern, sample, eager = variants.parse_methods(
        "exact, reuse:0.9/element/sample/refresh=2,reuse:2:4,"
        "blocks-sample:0.5+sample:0.25/weight/clip=3,eager-resprop:0.5"
    )
    assert exact.sparse
    assert exact.compiled
    assert reuse.schedule == {
        "linear": {
            "method": "reuse",
            "ratio": 0.9,
            "granularity": "element",
            "source": "sample",
            "refresh_every": 2,
        }
    }
    assert pattern.schedule["linear"]["ratio"] == "2:4"
    assert sample.schedule == {
        "blocks": {"method": "sample", "keep": 0.5},
        "linear": {"method": "sample", "keep": 0.25, "gradients": "weight", "clip": 3.0},
    }
    assert not eager.sparse
    assert not eager.compiled
    assert variants.parse_methods("") == []
    for preset in PRESETS.values():
        assert variants.parse_methods(preset.methods)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", r"'magic' is not known; allowed are exact, \[FIELD-\]reuse:RATIO"),
        ("reuse", "'reuse' is not known"),
        ("reuse:x", "'reuse:x' needs a number, not 'x'"),
        ("eager-resprop:1.0", r"ratio 1\.0; allowed is 0 <= ratio < 1"),
        ("head-reuse:0.5", "'head-reuse:0.5' is not known"),
        ("sample:0.5/row", "has the word 'row'; allowed are"),
        ("reuse:0.5/column", "has the word 'column'; allowed are"),
        ("eager-resprop:2:4", "needs a number, not"),
        ("exact,exact", "each method may be named once"),
    ],
)
def test_unknown_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants.parse_methods(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nosuch"], ["'nosuch'", "minilm-reviews"]),
        (["--optimizer", "lion"], ["'lion'", "adamw"]),
        (["--methods", "magic"], ["'magic'"]),
        (["--preset", "minilm-reviews", "--layers", "2"], ["layers=2"]),
        (["--all", "--json", "out.json"], ["--all"]),
    ],
)
def test_the_command_refuses_wrong_input(arguments: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(step_time.app, arguments)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


def test_a_round_of_eager_variants(tmp_path: Path) -> None:
    preset = tiny("bert-base")
    model = preset.model()
    chosen = variants.parse_methods("eager,eager-resprop:0.5")
    trainees = [variants.make_trainee(v, model, optimizer="adamw", lr=1e-3) for v in chosen]
    ticks: list[str] = []
    measured = timing.interleave(
        trainees, preset.batches(preset, 2, 0), rounds=3, warmup=2, tick=ticks.append
    )
    assert len(ticks) == 2 * (3 + 2)
    summary = measured.summary("eager-resprop:0.5", dense="eager")
    assert summary["merit"] is None
    assert math.isfinite(summary["loss"])
    assert len(measured.seconds["eager"]["backward"]) == 3
    path = tmp_path / "new" / "out.json"
    results.write_json(path, {**results.context(), "nan": float("nan"), "eager": summary})
    written = json.loads(path.read_text())
    assert written["nan"] is None
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["versions"]["torch"]
