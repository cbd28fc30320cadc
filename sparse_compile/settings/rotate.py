"""`RotatedTopK`: of a weight's gradient only the largest entries in a rotated basis are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparse_compile.checks import integer, is_number, one_of, store, wrong

SIDES = ("short", "both")


@dataclass(frozen=True)
class RotatedTopK:
    """Update only the largest entries of each chosen weight's gradient, in a basis where few are large.

    For the first steps the chosen layers train densely, and their gradients are recorded. A higher-order SVD
    of them gives the basis. From then on the backward forms a corner of the rotated gradient alone, and an
    optimizer of `sparse_compile.optim`, which this method needs, keeps state for the chosen entries only.

    Source: SparseGrad (Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP
    Layers", EMNLP 2024).

    Args:
        density: the share of a weight's entries that is updated, a number in (0, 1]. At 1 nothing is
            rotated: every entry of the ordinary gradient is kept.
        calibration_steps: optimizer steps during which gradients are recorded, an int >= 1. The first three
            quarters of them give the basis, and the rest, where it is known, the entries: those with the most
            energy over these steps. (With fewer than 4, the first gradient after them chooses.)
        candidates: how many entries of the rotated gradient are computed for each that is kept, a number
            >= 1: the corner of the largest expected energy, from which the kept ones are chosen.
        sides: which sides of a weight are rotated: "both", as published, or only the "short" one. That is
            cheaper and holds about as much of the gradient (see `methods/rotate.py`).
        choose_every: the entries are chosen anew after so many optimizer steps, an int >= 1; the optimizer
            state of a weight starts anew with them. None chooses once, at the end of the calibration.
        where: patterns of module paths, of the layers that are chosen. None takes the MLPs: in each of the
            model's repeated blocks and outside of its attention, the layers that widen, and those behind
            them that narrow again.

    Raises:
        ValueError: a value is not among those above.
    """

    method: ClassVar[str] = "rotated_top_k"  # the name in Schedule.to_dict
    needs_total_steps: ClassVar[bool] = False
    phases: ClassVar[tuple[tuple[float, float], ...]] = ()

    density: float
    calibration_steps: int = 30
    candidates: float = 4.0
    sides: str = "short"
    choose_every: int | None = None
    where: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise wrong("RotatedTopK.density", self.density, "a number in (0, 1]")
        store(self, "density", float(self.density))
        steps = integer("RotatedTopK.calibration_steps", self.calibration_steps, at_least=1)
        store(self, "calibration_steps", steps)
        if not is_number(self.candidates) or not 1 <= self.candidates < float("inf"):
            raise wrong("RotatedTopK.candidates", self.candidates, "a finite number >= 1")
        store(self, "candidates", float(self.candidates))
        store(self, "sides", one_of("RotatedTopK.sides", self.sides, SIDES))
        if self.choose_every is not None:
            every = integer("RotatedTopK.choose_every", self.choose_every, at_least=1)
            store(self, "choose_every", every)
        store(self, "where", _patterns(self.where))

    @property
    def basis_steps(self) -> int:
        """After how many steps of the calibration the basis is computed."""
        return self.calibration_steps - self.calibration_steps // 4

    def at(self, fraction: float) -> "RotatedTopK":
        """This method: it is the same at every `fraction` of training.

        Raises:
            ValueError: `fraction` is not a number >= 0.
        """
        if not is_number(fraction) or not fraction >= 0:
            raise wrong("The fraction in RotatedTopK.at", fraction, "a number >= 0")
        return self


def _patterns(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else value
    if (
        not isinstance(patterns, list | tuple)
        or not patterns
        or not all(isinstance(p, str) and p for p in patterns)
    ):
        raise wrong("RotatedTopK.where", value, "None, a pattern of module paths or a list of them")
    return tuple(patterns)
