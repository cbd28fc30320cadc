"""What the example hands over: a table for the terminal and a JSON file with everything behind it."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from _runs import Point, Run
from rich import box
from rich.table import Table

BASELINE = "dense"


@dataclass(kw_only=True, slots=True)
class Results:
    """All finished runs of one invocation, and the seconds of the interleaved rounds by name; `goal` is what
    a run is judged by."""

    settings: dict[str, Any]
    goal: Literal["accuracy", "loss"] = "accuracy"
    runs: list[Run] = field(default_factory=list)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The variants that have a finished run, in the order they ran."""
        return list(dict.fromkeys(run.name for run in self.runs))

    def of(self, name: str) -> list[Run]:
        """The runs of one variant, one per seed."""
        return [run for run in self.runs if run.name == name]

    def speedup(self, name: str) -> float | None:
        """How many times faster than dense a step is, from the interleaved rounds; None without them."""
        if name not in self.rounds:
            return None
        pairs = zip(self.rounds[BASELINE], self.rounds[name], strict=True)
        return statistics.median(dense / ours for dense, ours in pairs)

    def seconds_to_dense(self, name: str) -> list[float | None]:
        """For each seed, the training time until it was as good as the dense run of that seed at its end."""
        ends = {run.seed: self._badness(run.curve[-1]) for run in self.of(BASELINE)}
        return [self._seconds_to(run, ends[run.seed]) for run in self.of(name)]

    def loss_at_equal_time(self, name: str) -> list[float | None]:
        """For each seed, the last loss of the curve by the time at which the fastest run ended; None where
        the curve has no point that early."""
        end = min(run.curve[-1].seconds for run in self.runs)
        return [
            next((point.loss for point in reversed(run.curve) if point.seconds <= end), None)
            for run in self.of(name)
        ]

    def _seconds_to(self, run: Run, badness: float) -> float | None:
        return run.seconds_to(lambda point: self._badness(point) <= badness)

    def _badness(self, point: Point) -> float:
        return point.loss if self.goal == "loss" else -point.accuracy

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "machine": machine(),
            "versions": versions(),
            "summary": {name: self._summary(name) for name in self.names},
            "interleaved_step_seconds": self.rounds,
            "runs": [run.to_dict() for run in self.runs],
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n", encoding="utf-8")

    def _summary(self, name: str) -> dict[str, Any]:
        runs = self.of(name)
        return {
            "accuracy": _mean_and_spread([run.accuracy for run in runs]),
            "loss": _mean_and_spread([run.loss for run in runs]),
            "median_step_seconds": _mean_and_spread([run.median_step for run in runs]),
            "speedup": self.speedup(name),
            "compile_seconds": [run.compile_seconds for run in runs],
            f"seconds_to_dense_{self.goal}": self.seconds_to_dense(name),
            "loss_at_equal_time": self.loss_at_equal_time(name),
        }


def table(results: Results, title: str) -> Table:
    """The comparison, one row per variant; more than one seed gives mean ± standard deviation."""
    shown = Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False, collapse_padding=True)
    shown.add_column("run", no_wrap=True)
    headings = ["accuracy\n%", "loss\n", "step\nms", "speed-up\n", "compile\ns"]
    headings.append(f"to dense's\n{results.goal}, s")
    if results.goal == "loss":
        headings.append("loss at\nequal time")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name in results.names:
        runs = results.of(name)
        speedup = results.speedup(name)
        cells = [
            _spread_text([100 * run.accuracy for run in runs], "{:.1f}"),
            _spread_text([run.loss for run in runs], "{:.3f}"),
            _spread_text([1000 * run.median_step for run in runs], "{:.0f}"),
            "–" if speedup is None else f"{speedup:.2f}×",
            f"{runs[0].compile_seconds:.0f}",
            _over_seeds(results.seconds_to_dense(name), "{:.0f}", "not reached"),
        ]
        if results.goal == "loss":
            cells.append(_over_seeds(results.loss_at_equal_time(name), "{:.3f}", "–"))
        shown.add_row(name, *cells)
    return shown


def footnotes(results: Results, unit: str) -> list[str]:
    """What each column of the table means, in a sentence; the `unit` is what is held out."""
    settings = results.settings
    rounds = len(results.rounds.get(BASELINE, ()))
    notes = [
        f"accuracy, loss: on {settings['held_out']} held-out {unit}, after {settings['steps']} steps.",
        "step: median of one run after the other; compile and evaluation are not in it.",
        f"speed-up: dense step / step, median of {rounds} rounds of alternating steps."
        if rounds
        else "speed-up: not measured, for lack of interleaved rounds.",
        "compile: what the first step took on top, first seed; less if caches are warm.",
        f"to dense's {results.goal}: training time until the curve ({settings['curve_samples']} held-out "
        f"{unit}) reaches dense's last value.",
    ]
    if results.goal == "loss":
        notes.append("loss at equal time: the curve's last one by the time at which the fastest run ended.")
    return notes


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "sparse_compile")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _spread_text(values: list[float], number: str) -> str:
    both = _mean_and_spread(values)
    text = number.format(both["mean"])
    return text if len(values) == 1 else f"{text}±{number.format(both['std'])}"


def _over_seeds(values: list[float | None], number: str, none: str) -> str:
    """Mean of the seeds that have a value, and how many have one if not all."""
    present = [value for value in values if value is not None]
    if not present:
        return none
    share = "" if len(present) == len(values) else f" ({len(present)} of {len(values)})"
    return f"{number.format(statistics.fmean(present))}{share}"
