"""Two processes of a worker script, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_two(worker: Path, folder: Path, patience: float) -> list[dict[str, Any]]:
    """What each rank has left in ``<folder>/<rank>.pt``; fails with what the processes said if they fail.

    Args:
        worker: a script; it is given the folder.
        patience: seconds; more than the workers have, which tell where they stand when theirs are over.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [*torchrun, str(worker), str(folder)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        status = process.wait(patience)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
    told = [path.read_text() for path in (folder / "log", *sorted(folder.glob("*.stack")))]
    assert status == 0, "\n".join(text[-4000:] for text in told)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
