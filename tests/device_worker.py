# ruff: noqa: E402
"""One of the two processes of ``test_device_distributed.py``, which share a GPU: leaves what it found in
``<folder>/<rank>.pt``. Without a GPU the CPU is taken for one, and kernels are interpreted.

Collectives are gloo's; it frees its models before the process group (``docs/architecture.md``, *A gloo group
is freed last*).
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import from_source

from_source.prepare()  # where the package is not installed

import torch

if "NULL_CUDA" in os.environ:
    from null_cuda import simulate

    _held = simulate.begin()
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch.distributed as dist
from sparse_compile.passes import forward
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparse_compile import (
    Reuse,
    Sample,
    Schedule,
    SparseBackend,
    device_linear,
    planned_linear,
    planner,
    sparse_backend,
)
from sparse_compile.kernels import choice, on_device
from sparse_compile.kernels.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATIENCE = 420.0  # seconds
SAMPLES, TOKENS, WIDTH, ALIVE = 2, 8, 16, 5
STEPS = 4

SCHEDULES = {
    "exact": Schedule.exact(),
    "sample": Schedule(linear=Sample(0.4)),
    "reuse": Schedule(linear=Reuse(0.6)),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.ballast = nn.Parameter(torch.zeros(600, 500))  # more than DDP puts into a bucket

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x))) + self.ballast.mean()
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def take_for_a_gpu() -> None:
    """Rows are left out of layers of any size, by Triton; and if need be on a CPU."""
    forward._WORTH_ASKING = 0  # type: ignore[attr-defined]
    device_linear.WORTH_LOOKING = planned_linear.WORTH_LOOKING = 0
    planner.worth_launching = lambda flops: True
    choice.fastest = lambda key, candidates: list(candidates)[-1]
    for configs in (*tiles.HALF.values(), tiles.SINGLE):
        del configs[:-1]
    if DEVICE == "cpu":
        forward._CPU, forward._GPU = (), ("cpu",)  # type: ignore[attr-defined]
        on_device.usable = on_device.available = lambda _: True


def compiled(how: str, model: Net, backend: SparseBackend) -> nn.Module:
    """The model as people compile it under DDP and under FSDP2."""
    if how == "ddp":
        return torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend)  # type: ignore[return-value]
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in model.layers:
        layer.compile(backend=backend)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def whole(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().cpu().clone()


def train(how: str, schedule: Schedule, rank: int, world: int) -> dict[str, Any]:
    """Some steps; no weight changes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES * world, TOKENS, WIDTH, generator=generator).to(DEVICE)
    labels = torch.randint(5, (SAMPLES * world, TOKENS), generator=generator)
    labels[:, ALIVE:] = -100
    labels = labels.to(DEVICE)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Net().to(DEVICE)
    alone = copy.deepcopy(model)
    alone(x, labels).backward()
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    run = compiled(how, model, backend)
    optimizer = torch.optim.SGD(run.parameters(), lr=0.0)
    mine = slice(SAMPLES * rank, SAMPLES * (rank + 1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        run(x[mine], labels[mine]).backward()
        optimizer.step()
    graphs = [dump.after for dump in backend.graphs]
    return {
        "alone": {name: whole(p.grad) for name, p in alone.named_parameters() if p.grad is not None},
        "gradients": [whole(p.grad) for p in run.parameters() if p.grad is not None],
        "sites": {site.name: (site.method, site.kernel) for site in backend.report().sites},
        "planned": sum(graph.count("linear_backward.planned(") for graph in graphs),
        "called": sum(graph.count("linear_backward.default(") for graph in graphs),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=stack)
    take_for_a_gpu()
    dist.init_process_group("gloo")
    found = {
        f"{how}, {name}": train(how, schedule, rank, dist.get_world_size())
        for how in ("ddp", "fsdp")
        for name, schedule in SCHEDULES.items()
    }
    torch.save(found, folder / f"{rank}.pt")
    torch._dynamo.reset()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
