"""What becomes of the weight gradients that are handed over: recorded, then formed in a rotated basis.

    calibration   site ─ dW ─► weight.grad ─► optimizer: records it, and steps as ever
    afterwards    site ─ S  ─► entries.grad ─► optimizer: steps the entries, and adds U · D · Vᵀ to the weight

Weights of one shape share a basis. The optimizer (``optim.py``) ends the calibration: it is what holds the
weights and knows their whole gradient, accumulated and unscaled. The gradient of the ``entries`` lies where
any gradient lies, so a GradScaler unscales it, and it can be clipped with the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sparse_compile.hosvd import Directions
from sparse_compile.methods import rotate
from sparse_compile.methods.rows import wide
from sparse_compile.settings.rotate import RotatedTopK

# Bases of this many directions in all take more than a few seconds to compute, and progress is shown.
_MANY = 20_000


class Holder(Protocol):
    """An optimizer that can step the entries of a weight in its place."""

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is one of its parameters, or was until its entries took its place."""

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Step ``new`` from now on, where it stepped ``old``: entries for a weight, or the reverse."""

    def restart(self, entries: nn.Parameter) -> None:
        """Forget the state of ``entries``: they now are other entries of their weight."""


Bases = tuple[Tensor | None, Tensor | None]  # U and V; None where a side is not rotated


class Basis:
    """U [O, P] and V [I, Q] of all weights of one shape, once the calibration has ended.

    Attributes:
        kept: k, how many entries of the corner are kept.
        corner: (P, Q).
        ready: whether U and V are known.
    """

    def __init__(self, outputs: int, inputs: int, method: RotatedTopK, seed: str) -> None:
        self.shape = (outputs, inputs)
        self._sides = method.sides
        self.kept = rotate.count(method.density, outputs, inputs)
        self.corner = rotate.corner(method.candidates * self.kept, outputs, inputs, method.sides)
        rotated = (method.sides == "both" or outputs < inputs, method.sides == "both" or inputs <= outputs)
        self._directions = tuple(
            Directions(size, rank, f"{seed}/{side}") if asked else None
            for side, (size, rank, asked) in enumerate(zip(self.shape, self.corner, rotated, strict=True))
        )
        self._vectors: list[Tensor | None] = [None, None]
        self._casts: dict[tuple[torch.dtype, torch.device], Bases] = {}

    @property
    def ready(self) -> bool:
        return any(vectors is not None for vectors in self._vectors)

    @property
    def recorded(self) -> bool:
        return any(side is not None and side.sums is not None for side in self._directions)

    def record(self, g: Tensor) -> None:
        """Take G [O, I] into account."""
        for side, oriented in zip(self._directions, (g, g.t()), strict=True):
            if side is not None:
                side.add(oriented)

    def finish(self) -> None:
        self._vectors = [None if side is None else side.leading() for side in self._directions]
        self._casts.clear()
        for side in self._directions:
            if side is not None:
                side.sums = None

    def like(self, tensor: Tensor) -> Bases:
        """U and V in the dtype and on the device of ``tensor``."""
        key = (tensor.dtype, tensor.device)
        if key not in self._casts:
            u, v = (None if vectors is None else vectors.to(tensor) for vectors in self._vectors)
            self._casts[key] = u, v
        return self._casts[key]

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """S [P, Q] of dY [N, O] and X [N, I]."""
        return rotate.gradient(dy, x, *self.like(dy))

    def rotated(self, g: Tensor) -> Tensor:
        """S [P, Q] of G [O, I]."""
        return rotate.rotated(g, *self.like(g))

    def flops(self, n: int) -> int:
        """What :meth:`gradient` costs for N rows."""
        return rotate.flops(n, *self.shape, *self.corner, self._sides)

    def state_dict(self) -> dict[str, Tensor | None]:
        sums = [None if side is None else side.sums for side in self._directions]
        named = zip(("u", "v", "rows", "columns"), (*self._vectors, *sums), strict=True)
        return {name: _copy(tensor) for name, tensor in named}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self._vectors = [_copy(state["u"]), _copy(state["v"])]
        self._casts.clear()
        for side, name in zip(self._directions, ("rows", "columns"), strict=True):
            if side is not None:
                side.sums = _copy(state[name])


class RotatedWeight:
    """One chosen weight, and where its gradient goes.

    Attributes:
        name: of the layer.
        basis: shared with the weights of its shape.
        entries: [k], zero between steps; None during the calibration. What an optimizer steps.
        indices: which entries of the corner they are, int32 [k] of the flattened [P, Q]; None until they are
            chosen, at the end of the calibration or, if that was too short, by the first gradient after it.
        energy: Σ S², [P, Q], of the calibration's steps in which the basis was known; None without any.
        ended: whether it is done with, and the gradient is dense for good.
    """

    def __init__(self, name: str, weight: nn.Parameter, *, transposed: bool, basis: Basis, owner: Rotation):
        self.name = name
        self.basis = basis
        self.entries: nn.Parameter | None = None
        self.indices: Tensor | None = None
        self.energy: Tensor | None = None
        self._weight = weakref.ref(weight)
        self._transposed = transposed
        self._owner = owner
        self._chosen_at = 0
        self._provisional = False
        self.ended = False

    def is_of(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is the weight, or its entries."""
        return parameter is self._weight() or parameter is self.entries

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as the model has it."""
        weight = self._weight()
        assert weight is not None, f"the model of {self.name} is gone"
        return weight

    @property
    def density(self) -> float:
        """The share of its entries that is updated now."""
        return 1.0 if self.entries is None else self.basis.kept / self.weight.numel()

    @property
    def note(self) -> str:
        """What becomes of its gradient, for the report."""
        method = self._owner.method
        if self.entries is not None:
            p, q = self.basis.corner
            return f"{self.basis.kept} entries of {p} x {q} of the rotated weight gradient"
        if self.ended or method.density == 1:
            return ""
        return f"weight gradient recorded until step {method.calibration_steps}"

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor that is laid out as the parameter is, seen as [O, I]."""
        return tensor.t() if self._transposed else tensor

    def accept(self, s: Tensor) -> None:
        """Add the kept entries of S [P, Q] to the gradient of ``entries``; if it is time, choose them."""
        assert self.entries is not None
        self._owner.check_held(self)
        if self._choice_due():
            self.indices = rotate.choose(s, self.basis.kept)
            self._chosen_at = self._owner.step()
            self._provisional = not bool(s.sum().isfinite())  # after an overflow; the step will be skipped
            self.entries.grad = None
            for holder in self._owner.holders_of(self):
                holder.restart(self.entries)
        assert self.indices is not None
        kept = s.flatten()[self.indices.long()].to(self.entries.dtype)
        before = self.entries.grad
        if before is not None:
            # After an overflow a GradScaler skips the step, and `model.zero_grad()` does not reach this.
            kept = kept + torch.where(before.isfinite(), before, 0)
        self.entries.grad = kept

    def accept_dense(self, dw: Tensor) -> None:
        """Add dW [O, I] to the parameter's gradient, as autograd would.

        Raises:
            RuntimeError: steps have been taken, and by no optimizer that could do so with entries.
        """
        weight = self.weight
        self._owner.check_held(self)
        dw = self.oriented(dw).to(weight.dtype)
        weight.grad = dw if weight.grad is None else weight.grad + dw

    def record(self) -> None:
        """Take the gradient of a step of the calibration into account: for the basis, and once that is known,
        for what is large in it. What is not finite is left out."""
        if self.ended or self.entries is not None or self.weight.grad is None:
            return
        g = self.oriented(self.weight.grad)
        if not bool(g.sum().isfinite()):
            return
        if not self.basis.ready:
            self.basis.record(g)
        else:
            square = self.basis.rotated(g.to(wide(g.dtype))).square()
            self.energy = square if self.energy is None else self.energy.to(square).add_(square)

    def start(self, step: int) -> None:
        """End the calibration of this weight; ``step`` is the first after it."""
        if self.energy is not None:
            self.indices = rotate.choose(self.energy, self.basis.kept)
            self._chosen_at, self.energy = step, None
        self.entries = nn.Parameter(self.weight.new_zeros(self.basis.kept))
        self.weight.grad = None
        for holder in self._owner.holders_of(self):
            holder.replace(self.weight, self.entries)

    def absorb(self) -> None:
        """Rotate a dense gradient that has reached the weight by another way than its layer's backward: a
        penalty on it, say, or a second use that is not compiled."""
        g = self.weight.grad
        if self.entries is not None and g is not None:
            self.accept(self.basis.rotated(self.oriented(g)))
            self.weight.grad = None

    def stop(self) -> None:
        """Give the weight its place in the optimizers back."""
        if self.entries is not None:
            for holder in self._owner.holders_of(self):
                holder.replace(self.entries, self.weight)
        self.entries = self.indices = None

    def end(self) -> None:
        """Stop, for good."""
        self.stop()
        self.ended = True

    @torch.no_grad()
    def apply(self, *, decay: float, scale: float) -> None:
        """W ← (1 − decay) · W + scale · U · D · Vᵀ, and set the entries to zero."""
        assert self.entries is not None
        assert self.indices is not None
        weight = self.oriented(self.weight.data)
        if decay:
            weight.mul_(1 - decay)
        basis = self.basis
        moved = rotate.update(self.entries.data, self.indices, *basis.like(weight), basis.corner)
        weight.add_(moved, alpha=scale)
        self.entries.zero_()
        self.entries.grad = None

    def _choice_due(self) -> bool:
        assert self.entries is not None
        if self.indices is None or self._provisional:
            return True
        every = self._owner.method.choose_every
        return (
            every is not None and self.entries.grad is None and self._owner.step() - self._chosen_at >= every
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "indices": _copy(self.indices),
            "energy": _copy(self.energy),
            "chosen_at": self._chosen_at,
            "started": self.entries is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.entries is not None and not state["started"]:
            self.stop()
        elif self.entries is None and state["started"]:
            self.start(state["chosen_at"])
        self.indices, self._chosen_at = _copy(state["indices"]), state["chosen_at"]
        self.energy = _copy(state["energy"])


class Rotation:
    """All chosen weights of one backend, and their bases.

    Args:
        method: of the schedule.
        seed: of what is random in large bases.
        step: tells how many optimizer steps were taken.

    Attributes:
        holders: the optimizers that were made for the backend.
    """

    def __init__(self, method: RotatedTopK, seed: str, step: Callable[[], int]) -> None:
        self.method = method
        self.seed = seed
        self.step = step
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._weights: dict[str, RotatedWeight] = {}
        self._bases: dict[str, Basis] = {}
        self._pending: dict[str, Any] = {}

    def add(self, name: str, weight: nn.Parameter, *, transposed: bool) -> RotatedWeight:
        """The chosen weight of the layer ``name``; ``transposed`` says that the parameter is [I, O]."""
        found = self._weights.get(name)
        if found is None or not found.is_of(weight):
            outputs, inputs = weight.t().shape if transposed else weight.shape
            basis = self._basis(outputs, inputs)
            found = RotatedWeight(name, weight, transposed=transposed, basis=basis, owner=self)
            self._weights[name] = found
            if name in self._pending:
                found.load_state_dict(self._pending.pop(name))
        return found

    def forget(self, name: str) -> None:
        """Drop what is known of a layer whose model is gone."""
        self._weights.pop(name, None)

    def among(self, parameters: Iterable[Tensor]) -> list[RotatedWeight]:
        """The chosen of ``parameters``, each given by itself or by its entries."""
        return [w for p in parameters for w in self._weights.values() if w.is_of(p)]

    def holders_of(self, rotated: RotatedWeight) -> list[Holder]:
        return [holder for holder in self.holders if holder.holds(rotated.weight)]

    def check_held(self, rotated: RotatedWeight) -> None:
        if self.method.density == 1 or self.step() == 0 or self.holders_of(rotated):
            return
        raise RuntimeError(
            f"Schedule.weight_gradients needs an optimizer of sparse_compile.optim, and after {self.step()} "
            f"steps none holds the weight of '{rotated.name}': use SparseAdamW(model.parameters(), backend, "
            "...), or sparse(...) of another optimizer."
        )

    @torch.no_grad()
    def record(self, weights: Sequence[RotatedWeight]) -> None:
        """Take the gradients of a step into account, of those weights that are still calibrated."""
        for w in weights if self.method.density < 1 else ():
            w.record()

    @torch.no_grad()
    def finish(self, weights: Sequence[RotatedWeight], done: int) -> None:
        """Compute the bases of those weights for whose shape there are gradients, and end their calibration,
        when ``done`` steps make it time for that."""
        if done < self.method.basis_steps:
            return
        known = [w for w in weights if w.basis.ready or w.basis.recorded]
        waiting = [w for w in known if w.entries is None and not w.ended]
        bases = list({id(w.basis): w.basis for w in waiting if not w.basis.ready}.values())
        many = sum(sum(basis.shape) for basis in bases) >= _MANY
        console = Console(stderr=True)
        for basis in track(bases, "rotated bases", disable=not many, console=console, transient=True):
            basis.finish()
        for w in waiting if done >= self.method.calibration_steps else ():
            w.start(done)

    def _basis(self, outputs: int, inputs: int) -> Basis:
        key = f"{outputs}x{inputs}"
        if key not in self._bases:
            self._bases[key] = Basis(outputs, inputs, self.method, f"{self.seed}/{key}")
        return self._bases[key]

    def state_dict(self) -> dict[str, Any]:
        weights = {name: weight.state_dict() for name, weight in self._weights.items()}
        return {
            "bases": {key: basis.state_dict() for key, basis in self._bases.items()},
            "weights": {**self._pending, **weights},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Weights that do not exist yet (they are added when their graph first runs) take theirs then."""
        self._bases = {}
        for key, values in state["bases"].items():
            self._basis(*map(int, key.split("x"))).load_state_dict(values)
        self._pending = dict(state["weights"])
        for name, weight in list(self._weights.items()):
            weight.basis = self._basis(*weight.basis.shape)
            weight.load_state_dict(self._pending.pop(name, FRESH))


FRESH: dict[str, Any] = {"indices": None, "energy": None, "chosen_at": 0, "started": False}


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
