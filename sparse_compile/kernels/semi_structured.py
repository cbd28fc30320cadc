"""Products with a matrix of which two of every four neighbours are zero, on the sparse tensor cores (CUDA).

cuSPARSELt multiplies such a matrix, packed, at up to twice the dense rate. What it multiplies here is the
residual of reuse, which was pruned to it; what the base adds is 1/B of the dense work and left to ATen:

    dX = S · W + P_t · W           in rows that are live
    dW = S'ᵀ · X + Pᵀ · Σ_b X

Packing takes a pass over S for each product: whether all this is faster than the dense products is measured
(``kernels/choice.py``), and the report names what was taken.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparse_compile.kernels.linear import DistinctRows, sum_dropped
from sparse_compile.methods.rows import Estimate, Neighbours, Rows

# Sizes of a packed matrix are multiples of this, or cuSPARSELt does not take it.
_MULTIPLE = 64


def usable(dy: Tensor, inputs: int) -> bool:
    """Whether both products of ``dy`` [N, O] with matrices of ``inputs`` columns can be done here."""
    return (
        dy.dtype in (torch.bfloat16, torch.float16)
        and all(size % _MULTIPLE == 0 for size in (*dy.shape, inputs))
        and torch.backends.cusparselt.is_available()
    )


def multiply(pruned: Tensor, dense: Tensor) -> Tensor:
    """``pruned`` [m, k], of which two of every four neighbours in a row are zero, times ``dense`` [k, n]."""
    with warnings.catch_warnings():
        # "The PyTorch API of SparseSemiStructuredTensor is in prototype stage"
        warnings.filterwarnings("ignore", message=".*prototype stage", category=UserWarning)
        return torch.mm(torch.sparse.to_sparse_semi_structured(pruned), dense)


def backward(
    x: Tensor | None, w: Tensor | None, for_dx: Estimate, for_dw: Estimate, *, dw_transposed: bool
) -> tuple[DistinctRows | None, Tensor | None]:
    """As :func:`linear.backward`, of estimates that both keep n of four."""
    assert isinstance(for_dx, Neighbours)
    assert isinstance(for_dw, Neighbours)
    dx = None if w is None else (input_gradient(for_dx, w), None)
    return dx, None if x is None else weight_gradient(for_dw, x, transposed=dw_transposed)


def input_gradient(estimate: Neighbours, w: Tensor) -> Tensor:
    """dX [N, I] = Ŷ · W, with W [O, I]; ``estimate`` is pruned along the features."""
    dx = multiply(estimate.residual, w.contiguous())
    per_sample = dx.view(-1, len(estimate.base), dx.shape[1])
    alive = estimate.live.view(-1, len(estimate.base), 1).to(dx.dtype)
    return per_sample.addcmul_(alive, torch.mm(estimate.base, w)).view(dx.shape)


def weight_gradient(estimate: Neighbours, x: Tensor, *, transposed: bool) -> Tensor:
    """dW [O, I] = Ŷᵀ · X, or its transpose, with X [N, I]; ``estimate`` is pruned along the rows."""
    dw = multiply(estimate.residual, x.contiguous())
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    dw.addmm_(estimate.base.t(), sum_dropped(x, Rows(nothing, estimate.base, estimate.live)))
    return dw.t().contiguous() if transposed else dw
