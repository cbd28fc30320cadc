"""What sampling does to a weight gradient: bias and variance of each estimator, on recorded steps.

A model is trained densely, without a compiler; at some steps the input X and the output gradient dY of every
linear are recorded. Each estimator then draws its gradient many times from the same record:

    bias²       ‖E[Ĝ] − G‖²,  variance  E‖Ĝ − E[Ĝ]‖²,  both summed over the layers
    SGD         the variance of G itself over batches (methods/vcas.py), which both are to be held against

`top` keeps the largest rows as they are, `clip=c` caps the weights at c, `unbiased` has no cap, `flips` draws
by independent coin flips (VCAS), `in order` reads the rows in the order of the tokens, not in a random one.
`residual` samples dY less the batch mean of an earlier step, which is added back: unbiased reuse; `fitted`
does so with the multiple of that mean which is nearest to dY. The last column says in how many layers the sum
is below that of `unbiased`.

`--preset shakespeare` is the pretraining of quality.py: a small GPT, from random weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from presets import PRESETS, Batch
from quality_tasks import shakespeare_batches
from results import context, write_json
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from sparse_compile.methods import reuse, sample, vcas
from sparse_compile.methods.rows import number_kept

ALLOWED = (*PRESETS, "shakespeare")
CLIPS = (1.5, 2.0, 3.0, 5.0)

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One linear at one step: X [N, I], dY [N, O], the batch mean of an earlier dY [T, O], and T."""

    x: Tensor
    dy: Tensor
    base: Tensor
    tokens: int


class Recorder:
    """Hooks on every linear of a model that has a row for each token."""

    def __init__(self, model: nn.Module) -> None:
        self.records: list[Record] = []
        self.recording = False
        self._inputs: dict[nn.Module, Tensor] = {}
        self._bases: dict[nn.Module, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.weight.numel() >= 2**14:
                module.register_forward_hook(self._forward)
                module.register_full_backward_hook(self._backward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inputs[module] = inputs[0].detach()

    def _backward(self, module: nn.Module, _: Any, gradients: tuple[Tensor, ...]) -> None:
        dy, x = gradients[0], self._inputs.pop(module)
        if dy.dim() < 3:
            return
        tokens = dy.shape[1]
        flat = dy.reshape(-1, dy.shape[-1])
        base = self._bases.get(module)
        if self.recording and base is not None and base.shape[0] == tokens:
            self.records.append(Record(x=x.reshape(len(flat), -1), dy=flat.clone(), base=base, tokens=tokens))
        self._bases[module] = reuse.next_base(flat, tokens, None)


Estimator = Callable[[Record, int, sample.Draw], Tensor]


def estimators() -> dict[str, Estimator]:
    """By name: (record, k, draw) -> Ĝ [O, I]."""
    chosen: dict[str, Estimator] = {"top": _top}
    for clip in CLIPS:
        chosen[f"clip={clip:g}"] = lambda r, k, draw, clip=clip: _sampled(r, k, draw, clip=clip)  # type: ignore
    return chosen | {
        "unbiased": lambda r, k, draw: _sampled(r, k, draw),
        "in order": lambda r, k, draw: _sampled(r, k, draw, shuffle=False),
        "flips": _flips,
        "residual": _residual,
        "fitted": lambda r, k, draw: _residual(r, k, draw, fitted=True),
    }


def _scores(dy: Tensor, x: Tensor) -> Tensor:
    return dy.norm(dim=1) * x.norm(dim=1)


def _product(dy: Tensor, x: Tensor, kept: Tensor, weights: Tensor | None = None) -> Tensor:
    rows = dy[kept] if weights is None else dy[kept] * weights.to(dy).unsqueeze(1)
    return rows.t() @ x[kept]


def _top(record: Record, k: int, draw: sample.Draw) -> Tensor:
    return _product(record.dy, record.x, _scores(record.dy, record.x).topk(k).indices)


def _sampled(
    record: Record, k: int, draw: sample.Draw, clip: float = float("inf"), shuffle: bool = True
) -> Tensor:
    scores = _scores(record.dy, record.x)
    p = sample.probabilities(scores, k)
    kept = sample.systematic(p, min(k, int((p > 0).sum())), draw if shuffle else _InOrder(draw))
    return _product(record.dy, record.x, kept, (1 / p[kept]).clamp(max=clip))


class _InOrder:
    """A draw that leaves the rows where they are."""

    def __init__(self, draw: sample.Draw) -> None:
        self.start = draw.start

    def order(self, n: int) -> Tensor:
        return torch.arange(n)


def _flips(record: Record, k: int, draw: sample.Draw) -> Tensor:
    p = sample.probabilities(_scores(record.dy, record.x), k)
    uniform = torch.tensor([draw.start() for _ in range(len(p))], dtype=p.dtype)
    kept = (uniform < p).nonzero().squeeze(1)
    return _product(record.dy, record.x, kept, 1 / p[kept])


def _residual(record: Record, k: int, draw: sample.Draw, fitted: bool = False) -> Tensor:
    tiled = record.base.repeat(len(record.dy) // record.tokens, 1)
    live = (record.dy != 0).any(1, keepdim=True)
    tiled = tiled * live
    if fitted:
        tiled = tiled * ((tiled * record.dy).sum() / tiled.square().sum())
    rest = Record(x=record.x, dy=record.dy - tiled, base=record.base, tokens=record.tokens)
    return tiled.t() @ record.x + _sampled(rest, k, draw)


@app.command()
def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(ALLOWED)}.")] = "minilm-reviews",
    keeps: Annotated[str, typer.Option(help="Shares of the rows, separated by commas.")] = "0.1,0.25",
    at: Annotated[str, typer.Option(help="Steps at which to record, separated by commas.")] = "5,40",
    draws: Annotated[int, typer.Option(min=2, help="Draws of each estimator.")] = 24,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate (AdamW).")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=0, help="Samples per step; 0: the preset's, or 16.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Results file.")] = None,
) -> None:
    """Bias and variance of sampled weight gradients, as a share of SGD's own variance."""
    if preset not in ALLOWED:
        raise typer.BadParameter(f"--preset {preset!r}; allowed are {', '.join(ALLOWED)}.")
    try:
        shares = [float(part) for part in keeps.split(",")]
        steps = sorted(int(part) for part in at.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--keeps and --at are numbers separated by commas: {error}.") from error
    torch.manual_seed(0)
    if preset in PRESETS:
        chosen = PRESETS[preset].resized(batch=batch_size or None)
        model, batches = chosen.model(), chosen.batches(chosen, steps[-1] + 1, 0)
    else:
        model, batches = shakespeare_batches(steps[-1] + 1, batch_size or 16)
    table = Table(box=box.SIMPLE_HEAD, title=f"{preset}: share of SGD's variance", pad_edge=False)
    for heading in ("step", "keep", "estimator"):
        table.add_column(heading)
    for heading in ("bias²", "variance", "sum", "layers below"):
        table.add_column(heading, justify="right")
    found = []
    for step, records in _record(model, batches, steps, lr):
        sgd = sum(_sgd_variance(record) for record in records)
        for share in shares:
            bar = tqdm(estimators().items(), desc=f"step {step}, keep {share}", leave=False)
            errors = {name: _errors(records, share, estimator, draws) for name, estimator in bar}
            for name, of_layers in errors.items():
                bias, variance = (sum(part) / sgd for part in zip(*of_layers, strict=True))
                pairs = zip(of_layers, errors["unbiased"], strict=True)
                below = sum(sum(ours) < sum(unbiased) for ours, unbiased in pairs)
                numbers = {"bias": bias, "variance": variance, "below": below, "layers": len(records)}
                found.append({"step": step, "keep": share, "estimator": name, **numbers})
                texts = (f"{value:.3f}" for value in (bias, variance, bias + variance))
                table.add_row(str(step), f"{share:g}", name, *texts, f"{below} of {len(records)}")
    console.print(table)
    path = json_out or Path(__file__).parent / "results" / f"gradient_error_{preset}.json"
    run = {"preset": preset, "draws": draws, "lr": lr, "batch_size": batch_size or None}
    write_json(path, {**context(), "run": run, "found": found})
    console.print(f"written to {path}")


def _record(
    model: nn.Module, batches: list[Batch], steps: list[int], lr: float
) -> list[tuple[int, list[Record]]]:
    recorder = Recorder(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = []
    for step, batch in enumerate(tqdm(batches, desc="training", leave=False)):
        recorder.recording = step in steps
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if recorder.recording:
            found.append((step, recorder.records))
            recorder.records = []
    return found


def _sgd_variance(record: Record) -> float:
    samples = len(record.dy) // record.tokens
    dy, x = (matrix.view(samples, record.tokens, -1) for matrix in (record.dy, record.x))
    total = float((record.dy.t() @ record.x).square().sum())
    return vcas.sgd_variance(vcas.sample_squares(dy, x), total)


def _errors(
    records: list[Record], share: float, estimator: Estimator, draws: int
) -> list[tuple[float, float]]:
    """(bias², variance) of each record; the bias less what the variance adds to its estimate."""
    found = []
    for number, record in enumerate(records):
        truth = record.dy.t() @ record.x
        k = number_kept(share, len(record.dy))
        mean = torch.zeros_like(truth)
        squares = []
        for draw in range(draws):
            estimate = estimator(record, k, sample.Draw(f"{number}/{draw}"))
            mean += estimate / draws
            squares.append(float((estimate - truth).square().sum()))
        error = statistics.fmean(squares)  # bias² + variance
        spread = max(0.0, error - float((mean - truth).square().sum())) * draws / (draws - 1)
        found.append((max(0.0, error - spread), spread))
    return found


if __name__ == "__main__":
    app()
