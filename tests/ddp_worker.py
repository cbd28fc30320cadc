"""One of the DDP processes of ``test_ddp.py``: leaves what it found in ``<folder>/<rank>.pt``.

If it has not ended in time it writes where it stands to ``<folder>/<rank>.stack``, and ends.

It shares nothing through collectives of its own, and frees its models before the process group. Otherwise it
may never end: ``docs/architecture.md``, *A gloo group is freed last*.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_compile import Reuse, Sample, Schedule, SparseBackend, sparse_backend
from sparse_compile.methods import sample

PATIENCE = 420.0  # seconds; it takes 10 on an idle machine
VOCABULARY, SAMPLES, TOKENS, STEPS = 64, 2, 10, 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,  # 2 MB of gradients a layer: several buckets, so several graphs
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def train(model: nn.Module, backend: SparseBackend, ids: Tensor, steps: int) -> list[dict[str, Any]]:
    """Gradients before, and weights, clock and methods after each of some DDP steps."""
    torch._dynamo.reset()
    compiled = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = []
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(input_ids=ids, labels=ids).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        sites = backend.report().to_dict()["sites"]
        taken.append(
            {
                "gradients": gradients,
                "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
                "step": backend.step,
                "methods": {site["name"]: site["method"] for site in sites if site["rewritten"]},
            }
        )
    return taken


def single_process_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def reuse(rank: int, world: int) -> dict[str, Any]:
    """Exact for half of the steps, then reuse; every rank has samples of its own."""
    model = make_model()
    everyones = torch.randint(
        VOCABULARY, (SAMPLES * world, TOKENS), generator=torch.Generator().manual_seed(1)
    )
    alone = single_process_gradients(copy.deepcopy(model), everyones)
    half = [(0.0, 0.0), (0.5, 0.5)]
    schedule = Schedule(linear=Reuse(half), attention=Reuse(half), total_steps=STEPS)
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    steps = train(model, backend, everyones[SAMPLES * rank : SAMPLES * (rank + 1)], STEPS)
    report = backend.report().to_dict()
    return {
        "steps": steps,
        "alone": alone,
        "graphs": len(backend.graphs),
        "linears": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "sites": [(site["name"], site["kind"]) for site in report["sites"]],
        "bases": {
            name: state["bases"]["0/0"][0]
            for name, state in backend.state_dict()["sites"].items()
            if state.get("bases")
        },
    }


def rows_drawn() -> list[Tensor]:
    """What one step of sampling draws, in order. Model, samples and seed are the same on every rank."""
    drawn: list[Tensor] = []
    systematic = sample.systematic

    def record(*args: Any) -> Tensor:
        drawn.append(systematic(*args))
        return drawn[-1]

    ids = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    sample.systematic = record
    try:
        model = make_model()
        train(model, sparse_backend(Schedule(linear=Sample(0.3)), compiler="aot_eager"), ids, 1)
    finally:
        sample.systematic = systematic
    return drawn


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=stack)
        found = {"reuse": reuse(rank, world), "drawn": rows_drawn(), "drawn again": rows_drawn()}
        torch.save(found, folder / f"{rank}.pt")
        torch._dynamo.reset()
        gc.collect()
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
