"""Which modules of a model are meant: patterns of their paths, and indices of their blocks."""

from fnmatch import fnmatchcase
from numbers import Integral

from sparse_compile.checks import wrong


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether the glob `pattern` selects the module at the dotted `path`, or a module that contains it.

    A pattern is compared (`fnmatch.fnmatchcase`) with every run of neighbouring components of the path:
    it may begin at any module on the way, and takes in everything below the module it ends at. So
    "layer.1" selects "enc.layer.1.dense" but not "enc.layer.11.dense". `*` may cross dots.
    """
    parts = path.split(".")
    ends = range(1, len(parts) + 1)
    return any(fnmatchcase(".".join(parts[start:end]), pattern) for end in ends for start in range(end))


def patterns(field: str, value: object) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(p, str) and p for p in found):
        raise wrong(field, value, "a non-empty str or a list of them")
    return tuple(found)


def block_indices(value: object) -> tuple[int, ...]:
    indices = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in indices):
        raise wrong("Schedule.skip_layers", value, "an int or a list of ints")
    if len(set(indices)) < len(indices):
        raise wrong("Schedule.skip_layers", value, "a list of ints without duplicates")
    return tuple(int(i) for i in indices)
