"""What every test needs: PyTorch imported in spite of its warnings, and a compiler that has seen nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    # torch.utils.mkldnn, which Inductor imports, still declares itself with `torch.jit.script_method`.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    import torch

    if not torch.cuda.is_available():
        # Our Triton kernels then run in numpy, on CPU tensors. It has to be said before Triton is imported,
        # and Inductor imports it.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch._inductor.compile_fx


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Dynamo keeps what it compiled per line of code, up to a limit, and so from one test to the next."""
    yield
    torch._dynamo.reset()
