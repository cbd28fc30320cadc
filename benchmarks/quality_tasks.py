"""What quality.py trains: one function for each task, which gets the data and says how a run is made."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # scripts, not a package

import _finetuning
import _pretraining
import torch
from _download import DataError
from _results import BASELINE as DENSE
from _runs import CompiledTrainer, Run, Variant, interleave, quieten
from reviews import Split, load_reviews
from texts import BYTES, load_shakespeare, tokenise

from sparse_compile import Schedule

__all__ = ["DENSE", "DataError", "Entry", "Task", "interleave", "quieten", "reviews", "shakespeare"]

DATA = Path(__file__).resolve().parents[1] / ".data"
CURVE_REVIEWS = 500
CURVE_WINDOWS = 128  # of the held-out windows, for each point of a curve


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method: its schedule (None: plain torch.compile), and what of the recipe it has of its own."""

    name: str
    schedule: Schedule | None
    batch_size: int | None = None
    steps: int | None = None
    static_padding: bool | None = None

    def own(self) -> dict[str, Any]:
        """What of the recipe is different for it."""
        keys = ("batch_size", "steps", "static_padding")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, what a run is judged by, and how one is made from a method and a seed."""

    name: str
    goal: Literal["accuracy", "loss"]
    settings: dict[str, Any]
    train: Callable[[Entry, int], tuple[Run, CompiledTrainer]]


def reviews(
    *, train_samples: int, epochs: float, batch_size: int, max_length: int, lr: float, static_padding: bool
) -> Task:
    """Fine-tune the bundled MiniLM on movie reviews."""
    split = load_reviews(DATA)
    count = min(len(split.train), train_samples) // batch_size * batch_size
    split = Split(train=split.train.first(count), held_out=split.held_out, classes=split.classes)
    recipe = _finetuning.Recipe(
        model=str(_finetuning.bundled_model()),
        classes=split.classes,
        steps=round(epochs * count / batch_size),
        steps_per_epoch=count // batch_size,
        batch_size=batch_size,
        learning_rate=lr,
        static_padding=static_padding,
    )

    @functools.cache
    def tokens(static: bool) -> _finetuning.Tokens:
        return _finetuning.tokenize(
            recipe.model, split, curve_samples=CURVE_REVIEWS, max_length=max_length, static_padding=static
        )

    def train(entry: Entry, seed: int) -> tuple[Run, CompiledTrainer]:
        variant, own = Variant(name=entry.name, schedule=entry.schedule), replace(recipe, **entry.own())
        return _finetuning.train(variant, own, tokens(own.static_padding), seed)

    padding = "static" if static_padding else "dynamic"
    settings = {
        "steps": recipe.steps,
        "train_samples": count,
        "held_out": len(split.held_out),
        "curve_samples": len(tokens(static_padding).curve),
        "batch_size": batch_size,
        "max_length": max_length,
        "lr": lr,
        "padding": padding,
    }
    return Task(name=f"reviews_{padding}", goal="accuracy", settings=settings, train=train)


def shakespeare_batches(count: int, batch_size: int = 16) -> tuple[Any, list[dict[str, Any]]]:
    """The GPT of the pretraining task, of width 128, and its first batches."""
    ids = tokenise(load_shakespeare(DATA), BYTES + 1, DATA)
    recipe = _gpt(steps=count, batch_size=batch_size, length=128, lr=1e-3, layers=4, hidden=128)
    windows = _pretraining.Windows(ids, recipe, count * recipe.batch_size, 0)
    loader = torch.utils.data.DataLoader(windows, batch_size=recipe.batch_size)
    return _pretraining.make_model(recipe, ids.vocabulary).train(), list(loader)


def _gpt(*, steps: int, batch_size: int, length: int, lr: float, layers: int, hidden: int) -> Any:
    return _pretraining.Recipe(
        causal=True,
        steps=steps,
        batch_size=batch_size,
        accumulate=1,
        length=length,
        layers=layers,
        hidden=hidden,
        heads=hidden // 64,
        learning_rate=lr,
        evaluations=10,
    )


def shakespeare(*, steps: int, batch_size: int, length: int, lr: float, layers: int, hidden: int) -> Task:
    """Pretrain a small GPT on the bytes of Shakespeare's works, each byte from those before it."""
    ids = tokenise(load_shakespeare(DATA), BYTES + 1, DATA)
    recipe = _gpt(steps=steps, batch_size=batch_size, length=length, lr=lr, layers=layers, hidden=hidden)
    held_out = _pretraining.held_out_windows(ids, recipe)[:: max(1, len(ids.held_out) // length // 512)]

    def train(entry: Entry, seed: int) -> tuple[Run, CompiledTrainer]:
        variant = Variant(name=entry.name, schedule=entry.schedule)
        own = replace(recipe, **entry.own())
        return _pretraining.train(variant, own, ids, held_out, CURVE_WINDOWS, seed)

    settings = {
        "steps": steps,
        "held_out": len(held_out),
        "curve_samples": CURVE_WINDOWS,
        "batch_size": batch_size,
        "max_length": length,
        "lr": lr,
        "layers": layers,
        "hidden": hidden,
    }
    return Task(name="shakespeare", goal="loss", settings=settings, train=train)
