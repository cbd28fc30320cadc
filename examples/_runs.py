"""What the training runs of all examples share, and the side-by-side timing of several.

The training loop is the Hugging Face Trainer's. What is added here: the model is compiled in place with the
backend under test, a callback times every step, and evaluation runs uncompiled.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sparse_compile import Schedule, SparseBackend, sparse_backend

COMPILER = "inductor"  # of every run
CURVE_FILE = "curve.json"  # in a checkpoint: the times and evaluations so far


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

    def seconds_to(self, good: Callable[[Point], bool]) -> float | None:
        """Training time until the curve is first `good`; None when it never is."""
        return next((point.seconds for point in self.curve if good(point)), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median_step_seconds": self.median_step}


def compile_with(
    variant: Variant, model: Any
) -> tuple[Any, torch.optim.Optimizer | None, SparseBackend | None]:
    """The model compiled as the variant says, its optimizer if the variant brings one, and our backend."""
    backend = None if variant.schedule is None else sparse_backend(variant.schedule, compiler=COMPILER)
    optimizer = None
    if variant.prepare is not None:
        model, optimizer = variant.prepare(model, backend)
    model.compile(backend=COMPILER if backend is None else backend)
    return model, optimizer, backend


def fit(
    trainer: CompiledTrainer,
    variant: Variant,
    seed: int,
    recorder: Recorder,
    held_out: Any,
    backend: SparseBackend | None,
    *,
    resume: str | None = None,
) -> Run:
    """Train, from a checkpoint if one is given, under a progress bar; then evaluate on all of `held_out`."""
    trainer.remove_callback(PrinterCallback)
    bar = Bar(variant.name)
    trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        bar.close()
    final = trainer.evaluate(held_out, metric_key_prefix="final")
    return Run(
        name=variant.name,
        seed=seed,
        compile_seconds=recorder.compile_seconds,
        step_seconds=recorder.step_seconds,
        loss=final["final_loss"],
        accuracy=final["final_accuracy"],
        curve=recorder.curve,
        report=None if backend is None else backend.report().to_dict(),
    )


def interleave(trainers: dict[str, CompiledTrainer], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each trainer, taking turns on the same batches (or the same number of its own, if
    its batches are smaller or padded otherwise); the first round warms up.

    Runs that follow each other meet a machine in different moods. Steps that alternate do not, so their
    ratio is the speed-up to quote. The trained models serve once more: no further compile is needed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches: dict[tuple[int, bool], list[dict[str, torch.Tensor]]] = {}
    for trainer in trainers.values():
        if trainer.batch_shape not in batches:
            batches[trainer.batch_shape] = trainer.some_batches(rounds + 1)
    for number in range(rounds + 1):
        # Every other round in reverse, so that nobody always follows the same neighbour.
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            trainer = trainers[name]
            taken = trainer.timed_step(batches[trainer.batch_shape][number])
            if number > 0:
                seconds[name].append(taken)
    return seconds


class CompiledTrainer(transformers.Trainer):
    """A Trainer that evaluates uncompiled and, under dynamic padding, compiles for any text length."""

    model: Any  # never None here, which the Trainer's own annotations allow
    optimizer: Any

    def __init__(self, *args: Any, dynamic_length: bool = False, **kwargs: Any) -> None:
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

    @property
    def batch_shape(self) -> tuple[int, bool]:
        """What the shapes of its batches depend on."""
        return self.args.train_batch_size, self.dynamic_length

    def some_batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` training batches, over several epochs if one is too short."""
        batches: list[dict[str, torch.Tensor]] = []
        while len(batches) < count:
            loader: Iterable[dict[str, torch.Tensor]] = self.get_train_dataloader()
            batches += [batch for batch, _ in zip(loader, range(count - len(batches)), strict=False)]
        return batches

    def timed_step(self, batch: dict[str, torch.Tensor]) -> float:
        """Seconds for one step as the Trainer takes it; at the end of training its learning rate is 0."""
        self.current_gradient_accumulation_steps = (
            1  # set by training, which a resumed run may have done before
        )
        start = _now()
        samples, items = self.get_batch_samples(iter([batch]), 1, self.args.device)
        self.training_step(self.model_wrapped, samples[0], items)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return _now() - start


class Recorder(transformers.TrainerCallback):
    """Times every step, asks for evaluations and keeps the curve; a resumed run goes on with both.

    The first step of a process compiles: what it took beyond a median step is compile time, and on the
    wall-clock it counts as a median step. Evaluation and logging happen between steps and are not counted.

    Args:
        steps: of the whole run.
        steps_per_epoch: what the curve's epochs are counted in.
        evaluations: points of the curve, spread evenly; the last is at the end.
    """

    def __init__(self, steps: int, steps_per_epoch: float, evaluations: int) -> None:
        # Never right after the first step, when no other has been timed.
        self.evaluate_at = {max(2, round(steps * k / evaluations)) for k in range(1, evaluations + 1)}
        self.steps_per_epoch = steps_per_epoch
        self.all_seconds: list[float] = []
        self.compiled_at: list[int] = []  # positions in all_seconds
        self.curve: list[Point] = []
        self._train_loss = float("nan")
        self._start = 0.0
        self._first = True

    @property
    def step_seconds(self) -> list[float]:
        """Of the steps that did not compile."""
        return [taken for at, taken in enumerate(self.all_seconds) if at not in self.compiled_at]

    @property
    def compile_seconds(self) -> float:
        step = statistics.median(self.step_seconds)
        return sum(max(0.0, self.all_seconds[at] - step) for at in self.compiled_at)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:  # the Trainer has resumed, and its checkpoint is of that step
            kept = json.loads((_checkpoint(args, state) / CURVE_FILE).read_text(encoding="utf-8"))
            self.all_seconds, self.compiled_at = kept["all_seconds"], kept["compiled_at"]
            self.curve = [Point(**point) for point in kept["curve"]]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = {"all_seconds": self.all_seconds, "compiled_at": self.compiled_at}
            text = json.dumps({**kept, "curve": [asdict(point) for point in self.curve]})
            (_checkpoint(args, state) / CURVE_FILE).write_text(text, encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._first:
            self.compiled_at.append(len(self.all_seconds))
            self._first = False
        self.all_seconds.append(_now() - self._start)
        if state.global_step in self.evaluate_at:
            control.should_log = control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._train_loss = logs.get("loss", self._train_loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if "eval_accuracy" not in metrics:
            return  # the last evaluation, on all held-out texts, is no point of the curve
        steady = self.step_seconds
        self.curve.append(
            Point(
                step=state.global_step,
                epoch=state.global_step / self.steps_per_epoch,
                seconds=sum(steady) + len(self.compiled_at) * statistics.median(steady),
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
        self._say(f"{self.name} (compiling)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._say(self.name)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar for evaluations."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "eval_accuracy" in logs:
            self.training_bar.set_postfix_str(
                f"held-out loss {logs['eval_loss']:.3f}, accuracy {logs['eval_accuracy']:.1%}"
            )

    def _say(self, text: str) -> None:
        if self.training_bar is not None:  # only the first process has one
            self.training_bar.set_description(text)

    def close(self) -> None:
        """Leave the bar in one piece also when training was interrupted."""
        if self.training_bar is not None:
            self.training_bar.close()


def quieten() -> None:
    """Leave the screen to the progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Otherwise the tokenizers warn when Inductor forks its compilers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _now() -> float:
    """The clock, once an accelerator has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
