"""The Trainer's callback with a real Trainer on a tiny model, and the figure of what sampling did."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparse_compile import SparseBackend, sparse_backend
from sparse_compile.integrations.transformers import STATE_FILE, SparseCompileCallback
from sparse_compile.plots import plot_shares
from sparse_compile.schedule import Schedule

STEPS = 4
SCHEDULE = Schedule.vcas(cal_var_freq=2, update="solve", act_tau=0.5, weight_tau=0.5)


def tiny_bert() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=40, problem_type="single_label_classification")
    return transformers.BertForSequenceClassification(config)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (64, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] < 20)} for row in ids]


class Tracker(transformers.TrainerCallback):
    """Stands for TensorBoard and the like: sees what is logged in its turn."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def make_trainer(
    folder: Path, schedule: Schedule = SCHEDULE, steps: int = STEPS
) -> tuple[transformers.Trainer, SparseBackend, Tracker]:
    transformers.set_seed(3)
    model = tiny_bert()
    backend = sparse_backend(schedule, compiler="aot_eager")
    model.compile(backend=backend)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=1,
        save_steps=2,
        seed=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )
    tracker = Tracker()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[tracker])
    SparseCompileCallback.attach(trainer, backend)
    return trainer, backend, tracker


def test_numbers_are_in_every_log_and_trackers_see_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, backend, tracker = make_trainer(tmp_path)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == STEPS
    for entry, seen in zip(steps, (log for log in tracker.logs if "loss" in log), strict=True):
        assert 0 < entry["sparse_compile/flops_ratio"] < 1.2  # a measurement takes some, too
        assert entry["sparse_compile/samples/bert.encoder.layer.1"] <= 1
        assert entry["sparse_compile/rows/bert.encoder.layer.1.output.dense"] <= 1
        assert seen.items() <= entry.items()
        assert "sparse_compile/s" in seen
    assert steps[-1]["sparse_compile/flops_ratio"] == pytest.approx(
        1 - backend.report().totals["flops_saved"]
    )
    last = trainer.state.log_history[-1]  # the summary
    assert not any(name.startswith("sparse_compile/") for name in last)


def test_other_schedules_have_the_ratio_alone(tmp_path: Path) -> None:
    trainer, backend, _ = make_trainer(tmp_path, Schedule.exact(), steps=1)
    trainer.train()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparseCompileCallback)]
    assert callback.numbers() == {"flops_ratio": 1 - backend.report().totals["flops_saved"]}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    trainer, whole, _ = make_trainer(tmp_path / "whole")
    trainer.train()
    trainer, _, _ = make_trainer(tmp_path / "parts")
    trainer.train()
    folder = tmp_path / "parts" / "checkpoint-2"
    assert (folder / STATE_FILE).exists()
    trainer, resumed, _ = make_trainer(tmp_path / "again")
    trainer.args.output_dir = str(tmp_path / "parts")
    trainer.train(resume_from_checkpoint=str(folder))
    assert resumed.step == whole.step == STEPS
    assert resumed.report().history == whole.report().history
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours["controller"] == theirs["controller"]


@pytest.mark.parametrize("told", [True, False])
def test_a_checkpoint_in_another_folder(told: bool, tmp_path: Path) -> None:
    trainer, first, _ = make_trainer(tmp_path / "first", steps=2)
    trainer.train()
    folder = str(tmp_path / "first" / "checkpoint-2")
    trainer, second, _ = make_trainer(tmp_path / "second", steps=3)
    if told:
        trainer.args.resume_from_checkpoint = folder
        trainer.train(resume_from_checkpoint=folder)
        assert second.report().history[0] == first.report().history[0]
    else:
        with pytest.warns(UserWarning, match=r"the schedule goes on at step 2, and all else .* starts anew"):
            trainer.train(resume_from_checkpoint=folder)
        assert [entry["step"] for entry in second.report().history] == [2]
    assert second.step == 3


def test_the_figure_of_the_shares(tmp_path: Path) -> None:
    trainer, backend, _ = make_trainer(tmp_path)
    trainer.train()
    path = tmp_path / "shares.png"
    plot_shares(backend.report(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_figure_without_measurements(tmp_path: Path) -> None:
    backend = sparse_backend(Schedule.exact(), compiler="aot_eager")
    with pytest.raises(ValueError, match=r"report has no history; allowed is .* Sample\.adaptive"):
        plot_shares(backend.report(), tmp_path / "shares.png")


def test_every_folder_of_the_package_is_installed() -> None:
    """An editable installation would work without; a wheel would lack what is missing in the list."""
    root = Path(__file__).resolve().parents[1]
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(root) for path in (root / "sparse_compile").rglob("__init__.py")}
    assert listed == {str(folder).replace("/", ".") for folder in folders} | {"sparse_compile.passes"}
