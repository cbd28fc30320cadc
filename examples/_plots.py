"""The figure of an example: loss and accuracy, against epochs or steps and against the clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from _results import BASELINE, Results
from _runs import Point, Run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

DENSE_COLOUR = "#333333"
EXACT_COLOUR = "#0072b2"
# Orange to violet: told apart in grey print and by colour-blind eyes.
RATIO_COLOURS = ("#e69f00", "#d55e00", "#cc79a7", "#7b3294", "#009e73", "#56b4e9")


def draw(results: Results, path: Path, title: str, across: Literal["epochs", "steps"] = "epochs") -> None:
    """Write the four panels to `path`; several seeds show as their mean with a band of one deviation."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    colours = _colours(results.names)

    def position(point: Point) -> float:
        return point.epoch if across == "epochs" else point.step

    for name in results.names:
        label = _label(results, name)
        for row, value in enumerate((lambda p: p.loss, lambda p: p.accuracy)):
            _line(axes[row][0], results.of(name), position, value, colours[name], label)
            _line(axes[row][1], results.of(name), lambda p: p.seconds, value, colours[name], label)
    axes[0][0].set_ylabel("held-out loss")
    axes[1][0].set_ylabel("held-out accuracy")
    axes[1][0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[1][0].set_xlabel(across)
    axes[1][1].set_xlabel("wall-clock, seconds of training steps")
    for ax in axes.flat:
        ax.grid(color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(left=0)
    axes[0][0].legend(
        title="run (speed-up of a step)", frameon=False, fontsize="small", title_fontsize="small"
    )
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def _line(
    ax: Axes,
    runs: list[Run],
    x: Callable[[Point], float],
    y: Callable[[Point], float],
    colour: str,
    label: str,
) -> None:
    """Mean over seeds of y at mean x; the evaluations of all seeds fall on the same steps."""
    points = list(zip(*(run.curve for run in runs), strict=True))
    across = [statistics.fmean(x(point) for point in group) for group in points]
    values = [[y(point) for point in group] for group in points]
    means = [statistics.fmean(group) for group in values]
    # The dense run is dashed and on top: `exact` follows it so closely that one would hide the other.
    style: dict[str, Any] = {"linestyle": "--", "zorder": 3} if label == BASELINE else {}
    ax.plot(across, means, color=colour, label=label, marker="o", markersize=3.5, linewidth=1.8, **style)
    if len(runs) > 1:
        spread = [statistics.stdev(group) for group in values]
        low = [mean - s for mean, s in zip(means, spread, strict=True)]
        high = [mean + s for mean, s in zip(means, spread, strict=True)]
        ax.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)


def _colours(names: list[str]) -> dict[str, str]:
    fixed = {BASELINE: DENSE_COLOUR, "exact": EXACT_COLOUR}
    others = [name for name in names if name not in fixed]
    return fixed | {name: RATIO_COLOURS[i % len(RATIO_COLOURS)] for i, name in enumerate(others)}


def _label(results: Results, name: str) -> str:
    speedup = results.speedup(name)
    return name if speedup is None or name == BASELINE else f"{name} ({speedup:.2f}×)"
