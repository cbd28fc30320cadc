"""What a site remembers of its earlier gradients, for each use of the layer: :class:`Memory` is a linear's,
:class:`Memories`, of several tensors, an attention's.

*This is the file that remembers the last gradient.* What a base is for is said in ``methods/reuse.py``.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_compile.later import Later
from sparse_compile.methods import reuse
from sparse_compile.methods.rows import wide

Use = tuple[int, int]  # which use of the layer in one forward, and which of the forwards now in flight

R = TypeVar("R", bound="Remembered")


def alike(samples: int, others: int) -> bool:
    """Whether gradients of batches of so many samples may stand in for each other. The loss is a mean, as a
    rule, and then they are as much larger as the batch is smaller."""
    return 4 * abs(samples - others) <= others


@dataclasses.dataclass(slots=True, kw_only=True)
class Remembered:
    """Something that was remembered.

    Attributes:
        samples: B, of the batch that it was made of.
        until: the last step in which it is reused. (A layer may be frozen, or dropped, for a while.)
        age: how many backwards ago it was made.
        passed_over: whether the last backward was of a batch of another number of samples.
        sum: of all entries, which is finite if all of them are (added up in float32: 0.04 ms where
            isfinite().all() takes 0.6), and which a GPU tells later; None: they are finite.
    """

    samples: int
    until: int
    age: int = 0
    passed_over: bool = False
    sum: Later | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Base(Remembered):
    """The remembered gradient, P [T, O]."""

    value: Tensor


@dataclasses.dataclass(slots=True, kw_only=True)
class Snapshot(Remembered):
    """Named tensors of one backward, and the lengths of the sequences they are of."""

    tensors: dict[str, Tensor]
    sizes: tuple[int, ...]


class Memory:
    """The bases of one site."""

    def __init__(self) -> None:
        self._bases: dict[Use, Base] = {}
        self._refreshes = 0

    def recall(self, use: Use, dy: Tensor, tokens: int, step: int) -> Tensor | None:
        """P [T, O] in the dtype of ``dy`` [N, O], or None: there is none, or it is of long ago, or of
        sequences of another length or batches of another size, with which there is nothing to compare; nor
        is there with no rows, as of an idle expert."""
        if len(dy) == 0:
            return None
        base = _recall(self._bases, use, len(dy) // tokens, step, fits=self._fits(use, dy, tokens))
        if base is None:
            return None
        base.value = base.value.to(dy)
        return base.value

    def has_another(self, use: Use, dy: Tensor, tokens: int) -> bool:
        """Whether what is remembered is of sequences of another length, or of a batch of another size."""
        base = self._bases.get(use)
        if base is None or len(dy) == 0:
            return False
        return base.value.shape[0] != tokens or not alike(len(dy) // tokens, base.samples)

    def _fits(self, use: Use, dy: Tensor, tokens: int) -> bool:
        return use in self._bases and self._bases[use].value.shape == (tokens, dy.shape[1])

    def renew(
        self, use: Use, dy: Tensor, tokens: int, step: int, *, source: str, every: int, seed: str
    ) -> None:
        """Remember ``dy`` [N, O], if there is nothing to recall or it is ``every`` backwards old. Of no rows
        there is nothing to remember, and a base is kept.
        ``seed``, the use and a count decide which sample it is to be.

        A base that is not finite is not kept: it comes of an overflow under mixed precision, whose step will
        be skipped.
        """
        if len(dy) == 0 or not _is_due(self._bases, use, every):
            return
        samples, sample = len(dy) // tokens, None
        if source == "sample":
            choice = random.Random(f"{seed}/{use}/{self._refreshes}")
            sample = choice.randrange(samples)
        self._refreshes += 1
        value = reuse.next_base(dy, tokens, sample)
        total = Later(value.sum(dtype=wide(value.dtype)))
        base = self._bases[use] = Base(value=value, samples=samples, until=last_step(step, every), sum=total)
        if not value.is_cuda and not _is_finite(base):
            self._bases.pop(use)

    def clear(self) -> None:
        self._bases.clear()

    def state_dict(self) -> dict[str, Any]:
        bases = {
            f"{call}/{lane}": (base.value, base.age, base.samples, base.until)
            for (call, lane), base in self._bases.items()
            if _is_finite(base)
        }
        return {"bases": bases, "refreshes": self._refreshes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._refreshes = state.get("refreshes", 0)
        self._bases = {}
        for key, (value, age, samples, until) in state.get("bases", {}).items():
            call, lane = key.split("/")
            base = Base(value=value.clone(), age=age, samples=samples, until=until)
            self._bases[int(call), int(lane)] = base


class Memories:
    """What one attention remembers; as :class:`Memory`, for several tensors at once."""

    def __init__(self) -> None:
        self._snapshots: dict[Use, Snapshot] = {}
        self._draws = 0

    def recall(self, use: Use, like: Tensor, sizes: tuple[int, ...], step: int) -> dict[str, Tensor] | None:
        """What was remembered, in the dtype of ``like`` [B, …]; None if nothing was, or long ago, or for
        other ``sizes``, or for batches of another size."""
        fits = use in self._snapshots and self._snapshots[use].sizes == sizes
        snapshot = _recall(self._snapshots, use, len(like), step, fits=fits)
        if snapshot is None:
            return None
        snapshot.tensors = {name: tensor.to(like) for name, tensor in snapshot.tensors.items()}
        return snapshot.tensors

    def has_another(self, use: Use, like: Tensor, sizes: tuple[int, ...]) -> bool:
        """Whether what is remembered is of other ``sizes``, or of a batch of another size than ``like``."""
        snapshot = self._snapshots.get(use)
        return snapshot is not None and not (snapshot.sizes == sizes and alike(len(like), snapshot.samples))

    def due(self, use: Use, every: int) -> bool:
        """Whether there is nothing to recall, or it has been recalled ``every`` times."""
        return _is_due(self._snapshots, use, every)

    def remember(
        self, use: Use, tensors: dict[str, Tensor], sizes: tuple[int, ...], samples: int, until: int
    ) -> None:
        """Remember ``tensors`` if they are finite, else nothing."""
        sums = torch.stack([tensor.sum(dtype=wide(tensor.dtype)) for tensor in tensors.values()])
        snapshot = self._snapshots[use] = Snapshot(
            tensors=tensors, sizes=sizes, samples=samples, until=until, sum=Later(sums.sum())
        )
        if not sums.is_cuda and not _is_finite(snapshot):
            self._snapshots.pop(use)

    def draw(self, samples: int, seed: str) -> int:
        """A random sample; ``seed`` and a count decide which."""
        self._draws += 1
        return random.Random(f"{seed}/{self._draws}").randrange(samples)

    def clear(self) -> None:
        self._snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        snapshots = {
            f"{call}/{lane}": (s.tensors, list(s.sizes), s.age, s.samples, s.until)
            for (call, lane), s in self._snapshots.items()
            if _is_finite(s)
        }
        return {"snapshots": snapshots, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = state.get("draws", 0)
        self._snapshots = {}
        for key, (tensors, sizes, age, samples, until) in state.get("snapshots", {}).items():
            call, lane = key.split("/")
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            self._snapshots[int(call), int(lane)] = Snapshot(
                tensors=copies, sizes=tuple(sizes), age=age, samples=samples, until=until
            )


def last_step(step: int, every: int) -> int:
    """Until when something is reused that was made in this step and is renewed ``every`` so many backwards:
    one step may pass it over."""
    return step + every + 1


def _recall(all_of_it: dict[Use, R], use: Use, samples: int, step: int, *, fits: bool) -> R | None:
    """What is to be reused by a batch of so many samples. What is not any more is forgotten; but one batch of
    another size, as the last of an epoch is, passes over what is remembered, and leaves it."""
    found = all_of_it.get(use)
    if found is None:
        return None
    others = not alike(samples, found.samples)
    if not fits or step > found.until or not _is_finite(found) or (others and found.passed_over):
        all_of_it.pop(use)
        return None
    found.passed_over = others
    if others:
        return None
    found.age += 1
    return found


def _is_due(all_of_it: Mapping[Use, Remembered], use: Use, every: int) -> bool:
    return use not in all_of_it or all_of_it[use].age >= every


def _is_finite(remembered: Remembered) -> bool:
    if remembered.sum is not None and math.isfinite(remembered.sum.read()):
        remembered.sum = None
    return remembered.sum is None
