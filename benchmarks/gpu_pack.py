"""What packing costs on a GPU: the part of gpu.py for what ``PruneSaved`` saves.

The measure is a copy of the activation within the GPU's memory, which reads and writes it once. Packing reads
it six times in float32 (four for the threshold, one to count, one to write) and four times in bfloat16, so
with memory as the limit the ratio would be about a third and a half; unpacking writes it once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

KEEP = 0.1

Runs = dict[str, Callable[[], object]]


def candidates(device: torch.device, smoke: bool) -> Iterator[tuple[str, int, Runs]]:
    """What is compared.

    Yields:
        (name, bytes of the activation, what is run: "ours", and "copy").
    """
    # The input of an MLP of BERT-large and the output of its first linear, 32 samples of 512 tokens.
    sizes = [(2, 1003)] if smoke else [(32, 512 * 1024), (32, 512 * 4096)]
    for samples, entries in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator(device).manual_seed(0)
            x = torch.randn(samples, entries, device=device, generator=generator).to(dtype)
            for name, ours in kernels(x, round(KEEP * entries)).items():
                runs: Runs = {"ours": ours, "copy": functools.partial(torch.empty_like(x).copy_, x)}
                size = x.numel() * x.itemsize
                kind = str(dtype).removeprefix("torch.")
                yield f"{name}, {kind}, {samples} × {entries} entries, keep {KEEP}", size, runs


def kernels(x: Tensor, k: int) -> Runs:
    """Both directions, after a look at whether they give what ATen's do."""
    from sparse_compile.kernels import pack as aten
    from sparse_compile.kernels.triton import pack as ours

    samples, entries = x.shape
    mask, values = ours.pack(x, samples, k)
    wanted = aten.pack(x, samples, k)
    if not (torch.equal(mask, wanted[0]) and torch.equal(values, wanted[1])):
        raise AssertionError("pack keeps other entries than ATen's")
    if not torch.equal(ours.unpack(mask, values, entries), aten.unpack(*wanted, entries)):
        raise AssertionError("unpack gives another activation than ATen's")
    return {
        "pack": lambda: ours.pack(x, samples, k),
        "unpack": lambda: ours.unpack(mask, values, entries),
    }
