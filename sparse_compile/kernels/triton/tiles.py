"""The tile sizes over which products and attention are tuned: a short list, each of which is known to fit.

``tests/kernels/triton/test_build.py`` builds every one for sm_80 and sm_90, and looks at its shared memory,
its spills and its instructions. The choice is made at the first call with a shape, by measuring; rows are
counted in powers of two there (``bucket``), so that a count that varies does not tune anew.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Whether kernels run in numpy, a program at a time. One small tile then visits every edge soonest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(a, b, total, PRECISION: tl.constexpr):
    """total + a · b, on the tensor cores, added up in float32."""
    if INTERPRETED:  # where bfloat16 is held as bits, and tl.dot would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def _tile(m: int, n: int, k: int, *, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


# bfloat16 and float16, for GPUs of this compute capability and up. A block has 163 KB of shared memory on an
# A100 and 227 KB on an H100; an A100 has the registers for 128 × 256 only with a short BLOCK_K.
HALF = {
    80: [
        _tile(128, 256, 32, warps=8, stages=4),
        _tile(128, 128, 64, warps=8, stages=4),
        _tile(64, 128, 64, warps=4, stages=4),
    ],
    90: [
        _tile(128, 256, 64, warps=8, stages=3),
        _tile(128, 256, 64, warps=8, stages=4),
        _tile(128, 128, 64, warps=8, stages=4),
        # Two and three programs to a multiprocessor, so that one multiplies while another waits for rows.
        _tile(128, 128, 64, warps=8, stages=3),
        _tile(64, 128, 64, warps=4, stages=3),
    ],
}

# float32, with tensor cores (tf32) or without.
SINGLE = [
    _tile(64, 64, 32, warps=4, stages=3),
    _tile(64, 128, 32, warps=8, stages=3),
]

_SMALLEST = [_tile(16, 16, 16, warps=4, stages=1)]


def _scores(rows: int, keys: int, *, warps: int, stages: int) -> triton.Config:
    return triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)


# Tiles of an attention's scores, by what a program walks over (the rows, for a block of keys, or the keys,
# for a block of rows), by the GPU, or float32 on any, and by whether heads are wider than NARROW. Walking
# over rows takes two accumulators, and so smaller steps.
NARROW = 64
SCORES = {
    ("rows", "80", False): [
        _scores(32, 128, warps=8, stages=2),
        _scores(32, 64, warps=4, stages=2),
        _scores(16, 64, warps=4, stages=2),
    ],
    ("rows", "80", True): [_scores(32, 64, warps=4, stages=2), _scores(16, 64, warps=4, stages=2)],
    ("rows", "90", False): [_scores(64, 128, warps=8, stages=2), _scores(32, 128, warps=8, stages=2)],
    ("rows", "90", True): [_scores(32, 128, warps=8, stages=2), _scores(16, 128, warps=8, stages=2)],
    ("rows", "single", False): [_scores(32, 32, warps=8, stages=2)],
    ("rows", "single", True): [_scores(16, 32, warps=4, stages=2)],
    ("keys", "80", False): [_scores(128, 64, warps=8, stages=3), _scores(64, 32, warps=4, stages=3)],
    ("keys", "80", True): [_scores(128, 64, warps=8, stages=2), _scores(64, 32, warps=4, stages=3)],
    ("keys", "90", False): [_scores(128, 64, warps=8, stages=3), _scores(64, 64, warps=4, stages=3)],
    ("keys", "90", True): [_scores(128, 64, warps=8, stages=3), _scores(64, 64, warps=4, stages=3)],
    ("keys", "single", False): [_scores(32, 32, warps=4, stages=2)],
    ("keys", "single", True): [_scores(32, 16, warps=4, stages=2)],
}
SMALLEST_SCORES = [_scores(16, 16, warps=4, stages=1)]


@functools.cache
def generation(device: torch.device) -> int:
    """Which of the lists are for ``device``, which need not be the current one."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return 90 if hopper else 80


def tuned(
    kernel: Any, configs: list[triton.Config], key: list[str], smallest: list[triton.Config] = _SMALLEST
) -> Any:
    """``kernel``, run with the fastest of ``configs`` for each value of the arguments named by ``key``;
    interpreted, with the ``smallest``."""
    return triton.autotune(smallest if INTERPRETED.value else configs, key)(kernel)


def precision(dtype: torch.dtype) -> str:
    """How float32 is to be multiplied: as PyTorch does it, in tf32 where the user allows that. (Of no other
    dtype it says anything.)"""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
