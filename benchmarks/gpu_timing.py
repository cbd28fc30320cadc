"""How the benchmarks of a GPU time: the part of gpu.py for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Row = dict[str, Any]


# Cycles for which a GPU is kept busy while what is timed is launched: some 10 ms.
_BUSY = 20_000_000


def medians(
    candidates: Mapping[str, Callable[[], object]], rounds: int, *, device_alone: bool = True
) -> dict[str, float]:
    """Median seconds of each, in rounds of one run of each; the first runs, in which things are built and
    tuned, do not count. ``device_alone``: the time of the GPU, and not that of the host, which is ahead of it
    in a step, or has its launches in a CUDA graph."""
    for run in candidates.values():
        for _ in range(3):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        names = list(candidates)
        for name in names if turn % 2 else reversed(names):
            seconds[name].append(_seconds(candidates[name], device_alone))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], object], device_alone: bool) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if device_alone:
        torch.cuda._sleep(_BUSY)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def row(what: str, seconds: Mapping[str, float], ours: str, theirs: str, wanted: float | None) -> Row:
    """One line of the table."""
    return {
        "what": what,
        "ours_ms": seconds[ours] * 1000,
        "theirs_ms": seconds[theirs] * 1000,
        "ratio": seconds[theirs] / seconds[ours],
        "wanted": wanted,
    }


# Something that is measured: what it is called, and what measures it. Each may fail, and the others go on.
Case = tuple[str, Callable[[], list[Row]]]
Cases = Iterator[Case]


def measured(case: Case) -> list[Row]:
    """The lines of a case, or one that says why there are none."""
    what, measure = case
    try:
        return measure()
    except Exception as error:  # of whatever kind: there is little time on a GPU, and more to be measured
        return [failed(what, error)]


def failed(what: str, error: Exception) -> Row:
    said = (str(error).strip().splitlines() or [""])[0]
    return {"what": what, "error": f"{type(error).__name__}: {said}"}
