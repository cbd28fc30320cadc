"""`Adaptive`: sampling whose ratios follow from how much variance it adds; made by `Sample.adaptive`."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_compile.checks import integer, is_number, one_of, store, wrong

UPDATES = ("step", "solve")


@dataclass(frozen=True)
class Adaptive:
    """Sample as much as adds no more than a small share to the variance that SGD has anyway.

    As a `Schedule.blocks` it drops whole samples between blocks, as a `Schedule.linear` it draws rows for
    the weight gradients. Every `cal_var_freq` steps one step is run exactly, and measured from it are the
    variance between the samples of the batch, and what each kind of sampling would add to it.

    Source: VCAS (Wang et al., ICLR 2024, algorithm 1), with its defaults.

    Args:
        act_tau: the variance that dropping samples may add, as a share of SGD's own, a number > 0.
        weight_tau: the same for the rows of each weight gradient.
        cal_var_freq: steps between two measurements, an int >= 1. With `update="solve"` up to 8 times as
            many, for as long as the shares save less than measuring costs.
        s_step: alpha, by how much s changes: the share of the gradient norm that the kept samples carry.
        ratio_step: beta, the factor by which the share of rows of a weight gradient changes.
        smoothing: the share of the old one in a new share of samples, a number in [0, 1).
        update: "step" takes one such step after each measurement, as the paper does; "solve" goes at once to
            the smallest shares that the measurement allows, which matters where training is short.
        where: which modules are the blocks; see `Sample`.
        clip: cap on the weights 1/p of drawn rows, a number >= 1, or None for no cap; whole samples never
            have one. Their bias then counts as variance does: `weight_tau` bounds the squared error. "auto"
            chooses a cap for each weight gradient, the largest that allows the smallest share of rows.

    Raises:
        ValueError: a value is not among those above.
    """

    method: ClassVar[str] = "adaptive"  # the name in Schedule.to_dict

    act_tau: float = 0.025
    weight_tau: float = 0.025
    cal_var_freq: int = 100
    s_step: float = 0.01
    ratio_step: float = 0.95
    smoothing: float = 0.6
    update: str = "step"
    where: str | None = None
    clip: float | str | None = None

    def __post_init__(self) -> None:
        for field in ("act_tau", "weight_tau"):
            value = getattr(self, field)
            if not is_number(value) or not 0 < value < float("inf"):
                raise wrong(f"Sample.adaptive: {field}", value, "a finite number > 0")
            store(self, field, float(value))
        for field, low in (("s_step", False), ("ratio_step", False), ("smoothing", True)):
            value = getattr(self, field)
            if not is_number(value) or not 0 <= value < 1 or (value == 0 and not low):
                allowed = "a number in [0, 1)" if low else "a number in (0, 1)"
                raise wrong(f"Sample.adaptive: {field}", value, allowed)
            store(self, field, float(value))
        store(self, "cal_var_freq", integer("Sample.adaptive: cal_var_freq", self.cal_var_freq, at_least=1))
        store(self, "update", one_of("Sample.adaptive: update", self.update, UPDATES))
        if self.clip is not None and self.clip != "auto":
            if not is_number(self.clip) or not self.clip >= 1:
                raise wrong("Sample.adaptive: clip", self.clip, 'None, "auto" or a number >= 1')
            store(self, "clip", None if self.clip == float("inf") else float(self.clip))
        if self.where is not None and (not isinstance(self.where, str) or not self.where):
            raise wrong(
                "Sample.adaptive: where", self.where, "None, a class name or a pattern of module paths"
            )

    @property
    def phases(self) -> tuple[()]:
        """None: what holds follows from what was measured, not from the step."""
        return ()

    @property
    def needs_total_steps(self) -> bool:
        return False

    def at(self, fraction: float) -> "Adaptive":
        """Itself."""
        return self
