"""What is sparsified, how much of it, and when: the frozen, validated description of a run.

Everything here is a pure value. A `Schedule` says what holds at a step (`Schedule.at`) and which modules
it is meant for; whatever changes from step to step lives in the runtime, never here. Units, throughout:

- **ratio**: the share of a gradient that is not computed, in [0, 1); **keep** = 1 - ratio;
- **step**: the number of optimizer steps already taken, from 0;
- **fraction**: the share of training already done, step / total_steps, in [0, 1].

Every wrong value is refused with a `ValueError` that names the field, the value and what is allowed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, cast

from sparse_compile.checks import check_keys, integer, listed, near, one_of, store, unknown, wrong
from sparse_compile.patterns import block_indices, pattern_matches, patterns
from sparse_compile.phases import Ratio
from sparse_compile.settings.adaptive import Adaptive
from sparse_compile.settings.prune import PruneSaved
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.rotate import RotatedTopK
from sparse_compile.settings.sample import Sample

Method: TypeAlias = Reuse | Sample | Adaptive | PruneSaved | RotatedTopK  # the union of all method classes

# What each field of a Schedule accepts besides None, which is the exact gradient. A further method is
# added here (and to the union above); construction, at(), to_dict() and from_dict() all read this table.
METHODS: dict[str, tuple[type[Method], ...]] = {
    "linear": (Reuse, Sample, Adaptive),
    "attention": (Reuse, Sample),
    "blocks": (Sample, Adaptive),
    "saved_activations": (PruneSaved,),
    "weight_gradients": (RotatedTopK,),
}


@dataclass(frozen=True)
class Phase:
    """What holds at one step: each method of the schedule with its ratio resolved to a single value.

    Attributes:
        step: optimizer steps taken.
        fraction: of training that is done, in [0, 1]; 0.0 without ``total_steps``.
        linear, attention, blocks, saved_activations, weight_gradients: as in :class:`Schedule`, each with one
            ratio; None is exact.
    """

    step: int
    fraction: float
    linear: Reuse | Sample | Adaptive | None
    attention: Reuse | Sample | None
    blocks: Sample | Adaptive | None
    saved_activations: PruneSaved | None
    weight_gradients: RotatedTopK | None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which gradients are estimated, by which method, in which modules and when.

    Args:
        linear: the method for linear layers: a `Reuse`, a `Sample`, or `Sample.adaptive()`. None is exact:
            only rows of the output gradient that are exactly zero are skipped.
        blocks: a `Sample` or `Sample.adaptive()`, for the gradients of whole samples (along the first
            dimension, as in `batch_first` models) at the ends of the model's repeated blocks: one that is not
            drawn there is zero in every earlier block. A `keep` is the share that is left behind the first
            block; behind block i of n (from 0) it is keep^((n - i)/n).
        attention: the method for attentions, a `Reuse` or a `Sample`, with a schedule of its own; rows are
            queries there. None is exact, as above. A few rows are computed only where that is faster than
            to compute all of them; else a step is exact.
        saved_activations: how what is saved for backward is pruned, a `PruneSaved`, in all modules:
            `include`, `exclude` and `skip_layers` do not apply to it. None saves it as it is.
        weight_gradients: which entries of the weights' gradients are kept, a `RotatedTopK`; it needs an
            optimizer of `sparse_compile.optim`. None keeps all.
        skip_unneeded: leave rows out of a linear's forward, too, if no output of the model depends on them,
            such as padding that attention masks out. "loss": if its loss does not; what else it returns
            (logits) may hold anything there. (Not with `saved_activations`, nor a `Reuse` of single entries
            in attention.)
        include: globs of the modules to rewrite; empty means all of them. A glob is compared with every run
            of neighbouring components of a module's dotted path and takes in all below: "layer.1" selects
            "enc.layer.1.dense", and not "enc.layer.11.dense"; `*` may cross dots.
        exclude: patterns of the modules to leave alone; stronger than `include`.
        skip_layers: indices of the blocks to leave alone; negative ones count from the last block.
        total_steps: the optimizer steps of the whole training, which start fractions refer to. Needed
            as soon as a phase starts after 0.

    A single pattern or index stands for a sequence of one; sequences are stored as tuples.

    Raises:
        ValueError: a value is not among those above, or fractions are given without `total_steps`.
    """

    linear: Reuse | Sample | Adaptive | None = None
    attention: Reuse | Sample | None = None
    blocks: Sample | Adaptive | None = None
    saved_activations: PruneSaved | None = None
    weight_gradients: RotatedTopK | None = None
    skip_unneeded: bool | str = True
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    skip_layers: int | Sequence[int] = ()
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for field in METHODS:
            _check_method(field, getattr(self, field))
        store(self, "include", patterns("Schedule.include", self.include))
        store(self, "exclude", patterns("Schedule.exclude", self.exclude))
        store(self, "skip_layers", block_indices(self.skip_layers))
        if not isinstance(self.skip_unneeded, bool) and self.skip_unneeded != "loss":
            raise wrong("Schedule.skip_unneeded", self.skip_unneeded, 'True, False or "loss"')
        if self.total_steps is not None:
            store(self, "total_steps", integer("Schedule.total_steps", self.total_steps, at_least=1))
        self._check_ignored()
        self._check_calibration()
        for field, method in self._methods().items():
            if method is not None and method.needs_total_steps and self.total_steps is None:
                late = next(phase for phase in method.phases if phase[1] > 0)
                raise ValueError(
                    f"Schedule.{field} has the phase {late}, which starts after 0: fractions without "
                    "total_steps have no meaning; give Schedule.total_steps, an int >= 1."
                )

    @classmethod
    def exact(cls, **options: Any) -> "Schedule":
        """No gradient is changed: only what is exactly zero, or not needed, is skipped.

        `options` are `include`, `exclude`, `skip_layers`, `skip_unneeded` and `total_steps`.
        """
        return cls._with(options, "exact")

    @classmethod
    def _with(
        cls, options: dict[str, Any], preset: str, known: Iterable[str] = (), **methods: Any
    ) -> "Schedule":
        """A preset's schedule: its methods, and the user's options. (`known` are settings of a method.)"""
        allowed = [field.name for field in fields(cls) if field.name not in METHODS]
        for name in set(options) - set(allowed):
            raise unknown(f"Schedule.{preset}()", name, [*known, *allowed])
        return cls(**{**dict.fromkeys(METHODS), **methods}, **options)

    @classmethod
    def resprop(cls, ratio: float | Sequence[tuple[float, float]] = 0.9, **options: Any) -> "Schedule":
        """ReSprop with its paper's own choices (Goli & Aamodt, CVPR 2020), for linear layers.

        The base is the output gradient of one random sample of the previous iteration; of the difference
        to it, the single entries of largest magnitude are kept. `options` as in `exact`.
        """
        if isinstance(ratio, str):
            raise wrong(
                "Schedule.resprop: ratio",
                ratio,
                f"a number in [0, 1), or phases; {ratio} is Reuse({ratio!r})",
            )
        linear = Reuse(ratio, granularity="element", source="sample")
        return cls._with(options, "resprop", linear=linear)

    @classmethod
    def vcas(cls, **settings: Any) -> "Schedule":
        """VCAS (Wang et al., ICLR 2024) with its paper's defaults: samples are dropped between the blocks
        and rows of the weight gradients are drawn, both as far as the variance allows.

        `settings` are those of `Sample.adaptive`, and the options of `exact`.

        Raises:
            ValueError, TypeError: a setting has a value that is refused, or is not known.
        """
        known = [field.name for field in fields(Adaptive)]
        adaptive = Sample.adaptive(**{name: settings.pop(name) for name in known if name in settings})
        return cls._with(settings, "vcas", known, blocks=adaptive, linear=adaptive)

    @classmethod
    def c_sharp(
        cls,
        linear: Ratio | Sequence[tuple[Ratio, float]] = ((0.0, 0), (0.9, 0.25)),
        attention: Ratio | Sequence[tuple[Ratio, float]] = ((0.0, 0), (0.9, 0.25)),
        skip_layers: int | Sequence[int] = (0, -1),
        **options: Any,
    ) -> "Schedule":
        """C-Sharp (huanyic1/Masters_Project), for linears and attentions, each with a schedule of its own.

        Of the difference to the batch mean of the previous backward the single entries of largest magnitude
        are kept, or, with a ratio like "2:4", the largest of neighbours. A schedule is C-Sharp's own list of
        [ratio, start] pairs, start a fraction of training, or one ratio for all of it. The first and last
        blocks get exact skipping only. `options` are `include`, `exclude` and `total_steps`.

        Raises:
            ValueError: as by the constructor; `total_steps` is needed if a phase starts after 0.
        """
        methods = [Reuse(linear), Reuse(attention)]  # an N:M ratio has chosen its granularity by now
        single = [m if m.granularity == "n:m" else replace(m, granularity="element") for m in methods]
        options = {"skip_layers": skip_layers, **options}
        return cls._with(options, "c_sharp", linear=single[0], attention=single[1])

    @classmethod
    def back_razor(cls, ratio: float = 0.9, **options: Any) -> "Schedule":
        """Back Razor (Jiang et al., NeurIPS 2022): of what is saved for backward, only the largest entries.

        `options` as in `exact`.
        """
        return cls._with(options, "back_razor", saved_activations=PruneSaved(ratio, as_published=True))

    @classmethod
    def sparse_grad(cls, density: float = 0.01, **settings: Any) -> "Schedule":
        """SparseGrad (Chekalina et al., EMNLP 2024): of the MLPs' weight gradients, 1 % in a rotated basis.

        `settings` are those of `RotatedTopK`, and the options of `exact`.

        Raises:
            ValueError, TypeError: a setting has a value that is refused, or is not known.
        """
        known = [field.name for field in fields(RotatedTopK)]
        own = {name: settings.pop(name) for name in known if name in settings}
        return cls._with(settings, "sparse_grad", known, weight_gradients=RotatedTopK(density, **own))

    def fraction(self, step: int) -> float:
        """The share of training done after `step` optimizer steps, in [0, 1]; 0.0 without `total_steps`.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        step = integer("The step of a schedule", step, at_least=0)
        return 0.0 if self.total_steps is None else min(step, self.total_steps) / self.total_steps

    def at(self, step: int) -> Phase:
        """What holds in the step that follows `step` optimizer steps.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        fraction = self.fraction(step)
        resolved: dict[str, Any] = {
            field: method and method.at(fraction) for field, method in self._methods().items()
        }
        return Phase(int(step), fraction, **resolved)

    @property
    def linears_are_exact(self) -> bool:
        """Whether linear layers only ever skip rows that are zero, and no method makes any."""
        return self.linear is None and self.blocks is None

    @property
    def is_exact(self) -> bool:
        """Whether no method is applied anywhere."""
        methods = (self.linear, self.attention, self.blocks, self.saved_activations, self.weight_gradients)
        return all(method is None for method in methods)

    @property
    def skips_unneeded(self) -> bool | str:
        """`skip_unneeded`, or False with a method for which every row counts."""
        # What is kept of a sample, and its mean, depends on all of its rows; and a base of entries that are
        # left from the scores' gradients meets every query and key.
        prunes = self.saved_activations is not None
        entries = isinstance(self.attention, Reuse) and self.attention.granularity != "row"
        return False if prunes or entries else self.skip_unneeded

    def reason_left_out(self, name: str) -> str | None:
        """Why `include` and `exclude` leave out the module path `name`; None if they select it."""
        if self.include and not any(pattern_matches(pattern, name) for pattern in self.include):
            return f"matches no include pattern ({listed(self.include)})"
        for pattern in self.exclude:
            if pattern_matches(pattern, name):
                return f"matches the exclude pattern '{pattern}'"
        return None

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Refuse patterns that select nothing, which are misspelt more often than meant.

        Raises:
            ValueError: an `include` or `exclude` pattern matches none of the module paths `paths`.
        """
        paths = list(paths)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(pattern_matches(pattern, path) for path in paths):
                    names = [*paths, *(path.rpartition(".")[2] for path in paths)]
                    raise ValueError(
                        f"Schedule.{field} has the pattern '{pattern}', which matches none of "
                        f"{len(paths)} module paths; near names: {near(pattern, names) or 'none'}."
                    )

    def skips_block(self, index: int, count: int) -> bool:
        """Whether `skip_layers` names block `index` (from 0) of a model that has `count` blocks.

        Raises:
            ValueError: `index` is not in [0, count).
        """
        if not 0 <= index < count:
            raise wrong("The index in Schedule.skips_block", index, f"an int in [0, {count})")
        skipped = cast(tuple[int, ...], self.skip_layers)
        return index in skipped or index - count in skipped

    def check_where(self, paths: Iterable[str], class_names: Iterable[str]) -> None:
        """Refuse a `where` of `blocks` that is neither a class of the model nor matches a module path.

        Raises:
            ValueError: it selects nothing.
        """
        where = None if self.blocks is None else self.blocks.where
        paths, class_names = list(paths), set(class_names)
        if where is None or where in class_names or any(pattern_matches(where, path) for path in paths):
            return
        raise ValueError(
            f"Schedule.blocks has where='{where}', which is no class of the model and matches none of "
            f"{len(paths)} module paths; near names: {near(where, [*class_names, *paths]) or 'none'}."
        )

    def check_blocks(self, count: int) -> None:
        """Refuse indices in `skip_layers` that a model of `count` blocks does not have.

        Raises:
            ValueError: an index is not in [-count, count).
        """
        for index in cast(tuple[int, ...], self.skip_layers):
            if not -count <= index < count:
                span = f"an int in [{-count}, {count}) for {count} blocks"
                allowed = span if count else "nothing: no blocks"
                raise wrong("An index in Schedule.skip_layers", index, allowed)

    def to_dict(self) -> dict[str, Any]:
        """The schedule in JSON types only; a method is a dict whose "method" is its name.

        Equal schedules give equal dicts in every process, unlike `hash`, which Python salts for strings.
        """
        return {field.name: _jsonable(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schedule":
        """The schedule that `to_dict` described, also after a round trip through JSON.

        Raises:
            ValueError: a key or method is unknown, a required key is missing, or a value is refused.
        """
        if not isinstance(values, Mapping):
            raise wrong("The argument of Schedule.from_dict", values, "a dict as Schedule.to_dict returns")
        check_keys("Schedule", values, cls)
        return cls(**{k: _method_from_dict(k, v) if k in METHODS else v for k, v in values.items()})

    def _check_ignored(self) -> None:
        """Refuse settings of sampling that the field they are in has no use for."""
        where = getattr(self.linear, "where", None)
        if where is not None and (isinstance(self.linear, Sample) or self.blocks is None):
            raise wrong("Schedule.linear's where", where, "None: blocks are a matter of Schedule.blocks")
        where = getattr(self.attention, "where", None)
        if where is not None:
            raise wrong("Schedule.attention's where", where, "None: blocks are a matter of Schedule.blocks")
        for field in ("blocks", "attention"):
            gradients = getattr(getattr(self, field), "gradients", "both")
            if gradients != "both":
                raise wrong(f"Schedule.{field}'s gradients", gradients, '"both"')

    def _check_calibration(self) -> None:
        """Refuse a calibration that never ends, and one method that another cannot be combined with."""
        rotated = self.weight_gradients
        if rotated is None or rotated.density == 1:
            return
        if self.total_steps is not None and rotated.calibration_steps >= self.total_steps:
            allowed = f"an int below total_steps, {self.total_steps}: nothing would be left to train"
            field = "Schedule.weight_gradients's calibration_steps"
            raise wrong(field, rotated.calibration_steps, allowed)
        if isinstance(self.linear, Adaptive) or isinstance(self.blocks, Adaptive):
            allowed = "None: Sample.adaptive() measures the variance of whole weight gradients"
            raise wrong("Schedule.weight_gradients", rotated, allowed)

    def _methods(self) -> dict[str, Method | None]:
        return {field: getattr(self, field) for field in METHODS}


def _check_method(field: str, value: object) -> None:
    accepted = METHODS[field]
    if value is None or isinstance(value, accepted):
        return
    names = [cls.__name__ if cls is not Adaptive else "Sample.adaptive()" for cls in accepted]
    raise wrong(f"Schedule.{field}", value, f"None or {' or '.join(names)}, e.g. {field}={names[0]}(0.9)")


def _method_from_dict(field: str, value: object) -> Any:
    """The method that a dict describes; anything else as it is, for the constructor to judge."""
    by_name = {cls.method: cls for cls in METHODS[field]}
    if not isinstance(value, Mapping) or not by_name:
        return value
    options = dict(value)
    name = one_of(f'Schedule.{field}["method"]', options.pop("method", None), tuple(by_name))
    check_keys(f"Schedule.{field}", options, by_name[name])
    return by_name[name](**options)


def _jsonable(value: object) -> Any:
    if isinstance(value, Method):
        return {"method": value.method} | {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value
