"""What a launch remembers is what Triton would find out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own: in this one, kernels may be interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    program = Path(__file__).with_name("launches.py")
    said = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_the_same_is_launched_as_by_triton(found: dict[str, Any]) -> None:
    """Kernel, grid and arguments; of sizes that are multiples of 16 and of others, at such addresses and at
    others, with numbers that change from launch to launch."""
    assert found["wrong"] == []


def test_what_is_known_is_not_asked_again(found: dict[str, Any]) -> None:
    """Five kinds of backwards, each twice; all of one make as many launches."""
    launches = {a + b for a, b in zip(found["by_triton"], found["remembered"], strict=True)}
    assert len(launches) == 1
    first, again = found["by_triton"][:5], found["by_triton"][5:]
    assert all(0 < count < max(launches) for count in first)
    assert again == [0] * 5
