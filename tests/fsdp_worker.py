"""One of the FSDP2 processes of ``test_fsdp.py``: leaves what it found in ``<folder>/<rank>.pt``.

If it has not ended in time it writes where it stands to ``<folder>/<rank>.stack``, and ends.

It shares nothing through collectives of its own, only FSDP's run, and it frees its models before the process
group. Otherwise it may never end: ``docs/architecture.md``, *A gloo group is freed last*.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparse_compile import Reuse, RotatedTopK, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods import sample

PATIENCE = 1200.0  # seconds; it takes 45 beside other work, and many more where it gets no processor
VOCABULARY, SAMPLES, TOKENS = 64, 2, 10

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def batch(step: int, rank: int | None = None) -> Tensor:
    """What everyone trains on in a step, or one rank's half of it."""
    size = (SAMPLES * 2, TOKENS)
    everyones = torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(step))
    return everyones if rank is None else everyones[SAMPLES * rank : SAMPLES * (rank + 1)]


def shard(
    model: nn.Module, how: str, backend: SparseBackend | None, policy: MixedPrecisionPolicy
) -> nn.Module:
    """Compile and shard a model, in one of the ways in which people do, and return what is to be run."""
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if how == "checkpointed":
            layers[i] = layer = checkpoint_wrapper(layer)
        if how in ("in place", "checkpointed"):
            layer.compile(backend=backend, fullgraph=True)
        elif how == "replaced":
            layers[i] = torch.compile(layer, backend=backend)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return torch.compile(model, backend=backend) if how == "whole" else model


def step_of(run: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    run(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def shards(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().to_local().clone() for parameter in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.to_local().clone() for parameter in model.parameters()]


def alone(steps: int) -> dict[str, list[Tensor]]:
    """The joint batches, in one process: the gradients of the first step, and the weights after the last."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first: list[Tensor] = []
    for step in range(steps):
        step_of(model, batch(step), optimizer)
        first = first or [parameter.grad.clone() for parameter in model.parameters()]
    return {"gradients": first, "weights": [parameter.detach() for parameter in model.parameters()]}


def exact(
    rank: int,
    how: str,
    steps: int,
    dtype: torch.dtype = torch.float64,
    policy: MixedPrecisionPolicy | None = None,
) -> dict[str, Any]:
    """The same by two processes, and what the backend saw. ``how`` "eager" is FSDP2 without this project."""
    torch._dynamo.reset()
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager", debug=True)
    model = make_model(dtype)
    run = shard(model, how, backend, policy or MixedPrecisionPolicy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first: list[Tensor] = []
    for step in range(steps):
        step_of(run, batch(step, rank), optimizer)
        first = first or gradients(model)
    return {
        "gradients": first,
        "weights": shards(model),
        "step": backend.step,
        "sites": [
            {key: site[key] for key in ("name", "kind", "rewritten", "rows")}
            for site in backend.report().to_dict()["sites"]
        ],
        "graphs": [graph.after for graph in backend.graphs],
    }


def scheduled(rank: int, schedule: Schedule, steps: int, interrupt_at: int | None = None) -> dict[str, Any]:
    """Training under a schedule; interrupted, with all of it made anew from what was saved."""
    model, run, backend, optimizer = _begin(schedule)
    taken = []
    for step in range(steps):
        if step == interrupt_at:
            weights, saved = model.state_dict(), io.BytesIO()
            torch.save(backend.state_dict(), saved)
            model, run, backend, optimizer = _begin(schedule)
            model.load_state_dict(weights)
            saved.seek(0)
            backend.load_state_dict(torch.load(saved, weights_only=True))
        step_of(run, batch(step, rank), optimizer)
        sites = backend.report().to_dict()["sites"]
        taken.append({"step": backend.step, "methods": {s["name"]: s["method"] for s in sites if s["rows"]}})
    bases = {
        name: state["bases"]["0/0"][0]
        for name, state in backend.state_dict()["sites"].items()
        if state.get("bases")
    }
    return {"steps": taken, "weights": shards(model), "bases": bases}


def _begin(schedule: Schedule) -> tuple[nn.Module, nn.Module, SparseBackend, torch.optim.Optimizer]:
    torch._dynamo.reset()
    model = make_model()
    backend = sparse_backend(schedule, compiler="aot_eager")
    run = shard(model, "in place", backend, MixedPrecisionPolicy())
    return model, run, backend, torch.optim.SGD(model.parameters(), lr=0.1)


def rows_drawn() -> list[Tensor]:
    """What one step of sampling draws, in order. Model, samples and seed are the same on every rank."""
    drawn: list[Tensor] = []
    systematic = sample.systematic

    def record(*args: Any) -> Tensor:
        drawn.append(systematic(*args))
        return drawn[-1]

    sample.systematic = record
    try:
        _, run, _, optimizer = _begin(Schedule(linear=Sample(0.3)))
        step_of(run, batch(0, rank=0), optimizer)
    finally:
        sample.systematic = systematic
    return drawn


class MLP(nn.Module):
    """Of a class of its own: Dynamo compiles no forward of torch.nn's, and FSDP's hooks leave nothing else of
    an nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def clocks() -> list[tuple[int, int]]:
    """The steps of two backends after each optimizer's step: two models, two micro-batches a step."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = [MLP() for _ in range(2)]
    backends = [sparse_backend(Schedule.exact(), compiler="aot_eager") for _ in range(2)]
    for model, backend in zip(models, backends, strict=True):
        model.compile(backend=backend)
        fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    counted = []
    for _ in range(2):
        for last in (False, True):
            for model in models:
                model.set_requires_gradient_sync(last)
                model(torch.ones(4, 8)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            counted.append((backends[0].step, backends[1].step))
    return counted


def refusal(schedule: Schedule) -> str:
    """What a schedule that does not fit is refused with."""
    try:
        _, run, _, _ = _begin(schedule)
        run(input_ids=batch(0))
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=4)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=stack)
        found = {
            "alone": alone(3),
            **{how: exact(rank, how, 3) for how in ("in place", "replaced", "checkpointed", "whole")},
            "bfloat16": exact(rank, "in place", 1, torch.float32, BFLOAT16),
            "bfloat16 eager": exact(rank, "eager", 1, torch.float32, BFLOAT16),
            "reuse": scheduled(rank, half, 4),
            "reuse resumed": scheduled(rank, half, 4, interrupt_at=3),
            "sample": scheduled(rank, Schedule(linear=Sample(0.3)), 2),
            "sample resumed": scheduled(rank, Schedule(linear=Sample(0.3)), 2, interrupt_at=1),
            "drawn": rows_drawn(),
            "clocks": clocks(),
            "refused": refusal(Schedule(weight_gradients=RotatedTopK(0.1))),
        }
        torch.save(found, folder / f"{rank}.pt")
        torch._dynamo.reset()
        gc.collect()
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
