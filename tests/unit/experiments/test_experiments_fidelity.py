"""What methods act on, what children measure, and how near the two are, on made-up runs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from support import runs, studies
from support.bundles import write_bundle

from megatron.errors import ConfigError, RunError
from megatron.experiments import acted_on as acting
from megatron.experiments.acted_on import Point, acted_on, row_weights
from megatron.experiments.children import (
    check_kept,
    checked_steps,
    child_mixtures,
    child_variants,
    keeping,
    point_steps,
    rate_after,
)
from megatron.experiments.commands.fidelity import method_base, named_method
from megatron.experiments.fidelity import facts, mean_fidelity, point_fidelity, text
from megatron.experiments.study import Base, Variant, plan_study
from megatron.experiments.table import COLUMNS
from megatron.mixing.base import RunContext
from megatron.mixing.build import build_mixer
from megatron.monitor.jsonl import MIXTURE

DOMAINS = ("walk", "drift", "noise")


def point(method, rule, *, options=None, ledger=(), measured=DOMAINS, state=None):
    return Point(
        method=method,
        options=options or {},
        state=state or {"rule": rule},
        ledger=ledger,
        domains=DOMAINS,
        measured=measured,
    )


def named(*values):
    return dict(zip(DOMAINS, values, strict=True))


# What a method acts on.


@pytest.mark.parametrize("method", sorted(acting._REWARDS))
def test_rewards_stand_on_the_diagonal(method):
    key = acting._REWARDS[method]
    found = acted_on(point(method, {key: named(2.0, 0.5, None)}))
    assert found is not None
    np.testing.assert_array_equal(found.matrix, np.diag([2.0, 0.5, 0.0]))
    np.testing.assert_array_equal(found.sums, [2.0, 0.5, 0.0])
    assert acted_on(point(method, {key: named(0.0, 0.0, 0.0)})) is None  # nothing learned yet
    # The state of the method as it is does hold it.
    options: dict[str, Any] = {}
    if method == "velocitune":
        options["targets"] = [1.0, 1.0, 1.0]
    mixer = build_mixer(method, domains=DOMAINS, context=RunContext(vocab_size=64), **options)
    assert key in mixer.state_dict()["rule"]


def test_aioli_acts_on_its_estimate():
    rows = {"walk": named(0.3, 0.1, 0.0), "drift": named(0.0, 0.4, 0.1), "noise": named(0, 0, 0.1)}
    found = acted_on(point("aioli", {"smoothed": rows}))
    assert found is not None
    np.testing.assert_allclose(found.matrix, [[0.3, 0.1, 0], [0, 0.4, 0.1], [0, 0, 0.1]])
    np.testing.assert_allclose(found.sums, [0.3, 0.5, 0.2])
    assert acted_on(point("aioli", {"smoothed": None})) is None
    mixer = build_mixer("aioli", domains=DOMAINS, update_every=60)
    assert "smoothed" in mixer.state_dict()["rule"]


def test_controls_around_a_method_are_looked_through():
    inner = {"rule": {"estimate": named(1.0, 2.0, 3.0)}}
    state = {"guardrail": {}, "controller": inner}
    found = acted_on(point("odm", {}, state=state))
    assert found is not None
    assert found.sums.tolist() == [1.0, 2.0, 3.0]
    # One that acts on groups says nothing of domains: what it did to them is read.
    ledger = [{"step": 1, "probability": named(0.2, 0.4, 0.4)}]
    ledger.append({"step": 2, "probability": named(0.4, 0.3, 0.3)})
    grouped = {"groups": {}, "controller": inner}
    found = acted_on(point("odm", {}, state=grouped, ledger=ledger))
    assert found is not None
    np.testing.assert_allclose(found.sums, [math.log(8 / 3), 0, 0], atol=1e-12)


def test_skillit_multiplies_its_graph_by_the_losses():
    graph = [[0.5, 0.1, 0.0], [0.0, 0.4, 0.0], [0.0, 0.2, 0.3]]
    recent = [named(1.0, 2.0, 3.0), named(1.0, 1.0, 1.0)]
    found = acted_on(point("skillit", {"recent": recent}, options={"graph": graph}))
    assert found is not None
    np.testing.assert_allclose(found.matrix, np.array(graph).T * np.array([[2.0], [3.0], [4.0]]))
    # As its rule does: p ~ exp(eta sum_j A_ij S_j).
    np.testing.assert_allclose(found.sums, np.array(graph) @ [2.0, 3.0, 4.0])


def test_doge_acts_on_the_alignments_of_its_last_update():
    ledger = [
        {"step": step, "probability": named(0.3, 0.3, 0.4), "gradient_alignment": named(*values)}
        for step, values in enumerate([(9, 9, 9), (9, 9, 9), (1, -2, 8), (2, -2, 8), (7, 7, 7)], 1)
    ]
    found = acted_on(point("doge", {}, ledger=ledger, options={"update_every": 2, "clip": 5.0}))
    assert found is not None
    assert found.matrix is None
    np.testing.assert_allclose(found.sums, [1.5, 0.0, 5.0])
    assert acted_on(point("doge", {}, ledger=ledger[:1], options={"update_every": 2})) is None


def test_ado_acts_on_the_speed_of_its_laws():
    laws = {"epsilon": named(1, 1, 1), "beta": named(2, 1, 1), "alpha": named(0.5, 0.5, 0.01)}
    rule = {"laws": laws, "seen": named(100, 400, 100), "seen_in_all": 900.0}
    found = acted_on(point("ado", rule, options={"count": "all"}))
    assert found is not None
    expected = [0.5 * 2 * 900**-1.5, 0.5 * 900**-1.5, 0.05 * 900**-1.01]
    np.testing.assert_allclose(found.sums, expected)
    own = acted_on(point("ado", rule, options={"count": "own"}))
    assert own is not None
    np.testing.assert_allclose(own.sums[1], 0.5 * 400**-1.5)
    unknown = {**laws, "alpha": named(0.5, None, 0.1)}
    assert acted_on(point("ado", {**rule, "laws": unknown}, options={})) is None
    state = build_mixer("ado", domains=DOMAINS).state_dict()["rule"]
    assert {"laws", "seen", "seen_in_all"} <= state.keys()


def test_other_methods_are_read_from_what_they_did():
    pushed = np.array([0.2, 0.5, 0.0])
    before = np.array([0.5, 0.25, 0.25])
    after = before * np.exp(pushed)
    after /= after.sum()
    still = {"step": 3, "probability": named(*after)}
    probe = {"step": 4, "probability": named(1, 0, 0), "probe": 0}
    ledger = [{"step": 1, "probability": named(*before)}, {**still, "step": 2}, still, probe]
    found = acted_on(point("dynamic_loading", {}, ledger=ledger))
    assert found is not None
    np.testing.assert_allclose(found.sums, pushed, atol=1e-12)
    assert acted_on(point("dynamic_loading", {}, ledger=ledger[1:])) is None


@pytest.mark.parametrize("method", ["static", "schedule", "replay", "average_of_ledger"])
def test_given_weights_act_on_nothing(method):
    ledger = [{"step": 1, "probability": named(0.2, 0.4, 0.4)}]
    ledger.append({"step": 2, "probability": named(0.4, 0.3, 0.3)})
    assert acted_on(point(method, {}, ledger=ledger)) is None


def test_rows_count_as_the_objective_does():
    measured = (*DOMAINS, "target")
    assert row_weights({}, DOMAINS, measured).tolist() == [1, 1, 1, 0]
    given = {"objective": {"kind": "weights", "weights": {"walk": 1.0, "target": 3.0}}}
    assert row_weights(given, DOMAINS, measured).tolist() == [0.5, 0, 0, 1.5]
    groups = {"objective": {"kind": "weights", "weights": {"a group": 1.0}}}
    assert row_weights(groups, DOMAINS, measured).tolist() == [1, 1, 1, 0]


# Points and children.


def test_points_divide_the_run():
    assert point_steps(100, 3) == (25, 50, 75)
    assert checked_steps([30, 10], 30) == (10, 30)
    for wrong in (0, 5):
        with pytest.raises(ConfigError, match="points"):
            point_steps(4, wrong)
    for steps, match in (([0], "steps 1 to 9"), ([10], "steps 1 to 9"), ([3, 3], "once")):
        with pytest.raises(ConfigError, match=match):
            checked_steps(steps, 9)


def test_children_tell_the_domains_apart():
    found = child_mixtures(3, share=0.8, extra=3)
    assert found.shape == (6, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[:3], 0.1 + 0.7 * np.eye(3))
    np.testing.assert_allclose(found[3], 1 / 3)
    assert child_mixtures(2, share=1.0, extra=0).tolist() == [[1, 0], [0, 1]]
    for domains, share, extra in ((3, 1 / 3, 1), (3, 1.1, 1), (1, 1.0, 0), (2, 0.8, -1)):
        with pytest.raises(ConfigError):
            child_mixtures(domains, share=share, extra=extra)


def test_a_parent_keeps_its_points_in_a_folder_of_its_own(tmp_path):
    runs.make_data(tmp_path / "data")
    plain = studies.plan(tmp_path, keep_last_n_checkpoints=2, save_interval=1).runs[0]
    kept = keeping(plain, (3, 7))
    assert kept.key != plain.key
    assert kept.folder.name == kept.key
    assert kept.config.checkpoint.run_dir == str(kept.folder)
    saved = [s for s in range(13) if kept.config.checkpoint.saves_at(s, 12)]
    assert saved == [3, 7, 12]
    assert kept.config.checkpoint.keep_last_n_checkpoints is None
    assert kept.config.hash() == plain.config.hash()
    assert keeping(plain, (3,)).key != kept.key
    with pytest.raises(RunError, match="step 3 is gone; remove"):
        check_kept(kept, (3,))


def test_children_start_at_the_point_as_the_parent_was(tmp_path):
    runs.make_data(tmp_path / "data")
    decay = {"lr_decay_style": "cosine", "min_lr": 1e-4, "warmup": 0.25}
    base = studies.base(tmp_path, exit_interval=4, keep_last_n_checkpoints=3, **decay)
    parent = plan_study("s", base, [Variant(name="p", tags={"label": "odm"})], tmp_path).runs[0]
    parent = keeping(parent, (6,))
    variants = child_variants(parent, 6, child_mixtures(3, share=0.8, extra=1), steps=4, number=2)
    planned = plan_study("s", base, variants, tmp_path).runs
    assert len({run.key for run in planned}) == 4
    for run, share in zip(planned[:3], DOMAINS, strict=True):
        assert run.weights[share] == pytest.approx(0.8)
        config = run.config
        assert config.mixing.method == "static"
        assert config.checkpoint.load == f"{parent.folder}/checkpoints/global_step6"
        assert config.checkpoint.finetune
        assert config.checkpoint.finetune_optimizer
        assert (run.steps, run.seed) == (4, parent.seed + 2)
        assert config.training.exit_interval is None
        rates = {rate_after(config, step) for step in range(4)}
        assert rates == {rate_after(parent.config, 6)}
        assert run.tags["at"] == 6
    assert 1e-4 < rate_after(parent.config, 6) < 3e-3
    # Another point, another parent: other runs.
    moved = child_variants(parent, 7, child_mixtures(3, share=0.8, extra=1), steps=4, number=2)
    assert not {r.key for r in plan_study("s", base, moved, tmp_path).runs} & {
        r.key for r in planned
    }


# One point, from files to numbers.

MATRIX = np.array([[0.4, 0.1, 0.0], [0.0, 0.2, 0.1], [-0.05, 0.0, 0.02]])
BEFORE = np.array([3.0, 2.5, 4.6])


def children_rows(mixtures, losses):
    rows = []
    for index, (mixture, after) in enumerate(zip(mixtures, losses, strict=True)):
        for step, values in ((0, BEFORE), (4, after)):
            for place, domain in enumerate(DOMAINS):
                row: dict[str, Any] = {column: kind() for column, kind in COLUMNS.items()}
                row |= {"key": f"c{index}", "domain": domain, "split": "valid", "step": step}
                row |= {"last": step == 4, "loss": values[place], "share": mixture[place]}
                row |= {"weight": 0.5, "tags": json.dumps({"role": "child"})}
                rows.append(row)
                rows.append({**row, "split": "test", "loss": 99.0})
    rows.append({**rows[0], "key": "parent", "tags": json.dumps({"role": "parent"})})
    return rows


@pytest.fixture
def parent(tmp_path):
    runs.make_data(tmp_path / "data")
    tags = {"label": "odm", "role": "parent"}
    run = keeping(studies.plan(tmp_path, Variant(name="p", tags=tags)).runs[0], (6,))
    folder = run.folder / "checkpoints" / "global_step6"
    folder.mkdir(parents=True)
    state = {"controller": {"rule": {"estimate": named(4.0, 3.0, 1.0)}}}
    planner = {"mixer": state, "sampler": {}, "ahead": None}
    write_bundle(folder, step=6, domains=list(DOMAINS), planner=planner, guard={})
    line = {"step": 6, "probability": named(0.4, 0.3, 0.3)}
    (run.folder / MIXTURE).write_text(json.dumps(line) + "\n")
    return run


def fake_children(parent, count):
    return [dataclasses.replace(parent, key=f"c{index}") for index in range(count)]


def test_a_point_compares_what_was_measured_with_what_was_acted_on(parent):
    pytest.importorskip("scipy")
    mixtures = child_mixtures(3, share=0.8, extra=2)
    rows = children_rows(mixtures, BEFORE - mixtures @ MATRIX.T)
    found = point_fidelity(parent, 6, fake_children(parent, 5), rows)
    np.testing.assert_allclose(found.law.matrix, MATRIX, atol=1e-12)
    np.testing.assert_allclose(found.sums, MATRIX.sum(axis=0))
    assert found.r2 == pytest.approx(1)
    ours, theirs = np.array([4.0, 3.0, 1.0]), MATRIX.sum(axis=0)
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert found.fidelity == pytest.approx(0.5 * cosine + 0.5)  # the same order
    none = dataclasses.replace(found, acted_on=None, label="static")
    assert mean_fidelity([found, none]) == found.fidelity
    assert math.isnan(mean_fidelity([none]))
    written = json.loads(json.dumps(facts([found, none], child_steps=4), allow_nan=False))
    assert written["methods"]["odm"] == {
        "fidelity": found.fidelity,
        "points": 1,
        "with_estimate": 1,
    }
    assert written["methods"]["static"]["fidelity"] is None
    np.testing.assert_allclose(written["points"][0]["A_star"], MATRIX, atol=1e-12)
    assert written["points"][0]["A_method_sums"] == [4.0, 3.0, 1.0]
    shown = text([found, none], ["odm-seed-3: the disk was full"], child_steps=4)
    assert f"| odm | {found.fidelity:.3f} | 1 of 1 |" in shown
    assert "| static |  | 0 of 1 |" in shown
    assert "- odm-seed-3: the disk was full" in shown


def test_without_a_spare_child_no_r2_is_claimed(parent):
    pytest.importorskip("scipy")
    mixtures = child_mixtures(3, share=1.0, extra=0)
    rows = children_rows(mixtures, BEFORE - mixtures @ MATRIX.T)
    found = point_fidelity(parent, 6, fake_children(parent, 3), rows)
    assert math.isnan(found.r2)
    assert facts([found], child_steps=4)["points"][0]["r2"] is None


def test_children_without_losses_are_refused(parent):
    mixtures = child_mixtures(3, share=0.8, extra=0)
    rows = children_rows(mixtures, BEFORE - mixtures @ MATRIX.T)
    with pytest.raises(RunError, match="no held-out losses"):
        point_fidelity(parent, 6, fake_children(parent, 4), rows)
    lost = [row for row in rows if not (row["domain"] == "noise" and row["step"] == 4)]
    with pytest.raises(RunError, match="no held-out loss of 'noise' after"):
        point_fidelity(parent, 6, fake_children(parent, 3), lost)


# What --methods names.


def test_a_method_is_named_or_a_file(tmp_path):
    runs.make_data(tmp_path / "data")
    base = studies.base(tmp_path, mixing={"method": "odm", "lag": 1, "smoothing_factor": 0.5})
    assert method_base(base, None) == (None, base, ())
    assert named_method(base.load(), "odm") == ()  # with its options
    label, own, overrides = method_base(base, "exp3")
    config = own.load(overrides)
    assert (label, config.mixing.method, config.mixing.lag) == ("exp3", "exp3", 1)
    file = runs.write_config(tmp_path / "mine.yml", {"mixing": {"method": "ema"}})
    label, own, overrides = method_base(base, str(file))
    assert (label, overrides) == ("mine", ())
    assert own == Base(files=(*base.files, str(file)))
    with pytest.raises(ConfigError, match=r"'aiolli' is neither .* did you mean 'aioli'"):
        method_base(base, "aiolli")
