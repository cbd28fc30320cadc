"""The tests of the Triton kernels, on the GPU at hand: a process for each file, since most of their time is
that of Triton's compiler.

    python benchmarks/gpu_tests.py          all of them
    python benchmarks/gpu_tests.py FILE …   these, in this process
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import from_source

ROOT = from_source.ROOT
PATIENCE = 150  # seconds for one file; the numbers are to come after them
TESTS = (
    "tests/test_plan.py",
    "tests/test_plan_observed.py",
    "tests/test_replay.py",
    "tests/kernels/triton/test_products.py",
    "tests/kernels/triton/test_base_inputs.py",
    "tests/kernels/triton/test_base_renewal.py",
    "tests/kernels/triton/test_partial_sums.py",
    "tests/kernels/triton/test_scaled_rows.py",
    "tests/kernels/triton/test_attention.py",
    "tests/kernels/triton/test_row_stats.py",
    "tests/kernels/triton/test_pack.py",
    "tests/kernels/triton/test_launch.py",
    "tests/kernels/triton/test_launcher.py",
    "tests/kernels/triton/test_draw.py",
    "tests/kernels/triton/test_largest.py",
    "tests/test_device_linear.py",
    "tests/test_device_forward.py",
    "tests/test_device_carried.py",
    "tests/test_device_block.py",
    "tests/kernels/triton/test_neighbours.py",
    "tests/test_semi_structured.py",
    "tests/test_device_attention.py",
    "tests/test_device_attention_pays.py",
    "tests/test_device_moves.py",
    "tests/test_pack_ops.py",
    "tests/test_device_distributed.py",
)


def run() -> bool:
    """Whether all tests pass; what fails is printed."""

    def of(file: str) -> bool:
        done = subprocess.Popen(
            [sys.executable, __file__, file],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = done.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)  # and what it has started
            said = f"{done.communicate()[0]}\nnot done after {PATIENCE} s"
        print(f"{file}: {(said.strip().splitlines() or ['nothing was said'])[-1]}", flush=True)
        if done.returncode:
            print(said[-8000:], flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        return all([*pool.map(of, TESTS)])


def run_here(files: list[str]) -> int:
    """Pytest's answer. This process knows where the package is."""
    from_source.prepare()
    import pytest

    os.chdir(ROOT)
    # Other versions than the pinned ones warn about other things; and an installed package does not put the
    # tests' own root on the path.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "-o", "pythonpath=.", "-o", "addopts="]
    return int(pytest.main([*options, *files]))


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]) if sys.argv[1:] else not run())
