"""The GPU benchmark at toy sizes: that every line of it runs. No time is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

import gpu
import gpu_attention
import gpu_pack
import gpu_steps
import gpu_tests
import gpu_timing

from sparse_compile import Schedule
from sparse_compile.kernels.triton import pack as by_triton

ROOT = gpu.ROOT


def test_every_section_runs_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert list(found["sections"]) == list(gpu.SECTIONS)
    assert found["smoke"] is True
    assert found["device"]["name"]
    assert {"torch", "triton", "transformers"} <= found["versions"].keys()
    printed = capsys.readouterr().out
    lines = [line for rows in found["sections"].values() for line in rows]
    assert len(lines) == 6 + 7 + 7 + 5 + 3 + 4
    assert all(line["ours_ms"] > 0 and line["theirs_ms"] > 0 and line["ratio"] > 0 for line in lines)
    assert all(line["what"] in printed for line in lines)


def test_packing_is_checked_and_has_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [line for case in gpu.packing(device, smoke=True) for line in gpu_timing.measured(case)]
    assert [line["what"].split(",")[:2] for line in lines] == [
        [name, f" {dtype}"] for dtype in ("float32", "bfloat16") for name in ("pack", "unpack")
    ]
    for line in lines:
        assert line["ratio"] == pytest.approx(line["gb_per_s"] / line["copy_gb_per_s"])
    monkeypatch.setattr(by_triton, "unpack", lambda mask, values, entries: values.new_zeros(2, 100))
    with pytest.raises(AssertionError, match="unpack gives another activation"):
        gpu_pack.kernels(torch.randn(2, 100, device=device), 10)


def test_attention_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [line for case in gpu.attention(device, smoke=True) for line in gpu_timing.measured(case)]
    kernels = [f"kernels, keep {keep}" for keep in gpu_attention.KEEPS]
    sites = [f"sample, keep {keep}" for keep in gpu_attention.KEEPS]
    assert [", ".join(line["what"].split(", ")[:2]) for line in lines] == [
        *(*kernels, *sites, "exact, half zero"),
    ]
    right = gpu_attention.by_kernels

    def wrong(*arguments: Any) -> Any:
        dq, dk, dv = right(*arguments)
        return dq, 1.5 * dk, dv

    monkeypatch.setattr(gpu_attention, "by_kernels", wrong)
    _, make = next(gpu_attention.candidates(device, smoke=True))
    with pytest.raises(AssertionError, match="dK is off by"):
        make()


def test_what_fails_is_written_down_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one product, and of one schedule of a step."""
    path = tmp_path / "gpu.json"
    make = gpu_steps.stepper

    def stepper(model: Any, batch: Any, device: Any, backend: Any, mode: str | None = None) -> Any:
        if getattr(backend, "schedule", None) == Schedule.exact(skip_unneeded="loss"):
            raise RuntimeError("this one\nat length")
        return make(model, batch, device, backend, mode)

    def off(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        raise AssertionError(f"{what} is off")

    monkeypatch.setattr(gpu_steps, "stepper", stepper)
    monkeypatch.setattr(gpu, "_check", off)
    sections = ("products", "padding")
    arguments = [word for section in sections for word in ("--only", section)]
    assert gpu.main(["--smoke", *arguments, "--json", str(path)]) == 1
    found = json.loads(path.read_text())["sections"]
    assert [line.get("error") for line in found["products"]] == ["AssertionError: dX is off"] * 3
    of_steps = [line.get("error") for line in found["padding"]]
    assert of_steps == ["RuntimeError: this one", None, None]
    printed = capsys.readouterr().out
    assert "4 failed." in printed
    assert "RuntimeError: this one" in printed


def test_a_file_of_tests_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With all that it has started."""
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys\n"
        "def test_it(): subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    monkeypatch.setattr(gpu_tests, "TESTS", (str(tmp_path / "test_it.py"),))
    monkeypatch.setattr(gpu_tests, "PATIENCE", 6)
    began = time.monotonic()
    assert not gpu_tests.run()
    assert time.monotonic() - began < 60


def test_a_section_after_the_time_is_over_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    gpu.main(["--smoke", "--only", "products", "--minutes", "-1", "--json", str(path)])
    assert json.loads(path.read_text())["sections"] == {"products": []}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU here; --smoke runs" in capsys.readouterr().err


def test_what_has_a_form_for_a_gpu_is_tested_on_one() -> None:
    """And imports no test as part of a package, whose root nothing puts on the path of an installation."""
    elsewhere = {"tests/test_gpu_benchmark.py", "tests/kernels/triton/test_build.py"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        assert not re.search(r"^(from|import) tests\b", text, re.MULTILINE), name
        on_gpu = "torch.cuda.is_available()" in text or path.parent.name == "triton"
        assert not on_gpu or name in {*gpu_tests.TESTS, *elsewhere}, name


def test_each_file_of_tests_has_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that fails is enough."""
    good, bad = (tmp_path / f"test_{name}.py" for name in ("good", "bad"))
    good.write_text("def test_it(): import sparse_compile.passes")
    bad.write_text("def test_it(): assert False")
    for files, passed in (([good], True), ([bad, good], False)):
        monkeypatch.setattr(gpu_tests, "TESTS", tuple(map(str, files)))
        assert gpu_tests.run() is passed


def test_half_of_a_padded_batch_has_no_loss() -> None:
    ids = torch.arange(12).view(2, 6)
    batch = gpu_steps.padded({"input_ids": ids, "labels": ids})
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]] * 2
    assert (batch["labels"] == -100).tolist() == [[False] * 3 + [True] * 3] * 2
    assert ids.min() >= 0, "the batch itself is left alone"


def test_the_package_is_found_without_an_installation() -> None:
    """In a process from which the finder of an editable installation is taken out."""
    program = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import from_source
from_source.prepare()
import sparse_compile.passes.linear
assert sparse_compile.passes.__file__ == {str(ROOT / "passes" / "__init__.py")!r}
assert "passes" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
