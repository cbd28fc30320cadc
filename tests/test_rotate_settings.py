"""The settings of sparse weight gradients, and which layers they choose; refusals by their sentence."""

import json
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
import zoo
from reference import MLP, square_loss
from torch import nn

from sparse_compile import PruneSaved, RotatedTopK, Sample, Schedule, sparse_backend
from sparse_compile.optim import SparseAdamW, freeze_unselected, sparse
from sparse_compile.selection import chosen_layers


def refused(*parts: str, error: type[Exception] = ValueError):
    """Expects an error whose sentence contains all `parts`, in order."""
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "1", True, None, [0.1]])
def test_density_is_a_number_above_0_up_to_1(density):
    with refused(f"RotatedTopK.density is {density!r}", "a number in (0, 1]"):
        RotatedTopK(density)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_calibration_steps_are_an_int_from_1(steps):
    with refused(f"RotatedTopK.calibration_steps is {steps!r}", "an int >= 1"):
        RotatedTopK(0.1, steps)


@pytest.mark.parametrize("candidates", [0, 0.9, float("inf"), float("nan"), "4", True])
def test_candidates_are_a_finite_number_from_1(candidates):
    with refused(f"RotatedTopK.candidates is {candidates!r}", "a finite number >= 1"):
        RotatedTopK(0.1, candidates=candidates)


@pytest.mark.parametrize("sides", ["long", None, 1])
def test_sides_are_short_or_both(sides):
    with refused(f"RotatedTopK.sides is {sides!r}", '"short" or "both"'):
        RotatedTopK(0.1, sides=sides)


@pytest.mark.parametrize("every", [0, 1.5, True, "2"])
def test_choose_every_is_none_or_an_int_from_1(every):
    with refused(f"RotatedTopK.choose_every is {every!r}", "an int >= 1"):
        RotatedTopK(0.1, choose_every=every)


@pytest.mark.parametrize("where", ["", [], (), ["a", ""], 3, [3]])
def test_where_is_none_or_patterns(where):
    with refused(f"RotatedTopK.where is {where!r}", "None, a pattern of module paths or a list of them"):
        RotatedTopK(0.1, where=where)


def test_settings_are_frozen_and_hashable():
    method = RotatedTopK(1, where=["a", "b"])
    assert method == RotatedTopK(1.0, where=("a", "b"))
    assert hash(method) == hash(RotatedTopK(1.0, where=("a", "b")))
    assert RotatedTopK(0.1, where="a").where == ("a",)
    with pytest.raises(FrozenInstanceError):
        method.density = 0.5


@pytest.mark.parametrize(
    "method",
    [RotatedTopK(0.01), RotatedTopK(0.5, 3, candidates=2, sides="both", choose_every=7, where=["a.*", "b"])],
)
def test_schedule_survives_json(method):
    schedule = Schedule(weight_gradients=method, saved_activations=PruneSaved(0.5), total_steps=100)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.at(50).weight_gradients == method


def test_preset_has_the_settings_of_its_paper():
    assert Schedule.sparse_grad() == Schedule(weight_gradients=RotatedTopK(0.01, 30))
    schedule = Schedule.sparse_grad(0.1, calibration_steps=5, total_steps=9, exclude="head")
    assert schedule == Schedule(weight_gradients=RotatedTopK(0.1, 5), total_steps=9, exclude="head")


@pytest.mark.parametrize("fraction", [-0.1, "0", None, True])
def test_fraction_must_be_a_number_from_0(fraction):
    with refused("The fraction in RotatedTopK.at is", "a number >= 0"):
        RotatedTopK(0.1).at(fraction)


@pytest.mark.parametrize("steps", [30, 29])
def test_calibration_longer_than_training_is_refused(steps):
    with refused("Schedule.weight_gradients's calibration_steps is 30", f"an int below total_steps, {steps}"):
        Schedule.sparse_grad(total_steps=steps)
    assert Schedule.sparse_grad(total_steps=31).total_steps == 31
    assert Schedule.sparse_grad(1.0, total_steps=steps).total_steps == steps  # nothing is calibrated


@pytest.mark.parametrize("field", ["linear", "blocks"])
def test_variance_control_measures_whole_gradients(field):
    with refused(
        "Schedule.weight_gradients is RotatedTopK(", "Sample.adaptive() measures the variance of whole"
    ):
        Schedule(weight_gradients=RotatedTopK(0.1), **{field: Sample.adaptive()})


@pytest.mark.parametrize("value", [0.01, RotatedTopK, {"density": 0.1}, PruneSaved(0.5)])
def test_what_is_no_method_is_refused(value):
    with refused("Schedule.weight_gradients is ", "None or RotatedTopK"):
        Schedule(weight_gradients=value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", ["intermediate.dense", "output.dense"]),
        ("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
        ("llama", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("t5", ["layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wi"]),
    ],
)
def test_mlps_are_found_in_real_models(name, expected):
    model, _ = zoo.make(name, torch.float32)
    found = chosen_layers(model, RotatedTopK(0.1))
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.dim() == 2}
    assert all(
        any(layer.endswith(f".{end}") for end in [*expected, "layer.2.DenseReluDense.wo"]) for layer in found
    )
    for end in expected:
        here = {layer for layer in matrices if layer.endswith(f".{end}") and "attention.output" not in layer}
        assert here
        assert here <= found


class Adapted(nn.Module):
    """A block with an MLP, a bottleneck, and an attention whose projections widen and narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q": nn.Linear(8, 32), "o": nn.Linear(32, 8), "k": nn.Linear(8, 4)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
        self.adapter = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(2, 8)})
        self.square = nn.Linear(8, 8)


def test_attention_and_bottlenecks_are_no_mlps():
    model = nn.Module()
    model.blocks = nn.ModuleList([Adapted()])
    model.words = nn.Embedding(9, 8)
    assert chosen_layers(model, RotatedTopK(0.1)) == {"blocks.0.mlp.up", "blocks.0.mlp.down"}
    assert chosen_layers(model, RotatedTopK(0.1, where=["self_attn", "*.square"])) == {
        *(f"blocks.0.self_attn.{name}" for name in "qok"),
        "blocks.0.square",
    }


def test_model_without_mlps_needs_where():
    with refused("Schedule.weight_gradients found no MLP", "name layers by where=", "'0', '1'"):
        chosen_layers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), RotatedTopK(0.1))


def test_where_that_matches_nothing_is_refused_before_compiling():
    model = MLP()
    name = next(n for n, p in model.named_parameters() if p.dim() == 2).removesuffix(".weight")
    backend = sparse_backend(Schedule.sparse_grad(where=f"{name}x"), compiler="aot_eager")
    with refused(f"where='{name}x', which matches none of", f"near names: '{name}'"):
        torch.compile(model, backend=backend)(torch.randn(2, 5, 6))


@pytest.mark.parametrize("schedule", [Schedule.exact(), None])
def test_optimizer_needs_a_backend_with_weight_gradients(schedule):
    backend = None if schedule is None else sparse_backend(schedule)
    with refused("SparseAdamW.backend is ", "weight_gradients=RotatedTopK(...)"):
        SparseAdamW(MLP().parameters(), backend)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "1"])
@pytest.mark.parametrize("field", ["kept_scale", "max_grad_norm"])
def test_settings_of_the_optimizer_are_checked(field, value):
    backend = sparse_backend(Schedule.sparse_grad())
    with refused(f"SparseAdamW.{field} is {value!r}", "a finite number > 0"):
        SparseAdamW(MLP().parameters(), backend, **{field: value})


def test_sparse_takes_classes_of_optimizers():
    assert sparse(torch.optim.SGD).__name__ == "SparseSGD"
    assert sparse(torch.optim.SGD) is sparse(torch.optim.SGD)
    with refused("The optimizer in sparse is ", "a class of optimizers"):
        sparse(MLP)


def test_freeze_refuses_patterns_of_nothing():
    with refused("freeze_unselected.keep has the pattern 'clasifier'", "near names: 'classifier'"):
        model = zoo.make("bert", torch.float32)[0]
        model.classifier = nn.Linear(2, 2)
        freeze_unselected(model, RotatedTopK(0.1), keep="clasifier")


class Run:
    def __init__(self, **settings) -> None:
        self.model = MLP()
        layers = [n.removesuffix(".weight") for n, p in self.model.named_parameters() if p.dim() == 2]
        settings = {"density": 0.1, "calibration_steps": 2, "where": layers} | settings
        self.backend = sparse_backend(Schedule.sparse_grad(**settings), compiler="aot_eager")
        self.compiled = torch.compile(self.model, backend=self.backend)

    def backwards(self, count: int) -> None:
        for _ in range(count):
            square_loss(self.compiled(torch.randn(6, 5, 6))).backward()

    def train(self, optimizer, steps: int) -> None:
        for _ in range(steps):
            self.backwards(1)
            optimizer.step()


def test_optimizer_that_never_stepped_has_nothing_to_merge():
    run = Run()
    optimizer = SparseAdamW(run.model.parameters(), run.backend)
    with refused("SparseAdamW.merge() before its first step()", error=RuntimeError):
        optimizer.merge()


def test_optimizer_that_never_steps_is_warned_about():
    run = Run()
    SparseAdamW(run.model.parameters(), run.backend)
    with pytest.warns(UserWarning, match="100 backwards and no step"):
        run.backwards(101)


def test_another_optimizer_is_refused_at_the_second_step():
    run = Run()
    with refused(
        "needs an optimizer of sparse_compile.optim, and after 1 steps none holds", error=RuntimeError
    ):
        run.train(torch.optim.AdamW(run.model.parameters()), 2)


def test_any_optimizer_will_do_at_density_1():
    run = Run(density=1.0)
    run.train(torch.optim.AdamW(run.model.parameters()), 3)
    assert run.backend.step == 3
