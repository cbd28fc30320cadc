"""Quality: train by each method, several seeds, and compare with the dense run.

    --task reviews       fine-tune MiniLM on movie reviews; judged by accuracy
    --task shakespeare   pretrain a small byte-level GPT on Shakespeare; judged by validation loss

Everything but the method is the same for all runs: weights, batches, Trainer. Two rivals need no sparsity at
all and belong beside it: dense padded to the longest review of each batch (`dense:padding=dynamic`), and
dense with a smaller batch (`dense:batch=16`), which has the compute of a method that skips half. `:steps=N`
lets a method train longer.

Steps that follow each other meet a machine in different moods, so time is not taken from the runs themselves:
the time axis is steps x the median of alternating steps, one block of which ends the first seed.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Annotated, Any

import quality_plot
import torch
import typer
from quality_tasks import DENSE, DataError, Entry, Task, interleave, quieten, reviews, shakespeare
from results import context, write_json
from rich import box
from rich.console import Console
from rich.table import Table
from variants import parse_methods

from sparse_compile import Schedule

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "reviews": "dense,dense:padding=dynamic,dense:batch=16,exact,reuse:0.9,sample:0.25,sample:0.25/clip=2,"
    "sample:0.1,sample:0.1/clip=2,vcas/solve/freq=20",
    "shakespeare": "dense,dense:batch=8:steps=1000,exact,reuse:0.9,sample:0.25,vcas/solve/freq=20",
}
OWN = re.compile(r":(batch|steps|padding)=(\w*)")

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    task: Annotated[str, typer.Option(help="reviews or shakespeare.")] = "reviews",
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas, dense first: dense, exact, reuse:RATIO, sample:KEEP[/clip=C], "
            "vcas[/solve][/freq=N], prune:RATIO, …, as step_time.py --help lists them; each with :batch=N, "
            ":steps=N or :padding=dynamic.",
            show_default="dense, its two rivals, and one or two of each method",
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count from here.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="Samples per step; 0: 32 or 16.")] = 0,
    max_length: Annotated[int, typer.Option(min=0, help="Tokens per sample; 0: 64 or 128.")] = 0,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate; 0: 1e-4 or 1e-3.")] = 0.0,
    train_samples: Annotated[int, typer.Option(min=96, help="Reviews to train on; all are 8,572.")] = 8_572,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the reviews.")] = 1.0,
    static_padding: Annotated[
        bool,
        typer.Option("--static-padding/--dynamic-padding", help="Reviews: to --max-length, or the longest."),
    ] = True,
    steps: Annotated[int, typer.Option(min=3, help="Steps of pretraining.")] = 500,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model that is pretrained.")] = 4,
    hidden: Annotated[int, typer.Option(min=64, help="Its width, a multiple of 64.")] = 256,
    rounds: Annotated[int, typer.Option(min=0, help="Alternating steps that measure the speed-up.")] = 12,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Default: benchmarks/results/quality_….json")
    ] = None,
    add: Annotated[bool, typer.Option(help="Keep the runs of the results file.")] = True,
) -> None:
    """Train by each method and compare quality, FLOPs and time with the dense run; writes JSON and PNG."""
    quieten()
    if task not in METHODS:
        raise typer.BadParameter(f"--task is {task!r}; allowed is {' or '.join(METHODS)}.")
    if hidden % 64:
        raise typer.BadParameter(f"--hidden is {hidden}; allowed is a multiple of 64.")
    try:
        entries = parse_entries(methods or METHODS[task])
        if task == "reviews":
            work = reviews(
                train_samples=train_samples,
                epochs=epochs,
                batch_size=batch_size or 32,
                max_length=max_length or 64,
                lr=lr or 1e-4,
                static_padding=static_padding,
            )
        else:
            if padded := [entry.name for entry in entries if entry.static_padding is not None]:
                raise ValueError(
                    f"methods: {padded[0]!r} sets the padding; all samples of this task are as long"
                )
            work = shakespeare(
                steps=steps,
                batch_size=batch_size or 16,
                length=max_length or 128,
                lr=lr or 1e-3,
                layers=layers,
                hidden=hidden,
            )
    except (ValueError, DataError) as error:
        raise typer.BadParameter(str(error)) from error
    found = Found(work, json_out or ROOT / "benchmarks" / "results" / f"quality_{work.name}.json", keep=add)
    for seed in range(first_seed, first_seed + seeds):
        run_seed(found, entries, work, seed, rounds if seed == first_seed else 0)
    present(found)


def parse_entries(text: str) -> list[Entry]:
    """The methods of the command line. Refuses what it does not know."""
    entries: list[Entry] = []
    for name in (part.strip() for part in text.split(",")):
        own = dict(OWN.findall(name))
        method = OWN.sub("", name)
        if not all(own.get(key, "1").isdigit() for key in ("batch", "steps")):
            raise ValueError(f"methods: {name!r} needs a whole number as its batch or steps")
        if own.get("padding", "static") not in ("static", "dynamic"):
            raise ValueError(f"methods: {name!r} needs dynamic or static as its padding")
        schedule = None
        if method != DENSE:
            (parsed,) = parse_methods(method)
            if not parsed.sparse:
                raise ValueError(f"methods: {name!r} is not compiled; allowed are dense and sparse ones")
            schedule = parsed.schedule
        entries.append(
            Entry(
                name=name,
                schedule=None if schedule is None else Schedule.from_dict(schedule),
                batch_size=int(own.get("batch", 0)) or None,
                steps=int(own.get("steps", 0)) or None,
                static_padding=own["padding"] == "static" if "padding" in own else None,
            )
        )
    if entries[0].name != DENSE:
        raise ValueError(f"methods={text!r}: the first must be {DENSE!r}, which the others are held against")
    return entries


class Found:
    """The results so far, kept in their file after every run."""

    def __init__(self, task: Task, path: Path, *, keep: bool) -> None:
        self.path, self.goal = path, task.goal
        settings = task.settings
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


def run_seed(found: Found, entries: list[Entry], task: Task, seed: int, rounds: int) -> None:
    """Train what is missing of one seed, then take alternating steps of what was trained."""
    trainers: dict[str, Any] = {}
    # A batch of another size would else make the size a symbol, also for the methods that follow. (Dynamic
    # padding marks its lengths as such.)
    with torch._dynamo.config.patch(recompile_limit=4 * len(entries), automatic_dynamic_shapes=False):
        for entry in entries:
            if found.has(entry.name, seed):
                continue
            run, trainers[entry.name] = task.train(entry, seed)
            found.data["runs"].append(slim(run.to_dict()))
            found.save()
        if rounds and DENSE in trainers:
            found.data["step_seconds"] = interleave(trainers, rounds)
            found.save()
    torch._dynamo.reset()


def slim(run: dict[str, Any]) -> dict[str, Any]:
    """A run as it is kept: of the report the totals and what the controller decided, without every step."""
    report = run.pop("report") or {}
    history, seconds = report.get("history", []), run.pop("step_seconds")
    return {**run, "probing": probing(history, seconds), "totals": report.get("totals"), "history": history}


def probing(history: list[dict[str, Any]], seconds: list[float]) -> float:
    """What steps that measure take beyond their neighbours, as a share of the rest of the run. Alternating
    steps are too few to show it. `seconds` begin at step 1, since step 0 compiles."""
    measured = [entry["step"] - 1 for entry in history if 0 < entry["step"] <= len(seconds)]
    extra = sum(seconds[at] - statistics.median(seconds[max(0, at - 5) : at + 6]) for at in measured)
    return extra / (sum(seconds) - extra)


def present(found: Found) -> None:
    """The table, the figure, and where the numbers are."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    headings = ["seeds", "accuracy %", "loss", "training\nFLOPs", "step ×", f"{found.goal} at\nequal time"]
    for heading in (*headings, "to dense's"):
        table.add_column(heading, justify="right", no_wrap=True)
    found.data["summary"] = {name: summarise(found, name) for name in found.names}
    for name, summary in found.data["summary"].items():
        table.add_row(
            name,
            str(summary["seeds"]),
            f"{100 * summary['accuracy']:.1f} ± {100 * summary['accuracy_std']:.1f}",
            f"{summary['loss']:.3f} ± {summary['loss_std']:.3f}",
            *(
                "–" if value is None else form.format(value)
                for value, form in (
                    (summary["flops"], "{:.0%}"),
                    (summary["speedup"], "{:.2f}"),
                    (summary["at_equal_time"], "{:.3f}"),
                    (summary["time_to_dense"], "{:.2f}"),
                )
            ),
        )
    found.save()
    console.print(table)
    console.print(
        "mean ± standard deviation over seeds. training FLOPs: of all linears and attentions, in the whole "
        "training, dense = 100 %. "
        f"at equal time: {found.goal} on the curve's samples when the fastest method had ended. to dense's: "
        f"share of the dense run's time after which the mean curve reached its last {found.goal}.",
        style="dim",
        soft_wrap=True,
    )
    figure = found.path.with_suffix(".png")
    quality_plot.draw(
        {name: curves(found, name) for name in found.names},
        {name: speedup(found, name) for name in found.names},
        goal=found.goal,
        path=figure,
    )
    console.print(f"written to {found.path} and {figure}", soft_wrap=True)


def summarise(found: Found, name: str) -> dict[str, Any]:
    """Means over the seeds of one method, and how it compares with dense on a common clock."""
    runs = found.of(name)
    speeds = {other: speedup(found, other) for other in found.names}
    curve, dense = mean_curve(found, name), mean_curve(found, DENSE)
    speed = speeds[name]
    at_equal = reached = None
    if speed is not None:
        # Time in units of dense steps: step / speed-up.
        ends = [mean_curve(found, other)[-1][0] / by for other, by in speeds.items() if by]
        at_equal = last_before(curve, min(ends) * speed)
        sign = -1 if found.goal == "loss" else 1
        first = next((x for x, y in curve if sign * y >= sign * dense[-1][1]), None)
        reached = None if first is None else first / speed / dense[-1][0]
    return {
        "seeds": len(runs),
        **mean_and_std("accuracy", [run["accuracy"] for run in runs]),
        **mean_and_std("loss", [run["loss"] for run in runs]),
        "flops": training_flops(found, name),
        "speedup": speed,
        "at_equal_time": at_equal,
        "time_to_dense": reached,
    }


def training_flops(found: Found, name: str) -> float | None:
    """FLOPs of a whole training over those of the dense one, of all linears and attentions; None where the
    padding is another, so that what a sample costs is not known."""
    own = dict(OWN.findall(name))
    if "padding" in own:
        return None
    per_sample = [
        run["totals"]["flops"] / run["totals"]["flops_dense"] for run in found.of(name) if run["totals"]
    ]
    if not per_sample and OWN.sub("", name) != DENSE:
        return None
    samples = 1.0
    if "batch" in own:
        samples *= int(own["batch"]) / found.data["settings"]["batch_size"]
    if "steps" in own:
        samples *= int(own["steps"]) / found.data["settings"]["steps"]
    return samples * (statistics.fmean(per_sample) if per_sample else 1.0)


def mean_and_std(name: str, values: list[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.fmean(values), f"{name}_std": std}


def speedup(found: Found, name: str) -> float | None:
    """How many times faster than dense a step is, from the alternating steps; None without them. What
    measurements take is counted."""
    seconds = found.data["step_seconds"]
    if name not in seconds:
        return None
    steps = statistics.median(a / b for a, b in zip(seconds[DENSE], seconds[name], strict=True))
    return steps / (1 + statistics.fmean(run.get("probing", 0.0) for run in found.of(name)))


def curves(found: Found, name: str) -> list[list[tuple[int, float]]]:
    """(step, what is judged) of every seed."""
    return [[(point["step"], point[found.goal]) for point in run["curve"]] for run in found.of(name)]


def mean_curve(found: Found, name: str) -> list[tuple[int, float]]:
    """(step, what is judged) averaged over the seeds; all evaluate at the same steps."""
    points = zip(*curves(found, name), strict=True)
    return [(group[0][0], statistics.fmean(y for _, y in group)) for group in points]


def last_before(curve: list[tuple[int, float]], step: float) -> float | None:
    """The last value of a curve at or before a step."""
    return next((y for x, y in reversed(curve) if x <= step + 0.5), None)


if __name__ == "__main__":
    app()
