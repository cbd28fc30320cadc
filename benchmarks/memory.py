"""How much memory a training step needs: pruned activations against what PyTorch itself offers.

Every method trains the same model in a process of its own; see memory_process.py for what is measured,
presets.py for the models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fresh_process import PROMPT_FREE
from memory_process import ALLOWED, MemoryJob, parse
from presets import PRESETS
from results import ROOT, context, write_json
from rich.console import Console
from rich.table import Table
from timing import spread
from tqdm import tqdm

METHODS = "dense,exact,budget:0.8,budget:0.5,budget:0.2,checkpoint,prune:0.9,prune:0.9/fp16,prune:0.9/int8"

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def memory(
    preset: Annotated[str, typer.Option(help=f"The model: {', '.join(PRESETS)}.")] = "bert-base",
    methods: Annotated[str, typer.Option(help=f"What to measure, separated by commas: {ALLOWED}.")] = METHODS,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps in each process.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Processes for each method, in turn.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per batch; default: the preset's.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample; default: the preset's.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; default: the preset's.")] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Dropout; default: the preset's.")
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Results file; default: benchmarks/results/memory_<preset>.json."),
    ] = None,
) -> None:
    """Measure what is saved for backward, the peak memory over the model, and the time of a step.

    Examples:

      python benchmarks/memory.py --preset bert-base --methods dense,prune:0.9

      python benchmarks/memory.py --preset vit --batch 16
    """
    if preset not in PRESETS:
        raise typer.BadParameter(f"--preset {preset!r}: allowed are {', '.join(PRESETS)}")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device!r}: allowed are cpu, cuda")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    sizes = {"batch": batch, "tokens": tokens, "layers": layers, "dropout": dropout}
    try:
        sized = PRESETS[preset].resized(**sizes)
        for name in names:
            parse(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if "dense" not in names:
        names.insert(0, "dense")
    started = context()
    sizes = {key: sized.sizes()[key] for key in sizes}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tqdm(total=repeats * len(names), desc=preset, unit="process", disable=None) as bar:
        for _ in range(repeats):
            for name in names:
                bar.set_postfix_str(name)
                job = MemoryJob(
                    preset=preset,
                    method=name,
                    threads=threads or torch.get_num_threads(),
                    steps=steps,
                    device=device,
                    sizes=sizes,
                )
                measured[name].append(run(job))
                bar.update()
    results = {
        **started,
        "preset": {"name": preset, "summary": sized.summary, **sized.sizes()},
        "run": {"steps": steps, "repeats": repeats, "device": device},
        "methods": summarise(measured),
    }
    path = json_path or ROOT / "benchmarks" / "results" / f"memory_{preset}.json"
    write_json(path, results)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table(results))
    console.print(f"written to {path}")


def run(job: MemoryJob) -> dict[str, float]:
    """Measure one job in a process of its own."""
    script = Path(__file__).resolve().parent / "memory_process.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(asdict(job))],
        env=os.environ | PROMPT_FREE,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {job.method} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarise(measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By method and quantity: the least, the spread, and `ratio`, the least over that of dense.

    The least, because whatever disturbs these measurements only adds to them.
    """
    least = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in measured.items()}
    return {
        name: {
            key: {
                "least": least[name][key],
                **spread([run[key] for run in runs]),
                "ratio": least[name][key] / least["dense"][key],
            }
            for key in runs[0]
        }
        for name, runs in measured.items()
    }


def table(results: dict[str, Any]) -> Table:
    """One line for each method: absolute numbers, and relative to dense."""
    preset = results["preset"]
    title = f"{preset['name']}: {preset['batch']} × {preset['tokens']} tokens, {preset['layers']} layers"
    lines = Table(title=title, caption="least of all processes; in brackets, dense = 1")
    lines.add_column("method", no_wrap=True)
    columns = {"saved": ("saved MB", 1e-6), "peak": ("peak MB", 1e-6), "cpu_seconds": ("step CPU s", 1.0)}
    columns["seconds"] = ("step s", 1.0)
    for heading, _ in columns.values():
        lines.add_column(heading, justify="right")
    for name, found in results["methods"].items():
        cells = [
            f"{factor * found[key]['least']:.{1 if factor < 1 else 3}f} ({found[key]['ratio']:.3f})"
            for key, (_, factor) in columns.items()
        ]
        lines.add_row(name, *cells)
    return lines


if __name__ == "__main__":
    app()
