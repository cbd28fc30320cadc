"""Cold compile time and peak memory, each measured in a process of its own.

Run by step_time.py, once per variant and repeat: `python benchmarks/fresh_process.py '{"what": …}'` prints
one JSON object. Both need a fresh process: compiling is cold once, and a process's peak cannot be told apart
from that of the variants before it.

**Cold compile**: an empty Inductor cache; the seconds from before `sparse_compile` is imported to the end of
the first forward and backward. The model and the batch are there already, and no update is made.

**Peak memory**: the largest resident set over some steps, less what was resident once the model and the
batches were built. The graphs come from a cache that an earlier process filled, so that little of the
compiler's own memory is in it, and the high-water mark is reset after the warm-up. So what counts is
gradients, optimizer state, activations and what a method remembers. Linux with glibc only (/proc/self).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from presets import PRESETS, Preset
from timing import spread
from tqdm import tqdm
from variants import DENSE, OptimizerName, Variant, make_trainee, parse_methods

WARMUP = 3

# Else glibc raises this threshold as it goes, and keeps freed tensors in the resident set.
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(kw_only=True)
class Job:
    """What one process is to measure; travels as JSON."""

    what: Literal["compile", "memory"]
    preset: str
    method: str
    threads: int
    optimizer: OptimizerName
    lr: float
    steps: int
    sizes: dict[str, Any] = field(default_factory=dict)

    def variant(self) -> Variant:
        return DENSE if self.method == DENSE.name else parse_methods(self.method)[0]


def measure_all(jobs: dict[str, Job], *, repeats: int, settings: str) -> dict[str, dict[str, list[float]]]:
    """Run every job `repeats` times, interleaved; lists of what each printed, by variant and key.

    Memory jobs run once more, first, to fill the cache that the counted ones read.
    """
    results: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
    cached = all(job.what == "memory" for job in jobs.values())
    runs = repeats + 1 if cached else repeats
    with (
        tempfile.TemporaryDirectory(prefix="step_time_") as root,
        tqdm(total=runs * len(jobs), desc=settings, unit="process", disable=None) as bar,
    ):
        for run in range(runs):
            for name, job in jobs.items():
                bar.set_postfix_str(name)
                cache = Path(root, job.method.replace("/", "_"), "shared" if cached else str(run))
                measured = _run(job, cache)
                bar.update()
                if cached and run == 0:
                    continue
                for key, value in measured.items():
                    results[name].setdefault(key, []).append(value)
    return results


def summarise(results: dict[str, dict[str, list[float]]], key: str, dense: str = "dense") -> dict[str, Any]:
    """Per variant: the least and the spread of every key, and `ratio`, the least `key` over dense's.

    The least, because whatever disturbs these measurements only adds to them.
    """
    return {
        name: {
            "ratio": min(values[key]) / min(results[dense][key]),
            **{k: {"least": min(v), **spread(v)} for k, v in values.items()},
        }
        for name, values in results.items()
    }


def _run(job: Job, cache: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(job))],
        env=os.environ
        | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        | (PROMPT_FREE if job.what == "memory" else {}),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {job.what} of {job.method} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status_bytes(field_name: str) -> int:
    """A size from /proc/self/status. Not getrusage: its peak is inherited from the parent process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}: peak memory can be measured on Linux only")


def _reset_peak() -> None:
    """Hand freed memory back to the system and set the high-water mark to what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _cold_compile(job: Job, preset: Preset) -> dict[str, float]:
    model, batch = preset.model(), preset.batches(preset, 1, 0)[0]
    start = time.perf_counter()
    trainee = make_trainee(job.variant(), model, optimizer=job.optimizer, lr=job.lr)
    trainee.model(**batch).loss.backward()
    return {"seconds": time.perf_counter() - start}


def _peak_memory(job: Job, preset: Preset) -> dict[str, float]:
    batches = preset.batches(preset, 4, 0)
    model = preset.model()
    trainee = make_trainee(job.variant(), model, optimizer=job.optimizer, lr=job.lr)
    del model  # the trainee has its own copy
    importlib.import_module("torch._inductor.compile_fx")  # the compiler's own modules do not count
    _reset_peak()
    built = _status_bytes("VmRSS")
    for turn in range(WARMUP):
        trainee.step(batches[turn % len(batches)])
    _reset_peak()
    between_steps = _status_bytes("VmRSS")
    for turn in range(job.steps):
        trainee.step(batches[turn % len(batches)])
    peak = _status_bytes("VmHWM")
    return {"peak_over_model": peak - built, "peak_over_between_steps": peak - between_steps, "peak": peak}


PARENT = "benchmarks/step_time.py"


def main() -> None:
    """Measure the job given as JSON and print the result as JSON."""
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        sys.exit(f"This is the process that {PARENT} starts for each measurement: run that one.")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    preset = PRESETS[job.preset].resized(**job.sizes)
    measured = _cold_compile(job, preset) if job.what == "compile" else _peak_memory(job, preset)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
