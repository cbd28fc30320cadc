"""Triton kernels for CUDA: the backward of linears and attentions over rows that are gathered as they are
read, and the packing of what is saved for a backward.

    row_stats.py         norms of the rows of dY (and X), and which of them are zero, in one pass
    compaction.py        which rows are live  ►  an index buffer and a count
    draw.py              k rows at random, by a score  ►  an index buffer, weights and a count
    largest.py           the k live rows with the largest score  ►  an index buffer and a count
    input_gradient.py    gather–matmul, dX = dY · W over the rows in the buffer
    base_renewal.py      a base in its place, if what it is to be is finite
    base_inputs.py       Σ dropped X, what the base is multiplied by in dW
    scaled_rows.py       rows that were drawn, by their weights, one after the other
    weight_gradient.py   gather–reduce, dW = Σ dY_iᵀ · X_i over the rows in the buffer
    partial_sums.py      what is left to add up where its rows were dealt out
    neighbours.py        the n largest of every four neighbours of dY − P
    attention.py         attention's backward over the query rows in the buffer
    launcher.py          how a kernel is launched, with little of the host's time
    tiles.py             the tile sizes that these are tuned over
    select.py            the k-th largest magnitude of every sample
    pack.py              a bit for every entry, and the kept values one after the other; and back
    reference.py         what each of them computes, in eager PyTorch; read this first

The number of live rows stays on the device: buffers have room for as many as there may be, a kernel reads
the count, and programs beyond it end at once. So shapes are static and nothing waits for the GPU.

Nothing here imports ``triton`` before one of the modules is: a machine without it works. How they are
tested where there is no GPU is said in CONTRIBUTING.md.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from sparse_compile.kernels.triton.launcher import current, launch

__all__ = ["DTYPES", "cdiv", "current", "installed", "launch"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def installed() -> bool:
    """Whether ``triton`` can be imported."""
    return importlib.util.find_spec("triton") is not None


def cdiv(number: int, size: int) -> int:
    """How many blocks of a size hold so many. (``triton.cdiv`` takes 2 µs on the host.)"""
    return -(-number // size)
