"""A graph with packed activations out of Inductor's on-disk cache: same gradients, and a complete report."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, torch
from pruned import Block, HIDDEN
from sparse_compile import Schedule, passes, sparse_backend

rewrites = []
rewrite = passes.rewrite
passes.rewrite = lambda *args, **options: rewrites.append(args) or rewrite(*args, **options)
torch.manual_seed(0)
model = Block("fused", dropout=0.1)
backend = sparse_backend(Schedule.back_razor(0.75))
x = torch.randn(4, 8, HIDDEN)
torch.compile(model, backend=backend)(x).square().sum().backward()
print(json.dumps({
    "rewrites": len(rewrites),
    "gradients": [p.grad.tolist() for p in model.parameters()],
    "saved": backend.report().to_dict()["saved"],
}))
"""


def test_second_process_runs_no_pass_and_does_the_same(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.path.dirname(__file__),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    results = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert [result["rewrites"] for result in results] == [1, 0]
    assert results[0]["gradients"] == results[1]["gradients"]
    assert results[0]["saved"] == results[1]["saved"]
    assert {kind["kind"] for kind in results[1]["saved"]} >= {"mask", "linear input", "norm input"}
