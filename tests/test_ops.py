"""The custom ops: what every compiler takes for granted of them, and their results without a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.runtime import NO_TOKEN

needed_rows = torch.ops.sparse_compile.needed_rows.default
row_slots = torch.ops.sparse_compile.row_slots.default
begin = torch.ops.sparse_compile.begin.default
linear_forward = torch.ops.sparse_compile.linear_forward.default
linear_backward = torch.ops.sparse_compile.linear_backward.default
attention_backward = torch.ops.sparse_compile.attention_backward.default
fused_attention_backward = torch.ops.sparse_compile.fused_attention_backward.default

ROWS, INPUTS, OUTPUTS = 6, 5, 4

# All that opcheck does but compare the op's own results under AOTAutograd: rows of the first result that
# the second does not name hold anything. What they are for, rows[index], is compared everywhere else.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def token() -> Tensor:
    """Of a graph that no backend runs."""
    return torch.tensor(NO_TOKEN)


def tensors(dtype: torch.dtype = torch.float32, zero_rows: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """dY [N, O], X [N, I], W [O, I]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, OUTPUTS), (ROWS, INPUTS), (OUTPUTS, INPUTS)
    dy, x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    dy[:zero_rows] = 0
    return dy, x, w


@pytest.mark.parametrize("manifest", ["", "[]"])
def test_opcheck_begin(manifest: str) -> None:
    torch.library.opcheck(begin, (torch.randn(2, 3), manifest))


@pytest.mark.parametrize("needed", [0, 2, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_linear_forward(bias: bool, dtype: torch.dtype, needed: int) -> None:
    _, x, w = tensors(dtype)
    b = torch.ones(OUTPUTS, dtype=dtype) if bias else None
    torch.library.opcheck(linear_forward, (token(), x, w, b, torch.arange(ROWS) < needed, 0))


@pytest.mark.parametrize("needed", [[], [4], [1, 2], [0, 3, 5], list(range(ROWS))])
def test_needed_rows(needed: list[int]) -> None:
    """At least two, ascending, and where each is among them."""
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[needed] = True
    rows = needed_rows(mask)
    others = [i for i in range(ROWS) if i not in needed][: max(0, 2 - len(needed))]
    assert rows.tolist() == sorted(needed + others)
    slots = row_slots(rows, ROWS)
    assert slots.tolist() == [rows.tolist().index(i) if i in rows.tolist() else -1 for i in range(ROWS)]
    torch.library.opcheck(needed_rows, (mask,), test_utils=CHECKS)
    torch.library.opcheck(row_slots, (rows, ROWS), test_utils=CHECKS)


@pytest.mark.parametrize("dx_whole", [False, True])
@pytest.mark.parametrize("dw_transposed", [False, True])
def test_linear_backward_of_few_rows(dw_transposed: bool, dx_whole: bool) -> None:
    dy, x, w = tensors()
    rows = torch.tensor([1, 2, 5])
    few = (token(), dy[rows], x[rows], w, 0, 2, dw_transposed, False, dx_whole, rows, ROWS)
    distinct, index, dw = linear_backward(*few)
    torch.testing.assert_close(distinct if dx_whole else distinct[index], dy[rows] @ w)
    expected = dy[rows].t() @ x[rows]
    torch.testing.assert_close(dw, expected.t() if dw_transposed else expected)
    torch.library.opcheck(linear_backward, few, test_utils=CHECKS)


@pytest.mark.parametrize("zero_rows", [0, 5, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dw_transposed", [False, True])
@pytest.mark.parametrize("gradients", ["dX dW", "dX", "dW"])
def test_opcheck_linear_backward(
    gradients: str, dw_transposed: bool, dtype: torch.dtype, zero_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip", lambda *_, **__: 1)
    dy, x, w = tensors(dtype, zero_rows)
    arguments = (
        dy,
        x if "dW" in gradients else None,
        w if "dX" in gradients else None,
        0,
        2,
        dw_transposed,
    )
    for dx_whole in (False, True):
        options = {"dx_whole": dx_whole}
        torch.library.opcheck(linear_backward, (token(), *arguments), options, test_utils=CHECKS)


@pytest.mark.parametrize("layout", ["column-major", "every other row", "expanded"])
def test_opcheck_of_an_output_gradient_that_is_not_contiguous(layout: str) -> None:
    """A sum over tokens makes an expanded one."""
    dy, x, w = tensors()
    layouts = {
        "column-major": dy.t().contiguous().t(),
        "every other row": torch.cat([dy, dy])[::2],
        "expanded": dy[:1].expand_as(dy),
    }
    dy = layouts[layout]
    torch.library.opcheck(linear_backward, (token(), dy, x, w, 0, 1, False), test_utils=CHECKS)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dw_transposed", [False, True])
@pytest.mark.parametrize("zero_rows", [0, 3, ROWS])
def test_without_a_backend_the_gradients_are_exact(
    zero_rows: int, dw_transposed: bool, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a compiled model was saved and loaded elsewhere."""
    monkeypatch.setattr(
        "sparse_compile.methods.exact.fewest_to_skip", lambda *_, **__: 1 if skip else ROWS + 1
    )
    dy, x, w = tensors(torch.float64, zero_rows)
    rows, index, dw = linear_backward(token(), dy, x, w, 0, 1, dw_transposed)
    torch.testing.assert_close(rows[index], dy @ w)
    torch.testing.assert_close(dw, x.t() @ dy if dw_transposed else dy.t() @ x)
    dx, index, _ = linear_backward(token(), dy, x, w, 0, 1, dw_transposed, dx_whole=True)
    torch.testing.assert_close(dx, dy @ w)
    assert index.shape == (0,)


def test_gradient_that_is_not_asked_for_is_empty() -> None:
    dy, x, w = tensors()
    rows, index, dw = linear_backward(token(), dy, None, w, 0, 1, False)
    assert (rows.shape, index.shape, dw.shape) == ((ROWS, INPUTS), (ROWS,), (0,))
    rows, index, dw = linear_backward(token(), dy, x, None, 0, 1, False)
    assert (rows.shape, index.shape, dw.shape) == ((0,), (0,), (OUTPUTS, INPUTS))


def test_begin_without_a_backend() -> None:
    assert tuple(begin(torch.randn(1), "[]").tolist()) == NO_TOKEN


def test_token_of_a_backend_that_is_gone() -> None:
    """The runtime's id is never given again, so that an old token cannot reach another's sites."""
    dy, x, w = tensors()
    rows, index, _ = linear_backward(torch.tensor([10**9, 3, 0, 0]), dy, x, w, 7, 1, False)
    torch.testing.assert_close(rows[index], dy @ w)


def fused_arguments(dtype: torch.dtype, causal: bool, masked: bool) -> tuple[object, ...]:
    """dO, Q, K, V, O, log-sum-exp, causal, mask and scale; queries in the last half are zero in dO."""
    q, do = (torch.randn(2, 8, 3, 4, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 5, 3, 4, dtype=dtype).transpose(1, 2) for _ in range(2))
    mask = torch.randn(2, 1, 8, 5, dtype=dtype) if masked else None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=0.5
    )
    do[:, :, 4:] = 0
    return do, q, k, v, out, lse, causal, mask, 0.5


def chain_arguments(dtype: torch.dtype, dropout: bool) -> tuple[object, ...]:
    """dO, A', A, V, Q, Kᵀ, the scale and the heads; as above."""
    q, do = (torch.randn(6, 8, 4, dtype=dtype) for _ in range(2))
    kt, v = torch.randn(6, 4, 5, dtype=dtype), torch.randn(6, 5, 4, dtype=dtype)
    a = torch.softmax(0.5 * q @ kt, -1)
    do[:, 4:] = 0
    return (
        do,
        (a * 2) * (a > 0.2) if dropout else a,
        a.view(2, 3, 8, 5) if dropout else None,
        v,
        q,
        kt,
        0.5,
        3,
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_opcheck_fused_attention_backward(
    causal: bool, masked: bool, dtype: torch.dtype, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = 1 if skip else 1000
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip_in_attention", lambda *_, **__: fewest)
    torch.library.opcheck(fused_attention_backward, (token(), 0, *fused_arguments(dtype, causal, masked)))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck_attention_backward(
    dropout: bool, dtype: torch.dtype, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = 1 if skip else 1000
    monkeypatch.setattr("sparse_compile.methods.exact.fewest_to_skip_in_attention", lambda *_, **__: fewest)
    torch.library.opcheck(attention_backward, (token(), 0, *chain_arguments(dtype, dropout)))


boundary = torch.ops.sparse_compile.boundary.default
sample_weights = torch.ops.sparse_compile.sample_weights.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_boundary(dtype: torch.dtype) -> None:
    h = torch.randn(3, 4, 5).to(dtype)
    torch.library.opcheck(boundary, (h.requires_grad_(), 1))
    torch.library.opcheck(torch.ops.sparse_compile.boundary_gradient.default, (h.detach(), 1))


def test_boundary_is_the_identity_and_so_is_its_gradient() -> None:
    h, dh = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    out = boundary(h, 0)
    out.backward(dh)
    assert torch.equal(out, h)
    assert h.grad is not None
    assert torch.equal(h.grad, dh)


def test_opcheck_sample_weights() -> None:
    torch.library.opcheck(sample_weights, (token(), torch.rand(ROWS), 0), test_utils=CHECKS)


def test_without_a_backend_every_sample_is_kept() -> None:
    assert torch.equal(sample_weights(token(), torch.rand(ROWS), 0), torch.ones(ROWS))


@pytest.mark.parametrize("op", [begin, linear_backward])
def test_no_cuda_graph_may_hold_an_op(op: torch._ops.OpOverload) -> None:
    """A replay would not ask the runtime what is to be done; Inductor looks for this tag."""
    assert torch.Tag.cudagraph_unsafe in op.tags
