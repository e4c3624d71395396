"""The file of a comparison: what it says, and what it refuses."""

from __future__ import annotations

import pytest
from support import compared

from megatron.errors import ConfigError
from megatron.experiments.compare.study_parts import Budget


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("file")


def test_a_file_says_who_takes_part(folder):
    file = compared.study(
        folder,
        {
            "name": "bench",
            "set": {"eval_iters": 2},
            "tasks": {
                "m": {"configs": "base.yml", "set": {"train_iters": 40}, "entropies": {"walk": 1}},
                "l": {"configs": ["base.yml"], "kind": "control", "seeds": [5, 6, 7]},
            },
            "methods": {
                **compared.UNIFORM,
                "law": {"stages": "sweep", "fit": "law", "points": 9, "share": 0.25},
                "after": {"prior": "law", "mixing": {"method": "aioli"}, "set": {"lr": 0.1}},
            },
            "oracle": {"points": 3, "seeds": [9]},
            "budget": {"setting": "restricted"},
        },
    )
    assert file.name == "bench"
    assert [task.seeds for task in file.tasks] == [(1, 2), (5, 6, 7)]
    assert [task.kind for task in file.tasks] == ["room", "control"]
    assert file.tasks[0].base.overrides == ("eval_iters=2", "train_iters=40")
    assert file.tasks[0].entropies == {"walk": 1.0}
    law, after = file.method("law"), file.method("after")
    assert (law.fit, law.share, law.sweep.points, law.mixing) == (
        "law",
        0.25,
        9,
        {"method": "static"},
    )
    assert (after.prior, after.overrides) == ("law", ("lr=0.1",))
    assert (file.oracle.seeds, file.oracle.sweep.design) == ((9,), "grid")
    assert file.budget == Budget(setting="restricted", extra=0.5)


WRONG = {
    "tsaks": ({"tsaks": {}}, "tsaks: there is no such key; did you mean 'tasks'"),
    "task key": (
        {"tasks": {"t": {"config": "a.yml"}}},
        "tasks.t.config: there is no such key; did you mean 'configs'",
    ),
    "method key": (
        {"methods": {**compared.UNIFORM, "o": {"mixing": {"method": "odm"}, "shares": 1}}},
        "methods.o.shares: there is no such key",
    ),
    "share without stages": (
        {"methods": {**compared.UNIFORM, "o": {"mixing": {"method": "odm"}, "share": 0.5}}},
        "methods.o.share: there is no such key",
    ),
    "no method": (
        {"methods": {**compared.UNIFORM, "o": {"mixing": {"method": "oddm"}}}},
        "methods.o.mixing.method: is 'oddm', no mixing method; did you mean 'odm'",
    ),
    "baseline": ({"baseline": "unifrm"}, "baseline: is 'unifrm', .*did you mean 'uniform'"),
    "baseline with stages": (
        {
            "baseline": "p",
            "methods": {"p": {"stages": "proxy", "mixing": {"method": "doge"}}},
        },
        "the baseline is one plain run",
    ),
    "seed in set": (
        {"methods": {**compared.UNIFORM, "o": {"mixing": {"method": "odm"}, "set": {"seed": 1}}}},
        "methods.o.set.seed: the comparison sets it",
    ),
    "steps in set": (
        {
            "methods": {
                **compared.UNIFORM,
                "o": {"mixing": {"method": "odm"}, "set": {"train-iters": 1}},
            }
        },
        "methods.o.set.train-iters: the comparison sets it",
    ),
    "seeds twice": ({"seeds": [1, 1]}, "seeds: is .1, 1.; give a list of different numbers"),
    "no seeds": ({"seeds": []}, "tasks.t.seeds: there are none"),
    "oracle seeds": ({"oracle": {"seeds": [2, 3]}}, "oracle.seeds: 2 is a test seed of 't'"),
    "prior": (
        {"methods": {**compared.UNIFORM, "a": {"mixing": {"method": "aioli"}, "prior": "uniform"}}},
        "methods.a.prior: 'uniform' finds no mixture",
    ),
    "doremi": (
        {"methods": {**compared.UNIFORM, "d": {"stages": "doremi", "mixing": {"method": "doge"}}}},
        "stages 'doremi' need 'doremi'",
    ),
    "reference": (
        {
            "methods": {
                **compared.UNIFORM,
                "d": {"stages": "doremi", "mixing": {"method": "doremi", "reference": "runs/r"}},
            }
        },
        "methods.d.mixing.reference: stages 'doremi' makes it",
    ),
    "share": (
        {"methods": {**compared.UNIFORM, "s": {"stages": "sweep", "share": 1.5}}},
        "methods.s.share: is 1.5; it must be between 0 and 1",
    ),
    "extra": ({"budget": {"extra": 3}}, "budget.extra: belongs to restricted"),
    "setting": ({"budget": {"setting": "equall"}}, "did you mean 'equal'"),
    "oracle's name": (
        {"methods": {**compared.UNIFORM, "oracle": {"mixing": {"method": "odm"}}}},
        "methods.oracle: the name is taken",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_file_and_key(folder, case):
    content, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        compared.study(folder, {"methods": compared.UNIFORM, **content})
    assert str(folder / "study.yml") in str(caught.value)


def test_a_command_line_takes_a_part_and_the_baseline_stays(folder):
    methods = {
        **compared.UNIFORM,
        "p": {"stages": "proxy", "mixing": {"method": "doge"}},
        "a": {"mixing": {"method": "aioli"}, "prior": "p"},
    }
    file = compared.study(folder, {"methods": methods})
    part = file.only(tasks=None, methods=["a"], seeds=[2])
    assert [method.name for method in part.methods] == ["uniform", "a"]
    assert part.method("p").stages == "proxy"  # whose runs 'a' needs, though it is not compared
    assert part.tasks[0].seeds == (2,)
    for key, value in (("tasks", ["x"]), ("methods", ["odm"]), ("seeds", [3])):
        chosen = {"tasks": None, "methods": None, "seeds": None, key: value}
        with pytest.raises(ConfigError, match=f"--{key}"):
            file.only(**chosen)
