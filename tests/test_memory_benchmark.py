"""benchmarks/memory.py at toy sizes: what it counts, and what it refuses. No time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

import memory
import memory_process


@pytest.mark.parametrize(
    ("method", "parsed"),
    [
        ("dense", ("dense", 0.0, "same")),
        ("budget:0.5", ("budget", 0.5, "same")),
        ("prune:0.9", ("prune", 0.9, "same")),
        ("prune:0.9/int8", ("prune", 0.9, "int8")),
    ],
)
def test_methods(method, parsed):
    assert memory_process.parse(method) == parsed


@pytest.mark.parametrize(
    "method", ["magic", "prune", "prune:x", "prune:2", "reuse:0.9/int8", "prune:0.9/fp8", "dense:1"]
)
def test_unknown_methods_are_refused(method):
    done = CliRunner().invoke(memory.app, ["--methods", f"dense,{method}"])
    assert done.exit_code == 2
    assert "is not known" in done.output


def test_unknown_preset_is_refused():
    done = CliRunner().invoke(memory.app, ["--preset", "bert-giant"])
    assert done.exit_code == 2
    assert "allowed are bert-base" in " ".join(done.output.replace("│", " ").split())


class Saves(torch.autograd.Function):
    """As a compiled graph does: saves a parameter, an input, and two views of one tensor."""

    @staticmethod
    def forward(ctx, x, weight):
        y = x * weight
        ctx.save_for_backward(x, weight, y, y.view(-1)[:3])
        return y * 2

    @staticmethod
    def backward(ctx, dy):
        return dy, dy


def test_saved_bytes_counts_each_storage_once_and_not_what_is_there_anyway():
    x, weight = torch.randn(4, 8), nn.Parameter(torch.randn(4, 8))
    loss = Saves.apply(Saves.apply(x, weight), weight).sum()
    # The first saves its product; the second saves its own, and its input, which is no input of the model.
    assert memory_process.saved_bytes(loss, [x, weight]) == 3 * 4 * 8 * 4


def test_summary_is_relative_to_dense():
    measured = {"dense": [{"peak": 10.0}, {"peak": 8.0}], "prune:0.9": [{"peak": 4.0}, {"peak": 6.0}]}
    found = memory.summarise(measured)
    assert found["prune:0.9"]["peak"] == {"least": 4.0, "median": 5.0, "q1": 4.5, "q3": 5.5, "ratio": 0.5}
