"""A model compiled by the backend and its eager reference, trained side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import (
    MLP,
    Recipe,
    assert_same_gradients,
    dense_gradients,
    grads_of,
    reference_linears,
    reference_of,
    same,
    square_loss,
)
from torch import Tensor, nn

from sparse_compile import Reuse, Schedule, SparseBackend, sparse_backend

Loss = Callable[[Tensor], Tensor]


def batch(samples: int = 6, tokens: int = 5) -> Tensor:
    """Inputs for the models of tests/reference.py. Float64, so that no choice of rows hangs on a rounding."""
    return torch.randn(samples, tokens, 6, dtype=torch.float64)


def backend_for(schedule: Schedule | None = None) -> SparseBackend:
    return sparse_backend(schedule or Schedule(linear=Reuse(0.7)), compiler="aot_eager")


def together(*modules: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Run forward and backward of each module, from no gradients."""
    for module in modules:
        module.zero_grad()
        run(module).backward()


def is_dense(model: nn.Module, x: Tensor, loss: Loss = square_loss) -> bool:
    """Whether the gradients of a model, given uncompiled, are the true ones."""
    return same(grads_of(model), dense_gradients(model, x, loss))


class Pair:
    """A compiled model and its reference, each with its optimizer.

    Attributes:
        model: the model itself, not compiled; it has the compiled one's parameters.
        input_gradient: of the last backward.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        schedule: Schedule | None = None,
        recipe: Recipe | None = None,
        backend: SparseBackend | None = None,
    ) -> None:
        self.model = (MLP() if model is None else model).double()
        self.recipe = Recipe(0.7) if recipe is None else recipe
        self.reference = reference_of(self.model, self.recipe)
        self.backend = backend_for(schedule) if backend is None else backend
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.model, self.reference)]
        self.input_gradient: Tensor | None = None

    def train(self, x: Tensor, loss: Loss = square_loss) -> bool:
        """One step of both; whether the gradients, which must be the same, are those of a dense backward."""
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        together(self.compiled, run=lambda module: loss(module(ours)))
        together(self.reference, run=lambda module: loss(module(theirs)))
        assert_same_gradients(self.model, self.reference, self.backend.step)
        assert same([ours.grad], [theirs.grad])
        self.input_gradient = ours.grad
        dense = is_dense(self.model, x, loss)
        self.step()
        return dense

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def lane(self, lane: int) -> None:
        """Which memory the reference's forwards use from now on."""
        for linear in reference_linears(self.reference):
            linear.lane = lane

    def forget(self) -> None:
        """Take the reference's memory."""
        for linear in reference_linears(self.reference):
            linear.forget()

    def rows_computed(self) -> dict[str, int]:
        return {site.name: site.rows_computed for site in self.backend.report().sites}
