"""How long a training step takes under plain torch.compile, under sparse_compile, and under eager ReSprop.

All variants train copies of one model in one process, a step each in turn, so that what slows the machine
slows them all; see timing.py for how they are compared and what realised / ideal means, presets.py for the
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from fresh_process import Job, measure_all, summarise
from presets import PRESETS, Preset
from results import MERIT, ROOT, context, print_tables, write_json
from rich.console import Console
from rich.markup import escape
from timing import interleave
from tqdm import tqdm
from variants import ALLOWED, DENSE, DENSE_AGAIN, OptimizerName, Variant, make_trainee, parse_methods

RESULTS = ROOT / "benchmarks" / "results"
TABLE_WIDTH = 124  # of the widest table, where there is no terminal to ask
PRESET_LIST = "; ".join(f"[bold]{preset.name}[/bold]: {preset.summary}" for preset in PRESETS.values())

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def step_time(
    preset: Annotated[str, typer.Option(help=f"The model and its batches. {PRESET_LIST}.")] = "bert-base",
    all_presets: Annotated[
        bool, typer.Option("--all", help="Run every preset, one after the other.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"What to time beside dense, separated by commas: {escape(ALLOWED)}; '' for dense alone. "
            "The default is the preset's own."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", "--steps", min=1, help="Timed steps of each variant, one per round.")
    ] = 15,
    warmup: Annotated[
        int, typer.Option(min=2, help="Steps of each variant before that (the first compiles).")
    ] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; default: torch's own.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd (with momentum), both fused.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-5,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
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
    compile_time: Annotated[
        bool, typer.Option("--compile-time", help="Also the cold compile time, in fresh processes.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the peak memory, in fresh processes.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Processes per variant for --compile-time and --memory.")
    ] = 3,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Results file; default: benchmarks/results/step_time_<preset>.json."),
    ] = None,
) -> None:
    """Time whole training steps: plain torch.compile, sparse_compile, and eager ReSprop.

    Each round runs one step of every variant on the same batch, in rotating order; speed-ups are the median
    over rounds of dense / variant. A second dense copy, "dense (again)", shows the noise. Prints tables and
    writes JSON.

    Examples:

      python benchmarks/step_time.py --preset bert-base --methods exact,reuse:0.9,eager-resprop:0.9

      python benchmarks/step_time.py --preset minilm-reviews --methods exact --dropout 0 --rounds 30

      python benchmarks/step_time.py --all --compile-time --memory
    """
    if all_presets and json_path is not None:
        raise typer.BadParameter("--json names one file, and --all writes one per preset: leave it out")
    if optimizer not in get_args(OptimizerName):
        raise typer.BadParameter(
            f"--optimizer {optimizer!r}: allowed are {', '.join(get_args(OptimizerName))}"
        )
    if preset not in PRESETS:
        raise typer.BadParameter(f"--preset {preset!r}: allowed are {', '.join(PRESETS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {"batch": batch, "tokens": tokens, "layers": layers, "dropout": dropout}
    run = {"rounds": rounds, "warmup": warmup, "optimizer": optimizer, "lr": lr, "seed": seed}
    try:
        plan = [
            (chosen.resized(**sizes), parse_methods(chosen.methods if methods is None else methods))
            for chosen in (PRESETS.values() if all_presets else [PRESETS[preset]])
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    for sized, variants in plan:
        results = measure(sized, variants, run)
        fresh = [what for what, wanted in (("compile", compile_time), ("memory", memory)) if wanted]
        for what in fresh:
            results[what] = measure_fresh(what, sized, variants, run, repeats)
        path = json_path or RESULTS / f"step_time_{sized.name}.json"
        write_json(path, results)
        print_tables(results, console)
        console.print(f"written to {path}")


def measure(preset: Preset, variants: list[Variant], run: dict[str, Any]) -> dict[str, Any]:
    """Time the variants beside dense, in this process; everything that goes into the results file."""
    started = context()
    columns = [DENSE, DENSE_AGAIN, *variants]
    batches = preset.batches(preset, 8, run["seed"])
    model = preset.model(run["seed"])
    trainees = [make_trainee(v, model, optimizer=run["optimizer"], lr=run["lr"]) for v in columns]
    with tqdm(
        total=len(columns) * (run["warmup"] + run["rounds"]), desc=preset.name, unit="step", disable=None
    ) as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        measured = interleave(trainees, batches, rounds=run["rounds"], warmup=run["warmup"], tick=tick)
    return {
        **started,
        "preset": {"name": preset.name, "summary": preset.summary, **preset.sizes()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "run": {**run, "graphs_compiled_while_timed": measured.graphs_compiled},
        "definitions": {"merit": MERIT},
        "matmul_gflops": measured.matmul_gflops(),
        "variants": {v.name: measured.summary(v.name) for v in columns},
    }


def measure_fresh(
    what: str, preset: Preset, variants: list[Variant], run: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Cold compile time or peak memory of dense and the variants, each in processes of its own."""
    jobs = {
        variant.name: Job(
            what=what,  # type: ignore[arg-type]
            preset=preset.name,
            method=variant.name,
            threads=torch.get_num_threads(),
            optimizer=run["optimizer"],
            lr=run["lr"],
            steps=5,
            sizes={key: preset.sizes()[key] for key in ("batch", "tokens", "layers", "dropout")},
        )
        for variant in (DENSE, *variants)
        if variant.compiled or what == "memory"
    }
    measured = measure_all(jobs, repeats=repeats, settings=f"{preset.name}: {what}")
    return summarise(measured, "seconds" if what == "compile" else "peak_over_model")


if __name__ == "__main__":
    app()
