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
from sparse_compile.memory import Use
from sparse_compile.methods.rows import wide

Sizes = tuple[int, ...]  # the lengths of the sequences it is of


@dataclasses.dataclass(slots=True)
class Held:
    """Named tensors in their places, and how many backwards ago they were renewed (−1: never)."""

    tensors: dict[str, Tensor]
    age: int = -1


class PlannedMemory:
    """What one site remembers, for each use of the layer and each length of the sequences, on the GPU that it
    was called for last."""

    def __init__(self) -> None:
        self._everywhere: dict[torch.device, dict[tuple[Use, Sizes], Held]] = {}
        self._held: dict[tuple[Use, Sizes], Held] = {}
        self._wanted: dict[tuple[Use, Sizes], dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        self._last: dict[Use, Sizes] = {}  # what was renewed last
        self._loaded: dict[Use, tuple[Sizes, dict[str, Tensor], int]] = {}
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
        for use, (sizes, tensors, age) in self._loaded.items():
            if (use, sizes) in self._held:
                self._take(use, sizes, tensors, age)
            else:
                self._held[use, sizes] = Held({name: x.to(device) for name, x in tensors.items()}, age)
                self._last[use] = sizes
        self._loaded.clear()

    def has_room(self, use: Use, sizes: Sizes) -> bool:
        return (use, sizes) in self._held

    def age(self, use: Use, sizes: Sizes) -> int | None:
        """How many backwards ago it was renewed; None if it never was, or last for other sizes."""
        held = self._held.get((use, sizes))
        return None if held is None or held.age < 0 or self._last.get(use) != sizes else held.age

    def recalled(self, use: Use, sizes: Sizes) -> None:
        """A backward reuses it."""
        self._held[use, sizes].age += 1

    def renewed(self, use: Use, sizes: Sizes, *, source: str, samples: int, seed: str) -> list[int]:
        """A backward renews it. Returns which sample it is to be of, if of one, as a list."""
        self._held[use, sizes].age, self._last[use] = 0, sizes
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

    def items(self) -> Iterator[tuple[Use, Sizes, dict[str, Tensor], int]]:
        """What would be recalled, and its age."""
        for (use, sizes), held in self._held.items():
            if held.age >= 0 and self._last.get(use) == sizes:
                yield use, sizes, held.tensors, held.age

    def load(self, use: Use, sizes: Sizes, tensors: dict[str, Tensor], age: int) -> None:
        """Take over what another run remembered, when the next forward begins."""
        changed()
        self._loaded[use] = sizes, {name: tensor.clone() for name, tensor in tensors.items()}, age

    def _take(self, use: Use, sizes: Sizes, tensors: dict[str, Tensor], age: int) -> None:
        held = self._held[use, sizes]
        if {name: x.shape for name, x in tensors.items()} != {n: x.shape for n, x in held.tensors.items()}:
            return  # of a layer of another width
        for name, tensor in tensors.items():
            held.tensors[name].copy_(tensor)
        held.age, self._last[use] = age, sizes
