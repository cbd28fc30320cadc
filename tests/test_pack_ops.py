"""The ops that carry activations from forward to backward: registered as PyTorch wants them."""

import pytest
import torch

from sparse_compile.methods import prune

ops = torch.ops.sparse_compile


@pytest.mark.parametrize("values", ["same", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_and_unpack(values, dtype):
    x = torch.randn(3, 7, 100).to(dtype)
    torch.library.opcheck(ops.pack.default, (x, 3, 0.25, values))
    mask, kept, scales = ops.pack(x, 3, 0.25, values)
    torch.library.opcheck(ops.unpack.default, (mask, kept, scales, [3, 7, 100], dtype))
    back = ops.unpack(mask, kept, scales, [3, 7, 100], dtype)
    assert back.dtype == dtype
    expected = prune.prune(x, 3, 0.25)
    assert torch.equal(back != 0, expected != 0) or values == "int8"
    torch.testing.assert_close(back, expected, rtol=0 if values == "same" else 0.02, atol=0.02)


def test_bits():
    x = torch.rand(3, 5, 7) > 0.5
    torch.library.opcheck(ops.pack_bits.default, (x,))
    mask = ops.pack_bits(x)
    assert mask.numel() == -(-x.numel() // 8)
    torch.library.opcheck(ops.unpack_bits.default, (mask, [3, 5, 7]))
    assert torch.equal(ops.unpack_bits(mask, [3, 5, 7]), x)
