"""The ops that carry activations from forward to backward: registered as PyTorch wants them."""

import pruned
import pytest
import torch
from torch import Tensor
from unread import unread

from sparse_compile import PruneSaved, Schedule, pack_ops, sparse_backend
from sparse_compile.kernels import on_device
from sparse_compile.kernels import pack as by_aten
from sparse_compile.methods import prune

ops = torch.ops.sparse_compile


@pytest.mark.parametrize("values", ["same", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [0, 3, 21])
def test_pack_and_unpack(values, dtype, groups):
    x = (torch.randn(3, 7, 100) + 2 * torch.randn(100)).to(dtype)
    x[1, 2] = 0
    torch.library.opcheck(ops.pack.default, (x, 3, groups, 0.25, values))
    packed = ops.pack(x, 3, groups, 0.25, values)
    torch.library.opcheck(ops.unpack.default, (*packed, [3, 7, 100], dtype))
    back = ops.unpack(*packed, [3, 7, 100], dtype)
    assert back.dtype == dtype
    expected = prune.prune(x, 3, 0.25)
    if groups:
        means = x.view(groups, -1, 100).mean(1, keepdim=True).expand(groups, 21 // groups, 100).clone()
        means.view(3, 7, 100)[1, 2] = 0
        expected = prune.prune(x.view(groups, -1, 100) - means, 3, 0.25).view(groups, -1, 100) + means
        expected = expected.view(x.shape)
    else:
        assert torch.equal(back != 0, expected != 0) or values == "int8"
    # Of the largest entry: a step of the form that is stored, and of the dtype where means are added again.
    steps = {"same": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 1 / 127}
    step = max(steps[values], torch.finfo(dtype).eps if groups else 0.0)
    torch.testing.assert_close(back, expected, rtol=0, atol=step * float(x.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_8_bits(dtype):
    x = (torch.randn(3, 7, 100) * torch.logspace(-3, 3, 7).view(7, 1)).to(dtype)
    x[0, 0] = 0
    rounded = prune.round_rows(x)
    assert rounded[0].dtype == torch.int8
    back = prune.restore_rows(*rounded, dtype)
    assert back.dtype == dtype
    assert torch.equal(back[0, 0], x[0, 0])
    # Half a step of each row, and what the dtype itself rounds.
    allowed = x.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2 * torch.finfo(dtype).eps)
    assert bool(((back - x).abs() <= allowed).all())


def test_a_row_that_is_not_finite_is_seen_to():
    x = torch.randn(3, 100)
    x[0, 5], x[1, 5] = torch.inf, torch.nan
    back = prune.restore_rows(*prune.round_rows(x), torch.float32)
    assert not bool(back[:2].isfinite().any())
    assert bool(back[2].isfinite().all())


def test_bits():
    x = torch.rand(3, 5, 7) > 0.5
    torch.library.opcheck(ops.pack_bits.default, (x,))
    mask = ops.pack_bits(x)
    assert mask.numel() == -(-x.numel() // 8)
    torch.library.opcheck(ops.unpack_bits.default, (mask, [3, 5, 7]))
    assert torch.equal(ops.unpack_bits(mask, [3, 5, 7]), x)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The ops take the GPU's path, and Triton's kernels."""
    pytest.importorskip("triton")
    monkeypatch.setattr(on_device, "available", lambda device: True)


@pytest.mark.parametrize("values", ["same", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_results_are_those_of_the_cpu(values, dtype, device, monkeypatch):
    x = torch.randn(2, 7, 43).to(dtype)
    x[0, 0, :20] = 1.5
    packed = ops.pack(x, 2, 0, 0.25, values)
    wanted = [*packed, ops.unpack(*packed, [2, 7, 43], dtype)]
    pytest.importorskip("triton")
    monkeypatch.setattr(on_device, "available", lambda device: True)
    x = x.to(device)
    torch.library.opcheck(ops.pack.default, (x, 2, 0, 0.25, values))
    with unread():
        packed = ops.pack(x, 2, 0, 0.25, values)
        ours = [*packed, ops.unpack(*packed, [2, 7, 43], dtype)]
    torch.library.opcheck(ops.unpack.default, (*packed, [2, 7, 43], dtype))
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one.cpu(), other)


def test_bits_on_a_gpu(as_on_a_gpu, device):
    x = torch.rand(3, 5, 7, device=device) > 0.5
    torch.library.opcheck(ops.pack_bits.default, (x,))
    with unread():
        mask = ops.pack_bits(x)
        back = ops.unpack_bits(mask, [3, 5, 7])
    torch.library.opcheck(ops.unpack_bits.default, (mask, [3, 5, 7]))
    assert torch.equal(mask.cpu(), by_aten.pack_bits(x.cpu().view(1, -1)))
    assert torch.equal(back, x)


def test_what_has_no_kernel_is_left_to_aten(as_on_a_gpu, monkeypatch):
    cpu = torch.device("cpu")
    assert pack_ops._kernels(cpu, torch.float64) is by_aten
    assert pack_ops._kernels(cpu, torch.float32) is not by_aten
    monkeypatch.undo()
    assert pack_ops._kernels(cpu, torch.float32) is by_aten


def test_training_a_model_on_a_gpu(device, monkeypatch):
    """Gradients are those with the CPU's kernels, to the bit."""
    by_triton = pytest.importorskip("sparse_compile.kernels.triton.pack")
    asked = []

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = pruned.Block(activation="relu").to(device)
        x = torch.randn(4, 8, pruned.HIDDEN, device=device)
        backend = sparse_backend(Schedule(saved_activations=PruneSaved(0.9)), compiler="aot_eager")
        torch.compile(model, backend=backend)(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    monkeypatch.setattr(pack_ops, "_kernels", lambda device, dtype: by_aten)
    wanted = gradients()
    torch._dynamo.reset()
    monkeypatch.setattr(pack_ops, "_kernels", lambda device, dtype: asked.append(dtype) or by_triton)
    for ours, theirs in zip(gradients(), wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert {torch.float32, torch.bool} <= set(asked)
