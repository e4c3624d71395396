"""The installation: one recipe, in the Makefile, whichever way it is reached."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from support.isolated import run_isolated
from support.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE
    )
}


def distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def makefile(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )
    return done.stdout


def test_the_bare_installation_needs_three_libraries():
    assert {distribution(name) for name in PROJECT["dependencies"]} == {
        "numpy",
        "pydantic",
        "pyyaml",
    }
    assert PROJECT["requires-python"] == ">=3.11"


def test_every_promised_extra_is_there():
    promised = "train eval select studies wandb tensorboard comet docs flash apex dev"
    assert set(promised.split()) == set(EXTRAS)


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_requirements_point_at_the_extras(extra):
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["-c ../constraints.txt", f"-e .[{extra}]"]


def test_constraints_name_all_that_a_developer_installs():
    wanted = [*PROJECT["dependencies"], *EXTRAS["dev"]]
    for extra in ("train", "studies", "tensorboard", "wandb", "comet"):
        wanted += EXTRAS[extra]
    missing = {distribution(name) for name in wanted} - {"neomix"} - set(CONSTRAINTS)
    assert not missing
    assert CONSTRAINTS["torch"] == "2.13.0"  # no build label: a CPU build serves as well


def test_make_install_uses_the_constraints_and_the_train_extra():
    recipe = makefile("--dry-run", "--always-make", "install", "VENV=/nowhere/venv")
    assert "-c constraints.txt" in recipe
    assert "-e '.[train]'" in recipe
    assert ".[dev]" not in recipe
    assert "-e '.[dev]'" in makefile("--dry-run", "--always-make", "test", "VENV=/nowhere/venv")


def test_the_dockerfile_installs_as_the_makefile_does():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    image = re.search(r"^FROM pytorch/pytorch:(\S+?)-cuda\S+$", text, flags=re.MULTILINE)
    assert image is not None, "not a stock CUDA image of PyTorch"
    assert image[1] == CONSTRAINTS["torch"]
    steps = re.findall(r"^RUN (.*)$", text, flags=re.MULTILINE)
    assert "make install" in steps
    assert not [step for step in steps if "pip" in step], "pip belongs into the Makefile"
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", text, re.M))))
    recipe = makefile(
        "--dry-run",
        "--always-make",
        "install",
        *(f"{k}={settings[k]}" for k in ("VENV", "VENV_ARGS")),
    )
    assert f"-m venv --clear --system-site-packages {settings['VENV']}" in recipe
    assert settings["PATH"].startswith(f"{settings['VENV']}/bin")


def test_the_ci_script_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.rstrip().endswith("make test")
    assert "make test" in (ROOT / "README.md").read_text()


def test_pre_commit_hooks_are_local():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    entries = " ".join(hook["entry"] for hook in hooks[0]["hooks"])
    for tool in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert tool in entries


def test_two_distributions_share_the_namespace(tmp_path):
    """A second `megatron` folder on the path, as megatron-core's, does not hide the first."""
    other = tmp_path / "megatron" / "core"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("value = 1\n")
    code = "import megatron.core, megatron.errors; print(megatron.core.value, megatron.__file__)"
    for order in ([str(tmp_path), str(ROOT)], [str(ROOT), str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(order)},
        )
        assert done.stdout == "1 None\n", done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None, reason="megatron-core is not installed"
)
def test_megatron_core_is_imported_beside_ours():
    code = (
        "import megatron.core, megatron.errors, megatron.registry\n"
        "print('core' in megatron.core.__file__, megatron.errors.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout == f"True {ROOT / 'megatron' / 'errors.py'}\n", done.stderr


def test_configuration_imports_with_the_bare_installation():
    bare = ["numpy", "pydantic", "pydantic_core", "yaml", "annotated_types", "typing_extensions"]
    bare += ["typing_inspection"]
    done = run_isolated("import megatron.mixing, megatron.config", allowed=bare)
    assert done.returncode == 0, done.stderr


def test_mixing_imports_with_numpy_alone():
    code = (
        "from data_sampling_utils import Observation, available_methods, build_mixer\n"
        "mixer = build_mixer('odm', domains=['a', 'b'])\n"
        "print(sum(mixer.decide(step=1).sampling_weights), 'odm' in available_methods())"
    )
    done = run_isolated(code, allowed=["numpy"])
    assert done.stdout == "1.0 True\n", done.stderr


def test_the_guard_of_these_tests_guards():
    assert "No module named 'yaml'" in run_isolated("import yaml", allowed=["numpy"]).stderr
