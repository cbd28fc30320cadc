"""One pretraining run from scratch: a small BERT by masked tokens, or a small GPT by the next token."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _runs import CompiledTrainer, Recorder, Run, Variant, compile_with, fit
from texts import MASK, TokenIds
from torch import Tensor

from sparse_compile.integrations.transformers import SparseCompileCallback

MASKED = 0.15  # share of the tokens of a window that BERT has to tell
MASK_SEED = "held out"  # the masks of the held-out windows are the same for all runs
IGNORED = -100  # label of a token that is not asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What every run has in common. A batch is that of one process and one backward."""

    causal: bool
    steps: int
    batch_size: int
    accumulate: int
    length: int
    layers: int
    hidden: int
    heads: int
    learning_rate: float
    evaluations: int
    save_every: int = 0  # steps between checkpoints; 0: none


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """`count` windows of the training text at random places.

    A window and its masks follow from the seed and its number alone: the order in which they are asked for,
    by how many processes, and whether the run was interrupted make no difference.
    """

    def __init__(self, ids: TokenIds, recipe: Recipe, count: int, seed: int) -> None:
        self.ids, self.recipe, self.count, self.seed = ids, recipe, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = _generator(f"{self.seed}/{number}")
        start = int(torch.randint(len(self.ids.train) - self.recipe.length + 1, (), generator=draw))
        window = self.ids.train[start : start + self.recipe.length].long()
        return as_example(window, self.ids.vocabulary, self.recipe.causal, draw)


def held_out_windows(ids: TokenIds, recipe: Recipe) -> list[dict[str, Tensor]]:
    """The held-out text in windows that follow each other, with masks that are always the same."""
    whole = len(ids.held_out) // recipe.length
    windows = ids.held_out[: whole * recipe.length].long().view(whole, recipe.length)
    return [
        as_example(window, ids.vocabulary, recipe.causal, _generator(f"{MASK_SEED}/{number}"))
        for number, window in enumerate(windows)
    ]


def as_example(window: Tensor, vocabulary: int, causal: bool, draw: torch.Generator) -> dict[str, Tensor]:
    """Inputs and labels, int64 [T] each, of a window of T tokens.

    Causal: every token but the first is to be told from those before it. Else BERT's rule: 15 % of the places
    are asked for, of which 80 % are masked, 10 % hold another token, 10 % are left as they are. The number of
    places is always the same, so that every token asked for counts alike in every mean.
    """
    inputs, labels = window.clone(), torch.full_like(window, IGNORED)
    if causal:
        labels[1:] = window[1:]
        return {"input_ids": inputs, "labels": labels}
    count = max(1, round(MASKED * len(window)))
    places = torch.randperm(len(window), generator=draw)[:count]
    labels[places] = window[places]
    chance = torch.rand(count, generator=draw)
    others = torch.randint(1, vocabulary, (count,), generator=draw)
    shown = torch.where(chance < 0.8, MASK, torch.where(chance < 0.9, others, window[places]))
    inputs[places] = shown
    return {"input_ids": inputs, "labels": labels}


def make_model(recipe: Recipe, vocabulary: int) -> transformers.PreTrainedModel:
    """A BERT or GPT-2 of the recipe's size. No dropout: no part of the text is seen often."""
    if recipe.causal:
        gpt = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary,
                n_positions=recipe.length,
                n_embd=recipe.hidden,
                n_layer=recipe.layers,
                n_head=recipe.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        gpt.loss_type = "ForCausalLM"  # what it would fall back to, with a message that breaks the graph
        return gpt
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.hidden,
            max_position_embeddings=recipe.length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,
        )
    )


def train(
    variant: Variant,
    recipe: Recipe,
    ids: TokenIds,
    held_out: list[dict[str, Tensor]],
    curve_samples: int,
    seed: int,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
) -> tuple[Run, CompiledTrainer]:
    """Pretrain once. Same seed, same run: initial weights, windows, masks.

    Args:
        held_out: all of it is evaluated at the end, the first `curve_samples` for every point of the curve.
        checkpoints: a folder for this run's.
        resume: go on from the newest one in that folder, if there is one; a finished run is only evaluated.
    """
    transformers.set_seed(seed)
    model = make_model(recipe, ids.vocabulary)
    model, optimizer, backend = compile_with(variant, model)
    with tempfile.TemporaryDirectory() as scratch:
        args = _arguments(recipe, seed, checkpoints or Path(scratch))
        count = recipe.steps * recipe.accumulate * recipe.batch_size * args.world_size
        tokens_per_step = count // recipe.steps * recipe.length
        recorder = Recorder(recipe.steps, len(ids.train) / tokens_per_step, recipe.evaluations)
        trainer = CompiledTrainer(
            model=model,
            args=args,
            train_dataset=Windows(ids, recipe, count, seed),
            eval_dataset=held_out[:curve_samples],
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_next_token if recipe.causal else _this_token,
            callbacks=[recorder, *variant.callbacks],
            optimizers=(optimizer, None),
        )
        # Else the Trainer adds up the losses of micro-batches, believing that the model divides them, which
        # BERT does not. All micro-batches ask for the same number of tokens, so a mean of means is right.
        trainer.model_accepts_loss_kwargs = False
        if backend is not None:
            SparseCompileCallback.attach(trainer, backend)
        start = _newest(checkpoints) if resume and checkpoints is not None else None
        return fit(trainer, variant, seed, recorder, held_out, backend, resume=start), trainer


def clear(checkpoints: Path) -> None:
    """Remove what an earlier run left, so that it is not taken for this one's."""
    if checkpoints.exists():
        shutil.rmtree(checkpoints)


def _newest(checkpoints: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes its state last."""
    found = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    newest = max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _arguments(recipe: Recipe, seed: int, folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=recipe.accumulate,
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, recipe.steps // 20),
        weight_decay=0.01,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,  # the bar of _runs.py takes the place of the Trainer's own
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        # On CPU it has to be said, or the processes of torchrun train apart from each other.
        use_cpu=not torch.accelerator.is_available(),
    )


def _this_token(logits: Any, labels: Tensor) -> Tensor:
    """What is kept of the logits [B, T, V] for the accuracy: the token told for each place, [B, T]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(-1)


def _next_token(logits: Any, labels: Tensor) -> Tensor:
    """The same where each place tells the next one's."""
    return _this_token(logits, labels).roll(1, dims=1)


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    told, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    asked = labels != IGNORED
    return {"accuracy": float((told[asked] == labels[asked]).mean())}


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(60))
