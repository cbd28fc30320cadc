"""The benchmark of the host's time: what of it needs no PyTorch that was built for CUDA."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

import host_time
from null_cuda import build

RESULT = host_time.ROOT / "benchmarks" / "results" / "host_time.json"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch was built for CUDA")
def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_time.main([])
    assert "was not built for CUDA" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="was not built for CUDA"):
        build.nvidia()


def test_every_library_takes_the_place_of_one_of_nvidias(tmp_path: Path) -> None:
    environment = build.environment(tmp_path)
    assert environment["LD_PRELOAD"].split(":") == [str(tmp_path / name) for name in build.LIBRARIES]
    assert all((build.HERE / source).exists() for source in build.LIBRARIES.values())


def test_the_counters_are_those_of_the_runtime() -> None:
    """By their order."""
    text = (build.HERE / "runtime.cpp").read_text()
    names = text.split("enum Counted {")[1].split("}")[0].lower().replace(" ", "").split(",")
    assert tuple(names) == host_time.COUNTED


def test_the_result_has_both_modes_of_every_schedule() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    wanted = {"torch.compile", *host_time.schedules()}
    for mode in ("default", "reduce-overhead"):
        found = {row["what"]: row for row in rows if row["mode"] == mode}
        assert found.keys() == wanted
        if mode == "reduce-overhead":
            assert all(row["replays"] == 2 for row in found.values()), "one for each forward, and backward"
