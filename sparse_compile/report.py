"""What a backend did: every linear and attention it saw, what became of it, and what that saved."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from sparse_compile import naming
from sparse_compile.measurements import Measurements
from sparse_compile.schedule import Schedule
from sparse_compile.site import Site
from sparse_compile.sites import SAVED_KINDS, SavedRecord, SiteRecord

if TYPE_CHECKING:
    from sparse_compile.runtime import Runtime


LEGEND = """
keep: share of the rows (or entries) of the output gradient that the method computes. unneeded: rows of the
forward that no output depends on, and that were left out. zero: rows of the output gradient that were zero
(also since a sample or a row was dropped before), and left out. FLOPs: of matrix products, in the mean of all
steps so far, those that measure too.
""".strip()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """One layer. FLOPs are per forward (and its backward), averaged over all backwards so far; before the
    first one they are what the traced graph would cost densely.

    Attributes:
        name: module path; of a second model under the same backend, followed by ``@1``, and so on.
        kind: ``"linear"``, ``"attention"`` or ``"matmul"``.
        shape: at its last backward; (N, I, O) of a linear; (B, H, T, D) of an attention, its samples, heads,
            queries and features of a head.
        method: the method at its last backward: ``"dense"``, ``"exact"``, ``"reuse"``, ``"sample"``.
        keep: the share of dY's rows (or, with element and N:M reuse, entries) that the method computes now.
        rewritten: whether an op of ours does its backward.
        reason: why not, or why it gets another method than the schedule's.
        calls: how often it is used in one forward.
        kernel: on a GPU, what its last products ran on: ``"aten"``, ``"triton"``, or ``"triton+aten"`` (dX by
            one, dW by the other), whichever was faster.
        density: the share of the weight's entries that a step updates; below 1 if the gradient is rotated.
        rows: rows of dY in all backwards so far; of an attention, queries of a sample.
        rows_skipped: how many of those were zero and skipped exactly.
        rows_computed: how many took part in the products, with rows of the base and rows that fill up.
        rows_unneeded: how many rows of the output were not computed in the forward, since nothing needs them.
        carried: whether those rows are left out between this linear and its neighbours, too: in norms,
            activation functions, dropout and residual sums, forward and backward.
        flops_forward_dense, flops_forward: forward if dense; forward as run.
        flops_backward_dense, flops_backward: backward if dense; backward as run.
        flops_dense, flops: forward and backward, dense and as run.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    method: str
    keep: float
    rewritten: bool
    reason: str
    calls: int
    kernel: str = ""
    density: float = 1.0
    rows: int = 0
    rows_skipped: int = 0
    rows_computed: int = 0
    rows_unneeded: int = 0
    carried: bool = False
    flops_forward_dense: float = 0.0
    flops_forward: float = 0.0
    flops_backward_dense: float = 0.0
    flops_backward: float = 0.0

    @property
    def flops_dense(self) -> float:
        return self.flops_forward_dense + self.flops_backward_dense

    @property
    def flops(self) -> float:
        return self.flops_forward + self.flops_backward

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "flops_dense": self.flops_dense, "flops": self.flops}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedReport:
    """What is packed of one kind of activation that the forward saves for the backward.

    Attributes:
        kind: ``"linear input"``, ``"activation input"``, ``"norm input"``, ``"attention"`` (operands and
            probabilities), ``"mask"`` (of dropout and ReLU, to the bit) or ``"other"``.
        tensors: how many.
        bytes_dense, bytes_packed: their size, at the shapes that were traced, as they are and packed.
    """

    kind: str
    tensors: int
    bytes_dense: int
    bytes_packed: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ``backend.report()`` returns: ``print`` it for a table, ``to_dict()`` for machines.

    Attributes:
        step: optimizer steps taken.
        schedule: of the backend.
        sites: one for each layer, in the order of the graphs.
        history: what adaptive sampling measured and decided, one entry for each measurement: ``step``, ``s``,
            ``sgd_variance``, ``act_variance``, ``weight_variance``, and ``sample_shares``, ``row_shares``
            and ``caps`` by site. Empty for other schedules.
        saved: one for each kind of activation that is packed between forward and backward; empty without
            ``saved_activations``. What is saved as it is (statistics, say) is not counted.
        measurements: what a monitor found: how far approximate gradients are from the dense ones, with
            ``to_csv(path)`` and ``to_frame()``. Empty without a monitor.
        cuda_graphs: on a GPU, whether our ops are part of CUDA graphs, or why not; else empty.
        note: what keeps the schedule from doing what it says, in lines; empty if nothing does.
    """

    step: int
    schedule: Schedule
    sites: tuple[SiteReport, ...]
    history: tuple[dict[str, Any], ...] = ()
    saved: tuple[SavedReport, ...] = ()
    measurements: Measurements = dataclasses.field(default_factory=Measurements)
    cuda_graphs: str = ""
    note: str = ""

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the sites: FLOPs per forward and backward of the matrix products (2 for a multiplication
        and its addition), and ``flops_saved``, the share of ``flops_dense`` that was not computed; ``sites``,
        and how many of them are ``rewritten``."""
        names = (
            *("flops_forward_dense", "flops_forward", "flops_backward_dense", "flops_backward"),
            *("flops_dense", "flops"),
        )
        totals: dict[str, float] = {name: sum(getattr(site, name) for site in self.sites) for name in names}
        totals["flops_saved"] = 1 - totals["flops"] / totals["flops_dense"] if totals["flops_dense"] else 0.0
        totals["sites"] = len(self.sites)
        totals["rewritten"] = sum(site.rewritten for site in self.sites)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """JSON types only: the attributes, and ``totals``. Of each site its attributes, ``flops`` and
        ``flops_dense``."""
        return {
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "sites": [{**site.to_dict(), "shape": list(site.shape)} for site in self.sites],
            "totals": self.totals,
            "history": list(self.history),
            "saved": [dataclasses.asdict(kind) for kind in self.saved],
            "measurements": [dataclasses.asdict(row) for row in self.measurements],
            "cuda_graphs": self.cuda_graphs,
            "note": self.note,
        }

    def __str__(self) -> str:
        if not any(site.calls for site in self.sites):
            return f"step {self.step}: nothing compiled has run yet that has a gradient.{self._end()}"
        unit = _unit(max(site.flops_backward_dense for site in self.sites))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("site", "kind", "shape", "method"):
            table.add_column(heading, no_wrap=True)
        for heading in ("keep", "unneeded", "zero", f"backward {unit[0]}", "as run"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("note")
        notes = _numbered(site.reason for site in self.sites)
        for site in self.sites:
            table.add_row(*_cells(site, unit[1]), notes.get(site.reason, site.reason))
        console = Console(
            file=io.StringIO(), width=max(160, max((len(s.name) for s in self.sites), default=0) + 140)
        )
        console.print(table)
        for note, number in notes.items():
            console.print(f"{number} {note}", soft_wrap=True, markup=False, highlight=False)
        console.print(LEGEND, soft_wrap=True, highlight=False)
        if self.saved:
            console.print(_saved_table(self.saved))
        if self.measurements:
            console.print(self.measurements.summary())
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join([self._title(), *(line.rstrip() for line in lines)]).rstrip()

    def _title(self) -> str:
        totals = self.totals
        name, unit = _unit(totals["flops_dense"])

        def flops(what: str) -> str:
            return f"{totals[what] / unit:.3f} of {totals[f'{what}_dense'] / unit:.3f}"

        return (
            f"step {self.step}: {totals['rewritten']} of {totals['sites']} sites rewritten; "
            f"{flops('flops')} {name} a forward and backward ({totals['flops_saved']:.0%} saved; forward "
            f"{flops('flops_forward')}, backward {flops('flops_backward')}){self._end()}"
        )

    def _end(self) -> str:
        carried = sum(site.carried for site in self.sites)
        unneeded = carried or any(site.rows_unneeded for site in self.sites)
        return "".join(
            (
                f"; s = {self.history[-1]['s']:.2f}, what samples keep of the gradient's norm"
                if self.history
                else "",
                f"; {carried or 'no'} linears hand on needed rows only" if unneeded else "",
                f"; {self.cuda_graphs}" if self.cuda_graphs else "",
                f"\n{self.note}" if self.note else "",
            )
        )


def _unit(flops: float) -> tuple[str, float]:
    """In which to say so many FLOPs, and how many it is."""
    return ("GFLOP", 1e9) if flops >= 1e8 else ("MFLOP", 1e6)


def _cells(site: SiteReport, unit: float) -> tuple[str, ...]:
    return (
        site.name,
        site.kind,
        " × ".join(map(str, site.shape)),
        ", ".join(
            filter(None, (site.method, site.kernel, f"dW {site.density:.2%}" if site.density < 1 else ""))
        ),
        f"{site.keep:.2f}",
        f"{site.rows_unneeded / site.rows:.0%}" if site.rows else "",
        f"{site.rows_skipped / site.rows:.0%}" if site.rows else "",
        f"{site.flops_backward_dense / unit:.3f}",
        f"{site.flops_backward / unit:.3f}",
    )


def _numbered(notes: Iterable[str]) -> dict[str, str]:
    """Those that come again and again, each with the number that stands for it in the table."""
    often = [note for note, times in Counter(filter(None, notes)).items() if times > 2]
    return {note: f"[{number}]" for number, note in enumerate(often, 1)}


def _saved_table(saved: tuple[SavedReport, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("saved for backward", no_wrap=True)
    for heading in ("tensors", "MB", "MB packed", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = SavedReport(
        kind="all of these",
        tensors=sum(row.tensors for row in saved),
        bytes_dense=sum(row.bytes_dense for row in saved),
        bytes_packed=sum(row.bytes_packed for row in saved),
    )
    for row in (*saved, total):
        sizes = (f"{row.bytes_dense / 1e6:.3f}", f"{row.bytes_packed / 1e6:.3f}")
        table.add_row(row.kind, str(row.tensors), *sizes, f"{row.bytes_packed / row.bytes_dense:.3f}")
    return table


def _saved_reports(records: Iterable[SavedRecord]) -> Iterator[SavedReport]:
    records = list(records)
    for kind in SAVED_KINDS:
        found = [record for record in records if record.kind == kind]
        if found:
            dense, packed = sum(r.bytes_dense for r in found), sum(r.bytes_packed for r in found)
            yield SavedReport(kind=kind, tensors=len(found), bytes_dense=dense, bytes_packed=packed)


def make_report(schedule: Schedule, runtime: Runtime) -> Report:
    """The report of a runtime, now."""
    sites = tuple(
        _site_report(name, records, runtime.sites.get(name), runtime)
        for name, records in runtime.records.items()
    )
    saved = tuple(_saved_reports(record for records in runtime.saved.values() for record in records))
    return Report(
        step=runtime.clock.step,
        schedule=schedule,
        sites=sites + _never_compiled(runtime),
        history=tuple(runtime.controller.history),
        saved=saved,
        measurements=Measurements() if runtime.telemetry is None else runtime.telemetry.measurements(),
        cuda_graphs=runtime.cuda_graphs,
        note="\n".join(filter(None, (runtime.clock.note, *_notes(schedule, runtime)))),
    )


def _notes(schedule: Schedule, runtime: Runtime) -> Iterator[str]:
    """What users do not see in a table of layers."""
    if runtime.graph_breaks and schedule.skips_unneeded:
        yield (
            f"Dynamo broke the graph at {', '.join(runtime.graph_breaks)}. What one part hands to the next "
            "counts as needed, so that fewer rows of the forward are left out, or none; "
            "TORCH_LOGS=graph_breaks says why."
        )
    kinds = {record.kind for records in runtime.records.values() for record in records}
    if schedule.blocks is not None and kinds and "block" not in kinds:
        yield (
            "No blocks were found, so that no samples are dropped: where= of Schedule.blocks takes a class "
            "name or a pattern of paths."
        )
    if schedule.saved_activations is not None and not schedule.saved_activations.exact:
        yield (
            "What the backward reads of activations is pruned, so that gradients are approximate also where "
            "the method is exact."
        )


def _never_compiled(runtime: Runtime) -> tuple[SiteReport, ...]:
    """The linears of the models that are in no graph: not run yet, or run outside of what was compiled."""
    return tuple(
        SiteReport(
            name=naming.clean(name) + suffix,
            kind="linear",
            shape=(0, module.in_features, module.out_features),
            method="dense",
            keep=1.0,
            rewritten=False,
            reason="it has not run in a compiled graph that has a gradient",
            calls=0,
        )
        for root, suffix in runtime.models()
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear) and (naming.clean(name) or "weight") + suffix not in runtime.records
    )


def _site_report(name: str, records: list[SiteRecord], site: Site | None, runtime: Runtime) -> SiteReport:
    rewritten = [record for record in records if record.rewritten]
    first = (rewritten or records)[0]
    carried = all(record.carried for record in records)
    common: dict[str, Any] = {
        "name": name,
        "kind": first.kind,
        "calls": len(records),
        "carried": carried,
    }
    forward, backward = sum(r.flops_forward for r in records), sum(r.flops_backward for r in records)
    if not rewritten or site is None:
        return SiteReport(
            **common,
            shape=first.shape,
            method="exact" if rewritten else "dense",
            keep=1.0,
            rewritten=bool(rewritten),
            reason="; ".join(dict.fromkeys(r.reason for r in records if r.reason)),
            flops_forward_dense=forward,
            flops_forward=forward,
            flops_backward_dense=backward,
            flops_backward=backward,
        )
    site.settle()
    done = site.counters
    # Before the first backward there is nothing to average, and the traced graph stands in.
    runs = done.backwards / len(rewritten)
    return SiteReport(
        **common,
        shape=site.shape or first.shape,
        method=site.method,
        kernel=site.kernel,
        keep=site.keep(runtime.clock.phase),
        rewritten=site.left_alone is None,
        density=site.density,
        reason=site.left_alone or site.held_back or site.note(runtime.clock.phase) or first.reason,
        rows=done.rows,
        rows_skipped=done.rows_zero,
        rows_computed=done.rows_computed,
        rows_unneeded=done.rows_unneeded,
        flops_forward_dense=done.flops_forward_dense / runs if runs else forward,
        flops_forward=done.flops_forward / runs if runs else forward,
        flops_backward_dense=done.flops_backward_dense / runs if runs else backward,
        flops_backward=done.flops_backward / runs if runs else backward,
    )
