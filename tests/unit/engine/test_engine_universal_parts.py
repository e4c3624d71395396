"""What the conversion is told of each parameter, and how a rank's part is cut out of the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_spec import TestSpec

from megatron.engine.universal import universal_info
from megatron.engine.universal_load import UniversalCheckpoint
from megatron.errors import CheckpointError
from megatron.model.gpt import GPT
from megatron.parallel.partition import Partition

SPECS = {
    "neox": TestSpec(num_layers=12),
    "gated": TestSpec(num_layers=12, activation="geglu", intermediate_size=48),
    "llama": TestSpec(
        num_layers=12,
        num_kv_heads=2,
        norm="rmsnorm",
        activation="swiglu",
        intermediate_size=48,
        no_weight_tying=True,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
    ),
}


def described(spec: TestSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    parameters = dict(GPT(spec, seed=1, device="meta").named_parameters())
    return parameters, universal_info(parameters, spec.vocab_size)


def matching(info: dict[str, Any], name: str) -> list[str]:
    """Return under which headings a name is found, as DeepSpeed looks for them."""
    found = [
        heading
        for heading in (
            "vocabulary_parameter_patterns",
            "tp_replicated_parameter_patterns",
            "parameter_with_row_parallelism_patterns",
        )
        for pattern in info[heading]
        if re.match(pattern, name)
    ]
    blocks = [
        entry
        for entry in info["parameter_with_sub_params"]
        for pattern in entry["patterns"]
        if re.match(pattern, name)
    ]
    return found + ["parameter_with_sub_params"] * len(blocks)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_parameter_is_told_once(spec: TestSpec) -> None:
    parameters, info = described(spec)
    for name, parameter in parameters.items():
        partition = parameter.partition
        if partition is None:
            expected = ["tp_replicated_parameter_patterns"]
        elif partition.padded_from is not None:
            expected = ["vocabulary_parameter_patterns"]
        elif len(partition.blocks) > 1:
            expected = ["parameter_with_sub_params"]
        elif partition.dim == 1:
            expected = ["parameter_with_row_parallelism_patterns"]
        else:
            expected = []
        assert matching(info, name) == expected, name
    assert info["original_vocab_size"] == spec.vocab_size


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_patterns_do_not_grow_with_the_model(spec: TestSpec) -> None:
    deep = TestSpec(**{**vars(spec), "num_layers": 40})
    assert described(spec)[1].keys() == described(deep)[1].keys()
    for heading, patterns in described(spec)[1].items():
        # The final norm has a number of its own, which stands for all.
        assert patterns == described(deep)[1][heading], heading
    # A pattern left over would end the conversion.
    parameters, info = described(spec)
    for heading, patterns in info.items():
        if heading.endswith("_patterns") and not heading.startswith("pipeline"):
            for pattern in patterns:
                assert any(re.match(pattern, name) for name in parameters), pattern


def test_fused_blocks_keep_their_sizes() -> None:
    _, info = described(SPECS["llama"])
    shapes = {
        tuple(entry["patterns"]): entry["shape"] for entry in info["parameter_with_sub_params"]
    }
    assert set(shapes.values()) == {((32, 16, 16), 32), ((48, 48), 32)}


def stored(folder: Path, name: str, value: torch.Tensor, *, flat: bool = False) -> None:
    (folder / "zero" / name).mkdir(parents=True)
    torch.save(value.reshape(-1) if flat else {"param": value}, folder / "zero" / name / "fp32.pt")


PARTITIONS = {
    "columns": (Partition(dim=0, blocks=(8,)), (8, 6)),
    "rows": (Partition(dim=1, blocks=(8,)), (6, 8)),
    "fused": (Partition(dim=0, blocks=(8, 4, 4)), (16, 6)),
    "bias": (Partition(dim=0, blocks=(8, 4, 4)), (16,)),
    "whole": (None, (5, 3)),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", PARTITIONS)
def test_parts_put_together_are_the_whole(
    tmp_path: Path, kind: str, ranks: int, flat: bool
) -> None:
    partition, shape = PARTITIONS[kind]
    full = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    stored(tmp_path, "one", full, flat=flat)
    part_shape = list(shape)
    if partition is not None:
        part_shape[partition.dim] //= ranks
    parts = [
        UniversalCheckpoint(
            tmp_path, partitions={"one": partition}, tensor_rank=rank, tensor_size=ranks
        ).part("one", "fp32", part_shape)
        for rank in range(ranks)
    ]
    if partition is None:
        assert all(torch.equal(part, full) for part in parts)
    else:
        assert torch.equal(partition.join(parts), full)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("saved_rows", [10, 12])
def test_the_vocabulary_is_padded_anew(tmp_path: Path, flat: bool, saved_rows: int) -> None:
    """Also where a rank's part is just as large as what is stored."""
    full = torch.zeros(saved_rows, 3)
    full[:10] = torch.arange(1, 31).reshape(10, 3)
    stored(tmp_path, "one", full, flat=flat)
    partition = Partition(dim=0, blocks=(2 * saved_rows,), padded_from=10)
    parts = [
        UniversalCheckpoint(
            tmp_path, partitions={"one": partition}, tensor_rank=rank, tensor_size=2
        ).part("one", "fp32", (saved_rows, 3))
        for rank in (0, 1)
    ]
    assert torch.equal(parts[0][:10], full[:10])
    assert not parts[0][10:].any()
    assert not parts[1].any()


def test_another_models_parameter_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "one", torch.zeros(9, 5))
    for partition, shape in (
        (None, (8, 5)),
        (Partition(dim=0, blocks=(8,)), (8, 5)),
        (Partition(dim=1, blocks=(5,)), (8, 5)),
        (Partition(dim=0, blocks=(16,), padded_from=12), (16, 5)),
    ):
        checkpoint = UniversalCheckpoint(
            tmp_path, partitions={"one": partition}, tensor_rank=0, tensor_size=1
        )
        with pytest.raises(CheckpointError, match="parameter one is stored as"):
            checkpoint.part("one", "fp32", shape)


def test_missing_and_hostile_files_are_refused(tmp_path: Path) -> None:
    stored(tmp_path, "one", torch.zeros(2, 2))
    checkpoint = UniversalCheckpoint(
        tmp_path, partitions={"one": None}, tensor_rank=0, tensor_size=1
    )
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt"):
        checkpoint.part("one", "exp_avg", (2, 2))
    torch.save({"param": Path("/tmp/x")}, tmp_path / "zero/one/exp_avg.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.part("one", "exp_avg", (2, 2))
