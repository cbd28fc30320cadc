"""A monitor's table: in the report, as CSV and data frame, as a figure, and in the Trainer's logs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch
from reference import MLP, square_loss

from sparse_compile import Monitor, Reuse, Schedule, SparseBackend, sparse_backend
from sparse_compile.integrations.transformers import SparseCompileCallback
from sparse_compile.measurements import NAMES, Measurement, Measurements
from sparse_compile.plots import plot_measurements


def row(step: int, site: str, gradient: str, cosine: float, error: float, energy: float) -> Measurement:
    return Measurement(
        step=step,
        site=site,
        gradient=gradient,
        method="reuse",
        cosine=cosine,
        relative_error=error,
        energy_kept=energy,
    )


TABLE = Measurements(
    [
        row(4, "up", "dW", 0.5, 1.0, 0.1),
        row(9, "down", "dX", 0.75, 0.5, 0.5),
        row(9, "down", "dW", 1 / 3, 0.1, 0.5),
        row(9, "up", "dW", 0.9, 0.3, 0.8),
    ]
)


@pytest.fixture(scope="module")
def backend() -> SparseBackend:
    torch.manual_seed(0)
    model = MLP()
    backend = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager", monitor=Monitor(every=2))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        square_loss(compiled(torch.randn(6, 5, 6))).backward()
        optimizer.step()
    return backend


def test_the_report_has_them(backend: SparseBackend) -> None:
    report = backend.report()
    assert {measured.step for measured in report.measurements} == {1, 3}
    rows = json.loads(json.dumps(report.to_dict(), allow_nan=False))["measurements"]
    assert [Measurement(**values) for values in rows] == list(report.measurements)
    last = str(report).splitlines()[-1]
    assert last == report.measurements.summary()
    assert last.startswith("measured in step 3: cosine (and relative error) to the dense gradient dX 0.")


def test_without_a_monitor_there_are_none() -> None:
    report = sparse_backend(Schedule(linear=Reuse(0.5)), compiler="aot_eager").report()
    assert report.measurements == ()
    assert report.to_dict()["measurements"] == []
    assert "measured" not in str(report)
    assert report.measurements.last() == {}
    assert report.measurements.summary() == ""


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "measurements.csv"
    TABLE.to_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "site", "gradient", "method", "cosine", "relative_error", "energy_kept"]
    for read, written in zip(rows, TABLE, strict=True):
        kinds = {name: type(value) for name, value in dataclasses.asdict(written).items()}
        assert {name: kinds[name](value) for name, value in read.items()} == dataclasses.asdict(written)


def test_the_data_frame_is_of_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas is no dependency, and stands in for itself here by the one call that is made of it."""

    class DataFrame:
        @classmethod
        def from_records(cls, rows: list[tuple[object, ...]], columns: list[str]) -> list[dict[str, object]]:
            return [dict(zip(columns, values, strict=True)) for values in rows]

    pandas = types.ModuleType("pandas")
    pandas.DataFrame = DataFrame  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert TABLE.to_frame() == [dataclasses.asdict(measured) for measured in TABLE]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        TABLE.to_frame()


def test_the_real_data_frame() -> None:
    pytest.importorskip("pandas")
    frame = TABLE.to_frame()
    assert list(frame.columns) == list(NAMES)
    assert frame.groupby("gradient")["cosine"].max().to_dict() == {"dW": 0.9, "dX": 0.75}
    assert list(Measurements().to_frame().columns) == list(NAMES)


def test_means_of_the_last_measured_step() -> None:
    assert TABLE.last() == pytest.approx(
        {
            "cosine/dX": 0.75,
            "relative_error/dX": 0.5,
            "cosine/dW": statistics.fmean([1 / 3, 0.9]),
            "relative_error/dW": 0.2,
            "energy_kept": 0.6,
        }
    )
    assert TABLE.summary() == (
        "measured in step 9: cosine (and relative error) to the dense gradient dX 0.750 (0.50), "
        "dW 0.617 (0.20); 60% of the energy kept"
    )


def test_the_trainer_logs_the_means(backend: SparseBackend) -> None:
    numbers = SparseCompileCallback(backend).numbers()
    assert numbers.keys() == {
        *("flops_ratio", "energy_kept", "cosine/dX", "relative_error/dX", "cosine/dW", "relative_error/dW")
    }
    assert all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("value", ["cosine", "relative_error", "energy_kept"])
def test_the_heat_map(backend: SparseBackend, tmp_path: Path, value: str) -> None:
    path = tmp_path / "map.png"
    plot_measurements(backend.report(), path, gradient="dX", value=value)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_the_heat_map_shows(
    backend: SparseBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    shown = []
    original = Axes.imshow

    def imshow(axes: Axes, grid: list[list[float]], **options: object) -> object:
        shown.append((axes, grid))
        return original(axes, grid, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    report = backend.report()
    renamed = [dataclasses.replace(measured, step=9 * measured.step) for measured in report.measurements]
    missing = [r for r in renamed if (r.site, r.step) != ("second", 9)]
    plot_measurements(
        dataclasses.replace(report, measurements=Measurements(missing)), tmp_path / "map.png", gradient="dX"
    )
    ((axes, grid),) = shown
    assert [label.get_text() for label in axes.get_yticklabels()] == ["second", "head"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9", "27"]
    cosines = {(r.site, r.step): r.cosine for r in missing if r.gradient == "dX"}
    assert math.isnan(grid[0][0])
    assert [grid[0][1], *grid[1]] == [cosines[key] for key in (("second", 27), ("head", 9), ("head", 27))]


def test_what_was_not_measured_has_no_heat_map(backend: SparseBackend, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    with pytest.raises(ValueError, match=r"gradient is 'dQ'; allowed is one that was measured: 'dX', 'dW'"):
        plot_measurements(backend.report(), path, gradient="dQ")
    with pytest.raises(ValueError, match=r'value is \'angle\'; allowed is "cosine" or'):
        plot_measurements(backend.report(), path, value="angle")
    empty = sparse_backend(Schedule.exact(), compiler="aot_eager").report()
    with pytest.raises(ValueError, match=r"none is, which needs sparse_backend\(…, monitor=…\)"):
        plot_measurements(empty, path)
    assert not path.exists()
