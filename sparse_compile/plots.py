"""What adaptive sampling did and what a monitor measured in the course of training, as figures. They need
matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sparse_compile.checks import listed, one_of, wrong
from sparse_compile.measurements import VALUES
from sparse_compile.report import Report


def plot_shares(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the share of samples kept behind each block, and the variances, over the steps.

    Args:
        report: of a backend whose schedule samples adaptively.
        path: the figure's file; its ending says the format.

    Raises:
        ValueError: the report has no history.
    """
    from matplotlib.figure import Figure

    history: Sequence[dict[str, Any]] = report.history
    if not history:
        raise ValueError("report has no history; allowed is that of a schedule with Sample.adaptive(…).")
    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(history[-1]["sample_shares"])
    for number, name in enumerate(names):
        shares = [entry["sample_shares"].get(name, 1.0) for entry in history]
        # From yellow, the first block, to violet, the last: told apart in grey print.
        colour = _colour(number / max(1, len(names) - 1))
        left.plot(steps, shares, color=colour, label=name, linewidth=1.6)
    left.plot(steps, [entry["s"] for entry in history], "--", color="#333333", label="s", linewidth=1.4)
    left.set_ylabel("share of the samples kept behind a block")
    left.set_ylim(0, 1.05)
    left.legend(frameon=False, fontsize="x-small")
    for key, label in (("act_variance", "dropped samples"), ("weight_variance", "drawn rows")):
        ratios = [entry[key] / entry["sgd_variance"] if entry["sgd_variance"] else 0.0 for entry in history]
        right.plot(steps, ratios, marker="o", markersize=3, label=label)
    right.set_ylabel("added variance / variance of SGD")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def plot_measurements(
    report: Report, path: str | os.PathLike[str], *, gradient: str = "dW", value: str = "cosine"
) -> None:
    """Draw one measured value as a heat map, layers (in the order of the report) over measured steps. What
    was exact stays blank.

    Args:
        report: of a backend with a monitor.
        path: the figure's file; its ending says the format.
        gradient: ``"dX"`` or ``"dW"`` of linears, ``"dQ"``, ``"dK"`` or ``"dV"`` of attentions.
        value: ``"cosine"``, ``"relative_error"`` or ``"energy_kept"``.

    Raises:
        ValueError: ``value`` is not one of the three, or the report has no measurement of ``gradient``.
    """
    from matplotlib.figure import Figure

    one_of("value", value, VALUES)
    rows = [row for row in report.measurements if row.gradient == gradient]
    if not rows:
        raise wrong("gradient", gradient, _gradients_in(report))
    found = {(row.site, row.step): getattr(row, value) for row in rows}
    steps = sorted({row.step for row in report.measurements})
    names = [site.name for site in report.sites if any(site.name == row.site for row in rows)]
    grid = [[found.get((name, step), float("nan")) for step in steps] for name in names]

    figure = Figure(figsize=(9, 1.6 + 0.17 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    every = -(-len(steps) // 10)
    axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    axes.set_xlabel("step")
    axes.set_title(f"{gradient}: {value.replace('_', ' ')}, against the dense gradient", fontsize="medium")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)


def _gradients_in(report: Report) -> str:
    """What may be asked for, in a sentence."""
    names = dict.fromkeys(row.gradient for row in report.measurements)
    return f"one that was measured: {listed(names) or 'none is, which needs sparse_backend(…, monitor=…)'}"


def _colour(position: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis_r"](0.08 + 0.92 * position)
