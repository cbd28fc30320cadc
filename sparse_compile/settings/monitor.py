"""`Monitor`: how often the approximate gradients are compared with the dense ones."""

from dataclasses import dataclass

from sparse_compile.checks import integer, store


@dataclass(frozen=True)
class Monitor:
    """Compare, on every `every`-th optimizer step, each approximate gradient with the dense one.

    The dense gradient of a site is computed from the output gradient that arrives there, beside the
    approximate one, which is what flows on: training is the same with and without a monitor, bit for bit.
    `Report.measurements` says what is measured.

    Args:
        every: an int >= 1. Of every `every` steps, counted from the start of training, the last is measured:
            the first backward of each site in it.

    Raises:
        ValueError: `every` is not an int >= 1.
    """

    every: int = 250

    def __post_init__(self) -> None:
        store(self, "every", integer("Monitor.every", self.every, at_least=1))
