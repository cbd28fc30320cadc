"""`Reuse`: the gradient of an earlier step stands in for the part that is not computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from sparse_compile.checks import integer, is_number, one_of, store, wrong
from sparse_compile.phases import Phases, Ratio, parse_n_m, parse_ratio

GRANULARITIES = ("row", "element", "n:m")
SOURCES = ("mean", "sample")


@dataclass(frozen=True)
class Reuse:
    """Reuse the gradient remembered from an earlier step; compute only the largest part of what changed.

    Source: ReSprop (Goli & Aamodt, "ReSprop: Reuse Sparsified Backpropagation", CVPR 2020) and its
    successors for transformers, ReSprop-T and C-Sharp.

    Args:
        ratio: the share of the output gradient that is not computed. One of

            - a number in [0, 1); 0 is dense;
            - "n:m", e.g. "2:4": n kept of every m neighbours, so the ratio is 1 - n/m;
            - a list of (ratio, start) pairs, each ratio one of the above, which holds from the fraction
              `start` of training until the next pair's start. The first start is 0.0, starts increase.

        granularity: what is kept or dropped as a whole: "row" (a token's row, by its norm), "element"
            (single entries, by magnitude) or "n:m". An N:M ratio turns "row", the default, into "n:m".
        source: the base that is reused: "mean" over the batch, or one random "sample" of it.
        refresh_every: the base is renewed at every `refresh_every`-th backward, an int >= 1.

    The ratio is stored as a float, a string, or a tuple of pairs, so that equal settings are equal objects.

    Raises:
        ValueError: a value is not among those above, phases are out of order, or ratio and granularity
            contradict each other.
    """

    method: ClassVar[str] = "reuse"  # the name in Schedule.to_dict

    ratio: Ratio | Sequence[tuple[Ratio, float]]
    granularity: str = "row"
    source: str = "mean"
    refresh_every: int = 1

    def __post_init__(self) -> None:
        store(self, "ratio", parse_ratio("Reuse.ratio", self.ratio))
        store(self, "granularity", one_of("Reuse.granularity", self.granularity, GRANULARITIES))
        store(self, "source", one_of("Reuse.source", self.source, SOURCES))
        store(self, "refresh_every", integer("Reuse.refresh_every", self.refresh_every, at_least=1))
        self._settle_granularity()

    def _settle_granularity(self) -> None:
        """Let an N:M ratio choose its granularity; refuse ratios that the granularity cannot express."""
        ratios = [ratio for ratio, _ in self.phases]
        n_m = [ratio for ratio in ratios if isinstance(ratio, str)]
        if n_m and self.granularity == "element":
            raise wrong("Reuse.granularity", self.granularity, f'"n:m" with the ratio "{n_m[0]}"')
        if n_m:
            store(self, "granularity", "n:m")
        for ratio in ratios:
            if self.granularity == "n:m" and not isinstance(ratio, str) and ratio != 0:
                raise ValueError(
                    f'Reuse.ratio holds {ratio}; allowed with granularity "n:m" is "n:m", e.g. "2:4", '
                    "or 0.0 (dense)."
                )

    @property
    def phases(self) -> Phases:
        """The ratio as (ratio, start fraction) pairs, in order; the first starts at 0.0."""
        if isinstance(self.ratio, float | str):
            return ((self.ratio, 0.0),)
        return tuple(self.ratio)

    @property
    def keeps_rows(self) -> bool:
        """Whether whole rows are kept, in all phases."""
        return self.granularity == "row"

    @property
    def needs_total_steps(self) -> bool:
        """Whether a phase starts after 0, so that the length of training must be known."""
        return len(self.phases) > 1

    @property
    def keep(self) -> float:
        """The share that is computed, 1 - ratio, in (0, 1].

        Raises:
            ValueError: the ratio has several phases; `at` says which one holds.
        """
        if len(self.phases) > 1:
            raise ValueError(
                f"Reuse.keep is not defined for the {len(self.phases)} phases of Reuse.ratio {self.ratio}; "
                "ask one of them: reuse.at(fraction).keep."
            )
        ratio = self.phases[0][0]
        if isinstance(ratio, str):
            n, m = parse_n_m(ratio)
            return n / m
        return 1.0 - ratio

    def at(self, fraction: float) -> "Reuse":
        """This method with the one ratio that holds at `fraction` of training.

        A phase holds from its start, inclusive; the last one goes on past 1.0.

        Raises:
            ValueError: `fraction` is not a number >= 0.
        """
        if not is_number(fraction) or not fraction >= 0:
            raise wrong("The fraction in Reuse.at", fraction, "a number >= 0")
        return replace(self, ratio=[ratio for ratio, start in self.phases if start <= fraction][-1])
