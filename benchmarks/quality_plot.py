"""The figure of quality.py: what a run is judged by, against steps and on a common clock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # (step, value)

COLOURS = ("#333333", "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#56b4e9", "#7b3294")

MOST_BANDS = 6  # in one panel; more cover each other


def draw(
    curves: Mapping[str, Sequence[Curve]], speeds: Mapping[str, float | None], *, goal: str, path: Path
) -> None:
    """Write the figure; several seeds show as their mean, with a band of one deviation if methods are few.

    Args:
        curves: of each method, one for each seed, all at the same steps.
        speeds: how many times faster than dense a step is; None where that was not measured, and the method
            is then missing on the clock. Where none was, there is no clock.
    """
    clock = any(speed is not None for speed in speeds.values())
    figure = Figure(figsize=(11 if clock else 6, 4.4), layout="constrained")
    panels = figure.subplots(1, 1 + clock, sharey=True, squeeze=False)[0]
    left, right = panels[0], panels[-1]
    for number, (name, seeds) in enumerate(curves.items()):
        colour, dash = COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]
        if len(curves) > MOST_BANDS:
            seeds = [
                [
                    (points[0][0], statistics.fmean(y for _, y in points))
                    for points in zip(*seeds, strict=True)
                ]
            ]
        _line(left, seeds, 1.0, colour, dash, name)
        if (speed := speeds[name]) is not None:
            _line(right, seeds, speed, colour, dash, f"{name} ({speed:.2f}×)")
    left.set_ylabel(f"held-out {goal}")
    right.set_xlabel("wall-clock, in dense steps")
    left.set_xlabel("steps")
    for axes in panels:
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _line(axes: Axes, seeds: Sequence[Curve], speed: float, colour: str, dash: str, label: str) -> None:
    across = [step / speed for step, _ in seeds[0]]
    values = [[y for _, y in points] for points in zip(*seeds, strict=True)]
    means = [statistics.fmean(group) for group in values]
    axes.plot(
        across, means, color=colour, label=label, linestyle=dash, marker="o", markersize=3, linewidth=1.6
    )
    if len(seeds) > 1:
        spread = [statistics.stdev(group) for group in values]
        low = [mean - s for mean, s in zip(means, spread, strict=True)]
        high = [mean + s for mean, s in zip(means, spread, strict=True)]
        axes.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
