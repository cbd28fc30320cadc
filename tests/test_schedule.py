"""One short test per rule of `Reuse` and `Schedule`; a refusal is always checked by its sentence."""

import json
import re
from dataclasses import FrozenInstanceError, replace

import pytest

from sparse_compile.patterns import pattern_matches
from sparse_compile.schedule import METHODS, Schedule
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.sample import Sample

DENSE_THEN_REUSE = [(0.0, 0.0), (0.9, 0.25)]

PATHS = [
    "bert.embeddings.word_embeddings",
    "bert.encoder.layer.1.attention.self.query",
    "bert.encoder.layer.1.intermediate.dense",
    "bert.encoder.layer.11.intermediate.dense",
    "classifier",
]


def refused(*parts: str):
    """Expects a ValueError whose sentence contains all `parts`, in order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))


# Schedule: methods


@pytest.mark.parametrize("linear", [0.9, "2:4", DENSE_THEN_REUSE, Reuse, {"ratio": 0.9}, True])
def test_linear_that_is_no_method_is_refused_with_a_hint(linear):
    with refused(
        "Schedule.linear is ", "None or Reuse or Sample or Sample.adaptive(), e.g. linear=Reuse(0.9)"
    ):
        Schedule(linear=linear)


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        Schedule(Reuse(0.9))


def test_exact_is_the_default_schedule():
    assert Schedule.exact() == Schedule()


def test_exact_takes_no_method():
    with pytest.raises(TypeError, match="linear"):
        Schedule.exact(linear=Reuse(0.9))


def test_resprop_has_the_choices_of_its_paper():
    assert Schedule.resprop() == Schedule(linear=Reuse(0.9, "element", "sample"))


def test_c_sharp_reads_its_own_lists():
    schedule = Schedule.c_sharp(
        linear=[[0.0, 0], [0.9, 0.25]], attention=[["2:4", 0], [0.0, 0.5]], skip_layers=[0], total_steps=8
    )
    assert schedule == Schedule(
        linear=Reuse([(0.0, 0.0), (0.9, 0.25)], "element", "mean"),
        attention=Reuse([("2:4", 0.0), (0.0, 0.5)], "n:m", "mean"),
        skip_layers=0,
        total_steps=8,
    )
    assert [schedule.at(step).attention.keep for step in (3, 4)] == [0.5, 1.0]
    assert Schedule.c_sharp(0.9, 0.8).attention == Reuse(0.8, "element")
    assert Schedule.c_sharp(total_steps=4).skip_layers == (0, -1)


def test_c_sharp_needs_the_length_of_training_for_its_defaults():
    with refused("fractions without total_steps have no meaning"):
        Schedule.c_sharp()


@pytest.mark.parametrize("lists", [{"linear": [0.9]}, {"attention": [[1.0, 0]]}, {"attention": [[0.9, 0.5]]}])
def test_c_sharp_refuses_wrong_lists(lists):
    with refused("Reuse.ratio"):
        Schedule.c_sharp(**lists, total_steps=4)


@pytest.mark.parametrize("preset", [Schedule.exact, Schedule.resprop])
def test_preset_passes_options_through(preset):
    options = {"include": ("a",), "exclude": ("b",), "skip_layers": (0,), "total_steps": 7}
    assert preset(**options) == replace(preset(), **options)


def test_resprop_takes_phases():
    schedule = Schedule.resprop(DENSE_THEN_REUSE, total_steps=8)
    assert schedule.at(2).linear == Reuse(0.9, "element", "sample")


# Schedule: steps


def test_fractions_without_total_steps_are_refused():
    with refused("Schedule.linear", "(0.9, 0.25)", "fractions without total_steps", "Schedule.total_steps"):
        Schedule(linear=Reuse(DENSE_THEN_REUSE))


@pytest.mark.parametrize("total_steps", [0, -1, 10.0, True, "10"])
def test_total_steps_must_be_a_positive_int(total_steps):
    with refused(f"Schedule.total_steps is {total_steps!r}", "an int >= 1"):
        Schedule(total_steps=total_steps)


@pytest.mark.parametrize(
    ("step", "fraction"), [(0, 0.0), (1, 0.1), (3, 0.3), (10, 1.0), (11, 1.0), (10**400, 1.0)]
)
def test_fraction_of_training(step, fraction):
    assert Schedule(total_steps=10).fraction(step) == fraction


def test_fraction_without_total_steps_is_zero():
    assert Schedule().fraction(10**6) == 0.0


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", None])
@pytest.mark.parametrize("method", ["at", "fraction"])
def test_step_must_be_an_int_from_zero(method, step):
    with refused(f"The step of a schedule is {step!r}", "an int >= 0"):
        getattr(Schedule(), method)(step)


@pytest.mark.parametrize("total_steps", [1, 3, 7, 30, 1000])
def test_phase_begins_at_the_first_step_that_reaches_its_start(total_steps):
    schedule = Schedule(linear=Reuse([(0.0, 0.0), (0.9, 0.1)]), total_steps=total_steps)
    first = -(-total_steps // 10)
    assert schedule.at(first - 1).linear == Reuse(0.0)
    assert schedule.at(first).linear == Reuse(0.9)


def test_at_resolves_every_field():
    phase = Schedule(linear=Reuse(0.9), total_steps=4).at(3)
    assert (phase.step, phase.fraction, phase.linear) == (3, 0.75, Reuse(0.9))
    assert all(getattr(phase, field) is None for field in METHODS if field != "linear")


# Schedule: which modules


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize(
    ("value", "stored"), [("a.*", ("a.*",)), (["a", "b"], ("a", "b")), ((), ()), ([], ())]
)
def test_patterns_are_stored_as_a_tuple(field, value, stored):
    assert getattr(Schedule(**{field: value}), field) == stored


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("value", ["", ["a", ""], [1], None, 3, {"a"}, {"a": 1}])
def test_patterns_must_be_non_empty_strings(field, value):
    with refused(f"Schedule.{field} is {value!r}", "a non-empty str or a list of them"):
        Schedule(**{field: value})


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("layer.1", "enc.layer.1"),
        ("layer.1", "enc.layer.1.dense"),
        ("enc", "enc.layer.1.dense"),
        ("dense", "enc.layer.1.dense"),
        ("enc.layer.1.dense", "enc.layer.1.dense"),
        ("enc.*.dense", "enc.layer.1.dense"),
        ("enc*dense", "enc.layer.1.dense"),
        ("layer.[01]", "enc.layer.1.dense"),
        ("layer.?", "enc.layer.1.dense"),
        ("*", ""),
    ],
)
def test_pattern_matches(pattern, path):
    assert pattern_matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("layer.1", "enc.layer.11.dense"),
        ("layer.1", "enc.sublayer.1.dense"),
        ("layer.1.dense", "enc.layer.1"),
        ("layer.dense", "enc.layer.1.dense"),
        ("Dense", "enc.layer.1.dense"),
        ("den", "enc.layer.1.dense"),
        ("layer.[02]", "enc.layer.1.dense"),
        ("layer.?", "enc.layer.11.dense"),
        ("enc.", "enc.layer.1.dense"),
        ("head", ""),
    ],
)
def test_pattern_does_not_match(pattern, path):
    assert not pattern_matches(pattern, path)


def test_everything_is_selected_by_default():
    assert Schedule().reason_left_out("any.module") is None


def test_include_selects_only_what_it_matches():
    schedule = Schedule(include=("query", "dense"))
    assert schedule.reason_left_out("layer.1.dense") is None
    assert schedule.reason_left_out("classifier") == "matches no include pattern ('query', 'dense')"


def test_exclude_is_stronger_than_include():
    schedule = Schedule(include="dense", exclude=("head", "layer.1"))
    assert schedule.reason_left_out("layer.2.dense") is None
    assert schedule.reason_left_out("layer.1.dense") == "matches the exclude pattern 'layer.1'"


def test_patterns_that_match_pass_the_check():
    Schedule(include="layer.1*", exclude="classifier").check_patterns(iter(PATHS))


@pytest.mark.parametrize(("field", "other"), [("include", "exclude"), ("exclude", "include")])
def test_pattern_without_a_match_is_refused_with_near_names(field, other):
    schedule = Schedule(**{field: ["query", "clasifier"], other: "dense"})
    with refused(
        f"Schedule.{field} has the pattern 'clasifier'", "5 module paths", "near names: 'classifier'."
    ):
        schedule.check_patterns(PATHS)


def test_near_names_include_last_components():
    with refused("near names: 'query'."):
        Schedule(include="querry").check_patterns(PATHS)


def test_near_names_are_five_at_most():
    with pytest.raises(ValueError, match=r"near names: ('layer[0-9]', ){4}'layer[0-9]'[.]$"):
        Schedule(include="layer").check_patterns([f"layer{i}" for i in range(9)])


def test_pattern_without_a_near_name():
    with refused("near names: none."):
        Schedule(exclude="zzz").check_patterns(PATHS)


# Schedule: which blocks


@pytest.mark.parametrize(("value", "stored"), [(0, (0,)), (-1, (-1,)), ([0, -1], (0, -1)), ((), ())])
def test_skip_layers_are_stored_as_a_tuple(value, stored):
    assert Schedule(skip_layers=value).skip_layers == stored


@pytest.mark.parametrize("value", ["0", [0, True], [0.0], None, {0}, [[0]]])
def test_skip_layers_must_be_ints(value):
    with refused(f"Schedule.skip_layers is {value!r}", "an int or a list of ints"):
        Schedule(skip_layers=value)


def test_duplicate_skip_layers_are_refused():
    with refused("Schedule.skip_layers is [0, 1, 0]", "without duplicates"):
        Schedule(skip_layers=[0, 1, 0])


@pytest.mark.parametrize(("index", "skipped"), [(0, True), (1, False), (2, True), (3, False)])
def test_skip_layers_count_from_both_ends(index, skipped):
    assert Schedule(skip_layers=(0, -2)).skips_block(index, 4) is skipped


@pytest.mark.parametrize("index", [-1, 4])
def test_skips_block_refuses_an_index_out_of_range(index):
    with refused(f"The index in Schedule.skips_block is {index}", "an int in [0, 4)"):
        Schedule(skip_layers=-1).skips_block(index, 4)


@pytest.mark.parametrize("value", [3, -4, (0, -1)])
def test_skip_layers_within_the_model_pass_the_check(value):
    Schedule(skip_layers=value).check_blocks(4)


@pytest.mark.parametrize("value", [4, -5])
def test_skip_layers_beyond_the_model_are_refused(value):
    with refused(f"An index in Schedule.skip_layers is {value}", "an int in [-4, 4) for 4 blocks"):
        Schedule(skip_layers=(0, value)).check_blocks(4)


def test_skip_layers_of_a_model_without_blocks_are_refused():
    with refused("An index in Schedule.skip_layers is 0", "no blocks"):
        Schedule(skip_layers=0).check_blocks(0)


# Schedule: as a value, and through JSON

SCHEDULES = [
    Schedule(),
    Schedule(linear=Reuse(0)),
    Schedule(linear=Reuse(0.1 + 0.2, "element", "sample", 5), include="dense"),
    Schedule(linear=Reuse(DENSE_THEN_REUSE), total_steps=10_000, exclude=["head"], skip_layers=(0, -1)),
    Schedule(linear=Reuse([("2:4", 0.0), ("3:4", 0.25), (0.0, 0.5)]), total_steps=3),
    Schedule.resprop(0.5),
    Schedule(attention=Reuse("2:4", refresh_every=3)),
    Schedule.c_sharp(total_steps=100),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_survives_json(schedule):
    values = schedule.to_dict()
    text = json.dumps(values)
    copy = Schedule.from_dict(json.loads(text))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert json.loads(text) == values
    assert repr(copy) == repr(schedule)


def test_schedules_differ():
    assert len(set(SCHEDULES)) == len(SCHEDULES)


def test_equal_settings_hash_equally():
    one = Schedule(linear=Reuse([[0, 0], [0.9, 0.5]]), include="a", skip_layers=1, total_steps=2)
    other = Schedule(linear=Reuse(((0.0, 0.0), (0.9, 0.5))), include=["a"], skip_layers=[1], total_steps=2)
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("value", "field"), [(Reuse(0.9), "ratio"), (Schedule(), "linear"), (Schedule().at(0), "step")]
)
def test_values_are_frozen(value, field):
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, None)


def test_method_dict_carries_its_name():
    assert Schedule(linear=Reuse("2:4")).to_dict()["linear"] == {
        "method": "reuse",
        "ratio": "2:4",
        "granularity": "n:m",
        "source": "mean",
        "refresh_every": 1,
    }


@pytest.mark.parametrize("values", [{}, {"linear": None}, {"include": [], "attention": None}])
def test_absent_keys_have_their_defaults(values):
    assert Schedule.from_dict(values) == Schedule()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (0.9, ["The argument of Schedule.from_dict is 0.9", "a dict"]),
        (
            {"liner": None},
            ["Schedule has the unknown key 'liner'", "near names: 'linear'", "allowed are 'linear',"],
        ),
        ({1: None}, ["Schedule has the unknown key 1", "near names: none"]),
        (
            {"linear": {"method": "reuse", "ration": 0.9}},
            ["Schedule.linear", "key 'ration'", "near names: 'ratio'"],
        ),
        ({"linear": {"method": "reuse"}}, ["Schedule.linear lacks the key 'ratio'"]),
        ({"linear": {"method": "reuse", "ratio": 1.2}}, ["Reuse.ratio is 1.2"]),
        ({"linear": {"method": "vcas", "ratio": 0.9}}, ["Schedule.linear[\"method\"] is 'vcas'", '"reuse"']),
        ({"linear": {"ratio": 0.9}}, ['Schedule.linear["method"] is None', '"reuse"']),
        ({"linear": {"method": ["reuse"]}}, ["Schedule.linear[\"method\"] is ['reuse']"]),
        ({"linear": 0.9}, ["Schedule.linear is 0.9", "linear=Reuse(0.9)"]),
        ({"attention": {"method": "adaptive"}}, ["Schedule.attention[\"method\"] is 'adaptive'", '"sample"']),
        (
            {"blocks": {"method": "reuse", "ratio": 0.9}},
            ["Schedule.blocks[\"method\"] is 'reuse'", '"adaptive"'],
        ),
    ],
)
def test_from_dict_refuses_with_a_sentence(values, parts):
    with refused(*parts):
        Schedule.from_dict(values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Schedule.vcas(tau=0.1),
            "Schedule.vcas() has no setting 'tau'; near names: 'act_tau'; allowed are",
        ),
        (
            lambda: Schedule.sparse_grad(sites=1),
            "Schedule.sparse_grad() has no setting 'sites'; near names: 'sides'",
        ),
        (lambda: Schedule.back_razor(inclde="a"), "Schedule.back_razor() has no setting 'inclde'; near"),
        (
            lambda: Sample.adaptive(tau=0.1),
            "Sample.adaptive() has no setting 'tau'; near names: 'act_tau'; allowed",
        ),
    ],
)
def test_a_setting_that_there_is_not_is_named_with_those_there_are(make, said):
    with pytest.raises(TypeError) as refused:
        make()
    assert str(refused.value).startswith(said)


def test_resprop_takes_no_neighbours():
    with pytest.raises(
        ValueError, match=r"Schedule.resprop: ratio is '2:4'; allowed is a number .*Reuse\('2:4'\)"
    ):
        Schedule.resprop("2:4")
