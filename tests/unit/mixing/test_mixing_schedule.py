"""Planned mixtures: stages, interpolation, and runs repeated from their ledger."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, build_mixer
from megatron.errors import ConfigError, DataError

A, B, C = {"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 3}


def schedule(context=None, weights=None, **options):
    return build_mixer("schedule", domains=["a", "b"], weights=weights, context=context, **options)


def shares(mixer, *steps):
    """The share of domain a at each step."""
    return [mixer.decide(step).sampling_weights[0] for step in steps]


def test_without_options_the_given_weights_hold():
    assert shares(schedule(weights=[1, 3]), 1, 5, 10**9) == [0.25, 0.25, 0.25]


def test_stages_in_steps():
    mixer = schedule(
        stages=[
            {"weights": A, "steps": 10},
            {"weights": [1, 1], "steps": 5},
            {"weights": C},
        ]
    )
    assert shares(mixer, 1, 10, 11, 15, 16, 10**6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_linear_interpolation_meets_the_stages_at_their_starts():
    mixer = schedule(
        interpolation="linear",
        stages=[{"weights": A, "steps": 4}, {"weights": B, "steps": 2}, {"weights": C}],
    )
    expected = [1, 0.75, 0.5, 0.25, 0, 0.125, 0.25, 0.25, 0.25]
    np.testing.assert_allclose(shares(mixer, *range(1, 10)), expected, atol=1e-15)


@pytest.mark.parametrize("tokens", [2_000_000, 2e6, "2M", "2000K", "2e6", " 2 m ", "0.002b"])
def test_stages_in_tokens(tokens):
    mixer = schedule(
        RunContext(tokens_per_step=100_000),
        stages=[{"weights": A, "tokens": tokens}, {"weights": B}],
    )
    assert shares(mixer, 20, 21) == [1, 0]


def test_stages_in_fractions_and_mixed_units():
    stages = [
        {"weights": A, "fraction": 0.5},
        {"weights": B, "steps": 10},
        {"weights": A, "tokens": "1K"},
        {"weights": C},
    ]
    mixer = schedule(RunContext(total_steps=100, tokens_per_step=100), stages=stages)
    assert shares(mixer, 50, 51, 60, 61, 70, 71) == [1, 0, 0, 1, 1, 0.25]


def test_rounding_does_not_drift():
    stages = [{"weights": A if i % 2 else B, "fraction": 1 / 30} for i in range(30)]
    mixer = schedule(RunContext(total_steps=100), stages=stages)
    changes = sum(
        x != y for x, y in zip(*[shares(mixer, *range(s, s + 99)) for s in (1, 2)], strict=True)
    )
    assert changes == 29
    assert shares(mixer, 97, 98) == [0, 1]  # the last starts after round(29 * 100 / 30) steps


def test_stages_may_name_the_given_and_the_uniform_weights():
    mixer = schedule(
        weights=[1, 3],
        stages=[{"weights": "uniform", "steps": 1}, {"weights": "given"}],
    )
    assert shares(mixer, 1, 2) == [0.5, 0.25]


def test_warm_up_cadence_and_bounds():
    mixer = schedule(
        weights=[1, 3],
        interpolation="linear",
        warmup_steps=2,
        update_every=2,
        floor=0.1,
        stages=[{"weights": A, "steps": 10}, {"weights": B}],
    )
    expected = [0.25, 0.25, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    np.testing.assert_allclose(shares(mixer, *range(1, 13)), expected, atol=1e-12)


def test_observations_change_no_plan():
    stages = [{"weights": A, "steps": 3}, {"weights": C}]
    free, observed = schedule(stages=stages), schedule(stages=stages)
    for step in range(1, 8):
        assert shares(free, step) == shares(observed, step)
        observed.observe(Observation(step, loss_sum=[9.0, 1.0], token_count=[1, 1]))
    assert observed.describe()["weights"] == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "stages is empty"),
        ({"stages": [{"weights": A}, {"weights": B}]}, "stage 1 has no duration"),
        ({"stages": [{"steps": 3}]}, "stage 1 has no weights"),
        ({"stages": [{"weights": A, "step": 3}]}, "no key 'step'; did you mean 'steps'"),
        ({"stages": [{"weights": A, "steps": 3, "tokens": 5}]}, "both steps and tokens"),
        ({"stages": [{"weights": A, "steps": 0}]}, "stage 1: steps is 0; it must be .* above 0"),
        ({"stages": [{"weights": A, "steps": 1.5}]}, "steps is 1.5; it must be a whole"),
        ({"stages": [{"weights": A, "steps": True}]}, "steps is True"),
        ({"stages": [{"weights": A, "tokens": "2X"}]}, "tokens is '2X'"),
        ({"stages": [{"weights": A, "tokens": "-2B"}]}, "tokens is '-2B'"),
        ({"stages": [{"weights": A, "fraction": 1.5}]}, "fraction is 1.5"),
        ({"stages": [{"weights": A, "tokens": "2B"}]}, "tokens of a step are not known"),
        ({"stages": [{"weights": A, "fraction": 0.5}]}, "length is not known"),
        ({"stages": [{"weights": {"a": 1}}]}, "says nothing of the domain 'b'"),
        ({"stages": [{"weights": {"a": 1, "c": 1}}]}, "the domain 'c', which does not exist"),
        ({"stages": [{"weights": [1, -1]}]}, "at least 0"),
        ({"stages": [{"weights": [0, 0]}]}, "one of them above 0"),
        ({"stages": [{"weights": "unifrom"}]}, "did you mean 'uniform'"),
        ({"stages": {"weights": A}}, "stages is .* it must be a list or null"),
        ({"stages": ["a"]}, "it must be a list"),
        ({"stages": [{"weights": A}], "interpolation": "cubic"}, "one of 'step', 'linear'"),
        ({"interpolation": "linear"}, "without stages"),
        ({"replay_average": True}, "without replay"),
        ({"stages": [{"weights": A}], "replay": "x"}, "exclude each other"),
    ],
)
def test_a_bad_schedule_is_named(options, message):
    with pytest.raises(ConfigError, match=f"(?s)mixing method 'schedule': .*{message}"):
        schedule(**options)


def test_stages_shorter_than_a_step_and_fractions_beyond_the_run_are_refused():
    context = RunContext(total_steps=100, tokens_per_step=1000)
    with pytest.raises(ConfigError, match="stage 1 lasts less than one step"):
        schedule(context, stages=[{"weights": A, "tokens": 10}, {"weights": B}])
    with pytest.raises(ConfigError, match=r"fractions of the stages sum to 1.2"):
        schedule(context, stages=[{"weights": A, "fraction": 0.6}, {"weights": B, "fraction": 0.6}])


class TestReplay:
    def record(self, path, steps=40, skipped=()):
        """A ledger as a run with exp3 writes it."""
        mixer = build_mixer("exp3", domains=["a", "b"])
        drawn = {}
        with path.open("w") as out:
            for step in range(1, steps + 1):
                p = drawn[step] = mixer.decide(step).sampling_weights
                line = {
                    "step": step,
                    "probability": {"b": float(p[1]), "a": float(p[0])},
                    "domain_loss": {"a": 2.0, "b": None},
                    "tokens": {"a": 8, "b": 0},
                    "samples": {"a": 1, "b": 0},
                    "epochs": {"a": 0.1, "b": 0.0},
                }
                if step in skipped:
                    line["skipped"] = True
                else:
                    loss = 2 + np.sin(step)
                    mixer.observe(Observation(step, loss_sum=[loss, 1.0], token_count=[1, 1]))
                out.write(json.dumps(line) + "\n")
        return drawn

    def test_a_run_is_repeated_bit_for_bit(self, tmp_path):
        drawn = self.record(tmp_path / "mixture.jsonl", skipped={7})
        for path in (tmp_path / "mixture.jsonl", tmp_path):
            mixer = schedule(replay=str(path))
            for step, p in drawn.items():
                assert mixer.decide(step).sampling_weights.tobytes() == p.tobytes()
                mixer.observe(Observation(step, loss_sum=[1.0, 9.0], token_count=[1, 1]))
            assert mixer.decide(10**6).sampling_weights.tobytes() == drawn[40].tobytes()

    def test_domains_are_matched_by_name(self, tmp_path):
        drawn = self.record(tmp_path / "mixture.jsonl")
        mixer = build_mixer("schedule", domains=["b", "a"], replay=str(tmp_path))
        assert mixer.decide(30).sampling_weights.tolist() == drawn[30].tolist()[::-1]

    def test_the_average_of_a_run(self, tmp_path):
        drawn = self.record(tmp_path / "mixture.jsonl")
        mixer = schedule(replay=str(tmp_path), replay_average=True)
        mean = np.mean(list(drawn.values()), axis=0)
        np.testing.assert_allclose(mixer.decide(1).sampling_weights, mean, atol=1e-15)
        assert shares(mixer, 1) == shares(mixer, 40)

    def test_loss_weights_probes_and_blocks_are_repeated(self, tmp_path):
        extras = {
            1: {},
            2: {"fresh_quota": 2, "probe": 1, "loss_weight": {"a": 0.5, "b": 1.5}},
            3: {"probe": 1, "loss_weight": {"a": 0.4, "b": 1.6}},
            5: {"loss_weight": None, "fresh_quota": None},
        }
        with (tmp_path / "mixture.jsonl").open("w") as out:
            for step, extra in extras.items():
                line = {"step": step, "probability": {"a": 0.5, "b": 0.5}} | extra
                out.write(json.dumps(line) + "\n")
        mixer = schedule(replay=str(tmp_path))
        decisions = {step: mixer.decide(step) for step in range(1, 7)}
        assert [d.fresh_quota for d in decisions.values()] == [None, 2, None, None, None, None]
        assert [d.probe for d in decisions.values()] == [None, 1, 1, None, None, None]
        weights = [
            None if d.loss_weights is None else d.loss_weights.tolist() for d in decisions.values()
        ]
        assert weights == [None, [0.5, 1.5], [0.4, 1.6], [0.4, 1.6], None, None]

    def test_a_torn_last_line_is_left_out(self, tmp_path):
        file = tmp_path / "mixture.jsonl"
        drawn = self.record(file, steps=5)
        text = file.read_text()
        file.write_text(text[: text.rindex("domain_loss")])
        assert shares(schedule(replay=str(file)), 5) == [drawn[4][0]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no complete record"),
            ('{"step": 1', "no complete record"),
            ("nonsense\n", "line 1: no JSON"),
            ('{"loss": 1}\n', "line 1: not a ledger record"),
            ("[1]\n", "line 1: not a ledger record"),
            ('{"step": "1", "probability": {"a": 1, "b": 0}}\n', "line 1: step is '1'"),
            ('{"step": 1, "probability": [1, 0]}\n', "line 1: probability is .*keyed by domain"),
            ('{"step": 1, "probability": {"a": 1, "c": 0}}\n', "'c' is not in both"),
            ('{"step": 1, "probability": {"a": 1}}\n', "names 'b', and this run"),
            ('{"step": 1, "probability": {"a": 1, "b": "x"}}\n', "finite numbers"),
            ('{"step": 1, "probability": {"a": 1, "b": NaN}}\n', "finite numbers"),
            ('{"step": 1, "probability": {"a": 1.1, "b": -0.1}}\n', "finite numbers"),
            ('{"step": 1, "probability": {"a": 0.5, "b": 0.4}}\n', "sums to 0.9"),
            ('{"step": 1, "probability": {"a": 1, "b": 0}, "probe": 0.5}\n', "probe is 0.5"),
            ('{"step": 1, "probability": {"a": 1, "b": 0}}\n' * 2, "line 2: step 1 after step 1"),
        ],
    )
    def test_a_damaged_ledger_is_named_by_file_and_line(self, tmp_path, text, message):
        file = tmp_path / "mixture.jsonl"
        file.write_text(text)
        with pytest.raises(DataError, match=f"(?s)mixture.jsonl.*{message}"):
            schedule(replay=str(file))

    def test_a_missing_ledger_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"cannot read .*mixture\.jsonl"):
            schedule(replay=str(tmp_path))

    def test_state_goes_on(self, tmp_path):
        self.record(tmp_path / "mixture.jsonl")
        first = schedule(replay=str(tmp_path))
        first.observe(Observation(3, loss_sum=[1.0, 1.0], token_count=[1, 1]))
        second = schedule(replay=str(tmp_path))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.step == 3
        assert shares(second, 4) == shares(first, 4)
