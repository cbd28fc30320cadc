"""For the Hugging Face ``Trainer``: what the backend saves, in the training logs and in the checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from sparse_compile.backend import SparseBackend
from sparse_compile.checks import wrong

STATE_FILE = "sparse_compile.pt"


class SparseCompileCallback(transformers.TrainerCallback):
    """Adds the backend's numbers to every log entry, and its state to every checkpoint.

    ::

        model.compile(backend=backend)  # in place, so the Trainer still sees the model's own forward
        trainer = Trainer(model=model, …)
        SparseCompileCallback.attach(trainer, backend)
        trainer.train()

    Logged are ``sparse_compile/flops_ratio`` (forward and backward of all linears and attentions, as run over
    dense, since the start) and, of the last measurement of adaptive sampling, ``s``, ``sgd_variance``,
    ``act_variance``, ``weight_variance``, ``samples/<block>``, the share of samples kept behind it, and
    ``rows/<layer>``, the share of rows that its weight gradient is computed from.
    With a monitor, also the means over the sites at its last measurement: ``cosine/dW`` and
    ``relative_error/dW``, the same for the other gradients, and ``energy_kept``.

    A run that resumes from a checkpoint of the Trainer's takes the backend's state from it; if there is none,
    the schedule goes on at the Trainer's step, with a warning. Each rank of a distributed run has a state
    of its own, and a file.
    """

    def __init__(self, backend: SparseBackend) -> None:
        if not isinstance(backend, SparseBackend):
            raise wrong("backend", backend, "what sparse_backend(schedule) gives")
        self.backend = backend

    @classmethod
    def attach(cls, trainer: transformers.Trainer, backend: SparseBackend) -> SparseCompileCallback:
        """Add the callback before all others, so that trackers of experiments see its numbers."""
        callback = cls(backend)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        numbers = {f"sparse_compile/{name}": value for name, value in self.numbers().items()}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:  # the Trainer has resumed, and its checkpoint is of that step
            # A rank that the run did not have before goes on from the first one's clock.
            names = _file_name(args.process_index), _file_name(0)
            for path in [folder / name for folder in _checkpoints(args, state) for name in names]:
                if path.exists():
                    self.backend.load_state_dict(torch.load(path, weights_only=True))
                    return
            self.backend.step = state.global_step
            warnings.warn(
                f"No {names[0]} in {_checkpoints(args, state)[0]}: the schedule goes on at step "
                f"{state.global_step}, and all else that the backend remembers starts anew. If the file is "
                "in another folder, name that in TrainingArguments.resume_from_checkpoint.",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.backend.state_dict(), _checkpoint(args, state) / _file_name(args.process_index))

    def numbers(self) -> dict[str, float]:
        """What is logged, by name."""
        report = self.backend.report()
        numbers = {"flops_ratio": 1.0 - report.totals["flops_saved"]}
        if report.history:
            last = report.history[-1]
            numbers |= {name: last[name] for name in ("s", "sgd_variance", "act_variance", "weight_variance")}
            numbers |= {f"samples/{name}": share for name, share in last["sample_shares"].items()}
            numbers |= {f"rows/{name}": share for name, share in last["row_shares"].items()}
        return numbers | report.measurements.last()


def _file_name(rank: int) -> str:
    """`sparse_compile.pt` of rank 0, `sparse_compile_1.pt` of rank 1, …"""
    return STATE_FILE if rank == 0 else STATE_FILE.replace(".pt", f"_{rank}.pt")


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _checkpoints(args: Any, state: Any) -> list[Path]:
    """Where a run may have resumed from. (`Trainer.train` does not tell a callback what it was given.)"""
    named = args.resume_from_checkpoint
    return [*([Path(named)] if isinstance(named, str) else []), _checkpoint(args, state)]
