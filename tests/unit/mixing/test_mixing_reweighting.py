"""DoReMi and DoGE against their formulas, written out here a second time."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, Signal, build_mixer
from megatron.errors import ConfigError
from megatron.mixing.multiplicative import multiply
from megatron.mixing.options import CommonOptions

VOCABULARY = 50_000
NAMES = ["a", "b", "c"]
START = np.log([0.2, 0.5, 0.3])


def doremi(weights=(0.2, 0.5, 0.3), **options):
    options.setdefault("reference", "runs/reference")
    return build_mixer(
        "doremi",
        domains=NAMES[: len(weights)],
        weights=list(weights),
        context=RunContext(vocab_size=VOCABULARY),
        **options,
    )


def doge(weights=(0.2, 0.5, 0.3), targets=(), **options):
    context = RunContext(targets=tuple(targets))
    names = NAMES[: len(weights)]
    return build_mixer("doge", domains=names, weights=list(weights), context=context, **options)


def step_of(step, excess, tokens=(4, 4, 4), loss=(3.0, 3.0, 3.0), reference=(1.0, 1.0, 1.0)):
    present = np.array(tokens) > 0
    return Observation(
        step,
        loss_sum=np.array(loss) * tokens,
        token_count=tokens,
        excess_loss=np.where(present, excess, np.nan),
        reference_loss=np.where(present, reference, np.nan),
        learning_rate=1e-3,
    )


def softmax(x):
    shifted = np.exp(np.array(x) - np.max(x))
    return shifted / shifted.sum()


def alpha(mixer):
    return np.array(list(mixer.describe()["domain_weights"].values()))


class TestDoremi:
    @pytest.mark.parametrize("start", ["given", "uniform"])
    @pytest.mark.parametrize("eta", [1.0, 0.1])
    def test_constant_scores_have_a_closed_form(self, start, eta):
        """Without smoothing alpha after t updates is softmax(log start + eta t lambda)."""
        r = np.array([0.2, 0.5, 0.3])
        mixer = doremi(r, smoothing=0.0, start=start, eta=eta)
        score = np.array([0.5, 0.1, 0.3])
        first = r if start == "given" else np.full(3, 1 / 3)
        seen = [first]
        for step in range(1, 30):
            mixer.observe(step_of(step, score))
            seen.append(softmax(np.log(first) + eta * step * score))
            np.testing.assert_allclose(alpha(mixer), seen[-1], rtol=1e-12)
        np.testing.assert_allclose(mixer.result(), np.mean(seen, axis=0), rtol=1e-12)

    def test_the_rule_with_smoothing_and_absent_domains(self):
        rng, c, eta = np.random.default_rng(0), 0.02, 0.7
        r = np.array([0.2, 0.5, 0.3])
        mixer = doremi(r, smoothing=c, eta=eta)
        weights, score = r.copy(), np.full(3, math.log(VOCABULARY))
        for step in range(1, 60):
            excess, tokens = rng.uniform(0, 2, 3), rng.integers(0, 3, 3)
            if not tokens.any():
                continue
            mixer.observe(step_of(step, excess, tokens))
            score = np.where(tokens > 0, excess, score)
            grown = weights * np.exp(eta * score)
            weights = (1 - c) * grown / grown.sum() + c / 3
            np.testing.assert_allclose(alpha(mixer), weights, rtol=1e-10)
            decision = mixer.decide(step + 1)
            np.testing.assert_allclose(decision.sampling_weights, r, rtol=1e-15)
            ratio = weights / r
            np.testing.assert_allclose(decision.loss_weights, ratio / ratio.sum(), rtol=1e-10)
            assert not decision.measure

    def test_a_domain_that_was_never_seen_scores_what_knowing_nothing_loses(self):
        mixer = doremi(smoothing=0.0)
        mixer.observe(step_of(1, (1.0, 2.0, 0.0), tokens=(4, 4, 0)))
        expected = softmax(START + np.array([1.0, 2.0, math.log(VOCABULARY)]))
        np.testing.assert_allclose(alpha(mixer), expected, rtol=1e-12)

    def test_the_excess_of_a_domain_is_of_its_means(self):
        """Tokens above and below the reference cancel, and what is left is cut off at 0."""
        mixer = doremi(smoothing=0.0, excess="domain")
        mixer.observe(step_of(1, (9, 9, 9), loss=(3.0, 2.0, 1.0), reference=(1.0, 1.5, 2.0)))
        expected = softmax(START + np.array([2.0, 0.5, 0.0]))
        np.testing.assert_allclose(alpha(mixer), expected, rtol=1e-12)

    def test_steps_are_pooled_by_their_tokens(self):
        mixer = doremi(smoothing=0.0, update_every=2)
        mixer.observe(step_of(1, (1.0, 2.0, 3.0), tokens=(6, 1, 1)))
        np.testing.assert_allclose(alpha(mixer), [0.2, 0.5, 0.3])
        mixer.observe(step_of(2, (3.0, 0.0, 1.0), tokens=(2, 1, 3)))
        score = [(6 * 1 + 2 * 3) / 8, 1.0, (3 + 3) / 4]
        np.testing.assert_allclose(alpha(mixer), softmax(np.log([0.2, 0.5, 0.3]) + score))

    def test_without_a_lag_a_step_is_weighed_by_its_own_losses(self):
        """The papers' timing: alpha of step t is made of the losses of step t."""
        r = np.array([0.2, 0.5, 0.3])
        own, lagging = doremi(r, loss_lag=0), doremi(r)
        rng, weights = np.random.default_rng(1), []
        for step in range(1, 20):
            observation = step_of(step, rng.uniform(0, 1, 3))
            asked = own.decide(step)
            assert asked.measure == {Signal.LOSS, Signal.EXCESS_LOSS}
            decision = own.foresee(observation)
            assert not decision.measure
            weights.append(decision.loss_weights)
            lagging.observe(observation)
            np.testing.assert_allclose(lagging.decide(step + 1).loss_weights, weights[-1])
            own.observe(observation)
            np.testing.assert_allclose(own.decide(step + 1).loss_weights, weights[-1])
        np.testing.assert_allclose(own.result(), lagging.result(), rtol=1e-14)

    def test_without_a_lag_only_updates_are_measured_ahead(self):
        mixer = doremi(loss_lag=0, update_every=3)
        for step in range(1, 10):
            asked = mixer.decide(step).measure
            assert bool(asked) is (step % 3 == 0)
            if asked:
                mixer.foresee(step_of(step, (0.1, 0.2, 0.3)))
            mixer.observe(step_of(step, (0.1, 0.2, 0.3)))

    def test_a_step_that_was_skipped_moves_nothing(self):
        mixer, plain = doremi(loss_lag=0), doremi(loss_lag=0)
        for one in (mixer, plain):
            one.foresee(step_of(1, (0.5, 0.1, 0.3)))
            one.observe(step_of(1, (0.5, 0.1, 0.3)))
        mixer.foresee(step_of(2, (5.0, 0.0, 0.0)))  # and then step 2 overflows
        for one in (mixer, plain):
            one.foresee(step_of(3, (0.5, 0.1, 0.3)))
            one.observe(step_of(3, (0.5, 0.1, 0.3)))
        assert alpha(mixer).tolist() == alpha(plain).tolist()
        assert mixer.result().tolist() == plain.result().tolist()

    def test_floors_bound_the_draw_and_alpha_and_not_the_rule(self):
        mixer = doremi((0.2, 0.5, 0.3), smoothing=0.0, floor={"b": 0.4})
        free = doremi((0.2, 0.5, 0.3), smoothing=0.0)
        for step in range(1, 40):
            for one in (mixer, free):
                one.observe(step_of(step, (0.5, 0.0, 0.5)))
        assert alpha(free)[1] < 1e-6
        assert alpha(mixer)[1] == pytest.approx(0.4)
        assert mixer.decide(40).sampling_weights.tolist() == [0.2, 0.5, 0.3]
        for step in range(40, 100):
            for one in (mixer, free):
                one.observe(step_of(step, (0.0, 1.0, 0.0)))
        np.testing.assert_allclose(alpha(mixer), alpha(free), rtol=1e-9)

    @pytest.mark.parametrize("loss_lag", [0, 1])
    def test_where_passes_are_limited_alpha_is_over_what_draws(self, loss_lag):
        context = RunContext(
            total_steps=100,
            samples_per_step=8,
            samples_per_epoch=(10.0, 1e6, 1e6),
            vocab_size=VOCABULARY,
        )
        weights = [0.2, 0.5, 0.3]
        mixer = build_mixer(
            "doremi",
            domains=NAMES,
            weights=weights,
            context=context,
            loss_lag=loss_lag,
            max_epochs=2,
        )
        for step in range(1, 6):
            decision = mixer.decide(step)
            drawn = decision.sampling_weights
            assert drawn[0] < 0.05
            observation = step_of(step, (0.5, 0.1, 0.3))
            observation = dataclasses.replace(observation, sampling_weights=drawn)
            if decision.measure:
                decision = mixer.foresee(observation)
            counted = decision.loss_weights * drawn
            if loss_lag == 0:
                mixer.observe(observation)
            np.testing.assert_allclose(counted / counted.sum(), alpha(mixer), rtol=1e-12)
            if loss_lag == 1:
                mixer.observe(observation)

    def test_a_domain_that_is_never_drawn_is_left_out(self):
        mixer = doremi((0.4, 0.0, 0.6), start="uniform", smoothing=0.1)
        for step in range(1, 5):
            mixer.observe(step_of(step, (0.5, 0.0, 0.1), tokens=(4, 0, 4)))
        decision = mixer.decide(5)
        assert decision.sampling_weights[1] == decision.loss_weights[1] == alpha(mixer)[1] == 0
        assert alpha(mixer).sum() == pytest.approx(1)
        json.dumps(mixer.state_dict(), allow_nan=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reference_losses": "runs/store"}, "exclude each other"),
            ({"eta": 0.0}, "eta is 0.0"),
            ({"smoothing": 1.5}, "smoothing is 1.5"),
            ({"loss_lag": 2}, "loss_lag is 2"),
            ({"excess": "row"}, "excess is 'row'"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            doremi(**options)

    def test_a_loop_that_compares_losses_itself_names_no_reference(self):
        mixer = doremi(reference=None)
        mixer.observe(step_of(1, (0.5, 0.1, 0.3)))
        assert alpha(mixer)[0] > 0.2

    def test_the_size_of_the_vocabulary_must_be_known(self):
        with pytest.raises(ConfigError, match="vocab_size"):
            build_mixer("doremi", domains=NAMES, reference="runs/reference")
        with pytest.raises(ConfigError, match="vocab_size"):
            build_mixer("doremi", domains=NAMES, context=RunContext(vocab_size=0))


def gradients(step, alignment, counts=(4, 4, 4), lr=1e-3):
    return Observation(step, gradient_alignment=alignment, sample_count=counts, learning_rate=lr)


class TestDoge:
    def test_the_rule(self):
        rng, c = np.random.default_rng(0), 0.05
        mixer = doge(mu=0.02, smoothing=c)
        w, seen = np.full(3, 1 / 3), []
        for step in range(1, 60):
            lr = 1e-2 / step**0.5
            alignment, counts = rng.normal(2, 4, 3), rng.integers(0, 4, 3)
            if not counts.any():
                continue
            alignment = np.where(counts > 0, alignment, 0.0)
            assert mixer.decide(step).measure == {Signal.GRADIENT_ALIGNMENT, Signal.LEARNING_RATE}
            decision = mixer.foresee(gradients(step, alignment, counts, lr))
            grown = w * np.exp(np.clip(lr * alignment, 0, 5 * lr) / 0.02)
            w = (1 - c) * grown / grown.sum() + c / 3
            seen.append(w)
            per_token = np.where(counts > 0, w / np.maximum(counts, 1), 0)
            np.testing.assert_allclose(
                decision.loss_weights, per_token / per_token.sum(), rtol=1e-9
            )
            np.testing.assert_allclose(decision.sampling_weights, [0.2, 0.5, 0.3])
            mixer.observe(step_of(step, (0, 0, 0), tokens=counts))
            np.testing.assert_allclose(alpha(mixer), w, rtol=1e-9)
        np.testing.assert_allclose(mixer.result(), np.mean(seen, axis=0), rtol=1e-9)

    def test_the_loss_is_the_weighted_sum_of_the_means(self):
        """Tokens weighed so, the loss of the batch is sum_i w_i L_i over the sum of the w_i."""
        mixer = doge()
        counts, losses = np.array([1.0, 8.0, 3.0]), np.array([2.0, 5.0, 3.0])
        weights = mixer.foresee(gradients(1, (3.0, 0.0, 1.0), counts)).loss_weights
        w = softmax(1e-3 * np.array([3.0, 0.0, 1.0]) / 0.01)
        loss = (weights * counts * losses).sum() / (weights * counts).sum()
        assert loss == pytest.approx(w @ losses)

    def test_a_step_that_was_skipped_moves_nothing(self):
        mixer = doge()
        mixer.foresee(gradients(1, (3.0, 0.0, 1.0)))
        assert mixer.result() is None
        np.testing.assert_allclose(alpha(mixer), 1 / 3)
        mixer.foresee(gradients(2, (0.0, 2.0, 0.0)))
        mixer.observe(step_of(2, (0, 0, 0)))
        np.testing.assert_allclose(alpha(mixer), softmax([0, 0.2, 0]))

    def test_gradients_that_are_not_finite_move_nothing(self):
        mixer = doge()
        decision = mixer.foresee(gradients(1, (3.0, math.nan, 1.0)))
        assert not decision.measure
        mixer.observe(step_of(1, (0, 0, 0)))
        np.testing.assert_allclose(alpha(mixer), 1 / 3)

    def test_between_updates_alignments_are_averaged_over_the_steps_with_the_domain(self):
        mixer = doge(update_every=3)
        for step, alignment, counts in (
            (1, (3.0, 1.0, 0.0), (4, 4, 0)),
            (2, (1.0, 0.0, 2.0), (4, 0, 4)),
            (3, (2.0, 2.0, 0.0), (4, 4, 0)),
        ):
            assert Signal.GRADIENT_ALIGNMENT in mixer.decide(step).measure
            mixer.foresee(gradients(step, alignment, counts))
            mixer.observe(step_of(step, (0, 0, 0), tokens=counts))
        np.testing.assert_allclose(alpha(mixer), softmax(np.array([2.0, 1.5, 2.0]) * 0.1))

    def test_without_pooling_only_the_steps_of_updates_are_differentiated(self):
        mixer = doge(update_every=3, pool=False)
        for step in range(1, 8):
            asked = mixer.decide(step).measure
            assert (Signal.GRADIENT_ALIGNMENT in asked) is (step % 3 == 0)
            assert asked  # the counts are wanted at every step
            weights = mixer.foresee(gradients(step, (9, 9, 9), (1, 2, 4))).loss_weights
            if step < 3:
                np.testing.assert_allclose(weights, [4 / 7, 2 / 7, 1 / 7])
            mixer.observe(step_of(step, (0, 0, 0)))

    def test_before_the_counts_are_known_they_are_as_expected(self):
        ratio = (1 / 3) / np.array([0.2, 0.5, 0.3])
        np.testing.assert_allclose(doge().decide(1).loss_weights, ratio / ratio.sum())

    def test_a_loop_that_measures_while_it_trains_may_tell_afterwards(self):
        mixer = doge()
        mixer.observe(gradients_and_losses(1, (3.0, 0.0, 1.0)))
        np.testing.assert_allclose(alpha(mixer), softmax([0.3, 0.0, 0.1]))

    def test_what_is_foreseen_survives_a_resume(self):
        whole, cut = doge(update_every=2), doge(update_every=2)
        for mixer in (whole, cut):
            mixer.foresee(gradients(1, (3.0, 1.0, 0.0)))
        text = json.dumps(cut.state_dict(), allow_nan=False)
        resumed = doge(update_every=2)
        resumed.load_state_dict(json.loads(text))
        for mixer in (whole, resumed):
            mixer.observe(step_of(1, (0, 0, 0)))
            mixer.foresee(gradients(2, (1.0, 1.0, 5.0)))
            mixer.observe(step_of(2, (0, 0, 0)))
        assert json.dumps(whole.state_dict()) == json.dumps(resumed.state_dict())
        assert alpha(resumed)[0] != alpha(resumed)[1]

    def test_the_objective_says_whom_a_gradient_should_help(self):
        assert doge().gradient_aim.weights.tolist() == [1 / 3] * 3
        aim = doge(targets=["exam"], objective={"exam": 1.0}).gradient_aim
        assert aim.weights.tolist() == [0, 0, 0, 1]
        assert not aim.others
        aim = doge(targets=["exam"], target="all").gradient_aim
        assert aim.others
        assert aim.weights.tolist() == [1 / 3] * 3 + [0]
        with pytest.raises(ConfigError, match="exam, which is never in one"):
            doge(targets=["exam"], target="all", objective={"exam": 1.0})
        with pytest.raises(ConfigError, match="objective is 'worst'"):
            doge(objective="worst")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mu": 0.0}, "mu is 0.0"),
            ({"clip": 0.0}, "clip is 0.0"),
            ({"smoothing": -0.1}, "smoothing is -0.1"),
            ({"target": "valid"}, "target is 'valid'"),
            ({"min_tokens": 5}, "min_tokens is 5"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            doge(**options)


def gradients_and_losses(step, alignment):
    return Observation(
        step,
        loss_sum=[8.0, 8.0, 8.0],
        token_count=[4, 4, 4],
        gradient_alignment=alignment,
        learning_rate=1e-3,
    )


def test_a_weight_too_small_for_a_float_comes_back():
    support = np.ones(2, dtype=bool)
    logs = np.log([0.5, 0.5])
    for _ in range(100):
        logs = multiply(logs, np.array([100.0, 0.0]), smoothing=0.0, support=support)
    assert np.exp(logs[1]) == 0
    for _ in range(101):
        logs = multiply(logs, np.array([0.0, 100.0]), smoothing=0.0, support=support)
    assert logs[1] == pytest.approx(0.0)


def test_every_common_option_is_one_of_theirs_too():
    from megatron.registry import mixing_methods

    for method in ("doremi", "doge", "validation_gap"):
        assert issubclass(mixing_methods[method].options, CommonOptions)
