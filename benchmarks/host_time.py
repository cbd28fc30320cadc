"""What a training step costs the host, without a GPU: on a CUDA that launches nothing (``null_cuda/``).

    python benchmarks/host_time.py --layers 12

A GPU is idle while the host has not launched anything yet: where a step takes the host longer than the GPU,
to compute less saves nothing. Steps under each schedule alternate with those of plain ``torch.compile``, with
CUDA graphs and without. What would be faster on a GPU cannot be timed here, so Triton's kernels are taken
wherever there is a choice. Of a GPU this says nothing at all.

Needs a PyTorch that was built for CUDA 13, a g++, and the headers of CUDA's toolkit.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import from_source

from_source.prepare()

import torch  # noqa: E402

ROOT = from_source.ROOT
COUNTED = ("launches", "waits", "replays", "recorded", "allocations")  # by null_cuda/runtime.cpp
WARM_UP = 40  # steps, in which plans come up and are recorded
Row = dict[str, Any]


def schedules() -> dict[str, Any]:
    from sparse_compile import Reuse, Sample, Schedule

    return {
        "exact": Schedule.exact(skip_unneeded="loss"),
        "sample in linears": Schedule(linear=Sample(0.25)),
        "reuse in linears": Schedule(linear=Reuse(0.75)),
        "sample in attention": Schedule(attention=Sample(0.25)),
        "sample blocks": Schedule(blocks=Sample(0.25)),
    }


def counts() -> list[int]:
    library = ctypes.CDLL("libcudart.so.13")
    return [library.null_cuda_count(i) for i in range(len(COUNTED))]


class Step:
    """One training step of a model, whose parts are timed."""

    def __init__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], backend: Any, mode: str | None
    ) -> None:
        import copy

        self._model = copy.deepcopy(model)
        self._run = torch.compile(self._model, backend=backend, mode=mode)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True)
        self._batch = batch
        self.milliseconds: list[tuple[float, float]] = []
        self.counted: list[list[int]] = []

    def __call__(self) -> None:
        before, start = counts(), time.perf_counter()
        loss = self._run(**self._batch).loss
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        self.counted.append([after - n for after, n in zip(counts(), before, strict=True)])
        self.milliseconds.append((1000 * (middle - start), 1000 * (end - middle)))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def row(self, what: str, mode: str | None, rounds: int) -> Row:
        forward, backward = (
            statistics.median(each) for each in zip(*self.milliseconds[-rounds:], strict=True)
        )
        counted = zip(COUNTED, zip(*self.counted[-rounds:], strict=True), strict=True)
        each = {name: statistics.median(values) for name, values in counted}
        return {
            "what": what,
            "mode": mode or "default",
            "forward_ms": forward,
            "backward_ms": backward,
            **each,
        }


def measure(options: argparse.Namespace) -> list[Row]:
    """In a process whose CUDA launches nothing."""
    from presets import PRESETS

    from sparse_compile import planner, sparse_backend
    from sparse_compile.kernels import choice

    planner.worth_launching = lambda flops: True
    choice.fastest = lambda key, candidates: list(candidates)[-1]
    torch.backends.cuda.enable_cudnn_sdp(False)  # there is no null cuDNN
    preset = PRESETS["bert-base" if options.model == "bert" else "llama-small"]
    heads = 16 if options.model == "bert" else 4
    sizes = {
        "batch": 8,
        "tokens": 512,
        "layers": options.layers,
        "hidden": 1024,
        "heads": 16,
        "kv_heads": heads,
    }
    preset = dataclasses.replace(preset, **sizes, intermediate=4096, vocab=2000)
    batch = {**preset.batches(preset, 1, 0)[0]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, preset.tokens // 2 :] = 0
    batch["labels"][:, preset.tokens // 2 :] = -100
    there = {name: tensor.cuda() for name, tensor in batch.items()}
    model = preset.model().cuda().bfloat16()
    held = _rows_of_half_the_batch()
    wanted = {name: each for name, each in schedules().items() if name in (options.only or schedules())}
    rows = []
    for mode in (None, "reduce-overhead"):
        steps: dict[str, Step] = {"torch.compile": Step(model, there, "inductor", mode)}
        steps |= {name: Step(model, there, sparse_backend(each), mode) for name, each in wanted.items()}
        _alternate([*steps.values()], WARM_UP + options.rounds)
        rows += [step.row(name, mode, options.rounds) for name, step in steps.items()]
        torch._dynamo.reset()
    del held
    return rows


def _rows_of_half_the_batch() -> Any:
    """Until it is gone, half of the rows are needed wherever rows are carried: nothing is counted here."""
    ours = torch.library.Library("sparse_compile", "IMPL")

    def rows(needed: torch.Tensor) -> torch.Tensor:
        needed.any().item()  # it would be waited for
        return torch.arange(len(needed) // 2, device=needed.device)

    ours.impl("needed_rows", rows, "CUDA")
    return ours


def _alternate(steps: list[Callable[[], None]], rounds: int) -> None:
    from tqdm import tqdm

    for turn in tqdm(range(rounds), desc="steps", file=sys.stderr):
        for step in steps if turn % 2 else reversed(steps):
            step()


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("a step of", "mode", "forward, ms", "backward, ms", *COUNTED[:3])
    for row in rows:
        times = (f"{row['forward_ms']:.2f}", f"{row['backward_ms']:.2f}")
        table.add_row(row["what"], row["mode"], *times, *(f"{row[name]:g}" for name in COUNTED[:3]))
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("bert", "llama"), default="bert")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", action="append", choices=schedules(), help="of the schedules, this one")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "host_time.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.here:
        if torch.version.cuda is None:
            parser.error("this PyTorch was not built for CUDA; the default wheel of PyPI is")
        from null_cuda import build

        given = sys.argv[1:] if arguments is None else arguments
        with tempfile.TemporaryDirectory() as folder:
            build.build(Path(folder))
            command = [sys.executable, __file__, "--here", *given]
            return subprocess.run(command, env=build.environment(Path(folder))).returncode
    import results

    warnings.filterwarnings("ignore")
    rows = measure(options)
    print_table(rows)
    sizes = {"model": options.model, "layers": options.layers, "rounds": options.rounds}
    results.write_json(options.json, {**results.context(), **sizes, "rows": rows})
    print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
