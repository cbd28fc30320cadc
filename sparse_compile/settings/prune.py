"""`PruneSaved`: what is saved for the backward is pruned to its largest entries and packed."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_compile.checks import is_number, one_of, store, wrong

VALUES = ("same", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class PruneSaved:
    """Save only the largest entries of each activation, as a bit mask and the values at its ones.

    The forward is computed with all entries; the backward reads the pruned activations. The gradient to a
    linear's input stays exact, those that need an activation are approximate. Memory is gained, not time.

    Inputs of activation functions (GELU, SiLU, …) are not pruned but rounded to 8 bits, unless the ratio is
    0: with zeros in the place of their small entries the slopes of the function would be wrong.

    The ratio is one number for the whole training: it decides how large the packed buffers are, and those
    sizes are part of the compiled graph.

    Source: Back Razor (Jiang et al., "Back Razor: Memory-Efficient Transfer Learning by Self-Sparsified
    Backpropagation", NeurIPS 2022).

    Args:
        ratio: the share of each sample's entries that is dropped, a number in [0, 1). At 0 no entry is
            dropped; with `values="same"`, only dropout masks are packed then, and every gradient is exact.
        values: how the kept values are stored: as they are ("same"), as "fp16" or "bf16", or as "int8"
            with one scale for every 128. A form that is wider than the activation's own is not used.
        as_published: whether to prune as the paper does. By default gradients are nearer than that, for less
            memory and time: for each feature the mean over a sample's tokens is kept, and what differs most
            from it (that holds more of an activation for 1/tokens of its size, and is not done for fewer than
            16 tokens); a layer behind a layer norm or RMS norm reads the norm of the norm's own pruned input,
            which is packed once for both; and the queries, keys and values of fused attention are rounded to
            8 bits.

    Raises:
        ValueError: a value is not among those above.
    """

    method: ClassVar[str] = "prune_saved"  # the name in Schedule.to_dict
    needs_total_steps: ClassVar[bool] = False
    phases: ClassVar[tuple[tuple[float, float], ...]] = ()

    ratio: float
    values: str = "same"
    as_published: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.ratio) or not 0 <= self.ratio < 1:
            raise wrong(
                "PruneSaved.ratio",
                self.ratio,
                "one number in [0, 1), without phases: it decides the size of the packed buffers",
            )
        store(self, "ratio", float(self.ratio) + 0.0)
        if not isinstance(self.as_published, bool):
            raise wrong("PruneSaved.as_published", self.as_published, "True or False")
        store(self, "values", one_of("PruneSaved.values", self.values, VALUES))

    @property
    def exact(self) -> bool:
        """Whether what is packed is unpacked unchanged."""
        return self.ratio == 0 and self.values == "same"

    def at(self, fraction: float) -> "PruneSaved":
        """This method: it is the same at every `fraction` of training.

        Raises:
            ValueError: `fraction` is not a number >= 0.
        """
        if not is_number(fraction) or not fraction >= 0:
            raise wrong("The fraction in PruneSaved.at", fraction, "a number >= 0")
        return self
