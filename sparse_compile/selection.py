"""Which layers a method for weight gradients is for: those that it names, or the MLPs of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from torch import nn

from sparse_compile import naming
from sparse_compile.checks import listed, near
from sparse_compile.schedule import pattern_matches
from sparse_compile.settings.rotate import RotatedTopK

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def chosen_layers(root: nn.Module, method: RotatedTopK) -> frozenset[str]:
    """The names of the layers of a model whose weights ``method`` is for.

    Raises:
        ValueError: FSDP2 has sharded the model, a pattern of ``where`` matches none, or there is no ``where``
            and no MLP is found.
    """
    if naming.is_sharded(root):
        raise ValueError(
            "Schedule.weight_gradients was given a model that fully_shard has sharded, whose optimizer never "
            "has a whole gradient; allowed is a model that is not sharded."
        )
    shapes = dict(_matrices(root))
    if method.where is None:
        found = frozenset(_mlps(shapes))
        if not found:
            raise ValueError(
                "Schedule.weight_gradients found no MLP in the model (two layers of a repeated block that "
                f"widen and narrow again); name layers by where=; there are {len(shapes)}: "
                f"{listed(list(shapes)[:5]) or 'none'}{', ...' if len(shapes) > 5 else ''}."
            )
        return found
    found = frozenset()
    for pattern in cast(tuple[str, ...], method.where):
        matched = {name for name in shapes if pattern_matches(pattern, name)}
        if not matched:
            close = near(pattern, [*shapes, *(part for name in shapes for part in name.split("."))])
            raise ValueError(
                f"Schedule.weight_gradients has where='{pattern}', which matches none of {len(shapes)} "
                f"layers with a weight matrix; near names: {close or 'none'}."
            )
        found |= matched
    return found


def _matrices(root: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """The layers of a model that have a parameter of two dimensions, and its shape. Embeddings are not among
    them, nor what is tied to one."""
    embeddings = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for name, parameter in root.named_parameters():
        if parameter.dim() == 2 and id(parameter) not in embeddings:
            yield naming.layer_of(naming.clean(name)), (parameter.shape[0], parameter.shape[1])


def _mlps(shapes: dict[str, tuple[int, int]]) -> Iterator[str]:
    """The layers that widen the features of a repeated block and those that narrow them again: pairs of
    weights [F, H] and [H, F], whichever side is the input (a Conv1D's is the first).

    Attention's projections may be such a pair, too, and go by their name. In a bottleneck (an adapter, LoRA)
    it is the larger size that all layers of the block share.
    """
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            blocks.setdefault(".".join(parts[: at + 1]), {})[name] = shape
    for path, block in blocks.items():
        shared = set.intersection(*(set(shape) for shape in block.values()))
        for name, shape in block.items():
            narrow, wide = sorted(shape)
            paired = narrow < wide and shape[::-1] in block.values()
            bottleneck = wide in shared and narrow not in shared
            if paired and not bottleneck and not _ATTENTION.search(name.removeprefix(path)):
                yield name
