"""Where and with what a benchmark ran, and its results as JSON and as tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from variants import PHASES

ROOT = Path(__file__).resolve().parents[1]
MERIT = (
    "realised / ideal = (dense step − this step) / (time that the skipped FLOPs would have cost), per round; "
    "the latter is Σ over sites of the time of the site's own dense backward products × the share of "
    "their FLOPs skipped"
)


def machine() -> dict[str, Any]:
    """CPU, cores, memory, system, and how busy it was."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.platform(),
        "load_average": os.getloadavg(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sparse_compile"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it; None outside of git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def context() -> dict[str, Any]:
    """Everything about a run that is not its numbers."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write, making the folder; refuses NaN, which is no JSON, by writing null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:  # NaN and the infinities
        return None
    return value


def print_tables(results: dict[str, Any], console: Console) -> None:
    """The times and what they come to, one line per variant."""
    preset, run = results["preset"], results["run"]
    title = f"{preset['name']}: {preset['batch']} × {preset['tokens']} tokens, {run['rounds']} rounds"
    console.print(_time_table(results["variants"], f"{title}, {results['machine']['threads']} threads"))
    if any(entry.get("merit") for entry in results["variants"].values()):
        console.print(_merit_table(results["variants"]))
        console.print(MERIT, style="dim")
    for key, heading in (
        ("compile", "Cold compile, first forward + backward"),
        ("memory", "Peak memory over the model's"),
    ):
        if results.get(key):
            console.print(_ratio_table(results[key], heading, key))
    if run["graphs_compiled_while_timed"]:
        console.print(
            f"{run['graphs_compiled_while_timed']} graphs were compiled while timing: do not trust this",
            style="bold red",
        )


def _time_table(variants: dict[str, Any], title: str) -> Table:
    table = Table(title=title, caption="median (quartiles); speed-ups are paired within rounds")
    table.add_column("variant", no_wrap=True)
    for heading in ("step ms", "forward", "backward", "optimizer", "step ×", "backward ×", "loss"):
        table.add_column(heading, justify="right")
    for name, entry in variants.items():
        seconds, speedup = entry["seconds"], entry["speedup"]
        table.add_row(
            name,
            _with_quartiles(seconds["step"], 1000, 0),
            *(f"{1000 * seconds[phase]['median']:.0f}" for phase in PHASES[:3]),
            _with_quartiles(speedup["step"], 1, 3),
            _with_quartiles(speedup["backward"], 1, 3),
            f"{entry['loss']:.3f}",
        )
    return table


def _with_quartiles(values: dict[str, float], factor: float, digits: int) -> str:
    median, q1, q3 = (f"{factor * values[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def _merit_table(variants: dict[str, Any]) -> Table:
    table = Table(title="Work skipped and time saved")
    table.add_column("variant", no_wrap=True)
    for heading in ("sites rewritten", "backward FLOPs kept", "saved ms", "ideal ms", "realised / ideal"):
        table.add_column(heading, justify="right")
    for name, entry in variants.items():
        merit = entry.get("merit")
        if not merit:
            continue
        realised = merit["realised"]
        table.add_row(
            name,
            f"{merit['rewritten']} of {merit['sites']}",
            f"{merit['backward_flops_executed'] / merit['backward_flops_dense']:.1%}",
            f"{1000 * merit['saved_seconds']['median']:.0f}",
            f"{1000 * merit['ideal_seconds']['median']:.0f}",
            _with_quartiles(realised, 1, 2) if realised else f"– ({merit['why_not']})",
        )
    return table


def _ratio_table(entries: dict[str, Any], title: str, what: str) -> Table:
    key, factor, unit = ("seconds", 1.0, "s") if what == "compile" else ("peak_over_model", 2.0**-20, "MiB")
    table = Table(title=title)
    table.add_column("variant", no_wrap=True)
    for heading in (f"least {unit}", "median (quartiles)", "least, dense = 1"):
        table.add_column(heading, justify="right")
    for name, entry in entries.items():
        least = f"{factor * entry[key]['least']:.1f}"
        table.add_row(name, least, _with_quartiles(entry[key], factor, 1), f"{entry['ratio']:.3f}")
    return table
