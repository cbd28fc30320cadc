"""The controller of adaptive sampling: its decisions are the paper's, and what it sees is the truth."""

import json
import math

import pytest
import reference_vcas as reference
import torch
from recorded import BATCH, BLOCKS, F64, TOKENS, WEIGHTS, Recorded, count, observe, per_item, training

from sparse_compile import Sample, Schedule, sparse_backend
from sparse_compile.controller import Controller
from sparse_compile.methods import sample, vcas


def update(paper: reference.Paper, seen: Recorded) -> tuple[float, float, float]:
    """The paper's update; returns the sums over the weights of V_s, V_act and V_w."""
    v_sgd, v_act, v_rows = {}, {}, {}
    for name in ["head", *WEIGHTS]:
        dy, x = seen.head if name == "head" else seen.linears[name]
        v_act[name] = 0.0
        v_sgd[name] = reference.variance_of_batches(per_item(dy, x, TOKENS))
        for block, share in zip(BLOCKS, paper.rho, strict=True):
            if name.startswith(block):
                k = count(share, BATCH)
                p = reference.keep_probabilities(seen.norms[block].tolist(), k)
                v_act[name] = reference.variance_of_fixed_size(per_item(dy, x, TOKENS), p)
                kept = sample.systematic(torch.tensor(p, dtype=F64), k, seen.draw(block)).tolist()
                weights = [1 / p[b] if b in kept else 0.0 for b in range(BATCH)]
                dy = dy * torch.tensor(weights, dtype=F64).repeat_interleave(TOKENS).unsqueeze(1)
        rows = per_item(dy, x, 1)
        scores = [float(g.norm()) for g in rows]
        q = reference.keep_probabilities(scores, count(paper.nu[name], sum(s > 0 for s in scores)))
        v_rows[name] = reference.variance_of_fixed_size(rows, q)
    totals = sum(v_sgd.values()), sum(v_act.values()), sum(v_rows.values())
    paper.update_samples(totals[1], totals[0], [seen.norms[block].tolist() for block in BLOCKS])
    for name, v in v_rows.items():
        paper.update_rows(name, v, v_sgd[name])
    return totals


def decisions(controller: Controller) -> dict[str, float]:
    return {
        "s": controller.s,
        **{block: controller.sample_share(block) for block in BLOCKS},
        **{name: controller.row_share(name) for name in ["head", *WEIGHTS]},
    }


@pytest.mark.parametrize(
    "source", [lambda steps: map(Recorded, range(steps)), training], ids=["drawn", "training"]
)
def test_decisions_are_those_of_the_paper_over_many_measurements(source):
    """Large steps, so that s and the shares go down, and up again."""
    settings = {"act_tau": 0.1, "weight_tau": 0.1, "s_step": 0.05, "ratio_step": 0.8, "smoothing": 0.6}
    controller = Controller(Schedule.vcas(cal_var_freq=1, **settings))
    paper = reference.Paper([1.0] * 3, dict.fromkeys(["head", *WEIGHTS], 1.0))
    paper.act_tau = paper.weight_tau = 0.1
    paper.alpha, paper.beta, paper.smoothing = 0.05, 0.8, 0.6
    directions = set()
    for step, seen in enumerate(source(30)):
        before = controller.s, controller.row_share("layer.1.up")
        seen.show(controller)
        controller.end_of_step(step)
        v_sgd, v_act, v_rows = update(paper, seen)
        entry = controller.history[-1]
        assert (entry["step"], entry["s"]) == (step, controller.s)
        assert entry["sgd_variance"] == pytest.approx(v_sgd, rel=1e-9)
        assert entry["act_variance"] == pytest.approx(v_act, rel=1e-9)
        assert entry["weight_variance"] == pytest.approx(v_rows, rel=1e-9)
        expected = {"s": paper.s, **dict(zip(BLOCKS, paper.rho, strict=True)), **paper.nu}
        assert decisions(controller) == pytest.approx(expected, rel=1e-9)
        now = controller.s, controller.row_share("layer.1.up")
        directions |= {(i, b < a) for i, (b, a) in enumerate(zip(before, now, strict=True)) if a != b}
    assert directions == {(0, True), (0, False), (1, True), (1, False)}
    assert len(controller.history) == 30
    shares = list(entry["sample_shares"].values())
    assert shares == sorted(shares)
    assert shares[0] < 0.9


# Shares that are solved for


def coin_flips(seen: Recorded, s: float) -> float:
    """The variance of dropping samples down to the shares that s gives, at most."""
    total = largest = 0.0
    for block in BLOCKS:
        norms = seen.norms[block].tolist()
        largest = max(largest, reference.share_of_norm(norms, s))
        p = reference.keep_probabilities(norms, count(largest, BATCH))
        for name in WEIGHTS:
            if name.startswith(block):
                g = per_item(*seen.linears[name], TOKENS)
                total += sum((1 - q) / q * float(each.square().sum()) for each, q in zip(g, p, strict=True))
    return total


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_solved_s_is_the_smallest_that_its_bound_allows(seed, tau):
    setting = Sample.adaptive(update="solve", act_tau=tau, smoothing=0.0)
    controller = Controller(Schedule(blocks=setting))
    seen = Recorded(seed)
    seen.show(controller)
    controller.end_of_step(0)
    allowed = tau * controller.history[0]["sgd_variance"]
    assert coin_flips(seen, controller.s) <= allowed
    assert coin_flips(seen, controller.s - 0.01) > allowed
    assert 0.3 < controller.s < 1
    largest = 0.0
    for block in BLOCKS:
        largest = max(largest, reference.share_of_norm(seen.norms[block].tolist(), controller.s))
        assert controller.sample_share(block) == largest


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5])
def test_solved_row_shares_are_the_smallest_that_their_bound_allows(tau):
    controller = Controller(Schedule(linear=Sample.adaptive(update="solve", weight_tau=tau)))
    seen = Recorded(0)
    seen.show(controller)
    controller.end_of_step(0)
    for name, (dy, x) in {"head": seen.head, **seen.linears}.items():
        scores = [float(g.norm()) for g in per_item(dy, x, 1)]
        live = sum(score > 0 for score in scores)
        allowed = tau * reference.variance_of_batches(per_item(dy, x, TOKENS))

        def added(share, dy=dy, x=x, scores=scores, live=live):
            return reference.variance_of_rows(dy, x, reference.keep_probabilities(scores, count(share, live)))

        share = controller.row_share(name)
        assert 0.05 < share < 1
        assert added(share) <= allowed
        assert added(share * 0.95) > allowed


def test_solving_where_nothing_is_affordable_stays_exact():
    """Samples with equal gradients: SGD has no variance, so none may be added."""
    controller = Controller(Schedule.vcas(update="solve"))
    dy, x = torch.ones(BATCH * TOKENS, 4, dtype=F64), torch.ones(BATCH * TOKENS, 5, dtype=F64)
    controller.observe_samples("layer.0", torch.ones(BATCH, dtype=F64), sample.Draw("0"))
    observe(controller, "layer.0.up", dy, x)
    controller.end_of_step(0)
    assert controller.sample_share("layer.0") == controller.row_share("layer.0.up") == 1.0


def test_solving_multiplies_nothing(monkeypatch):
    """Its bounds need norms alone; products would be a third of a backward."""
    monkeypatch.setattr(vcas, "sampling_variance", None)
    controller = Controller(Schedule.vcas(update="solve", act_tau=0.5))
    Recorded(0).show(controller)
    controller.end_of_step(0)
    assert controller.s < 1


@pytest.mark.parametrize(("update", "products"), [("step", 2), ("solve", 0)])
def test_what_a_measurement_takes_is_in_the_report(update, products):
    batch, tokens, inputs, outputs = 4, 8, 6, 5
    schedule = Schedule(linear=Sample.adaptive(update=update, cal_var_freq=2))
    backend = sparse_backend(schedule, compiler="aot_eager")
    model = torch.nn.Linear(inputs, outputs)
    torch.compile(model, backend=backend)(torch.randn(batch, tokens, inputs)).square().sum().backward()
    totals = backend.report().totals
    products_and_gram = products * inputs * outputs + tokens * (inputs + outputs)
    assert totals["flops"] - totals["flops_dense"] == 2 * batch * tokens * products_and_gram


# What is measured, and when


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.vcas(cal_var_freq=3), [0, 3, 6]),
        (Schedule(linear=Sample.adaptive(cal_var_freq=5)), [0, 5]),
        (Schedule(blocks=Sample.adaptive(cal_var_freq=1)), list(range(8))),
        (Schedule(blocks=Sample(0.5), linear=Sample(0.5)), []),
        (Schedule.exact(), []),
    ],
)
def test_steps_that_are_measured(schedule, expected):
    controller = Controller(schedule)
    assert [step for step in range(8) if controller.measures(step)] == expected


def test_a_step_without_a_measurement_changes_nothing():
    controller = Controller(Schedule.vcas())
    Recorded(0).show(controller)
    controller.end_of_step(0)
    before = decisions(controller)
    controller.end_of_step(1)
    assert decisions(controller) == before
    assert [entry["step"] for entry in controller.history] == [0]


def test_only_the_first_micro_batch_of_a_step_is_looked_at():
    one, two = (Controller(Schedule.vcas(act_tau=0.1)) for _ in range(2))
    for step in range(3):
        Recorded(step).show(one)
        Recorded(step).show(two)
        Recorded(100 + step).show(two)
        for controller in (one, two):
            controller.end_of_step(step)
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_no_measurement(bad):
    controller = Controller(Schedule.vcas())
    dy, x = Recorded(0).head
    dy[3, 1] = bad
    observe(controller, "head", dy, x)
    controller.end_of_step(0)
    assert controller.history == []
    assert controller.row_share("head") == 1.0


def test_what_was_seen_before_an_overflow_in_the_same_backward_is_forgotten():
    """Its step is skipped, and the batch that comes next is another, at another scale of the loss."""
    one, two = (Controller(Schedule.vcas(act_tau=0.1)) for _ in range(2))
    for step in range(3):
        overflow = Recorded(100 + step)
        overflow.linears["layer.0.up"][0][7, 1] = math.inf
        overflow.show(two)
        for controller in (one, two):
            Recorded(step).show(controller)
            controller.end_of_step(step)
    assert one.state_dict() == two.state_dict()
    overflow.show(two)
    two.end_of_step(3)
    assert one.state_dict() == two.state_dict()


def test_a_batch_that_says_nothing_of_variance_is_no_measurement():
    """One sample, or rows that are not so many of each sample, or no gradient at all."""
    controller = Controller(Schedule.vcas())
    dy, x = Recorded(0).head
    observe(controller, "one sample", dy[:TOKENS], x[:TOKENS])
    observe(controller, "ragged", dy[:-1], x[:-1])
    controller.observe_samples("layer.0", torch.zeros(4), sample.Draw("0"))
    controller.end_of_step(0)
    assert controller.history == []


def test_a_batch_of_one_sample_leaves_nothing_to_the_next_measurement():
    one, two = (Controller(Schedule.vcas(act_tau=0.1, s_step=0.5)) for _ in range(2))
    two.observe_samples("layer.1", torch.ones(1, dtype=F64), sample.Draw("0"))
    two.end_of_step(0)
    for controller in (one, two):
        Recorded(1).show(controller)
        controller.end_of_step(100)
    assert one.state_dict() == two.state_dict()
    assert one.sample_share("layer.1") < 1


@pytest.mark.parametrize("update", ["step", "solve"])
@pytest.mark.parametrize("first", ["frozen", "other samples"])
def test_nothing_is_dropped_where_no_weight_of_the_first_block_was_measured(update, first):
    """As where it is frozen below trained embeddings, or a model pools or unfolds the batch inside a block:
    what is not seen must not look free."""
    controller = Controller(Schedule.vcas(act_tau=0.1, update=update))
    for step in range(8):
        seen = Recorded(step)
        for block in ("layer.1", "layer.0"):
            norms = (
                seen.norms[block][:5] if (block, first) == ("layer.0", "other samples") else seen.norms[block]
            )
            controller.observe_samples(block, norms, sample.Draw(str(step)))
            if (block, first) != ("layer.0", "frozen"):
                observe(controller, f"{block}.up", *seen.linears[f"{block}.up"])
        controller.end_of_step(step)
    assert controller.sample_share("layer.0") == controller.sample_share("layer.1") == controller.s == 1.0
    assert controller.row_share("layer.1.up") < 1


@pytest.mark.parametrize("clip", [None, "auto"])
def test_state_continues_where_it_was_taken(clip):
    controller = Controller(Schedule.vcas(act_tau=0.1, s_step=0.05, clip=clip))
    for step in range(6):
        Recorded(step).show(controller)
        controller.end_of_step(step)
    again = Controller(Schedule.vcas(act_tau=0.1, s_step=0.05, clip=clip))
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    taken = controller.state_dict()
    for step in range(6, 12):
        for each in (controller, again):
            Recorded(step).show(each)
            each.end_of_step(step)
    assert again.state_dict() == controller.state_dict()
    assert taken["sample_shares"] != controller.state_dict()["sample_shares"]
    assert len(taken["history"]) == 6
    assert bool(taken["caps"]) == (clip == "auto")
    assert [again.cap(name) for name in WEIGHTS] == [controller.cap(name) for name in WEIGHTS]


# The closed form against the paper's extra passes


def toy_loss(out):
    """A sum over samples, each with another weight; B of them are a batch."""
    return (out.square().sum((1, 2)) * out[:, 0, 0].sigmoid()).sum() / len(out)


def toy_batch(seed):
    """Independent samples, some of which matter much more than others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(BATCH, 1, 1, generator=generator, dtype=F64).mul(0.5).exp()
    return scale * torch.randn(BATCH, TOKENS, 6, generator=generator, dtype=F64)


BATCHES, PROBES = 150, 16


def closed_form(model, shares, batches):
    """(SGD, dropping samples) of every weight as the controller sees them: means over the batches."""
    torch._dynamo.reset()
    backend = sparse_backend(Schedule(blocks=Sample.adaptive(cal_var_freq=1)), compiler="aot_eager")
    compiled = torch.compile(model, backend=backend)
    controller = backend._runtime.controller
    sgd, act = {}, {}
    for x in batches:
        controller._sample_shares = dict(shares)
        toy_loss(compiled(x)).backward()
        for name, weight in controller._seen_weights.items():
            sgd[name] = sgd.get(name, 0.0) + weight.sgd / len(batches)
            act[name] = act.get(name, 0.0) + weight.act / len(batches)
        controller._seen_blocks, controller._seen_weights = {}, {}
    return sgd, act


# The truth has 5 % of error of its own, from 150 batches. The closed form is 7 to 14 % low: Hájek's formula
# is, for draws of 4 to 12 of 16, and it takes the samples behind the first block as drawn at once, where in
# truth they are drawn from those that the second block left over.
@pytest.mark.filterwarnings("ignore:100 backwards and no step")
@pytest.mark.parametrize("shares", [(0.5, 0.75), (0.25, 0.5), (0.5, 0.5)])
def test_the_closed_form_agrees_with_the_papers_monte_carlo_probing(shares):
    """One ordinary backward of each batch says what 16 more with sampling say, for every weight."""
    torch.manual_seed(0)
    model = reference.Blocks().double()
    batches = [toy_batch(seed) for seed in range(BATCHES)]
    v_sgd, v_act = reference.probe(model, toy_loss, batches, list(shares), PROBES)
    sgd, act = closed_form(model, dict(zip(("blocks.0", "blocks.1"), shares, strict=True)), batches)
    assert {f"{name}.weight" for name in sgd} == set(v_sgd)
    for name in sgd:
        assert sgd[name] == pytest.approx(v_sgd[f"{name}.weight"], rel=0.1)
        assert act[name] == pytest.approx(v_act[f"{name}.weight"], rel=0.2)


def test_the_comparison_above_tells_the_blocks_apart():
    """Other shares give variances that differ by more than its tolerance, so a wrong block would be seen."""
    torch.manual_seed(0)
    model, batches = reference.Blocks().double(), [toy_batch(seed) for seed in range(40)]
    _, act = closed_form(model, {"blocks.0": 0.5, "blocks.1": 0.75}, batches)
    assert min(act[f"blocks.0.{name}"] for name in ("up", "down")) > 5 * max(
        act[f"blocks.1.{name}"] for name in ("up", "down")
    )
