"""Conversion of a checkpoint to DeepSpeed's universal format, which any layout can load."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError


def universal_info(padded_vocab_size: int) -> dict[str, Any]:
    """Return what a checkpoint's client state must carry to be convertible.

    It names how tensor-parallel slices are put together again; without tensor parallelism
    every parameter is whole and no pattern is needed.
    """
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": padded_vocab_size,
        "vocabulary_parameter_patterns": [],
        "tp_replicated_parameter_patterns": [],
        "parameter_to_average_patterns": [],
        "parameter_with_row_parallelism_patterns": [],
        "pipeline_replicated_parameter_patterns": [],
        "parameter_with_2_sub_params_cat_dim_0": [],
        "parameter_with_sub_params": [],
    }


def check_convertible(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a checkpoint of one layout can be taken up by another.

    Raises:
        CheckpointError: one of them is ZeRO stage 0, which has no universal format, or they
            cross the border between ZeRO 3 and ZeRO 1 or 2.
    """
    if 0 in (saved["zero_stage"], wanted["zero_stage"]):
        raise CheckpointError(
            "the checkpoint's layout is not the run's, and one of the two is ZeRO stage 0 (forced "
            "by deepspeed_extra_args), which DeepSpeed's universal format does not know; resume "
            "with the layout that wrote it, or start in another run_dir with stage 1"
        )
    if (saved["zero_stage"] == 3) != (wanted["zero_stage"] == 3):
        raise CheckpointError(
            f"the checkpoint was written under ZeRO stage {saved['zero_stage']} and this run asks "
            f"for stage {wanted['zero_stage']}: DeepSpeed's universal format converts 1 to 2 and "
            f"back, and 3 to 3, not between them; set zero_optimization.stage to "
            f"{saved['zero_stage']} or start in another run_dir"
        )


def convert_to_universal(source: Path, target: Path) -> None:
    """Write the universal form of the DeepSpeed checkpoint ``source`` into ``target``.

    Raises:
        CheckpointError: DeepSpeed could not convert it; its own message is quoted.
    """
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True, exist_ok=True)
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"cannot convert {source} to the universal format: {type(error).__name__}: {error}; "
            "resume with the layout that wrote it, or start in another run_dir"
        ) from error
