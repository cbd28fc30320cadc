"""`Sample`: rows of a gradient drawn at random, so that on average nothing is missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from sparse_compile.checks import is_number, one_of, store, unknown, wrong
from sparse_compile.phases import KeepPhases, parse_keep
from sparse_compile.settings.adaptive import Adaptive

GRADIENTS = ("both", "input", "weight")


@dataclass(frozen=True)
class Sample:
    """Draw rows of the output gradient with a probability that grows with their norm, and scale them up.

    With no `clip` the gradients are unbiased: their mean over many draws is the dense gradient. Always
    exactly round(keep * N) of N rows are drawn, or all rows that are not zero if those are fewer.

    Source: VCAS (Wang et al., "Efficient Backpropagation with Variance-Controlled Adaptive Sampling",
    ICLR 2024).

    Args:
        keep: the share of the rows that is computed. A number in (0, 1], where 1 is exact, or a list of
            (keep, start) pairs, which hold from the fraction `start` of training until the next pair's
            start. The first start is 0.0, starts increase.
        clip: cap on the weight 1/p of a drawn row, a number >= 1, or None for no cap. At 1 the drawn rows
            count once each: little variance, much bias.
        gradients: what is computed from drawn rows: "both", or only the gradient to the "input" (dX) or
            to the "weight" (dW), while the other stays exact.
        where: only as a `Schedule.blocks`: which modules are the blocks, as a class name or a pattern of
            module paths. None finds them: the numbered modules of the model that hold other modules.

    Raises:
        ValueError: a value is not among those above, or phases are out of order.
    """

    method: ClassVar[str] = "sample"  # the name in Schedule.to_dict

    keep: float | Sequence[tuple[float, float]]
    clip: float | None = None
    gradients: str = "both"
    where: str | None = None

    def __post_init__(self) -> None:
        store(self, "keep", parse_keep("Sample.keep", self.keep))
        if self.clip is not None:
            if not is_number(self.clip) or not self.clip >= 1:
                raise wrong("Sample.clip", self.clip, "None or a number >= 1")
            store(self, "clip", None if self.clip == math.inf else float(self.clip))
        store(self, "gradients", one_of("Sample.gradients", self.gradients, GRADIENTS))
        if self.where is not None and (not isinstance(self.where, str) or not self.where):
            raise wrong("Sample.where", self.where, "None, a class name or a pattern of module paths")

    @staticmethod
    def adaptive(**settings: Any) -> Adaptive:
        """Sampling that is controlled by its variance, as VCAS does it (Wang et al., ICLR 2024, algorithm 1).

        As a `Schedule.blocks` it drops whole samples between blocks, as a `Schedule.linear` it draws rows for
        the weight gradients. `settings`, with their defaults: `act_tau=0.025` and `weight_tau=0.025`, the
        variance that each may add, as a share of SGD's own; `cal_var_freq=100`, steps between two
        measurements; `update="step"`, or "solve", which goes at once to what a measurement allows;
        `s_step=0.01`, `ratio_step=0.95`, `smoothing=0.6`, how fast "step" goes; `clip=None`, a cap on the
        weights of drawn rows, or "auto"; `where=None`, which modules are the blocks.

        Raises:
            ValueError, TypeError: a setting has a value that is refused, or is not known.
        """
        known = [field.name for field in fields(Adaptive)]
        for name in set(settings) - set(known):
            raise unknown("Sample.adaptive()", name, known)
        return Adaptive(**settings)

    @property
    def phases(self) -> KeepPhases:
        """The shares as (keep, start fraction) pairs, in order; the first starts at 0.0."""
        return ((self.keep, 0.0),) if isinstance(self.keep, float) else tuple(self.keep)

    @property
    def needs_total_steps(self) -> bool:
        """Whether a phase starts after 0, so that the length of training must be known."""
        return len(self.phases) > 1

    def at(self, fraction: float) -> "Sample":
        """This method with the one `keep` that holds at `fraction` of training.

        A phase holds from its start, inclusive; the last one goes on past 1.0.

        Raises:
            ValueError: `fraction` is not a number >= 0.
        """
        if not is_number(fraction) or not fraction >= 0:
            raise wrong("The fraction in Sample.at", fraction, "a number >= 0")
        return replace(self, keep=[keep for keep, start in self.phases if start <= fraction][-1])
