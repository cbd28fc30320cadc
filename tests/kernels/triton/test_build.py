"""What the compiler makes of every kernel, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.triton.build import Built

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block can have
REGISTERS = 255  # that one thread can have
# Bytes that one thread may spill. To walk over rows takes two accumulators, and K and V in registers: some
# tiles lack a few for what else they need. And two numbers of a program that walks over some magnitudes, as
# Triton 3.7 builds it.
SPILLED = {"key_gradients": 128, "largest": 8}
TENSOR_CORES = {80: ["mma.sync"], 90: ["wgmma.mma_async"]}


@pytest.fixture(scope="module")
def built() -> list[Built]:
    """In a process of its own: in this one, kernels may be interpreted. 140 s of one core, once; Triton keeps
    what it compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    program = Path(__file__).with_name("build.py")
    said = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return [Built(**row) for row in json.loads(said.stdout)]


def test_every_kernel_was_built_for_every_target(built: list[Built]) -> None:
    kernels = {
        "gather_matmul",
        "gather_reduce",
        "row_stats",
        "live_rows",
        "compact",
        "keep_of_four",
        "scores",
    }
    kernels |= {"sum_dropped", "next_base", "renew", "add_up", "scaled_rows"}
    kernels |= {"rates", "lengths", "weights", "gather", "threshold", "largest", "tally_rows", "forward"}
    kernels |= {"count_digits", "choose_digit", "count_kept", "pack", "count_ones", "unpack"}
    kernels |= {"pack_bits", "unpack_bits", "prepare", "key_gradients", "query_gradients"}
    assert {(b.kernel, b.capability) for b in built} == {(name, c) for name in kernels for c in (80, 90)}
    for sizes in ("ones", "any"):
        assert {b.kernel for b in built if b.sizes == sizes} == kernels


def test_fits_into_shared_memory(built: list[Built]) -> None:
    assert not [b for b in built if b.shared > SHARED_MEMORY[b.capability]]


def test_nothing_is_spilled_or_little(built: list[Built]) -> None:
    """Where sizes are even, as those of all layers that are worth the trouble."""
    even = [b for b in built if b.sizes == "multiples of 16"]
    assert even
    assert not [b for b in even if b.stack > SPILLED.get(b.kernel, 0) or b.registers > REGISTERS]


def test_offsets_are_of_64_bits(built: list[Built]) -> None:
    """A base of 2³¹ entries is one of 16 k tokens with 128 k features."""
    assert not [b for b in built if b.narrow]


PRODUCTS = ("gather_matmul", "gather_reduce", "forward", "key_gradients", "query_gradients")


def test_products_use_the_tensor_cores(built: list[Built]) -> None:
    products = [b for b in built if b.kernel in PRODUCTS and (b.dtype, b.precision) != ("fp32", "ieee")]
    assert {b.kernel for b in products} == set(PRODUCTS)
    assert not [b for b in products if b.tensor_cores != TENSOR_CORES[b.capability]]


def test_float32_is_not_rounded_to_tf32_unasked(built: list[Built]) -> None:
    exact = [b for b in built if b.kernel in PRODUCTS and (b.dtype, b.precision) == ("fp32", "ieee")]
    assert {b.kernel for b in exact} == set(PRODUCTS) - {"forward"}
    assert not [b for b in exact if b.tensor_cores]


def test_products_copy_ahead_of_what_they_multiply(built: list[Built]) -> None:
    """Where sizes are even: what is copied needs to be aligned."""
    products = [b for b in built if b.kernel in PRODUCTS and b.sizes == "multiples of 16"]
    assert products
    assert not [b for b in products if not b.copies]


def test_every_tile_was_built_for_rows_of_every_kind(built: list[Built]) -> None:
    """All are tuned over the whole list: rows that are drawn have a scale, those of reuse a base."""
    products = [b for b in built if b.kernel in PRODUCTS[:2] and b.dtype == "bf16"]
    even = [b for b in products if b.sizes == "multiples of 16"]
    kinds = [(False, False), (True, False), (False, True)]
    which = [{(b.kernel, b.tile, b.capability) for b in even if (b.scaled, b.based) == k} for k in kinds]
    assert which[0] == which[1] == which[2]
    assert len(which[0]) == 2 * (3 + 5)
    reduced = [b for b in even if b.kernel == "gather_reduce"]
    sides = [{(b.tile, b.capability) for b in reduced if b.packed == side} for side in ("", "a", "b")]
    assert sides[0] == sides[1] == sides[2]
