"""Build every kernel for every GPU, and say what came of it: JSON on stdout, a list of :class:`Built`.

Needs no GPU: Triton brings its own assembler. It is a program of its own because a process in which kernels
are interpreted cannot build them.

    python tests/kernels/triton/build.py
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

CAPABILITIES = (80, 90)

# Of arguments that are not in the dtype of the gradient, by name.
TYPES = {"kept": "*i32", "count": "*i32", "slot": "*i64", "scale": "*fp32", "squares": "*fp32", "live": "*i8"}
TYPES |= {"threshold": "*i32", "room": "*i64", "totals": "*i64", "counts": "*i32", "before": "*i64"}
TYPES |= {"ones": "*i32", "mask": "*u8", "bits": "*i8", "dropped": "*i8"}
TYPES |= {"scores": "*fp32", "weights": "*fp32", "ranks": "*i32", "above": "*i32", "tally": "*i64"}
TYPES |= {"lse": "*fp32", "weight": "*fp32", "delta": "*fp32", "shift": "*fp32"}
TYPES |= {"sample": "*i64", "new": "*bf16", "finite": "*i8", "renewed": "*i64", "parts": "*fp32"}
TYPES |= {"found": "*i32", "rates": "*fp64", "shares": "*i32", "lines": "*i64"}
TYPES |= {"cap": "fp32", "flops": "i64", "given": "*i64"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """One kernel with one tile, dtype and target.

    Attributes:
        sizes: what was known of the tensors' sizes.
        scaled: whether rows have a scale.
        based: whether there are rows of a base beside them.
        shared: bytes of shared memory of one program.
        registers: of one thread.
        stack: bytes of one thread; registers that did not fit are spilled there, and nothing else is.
        tensor_cores: the instructions for them that occur, e.g. ``["mma.sync"]``.
        narrow: whether an offset into a tensor is multiplied in 32 bits, where it may overflow.
        copies: whether tiles are copied to shared memory while others are multiplied (``cp.async``).
        packed: which operand of dW holds the scaled rows, "a" or "b".
    """

    kernel: str
    tile: str
    sizes: str
    dtype: str
    precision: str
    scaled: bool
    based: bool
    capability: int
    shared: int
    registers: int
    stack: int
    tensor_cores: list[str]
    narrow: bool
    copies: bool
    packed: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be built; see :class:`Built`, and :func:`build`, which is called for the rest of it."""

    kernel: str
    tile: str
    dtype: str
    precision: str
    scaled: bool
    based: bool
    capability: int
    packed: str = ""
    build: Callable[[], dict[str, Any]]

    def run(self) -> Built:
        described = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "build"}
        return Built(**described, **self.build())


def build(
    kernel: Any,
    constants: dict[str, Any],
    dtype: str,
    capability: int,
    *,
    sizes: str = "multiples of 16",
    types: dict[str, str] | None = None,
    across: str = "",
    **options: int,
) -> dict[str, Any]:
    """Compile ``kernel`` for contiguous tensors.

    Args:
        kernel: the ``triton.jit`` function.
        constants: its compile-time arguments.
        dtype: of dY, X, W and what comes out, as Triton's signatures name it.
        capability: of the GPU.
        sizes: what Triton knows of them, for it compiles anew for ``"multiples of 16"``, ``"ones"``, which
            become constants, and ``"any"``.
        types: of arguments that are called as others are elsewhere.
        across: a matrix whose columns, not its rows, are each in one piece.
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    others = TYPES | (types or {})
    tensors = {"dy", "w", "base", "products", "a", "b", "base_a", "base_b", "sums", "x", "values"}
    tensors |= {"of_features", "of_rows", "bias", "m", "out"}
    unit = {name: 1 for name in kernel.arg_names if name.endswith("_column")}
    if across:
        unit = {**unit, f"{across}_row": 1}
        del unit[f"{across}_column"]
    unspecialized = {"splits", *(p.name for p in kernel.params if p.do_not_specialize)}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {**constants, **unit}
    attributes = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or name in unit:
            signature[name] = "constexpr"
            continue
        if name.endswith("_strides"):  # a tuple, the last of which is that of the features
            last = 2 if name == "lse_strides" else 3
            ones = range(last + 1) if sizes == "ones" else [last]
            signature[name] = tuple("constexpr" if i in ones else "i32" for i in range(last + 1))
            constexprs |= {(position, i): 1 for i in ones}
            if sizes == "multiples of 16":
                attributes |= {(position, i): [["tt.divisibility", 16]] for i in range(last)}
            continue
        if sizes == "ones" and name not in others and name not in tensors and name not in unspecialized:
            signature[name], constexprs[name] = "constexpr", 1
            continue
        signature[name] = others.get(name) or (f"*{dtype}" if name in tensors else "i32")
        if sizes == "multiples of 16" and name not in unspecialized and signature[name] != "fp32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "sizes": sizes,
        "shared": compiled.metadata.shared,
        "tensor_cores": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\b", ptx))),
        # What has two dimensions and is multiplied by a number is an offset, of rows or of columns.
        "narrow": re.search(r"arith\.muli .*: tensor<\d+x\d+xi32>", compiled.asm["ttir"]) is not None,
        "copies": "cp.async" in ptx,
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """What the machine code takes of a GPU, for one thread."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "stack": int(found[2])}


def plain(
    kernel: str, function: Any, constants: dict[str, Any], dtype: str, capability: int, **options: Any
) -> Job:
    """A kernel that is not tuned: its tile is what is constant in it."""
    return Job(
        kernel=kernel,
        tile=str(constants),
        dtype=dtype,
        precision=constants.get("PRECISION", ""),
        scaled=constants.get("SCALED", False) or bool(constants.get("PACKED")),
        based=constants.get("BASED", False),
        packed=constants.get("PACKED", ""),
        capability=capability,
        build=functools.partial(build, function, constants, dtype, capability, **options),
    )


# Of the products: rows that are neither scaled (drawn at random) nor have a base, as those of reuse; and, in
# a forward, products with the transpose of a weight, and a bias.
KINDS = {"": (False, False), "scaled": (True, False), "based": (False, True), "forward": (False, False)}


def products() -> Iterator[Job]:
    """The two products: every tile of the lists that they are tuned over, of rows of every kind. What changes
    little is built once: float16, which is another instruction than bfloat16, with the largest tile; float32
    of rows that have a base, with the larger one; and float32 without tensor cores, which is the same on any
    GPU."""
    from sparse_compile.kernels.triton import input_gradient, tiles, weight_gradient

    kernels = (
        ("gather_matmul", input_gradient._gather_matmul),
        ("gather_reduce", weight_gradient._gather_reduce),
    )
    for (name, kernel), capability in itertools.product(kernels, CAPABILITIES):
        half, single = tiles.HALF[capability], tiles.SINGLE
        modes = [("bf16", "ieee", kind, config) for config in half for kind in KINDS]
        modes += [("fp32", "tf32", "scaled" if name == "gather_reduce" else "", config) for config in single]
        modes += [("fp32", "tf32", "based", single[-1])]
        if capability == 90:
            modes += [("fp16", "ieee", "scaled", half[0]), ("fp32", "ieee", "based", single[-1])]
            modes += [
                ("fp32", "ieee", "scaled" if name == "gather_matmul" else "", config) for config in single
            ]
        for dtype, precision, kind, config in modes:
            if name == "gather_reduce" and kind == "forward":
                continue
            scaled, based = KINDS[kind]
            constants = {**config.kwargs, "BASED": based, "PRECISION": precision, "GROUP": 8}
            if name == "gather_matmul":
                constants |= {"SCALED": scaled, "EVEN_K": True, "BIASED": kind == "forward"}
            options: dict[str, Any] = {"across": "w"} if kind == "forward" else {}
            options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
            tile = "{BLOCK_M}x{BLOCK_N}x{BLOCK_K}".format(**config.kwargs)
            for packed in ("a", "b") if scaled and name == "gather_reduce" else ("",):
                packs = {"PACKED": packed} if name == "gather_reduce" else {}
                yield Job(
                    kernel="forward" if kind == "forward" else name,
                    tile=f"{tile}, {config.num_warps} warps, {config.num_stages} stages",
                    dtype=dtype,
                    precision=precision,
                    scaled=scaled,
                    packed=packed,
                    based=based,
                    capability=capability,
                    build=functools.partial(build, kernel, constants | packs, dtype, capability, **options),
                )


def others() -> Iterator[Job]:
    """Statistics, choosing rows, compaction, and the sums that go with a base; once more for sizes that are
    ones, and for any, on one GPU."""
    from sparse_compile.kernels.triton import (
        base_inputs,
        base_renewal,
        compaction,
        draw,
        largest,
        neighbours,
        partial_sums,
        row_stats,
        scaled_rows,
    )

    block = {"BLOCK_ROWS": row_stats._ROWS, "BLOCK_COLUMNS": row_stats._COLUMNS}
    scored = {**block, "SMALLEST": row_stats.SMALLEST}
    rated, by_rate = {"BLOCK": draw._BLOCK}, {"num_warps": draw._WARPS}
    drawn, by_draw = {"ROUNDS": draw.ROUNDS, "BLOCK": draw.BLOCK}, {"num_warps": draw.WARPS}
    gathered = {"BLOCK": draw.BLOCK, "AT_ONCE": draw.AT_ONCE}
    summed = {"BLOCK_SAMPLES": base_inputs._SAMPLES, "BLOCK_COLUMNS": base_inputs._COLUMNS}
    weighed = {"BLOCK_ROWS": scaled_rows._ROWS, "BLOCK_COLUMNS": scaled_rows._COLUMNS}
    renewed = {"BLOCK_SAMPLES": base_renewal._SAMPLES, "BLOCK_COLUMNS": base_renewal._COLUMNS}
    chosen: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = [
        ("row_stats", row_stats._row_stats, {**block, "BASED": True}, {}),
        ("row_stats", row_stats._row_stats, {**block, "BASED": False}, {}),
        ("live_rows", row_stats._live_rows, block, {}),
        ("scores", row_stats._scores, {**scored, "NORM": True, "LEVERAGE": True}, {}),
        ("scores", row_stats._scores, {**scored, "NORM": True, "LEVERAGE": False}, {}),
        *(("rates", draw._rates, {**rated, "SHARED": shared}, by_rate) for shared in (False, True)),
        *(("lengths", draw._lengths, {**drawn, "GIVEN": given}, by_draw) for given in (False, True)),
        *(
            ("weights", draw._weights, {**drawn, **gathered, "GIVEN": given, "CAPPED": given}, by_draw)
            for given in (False, True)
        ),
        *(("gather", draw._gather, {**gathered, "SLOTS": slots}, by_draw) for slots in (False, True)),
        ("threshold", largest._threshold, {**largest.KEYS, **rated}, by_rate),
        ("largest", largest._largest, {**largest.KEYS, **gathered}, by_draw),
        ("tally_rows", compaction._tally_rows, {"ZERO": True}, {"num_warps": 1}),
        ("sum_dropped", base_inputs._sum_dropped, summed, {}),
        ("next_base", base_renewal._next_base, {**renewed, "MEAN": True}, {}),
        ("next_base", base_renewal._next_base, {**renewed, "MEAN": False}, {}),
        ("renew", base_renewal._renew, {"BLOCK": base_renewal._BLOCK}, {}),
        ("scaled_rows", scaled_rows._scaled_rows, weighed, {}),
        ("add_up", partial_sums._add_up, {"BLOCK": partial_sums._BLOCK}, {}),
        ("keep_of_four", neighbours._keep_of_four, {"KEEP": 2, "BLOCK": neighbours._BLOCK}, {}),
        ("compact", compaction._compact, {"BLOCK": compaction._BLOCK, "SLOTS": True}, {"num_warps": 16}),
        ("compact", compaction._compact, {"BLOCK": compaction._BLOCK, "SLOTS": False}, {"num_warps": 16}),
    ]
    for (name, kernel, constants, options), (dtype, capability) in itertools.product(
        chosen, [("bf16", 80), ("bf16", 90), ("fp32", 90)]
    ):
        yield plain(name, kernel, constants, dtype, capability, **options)
    for (name, kernel, constants, options), sizes in itertools.product(chosen, ("ones", "any")):
        yield plain(name, kernel, constants, "bf16", 90, sizes=sizes, **options)


def odd_sizes() -> Iterator[Job]:
    """The products once more for sizes that are ones, and for any, on one GPU with one tile."""
    from sparse_compile.kernels.triton import input_gradient, tiles, weight_gradient

    for kind, sizes in itertools.product(("scaled", "based"), ("ones", "any")):
        scaled, based = KINDS[kind]
        tile = {**tiles.HALF[90][-1].kwargs, "BASED": based, "PRECISION": "ieee", "GROUP": 8}
        wide = {**tile, "SCALED": scaled, "EVEN_K": False, "BIASED": False}
        yield plain("gather_matmul", input_gradient._gather_matmul, wide, "bf16", 90, sizes=sizes)
        if kind == "scaled":
            wide |= {"SCALED": False, "BIASED": True}
            function = input_gradient._gather_matmul
            yield plain("forward", function, wide, "bf16", 90, sizes=sizes, across="w")
        for packed in ("a", "b") if scaled else ("",):
            packs = {**tile, "PACKED": packed}
            yield plain("gather_reduce", weight_gradient._gather_reduce, packs, "bf16", 90, sizes=sizes)


def packing() -> Iterator[Job]:
    """Selection and packing. Numbers are bits to them: float16 differs from bfloat16 in a constant."""
    from sparse_compile.kernels.triton import pack, select

    targets = [("multiples of 16", capability) for capability in CAPABILITIES] + [("ones", 90), ("any", 90)]
    for dtype in (torch.float32, torch.bfloat16):
        form = select.FORMATS[dtype]
        block = {"BLOCK": pack._BLOCK}
        digit = {"WIDTH": form.digits[0], "BINS": select._BINS}
        counting = {**form.constants, **digit, "SHIFT": sum(form.digits[1:]), "ROUNDS": select._ROUNDS}
        chosen: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = [
            ("count_digits", select._count_digits, {**counting, "BLOCK": select._BLOCK}, {"num_warps": 8}),
            ("choose_digit", select._choose_digit, digit, {}),
            ("count_kept", pack._count_kept, {**form.constants, **block}, {}),
            ("pack", pack._pack, {**form.constants, **block}, {}),
            ("count_ones", pack._count_ones, block, {}),
            ("unpack", pack._unpack, block, {}),
            ("pack_bits", pack._pack_bits, block, {}),
            ("unpack_bits", pack._unpack_bits, block, {}),
        ]
        integers = "i32" if form.bits == torch.int32 else "i16"
        for (name, kernel, constants, options), (sizes, capability) in itertools.product(chosen, targets):
            yield plain(name, kernel, constants, integers, capability, sizes=sizes, **options)


def attention() -> Iterator[Job]:
    """The two walks: every tile under a causal mask and with one that is added; float32 on one GPU for each
    precision; and the other masks, float16, sizes of one and any with one tile."""
    from sparse_compile.kernels.triton import tiles

    for (over, gpu, wide), configs in tiles.SCORES.items():
        width = 128 if wide else 64
        modes = [("bf16", "ieee", int(gpu), mask) for mask in ("causal", "added")] if gpu != "single" else []
        if gpu == "single":
            modes = [("fp32", "ieee", 90, "added"), ("fp32", "tf32", 80, "added")]
        for config, mode in itertools.product(configs, modes):
            yield _walk(over, width, config, *mode)
    for over in ("rows", "keys"):
        config = tiles.SCORES[over, "90", False][-1]
        yield _walk(over, 64, config, "fp16", "ieee", 90, "none")
        yield _walk(over, 64, config, "bf16", "ieee", 90, "bool, of all rows")
        for sizes in ("ones", "any"):
            yield _walk(over, 64, config, "bf16", "ieee", 90, "causal and bool", sizes=sizes)
    yield from _prepared()


def _heads(dtype: str) -> dict[str, str]:
    """Arguments of an attention, [B, H, T, D]."""
    return dict.fromkeys(("do", "q", "k", "v", "out", "dq", "dk", "dv"), f"*{dtype}")


def _walk(
    over: str,
    width: int,
    config: Any,
    dtype: str,
    precision: str,
    capability: int,
    mask: str,
    *,
    sizes: str = "multiples of 16",
) -> Job:
    from sparse_compile.kernels.triton import attention

    constants = {**config.kwargs, "WIDTH": width, "PRECISION": precision, "CAUSAL": "causal" in mask}
    constants |= {"MASKED": mask not in ("none", "causal"), "ALIKE": "all rows" in mask}
    kernel = attention._key_gradients if over == "rows" else attention._query_gradients
    return Job(
        kernel="key_gradients" if over == "rows" else "query_gradients",
        tile="{ROWS}x{KEYS}".format(**config.kwargs) + f"x{width}, {config.num_warps} warps, mask: {mask}",
        dtype=dtype,
        precision=precision,
        scaled=False,
        based=False,
        capability=capability,
        build=functools.partial(
            build,
            kernel,
            constants,
            dtype,
            capability,
            sizes=sizes,
            types=_heads(dtype) | {"scale": "fp32", "mask": f"*{dtype}" if mask == "added" else "*i8"},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )


def _prepared() -> Iterator[Job]:
    from sparse_compile.kernels.triton import attention

    targets = [("multiples of 16", capability) for capability in CAPABILITIES] + [("ones", 90), ("any", 90)]
    for dtype, (sizes, capability) in itertools.product(("bf16", "fp32"), targets):
        constants = {"WEIGHTED": dtype == "bf16", "ROWS": attention._PREPARED, "WIDTH": 128}
        types = _heads(dtype)
        yield plain("prepare", attention._prepare, constants, dtype, capability, sizes=sizes, types=types)


def everything() -> list[Job]:
    return [*products(), *others(), *odd_sizes(), *packing(), *attention()]


def _run(number: int) -> Built:
    """One of the jobs; they are not sent to a process, but known to it."""
    return everything()[number].run()


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        done = pool.map(_run, range(len(everything())), chunksize=1)
    json.dump([dataclasses.asdict(built) for built in done], sys.stdout)
