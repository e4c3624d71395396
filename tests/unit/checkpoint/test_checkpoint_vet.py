"""Pickles that run something are refused unread; DeepSpeed's own are not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.campaign.pickles import INERT, PAYLOADS, Calls, bare_pickle, touch

from megatron.checkpoint import vet_checkpoint, vet_file
from megatron.checkpoint.vet import DEEPSPEED_GLOBALS
from megatron.errors import CheckpointError

torch = pytest.importorskip("torch")

PROGRAMS = Path(__file__).resolve().parent / "programs"


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_pickle_that_runs_something_is_refused_unread(tmp_path: Path, name: str) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "model.pt"
    PAYLOADS[name](path, sentinel)
    refused = _refusal(path)
    assert not sentinel.exists()
    # The payload is a real one: read without vetting it would have run.
    ran = _runs(path, sentinel)
    assert (str(path) in refused and "not loaded" in refused) or not ran
    assert ran or name in INERT or name == "two members"


def _refusal(path: Path) -> str:
    """Return what vetting says against ``path``, nothing if it lets it pass."""
    try:
        vet_file(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _runs(path: Path, sentinel: Path) -> bool:
    try:
        torch.load(path, weights_only=False)
    except Exception:  # what it returns or raises after it has run does not matter
        return sentinel.exists()
    return sentinel.exists()


def test_the_names_are_given(tmp_path: Path) -> None:
    torch.save({"x": touch(tmp_path / "s"), "y": Calls(socket.gethostname)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        vet_file(tmp_path / "m.pt")
    assert "would run _socket.gethostname, posix.mkdir" in str(caught.value)
    vet_file(tmp_path / "m.pt", allowed={"posix.mkdir", "_socket.gethostname"})


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give TorchScript up
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match="torchscript"):
        vet_file(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"PK\x03\x04" + b"\0" * 500])
def test_what_is_no_torch_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be vetted and is not loaded"):
        vet_file(tmp_path / "m.pt")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        vet_file(tmp_path / "m.pt")


def test_a_folder_is_vetted_whole(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    vet_checkpoint(tmp_path)
    bare_pickle(tmp_path / "deep/other.bin", tmp_path / "sentinel")
    with pytest.raises(CheckpointError, match=r"deep/other\.bin"):
        vet_checkpoint(tmp_path)
    vet_checkpoint(tmp_path, skip=["deep/other.bin"])
    assert not (tmp_path / "sentinel").exists()


def test_the_classes_that_deepspeed_saves_pass(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2, 1000, 2, 1, 1, False, torch.float16)
    state = [LossScaler(1), scaler, ZeroStageEnum(2), fragment_address(numel=1, start=2)]
    torch.save({"optimizer": state, "weight": torch.zeros(2)}, tmp_path / "m.pt")
    vet_file(tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        vet_file(tmp_path / "m.pt", allowed=())
    assert all(name in str(caught.value) for name in DEEPSPEED_GLOBALS)


@pytest.mark.slow
def test_deepspeeds_own_checkpoints_pass(tmp_path: Path) -> None:
    """ZeRO 1-3 in four precisions on two ranks, and their universal forms."""
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, str(PROGRAMS / "deepspeed_checkpoints.py"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 12
    named: set[str] = set()
    for folder in folders:
        vet_checkpoint(folder / "global_step1")
        for path in (folder / "global_step1").glob("*.pt"):
            named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    assert named == DEEPSPEED_GLOBALS, "the list holds what is needed and no more"
    convert = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    convert += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    for name in ("1_bf16", "3_fp16"):
        target = tmp_path / name / "universal"
        source = tmp_path / name / "global_step1"
        paths = ["--input_folder", str(source), "--output_folder", str(target)]
        subprocess.run([*convert, *paths], env=environment, check=True, capture_output=True)
        vet_checkpoint(target)
