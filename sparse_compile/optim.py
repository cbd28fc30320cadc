"""Optimizers for ``Schedule(weight_gradients=RotatedTopK(...))``: they hold state for the kept entries alone.

::

    backend = sparse_backend(Schedule(weight_gradients=RotatedTopK(0.01)))
    optimizer = SparseAdamW(model.parameters(), backend, lr=1e-4)
    model = torch.compile(model, backend=backend)

Such an optimizer takes all parameters of a model. Until the calibration ends it is the optimizer that it is
made of, and records gradients. Then, in ``param_groups``, each chosen weight gives its place to a vector of
its kept entries in the rotated basis, and every step ends with adding what happened to them to the weight. So
learning rates and their schedules, ``state_dict`` and a GradScaler work as ever, and the model is always an
ordinary one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_compile import naming, selection
from sparse_compile.backend import SparseBackend
from sparse_compile.checks import is_number, near, wrong
from sparse_compile.patterns import pattern_matches
from sparse_compile.rotation import Rotation
from sparse_compile.settings.rotate import RotatedTopK


class SparseOptimizer(torch.optim.Optimizer):
    """What :func:`sparse` adds to an optimizer. Arguments besides those of the optimizer itself:

    Args:
        params: all parameters that are to be trained, or groups of them, the chosen weights among them.
        backend: what the model is compiled with; its schedule has a ``weight_gradients``.
        kept_scale: what the update of the kept entries is multiplied by, a number > 0. They get the learning
            rate of the group; an optimizer that normalises its steps, as Adam does, moves a weight by less if
            it moves few entries: by √density in norm.
        max_grad_norm: clip the gradients of all parameters together to this norm, a number > 0, at the
            beginning of each step; None does not. Of a chosen weight its kept entries count. (Clipping
            ``model.parameters()`` does not know of them; ``gradients()`` does.)

    ``weight_decay`` of a chosen weight is always decoupled, as AdamW's: W is multiplied by 1 − lr · decay.

    Raises:
        ValueError: a value is not among those above, or the backend's schedule has no ``weight_gradients``.
    """

    def __init__(
        self,
        params: Any,
        backend: SparseBackend,
        *,
        kept_scale: float = 1.0,
        max_grad_norm: float | None = None,
        **settings: Any,
    ) -> None:
        name = type(self).__name__
        if not isinstance(backend, SparseBackend) or backend.rotation is None:
            allowed = "a sparse_backend(...) whose Schedule has weight_gradients=RotatedTopK(...)"
            raise wrong(f"{name}.backend", backend, allowed)
        given = {"kept_scale": kept_scale, "max_grad_norm": 1.0 if max_grad_norm is None else max_grad_norm}
        for field, value in given.items():
            if not is_number(value) or not 0 < value < float("inf"):
                raise wrong(f"{name}.{field}", value, "a finite number > 0")
        self._rotation: Rotation = backend.rotation
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._kept_scale = kept_scale
        self._max_grad_norm = max_grad_norm
        self._stepped = False
        super().__init__(params, **settings)
        # Or a GradScaler would leave scaled gradients, and a step to be skipped, to a fused kernel.
        self._step_supports_amp_scaling = False
        self._rotation.holders.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        for parameter in parameters:
            self._weights[parameter] = None
        for rotated in self._rotation.among(parameters):
            if rotated.entries is not None:
                self.replace(rotated.weight, rotated.entries)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters; see the module. The gradients of kept entries are used up by it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = self._rotation.step() + 1
        chosen = [(group, self._rotation.among(group["params"])) for group in self.param_groups]
        every = [w for _, weights in chosen for w in weights]
        for w in every:
            w.absorb()
        self._rotation.record(every)
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.gradients(), self._max_grad_norm)
        self._step_as_ever()
        for group, weights in chosen:
            for w in weights:
                if w.entries is not None and w.entries.grad is not None:
                    w.apply(decay=float(group["lr"] * group.get("weight_decay", 0.0)), scale=self._kept_scale)
        self._rotation.finish(every, done)
        self._stepped = True
        return loss

    def gradients(self) -> Iterator[nn.Parameter]:
        """What has a gradient: parameters, and the kept entries of chosen weights; to be clipped, say."""
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    def merge(self) -> None:
        """Go back to an ordinary model and optimizer: chosen weights get dense gradients again, with no
        optimizer state yet. Nothing is to be added to the weights: each step has done so.

        Raises:
            RuntimeError: the optimizer never stepped.
        """
        if not self._stepped:
            raise RuntimeError(
                f"{type(self).__name__}.merge() before its first step(): there is nothing to merge."
            )
        for group in self.param_groups:
            for w in self._rotation.among(group["params"]):
                w.end()

    def holds(self, weight: Tensor) -> bool:
        return weight in self._weights

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Step ``new`` in the place of ``old``. State that was loaded early and is ``new``'s goes along."""
        for group in self.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.state.pop(old, {})
        if state and all(value.shape == new.shape for value in state.values() if _has_size(value)):
            self.state[new] = state

    def restart(self, entries: nn.Parameter) -> None:
        self.state.pop(entries, None)

    def _step_as_ever(self) -> None:
        """The step of the optimizer that this one is made of, without the hooks: they run after ours."""
        step = super().step.__func__  # type: ignore[attr-defined]
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        step(self)


class SparseAdamW(SparseOptimizer, torch.optim.AdamW):
    """AdamW with moments for the kept entries alone. Its settings are those of :class:`SparseOptimizer` and
    of :class:`torch.optim.AdamW`. Source: SparseGrad (Chekalina et al., EMNLP 2024)."""


@functools.cache
def sparse(optimizer: type[torch.optim.Optimizer]) -> type[SparseOptimizer]:
    """The class of optimizers that do what ``optimizer`` does, with kept entries for the chosen weights::

        optimizer = sparse(torch.optim.SGD)(model.parameters(), backend, lr=0.1, momentum=0.9)

    Raises:
        ValueError: ``optimizer`` is no class of optimizers.
    """
    if not isinstance(optimizer, type) or not issubclass(optimizer, torch.optim.Optimizer):
        raise wrong("The optimizer in sparse", optimizer, "a class of optimizers, e.g. torch.optim.SGD")
    return type(f"Sparse{optimizer.__name__}", (SparseOptimizer, optimizer), {"__doc__": sparse.__doc__})


def freeze_unselected(model: nn.Module, method: RotatedTopK, keep: str | Collection[str] = ()) -> None:
    """Take the gradients from all parameters but the chosen weights, as parameter-efficient tuning does.
    Call it before the model is compiled.

    Args:
        model: its parameters' ``requires_grad`` is set to False.
        method: what chooses the weights.
        keep: patterns of the modules whose parameters stay trained as well: a new head, say.

    Raises:
        ValueError: the method or a pattern of ``keep`` selects nothing.
    """
    patterns = (keep,) if isinstance(keep, str) else tuple(keep)
    names = [naming.clean(name) for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(pattern_matches(pattern, name) for name in names):
            close = near(pattern, [*names, *(name.split(".")[0] for name in names)])
            raise ValueError(
                f"freeze_unselected.keep has the pattern '{pattern}', which matches none of {len(names)} "
                f"parameters; near names: {close or 'none'}."
            )
    chosen = selection.chosen_layers(model, method)
    for name, parameter in model.named_parameters():
        name = naming.clean(name)
        kept = naming.layer_of(name) in chosen and parameter.dim() == 2
        if not kept and not any(pattern_matches(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of an optimizer's state in bytes, its step counts left out."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if _has_size(value)
    )


def _has_size(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
