"""Interleaved timing, and how much of the skipped work came back as time.

One round is one step of every variant, on the same batch, in an order that rotates and turns round; whatever
slows the machine down slows all of them, and every ratio is taken within its round. A second dense copy runs
along: the speed-up measured for *it* is the noise.

**Realised / ideal.** For each round,

    realised   time(dense step) − time(variant's step)
    ideal      Σ over sites of t(site) · FLOPs skipped / backward FLOPs dense

t(site) is the time of that site's own dense backward, timed in the same round with the same threads: of a
linear the products dX = dY·W and dW = dYᵀ·X at full size (those of the two that the site has), of an
attention PyTorch's fused backward, or the products and softmax that a chain consists of. So the ideal is the
time that the skipped FLOPs would have cost at the rate of the very products they belong to, with no cost for
choosing, gathering or scattering rows; work a method adds (the products of a reused base) is in its executed
FLOPs and is not skipped. FLOPs that a linear's forward skipped, since nothing needs its rows, count like
those of its backward. 1.0 means that skipping cost nothing. A chain's masks and dropout are not in t(site),
and are not done for skipped rows either: there it can come out above 1.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from variants import PHASES, Trainee

T = TypeVar("T")
Site = Mapping[str, Any]
Shape = tuple[int, ...]  # (N, I, O) of a linear; (B, H, T, D, products) of an attention
Spread = dict[str, float]

# Below this share of the dense step, the time to be saved drowns in noise: realised / ideal means nothing.
SMALLEST_IDEAL = 0.01


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if not values:
        raise ValueError("spread of no values")
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Median and quartiles of the ratio within each round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The order of round `turn`: everyone takes every place, and has each neighbour on either side."""
    start = turn % len(items)
    order = [*items[start:], *items[:start]]
    return order[::-1] if turn // len(items) % 2 else order


def shapes_of(sites: Sequence[Site]) -> set[Shape]:
    """Of the linears and attentions whose shape is known, what :class:`DenseTimer` times."""
    return {shape for site in sites if (shape := shape_of(site))}


def shape_of(site: Site) -> Shape | None:
    """The sizes of a site's dense backward. Of an attention they end in the number of its products, 5 of the
    fused op, which makes the scores again, and 4 of a chain."""
    if site["kind"] == "linear" and site["shape"]:
        return tuple(site["shape"])
    if site["kind"] != "attention" or len(site["shape"]) != 4 or not site["flops_forward_dense"]:
        return None
    return *site["shape"], round(2 * site["flops_backward_dense"] / site["flops_forward_dense"])


def flops_of(shape: Shape) -> int:
    """FLOPs of what :class:`DenseTimer` times."""
    if len(shape) == 3:
        return 4 * shape[0] * shape[1] * shape[2]
    samples, heads, tokens, features, products = shape
    return products * 2 * samples * heads * tokens * tokens * features


def last_step(before: Sequence[Site], now: Sequence[Site], steps: int) -> list[Site]:
    """What the last of `steps` steps did, from the reports before and after it.

    A report's FLOPs are averages over all steps so far, the dense first step of a reuse included.
    """
    earlier = {site["name"]: site for site in before}
    return [
        {
            **site,
            **{
                key: steps * site[key] - (steps - 1) * earlier[site["name"]][key]
                for key in site
                if key.startswith("flops")
            },
        }
        for site in now
    ]


def ideal_saving(sites: Sequence[Site], seconds: Mapping[Shape, float]) -> float:
    """Seconds that the skipped FLOPs would have cost (see the top of this file).

    `seconds[shape]` is the time of a whole dense backward; a linear with one of its products (a frozen
    weight, a first layer) or with several (a layer used twice) is charged in proportion.
    """
    total = 0.0
    for site in sites:
        shape = shape_of(site)
        if shape is not None and site["rewritten"]:
            total += seconds[shape] * (site["flops_dense"] - site["flops"]) / flops_of(shape)
    return total


class DenseTimer:
    """Times the dense backward of a linear or an attention, for each shape that occurs."""

    def __init__(self) -> None:
        self._runs: dict[Shape, Callable[[], object]] = {}

    def add(self, shapes: set[Shape]) -> None:
        """Make operands for shapes not seen before, and run each once: the first timing is a warm one."""
        for shape in sorted(shapes - self._runs.keys()):
            self._runs[shape] = _dense_linear(*shape) if len(shape) == 3 else _dense_attention(*shape)
            self._seconds(shape)

    def round(self, shapes: set[Shape]) -> dict[Shape, float]:
        """Seconds of the backward of each of these shapes, once."""
        self.add(shapes)
        return {shape: self._seconds(shape) for shape in sorted(shapes)}

    def _seconds(self, shape: Shape) -> float:
        start = time.perf_counter()
        self._runs[shape]()
        return time.perf_counter() - start


def _dense_linear(n: int, i: int, o: int) -> Callable[[], object]:
    dy, x, w = torch.randn(n, o), torch.randn(n, i), torch.randn(o, i)
    return lambda: (torch.mm(dy, w), torch.mm(dy.t(), x))


def _dense_attention(
    samples: int, heads: int, tokens: int, features: int, products: int
) -> Callable[[], object]:
    q, k, v, do = (torch.randn(samples, tokens, heads, features).transpose(1, 2) for _ in range(4))
    if products == 5:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = flash(q, k, v)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return lambda: backward(do, q, k, v, out, logsumexp, 0.0, False)
    a = torch.softmax(q @ k.mT, -1)

    def chain() -> object:
        ds = torch.ops.aten._softmax_backward_data(do @ v.mT, a, -1, a.dtype)
        return a.mT @ do, ds @ k, ds.mT @ q

    return chain


@dataclass(kw_only=True)
class Measurements:
    """What the rounds gave: one entry per round in every list."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sites: dict[str, list[Sequence[Site]]] = field(default_factory=dict)
    dense: list[dict[Shape, float]] = field(default_factory=list)  # of the sites' dense backwards
    losses: dict[str, float] = field(default_factory=dict)
    graphs_compiled: int = 0

    def summary(self, name: str, dense: str = "dense") -> dict[str, Any]:
        """Medians, quartiles, speed-ups and figure of merit of one variant."""
        mine, base = self.seconds[name], self.seconds[dense]
        return {
            "seconds": {phase: spread(mine[phase]) for phase in PHASES},
            "speedup": {phase: paired_ratios(base[phase], mine[phase]) for phase in PHASES},
            "loss": self.losses[name],
            **self._merit(name, dense),
        }

    def matmul_gflops(self) -> float | None:
        """Dense rate of the linear sites' backward products: FLOPs of each shape once, over their time."""
        rates = []
        for times in self.dense:
            if linears := [shape for shape in times if len(shape) == 3]:
                rates.append(sum(map(flops_of, linears)) / 1e9 / sum(times[shape] for shape in linears))
        return statistics.median(rates) if rates else None

    def _merit(self, name: str, dense: str) -> dict[str, Any]:
        reports = self.sites[name]
        if not reports[0]:
            return {"merit": None}
        names = ("flops_backward_dense", "flops_backward", "flops_forward_dense", "flops_forward")
        sums = {key: sum(site[key] for sites in reports for site in sites) / len(reports) for key in names}
        merit: dict[str, Any] = {
            "sites": len(reports[-1]),
            "rewritten": sum(bool(site["rewritten"]) for site in reports[-1]),
            "backward_flops_dense": sums["flops_backward_dense"],
            "backward_flops_executed": sums["flops_backward"],
            "forward_flops_dense": sums["flops_forward_dense"],
            "forward_flops_executed": sums["flops_forward"],
        }
        base = self.seconds[dense]["step"]
        saved = [a - b for a, b in zip(base, self.seconds[name]["step"], strict=True)]
        ideal = [ideal_saving(sites, times) for sites, times in zip(reports, self.dense, strict=True)]
        merit |= {"saved_seconds": spread(saved), "ideal_seconds": spread(ideal)}
        if statistics.median(ideal) < SMALLEST_IDEAL * statistics.median(base):
            merit |= {"realised": None, "why_not": "there was next to nothing to skip"}
        else:
            merit["realised"] = paired_ratios(saved, ideal)
        return {"merit": merit}


def interleave(
    trainees: Sequence[Trainee],
    batches: Sequence[dict[str, Tensor]],
    *,
    rounds: int,
    warmup: int,
    tick: Callable[[str], None],
) -> Measurements:
    """Warm every trainee up, then time `rounds` rounds; `tick` is told the name of each step as it ends."""
    for trainee in trainees:
        for turn in range(warmup):
            _timed_step(trainee, batches[turn % len(batches)], turn)
            tick(f"{trainee.variant.name}: warming up")
    dense = DenseTimer()
    reports: dict[str, list[Site]] = {}
    for trainee in trainees:
        reports[trainee.variant.name] = [*trainee.sites()]
        dense.add(shapes_of(reports[trainee.variant.name]))
    result = Measurements(
        seconds={t.variant.name: {phase: [] for phase in PHASES} for t in trainees},
        sites={t.variant.name: [] for t in trainees},
    )
    compiled_before = _graphs_compiled()
    gc.collect()
    gc.freeze()  # what the compilers left is not searched again in every round
    gc.disable()
    try:
        for turn in range(rounds):
            batch = batches[(warmup + turn) % len(batches)]
            for trainee in rotated(trainees, turn):
                name = trainee.variant.name
                for phase, seconds in _timed_step(trainee, batch, warmup + turn).items():
                    result.seconds[name][phase].append(seconds)
                before, reports[name] = reports[name], [*trainee.sites()]
                result.sites[name].append(last_step(before, reports[name], warmup + turn + 1))
                tick(name)
            result.dense.append(
                dense.round({shape for sites in reports.values() for shape in shapes_of(sites)})
            )
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    result.losses = {t.variant.name: t.loss for t in trainees}
    result.graphs_compiled = _graphs_compiled() - compiled_before
    return result


def _timed_step(trainee: Trainee, batch: dict[str, Tensor], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)  # the same dropout for all variants that draw alike
    return trainee.step(batch)


def _graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
