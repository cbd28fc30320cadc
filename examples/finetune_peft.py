"""Fine-tune a pretrained transformer's MLPs: full fine-tuning, LoRA, top-k of the gradient, and SparseGrad.

Every run has the same weights, the same batches in the same order and the same Trainer. Ends in a table, a
figure and a JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import warnings
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from _peft import FULL, METHODS, SPARSE, Job, Outcome, run
from _results import machine, versions
from finetune_reviews import DATA_DIR, INTERRUPTED, prepare
from matplotlib.figure import Figure
from reviews import DataError, load_reviews
from rich import box
from rich.console import Console
from rich.table import Table

from sparse_compile import RotatedTopK

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    context: typer.Context,
    methods: Annotated[str, typer.Option(help=f"Any of {', '.join(METHODS)}.")] = ",".join(METHODS),
    density: Annotated[
        float, typer.Option(help="Share of the MLPs' entries that is updated; also sets LoRA's rank.")
    ] = 0.01,
    calibration_steps: Annotated[int, typer.Option(min=1, help="Steps that record gradients.")] = 30,
    candidates: Annotated[
        float, typer.Option(min=1.0, help="SparseGrad: entries computed for each that is kept.")
    ] = 4.0,
    choose_every: Annotated[int, typer.Option(min=0, help="Steps between choices of entries; 0: once.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every run with this many seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The seeds count from here.")] = 0,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the training texts.")] = 1.0,
    train_samples: Annotated[int, typer.Option(min=1, help="Training texts to use; all are 8,572.")] = 4_288,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per text, at most.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-4,
    lora_lr: Annotated[float, typer.Option(min=0.0, help="Of LoRA's factors.")] = 2e-3,
    kept_scale: Annotated[
        float, typer.Option(help="SparseGrad: what kept updates are multiplied by.")
    ] = 10.0,
    model: Annotated[str, typer.Option(help="Hub name or folder.", show_default="the bundled MiniLM")] = "",
    data_dir: Annotated[Path, typer.Option(help="Where downloaded reviews are kept.")] = DATA_DIR,
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("peft.png"),
    json_out: Annotated[Path, typer.Option("--json", help="All numbers.")] = Path("peft.json"),
) -> None:
    """Fine-tune on reviews in several ways that update few entries, and compare."""
    _quieten()
    settings = {**context.params, "dataset": "", "curve_samples": 500, "static_padding": True}
    wanted = [name.strip() for name in methods.split(",")]
    for name in wanted:
        if name not in METHODS:
            raise typer.BadParameter(f"--methods {methods}: {name!r} is none of {', '.join(METHODS)}.")
    try:
        rotated = RotatedTopK(
            density,
            calibration_steps=calibration_steps,
            candidates=candidates,
            choose_every=choose_every or None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for option, path in (("--out", out), ("--json", json_out)):
        if not path.resolve().parent.is_dir():
            raise typer.BadParameter(f"{option} {path}: there is no folder {path.resolve().parent}.")
    try:
        recipe, tokens = prepare(load_reviews(data_dir), settings)
    except DataError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if calibration_steps + 3 >= recipe.steps:
        raise typer.BadParameter(
            f"--calibration-steps {calibration_steps}: the training has {recipe.steps} steps, and at least 4 "
            "have to follow (see --train-samples, --epochs)."
        )

    outcomes: list[Outcome] = []
    finished = True
    try:
        for seed in range(first_seed, first_seed + seeds):
            for method in wanted:
                sparse = method.startswith(SPARSE)  # it clips by itself
                job = Job(
                    method=method,
                    seed=seed,
                    recipe=dataclasses.replace(
                        recipe, learning_rate=lr, max_grad_norm=0.0 if sparse else 1.0
                    ),
                    tokens=tokens,
                    rotated=rotated,
                    lora_lr=lora_lr,
                    kept_scale=kept_scale,
                )
                outcomes.append(run(job))
                _write(outcomes, settings, json_out)
    except KeyboardInterrupt:
        console.print(f"\nStopped; finished runs: {len(outcomes)}.", highlight=False)
        finished = False
    if outcomes:
        console.print(table(outcomes))
        draw(outcomes, out)
        console.print(f"Figure in {out}, all numbers in {json_out}.", highlight=False)
    raise typer.Exit(0 if finished else INTERRUPTED)


def table(outcomes: list[Outcome]) -> Table:
    """One row for each method; more than one seed gives mean ± standard deviation."""
    shown = Table(box=box.SIMPLE_HEAD, title="Fine-tuning", pad_edge=False, collapse_padding=True)
    headings = (
        "accuracy\n%",
        "loss\n",
        "entries\nupdated",
        "optimizer\nMB",
        "bases\nMB",
        "peak\nMB",
        "step\nms",
    )
    shown.add_column("run", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        of = [outcome for outcome in outcomes if outcome.method == method]
        peaks = [outcome.peak_bytes / 1e6 for outcome in of if outcome.peak_bytes is not None]
        shown.add_row(
            method,
            _spread([100 * outcome.accuracy for outcome in of], "{:.1f}"),
            _spread([outcome.loss for outcome in of], "{:.3f}"),
            f"{of[0].entries:,}",
            f"{of[0].state_bytes / 1e6:.2f}",
            f"{of[0].basis_bytes / 1e6:.2f}" if of[0].basis_bytes else "–",
            f"{statistics.median(peaks):.0f}" if peaks else "–",
            f"{1000 * statistics.median(outcome.median_step for outcome in of):.0f}",
        )
    return shown


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Accuracy against what the optimizer holds, and against steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ("#333333", "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#7b3294")
    for method, colour in zip(METHODS, colours, strict=True):
        of = [outcome for outcome in outcomes if outcome.method == method]
        if not of:
            continue
        held = [max(outcome.state_bytes + outcome.basis_bytes, 1) / 1e6 for outcome in of]
        left.plot(held, [outcome.accuracy for outcome in of], "o", color=colour, label=method)
        points = zip(*(outcome.curve for outcome in of), strict=True)
        means = [(p[0]["step"], statistics.fmean(q["accuracy"] for q in p)) for p in points]
        right.plot(
            *zip(*means, strict=True), color=colour, linewidth=2.2 if method == FULL else 1.4, label=method
        )
    left.set_xscale("log")
    left.set_xlabel("optimizer state and bases, MB")
    right.set_xlabel("step")
    for axes, label in ((left, "accuracy, all held-out texts"), (right, "accuracy, 500 held-out texts")):
        axes.set_ylabel(label)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _write(outcomes: list[Outcome], settings: dict[str, Any], path: Path) -> None:
    runs = [dataclasses.asdict(outcome) for outcome in outcomes]
    everything = {"settings": settings, "machine": machine(), "versions": versions(), "runs": runs}
    path.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


def _quieten() -> None:
    """Leave the screen to the progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    app()
