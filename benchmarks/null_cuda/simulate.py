"""Run tests on a CUDA that is simulated, on a machine without a GPU.

    python benchmarks/null_cuda/simulate.py FILE …      tests; all that `make gpu` runs, without any

The CUDA that launches nothing (``build.py``) holds the tensors. ATen's kernels for CUDA are replaced by calls
of the CPU's on the same memory, Triton's run in its interpreter. So dispatch, devices, allocator and the
graphs that are traced for CUDA are those of a GPU, and numbers come of it: a tensor on the wrong device is
noticed, and a rule that knows the CPU's ops alone. It is slow, and says nothing of kernels as they are built.

What cannot run: CUDA graphs, Inductor's own kernels, cuDNN, cuSPARSELt. CUDA's fused attentions are computed
from their formula (``tests/cuda_attention.py``).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import from_source

ROOT = from_source.ROOT
# What takes tensors of both devices.
MIXED = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "_unsafe_index")
# What needs no kernel; or has one that is no kernel of a GPU.
LEFT_ALONE = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_")
LEFT_ALONE += ("_reshape_alias", "record_stream", "is_pinned", "_pin_memory")


def on_cpu(tensor: Any) -> Any:
    """A tensor of the CPU over the memory of one of CUDA."""
    import torch

    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    there = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(there, dtype=torch.uint8).untyped_storage()
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(raw, *place)


def on_cuda(tensor: Any, device: Any) -> Any:
    """A copy of a tensor of the CPU, laid out alike."""
    import torch

    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        entries = 1 + sum((size - 1) * stride for size, stride in sizes)
        ctypes.memmove(made.data_ptr(), tensor.data_ptr(), entries * tensor.element_size())
    return made


def by_cpu(op: Any) -> Callable[..., Any]:
    """What computes ``op`` of tensors of CUDA on the CPU."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    name = op._schema.name.split("::")[1]
    wants_tensor = [str(argument.type) == "Tensor" for argument in op._schema.arguments]
    compute = _attention(name) or op

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        device = next((each.device for each in tensors if each.is_cuda), torch.device("cuda", 0))
        elsewhere = [each for each in tensors if not each.is_cuda and each.dim() > 0]
        if elsewhere and name not in MIXED and not name.endswith("_attention_backward"):
            raise RuntimeError(f"{name} got a tensor on the CPU beside those on {device}")
        given: list[tuple[Any, Any]] = []  # of the CPU, and of CUDA

        def taken(tensor: Any) -> Any:
            if tensor.is_cuda:
                given.append((on_cpu(tensor.detach()), tensor))
                return given[-1][0]
            return tensor

        args, kwargs = tree_map_only(torch.Tensor, taken, (args, kwargs))
        args = tuple(
            torch.tensor(each) if wanted and isinstance(each, int | float) else each
            for each, wanted in zip(args, [*wants_tensor, *[False] * len(args)], strict=False)
        )
        args = tuple(None if isinstance(each, torch.Generator) else each for each in args)
        changed = {"device": torch.device("cpu"), "pin_memory": None, "generator": None}
        kwargs |= {key: value for key, value in changed.items() if kwargs.get(key) is not None}
        out = compute(*args, **kwargs)
        for mine, theirs in given:
            if mine.shape != theirs.shape:  # an `out` that was resized
                dense = mine.contiguous()
                theirs.resize_(dense.shape)
                ctypes.memmove(theirs.data_ptr(), dense.data_ptr(), dense.numel() * dense.element_size())

        def returned(tensor: Any) -> Any:
            same = [theirs for mine, theirs in given if mine is tensor]
            return same[0] if same else on_cuda(tensor.detach(), device)

        return (
            out
            if not isinstance(out, torch.Tensor | tuple | list)
            else tree_map_only(torch.Tensor, returned, out)
        )

    return run


def _attention(name: str) -> Callable[..., Any] | None:
    """CUDA's fused ones, which a CPU does not have."""
    import cuda_attention

    for form in cuda_attention.FORMS:
        if name == f"_scaled_dot_product_{form}_attention":
            return cuda_attention._forward(form)
        if name == f"_scaled_dot_product_{form}_attention_backward":
            return cuda_attention._backward(form, [])
    return None


def simulate() -> Any:
    """Replace the kernels, in a process whose CUDA launches nothing. Returns what holds them."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, full = name.partition("::")
        base, _, overload = full.partition(".")
        if space != "aten" or base in LEFT_ALONE or base.startswith("_cslt"):
            continue
        if full != "copy_" and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        if not any(each.alias_info and not each.alias_info.is_write for each in op._schema.arguments):
            library.impl(full, by_cpu(op), "CUDA")
    torch.autograd.set_multithreading_enabled(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return library


def begin() -> Any:
    """Simulate a CUDA in this process, for as long as what is returned is held."""
    with warnings.catch_warnings(action="ignore"):
        holding = simulate()
    from sparse_compile.kernels.triton import launcher

    launcher._builds = lambda device: False
    return holding


def main(files: list[str]) -> int:
    import build

    if "NULL_CUDA" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            build.build(Path(folder))
            environment = build.environment(Path(folder)) | {"NULL_CUDA": folder, "TRITON_INTERPRET": "1"}
            return subprocess.run([sys.executable, __file__, *files], env=environment).returncode
    from_source.prepare()
    sys.path.insert(0, str(ROOT / "tests"))
    import gpu_tests
    import pytest

    holding = begin()  # noqa: F841
    os.chdir(ROOT)
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-o", "pythonpath=.", "-o", "addopts="]
    return int(pytest.main([*options, *(files or gpu_tests.TESTS)]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
