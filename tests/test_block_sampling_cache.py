"""Samples dropped between blocks, through Inductor and its cache on disk: a process that finds the graph
there trains alike."""

import json
import math
import os
import subprocess
import sys

SCRIPT = """
import json, sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._inductor.compile_fx
sys.path.insert(0, sys.argv[1])
import torch, zoo
torch.set_num_threads(1)  # sums in one order, so that both processes come to the same bits
from sparse_compile import Schedule, passes, sparse_backend

rewrites = []
rewrite = passes.rewrite
passes.rewrite = lambda *args, **options: rewrites.append(args) or rewrite(*args, **options)
model, inputs = zoo.make("bert")
torch.manual_seed(0)
options = {"act_tau": 0.5, "weight_tau": 0.5, "s_step": 0.2, "ratio_step": 0.7}
backend = sparse_backend(Schedule.vcas(cal_var_freq=2, **options))
compiled = torch.compile(model, backend=backend)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(8):
    optimizer.zero_grad()
    loss = compiled(**inputs).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
counters = torch._dynamo.utils.counters
print(json.dumps({
    "losses": losses,
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    "rewrites": len(rewrites),
    "history": backend.state_dict()["controller"]["history"],
    "blocks": {s.name: s.keep for s in backend.report().sites if s.kind == "block"},
}))
"""


def bert_in_a_new_process(folder):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_bert_trains_by_vcas_through_inductor_and_a_second_process_finds_it_in_the_cache(tmp_path):
    cold, warm = (bert_in_a_new_process(tmp_path) for _ in range(2))
    assert (cold["hits"], cold["misses"], cold["bypasses"], cold["rewrites"]) == (0, 1, 0, 1)
    assert (warm["hits"], warm["misses"], warm["bypasses"], warm["rewrites"]) == (1, 0, 0, 0)
    for key in ("losses", "history", "blocks"):
        assert warm[key] == cold[key]
    assert all(math.isfinite(loss) for loss in cold["losses"])
    assert cold["losses"][-1] < cold["losses"][0]
    assert [entry["step"] for entry in cold["history"]] == [0, 2, 4, 6]
    assert list(cold["blocks"]) == ["bert.encoder.layer.1", "bert.encoder.layer.0"]
    assert cold["blocks"]["bert.encoder.layer.0"] < 1
