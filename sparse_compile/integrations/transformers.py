"""For the Hugging Face ``Trainer``: what the backend saves, in the training logs and in the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from sparse_compile.backend import SparseBackend

STATE_FILE = "sparse_compile.pt"


class SparseCompileCallback(transformers.TrainerCallback):
    """Adds the backend's numbers to every log entry, and its state to every checkpoint.

    ::

        trainer = Trainer(model=torch.compile(model, backend=backend), …)
        SparseCompileCallback.attach(trainer, backend)

    Logged are ``sparse_compile/flops_ratio`` (forward and backward of all linears and attentions, as run over
    dense, since the start) and, of the last measurement of adaptive sampling, ``s``, ``sgd_variance``,
    ``act_variance``, ``weight_variance``, and ``samples/<block>``, the share of samples kept behind it.
    With a monitor, also the means over the sites at its last measurement: ``cosine/dW`` and
    ``relative_error/dW``, the same for the other gradients, and ``energy_kept``.

    A run that resumes from a checkpoint of the Trainer's takes the backend's state from it, if it is there.
    Each rank of a distributed run has a state of its own, and a file.
    """

    def __init__(self, backend: SparseBackend) -> None:
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
            for path in (_state_file(args, state, args.process_index), _state_file(args, state, 0)):
                if path.exists():
                    self.backend.load_state_dict(torch.load(path, weights_only=True))
                    break

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.backend.state_dict(), _state_file(args, state, args.process_index))

    def numbers(self) -> dict[str, float]:
        """What is logged, by name."""
        report = self.backend.report()
        numbers = {"flops_ratio": 1.0 - report.totals["flops_saved"]}
        if report.history:
            last = report.history[-1]
            numbers |= {name: last[name] for name in ("s", "sgd_variance", "act_variance", "weight_variance")}
            numbers |= {f"samples/{name}": share for name, share in last["sample_shares"].items()}
        return numbers | report.measurements.last()


def _state_file(args: Any, state: Any, rank: int) -> Path:
    """`sparse_compile.pt` of rank 0, `sparse_compile_1.pt` of rank 1, …"""
    name = STATE_FILE if rank == 0 else STATE_FILE.replace(".pt", f"_{rank}.pt")
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / name
