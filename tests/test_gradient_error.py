"""benchmarks/gradient_error.py at toy sizes: what it records, its estimators, and its bias and variance."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # scripts, not a package

import gradient_error
from gradient_error import Record, Recorder, estimators
from presets import PRESETS

from sparse_compile.methods.sample import Draw

SAMPLES, TOKENS = 4, 6
N = SAMPLES * TOKENS
UNBIASED = ["unbiased", "in order", "flips", "residual", "fitted"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(9)


def record() -> Record:
    """Rows of uneven size, and one that is zero."""
    dy = torch.randn(N, 5, dtype=torch.float64) * torch.logspace(-1, 1, N, dtype=torch.float64).unsqueeze(1)
    dy[3] = 0
    return Record(
        x=torch.randn(N, 7, dtype=torch.float64),
        dy=dy,
        base=torch.randn(TOKENS, 5, dtype=torch.float64) / 10,
        tokens=TOKENS,
    )


def truth(found: Record) -> Tensor:
    return found.dy.t() @ found.x


# Recording


def test_records_give_the_weight_gradients_and_the_means_of_the_step_before() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 160), nn.Linear(160, 3))
    recorder = Recorder(model)
    means = []
    for recording in (False, True):
        recorder.recording = recording
        model.zero_grad()
        out = model(torch.randn(SAMPLES, TOKENS, 128, requires_grad=True))
        out.retain_grad()
        out.square().sum().backward()
        means.append((out.grad @ model[3].weight.detach()).mean(0))
    large = [model[2], model[0]]  # as the backward comes to them; the third is too small
    assert len(recorder.records) == 2
    for found, layer in zip(recorder.records, large, strict=True):
        torch.testing.assert_close(truth(found), layer.weight.grad)
        assert found.tokens == TOKENS
    torch.testing.assert_close(recorder.records[0].base, means[0])


def test_a_head_with_one_row_a_sample_is_not_recorded() -> None:
    model = nn.Linear(128, 128)
    recorder = Recorder(model)
    recorder.recording = True
    for _ in range(2):
        model(torch.randn(SAMPLES, 128, requires_grad=True)).sum().backward()
    assert recorder.records == []


# Estimators


@pytest.mark.parametrize("name", estimators())
def test_with_all_rows_every_estimator_is_exact(name: str) -> None:
    found = record()
    torch.testing.assert_close(estimators()[name](found, N, Draw("0")), truth(found))


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_many_draws_is_the_gradient(name: str) -> None:
    found, estimator, draws = record(), estimators()[name], 3000
    g = truth(found)
    along = [float((estimator(found, 8, Draw(str(i))) * g).sum() / g.square().sum()) for i in range(draws)]
    values = torch.tensor(along)
    error = float(values.std()) / draws**0.5
    assert error < 0.02 / 3  # so that a bias of 2 % is three of them
    assert abs(float(values.mean()) - 1) < 3 * error


def test_a_cap_is_between_the_top_rows_and_no_cap() -> None:
    found, k, draws = record(), 6, 400
    errors = {
        name: gradient_error._errors([found], k / N, estimators()[name], draws)[0]
        for name in ("top", "clip=1.5", "clip=3", "unbiased")
    }
    biases, variances = zip(*errors.values(), strict=True)
    assert variances[0] == pytest.approx(0, abs=1e-9 * biases[0])
    assert all(low < high for low, high in itertools.pairwise(variances))
    assert all(low > high for low, high in itertools.pairwise(biases))


# Bias and variance


def test_bias_and_variance_of_estimators_whose_own_are_known() -> None:
    records = [record(), record()]
    whole = [float(truth(each).square().sum()) for each in records]
    for each, half in zip(
        whole, gradient_error._errors(records, 0.5, lambda r, k, draw: 0.5 * truth(r), 8), strict=True
    ):
        assert half == pytest.approx((0.25 * each, 0.0), abs=1e-9 * each)

    signs = itertools.cycle([1.1, 0.9])
    noisy = gradient_error._errors(records, 0.5, lambda r, k, draw: next(signs) * truth(r), 8)
    # Each draw is off by a tenth; of 8 values the spread around their mean is 8 / 7 of that.
    for each, found in zip(whole, noisy, strict=True):
        assert found == pytest.approx((0.0, 0.01 * each * 8 / 7), rel=1e-9, abs=1e-9 * each)


# The command


def test_the_command_writes_all_estimators_at_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"batch": 3, "tokens": 5, "layers": 1, "hidden": 128, "heads": 4, "intermediate": 128}
    monkeypatch.setitem(PRESETS, "bert-base", replace(PRESETS["bert-base"], **sizes, vocab=50, classes=3))
    path = tmp_path / "found.json"
    arguments = [
        "--preset",
        "bert-base",
        "--keeps",
        "0.2,1",
        "--at",
        "2,1",
        "--draws",
        "4",
        "--json",
        str(path),
    ]
    done = CliRunner().invoke(gradient_error.app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert found["run"] == {"preset": "bert-base", "draws": 4, "lr": 1e-4, "batch_size": None}
    rows = {(row["step"], row["keep"], row["estimator"]): row for row in found["found"]}
    assert [*rows] == [*itertools.product((1, 2), (0.2, 1.0), estimators())]
    assert all(row["bias"] >= 0 and row["variance"] >= 0 for row in rows.values())
    for step in (1, 2):
        assert rows[step, 0.2, "top"]["bias"] > 0.01
        assert rows[step, 0.2, "unbiased"]["variance"] > 0.01
        assert rows[step, 1.0, "unbiased"]["variance"] < 1e-6
        assert rows[step, 0.2, "unbiased"]["below"] == 0
        layers = rows[step, 0.2, "clip=1.5"]["layers"]
        assert layers > 0
        assert 0 < rows[step, 0.2, "clip=1.5"]["below"] <= layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "bert-giant"], "allowed are bert-base"),
        (["--keeps", "many"], "are numbers separated by commas"),
        (["--at", "1.5"], "are numbers separated by commas"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(gradient_error.app, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
