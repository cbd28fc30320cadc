# ruff: noqa: E402
"""What reaches a GPU's launcher, with no GPU: kernels are built for sm_90, and a driver that does nothing is
told what to launch. JSON on stdout; see test_launcher.py.

A program of its own: where kernels are interpreted, nothing is launched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import from_source

from_source.prepare()  # where the package is not installed

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sparse_compile import Reuse, Sample, Schedule, device_linear
from sparse_compile.kernels import choice, on_device
from sparse_compile.kernels.triton import launcher, tiles
from sparse_compile.linear_site import LinearSite
from sparse_compile.looks import LaterLooks

launched: list[tuple[Any, ...]] = []


class Launcher:
    """What Triton calls to launch a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        arguments = rest[-len(self.signature) :]
        # Constants are in the code: what stands in their places is not read.
        read = [a for a, kind in zip(arguments, self.signature.values(), strict=True) if kind != "constexpr"]
        launched.append((function, (x, y, z), [_described(argument) for argument in read]))


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return str(argument.dtype), list(argument.shape), argument.data_ptr() % 16
    return argument


class Utilities:
    def load_binary(self, name: str, binary: bytes, *_: object) -> tuple[Any, ...]:
        return object(), f"{name} {hash(binary)}", 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 227 * 1024,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def unload_module(self, module: object) -> None:
        pass


class Driver:
    utils = Utilities()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda run, **_: run() or [1.0, 1.0, 1.0]


def backwards(n: int, inputs: int, outputs: int, shift: int) -> None:
    """Exact, sampled and reused, of a linear whose dY begins so many entries behind 16 bytes."""
    memory = torch.ones(n * outputs + shift, dtype=torch.bfloat16)
    dy = memory[shift:].view(n, outputs)
    dy[: n // 2] = 0
    x, w = torch.ones(n, inputs).bfloat16(), torch.ones(outputs, inputs).bfloat16()
    for method in (None, Sample(0.25), Sample(0.4, clip=2.0), Reuse(0.6)):
        site, phase = LinearSite("layer"), Schedule(linear=method).at(0)
        for _ in range(3):
            site.linear_backward(dy, x, w, tokens=n // 4, phase=phase, dw_transposed=False)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    runs: list[str] = []
    run = JITFunction.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        runs.append(self.__name__)
        return run(self, *arguments, **options)

    JITFunction.run = counted
    # The sites and launches of a GPU, on the CPU's tensors.
    launcher._builds = lambda device: True
    tiles.generation = lambda device: 90
    on_device.usable = lambda dy: True
    device_linear.WORTH_LOOKING = 0
    # Nothing counts, so what is read as a count is anything.
    LaterLooks.due = lambda self: True
    LaterLooks.found = lambda self, alive, n: True
    choice.fastest = lambda key, candidates: "triton"
    for configs in tiles.HALF.values():
        del configs[:-1]

    cases = [(64, 32, 48, 0), (68, 24, 40, 1), (64, 16, 32, 0), (80, 32, 48, 8), (132, 24, 40, 0)]
    found: dict[str, Any] = {"wrong": [], "by_triton": [], "remembered": []}
    for case in cases * 2:
        began = len(runs)
        launched.clear()
        backwards(*case)
        ours, by_triton = [*launched], len(runs) - began
        remembered, remember = launcher._built, launcher._built.__class__
        launcher._built = type("Nothing", (remember,), {"get": lambda *_: None})()  # each launch by Triton
        launched.clear()
        backwards(*case)
        launcher._built = remembered
        found["wrong"] += [[str(a), str(b)] for a, b in zip(ours, launched, strict=True) if a != b]
        found["by_triton"].append(by_triton)
        found["remembered"].append(len(ours) - by_triton)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
