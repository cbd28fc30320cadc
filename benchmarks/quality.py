"""Quality: fine-tune MiniLM on movie reviews by each method, several seeds, and compare with the dense run.

Everything but the method is the same for all runs: weights, batches, Trainer. Two rivals need no sparsity at
all and belong beside it: dense with `--dynamic-padding`, and dense with a smaller batch (`dense:batch=16`),
which has the compute of a method that skips half.

Steps that follow each other meet a machine in different moods, so time is not taken from the runs themselves:
the time axis is steps x the median of alternating steps, one block of which ends the first seed.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # scripts, not a package

import _results
from _runs import CompiledTrainer, Recipe, Tokens, Variant, bundled_model, interleave, tokenize, train
from results import context, write_json
from reviews import DataError, Split, load_reviews
from variants import parse_methods

from sparse_compile import Schedule

ROOT = Path(__file__).resolve().parents[1]
DENSE = _results.BASELINE
METHODS = "dense,dense:batch=16,exact,reuse:0.9,sample:0.25/weight,vcas/solve/freq=20"

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its schedule (None: plain torch.compile) and its batch size, if not everyone's."""

    variant: Variant
    batch_size: int | None = None


@app.command()
def main(
    methods: Annotated[
        str, typer.Option(help="dense, dense:batch=N, or a method of step_time.py, separated by commas.")
    ] = METHODS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count from here.")] = 0,
    train_samples: Annotated[int, typer.Option(min=96, help="Training texts; all are 8,572.")] = 8_572,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over them.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per text, at most.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-4,
    static_padding: Annotated[
        bool, typer.Option("--static-padding/--dynamic-padding", help="To --max-length, or to the longest.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=0, help="Alternating steps that measure the speed-up.")] = 12,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Default: benchmarks/results/quality_reviews_….json")
    ] = None,
    add: Annotated[bool, typer.Option(help="Keep the runs of the results file.")] = True,
) -> None:
    """Fine-tune on reviews by each method and compare accuracy, FLOPs and time with the dense run."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    padding = "static" if static_padding else "dynamic"
    path = json_out or ROOT / "benchmarks" / "results" / f"quality_reviews_{padding}.json"
    try:
        entries = parse_entries(methods)
        split = load_reviews(ROOT / ".data")
    except (ValueError, DataError) as error:
        raise typer.BadParameter(str(error)) from error
    count = min(len(split.train), train_samples) // batch_size * batch_size
    steps = round(epochs * count / batch_size)
    split = Split(train=split.train.first(count), held_out=split.held_out, classes=split.classes)
    recipe = Recipe(
        model=str(bundled_model()),
        classes=split.classes,
        steps=steps,
        steps_per_epoch=count // batch_size,
        batch_size=batch_size,
        learning_rate=lr,
        static_padding=static_padding,
    )
    tokens = tokenize(
        recipe.model, split, curve_samples=500, max_length=max_length, static_padding=static_padding
    )
    settings = {
        "steps": steps,
        "train_samples": count,
        "held_out": len(split.held_out),
        "curve_samples": len(tokens.curve),
        "batch_size": batch_size,
        "max_length": max_length,
        "lr": lr,
        "padding": padding,
    }
    found = Found(settings, path, keep=add)
    for seed in range(first_seed, first_seed + seeds):
        run_seed(found, entries, recipe, tokens, seed, rounds if seed == first_seed else 0)
    present(found)


def parse_entries(text: str) -> list[Entry]:
    """The methods of the command line. Refuses what it does not know."""
    entries: list[Entry] = []
    for name in (part.strip() for part in text.split(",")):
        base, _, batch = name.partition(":batch=")
        if base == DENSE:
            if batch and not batch.isdigit():
                raise ValueError(f"methods: {name!r} needs a whole number as its batch")
            entries.append(
                Entry(variant=Variant(name=name, schedule=None), batch_size=int(batch or 0) or None)
            )
            continue
        (parsed,) = parse_methods(name)
        if not parsed.sparse:
            raise ValueError(f"methods: {name!r} is not compiled; allowed are dense and sparse ones")
        entries.append(Entry(variant=Variant(name=name, schedule=Schedule.from_dict(parsed.schedule))))
    if entries[0].variant.name != DENSE:
        raise ValueError(f"methods={text!r}: the first must be {DENSE!r}, which the others are held against")
    return entries


class Found:
    """The results so far, kept in their file after every run."""

    def __init__(self, settings: dict[str, Any], path: Path, *, keep: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {**context(), "settings": settings, "step_seconds": {}, "runs": []}
        if keep and path.exists():
            old = json.loads(path.read_text())
            if old.get("settings") != settings:
                raise typer.BadParameter(
                    f"{path} holds runs with other settings; give --json another file, or --no-add."
                )
            self.data |= {"step_seconds": old["step_seconds"], "runs": old["runs"]}

    def has(self, name: str, seed: int) -> bool:
        return any(run["name"] == name and run["seed"] == seed for run in self.data["runs"])

    def of(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.data["runs"] if run["name"] == name]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(run["name"] for run in self.data["runs"]))

    def save(self) -> None:
        write_json(self.path, self.data)


def run_seed(
    found: Found, entries: list[Entry], recipe: Recipe, tokens: Tokens, seed: int, rounds: int
) -> None:
    """Train what is missing of one seed, then take alternating steps of what was trained."""
    torch._dynamo.config.recompile_limit = 4 * len(entries)
    trainers: dict[str, CompiledTrainer] = {}
    for entry in entries:
        name = entry.variant.name
        if found.has(name, seed):
            continue
        own = recipe if entry.batch_size is None else replace(recipe, batch_size=entry.batch_size)
        run, trainer = train(entry.variant, own, tokens, seed)
        found.data["runs"].append(slim(run.to_dict()))
        found.save()
        if entry.batch_size is None:
            trainers[name] = trainer
    if rounds and DENSE in trainers:
        found.data["step_seconds"] = interleave(trainers, rounds)
        found.save()
    torch._dynamo.reset()


def slim(run: dict[str, Any]) -> dict[str, Any]:
    """A run as it is kept: of the report the totals and what the controller decided, without every step."""
    report = run.pop("report") or {}
    run.pop("step_seconds")
    return {**run, "totals": report.get("totals"), "history": report.get("history", [])}


def present(found: Found) -> None:
    """The table, and where the numbers are."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for heading in (
        "seeds",
        "accuracy %",
        "loss",
        "training\nFLOPs",
        "step ×",
        "at equal\ntime %",
        "to dense's",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in found.names:
        summary = summarise(found, name)
        table.add_row(
            name,
            str(summary["seeds"]),
            f"{100 * summary['accuracy']:.1f} ± {100 * summary['accuracy_std']:.1f}",
            f"{summary['loss']:.3f}",
            "–" if summary["flops"] is None else f"{summary['flops']:.0%}",
            *(
                "–" if value is None else form.format(value)
                for value, form in (
                    (summary["speedup"], "{:.2f}"),
                    (summary["accuracy_at_equal_time"], "{:.1%}"),
                    (summary["time_to_dense"], "{:.2f}"),
                )
            ),
        )
    found.data["summary"] = {name: summarise(found, name) for name in found.names}
    found.save()
    console.print(table)
    console.print(
        "mean ± standard deviation over seeds. training FLOPs: of all linears and attentions, dense = 100 %. "
        "at equal time: accuracy on the curve's texts when the fastest method had ended. to dense's: share "
        "of the dense run's time after which the mean curve reached the dense run's last accuracy.",
        style="dim",
        soft_wrap=True,
    )
    console.print(f"written to {found.path}")


def summarise(found: Found, name: str) -> dict[str, Any]:
    """Means over the seeds of one method, and how it compares with dense on a common clock."""
    runs = found.of(name)
    accuracies = [run["accuracy"] for run in runs]
    totals = [run["totals"] for run in runs if run["totals"]]
    speeds = {other: speedup(found, other) for other in found.names}
    speed, fastest = speeds[name], max((s for s in speeds.values() if s), default=None)
    curve = mean_curve(runs)
    dense = mean_curve(found.of(DENSE))
    at_equal = reached = None
    if speed is not None and fastest is not None:
        # Time in units of dense steps: step / speed-up.
        at_equal = last_before(curve, dense[-1][0] / fastest * speed)
        first = next((x for x, y in curve if y >= dense[-1][1]), None)
        reached = None if first is None else first / speed / dense[-1][0]
    return {
        "seeds": len(runs),
        "accuracy": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
        "loss": statistics.fmean(run["loss"] for run in runs),
        "flops": statistics.fmean(t["flops"] / t["flops_dense"] for t in totals) if totals else None,
        "speedup": speed,
        "accuracy_at_equal_time": at_equal,
        "time_to_dense": reached,
    }


def speedup(found: Found, name: str) -> float | None:
    """How many times faster than dense a step is, from the alternating steps; None without them."""
    seconds = found.data["step_seconds"]
    if name not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[DENSE], seconds[name], strict=True))


def mean_curve(runs: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, accuracy) averaged over the seeds; all evaluate at the same steps."""
    curves = zip(*(run["curve"] for run in runs), strict=True)
    return [(points[0]["step"], statistics.fmean(p["accuracy"] for p in points)) for points in curves]


def last_before(curve: list[tuple[int, float]], step: float) -> float | None:
    """The last accuracy of a curve at or before a step."""
    return next((y for x, y in reversed(curve) if x <= step + 0.5), None)


if __name__ == "__main__":
    app()
