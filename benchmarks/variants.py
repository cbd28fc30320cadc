"""What is timed against what: a method's name on the command line, and the trainee that it stands for.

dense                 plain torch.compile: what every other variant is divided by
exact                 sparse_compile, Schedule.exact(): only rows that are exactly zero are skipped
reuse:R[/WORD...]     sparse_compile, Schedule(linear=Reuse(R)), for instance reuse:0.9/element/sample or
                      reuse:2:4; WORD is row or element, mean or sample, or refresh=K
sample:K[/WORD...]    sparse_compile, Schedule(linear=Sample(K)); WORD is clip=C, input or weight
blocks-sample:K, …    the same for another field of the schedule; join several by +, for instance
                      blocks-sample:0.5+sample:0.25/weight
prune:R[/WORD...]     Schedule(saved_activations=PruneSaved(R)); WORD is fp16, bf16 or int8, or plain (as
                      published); also joined by +
+whole-forward        with Schedule(skip_unneeded=False), for instance exact+whole-forward
+loss-only            with Schedule(skip_unneeded="loss")
vcas[/WORD...]        sparse_compile, Schedule.vcas(); WORD is solve, freq=N, tau=T, or clip=C, clip=auto
eager                 the model as it is, not compiled
eager-resprop:R       the model not compiled, its nn.Linear swapped for eager_resprop.ReSpropLinear
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from eager_resprop import swap_linears
from torch import Tensor, nn

OptimizerName = Literal["adamw", "sgd"]
Kind = Literal["dense", "sparse", "eager", "eager-resprop"]
PHASES = ("forward", "backward", "optimizer", "step")
FIELDS = ("linear", "attention", "blocks")
FORWARDS = {"whole-forward": False, "loss-only": "loss"}  # Schedule(skip_unneeded=…)
ALLOWED = (
    "exact, [FIELD-]reuse:RATIO[/row|element|mean|sample|refresh=K],"
    " [FIELD-]sample:KEEP[/clip=C|input|weight]"
    f" (FIELD is {' or '.join(FIELDS)}; several joined by +), prune:RATIO[/fp16|bf16|int8|plain],"
    f" +{', +'.join(FORWARDS)},"
    " vcas[/solve|freq=N|tau=T|clip=C], eager, eager-resprop:RATIO"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One column of the comparison.

    Attributes:
        schedule: of a sparse one, what `Schedule.from_dict` reads.
        ratio: of an eager ReSprop.
    """

    name: str
    kind: Kind
    schedule: dict[str, Any] = field(default_factory=dict)
    ratio: float = 0.0

    @property
    def compiled(self) -> bool:
        """Whether it runs under torch.compile, and so has a compile time."""
        return not self.kind.startswith("eager")

    @property
    def sparse(self) -> bool:
        """Whether it runs under sparse_compile, and so has a report."""
        return self.kind == "sparse"


DENSE = Variant(name="dense", kind="dense")
DENSE_AGAIN = Variant(name="dense (again)", kind="dense")


def parse_methods(text: str) -> list[Variant]:
    """`"exact,reuse:0.9"` as variants. Refuses what it does not know with the list of what it does."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise ValueError(f"methods={text!r}: each method may be named once")
    return [_parse_variant(name) for name in names]


def _parse_variant(name: str) -> Variant:
    if name == "eager":
        return Variant(name=name, kind="eager")
    if name.partition("/")[0] == "vcas":
        adaptive = {"method": "adaptive", **dict(_vcas_option(name, word) for word in name.split("/")[1:])}
        return Variant(name=name, kind="sparse", schedule={"blocks": adaptive, "linear": adaptive})
    if name.startswith("eager-resprop:"):
        ratio = _number(name, name.partition(":")[2])
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"methods: {name!r} has ratio {ratio}; allowed is 0 <= ratio < 1")
        return Variant(name=name, kind="eager-resprop", ratio=ratio)
    parts = [part for part in name.split("+") if part != "exact"]
    return Variant(name=name, kind="sparse", schedule=dict(_parse_method(name, part) for part in parts))


def _parse_method(name: str, part: str) -> tuple[str, Any]:
    """The field of the schedule that one part of a name sets, and the method for it."""
    if part in FORWARDS:
        return "skip_unneeded", FORWARDS[part]
    method, _, rest = part.partition(":")
    fields = {f"{field}-{kind}": (field, kind) for field in FIELDS for kind in ("reuse", "sample")}
    fields |= {"reuse": ("linear", "reuse"), "sample": ("linear", "sample")}
    fields["prune"] = ("saved_activations", "prune")
    if method not in fields or not rest:
        raise ValueError(f"methods: {name!r} is not known; allowed are {ALLOWED}")
    target, kind = fields[method]
    amount, *words = rest.split("/")
    if kind == "prune":
        form = dict(_prune_option(name, word) for word in words)
        if len(form) < len(words):
            raise ValueError(f"methods: {name!r} says something twice; allowed are {ALLOWED}")
        return target, {"method": "prune_saved", "ratio": _number(name, amount), **form}
    options = dict((_reuse_option if kind == "reuse" else _sample_option)(name, word) for word in words)
    if kind == "sample":
        return target, {"method": kind, "keep": _number(name, amount), **options}
    ratio = amount if re.fullmatch(r"\d+:\d+", amount) else _number(name, amount)
    return target, {"method": kind, "ratio": ratio, **options}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"methods: {name!r} needs a number, not {text!r}") from None


def _reuse_option(name: str, word: str) -> tuple[str, str | int]:
    if word in ("mean", "sample"):
        return "source", word
    if word in ("row", "element"):
        return "granularity", word
    key, _, count = word.partition("=")
    if key == "refresh" and count.isdigit() and int(count) > 0:
        return "refresh_every", int(count)
    raise ValueError(f"methods: {name!r} has the word {word!r}; allowed are {ALLOWED}")


def _prune_option(name: str, word: str) -> tuple[str, str | bool]:
    if word == "plain":
        return "as_published", True
    if word in ("same", "fp16", "bf16", "int8"):
        return "values", word
    raise ValueError(f"methods: {name!r} has the word {word!r}; allowed are {ALLOWED}")


def _vcas_option(name: str, word: str) -> tuple[str, str | float]:
    key, _, value = word.partition("=")
    if word == "solve":
        return "update", word
    if key == "freq" and value.isdigit():
        return "cal_var_freq", int(value)
    if key == "tau":
        return "act_tau", _number(name, value)
    if key == "clip":
        return "clip", value if value == "auto" else _number(name, value)
    raise ValueError(f"methods: {name!r} has the word {word!r}; allowed are {ALLOWED}")


def _sample_option(name: str, word: str) -> tuple[str, str | float]:
    if word in ("input", "weight"):
        return "gradients", word
    key, _, cap = word.partition("=")
    if key == "clip":
        return "clip", _number(name, cap)
    raise ValueError(f"methods: {name!r} has the word {word!r}; allowed are {ALLOWED}")


@dataclass(kw_only=True, slots=True)
class Trainee:
    """A variant brought to life: its own copy of the model, its optimizer, and the backend if it is ours."""

    variant: Variant
    model: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    backend: Any = None
    loss: float = float("nan")

    def step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One whole training step; the seconds of its phases.

        `optimizer` is zero_grad and the update together; `step` is everything from zero_grad to the update.
        """
        clock = time.perf_counter
        start = clock()
        self.optimizer.zero_grad(set_to_none=True)
        cleared = clock()
        loss = self.model(**batch).loss
        forwarded = clock()
        loss.backward()
        backwarded = clock()
        self.optimizer.step()
        end = clock()
        self.loss = loss.item()
        return {
            "forward": forwarded - cleared,
            "backward": backwarded - forwarded,
            "optimizer": cleared - start + end - backwarded,
            "step": end - start,
        }

    def sites(self) -> list[dict[str, Any]]:
        """The sites of the backend's report so far, or none where the backend is not ours."""
        return [] if self.backend is None else self.backend.report().to_dict()["sites"]


def make_trainee(variant: Variant, model: nn.Module, *, optimizer: OptimizerName, lr: float) -> Trainee:
    """A deep copy of `model`, compiled (not yet run) as the variant says, with its own optimizer."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    if variant.kind == "eager-resprop" and swap_linears(model, variant.ratio) == 0:
        raise ValueError(f"{variant.name}: the model has no nn.Linear to swap")
    backend = _sparse_backend(variant) if variant.sparse else None
    run: Callable[..., Any] = model
    if variant.compiled:
        # Isolated, because all copies share their code: else one copy's guards are searched for another.
        run = torch.compile(model, backend=backend or "inductor", isolate_recompiles=True)  # type: ignore
    return Trainee(
        variant=variant, model=run, optimizer=_optimizer(optimizer, parameters, lr), backend=backend
    )


def _sparse_backend(variant: Variant) -> Any:
    """Imported here, so that a cold compile counts the import and the dense variant runs without us."""
    from sparse_compile import Schedule, sparse_backend

    return sparse_backend(Schedule.from_dict(variant.schedule))


def _optimizer(name: OptimizerName, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
