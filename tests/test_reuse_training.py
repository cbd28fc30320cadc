"""Training with reuse through torch.compile, held step by step against the eager reference.

Everything is float64, so that equal means equal to 1e-9 and no choice of rows hangs on a rounding.
"""

import pytest
import torch
from reference import MLP, Recipe, Transformer, dense_gradients, gradients, same, square_loss
from torch import nn
from training import Pair, backend_for, batch

from sparse_compile import Reuse, Schedule

SAMPLES, TOKENS = 6, 5  # of a batch
MODELS = {"mlp": MLP, "transformer": Transformer}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


def reusing(reuse: Reuse, **options) -> Schedule:
    return Schedule(linear=reuse, **options)


# Keep 0.85 computes 26 of 30 rows and 5 of the base, which is more than there are.
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


@pytest.mark.parametrize(
    ("model", "case"),
    [("mlp", case) for case in CASES] + [("transformer", case) for case in ("row-0.3", "element-0.3", "2:4")],
)
def test_every_gradient_equals_the_reference_at_every_step(model, case):
    pair = Pair(MODELS[model](), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.train(batch()) for _ in range(6)]
    assert dense == [True, False, False, False, False, False]


def test_inputs_without_tokens_share_one_base_row():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    dense = [pair.train(torch.randn(20, 6, dtype=torch.float64)) for _ in range(4)]
    assert dense == [True, False, False, False]
    assert pair.rows_computed()["second"] == 20 + 3 * (6 + 1)


def test_inputs_of_four_dimensions_have_all_inner_ones_as_tokens():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    dense = [pair.train(torch.randn(5, 3, 2, 6, dtype=torch.float64)) for _ in range(4)]
    assert dense == [True, False, False, False]
    assert pair.rows_computed()["second"] == 30 + 3 * (9 + 6)


def test_the_rows_of_the_products_are_counted():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    for _ in range(3):
        pair.train(batch())
    assert pair.rows_computed() == dict.fromkeys(("first", "second", "head"), 30 + 2 * (9 + 5))


def test_phases_change_at_their_steps_and_the_first_step_of_reuse_is_dense():
    recipe = Recipe(0.0)
    schedule = reusing(Reuse([(0.0, 0.0), (0.5, 0.4), (0.8, 0.7)]), total_steps=10)
    pair = Pair(Transformer(), schedule, recipe)
    dense = []
    for step in range(10):
        recipe.ratio = 0.0 if step < 4 else 0.5 if step < 7 else 0.8
        dense.append(pair.train(batch()))
        assert pair.backend.step == step + 1
    assert dense == [True] * 5 + [False] * 5


def test_a_phase_without_reuse_in_the_middle_leaves_no_base_to_the_next():
    """It would be of long ago."""
    recipe = Recipe(0.5)
    schedule = reusing(Reuse([(0.5, 0.0), (0.0, 0.3), (0.7, 0.6)]), total_steps=10)
    pair = Pair(MLP(), schedule, recipe)
    dense = []
    for step in range(8):
        recipe.ratio = 0.5 if step < 3 else 0.0 if step < 6 else 0.7
        dense.append(pair.train(batch()))
    assert dense == [True, False, False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("model", "granularity"), [("mlp", "row"), ("mlp", "element"), ("transformer", "row")]
)
def test_ratio_zero_is_dense(model, granularity):
    pair = Pair(MODELS[model](), reusing(Reuse(0.0, granularity=granularity)), Recipe(0.0))
    assert [pair.train(batch()) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_a_last_batch_that_is_smaller_is_dense_and_leaves_the_base(case):
    """Of a mean loss its gradients are larger: the base would be of no use to it, nor its own to the next."""
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.train(batch(samples)) for samples in (6, 6, 4, 6, 5, 6, 1, 6, 6)]
    assert dense == [True, False, True, False, False, False, True, False, False]


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_another_batch_size_that_stays_makes_a_fresh_base(case):
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.train(batch(samples)) for samples in (6, 6, 3, 3, 3, 1, 1, 1)]
    assert dense == [True, False, True, True, False, True, True, False]


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_changed_token_count_is_dense_and_makes_a_fresh_base(case):
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    dense = [pair.train(batch(tokens=tokens)) for tokens in (5, 5, 7, 7, 5, 5)]
    assert dense == [True, False, True, False, True, False]


def test_changed_token_count_shows_in_the_report():
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    computed = []
    for tokens in (5, 5, 7, 7):
        before = pair.rows_computed().get("second", 0) if computed else 0
        pair.train(batch(tokens=tokens))
        computed.append(pair.rows_computed()["second"] - before)
    assert computed == [30, 9 + 5, 42, 13 + 7]


@pytest.mark.parametrize("case", ["row-0.3", "element-0.3", "2:4"])
def test_zero_rows_stay_zero(case):
    """A loss masked per token: its rows of dY are zero, and no base may be added there."""
    pair = Pair(MLP(), reusing(CASES[case][0]), CASES[case][1])
    for step in range(4):
        mask = torch.rand(SAMPLES, TOKENS, 1, dtype=torch.float64) < 0.5

        def loss(out, mask=mask):
            return ((out - 1.0) ** 2 * mask).mean()

        assert pair.train(batch(), loss) == (step == 0)
        assert bool((pair.input_gradient.masked_select(~mask) == 0).all())
        assert bool(pair.input_gradient.masked_select(mask).ne(0).any())
    for site in pair.backend.report().sites:
        assert site.rows == 4 * 30
        assert case != "row-0.3" or 0 < site.rows_skipped < site.rows  # the others write the estimate out


def test_bias_gradients_are_exact():
    """db sums dY itself: at the last layers, whose dY depends on no estimate, it is the dense one."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    compiled = torch.compile(model, backend=backend_for(reusing(Reuse(0.9))))
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
    compiled = torch.compile(model, backend=backend_for(reusing(reuse)))
    remembered, chosen = None, []
    for step in range(7):
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
        assert chosen[0::2] == chosen[1::2]


def test_a_sampled_base_through_several_layers():
    """A batch of one has only one sample to choose, which is also its mean."""
    schedule = reusing(Reuse(0.7, granularity="element", source="sample"))
    pair = Pair(Transformer(), schedule, Recipe(0.7, "element", sample=0))
    assert [pair.train(batch(1)) for _ in range(4)] == [True, False, False, False]


def test_forgetting_gives_another_answer():
    """The tests above see the base: without it the reference no longer agrees."""
    pair = Pair(MLP(), reusing(Reuse(0.7)), Recipe(0.7))
    pair.train(batch())
    pair.forget()
    with pytest.raises(AssertionError, match="is off by"):
        pair.train(batch())
