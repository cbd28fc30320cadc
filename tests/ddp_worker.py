"""One of two DDP processes of ``test_ddp.py``: run by torchrun, prints what it found as JSON from rank 0."""

import copy
import json

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_compile import Reuse, Schedule, sparse_backend

VOCABULARY, STEPS = 64, 4


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
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
    model = transformers.BertForMaskedLM(config)
    single = copy.deepcopy(model)
    ids = torch.randint(VOCABULARY, (2 * world, 10), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * rank : 2 * rank + 2]

    schedule = Schedule(linear=Reuse([(0.0, 0.0), (0.5, 0.5)]), total_steps=STEPS)
    backend = sparse_backend(schedule, compiler="aot_eager", debug=True)
    compiled = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(input_ids=mine, labels=mine).loss.backward()
    single(input_ids=ids, labels=ids).loss.backward()
    error = max(
        float((ours.grad - theirs.grad).abs().max())
        for ours, theirs in zip(model.parameters(), single.parameters(), strict=True)
    )
    steps = []
    for _ in range(STEPS):
        optimizer.step()
        optimizer.zero_grad()
        steps.append(backend.step)
        compiled(input_ids=mine, labels=mine).loss.backward()

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everyones = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everyones, weights)
    if rank == 0:
        report = backend.report().to_dict()
        found = {
            "error": error,
            "equal": all(torch.equal(weights, other) for other in everyones),
            "steps": steps,
            "graphs": len(backend.graphs),
            "linears": [name for name, module in single.named_modules() if isinstance(module, nn.Linear)],
            "sites": [site["name"] for site in report["sites"] if site["kind"] == "linear"],
            "methods": sorted({site["method"] for site in report["sites"] if site["rewritten"]}),
        }
        print("FOUND " + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
