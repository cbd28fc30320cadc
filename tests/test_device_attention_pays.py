"""When choosing query rows of an attention pays on a GPU: it is timed, against the backward of all rows."""

from __future__ import annotations

import pytest
from cuda_attention import batch, close, cuda_attention_on_cpu  # noqa: F401
from test_device_choice import Timed

pytest.importorskip("triton")

import torch

from sparse_compile import Reuse, Sample, Schedule
from sparse_compile.attention_site import AttentionSite

METHODS = {"sample": Sample(0.25), "reuse": Reuse(0.75)}
GPU = torch.cuda.is_available()

pytestmark = pytest.mark.usefixtures("cuda_attention_on_cpu")


def train(site: AttentionSite, method: Reuse | Sample, steps: int = 4) -> list[str]:
    """The methods of so many backwards; those that are exact are."""
    device, done = torch.device("cuda" if GPU else "cpu"), []
    for step in range(steps):
        found = batch(step)
        gradients = site.backward(*found.on_device("efficient", device), method=method)
        if site.method == "exact":
            close(gradients, AttentionSite("dense").backward(*found.on_cpu(), method=None))
        done.append(site.method)
    return done


@pytest.mark.parametrize("name", METHODS)
def test_where_it_is_slower_than_dense_the_site_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, method = Timed(monkeypatch, chosen=1.5), METHODS[name]
    site, phase = AttentionSite("layer"), Schedule(attention=method).at(0)
    # Reuse has no means yet in the first backward.
    assert train(site, method) == ["exact"] * (name == "reuse") + [name] + ["exact"] * (2 + (name != "reuse"))
    assert clock.questions == 1
    assert site.keep(phase) == 1.0
    what = "reuse" if name == "reuse" else "sampling"
    assert (
        site.note(phase)
        == f"{what} would cost more than it saves at this size and keep: only zero rows are skipped"
    )
    # Another layer of this shape need not find out.
    assert train(AttentionSite("next"), method)[-3:] == ["exact"] * 3
    assert clock.questions == 1


@pytest.mark.parametrize("name", METHODS)
def test_where_it_is_faster_rows_are_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, method = Timed(monkeypatch, chosen=0.9), METHODS[name]
    site, phase = AttentionSite("layer"), Schedule(attention=method).at(0)
    assert train(site, method) == ["exact" if name == "reuse" else name] + [name] * 3
    assert clock.questions == 1
    assert site.note(phase) == ""
    assert site.keep(phase) == 0.25


def test_another_share_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Timed(monkeypatch, chosen=0.9)
    for keep in (0.25, 0.25, 0.5):
        train(AttentionSite("layer"), Sample(keep))
    assert clock.questions == 2


def test_what_is_timed_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, chosen=0.9)
    site = AttentionSite("layer")
    train(site, Sample(0.25), steps=2)
    site.settle()
    found = [batch(step).do for step in range(2)]
    zero = sum(int((do == 0).all(3).all(1).sum()) for do in found)
    assert site.counters.rows_zero == zero > 0
