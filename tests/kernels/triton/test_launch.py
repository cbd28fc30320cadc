"""Kernels run on the GPU that their tensors are on, whichever is the current one."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sparse_compile.kernels import triton
from sparse_compile.kernels.triton import tiles

FOLDER = Path(triton.__file__).parent


def test_every_launch_goes_through_the_helper() -> None:
    """``kernel[grid](…)`` is written once."""
    found = [
        (path.name, node.lineno)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert [name for name, _ in found] == ["__init__.py"]


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
def test_it_is_on_the_gpu_of_its_tensors(where: str, switched: bool, entered: list[torch.device]) -> None:
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
