"""Exact row skipping: rows of dY that are exactly zero add nothing to dX, dW or db.

    dX_i = dY_i · W = 0,    dW = Σ_i dY_iᵀ · X_i  over the rows with dY_i ≠ 0

Padding, prompts masked out of the loss and heads that read one token make most rows zero. Measured on
movie-review snippets padded to 64 tokens: 62 % of all rows over a 6-layer BERT.
"""

from __future__ import annotations

from torch import Tensor

from sparse_compile.methods.rows import Rows

# The first columns of a row decide, for nearly every row that is not zero, that it is not: one cache line
# each, 0.04 ms for 2048 rows (2 cores), where the products of a 768 × 768 layer take 40 ms.
_PROBE_COLUMNS = 8


def live_rows(dy: Tensor) -> Tensor | None:
    """Which rows of ``dy`` [N, O] hold anything but zeros: bool [N], or None if all of them do.

    A NaN or an infinity is not zero: it must reach the gradient, where a GradScaler looks for it.
    """
    if bool((dy[:, :_PROBE_COLUMNS] != 0).any(1).all()):
        return None
    # No norms: the square of an entry below 1e-23 is zero in float32. And both are as quick as one norm.
    live = (dy.amax(1) != 0) | (dy.amin(1) != 0)
    return None if bool(live.all()) else live


def live_queries(do: Tensor) -> Tensor | None:
    """Which query rows of ``do`` [B, H, T, D] hold anything but zeros in any head: bool [B, T], or None if
    all of them do."""
    if bool((do[:, 0, :, :_PROBE_COLUMNS] != 0).any(-1).all()):
        return None
    live = do.abs().amax((1, 3)) != 0
    return None if bool(live.all()) else live


def skip_pays(skipped: int, rows: int, inputs: int, outputs: int) -> bool:
    """Whether gathering and scattering rows costs less than the products of the skipped ones.

    Moving one number costs as much as about 80 FLOPs of a matrix product (2 cores, AVX-512, float32); a
    kept row moves O + 2·I numbers and a skipped one saves 4·I·O FLOPs.
    """
    moved = 80 * ((rows - skipped) * (outputs + inputs) + rows * inputs)
    return 4 * skipped * inputs * outputs > moved


def skip_pays_in_attention(
    computed: int, rows: int, keys: int, features: int, *, stored: bool, passes: int = 1
) -> bool:
    """Whether gathering ``computed`` of all the query rows costs less than computing the others.

    Per head: a product has 2 FLOPs for each row, key and feature. There are four, and a fifth where the
    probabilities are not ``stored``. A row that is computed has four times its features moved, and twice its
    probabilities if those are stored; every row has its features moved ``passes`` times. (Costs as in
    :func:`skip_pays`.)
    """
    saved = (8 if stored else 10) * keys * features * (rows - computed)
    moved = computed * (4 * features + (2 * keys if stored else 0)) + rows * features * passes
    return saved > 80 * moved


def rows(live: Tensor) -> Rows:
    """The rows of dY that are not zero, as an estimate that is exact."""
    return Rows(kept=live.nonzero().squeeze(1))
