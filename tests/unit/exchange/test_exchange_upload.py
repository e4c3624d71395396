"""The upload tool as a user calls it, against a stand-in of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub import TOKEN, stand_in
from support.source import ROOT

from megatron.errors import NeomixError, RunError
from megatron.exchange.upload import upload

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "gpt_neox"}')
    save_file({"weight": torch.arange(5000.0)}, made / "model.safetensors")
    return made


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    # The stand-in speaks LFS alone.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return monkeypatch


def test_a_folder_goes_up_as_one_commit(
    folder: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    with stand_in() as hub:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools/upload.py"), str(folder), "people/mine", "step12",
             "--private"],
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                 "HF_ENDPOINT": hub.endpoint},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.endpoint}/people/mine/commit/{'0' * 40}"
        branches = hub.branches["people/mine"]
        assert branches == {
            "main": {},
            "step12": {file.name: file.read_bytes() for file in folder.iterdir()},
        }
        assert hub.private == {"people/mine": True}
        assert len(hub.objects) == 1
        # Again, now that both are there, and with words of one's own.
        environment.setenv("HF_ENDPOINT", hub.endpoint)
        # The library has read the variable when it was imported, and asks there for more.
        environment.setattr(constants, "ENDPOINT", hub.endpoint)
        upload(folder, "people/mine", "main", private=False, message="Once more")
        assert branches["main"] == branches["step12"]
        assert hub.messages == ["Upload model", "Once more"]
        environment.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(RunError, match="the token is not valid"):
            upload(folder, "people/mine", "main", private=False, message="")


WAYS = {
    "token": "set HF_TOKEN",
    "folder": r"tools/convert_checkpoint\.py --to hf",
    "weights": "holds no weights",
    "network": "cannot reach http://127.0.0.1:9",
    "name": "no repository's name",
}


@pytest.mark.parametrize("what", WAYS)
def test_what_stands_in_the_way(folder: Path, what: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if what == "token":
        environment.delenv("HF_TOKEN")
    elif what == "folder":
        (folder / "config.json").unlink()
    elif what == "weights":
        (folder / "model.safetensors").unlink()
    repository = "a/b/c" if what == "name" else "people/mine"
    with pytest.raises(NeomixError, match=WAYS[what]):
        upload(folder, repository, "main", private=False, message="")
