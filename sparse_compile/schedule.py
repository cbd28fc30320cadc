"""What is sparsified, how much of it, and when: the frozen, validated description of a run.

Everything here is a pure value. A `Schedule` says what holds at a step (`Schedule.at`) and which modules
it is meant for; whatever changes from step to step lives in the runtime, never here. Units, throughout:

- **ratio**: the share of a gradient that is not computed, in [0, 1); **keep** = 1 - ratio;
- **step**: the number of optimizer steps already taken, from 0;
- **fraction**: the share of training already done, step / total_steps, in [0, 1].

Every wrong value is refused with a `ValueError` that names the field, the value and what is allowed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, ClassVar, TypeAlias, cast

from .phases import Phases, Ratio, is_number, parse_n_m, parse_ratio, wrong

GRANULARITIES = ("row", "element", "n:m")
SOURCES = ("mean", "sample")


@dataclass(frozen=True)
class Reuse:
    """Reuse the gradient remembered from an earlier step; compute only the largest part of what changed.

    Source: ReSprop (Goli & Aamodt, "ReSprop: Reuse Sparsified Backpropagation", CVPR 2020) and its
    successors for transformers, ReSprop-T and C-Sharp.

    Args:
        ratio: the share of the output gradient that is not computed. One of

            - a number in [0, 1); 0 is dense;
            - "n:m", e.g. "2:4": n kept of every m neighbours, so the ratio is 1 - n/m;
            - a list of (ratio, start) pairs, each ratio one of the above, which holds from the fraction
              `start` of training until the next pair's start. The first start is 0.0, starts increase.

        granularity: what is kept or dropped as a whole: "row" (a token's row, by its norm), "element"
            (single entries, by magnitude) or "n:m". An N:M ratio turns "row", the default, into "n:m".
        source: the base that is reused: "mean" over the batch, or one random "sample" of it.
        refresh_every: the base is renewed at every `refresh_every`-th backward, an int >= 1.

    The ratio is stored as a float, a string, or a tuple of pairs, so that equal settings are equal objects.

    Raises:
        ValueError: a value is not among those above, phases are out of order, or ratio and granularity
            contradict each other.
    """

    method: ClassVar[str] = "reuse"  # the name in Schedule.to_dict

    ratio: Ratio | Sequence[tuple[Ratio, float]]
    granularity: str = "row"
    source: str = "mean"
    refresh_every: int = 1

    def __post_init__(self) -> None:
        _store(self, "ratio", parse_ratio("Reuse.ratio", self.ratio))
        _store(self, "granularity", _one_of("Reuse.granularity", self.granularity, GRANULARITIES))
        _store(self, "source", _one_of("Reuse.source", self.source, SOURCES))
        _store(self, "refresh_every", _integer("Reuse.refresh_every", self.refresh_every, at_least=1))
        self._settle_granularity()

    def _settle_granularity(self) -> None:
        """Let an N:M ratio choose its granularity; refuse ratios that the granularity cannot express."""
        ratios = [ratio for ratio, _ in self.phases]
        n_m = [ratio for ratio in ratios if isinstance(ratio, str)]
        if n_m and self.granularity == "element":
            raise wrong("Reuse.granularity", self.granularity, f'"n:m" with the ratio "{n_m[0]}"')
        if n_m:
            _store(self, "granularity", "n:m")
        for ratio in ratios:
            if self.granularity == "n:m" and not isinstance(ratio, str) and ratio != 0:
                raise ValueError(
                    f'Reuse.ratio holds {ratio}; allowed with granularity "n:m" is "n:m", e.g. "2:4", '
                    "or 0.0 (dense)."
                )

    @property
    def phases(self) -> Phases:
        """The ratio as (ratio, start fraction) pairs, in order; the first starts at 0.0."""
        if isinstance(self.ratio, float | str):
            return ((self.ratio, 0.0),)
        return tuple(self.ratio)

    @property
    def needs_total_steps(self) -> bool:
        """Whether a phase starts after 0, so that the length of training must be known."""
        return len(self.phases) > 1

    @property
    def keep(self) -> float:
        """The share that is computed, 1 - ratio, in (0, 1].

        Raises:
            ValueError: the ratio has several phases; `at` says which one holds.
        """
        if len(self.phases) > 1:
            raise ValueError(
                f"Reuse.keep is not defined for the {len(self.phases)} phases of Reuse.ratio {self.ratio}; "
                "ask one of them: reuse.at(fraction).keep."
            )
        ratio = self.phases[0][0]
        if isinstance(ratio, str):
            n, m = parse_n_m(ratio)
            return n / m
        return 1.0 - ratio

    def at(self, fraction: float) -> "Reuse":
        """This method with the one ratio that holds at `fraction` of training.

        A phase holds from its start, inclusive; the last one goes on past 1.0.

        Raises:
            ValueError: `fraction` is not a number >= 0.
        """
        if not is_number(fraction) or not fraction >= 0:
            raise wrong("The fraction in Reuse.at", fraction, "a number >= 0")
        return replace(self, ratio=[ratio for ratio, start in self.phases if start <= fraction][-1])


Method: TypeAlias = Reuse  # the union of all method classes

# What each field of a Schedule accepts besides None, which is the exact gradient. A further method is
# added here (and to the union above); construction, at(), to_dict() and from_dict() all read this table.
METHODS: dict[str, tuple[type[Method], ...]] = {
    "linear": (Reuse,),
    "attention": (),
    "blocks": (),
    "saved_activations": (),
    "weight_gradients": (),
}


@dataclass(frozen=True)
class Phase:
    """What holds at one step: each method of the schedule with its ratio resolved to a single value."""

    step: int
    fraction: float
    linear: Method | None
    attention: Method | None
    blocks: Method | None
    saved_activations: Method | None
    weight_gradients: Method | None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which gradients are estimated, by which method, in which modules and when.

    Args:
        linear: the method for linear layers, a `Reuse`. None is exact: only rows of the output gradient
            that are exactly zero are skipped.
        attention, blocks, saved_activations, weight_gradients: only None in this version.
        include: patterns (see `pattern_matches`) of the modules to rewrite; empty means all of them.
        exclude: patterns of the modules to leave alone; stronger than `include`.
        skip_layers: indices of the blocks to leave alone; negative ones count from the last block.
        total_steps: the optimizer steps of the whole training, which start fractions refer to. Needed
            as soon as a phase starts after 0.

    A single pattern or index stands for a sequence of one; sequences are stored as tuples.

    Raises:
        ValueError: a value is not among those above, or fractions are given without `total_steps`.
    """

    linear: Method | None = None
    attention: Method | None = None
    blocks: Method | None = None
    saved_activations: Method | None = None
    weight_gradients: Method | None = None
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    skip_layers: int | Sequence[int] = ()
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for field in METHODS:
            _check_method(field, getattr(self, field))
        _store(self, "include", _patterns("Schedule.include", self.include))
        _store(self, "exclude", _patterns("Schedule.exclude", self.exclude))
        _store(self, "skip_layers", _block_indices(self.skip_layers))
        if self.total_steps is not None:
            _store(self, "total_steps", _integer("Schedule.total_steps", self.total_steps, at_least=1))
        for field, method in self._methods().items():
            if method is not None and method.needs_total_steps and self.total_steps is None:
                late = next(phase for phase in method.phases if phase[1] > 0)
                raise ValueError(
                    f"Schedule.{field} has the phase {late}, which starts after 0: fractions without "
                    "total_steps have no meaning; give Schedule.total_steps, an int >= 1."
                )

    @classmethod
    def exact(cls, **options: Any) -> "Schedule":
        """No gradient is changed: only what is exactly zero is skipped.

        `options` are `include`, `exclude`, `skip_layers` and `total_steps`.
        """
        methods: dict[str, Any] = dict.fromkeys(METHODS)
        return cls(**methods, **options)

    @classmethod
    def resprop(cls, ratio: float | Sequence[tuple[float, float]] = 0.9, **options: Any) -> "Schedule":
        """ReSprop with its paper's own choices (Goli & Aamodt, CVPR 2020), for linear layers.

        The base is the output gradient of one random sample of the previous iteration; of the difference
        to it, the single entries of largest magnitude are kept. `options` as in `exact`.
        """
        linear = Reuse(ratio, granularity="element", source="sample")
        return replace(cls.exact(**options), linear=linear)

    def fraction(self, step: int) -> float:
        """The share of training done after `step` optimizer steps, in [0, 1]; 0.0 without `total_steps`.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        step = _integer("The step of a schedule", step, at_least=0)
        return 0.0 if self.total_steps is None else min(step, self.total_steps) / self.total_steps

    def at(self, step: int) -> Phase:
        """What holds in the step that follows `step` optimizer steps.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        fraction = self.fraction(step)
        resolved = {field: method and method.at(fraction) for field, method in self._methods().items()}
        return Phase(int(step), fraction, **resolved)

    def reason_left_out(self, name: str) -> str | None:
        """Why `include` and `exclude` leave out the module path `name`; None if they select it."""
        if self.include and not any(pattern_matches(pattern, name) for pattern in self.include):
            return f"matches no include pattern ({_listed(self.include)})"
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
                        f"{len(paths)} module paths; near names: {_near(pattern, names) or 'none'}."
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

    def check_blocks(self, count: int) -> None:
        """Refuse indices in `skip_layers` that a model of `count` blocks does not have.

        Raises:
            ValueError: an index is not in [-count, count).
        """
        for index in cast(tuple[int, ...], self.skip_layers):
            if not -count <= index < count:
                allowed = (
                    f"an int in [{-count}, {count}) for {count} blocks" if count else "nothing: no blocks"
                )
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
        _check_keys("Schedule", values, cls)
        return cls(**{k: _method_from_dict(k, v) if k in METHODS else v for k, v in values.items()})

    def _methods(self) -> dict[str, Method | None]:
        return {field: getattr(self, field) for field in METHODS}


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether the glob `pattern` selects the module at the dotted `path`, or a module that contains it.

    A pattern is compared (`fnmatch.fnmatchcase`) with every run of neighbouring components of the path:
    it may begin at any module on the way, and takes in everything below the module it ends at. So
    "layer.1" selects "enc.layer.1.dense" but not "enc.layer.11.dense". `*` may cross dots.
    """
    parts = path.split(".")
    ends = range(1, len(parts) + 1)
    return any(fnmatchcase(".".join(parts[start:end]), pattern) for end in ends for start in range(end))


def _store(instance: object, field: str, value: object) -> None:
    """Set a field of a frozen dataclass to its checked form, from its own `__post_init__`."""
    object.__setattr__(instance, field, value)


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise wrong(field, value, " or ".join(f'"{name}"' for name in allowed))
    return value


def _integer(field: str, value: object, at_least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise wrong(field, value, f"an int >= {at_least}")
    return int(value)


def _patterns(field: str, value: object) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise wrong(field, value, "a non-empty str or a list of them")
    return tuple(patterns)


def _block_indices(value: object) -> tuple[int, ...]:
    indices = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in indices):
        raise wrong("Schedule.skip_layers", value, "an int or a list of ints")
    if len(set(indices)) < len(indices):
        raise wrong("Schedule.skip_layers", value, "a list of ints without duplicates")
    return tuple(int(i) for i in indices)


def _check_method(field: str, value: object) -> None:
    accepted = METHODS[field]
    if value is None or isinstance(value, accepted):
        return
    if not accepted:
        raise ValueError(f"Schedule.{field}: {value!r} is not available in this version (only None is).")
    names = [cls.__name__ for cls in accepted]
    raise wrong(f"Schedule.{field}", value, f"None or {' or '.join(names)}, e.g. {field}={names[0]}(0.9)")


def _method_from_dict(field: str, value: object) -> Any:
    """The method that a dict describes; anything else as it is, for the constructor to judge."""
    by_name = {cls.method: cls for cls in METHODS[field]}
    if not isinstance(value, Mapping) or not by_name:
        return value
    options = dict(value)
    name = _one_of(f'Schedule.{field}["method"]', options.pop("method", None), tuple(by_name))
    _check_keys(f"Schedule.{field}", options, by_name[name])
    return by_name[name](**options)


def _check_keys(owner: str, given: Mapping[str, object], cls: type) -> None:
    """Refuse keys that are no field of the dataclass `cls`, and the lack of one that has no default."""
    names = [field.name for field in fields(cls)]
    for key in given:
        if key not in names:
            near = _near(str(key), names)
            raise ValueError(
                f"{owner} has the unknown key {key!r}; near names: {near or 'none'}; "
                f"allowed are {_listed(names)}."
            )
    for field in fields(cls):
        if field.default is field.default_factory is MISSING and field.name not in given:
            raise ValueError(f"{owner} lacks the key {field.name!r}, which is required.")


def _jsonable(value: object) -> Any:
    if isinstance(value, Method):
        return {"method": value.method} | {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value


def _near(name: str, candidates: Iterable[str]) -> str:
    """Up to five of `candidates` that look like `name`, quoted; empty if none does."""
    return _listed(get_close_matches(name, dict.fromkeys(candidates), n=5))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
