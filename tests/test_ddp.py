"""Two real DDP processes (gloo, CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def found():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(WORKER),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])


def test_at_ratio_0_gradients_equal_the_single_process(found):
    assert found["error"] < 1e-6


def test_ranks_stay_in_step_under_reuse(found):
    assert found["methods"] == ["reuse"]
    assert found["equal"]
    assert found["steps"] == [1, 2, 3, 4]


def test_sites_keep_their_names_when_buckets_split_the_graph(found):
    assert found["graphs"] > 1
    assert sorted(found["sites"]) == sorted(found["linears"])
