"""The methods driven by held-out losses: formulas, cadence, state, and what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, ObservationError, build_mixer
from megatron.errors import CheckpointError, ConfigError, DataError
from megatron.mixing.simulate import simulate
from megatron.mixing.worlds import hub_transfer, power_world

NAMES = ["a", "b", "c"]
GRAPH = [[0.5, 0.2, 0.0], [0.0, 0.4, 0.1], [0.3, 0.0, 0.6]]
TARGETS = [1.0, 2.0, 3.0]
NEEDED = {
    "naive_validation": {},
    "skillit": {"graph": GRAPH},
    "dynamic_loading": {"targets": TARGETS},
}
MEASURED = [
    [3.0, 2.5, 4.0],
    [2.0, 2.5, 3.5],
    [2.0, 2.0, 2.0],
    [0.5, 1.9, 2.9],
    [1.5, 2.9, 3.9],
]


def build(method, **options):
    return build_mixer(method, domains=NAMES, **NEEDED[method] | options)


def weights_after(mixer, *, every, rows=MEASURED, warmup=0):
    """Feed a run whose held-out losses are ``rows``; return p after each update."""
    rows, found = list(rows), []
    for step in range(1, every * len(rows) + warmup + 2):
        decision = mixer.decide(step)
        due = step > 1 and (step - 1) % every == 0 and step - 1 > warmup
        assert decision.validate == due
        if due:
            mixer.observe(Observation(step - 1, valid_loss=rows[len(found)]))
            decision = mixer.decide(step)
            assert not decision.validate
            found.append(decision.sampling_weights)
        mixer.observe(Observation(step, loss_sum=[1, 2, 3], token_count=[1, 1, 1]))
        if step != warmup:
            later = mixer.decide(step + 1).sampling_weights
            assert later.tolist() == decision.sampling_weights.tolist()
    return np.array(found)


def rate(step):
    return min(1 / 3, math.sqrt(math.log(3) / (3 * step))) if step else 1 / 3


def test_naive_validation():
    gain, before, expected = [0.0] * 3, rate(0), []
    for number, row in enumerate(MEASURED, start=1):
        spread = max(row) - min(row)
        scaled = [(v - min(row)) / spread if spread else 0.0 for v in row]
        gain = [g + s for g, s in zip(gain, scaled, strict=True)]
        raw = [math.exp(before * g) for g in gain]
        now = rate(20 * number)
        expected.append([(1 - 3 * now) * r / sum(raw) + now for r in raw])
        before = now
    found = weights_after(build("naive_validation", update_every=20), every=20)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("history", [1, 3])
def test_skillit(history):
    mixer = build("skillit", update_every=4, eta=0.7, history=history)
    raw = [math.exp(0.7 * sum(row)) for row in GRAPH]
    start = np.array(raw) / sum(raw)
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, start, atol=1e-12)
    expected = []
    for number in range(1, len(MEASURED) + 1):
        recent = MEASURED[max(0, number - history) : number]
        summed = [sum(row[j] for row in recent) for j in range(3)]
        raw = [
            math.exp(0.7 * sum(a * s for a, s in zip(row, summed, strict=True))) for row in GRAPH
        ]
        expected.append([r / sum(raw) for r in raw])
    np.testing.assert_allclose(weights_after(mixer, every=4), expected, atol=1e-12)


def test_dynamic_loading():
    p, expected = [0.5, 0.25, 0.25], []
    for row in MEASURED:
        p = [q * math.exp(max(v - t, 0)) for q, v, t in zip(p, row, TARGETS, strict=True)]
        p = [(1 - 1e-4) * q / sum(p) + 1e-4 / 3 for q in p]
        expected.append(p)
    mixer = build("dynamic_loading", weights=[2, 1, 1], update_every=7)
    np.testing.assert_allclose(weights_after(mixer, every=7), expected, atol=1e-12)


@pytest.mark.parametrize("method", NEEDED)
def test_the_warm_up_measures_nothing(method):
    mixer = build(method, weights=[2, 1, 1], update_every=5, warmup_steps=10)
    assert mixer.decide(10).sampling_weights.tolist() == [0.5, 0.25, 0.25]
    weights_after(mixer, every=5, warmup=10, rows=MEASURED[:2])


@pytest.mark.parametrize("method", NEEDED)
def test_it_resumes_with_the_same_bits(method):
    whole, mixer = build(method, update_every=2), build(method, update_every=2)
    turned = ["c", "a", "b"]
    for step in range(1, 11):
        fresh = build(method, update_every=2)
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
        mixer = fresh
        for each in (whole, mixer):
            if each.decide(step).validate:
                each.observe(Observation(step - 1, valid_loss=MEASURED[step // 2 - 1]))
            each.observe(Observation(step, loss_sum=[1, 1, 1], token_count=[1, 0, 1]))
        p = whole.decide(step + 1).sampling_weights
        assert mixer.decide(step + 1).sampling_weights.tobytes() == p.tobytes()
    options = dict(NEEDED[method])
    options.pop("graph", None)
    options.pop("targets", None)
    if method == "dynamic_loading":
        options["targets"] = dict(zip(NAMES, TARGETS, strict=True))
    other = build_mixer(method, domains=turned, **options)
    other.load_state_dict(whole.state_dict())
    assert other.decide(11).sampling_weights[[1, 2, 0]].tolist() == p.tolist()


@pytest.mark.parametrize("method", NEEDED)
def test_a_step_and_the_validation_after_it_may_come_in_one_observation(method):
    together, apart = (build(method, update_every=2, warmup_steps=1) for _ in range(2))
    trained = {"loss_sum": [1, 2, 3], "token_count": [1, 1, 1]}
    for step, row in enumerate(MEASURED, start=1):
        together.observe(Observation(step, **trained, valid_loss=row))
        apart.observe(Observation(step, **trained))
        apart.observe(Observation(step, valid_loss=row))
        assert not together.decide(step + 1).validate
        one, other = together.state_dict(), apart.state_dict()
        for key in ("step", "measured_step", "weights", "rule"):
            assert one[key] == other[key]
    start = build(method).decide(1).sampling_weights
    assert together.decide(6).sampling_weights.tolist() != start.tolist()
    together.observe(Observation(8, valid_loss=MEASURED[0]))
    before = together.state_dict()
    with pytest.raises(ObservationError, match="validation of step 7 after that of step 8"):
        together.observe(Observation(7, **trained, valid_loss=MEASURED[1]))
    together.observe(Observation(7, **trained | {"loss_sum": [1, 2, math.nan]}))
    assert together.state_dict() == before


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("row", [[math.inf, 1, 1], [math.nan] * 3])
def test_a_measurement_that_says_nothing_changes_nothing(method, row):
    mixer = build(method)
    mixer.observe(Observation(1, valid_loss=MEASURED[0]))
    p = mixer.decide(2).sampling_weights
    mixer.observe(Observation(2, valid_loss=row))
    assert mixer.decide(3).sampling_weights.tolist() == p.tolist()


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize(
    "row", [[1.7e308, -1.7e308, 0.0], [0, 0, 0], [math.nan, 2, 3], [5e-324, 0, 0]]
)
def test_whatever_is_measured_the_weights_are_a_distribution(method, row):
    mixer = build(method, floor=0.1)
    for step in range(1, 6):
        mixer.observe(Observation(step, valid_loss=row))
        p = mixer.decide(step + 1).sampling_weights
        assert np.isfinite(p).all()
        assert abs(p.sum() - 1) < 1e-12
        assert (p >= 0.1 - 1e-12).all()
        json.dumps([mixer.state_dict(), mixer.describe()], allow_nan=False)


def test_a_domain_without_held_out_data_gains_nothing():
    naive = build("naive_validation")
    naive.observe(Observation(1, valid_loss=[math.nan, 1.0, 3.0]))
    assert naive.describe()["gain"] == {"a": 0.0, "b": 0.0, "c": 1.0}
    dynamic = build("dynamic_loading", smoothing=0.0)
    dynamic.observe(Observation(1, valid_loss=[math.nan, 1.0, 4.0]))
    e = math.e
    np.testing.assert_allclose(
        dynamic.decide(2).sampling_weights, np.array([1, 1, e]) / (2 + e), atol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_true_graph_beats_the_identity_where_there_is_transfer(seed):
    world = power_world(transfer=hub_transfer())
    finals = {}
    for name, graph in (("identity", None), ("true", hub_transfer().T.tolist())):
        mixer = build_mixer("skillit", domains=list(world.domains), graph=graph, update_every=100)
        run = simulate(mixer, world, steps=2000, noise=1.0, seed=seed, record_every=500)
        finals[name] = run.final
        assert run.validations == 19
    assert finals["true"] < finals["identity"] - 0.01


def test_with_the_optimums_losses_as_targets_dynamic_loading_nears_it():
    world = power_world(transfer=hub_transfer())
    best = world.best_fixed(4000)
    ends = {}
    for method, options in (
        ("dynamic_loading", {"targets": best.losses.tolist(), "update_every": 50}),
        ("static", {}),
    ):
        mixer = build_mixer(method, domains=list(world.domains), **options)
        ends[method] = simulate(mixer, world, steps=4000, record_every=1000).final - best.value
    assert 0 <= ends["dynamic_loading"] < 0.5 * ends["static"]


class TestGraph:
    def test_it_comes_as_a_list_a_mapping_or_a_file(self, tmp_path):
        by_name = {
            row: {column: value for column, value in zip(NAMES, values, strict=True) if value}
            for row, values in zip(NAMES, GRAPH, strict=True)
        }
        expected = build("skillit").decide(1).sampling_weights.tolist()
        assert build("skillit", graph=by_name).decide(1).sampling_weights.tolist() == expected
        for content in (by_name, GRAPH):
            (tmp_path / "graph.json").write_text(json.dumps(content))
            mixer = build("skillit", graph=str(tmp_path / "graph.json"))
            assert mixer.decide(1).sampling_weights.tolist() == expected

    @pytest.mark.parametrize(
        ("graph", "message"),
        [
            ([[1.0]], "must have 3 rows"),
            ([[1.0, 0.0]] * 3, "row 'a' has 2 values for 3 domains"),
            ({"a": {}, "b": {}}, r"differing: c"),
            ({"a": {"x": 1.0}, "b": {}, "c": {}}, "names the domain 'x'"),
            ([[1.0, "x", 0.0]] * 3, "graph is"),
        ],
    )
    def test_a_bad_one_is_named(self, graph, message):
        with pytest.raises(ConfigError, match=message):
            build("skillit", graph=graph)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot read the graph"),
            ("{", "is no JSON"),
            ("3", "must have 3 rows"),
            ("[1, 2, 3]", "row 'a' is 1"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, content, message):
        path = tmp_path / "graph.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises((ConfigError, DataError), match=message):
            build("skillit", graph=str(path))


class TestTargets:
    def test_they_come_from_the_last_validation_of_a_run(self, tmp_path):
        lines = [
            {"step": 0, "valid_loss": {"a": 9.0, "b": 9.0, "c": 9.0}},
            {"step": 10, "loss": 3.0},
            {"step": 10, "valid_loss": {"c": 3.0, "a": 1.0, "b": 2.0}},
            {"step": 10, "test_loss": {"c": 0.0, "a": 0.0, "b": 0.0}},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "valid_lo'
        (tmp_path / "metrics.jsonl").write_text(text)
        for source in (tmp_path, tmp_path / "metrics.jsonl"):
            mixer = build("dynamic_loading", targets=None, targets_from=str(source))
            assert mixer.describe()["target"] == {"a": 1.0, "b": 2.0, "c": 3.0}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, r"targets_from: cannot read .*metrics.jsonl .*No such file"),
            ('{"step": 1, "loss": 2}\n', "holds no validation losses"),
            ('{"step": 1, "valid_loss": {"a": 1.0, "b": 2.0}}\n', "no loss of the domain 'c'"),
            ("nonsense\n", "line 1: no JSON"),
        ],
    )
    def test_a_run_without_them_is_named(self, tmp_path, text, message):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            build("dynamic_loading", targets=None, targets_from=str(tmp_path / "metrics.jsonl"))

    def test_the_command_that_makes_them_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"deepy.py train.py -d configs local/quickstart"):
            build("dynamic_loading", targets=None, targets_from="runs-of-nobody/quickstart")
        with pytest.raises(DataError, match=r"--set run_dir=.*/mine"):
            build("dynamic_loading", targets=None, targets_from=str(tmp_path / "mine"))

    def test_none_and_both_are_refused(self):
        with pytest.raises(ConfigError, match="no targets; give targets"):
            build("dynamic_loading", targets=None)
        with pytest.raises(ConfigError, match="exclude each other"):
            build("dynamic_loading", targets_from="x")
        with pytest.raises(ConfigError, match="says nothing of the domain 'c'"):
            build("dynamic_loading", targets={"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(
    ("method", "damage"),
    [
        ("naive_validation", {"gain": {"a": None, "b": 0.0, "c": 0.0}}),
        ("skillit", {"recent": 3}),
        ("skillit", {"recent": [{"a": None, "b": 0.0, "c": 0.0}]}),
    ],
)
def test_a_damaged_state_is_refused(method, damage):
    mixer = build(method)
    state = mixer.state_dict()
    with pytest.raises(CheckpointError):
        mixer.load_state_dict(state | {"rule": state["rule"] | damage})
    assert mixer.state_dict() == state
