"""The end of an example: its table on the screen, its figure, and its numbers in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import _plots
from _results import Results, footnotes, table
from rich.console import Console


def present(
    results: Results,
    out: Path,
    json_out: Path,
    console: Console,
    *,
    heading: str,
    unit: str,
    title: str,
    across: Literal["epochs", "steps"] = "epochs",
) -> None:
    """Print the table, write the figure and the numbers; nothing if no run has finished.

    Args:
        heading: of the table.
        unit: what the losses are means over, for the footnotes.
        title: of the figure; the number of seeds is added.
        across: what the curves are drawn against, beside the time.
    """
    if not results.runs:
        return
    console.print()
    console.print(table(results, heading))
    for line in footnotes(results, unit):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    seeds = results.settings["seeds"]
    counted = "1 seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
    _plots.draw(results, out, f"{title}, {counted}", across=across)
    results.write_json(json_out)
    console.print(f"Curves in {out}, all numbers in {json_out}.", highlight=False, soft_wrap=True)
