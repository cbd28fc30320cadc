"""When a site looks for rows that are zero."""

from __future__ import annotations


class Looks:
    """In every backward for as long as looks find enough, and ever more rarely while they do not.

    A look costs little, but for nothing where no batch has padding: 0.15 ms of the 15 that the backward of a
    512 × 1408 layer takes for 1024 rows (2 cores), since nothing of what it reads is in the cache.

    Args:
        longest: how many backwards there are between two looks, at most.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._pause = 0
        self._passed = 0

    def due(self) -> bool:
        """Whether to look in this backward."""
        if self._passed < self._pause:
            self._passed += 1
            return False
        return True

    def found(self, enough: bool) -> None:
        """What a look has found."""
        self._passed = 0
        self._pause = 0 if enough else min(2 * self._pause + 1, self._longest)

    def state(self) -> list[int]:
        return [self._pause, self._passed]

    def load(self, state: list[int]) -> None:
        self._pause, self._passed = state
