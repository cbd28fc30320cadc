"""What a site remembers of its earlier gradients where its launches are recorded: as ``memory.py``, at
addresses that stay.

What is remembered is renewed in its place, by kernels that are part of what was recorded. Whether it is
finite, they find out themselves: what is not is not kept, and what was there before stays.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparse_compile.changes import changed
from sparse_compile.memory import Use, alike
from sparse_compile.methods.rows import wide

PASSED_OVER = -1

Sizes = tuple[int, ...]  # the lengths of the sequences it is of


@dataclasses.dataclass(slots=True)
class Held:
    """Named tensors in their places, and how many backwards ago they were renewed (−1: never); what else is
    known of them is as in :class:`memory.Remembered`."""

    tensors: dict[str, Tensor]
    age: int = -1
    samples: int = 0
    until: int = 0
    passed_over: bool = False

    def copy(self) -> Held:
        """With tensors of its own."""
        return dataclasses.replace(self, tensors={name: x.clone() for name, x in self.tensors.items()})


class PlannedMemory:
    """What one site remembers, for each use of the layer and each length of the sequences, on the GPU that it
    was called for last."""

    def __init__(self) -> None:
        self._everywhere: dict[torch.device, dict[tuple[Use, Sizes], Held]] = {}
        self._held: dict[tuple[Use, Sizes], Held] = {}
        self._wanted: dict[tuple[Use, Sizes], dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        self._last: dict[Use, Sizes] = {}  # what was renewed last
        self._loaded: dict[Use, tuple[Sizes, Held]] = {}
        self.refreshes = 0

    def want(self, use: Use, sizes: Sizes, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Make room for tensors of these shapes and dtypes, when the next forward begins."""
        if (use, sizes) not in self._held:
            self._wanted[use, sizes] = tensors

    def reserve(self, device: torch.device) -> None:
        """Make the room that is wanted. (What is made while a CUDA graph is recorded is part of its memory.)
        On another GPU than before, nothing is remembered; launches that were recorded keep their places."""
        held = self._everywhere.setdefault(device, {})
        if held is not self._held:
            self._held = held
            self.clear()
        for key, wanted in self._wanted.items():
            made = {name: torch.zeros(s, dtype=dtype, device=device) for name, (s, dtype) in wanted.items()}
            self._held[key] = Held(made)
        self._wanted.clear()
        for use, (sizes, loaded) in self._loaded.items():
            if (use, sizes) in self._held:
                self._take(use, sizes, loaded)
            else:
                tensors = {name: x.to(device) for name, x in loaded.tensors.items()}
                self._held[use, sizes] = dataclasses.replace(loaded, tensors=tensors)
                self._last[use] = sizes
        self._loaded.clear()

    def has_room(self, use: Use, sizes: Sizes) -> bool:
        return (use, sizes) in self._held

    def age(self, use: Use, sizes: Sizes, samples: int, step: int) -> int | None:
        """How many backwards ago it was renewed; None if it never was, or last for other sizes, or too long
        ago. PASSED_OVER, if it stays what it is, but not for a batch of so many ``samples``."""
        held = self._held.get((use, sizes))
        if held is None or held.age < 0 or self._last.get(use) != sizes or step > held.until:
            return None
        if not alike(samples, held.samples):
            return None if held.passed_over else PASSED_OVER
        return held.age

    def recalled(self, use: Use, sizes: Sizes) -> None:
        """A backward reuses it."""
        self._held[use, sizes].age += 1
        self._held[use, sizes].passed_over = False

    def passed_over(self, use: Use, sizes: Sizes) -> None:
        """A backward of another batch does not."""
        self._held[use, sizes].passed_over = True

    def renewed(
        self, use: Use, sizes: Sizes, *, source: str, samples: int, until: int, seed: str
    ) -> list[int]:
        """A backward renews it. Returns which sample it is to be of, if of one, as a list."""
        held = self._held[use, sizes]
        held.age, held.samples, held.until, held.passed_over = 0, samples, until, False
        self._last[use] = sizes
        self.refreshes += 1
        return [random.Random(seed).randrange(samples)] if source == "sample" else []

    def tensors(self, use: Use, sizes: Sizes) -> dict[str, Tensor]:
        """What is remembered."""
        return self._held[use, sizes].tensors

    def renew(self, use: Use, sizes: Sizes, new: Mapping[str, Tensor], finite: Tensor) -> None:
        """Remember ``new``, if all of it is finite, which ``finite``, int64 [], is told."""
        sums = [tensor.sum(dtype=wide(tensor.dtype)) for tensor in new.values()]
        kept = (sums[0] if len(sums) == 1 else torch.stack(sums).sum()).isfinite()
        for name, held in self.tensors(use, sizes).items():
            held.copy_(torch.where(kept, new[name], held))
        finite.copy_(kept)

    def clear(self) -> None:
        """Forget it. Its places stay, where launches that were recorded may write to them."""
        for held in self._held.values():
            held.age = -1

    def forget(self) -> None:
        """Free its places, too."""
        changed()
        self._everywhere.clear()
        self._held = {}

    def items(self) -> Iterator[tuple[Use, Sizes, Held]]:
        """A copy of what would be recalled."""
        for (use, sizes), held in self._held.items():
            if held.age >= 0 and self._last.get(use) == sizes:
                yield use, sizes, held.copy()

    def load(self, use: Use, sizes: Sizes, held: Held) -> None:
        """Take over what another run remembered, when the next forward begins."""
        changed()
        self._loaded[use] = sizes, held.copy()

    def _take(self, use: Use, sizes: Sizes, loaded: Held) -> None:
        held, tensors = self._held[use, sizes], loaded.tensors
        if {name: x.shape for name, x in tensors.items()} != {n: x.shape for n, x in held.tensors.items()}:
            return  # of a layer of another width
        for name, tensor in tensors.items():
            held.tensors[name].copy_(tensor)
        self._held[use, sizes] = dataclasses.replace(loaded, tensors=held.tensors)
        self._last[use] = sizes
