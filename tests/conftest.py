"""What every test needs: PyTorch imported in spite of its warnings, and a compiler that has seen nothing."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator

import interpreter
import pytest

# Else Inductor builds and loads a library for each set of instructions, in each new cache: 20 s a time.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

with warnings.catch_warnings():
    # torch.utils.mkldnn, which Inductor imports, still declares itself with `torch.jit.script_method`.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    import torch

    if not torch.cuda.is_available():
        # Our Triton kernels then run in numpy, on CPU tensors. It has to be said before Triton is imported,
        # and Inductor imports it.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # And Inductor starts no processes to compile in: the tests' own keep the CPU busy.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch._inductor.compile_fx

# Of the millions of objects that tracing makes few refer to each other in circles: to look for those takes a
# twentieth of the time of all tests.
gc.set_threshold(50_000, 10, 10)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they would get in each other's way
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> None:
    if _interprets():
        interpreter.make_quicker()


@pytest.fixture(autouse=True)
def _overflow(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of a kernel's whole numbers is looked for in the tests of kernels."""
    if "kernels" in request.path.parts or not _interprets():
        yield
        return
    with interpreter.no_overflow_is_looked_for():
        yield


@pytest.fixture(autouse=True, scope="session")
def _untuned() -> Iterator[None]:
    """On a GPU: one tile for each kernel. To tune is to build all of them, for every shape in the tests."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    from sparse_compile.kernels.triton import attention, input_gradient, tiles, weight_gradient

    lists = [*tiles.HALF.values(), tiles.SINGLE, *tiles.SCORES.values()]
    whole = [configs.copy() for configs in lists]
    for configs in lists:
        del configs[:-1]
    yield
    for configs, all_of_them in zip(lists, whole, strict=True):
        configs[:] = all_of_them
    for module in (attention, input_gradient, weight_gradient):
        module._tuned.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Dynamo keeps what it compiled per line of code, up to a limit, and so from one test to the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    """What is fastest is remembered for a process; no test is to know what another has measured."""
    from sparse_compile.kernels import choice

    choice._chosen.clear()
    yield
    choice._chosen.clear()


@pytest.fixture
def reuse_however_little_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse rows in attention also where the layer is so small that it would be exact."""
    monkeypatch.setattr("sparse_compile.methods.attention.reuse_pays", lambda *_, **__: True)
