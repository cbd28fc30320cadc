"""The ways of fine-tuning that finetune_peft.py compares, and what each is measured by.

What they have in common: the MLPs of the model are tuned and its new head. Everything else is frozen, but in
full fine-tuning and in the methods on "-all", where it trains too, as in the paper on SparseGrad. LoRA, top-k
and SparseGrad update the same number of entries of the MLPs.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from _finetuning import Recipe, Tokens, train
from _runs import Variant
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sparse_compile import RotatedTopK, Schedule
from sparse_compile.optim import SparseAdamW, freeze_unselected, state_bytes
from sparse_compile.selection import chosen_layers

FULL, LORA, LORA_ALL, TOP_K, SPARSE, SPARSE_ALL = METHODS = (
    *("full", "lora", "lora-all", "top-k", "sparse-grad", "sparse-grad-all"),
)
_HEADS = ("classifier", "score", "pre_classifier", "classification_head")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run, as it is handed to a process of its own."""

    method: str
    seed: int
    recipe: Recipe
    tokens: Tokens
    rotated: RotatedTopK
    lora_lr: float
    kept_scale: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Outcome:
    """What is left of a finished run.

    Attributes:
        entries: how many numbers of the model a step updates.
        state_bytes: the optimizer's state after the last step.
        basis_bytes: the rotated bases and the positions of the kept entries.
        peak_bytes: the most memory that was resident during the steps after the calibration, less what was
            before the model was loaded; on a GPU, what was allocated. None where it cannot be known.
    """

    method: str
    seed: int
    accuracy: float
    loss: float
    entries: int
    state_bytes: int
    basis_bytes: int
    peak_bytes: int | None
    step_seconds: list[float]
    curve: list[Any]

    @property
    def median_step(self) -> float:
        """Seconds of a step after the calibration."""
        return statistics.median(self.step_seconds)


def run(job: Job) -> Outcome:
    """Train once in a process of its own, so that the memory of one run is not that of another."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (job,))


def lora_rank(layers: dict[str, Tensor], density: float) -> int:
    """The rank at which LoRA has about ``density`` of the weights' entries; at least 1."""
    entries = sum(weight.numel() for weight in layers.values())
    return max(1, round(density * entries / sum(sum(weight.shape) for weight in layers.values())))


def _run(job: Job) -> Outcome:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    schedule = None
    if job.method in (SPARSE, SPARSE_ALL):
        schedule = Schedule(weight_gradients=job.rotated, total_steps=job.recipe.steps)
    resident, peak = Memory.resident(), Memory(after=job.rotated.calibration_steps + 2)
    backend: Any = None

    def prepare(model: Any, given: Any) -> tuple[Any, torch.optim.Optimizer]:
        nonlocal backend
        backend = given
        return _prepare(job, model, given)

    variant = Variant(name=job.method, schedule=schedule, prepare=prepare, callbacks=(peak,))
    done, trainer = train(variant, job.recipe, job.tokens, job.seed)
    optimizer = trainer.optimizer.optimizer
    rotation = None if schedule is None else backend.rotation.state_dict()
    return Outcome(
        method=job.method,
        seed=job.seed,
        accuracy=done.accuracy,
        loss=done.loss,
        entries=_entries(optimizer, job),
        state_bytes=state_bytes(optimizer),
        basis_bytes=_bytes(rotation),
        peak_bytes=None if peak.highest is None else peak.highest - resident,
        step_seconds=done.step_seconds[job.rotated.calibration_steps :],
        curve=[dataclasses.asdict(point) for point in done.curve],
    )


def _prepare(job: Job, model: Any, backend: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The model with all frozen that is to be, and its optimizer."""
    heads = [name for name, _ in model.named_children() if name in _HEADS]
    layers = weights_of(model, job.rotated)
    adam: dict[str, Any] = {"lr": job.recipe.learning_rate, "weight_decay": 0.0}
    if job.method in (LORA, LORA_ALL):
        rank = lora_rank(layers, job.rotated.density)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), modules_to_save=heads)
        model = get_peft_model(model, config)
        own = _trained(model)  # the factors and the head
        if job.method == LORA_ALL:
            _unfreeze_others(model)
        groups: list[dict[str, Any]] = [
            {"params": own, "lr": job.lora_lr},
            {"params": _trained(model, but=own)},
        ]
        return model, torch.optim.AdamW(groups, **adam)
    if job.method in (TOP_K, SPARSE):
        freeze_unselected(model, job.rotated, keep=heads)
    trained = _trained(model)
    if job.method in (SPARSE, SPARSE_ALL):
        scaled = {"kept_scale": job.kept_scale, "max_grad_norm": 1.0}
        return model, SparseAdamW(trained, backend, **scaled, **adam)
    if job.method == TOP_K:
        for weight in layers.values():
            weight.register_post_accumulate_grad_hook(_keep_largest(job.rotated.density))
    return model, torch.optim.AdamW(trained, **adam)


def _unfreeze_others(model: nn.Module) -> None:
    """Train what LoRA freezes, but for the weights that it adapts and what its heads were before."""
    for name, parameter in model.named_parameters():
        if not name.endswith("base_layer.weight") and ".original_module." not in name:
            parameter.requires_grad_(True)


def _trained(model: nn.Module, but: Collection[Tensor] = ()) -> list[nn.Parameter]:
    left_out = {id(parameter) for parameter in but}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]


def weights_of(model: nn.Module, rotated: RotatedTopK) -> dict[str, Tensor]:
    """The chosen weights of a model, by the names of their layers."""
    modules: dict[str, Any] = dict(model.named_modules())
    return {name: modules[name].weight for name in sorted(chosen_layers(model, rotated))}


def _keep_largest(density: float) -> Any:
    """As meProp (Sun et al., ICML 2017), of the weight's gradient: all but the largest entries are set to
    zero, after each backward. The optimizer's state stays as large as the weight."""

    def keep(weight: Tensor) -> None:
        assert weight.grad is not None
        size = weight.grad.abs().flatten()
        smallest = size.topk(max(1, round(density * size.numel())), sorted=False).values.min()
        weight.grad *= weight.grad.abs() >= smallest

    return keep


def _entries(optimizer: torch.optim.Optimizer, job: Job) -> int:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if job.method != TOP_K:
        return sum(p.numel() for p in parameters)
    hooked = [p for p in parameters if p._post_accumulate_grad_hooks]
    return sum(p.numel() for p in parameters) - sum(
        p.numel() - max(1, round(job.rotated.density * p.numel())) for p in hooked
    )


def _bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state.values())) if isinstance(state, dict) else 0


class Memory(transformers.TrainerCallback):
    """The most memory in use during the training steps from ``after`` on. Linux's own count, or CUDA's."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.highest: int | None = None

    @staticmethod
    def resident(field: str = "VmRSS") -> int:
        """Bytes; 0 where the system does not say."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.after:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            elif Path("/proc/self/clear_refs").exists():
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.after and (peak := self.resident("VmHWM")):
            self.highest = max(self.highest or 0, peak)
