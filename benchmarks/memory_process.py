"""What one way of training needs in memory, measured in a process of its own; run by memory.py.

`python benchmarks/memory_process.py '{"preset": …}'` prints one JSON object:

- **saved**: the bytes that the compiled forward leaves for the backward, counted from the tensors that
  autograd holds, each storage once, without parameters and inputs;
- **peak**: the largest resident set during some steps (forward and backward, no optimizer), less what was
  resident between steps: activations, gradients and whatever is made on the way. Linux with glibc. On
  CUDA, the allocator's own `max_memory_allocated`, likewise less what was allocated between steps. (PyTorch
  keeps no such count for the CPU.)
- **cpu_seconds, seconds**: the median step, in processor and in wall time. Rough: large temporaries are
  handed back to the system at once here, so that the peak is true, and taking them again costs time; what is
  made for packing pays more of it than a dense step does.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fresh_process import _reset_peak, _status_bytes
from presets import PRESETS
from torch import Tensor, nn

ALLOWED = "dense, exact, checkpoint, budget:SHARE, prune:RATIO, prune:RATIO/fp16|bf16|int8, reuse:RATIO"
WARMUP = 2


@dataclass(kw_only=True)
class MemoryJob:
    """What one process is to measure; travels as JSON."""

    preset: str
    method: str
    threads: int
    steps: int
    device: str = "cpu"
    sizes: dict[str, Any] = field(default_factory=dict)


def parse(method: str) -> tuple[str, float, str]:
    """(kind, number, form of the values) of a method's name; refuses what it does not know."""
    kind, _, rest = method.partition(":")
    number, _, values = rest.partition("/")
    plain = kind in ("dense", "exact", "checkpoint") and not rest
    try:
        share = 0.0 if plain else float(number)
    except ValueError:
        share = -1.0
    known = plain or (kind in ("budget", "prune", "reuse") and (kind == "prune" or not values))
    if not known or not 0 <= share <= 1 or values not in ("", "same", "fp16", "bf16", "int8"):
        raise ValueError(f"methods: {method!r} is not known; allowed are {ALLOWED}")
    return kind, share, values or "same"


def compiled(model: nn.Module, method: str) -> Callable[..., Any]:
    """The model, compiled as the method says."""
    from sparse_compile import PruneSaved, Reuse, Schedule, sparse_backend

    kind, share, values = parse(method)
    schedules = {
        "exact": Schedule.exact,
        "prune": lambda: Schedule(saved_activations=PruneSaved(share, values)),
        "reuse": lambda: Schedule(linear=Reuse(share)),
    }
    if kind in schedules:
        return torch.compile(model, backend=sparse_backend(schedules[kind]()))
    if kind == "checkpoint":
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    if kind == "budget":
        torch._functorch.config.activation_memory_budget = share
    return torch.compile(model)


def saved_bytes(loss: Tensor, held: list[Tensor]) -> int:
    """The bytes that the graph behind a loss holds for its backward, `held` tensors aside."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    total = 0
    for node in _nodes(loss.grad_fn):
        for tensor in getattr(node, "saved_tensors", ()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _nodes(root: Any) -> Iterator[Any]:
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        waiting.extend(new)


def measure(job: MemoryJob) -> dict[str, float]:
    preset = PRESETS[job.preset].resized(**job.sizes)
    model = preset.model().to(job.device)
    batches = [{k: v.to(job.device) for k, v in batch.items()} for batch in preset.batches(preset, 4, 0)]
    run = compiled(model, job.method)
    cuda = job.device == "cuda"

    def step(turn: int) -> tuple[float, float, int]:
        batch = batches[turn % len(batches)]
        cpu, wall = time.process_time(), time.perf_counter()
        loss = run(**batch).loss
        between = time.process_time(), time.perf_counter()
        held = [*model.parameters(), *model.buffers(), *batch.values()]
        saved = saved_bytes(loss, held) if turn == 0 else 0
        counted = time.process_time() - between[0], time.perf_counter() - between[1]
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        took = time.process_time() - cpu - counted[0], time.perf_counter() - wall - counted[1]
        model.zero_grad(set_to_none=True)
        return (*took, saved)

    saved, *_ = [step(turn)[2] for turn in range(WARMUP)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        _reset_peak()
        start = _status_bytes("VmRSS")
    times = [step(turn + 1) for turn in range(job.steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else _status_bytes("VmHWM")
    return {
        "saved": saved,
        "peak": peak - start,
        "cpu_seconds": statistics.median(cpu for cpu, _, _ in times),
        "seconds": statistics.median(wall for _, wall, _ in times),
    }


PARENT = "benchmarks/memory.py"


def main() -> None:
    """Measure the job given as JSON and print the result as JSON."""
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        sys.exit(f"This is the process that {PARENT} starts for each measurement: run that one.")
    job = MemoryJob(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    print(json.dumps(measure(job)))


if __name__ == "__main__":
    main()
