"""Inductor's on-disk cache between processes: an unchanged schedule hits it, a changed one does not.

A wrong key would be silent: the other schedule's graph would run, or this one's with no sites. Each process
compiles a model of one layer and runs three backwards whose output gradients are given.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from reference import Recipe, gradients
from torch import nn

import sparse_compile
from sparse_compile import Reuse, Schedule

SCRIPT = """
import json, sys, torch
from torch import nn
from sparse_compile import Schedule, passes, sparse_backend

class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.add_module(name, nn.Linear(7, 5, bias=False))
    def forward(self, x):
        (layer,) = self.children()
        return layer(x)

def run(schedule, name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rewrites.clear()
    backend = sparse_backend(Schedule.from_dict(schedule))
    model = Net(name)
    compiled = torch.compile(model, backend=backend)
    grads = []
    for step in range(3):
        x, dy = (torch.randn(4, 6, n, generator=torch.Generator().manual_seed(step)) for n in (7, 5))
        model.zero_grad()
        compiled(x).backward(dy)
        grads.append(getattr(model, name).weight.grad.tolist())
    counters = torch._dynamo.utils.counters
    return {
        "hits": counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "rewrites": len(rewrites),
        "gradients": grads,
        "report": backend.report().to_dict(),
    }

rewrites = []
rewrite = passes.rewrite
passes.rewrite = lambda *args, **options: rewrites.append(args) or rewrite(*args, **options)
print(json.dumps([run(*each) for each in json.loads(sys.argv[1])]))
"""

HALF, MOST = Schedule(linear=Reuse(0.5)), Schedule(linear=Reuse(0.9))


def in_a_new_process(folder, *runs):
    """What SCRIPT says of each run, a schedule and the name of the layer."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    argument = json.dumps([(schedule.to_dict(), name) for schedule, name in runs])
    command = [sys.executable, "-c", SCRIPT, argument]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_gradients(result, ratio):
    torch.manual_seed(0)
    weight = nn.Linear(7, 5, bias=False).weight.detach()
    base = None
    for step in range(3):
        x, dy = (torch.randn(4, 6, n, generator=torch.Generator().manual_seed(step)) for n in (7, 5))
        expected = gradients(dy.flatten(0, 1), x.flatten(0, 1), weight, base, Recipe(ratio))[1]
        torch.testing.assert_close(torch.tensor(result["gradients"][step]), expected, rtol=1e-5, atol=1e-5)
        base = dy.mean(0)


def check_report(result, ratio, name):
    (site,) = result["report"]["sites"]
    assert (site["name"], site["rewritten"], site["method"]) == (name, True, "reuse")
    assert site["keep"] == pytest.approx(1 - ratio)
    assert site["shape"] == [24, 7, 5]
    kept = round((1 - ratio) * 24)
    assert site["rows_computed"] == 24 + 2 * (kept + 6)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of three processes, one after the other, that share a cache."""
    folder = tmp_path_factory.mktemp("inductor")
    first = in_a_new_process(folder, (HALF, "dense"))
    again = in_a_new_process(folder, (HALF, "dense"))
    others = in_a_new_process(folder, (MOST, "dense"), (HALF, "output"))
    return first + again + others


@pytest.mark.parametrize("which", [0, 2, 3], ids=["cold cache", "other schedule", "other name"])
def test_what_the_cache_does_not_hold_is_compiled(processes, which):
    result = processes[which]
    assert (result["hits"], result["misses"], result["rewrites"]) == (0, 1, 1)


def test_unchanged_schedule_in_a_new_process_hits_and_runs_no_pass(processes):
    result = processes[1]
    assert result["hits"] > 0
    assert (result["misses"], result["rewrites"]) == (0, 0)


CASES = {"cold": (0, 0.5, "dense"), "warm": (1, 0.5, "dense"), "schedule": (2, 0.9, "dense")}
CASES["name"] = (3, 0.5, "output")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_process_own_schedule(processes, case):
    which, ratio, _ = CASES[case]
    check_gradients(processes[which], ratio)


@pytest.mark.parametrize("case", CASES)
def test_report_is_complete(processes, case):
    which, ratio, name = CASES[case]
    check_report(processes[which], ratio, name)


def test_warm_gradients_equal_the_cold_ones_exactly(processes):
    assert processes[1]["gradients"] == processes[0]["gradients"]


def test_by_name():
    """The entry point: a string is all that some configurations can hold."""
    assert "sparse_compile" in torch.compiler.list_backends(exclude_tags=())
    model = nn.Sequential(nn.Linear(6, 5))
    compiled = torch.compile(model, backend="sparse_compile", options={"epilogue_fusion": False})
    x, dy = torch.randn(4, 6), torch.randn(4, 5)
    dy[1:3] = 0
    compiled(x).backward(dy)
    torch.testing.assert_close(model[0].weight.grad, dy.t() @ x)
    torch.testing.assert_close(model[0].bias.grad, dy.sum(0))
    report = sparse_compile.default_backend.report()
    assert report.schedule == Schedule.exact()
    assert "0" in [site.name for site in report.sites if site.rewritten]
