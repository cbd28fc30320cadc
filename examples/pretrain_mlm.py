"""Pretrain a small BERT by masked tokens, or with --causal a small GPT, from scratch on real text.

Every run has the same weights, the same windows of text in the same order and the same Trainer; only the
backend given to torch.compile differs. Ends in a table, a figure and a JSON file. On several processes:

    torchrun --nproc_per_node 2 examples/pretrain_mlm.py

Checkpoints are kept while it runs; --resume continues an interrupted one as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from _download import DataError
from _present import present
from _pretraining import Recipe, clear, held_out_windows, train
from _results import BASELINE, Results
from _runs import CompiledTrainer, Variant, interleave, quieten
from rich.console import Console
from texts import TokenIds, load_files, load_hub, load_shakespeare, tokenise

from sparse_compile import Schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

from variants import parse_methods

DATA_DIR = Path(__file__).resolve().parents[1] / ".data"
INTERRUPTED = 130  # what a shell reports for a program stopped by Ctrl-C
SETTINGS_FILE = "settings.json"  # in the folder of checkpoints: what they were made with

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    context: typer.Context,
    text: Annotated[
        list[Path] | None, typer.Option(help="Your own text; may be given again.", show_default="Shakespeare")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Hub name, or name:config, of a set with a text column.")] = "",
    causal: Annotated[bool, typer.Option("--causal", help="A GPT by the next token.")] = False,
    methods: Annotated[
        str, typer.Option(help="Beside dense: exact, reuse:RATIO, sample:KEEP, vcas, …; commas between them.")
    ] = "reuse:0.9,sample:0.25",
    start: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of training before reuse and sampling start.")
    ] = 0.0,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every run with this many seeds.")] = 1,
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per backward and process.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Backwards per step.")] = 1,
    length: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 128,
    vocabulary: Annotated[
        int, typer.Option(min=257, help="Tokens, learnt from the text; 257 is bytes.")
    ] = 2_048,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 4,
    hidden: Annotated[int, typer.Option(min=16, help="Its width.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Heads of its attentions; they divide the width.")] = 4,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-3,
    evaluations: Annotated[int, typer.Option(min=1, help="Points of a curve.")] = 10,
    curve_samples: Annotated[int, typer.Option(min=1, help="Held-out windows per point.")] = 128,
    rounds: Annotated[int, typer.Option(min=0, help="Alternating steps that measure the speed-up.")] = 12,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from --checkpoints.")] = False,
    checkpoints: Annotated[Path, typer.Option(help="Their folder; emptied unless resumed.")] = DATA_DIR
    / "pretraining",
    data_dir: Annotated[Path, typer.Option(help="Where texts and their tokens are kept.")] = DATA_DIR,
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("pretraining.png"),
    json_out: Annotated[Path, typer.Option("--json", help="All numbers.")] = Path("pretraining.json"),
) -> None:
    """Pretrain from scratch with plain torch.compile, reuse and sampling, and compare."""
    quieten()
    settings = {key: value for key, value in context.params.items() if key != "resume"}
    variants = parse_variants(methods, start, steps)
    if text and dataset:
        raise typer.BadParameter("--text and --dataset exclude each other.")
    if hidden % heads:
        raise typer.BadParameter(f"--heads is {heads}; allowed is a divisor of --hidden, {hidden}.")
    for option, path in (("--out", out), ("--json", json_out)):
        if not path.resolve().parent.is_dir():
            raise typer.BadParameter(f"{option} {path}: there is no folder {path.resolve().parent}.")
        if path.is_dir():
            raise typer.BadParameter(f"{option} {path} is a folder; allowed is the name of a file.")
    recipe = Recipe(
        causal=causal,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        length=length,
        layers=layers,
        hidden=hidden,
        heads=heads,
        learning_rate=lr,
        evaluations=min(evaluations, steps // 2),
        save_every=min(save_every, steps),
    )
    try:
        with one_after_the_other():
            corpus = (
                load_files(text) if text else load_hub(dataset) if dataset else load_shakespeare(data_dir)
            )
            with console.status("tokenising, once"):
                ids = tokenise(corpus, vocabulary, data_dir)
            held_out = held_out_windows(ids, recipe)
            if not held_out or len(ids.train) < length:
                raise DataError(f"{corpus.name} is too short for windows of {length} tokens (see --length).")
            prepare(checkpoints, settings, resume)
    except DataError as error:
        say(str(error), style="red")
        raise typer.Exit(1) from error
    settings |= {
        "model": "a small GPT" if causal else "a small BERT",
        "dataset": corpus.name,
        "held_out": len(held_out),
        "curve_samples": min(curve_samples, len(held_out)),
        "tokens_trained_on": len(ids.train),
        "processes": world_size(),
    }
    results = Results(settings=settings, goal="loss")
    finished = run_all(results, variants, recipe, ids, held_out, checkpoints, resume)
    if is_first():
        title = figure_title(results.settings)
        present(
            results,
            out,
            json_out,
            console,
            heading="Pretraining",
            unit="windows",
            title=title,
            across="steps",
        )
    leave()
    raise typer.Exit(0 if finished else INTERRUPTED)


def parse_variants(methods: str, start: float, steps: int) -> list[Variant]:
    """Dense first, which the others are measured against; wrong names and values are refused here."""
    variants = [Variant(name=BASELINE, schedule=None)]
    try:
        for method in parse_methods(methods):
            if not method.sparse and method.name != BASELINE:
                raise ValueError(f"{method.name!r} is not compiled; allowed are methods of sparse_compile")
            if method.sparse:
                fields = {field: _from(start, settings) for field, settings in method.schedule.items()}
                schedule = Schedule.from_dict({**fields, "total_steps": steps})
                variants.append(Variant(name=method.name, schedule=schedule))
    except ValueError as error:
        raise typer.BadParameter(f"--methods {methods}: {error}") from error
    return variants


def _from(start: float, method: dict[str, Any]) -> dict[str, Any]:
    """A method of a schedule that begins at a fraction of training, and is exact before."""
    phases = {"ratio": 0.0, "keep": 1.0}  # what is exact
    key = next((key for key in phases if key in method), None)
    if key is None or start == 0:
        return method
    return {**method, key: [[phases[key], 0.0], [method[key], start]]}


def prepare(checkpoints: Path, settings: dict[str, Any], resume: bool) -> None:
    """Empty the folder of checkpoints, or see that those in it were made with the same settings."""
    if not is_first():
        return
    path = checkpoints / SETTINGS_FILE
    # What may differ: it has no part in the runs themselves.
    free = ("methods", "seeds", "rounds", "out", "json_out", "checkpoints", "data_dir", "save_every")
    mine = json.loads(json.dumps({k: v for k, v in settings.items() if k not in free}, default=str))
    mine["processes"] = world_size()
    if not resume:
        clear(checkpoints)
        checkpoints.mkdir(parents=True)
        path.write_text(json.dumps(mine, indent=1), encoding="utf-8")
    elif not path.exists():
        raise DataError(f"--resume: there is no run to continue in {checkpoints} (see --checkpoints).")
    else:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        wrong = [key for key in mine if mine[key] != theirs.get(key)]
        if wrong:
            raise DataError(
                f"--resume: the run in {checkpoints} was begun with other settings ("
                + ", ".join(f"{key} {theirs.get(key)}, now {mine[key]}" for key in wrong)
                + ")."
            )


def run_all(
    results: Results,
    variants: list[Variant],
    recipe: Recipe,
    ids: TokenIds,
    held_out: list[dict[str, torch.Tensor]],
    checkpoints: Path,
    resume: bool,
) -> bool:
    """Train every variant with every seed, filling `results` as runs finish; False if stopped by Ctrl-C."""
    # The compiled graphs of all runs count against one limit, since the models are of one class.
    torch._dynamo.config.recompile_limit = 4 * len(variants)
    doing = ""
    try:
        for seed in range(results.settings["seeds"]):
            trainers: dict[str, CompiledTrainer] = {}
            for variant in variants:
                doing = f"{variant.name}, seed {seed}"
                run, trainer = train(
                    variant,
                    recipe,
                    ids,
                    held_out,
                    results.settings["curve_samples"],
                    seed,
                    checkpoints=checkpoints / f"{variant.name} seed {seed}".replace("/", "_"),
                    resume=resume,
                )
                results.runs.append(run)
                if seed == 0 and results.settings["rounds"] > 0:
                    trainers[variant.name] = trainer
            if trainers:
                doing = "the interleaved steps"
                with console.status(f"{results.settings['rounds']} rounds of interleaved steps"):
                    results.rounds = interleave(trainers, results.settings["rounds"])
            torch._dynamo.reset()
    except KeyboardInterrupt:
        say(f"\nStopped during {doing}; finished runs: {len(results.runs)}. --resume continues.")
        return False
    return True


def figure_title(settings: dict[str, Any]) -> str:
    batch = settings["batch_size"] * settings["accumulate"] * settings["processes"]
    return f"{settings['model']} on {settings['dataset']}: {batch} × {settings['length']} tokens a step"


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that talks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str, style: str | None = None) -> None:
    if is_first():
        console.print(text, style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """The first process goes first, so that only one downloads and tokenises."""
    if world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not is_first():
        dist.barrier()
    try:
        yield
    finally:
        if is_first() and dist.is_initialized():
            dist.barrier()


def leave() -> None:
    """End the process group. The models have to go first: while a process still holds one wrapped by DDP, it
    holds the group, and one that is freed by the model's destructor can lock up (docs/architecture.md)."""
    if dist.is_initialized():
        torch._dynamo.reset()
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    app()
