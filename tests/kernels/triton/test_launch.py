"""Kernels run on the GPU that their tensors are on, whichever is the current one."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from kernels.triton.build import TYPES
from sparse_compile import Reuse, Sample, Schedule, device_linear
from sparse_compile.kernels import choice, on_device, triton
from sparse_compile.kernels.triton import (
    base_inputs,
    compaction,
    draw,
    input_gradient,
    largest,
    launcher,
    row_stats,
    scaled_rows,
    tiles,
    weight_gradient,
)
from sparse_compile.linear_site import LinearSite

FOLDER = Path(triton.__file__).parent


def test_every_launch_goes_through_the_helper() -> None:
    """``kernel[grid](…)`` is written in one file."""
    found = {
        path.name
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    assert found == {"launcher.py"}


class OnGpu:
    """What a launch sees of a tensor."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The GPUs that were made the current one; it is cuda:0."""
    devices: list[torch.device] = []

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        devices.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


@pytest.mark.parametrize(("where", "switched"), [("cpu", False), ("cuda:0", False), ("cuda:1", True)])
def test_it_is_on_the_gpu_of_its_tensors(
    where: str, switched: bool, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_builds", lambda device: False)
    ran: list[tuple[object, ...]] = []
    tensor = OnGpu(where)
    kernel = {(3,): lambda *given, **options: ran.append((*given, options, len(entered)))}
    triton.launch(kernel, (3,), tensor, 7, BLOCK=16)
    assert ran == [(tensor, 7, {"BLOCK": 16}, int(switched))]
    assert entered == [tensor.device] * switched


def test_tiles_are_those_for_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        torch.device("cuda", 0): (8, 6),
        torch.device("cuda", 1): (9, 0),
        torch.device("cuda", 2): (10, 0),
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked.__getitem__)
    tiles.generation.cache_clear()
    try:
        assert [tiles.generation(device) for device in asked] == [80, 90, 90]
        assert tiles.generation(torch.device("cpu")) == 80
    finally:
        tiles.generation.cache_clear()


NAMES = {
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def site_on_a_gpu(
    method: Reuse | Sample | None,
    launch: Callable[..., None],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], object]:
    """A backward of a linear, half of whose rows are zero; ``launch`` sees all kernels."""
    modules = (base_inputs, compaction, draw, input_gradient, largest, row_stats, scaled_rows)
    for module in (*modules, weight_gradient):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(on_device, "usable", lambda dy: True)
    monkeypatch.setattr(device_linear, "WORTH_LOOKING", 0)
    monkeypatch.setattr(choice, "fastest", lambda key, candidates: "triton")
    site, phase = LinearSite("layer"), Schedule(linear=method).at(0)
    dy, x, w = (torch.randn(size, device=device) for size in ((24, 8), (24, 6), (8, 6)))
    dy[:12] = 0
    return lambda: site.linear_backward(dy, x, w, tokens=4, phase=phase, dw_transposed=False)


@pytest.mark.parametrize("method", [None, Reuse(0.7), Sample(0.3), Sample(0.3, gradients="weight")])
def test_what_runs_is_what_is_built(
    method: Reuse | Sample | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the types that ``build.py`` names: of another, nobody knows whether it fits a GPU."""
    found: dict[str, str] = {}

    def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        unread = () if options.get("SCALED", True) else ("scale",)
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            if name in TYPES and isinstance(value, Tensor) and name not in unread:
                found[name] = f"*{NAMES[value.dtype]}"
                assert found[name] == TYPES[name], name
        triton.launch(kernel, grid, *arguments, **options)

    backward = site_on_a_gpu(method, launch, device, monkeypatch)
    for _ in range(2):
        backward()
    assert {"kept", "count"} <= found.keys()
    assert ("scale" in found) == isinstance(method, Sample)
    assert ("dropped" in found) == isinstance(method, Reuse)
    assert ("weights" in found) == isinstance(method, Sample)
    assert "tally" in found


# How a number that was counted gets to the host.
_READ = ("copy_", "_local_scalar_dense")


class Dispatched(TorchDispatchMode):
    """ATen's ops that a GPU would launch something for: all but views, empty tensors and reading a number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op).split(".")[1]
        if not op.is_view and not name.startswith(("empty", "new_empty", "detach")) and name not in _READ:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


# Of a backward: Triton's kernels, and what ATen does beside. (What has room beyond a count is zeros.)
LAUNCHES: dict[str, tuple[Reuse | Sample | None, list[str], list[str]]] = {
    "exact": (
        None,
        ["live_rows", "compact", "tally_rows", "gather_matmul", "gather_reduce"],
        ["zeros"],
    ),
    "sample": (
        Sample(0.3),
        ["scores", "rates", "lengths", "weights", "gather", "gather_matmul", "scaled_rows", "gather_reduce"],
        [],
    ),
    "reuse": (
        Reuse(0.7),
        ["row_stats", "threshold", "largest", "gather_matmul", "sum_dropped", "gather_reduce"],
        ["mean", "sum"],
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_each_stage_is_one_launch(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    method, kernels, others = LAUNCHES[name]
    ran: list[str] = []

    def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        ran.append(name_of(kernel))
        with _disable_current_modes():  # to interpret a kernel takes copies
            triton.launch(kernel, grid, *arguments, **options)

    backward = site_on_a_gpu(method, launch, device, monkeypatch)
    for _ in range(2):
        ran.clear()
        with Dispatched() as seen:
            backward()
    assert ran == kernels
    assert sorted(seen.names) == sorted(others)


def name_of(kernel: Any) -> str:
    """Of the function that a kernel is, below what tunes it."""
    while not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return str(kernel.__name__).removeprefix("_")
