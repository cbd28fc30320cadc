"""How close an estimate of a gradient is to the gradient.

    cosine           ⟨Ĝ, G⟩ / (‖Ĝ‖ · ‖G‖)
    relative error   ‖Ĝ − G‖ / ‖G‖
    energy kept      Σ dY² over the entries that the estimate takes from dY as they are, over Σ dY² of all

All in float64 on the device of the tensors, with nothing that waits for it. Where G or dY is zero or not
finite the result is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.methods.rows import Estimate, Neighbours, Rows

# Entries that are widened at a time, so that no float64 copy of a whole gradient is made.
_CHUNK = 2**20


def compare(estimate: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, relative error) of Ĝ and G, two tensors of one shape."""
    ab, aa, bb, dd = exact.new_zeros(4, dtype=torch.float64)
    rows = max(1, _CHUNK * len(exact) // max(1, exact.numel()))
    for some_of_estimate, some in zip(estimate.split(rows), exact.split(rows), strict=True):
        a, b = some_of_estimate.double().flatten(), some.double().flatten()
        d = a - b
        ab, aa, bb, dd = ab + a @ b, aa + a @ a, bb + b @ b, dd + d @ d
    return (ab / (aa.sqrt() * bb.sqrt())).clamp(-1, 1), (dd / bb).sqrt()


def energy_kept(dy: Tensor, estimate: Estimate) -> Tensor:
    """The share of dY's energy in its kept rows, whatever they are scaled by; where the estimate is written
    out, in the entries that equal dY's.

    Args:
        dy: [N, O].
        estimate: of it; one whose rows are not ``padded``.
    """
    if isinstance(estimate, Rows):
        return _energy(dy.index_select(0, estimate.kept)) / _energy(dy)
    if isinstance(estimate, Neighbours):
        return energy_in(dy, estimate.kept != 0)
    return energy_in(dy, estimate == dy)


def energy_in(dy: Tensor, kept: Tensor) -> Tensor:
    """The share of the energy of ``dy``, of any shape, where ``kept``: bool, broadcast to that shape."""
    return _energy(torch.where(kept, dy, torch.zeros_like(dy))) / _energy(dy)


def _energy(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
