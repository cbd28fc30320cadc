"""Which of several kernels is fastest for a shape, on the GPU at hand: timed once, where it is first needed.

What is chosen depends on the GPU and on sizes alone, so it is remembered for the process and all backends in
it. (Two runs may choose differently where two kernels are about as fast, and then differ by rounding.)

Where the host takes longer to launch than the GPU to run, the GPU waits, and that is part of what is timed.
Not so for what is recorded into a CUDA graph (:func:`device_alone`): there the GPU is kept busy until all has
been launched.
"""

from __future__ import annotations

import contextlib
import contextvars
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch

from sparse_compile.kernels.triton import launcher

_WARMUPS = 2
_ROUNDS = 5
# How much faster than the first candidate another has to be: timings are no better than that.
_MARGIN = 0.97

# Cycles of a GPU in a second, at most.
_CLOCK = 2.5e9

_chosen: dict[Hashable, str] = {}
_device_alone = contextvars.ContextVar("device_alone", default=False)


@contextlib.contextmanager
def device_alone() -> Iterator[None]:
    """In which what is asked is about the time of the GPU alone."""
    token = _device_alone.set(True)
    try:
        yield
    finally:
        _device_alone.reset(token)


def fastest(key: Hashable, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate; of the first, the safe one, unless another is clearly faster.

    Args:
        key: what the answer depends on; timed once for each.
        candidates: name -> what to run; it is run several times, and its result thrown away.
    """
    key = (_device_alone.get(), key)
    if key not in _chosen:
        if len(candidates) == 1 or _capturing():
            return next(iter(candidates))
        launcher.spoil()
        seconds = _time(candidates)
        first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
        _chosen[key] = best if seconds[best] < _MARGIN * seconds[first] else first
    return _chosen[key]


def known(key: Hashable) -> str | None:
    """What was chosen for ``key``; None if nothing was."""
    return _chosen.get((_device_alone.get(), key))


def bucket(number: int) -> int:
    """``number`` rounded up to a power of two, for keys."""
    return 1 << max(number - 1, 0).bit_length()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _time(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in rounds of one run of each."""
    host = 0.0
    for run in candidates.values():
        for _ in range(_WARMUPS):
            start = time.perf_counter()
            run()
        host = max(host, time.perf_counter() - start)
    ahead = 2 * host if _device_alone.get() else 0.0
    rounds = [{name: _seconds(run, ahead) for name, run in candidates.items()} for _ in range(_ROUNDS)]
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in candidates}


def _seconds(run: Callable[[], object], ahead: float) -> float:
    """What a run takes; launched while the GPU is busy for so many seconds."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(int(ahead * _CLOCK))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
