"""What a site remembers of its earlier gradients, for each use of the layer: :class:`Memory` is a linear's,
:class:`Memories`, of several tensors, an attention's.

*This is the file that remembers the last gradient.* What a base is for is said in ``methods/reuse.py``.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from torch import Tensor

from sparse_compile.later import Later
from sparse_compile.methods import reuse
from sparse_compile.methods.rows import wide

Use = tuple[int, int]  # which use of the layer in one forward, and which of the forwards now in flight


@dataclasses.dataclass(slots=True)
class Base:
    """The remembered gradient, P [T, O], how many backwards ago it was made, and its sum, which is finite if
    all of it is (added up in float32: 0.04 ms where isfinite().all() takes 0.6). A GPU tells later."""

    value: Tensor
    age: int = 0
    sum: Later | None = None  # None: it is finite


class Memory:
    """The bases of one site."""

    def __init__(self) -> None:
        self._bases: dict[Use, Base] = {}
        self._refreshes = 0

    def recall(self, use: Use, dy: Tensor, tokens: int) -> Tensor | None:
        """P [T, O] in the dtype of ``dy`` [N, O], or None: there is none, or it is of sequences of another
        length, with which there is nothing to compare; nor is there with no rows, as of an idle expert."""
        base = self._bases.get(use)
        if base is not None and not _is_finite(base):
            self._bases.pop(use)
            return None
        if base is None or base.value.shape != (tokens, dy.shape[1]) or len(dy) % tokens or len(dy) == 0:
            return None
        base.value = base.value.to(dy)
        base.age += 1
        return base.value

    def has_another(self, use: Use, dy: Tensor, tokens: int) -> bool:
        """Whether what is remembered is of sequences of another length."""
        base = self._bases.get(use)
        return base is not None and base.value.shape[0] != tokens and len(dy) > 0

    def renew(
        self, use: Use, dy: Tensor, tokens: int, *, source: str, every: int, recalled: bool, seed: str
    ) -> None:
        """Remember ``dy`` [N, O], if nothing was recalled for it or the base is ``every`` backwards old.
        Of no rows there is nothing to remember, and a base is kept.
        ``seed``, the use and a count decide which sample it is to be.

        A base that is not finite is not kept: it comes of an overflow under mixed precision, whose step will
        be skipped.
        """
        if len(dy) == 0 or (recalled and self._bases[use].age < every):
            return
        sample = None
        if source == "sample":
            choice = random.Random(f"{seed}/{use}/{self._refreshes}")
            sample = choice.randrange(len(dy) // tokens)
        self._refreshes += 1
        value = reuse.next_base(dy, tokens, sample)
        base = self._bases[use] = Base(value, sum=Later(value.sum(dtype=wide(value.dtype))))
        if not value.is_cuda and not _is_finite(base):
            self._bases.pop(use)

    def clear(self) -> None:
        self._bases.clear()

    def state_dict(self) -> dict[str, Any]:
        bases = {
            f"{call}/{lane}": (base.value, base.age)
            for (call, lane), base in self._bases.items()
            if _is_finite(base)
        }
        return {"bases": bases, "refreshes": self._refreshes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._refreshes = state.get("refreshes", 0)
        self._bases = {}
        for key, (value, age) in state.get("bases", {}).items():
            call, lane = key.split("/")
            self._bases[int(call), int(lane)] = Base(value.clone(), age)


@dataclasses.dataclass(slots=True)
class Snapshot:
    """Named tensors of one backward, the lengths of the sequences they are of, how many backwards ago, and
    their sum, which is finite if all of them are, and which a GPU tells later."""

    tensors: dict[str, Tensor]
    sizes: tuple[int, ...]
    age: int = 0
    sum: Later | None = None  # None: they are finite


class Memories:
    """What one attention remembers; as :class:`Memory`, for several tensors at once."""

    def __init__(self) -> None:
        self._snapshots: dict[Use, Snapshot] = {}
        self._draws = 0

    def recall(self, use: Use, like: Tensor, sizes: tuple[int, ...]) -> dict[str, Tensor] | None:
        """What was remembered, in the dtype of ``like``; None if nothing was, or for other ``sizes``."""
        snapshot = self._snapshots.get(use)
        if snapshot is None or snapshot.sizes != sizes or not _is_finite(snapshot):
            self._snapshots.pop(use, None)
            return None
        snapshot.tensors = {name: tensor.to(like) for name, tensor in snapshot.tensors.items()}
        snapshot.age += 1
        return snapshot.tensors

    def has_another(self, use: Use, sizes: tuple[int, ...]) -> bool:
        """Whether what is remembered is of other ``sizes``."""
        return use in self._snapshots and self._snapshots[use].sizes != sizes

    def due(self, use: Use, every: int) -> bool:
        """Whether there is nothing to recall, or it has been recalled ``every`` times."""
        return use not in self._snapshots or self._snapshots[use].age >= every

    def remember(self, use: Use, tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
        """Remember ``tensors`` if they are finite, else nothing."""
        sums = torch.stack([tensor.sum(dtype=wide(tensor.dtype)) for tensor in tensors.values()])
        self._snapshots[use] = Snapshot(tensors, sizes, sum=Later(sums.sum()))
        if not sums.is_cuda and not _is_finite(self._snapshots[use]):
            self._snapshots.pop(use)

    def draw(self, samples: int, seed: str) -> int:
        """A random sample; ``seed`` and a count decide which."""
        self._draws += 1
        return random.Random(f"{seed}/{self._draws}").randrange(samples)

    def clear(self) -> None:
        self._snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        snapshots = {
            f"{call}/{lane}": (s.tensors, list(s.sizes), s.age)
            for (call, lane), s in self._snapshots.items()
            if _is_finite(s)
        }
        return {"snapshots": snapshots, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = state.get("draws", 0)
        self._snapshots = {}
        for key, (tensors, sizes, age) in state.get("snapshots", {}).items():
            call, lane = key.split("/")
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            self._snapshots[int(call), int(lane)] = Snapshot(copies, tuple(sizes), age)


def _is_finite(remembered: Base | Snapshot) -> bool:
    if remembered.sum is not None and math.isfinite(remembered.sum.read()):
        remembered.sum = None
    return remembered.sum is None
