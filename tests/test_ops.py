"""The custom ops: what every compiler takes for granted of them, and their results without a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_compile.runtime import NO_TOKEN

begin = torch.ops.sparse_compile.begin.default
linear_backward = torch.ops.sparse_compile.linear_backward.default

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


@pytest.mark.parametrize("zero_rows", [0, 5, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dw_transposed", [False, True])
@pytest.mark.parametrize("gradients", ["dX dW", "dX", "dW"])
def test_opcheck_linear_backward(
    gradients: str, dw_transposed: bool, dtype: torch.dtype, zero_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_compile.methods.exact.skip_pays", lambda *_: True)
    dy, x, w = tensors(dtype, zero_rows)
    arguments = (
        dy,
        x if "dW" in gradients else None,
        w if "dX" in gradients else None,
        0,
        2,
        dw_transposed,
    )
    torch.library.opcheck(linear_backward, (token(), *arguments), test_utils=CHECKS)


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
    monkeypatch.setattr("sparse_compile.methods.exact.skip_pays", lambda *_: skip)
    dy, x, w = tensors(torch.float64, zero_rows)
    rows, index, dw = linear_backward(token(), dy, x, w, 0, 1, dw_transposed)
    torch.testing.assert_close(rows[index], dy @ w)
    torch.testing.assert_close(dw, x.t() @ dy if dw_transposed else dy.t() @ x)


def test_gradient_that_is_not_asked_for_is_empty() -> None:
    dy, x, w = tensors()
    rows, index, dw = linear_backward(token(), dy, None, w, 0, 1, False)
    assert (rows.shape, index.shape, dw.shape) == ((ROWS + 1, INPUTS), (ROWS,), (0,))
    rows, index, dw = linear_backward(token(), dy, x, None, 0, 1, False)
    assert (rows.shape, index.shape, dw.shape) == ((0,), (0,), (OUTPUTS, INPUTS))


def test_begin_without_a_backend() -> None:
    assert tuple(begin(torch.randn(1), "[]").tolist()) == NO_TOKEN


def test_token_of_a_backend_that_is_gone() -> None:
    """The runtime's id is never given again, so that an old token cannot reach another's sites."""
    dy, x, w = tensors()
    rows, index, _ = linear_backward(torch.tensor([10**9, 3, 0]), dy, x, w, 7, 1, False)
    torch.testing.assert_close(rows[index], dy @ w)


@pytest.mark.parametrize("op", [begin, linear_backward])
def test_no_cuda_graph_may_hold_an_op(op: torch._ops.OpOverload) -> None:
    """A replay would not ask the runtime what is to be done; Inductor looks for this tag."""
    assert torch.Tag.cudagraph_unsafe in op.tags
