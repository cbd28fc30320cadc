"""Training with reuse through torch.compile, held step by step against the eager reference.

Everything is float64, so that equal means equal to 1e-9 and no choice of rows hangs on a rounding.
"""

import pytest
import torch
from reference import (
    MLP,
    Recipe,
    Transformer,
    assert_same_gradients,
    dense_gradients,
    gradients,
    grads_of,
    reference_linears,
    reference_of,
    same,
    square_loss,
)
from torch import nn

from sparse_compile import Reuse, Schedule, sparse_backend

SAMPLES, TOKENS = 6, 5
MODELS = {"mlp": MLP, "transformer": Transformer}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(7)


def batch(samples=SAMPLES, tokens=TOKENS, **options):
    return torch.randn(samples, tokens, 6, dtype=torch.float64, **options)


def reusing(reuse: Reuse, **options) -> Schedule:
    return Schedule(linear=reuse, **options)


class Pair:
    """A compiled model and its reference, trained side by side by their own optimizers."""

    def __init__(self, model: nn.Module, schedule: Schedule, recipe: Recipe) -> None:
        self.model = model.double()
        self.recipe = recipe
        self.reference = reference_of(self.model, recipe)
        self.backend = sparse_backend(schedule, compiler="aot_eager")
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizers = [
            torch.optim.AdamW(each.parameters(), lr=0.01) for each in (self.model, self.reference)
        ]
        self.steps = 0

    def step(self, x, loss=square_loss) -> bool:
        """One optimizer step of both; returns whether the gradients were those of a dense backward."""
        truth = dense_gradients(self.model, x, loss)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss(self.compiled(x)).backward()
        loss(self.reference(x)).backward()
        assert_same_gradients(self.model, self.reference, self.steps)
        dense = same(grads_of(self.model), truth)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        return dense

    def rows_computed(self) -> dict[str, int]:
        return {site.name: site.rows_computed for site in self.backend.report().sites}


# Keep 0.85 computes 26 of 30 rows and 5 of the base, which is more than there are; the transformer's embed
# layer has no dX.
CASES = {
    "row-0.3": (Reuse(0.7), Recipe(0.7)),
    "row-0.85": (Reuse(0.15), Recipe(0.15)),
    "row-one": (Reuse(0.96), Recipe(0.96)),
    "row-refresh-3": (Reuse(0.7, refresh_every=3), Recipe(0.7, refresh_every=3)),
    "element-0.3": (Reuse(0.7, granularity="element"), Recipe(0.7, "element")),
    "element-refresh-3": (
        Reuse(0.6, granularity="element", refresh_every=3),
        Recipe(0.6, "element", refresh_every=3),
    ),
    "2:4": (Reuse("2:4"), Recipe((2, 4), "n:m")),
    "1:4-refresh-3": (Reuse("1:4", refresh_every=3), Recipe((1, 4), "n:m", refresh_every=3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_every_gradient_equals_the_reference_at_every_step(model, case):
    pair = Pair(MODELS[model](), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.step(batch()) for _ in range(7)]
    assert dense == [True, False, False, False, False, False, False]


def test_inputs_without_tokens_share_one_base_row():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    dense = [pair.step(torch.randn(20, 6, dtype=torch.float64)) for _ in range(4)]
    assert dense == [True, False, False, False]
    assert pair.rows_computed()["second"] == 20 + 3 * (6 + 1)


def test_inputs_of_four_dimensions_have_all_inner_ones_as_tokens():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    dense = [pair.step(torch.randn(5, 3, 2, 6, dtype=torch.float64)) for _ in range(4)]
    assert dense == [True, False, False, False]
    assert pair.rows_computed()["second"] == 30 + 3 * (9 + 6)


def test_the_rows_of_the_products_are_counted():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    for _ in range(3):
        pair.step(batch())
    assert pair.rows_computed() == dict.fromkeys(("first", "second", "head"), 30 + 2 * (9 + 5))


def test_phases_change_at_their_steps_and_the_first_step_of_reuse_is_dense():
    recipe = Recipe(0.0)
    schedule = reusing(Reuse([(0.0, 0.0), (0.5, 0.4), (0.8, 0.7)]), total_steps=10)
    pair = Pair(Transformer(), schedule, recipe)
    dense = []
    for step in range(10):
        recipe.ratio = 0.0 if step < 4 else 0.5 if step < 7 else 0.8
        dense.append(pair.step(batch()))
        assert pair.backend.step == step + 1
    assert dense == [True] * 5 + [False] * 5


def test_a_phase_without_reuse_in_the_middle_leaves_the_base_to_the_next():
    """The base is the one that the last backward with reuse made."""
    recipe = Recipe(0.5)
    schedule = reusing(Reuse([(0.5, 0.0), (0.0, 0.3), (0.7, 0.6)]), total_steps=10)
    pair = Pair(MLP(), schedule, recipe)
    dense = []
    for step in range(8):
        recipe.ratio = 0.5 if step < 3 else 0.0 if step < 6 else 0.7
        dense.append(pair.step(batch()))
    assert dense == [True, False, False, True, True, True, False, False]


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize("model", MODELS)
def test_ratio_zero_is_dense(model, granularity):
    pair = Pair(MODELS[model](), reusing(Reuse(0.0, granularity=granularity)), Recipe(0.0))
    assert [pair.step(batch()) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_smaller_last_batch_still_reuses(case):
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.step(batch(samples)) for samples in (6, 6, 4, 6, 6, 4)]
    assert dense == [True, False, False, False, False, False]


def test_a_batch_of_one_still_reuses():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    assert [pair.step(batch(samples)) for samples in (6, 1, 6)] == [True, False, False]


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_changed_token_count_is_dense_and_makes_a_fresh_base(case):
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.step(batch(tokens=tokens)) for tokens in (5, 5, 7, 7, 5, 5)]
    assert dense == [True, False, True, False, True, False]


def test_changed_token_count_shows_in_the_report():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    computed = []
    for tokens in (5, 5, 7, 7):
        before = pair.rows_computed().get("second", 0) if computed else 0
        pair.step(batch(tokens=tokens))
        computed.append(pair.rows_computed()["second"] - before)
    assert computed == [30, 9 + 5, 42, 13 + 7]


@pytest.mark.parametrize("case", ["row-0.3", "row-0.85", "element-0.3", "2:4"])
def test_zero_rows_stay_zero(case):
    """A loss masked per token: its rows of dY are zero, and no base may be added there."""
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    for step in range(4):
        mask = torch.rand(SAMPLES, TOKENS, 1, dtype=torch.float64) < 0.5
        x = batch(requires_grad=True)

        def loss(out, mask=mask):
            return ((out - 1.0) ** 2 * mask).mean()

        pair.step(x, loss)
        both, x.grad = x.grad, None  # of the compiled model and the reference together
        loss(pair.reference(x)).backward()
        assert step == 0 or both.ne(0).any()
        assert bool((both.masked_select(~mask) == 0).all())
    for site in pair.backend.report().sites:
        assert 0 < site.rows_skipped < site.rows == 4 * 30


def test_input_gradients_equal_the_reference():
    pair = Pair(Transformer(), reusing(Reuse(0.7)), Recipe(0.7))
    for _ in range(3):
        x = batch()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for module, each in zip((pair.compiled, pair.reference), inputs, strict=True):
            module.zero_grad()
            square_loss(module(each)).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-14)


def test_bias_gradients_are_exact():
    """db sums dY itself: at the last layers, whose dY depends on no estimate, it is the dense one."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    compiled = torch.compile(model, backend=sparse_backend(reusing(Reuse(0.9)), compiler="aot_eager"))
    for step in range(3):
        x = batch()
        weight, bias = dense_gradients(model, x)
        model.zero_grad()
        square_loss(compiled(x)).backward()
        assert same([model[0].bias.grad], [bias])
        assert same([model[0].weight.grad], [weight]) == (step == 0)


@pytest.mark.parametrize(
    ("reuse", "recipe"),
    [
        (Reuse(0.7, source="sample"), Recipe(0.7)),
        (Reuse(0.7, granularity="element", source="sample"), Recipe(0.7, "element")),
        (Reuse("2:4", source="sample"), Recipe((2, 4), "n:m")),
        (Reuse(0.7, source="sample", refresh_every=2), Recipe(0.7, refresh_every=2)),
    ],
)
def test_a_sampled_base_is_one_of_the_samples_and_not_always_the_same(reuse, recipe):
    """Which one is the backend's secret, so all are tried: exactly one of them explains each gradient."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    compiled = torch.compile(model, backend=sparse_backend(reusing(reuse), compiler="aot_eager"))
    remembered, chosen = None, []
    for step in range(10):
        x, dy = batch(), torch.randn(SAMPLES, TOKENS, 5, dtype=torch.float64)
        model.zero_grad()
        compiled(x).backward(dy)
        if remembered is not None:
            explained = [
                sample
                for sample in range(SAMPLES)
                if same(
                    [model[0].weight.grad],
                    [
                        gradients(
                            dy.flatten(0, 1),
                            x.flatten(0, 1),
                            model[0].weight.detach(),
                            remembered[sample],
                            recipe,
                        )[1]
                    ],
                )
            ]
            assert len(explained) == 1, f"step {step}: samples {explained} explain the gradient"
            chosen += explained
        if step % recipe.refresh_every == 0:
            remembered = dy
    assert len(set(chosen)) > 1
    if recipe.refresh_every == 2:  # one choice serves two backwards
        assert chosen[0:8:2] == chosen[1:9:2]


def test_a_sampled_base_through_several_layers():
    """A batch of one has only one sample to choose, which is also its mean."""
    schedule = reusing(Reuse(0.7, granularity="element", source="sample"))
    pair = Pair(Transformer(), schedule, Recipe(0.7, "element", sample=0))
    assert [pair.step(batch(1)) for _ in range(4)] == [True, False, False, False]


def test_forgetting_gives_another_answer():
    """The tests above see the base: without it the reference no longer agrees."""
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    pair.step(batch())
    for linear in reference_linears(pair.reference):
        linear.forget()
    with pytest.raises(AssertionError, match="is off by"):
        pair.step(batch())
