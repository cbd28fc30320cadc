"""What a monitor found: a table of one line for each gradient of a site and measured step."""

from __future__ import annotations

import csv
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One approximate gradient of one site in one backward, against the dense one of the same dY.

    Attributes:
        step: optimizer steps taken before it; with ``every=250``, 249, 499 and so on.
        site: module path, as in the report.
        gradient: ``"dX"`` or ``"dW"`` of a linear; ``"dQ"``, ``"dK"`` or ``"dV"`` of an attention.
        method: ``"reuse"`` or ``"sample"``.
        cosine: of the angle between the two.
        relative_error: norm of the difference over the norm of the dense one.
        energy_kept: the share of the squared norm of the output gradient (dY; of an attention, dO) that is in
            the rows or entries which the estimate takes from it.
    """

    step: int
    site: str
    gradient: str
    method: str
    cosine: float
    relative_error: float
    energy_kept: float


NAMES = tuple(field.name for field in dataclasses.fields(Measurement))
VALUES = ("cosine", "relative_error", "energy_kept")


class Measurements(tuple[Measurement, ...]):
    """In the order in which they were taken; a tuple."""

    __slots__ = ()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, with the attributes of a :class:`Measurement` as its header."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(NAMES)
            writer.writerows(dataclasses.astuple(row) for row in self)

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with the same columns.

        Raises:
            ModuleNotFoundError: pandas is not installed; :meth:`to_csv` does without.
        """
        import pandas

        return pandas.DataFrame.from_records([dataclasses.astuple(row) for row in self], columns=list(NAMES))

    def last(self) -> dict[str, float]:
        """Means over the sites at the last measured step: ``cosine/dX`` and ``relative_error/dX``, the same
        for the other gradients, and ``energy_kept`` over all of them. Empty without measurements."""
        rows = self._of_last_step()
        means = {}
        for gradient in dict.fromkeys(row.gradient for row in rows):
            of_it = [row for row in rows if row.gradient == gradient]
            means[f"cosine/{gradient}"] = statistics.fmean(row.cosine for row in of_it)
            means[f"relative_error/{gradient}"] = statistics.fmean(row.relative_error for row in of_it)
        if rows:
            means["energy_kept"] = statistics.fmean(row.energy_kept for row in rows)
        return means

    def summary(self) -> str:
        """:meth:`last` in one line; empty without measurements."""
        rows, means = self._of_last_step(), self.last()
        if not rows:
            return ""
        gradients = [
            f"{gradient} {means[f'cosine/{gradient}']:.3f} ({means[f'relative_error/{gradient}']:.2f})"
            for gradient in dict.fromkeys(row.gradient for row in rows)
        ]
        return (
            f"measured in step {rows[0].step}: cosine (and relative error) to the dense gradient "
            f"{', '.join(gradients)}; {means['energy_kept']:.0%} of the energy kept"
        )

    def _of_last_step(self) -> list[Measurement]:
        return [row for row in self if row.step == self[-1].step]
