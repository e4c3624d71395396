"""Planning a study: folders by what decides results, and what the runs take."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from support import runs, studies

from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.experiments.estimate import estimate
from megatron.experiments.finished import Finish, write_finish
from megatron.experiments.study import Variant, plan_study, static_overrides
from megatron.model.accounting import flops_per_token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    runs.make_data(place / "data")
    return place


def key(folder, *overrides, **changes):
    (run,) = studies.plan(folder, Variant(name="one", overrides=overrides), **changes).runs
    return run.key


def test_a_folder_is_named_by_what_decides_the_results(folder):
    plain = key(folder)
    for same in (
        "run_dir=somewhere",
        "log_interval=5",
        "save_interval=2",
        "save=elsewhere",
        "wandb_group=x",
        "num_gpus=1",
        "state_check_interval=3",
    ):
        assert key(folder, same) == plain, same
    others = [
        key(folder, other)
        for other in (
            "seed=7",
            "train_iters=13",
            "optimizer.params.lr=1e-4",
            "hidden_size=32",
            "mixing.warmup_steps=3",
            "eval_iters=2",
            "split='70,20,10'",
            "load=other_run",
        )
    ]
    assert len({plain, *others}) == 9


def test_other_data_in_the_same_place_is_another_run(folder, tmp_path):
    runs.make_data(tmp_path / "data")
    before = key(tmp_path)
    assert key(tmp_path) == before
    runs.make_data(tmp_path / "data", documents=201)
    assert key(tmp_path) != before


def test_the_request_is_the_whole_run(folder):
    study = studies.plan(folder, Variant(name="one", overrides=("seed=3",)), save="shared")
    (run,) = study.runs
    config = load_config([str(run.write_request())])
    assert config == run.config
    assert config.run_dir == str(run.folder)
    assert run.folder.name == run.key
    assert config.checkpoint.save_dir.startswith(str(run.folder))
    assert config.checkpoint.save_interval == 3
    assert config.checkpoint.keep_last_n_checkpoints == 1
    assert (config.training.seed, run.seed, run.method) == (3, 3, "odm")
    assert config.hash() == run.config.hash()


def test_a_study_knows_what_it_takes(folder):
    study = studies.plan(folder, *studies.seeds(3), Variant(name="again", overrides=("seed=1",)))
    assert len(study.runs) == 4
    assert [run.name for run in study.distinct] == ["seed-0", "seed-1", "seed-2"]
    tokens = studies.STEPS * 8 * 16
    assert study.tokens == 3 * tokens
    each = tokens * flops_per_token(study.runs[0].config.model)
    assert study.flops == pytest.approx(3 * each)
    told = estimate(study, jobs=2, rate=each)
    assert (told.runs, told.left, told.seconds) == (3, 3, pytest.approx(2.0))
    assert estimate(study, jobs=2).seconds is None
    write_finish(study.runs[0], Finish(step=12, seconds=10.0))
    measured = estimate(study, jobs=2)
    assert (measured.left, measured.tokens_left) == (2, 2 * tokens)
    assert measured.rate == pytest.approx(each / 10)
    assert measured.seconds == pytest.approx(10.0)
    assert "2 runs" in measured.text()


def test_a_fixed_mixture_takes_the_place_of_method_and_weights(folder):
    domains = {
        name: {"train": str(folder / "data" / name), "weight": weight}
        for name, weight in (("walk", 3), ("drift", 1), ("noise", 2))
    }
    base = studies.base(
        folder,
        domains=domains,
        mixing={"method": "odm", "warmup_steps": 2, "draw": "multinomial", "lag": 1},
    )
    wanted = {"walk": 0.25, "drift": 0.75, "noise": 0.0}
    overrides = static_overrides(base.load(), wanted)
    study = plan_study("s", base, [Variant(name="one", overrides=overrides)], folder / "runs")
    (run,) = study.runs
    assert dict(run.weights) == wanted
    assert run.config.mixing.method == "static"
    assert (run.config.mixing.draw, run.config.mixing.lag) == ("multinomial", 1)


def test_points_that_differ_by_rounding_share_a_folder(folder):
    config = studies.base(folder).load()
    thirds = np.full(3, 1 / 3)
    sums = 1 - thirds[0] - thirds[1]
    one = static_overrides(config, dict(zip(config.trained, thirds, strict=True)))
    two = static_overrides(config, dict(zip(config.trained, [*thirds[:2], sums], strict=True)))
    assert sums != thirds[2]
    assert one == two


@pytest.mark.parametrize(
    ("variants", "match"),
    [
        ([], "no runs"),
        ([Variant(name="a"), Variant(name="a", overrides=("seed=2",))], "called 'a'"),
        ([Variant(name="a", overrides=("sede=2",))], "sede"),
    ],
)
def test_what_cannot_be_planned_is_refused(folder, variants, match):
    with pytest.raises(ConfigError, match=match):
        plan_study("study", studies.base(folder), variants, folder / "runs")


def test_a_plan_writes_nothing(folder, tmp_path):
    studies.plan(folder, *studies.seeds(2), runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_requests_are_files_that_people_can_read(folder):
    (run,) = studies.plan(folder).runs
    assert yaml.safe_load(run.write_request().read_text())["train_iters"] == studies.STEPS
