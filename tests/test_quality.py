"""benchmarks/quality.py at smoke size, and its arithmetic on curves made by hand."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # scripts, not packages
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _runs
import quality
import quality_tasks
from texts import cut

from sparse_compile import Sample, Schedule

# --- arithmetic --------------------------------------------------------------------------------------------


def task(goal: str) -> Any:
    return SimpleNamespace(name="made up", goal=goal, settings={"steps": 4})


def made_up(path: Path, goal: str, curves: dict[str, list[list[float]]], seconds: dict[str, Any]) -> Any:
    """Results whose curves have a point after every second step."""
    found = quality.Found(task(goal), path, keep=False)
    for name, seeds in curves.items():
        for seed, values in enumerate(seeds):
            points = [{"step": 2 * i + 2, goal: value} for i, value in enumerate(values)]
            run = {"name": name, "seed": seed, "accuracy": 0.5, "loss": values[-1], "curve": points}
            found.data["runs"].append({**run, "totals": {"flops": 50, "flops_dense": 100}})
    found.data["step_seconds"] = seconds
    return found


def test_a_loss_is_compared_at_equal_steps_and_at_equal_time(tmp_path: Path) -> None:
    curves = {"dense": [[3.0, 2.0], [3.2, 2.2]], "sample:0.5": [[3.1, 2.05], [3.1, 2.05]]}
    found = made_up(tmp_path / "x.json", "loss", curves, {"dense": [2.0, 4.0], "sample:0.5": [1.0, 2.0]})
    dense, sample = (quality.summarise(found, name) for name in curves)
    assert dense["loss"] == pytest.approx(2.1)
    assert dense["loss_std"] == pytest.approx(0.1414, abs=1e-4)
    assert sample["speedup"] == 2.0
    assert sample["flops"] == 0.5
    # Sampling ends after the time of two dense steps, and it has reached dense's 2.1 by then.
    assert dense["at_equal_time"] == pytest.approx(3.1)
    assert sample["at_equal_time"] == pytest.approx(2.05)
    assert sample["time_to_dense"] == pytest.approx(0.5)
    assert dense["time_to_dense"] == 1.0


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("dense", 1.0),
        ("dense:batch=16", 0.5),
        ("dense:batch=8:steps=8", 0.5),
        ("dense:padding=dynamic", None),
        ("sample:0.5", 0.5),
        ("sample:0.5:steps=5", 0.625),
    ],
)
def test_flops_are_those_of_the_whole_training(name: str, flops: float | None, tmp_path: Path) -> None:
    found = made_up(tmp_path / "x.json", "loss", {name: [[2.0, 1.0]]}, {})
    found.data["settings"] = {"steps": 4, "batch_size": 32}
    if name.startswith("dense"):
        found.data["runs"][0]["totals"] = None
    assert quality.training_flops(found, name) == flops


def test_a_goal_that_is_missed_is_none_and_without_rounds_there_is_no_clock(tmp_path: Path) -> None:
    curves = {"dense": [[0.6, 0.8]], "exact": [[0.6, 0.7]]}
    found = made_up(tmp_path / "x.json", "accuracy", curves, {"dense": [1.0], "exact": [1.0]})
    assert quality.summarise(found, "exact")["time_to_dense"] is None
    assert quality.summarise(found, "dense")["time_to_dense"] == 1.0
    found.data["step_seconds"] = {}
    summary = quality.summarise(found, "exact")
    assert summary["speedup"] is summary["at_equal_time"] is summary["time_to_dense"] is None


def test_steps_that_measure_are_counted(tmp_path: Path) -> None:
    seconds = [1.0] * 20
    seconds[3] = 1.5  # step 4
    history = [{"step": 0}, {"step": 4}, {"step": 20}, {"step": 40}]
    assert quality.probing(history, seconds) == pytest.approx(0.5 / 20)
    assert quality.probing([], seconds) == 0.0
    curves = {"dense": [[0.6, 0.8]], "vcas": [[0.6, 0.7]]}
    found = made_up(tmp_path / "x.json", "accuracy", curves, {"dense": [3.0], "vcas": [1.0]})
    found.data["runs"][1]["probing"] = 0.5
    assert quality.summarise(found, "vcas")["speedup"] == pytest.approx(2.0)


# --- the command line's methods ----------------------------------------------------------------------------


def test_methods_may_have_a_batch_and_steps_of_their_own() -> None:
    dense, cut, sample, padded = quality.parse_entries(
        "dense,dense:batch=8:steps=1000,sample:0.25:steps=900,dense:padding=dynamic"
    )
    assert (dense.schedule, dense.own()) == (None, {})
    assert (cut.schedule, cut.own()) == (None, {"batch_size": 8, "steps": 1000})
    assert (sample.schedule, sample.own()) == (Schedule(linear=Sample(0.25)), {"steps": 900})
    assert (padded.schedule, padded.own()) == (None, {"static_padding": False})


@pytest.mark.parametrize("task", quality.METHODS)
def test_the_methods_taken_by_default_are_known(task: str) -> None:
    assert len(quality.parse_entries(quality.METHODS[task])) == {"reviews": 10, "shakespeare": 6}[task]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("exact,dense", "the first must be 'dense'"),
        ("dense,eager", "'eager' is not compiled; allowed are dense and sparse ones"),
        ("dense,dense:batch=few", "needs a whole number as its batch or steps"),
        ("dense,dense:padding=8", "needs dynamic or static as its padding"),
        ("dense,fast", "'fast' is not known"),
    ],
)
def test_wrong_methods_are_refused(methods: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality.parse_entries(methods)


# --- pretraining, whole ------------------------------------------------------------------------------------


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = random.Random(0)
    text = "".join("".join(draw.choices("abcdef ", k=30)) + "\n" for _ in range(300))
    corpus = cut("some text", text)
    monkeypatch.setattr(quality_tasks, "load_shakespeare", lambda folder: corpus)
    monkeypatch.setattr(quality_tasks, "DATA", tmp_path)
    monkeypatch.setattr(_runs, "COMPILER", "aot_eager")  # without Inductor


def invoke(path: Path, *options: str) -> Any:
    sizes = "--steps 4 --batch-size 4 --max-length 16 --layers 1 --hidden 64 --rounds 2"
    where = ["--task", "shakespeare", "--json", str(path)]
    return CliRunner().invoke(quality.app, [*where, *sizes.split(), *options])


@pytest.mark.usefixtures("_tiny")
def test_pretraining_by_every_method_and_more_seeds_later(tmp_path: Path) -> None:
    methods = ["--methods", "dense,dense:batch=2:steps=6,sample:0.5,vcas/solve/freq=2"]
    path = tmp_path / "quality.json"
    done = invoke(path, *methods, "--seeds", "1")
    assert done.exit_code == 0, done.output
    first = json.loads(path.read_text())
    names = ["dense", "dense:batch=2:steps=6", "sample:0.5", "vcas/solve/freq=2"]
    assert [run["name"] for run in first["runs"]] == names
    assert [run["curve"][-1]["step"] for run in first["runs"]] == [4, 6, 4, 4]
    assert list(first["step_seconds"]) == names
    assert all(len(seconds) == 2 for seconds in first["step_seconds"].values())
    assert 0.4 < first["summary"]["sample:0.5"]["flops"] < 0.9
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    done = invoke(path, "--methods", "dense,sample:0.5", "--seeds", "1", "--first-seed", "1")
    assert done.exit_code == 0, done.output
    more = json.loads(path.read_text())
    assert more["runs"][:4] == first["runs"]
    assert [(run["name"], run["seed"]) for run in more["runs"][4:]] == [("dense", 1), ("sample:0.5", 1)]
    assert more["summary"]["dense"]["seeds"] == 2
    assert more["summary"]["dense"]["loss_std"] > 0

    done = invoke(path, "--methods", "dense", "--lr", "0.5")
    assert done.exit_code == 2
    assert "other settings" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "poems"], "--task is 'poems'"),
        (["--hidden", "65"], "--hidden is 65"),
        (["--methods", "dense,dense:padding=dynamic"], "'dense:padding=dynamic' sets the padding"),
    ],
)
def test_bad_arguments_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    done = invoke(tmp_path / "x.json", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
