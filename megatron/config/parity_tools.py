"""The tools and scripts of GPT-NeoX and of its online-data-mixing fork, and what does their work.

Facts about upstream (paths and flags) and about this repository; a test compares both with the
parsers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ODM, NEOX = "online-data-mixing", "gpt-neox"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One script of upstream.

    Attributes:
        system: whose it is.
        path: its path there.
        state: whether one of ours does its work, or it is refused.
        ours: the script that does it.
        reason: why it is refused and what to do instead; else what is done differently.
        flags: its flags, each with its own name (the same here) or what there is instead.
    """

    system: str
    path: str
    state: Literal["works", "mapped", "refused"] = "works"
    ours: str = ""
    reason: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)


def _same(*flags: str) -> dict[str, str]:
    return {flag: flag for flag in flags}


_LAUNCHER = {
    **_same("user_script", "conf_file", "--conf_dir", "-d", "-H", "--hostfile"),
    **_same("--wandb_group", "--wandb_team", "--wandb_run_name"),
    "--eval_tasks": "`--set eval_tasks=[…]`",
    "--iteration": "`--set iteration=N`",
    "--eval_results_prefix": "`--set eval_results_prefix=…`",
    "--sample_input_file": "`--set sample_input_file=…`",
    "-i": "`--set sample_input_file=…`",
    "--sample_output_file": "`--set sample_output_file=…`",
    "-o": "`--set sample_output_file=…`",
    "--megatron_config": "`--resolved-config`, set by the launcher",
}
_PREPARE = {
    **_same("dataset", "-t", "--tokenizer", "-v", "--vocab-file", "-m", "--merge-file"),
    **_same("-d", "--data-dir"),
}
_PREPROCESS = _same(
    "--input", "--jsonl-keys", "--num-docs", "--tokenizer-type", "--vocab-file", "--merge-file",
    "--append-eod", "--ftfy", "--output-prefix", "--dataset-impl", "--workers", "--log-interval",
)  # fmt: skip
_TRAIN_TOKENIZER = _same(
    "--json_input_dir", "--tokenizer_output_path", "--tokenizer_type", "--vocab_size", "-v"
)
_NO_UPLOAD = "a separate step, on the exported folder"
_INSPECT = {
    "dir": "`DIR[,DIR2]`",
    **_same("--attributes", "--interactive", "-i", "--compare", "-c", "--diff", "-d"),
}
_ANY_LAYOUT = "a checkpoint is loaded under any layout, so that nothing has to be merged"
_MERGE = {"--input_dir": "`load`", "--output_dir": "`save`"}
_CLUSTER = "the launcher starts, watches and ends all ranks; see docs/clusters.md"
_OVERRIDES = "`--set key=value` writes no file; every run folder keeps its resolved configuration"

TOOLS: tuple[Tool, ...] = (
    Tool(system=ODM, path="deepy.py", ours="deepy.py", flags=_LAUNCHER),
    Tool(system=ODM, path="train.py", ours="train.py"),
    Tool(system=ODM, path="evaluate.py", ours="evaluate.py"),
    Tool(system=ODM, path="generate.py", ours="generate.py"),
    Tool(system=ODM, path="prepare_data.py", ours="prepare_data.py", flags=_PREPARE),
    Tool(
        system=ODM,
        path="bigram_model.py",
        ours="bigram_model.py",
        flags=_same(
            "--save_path",
            "--dataset_name",
            "--train_samples",
            "--train",
            "--evaluate_samples",
            "--evaluate",
        ),
    ),
    Tool(
        system=ODM,
        path="megatron/tokenizer/train_tokenizer.py",
        ours="tools/train_tokenizer.py",
        flags=_TRAIN_TOKENIZER,
    ),
    Tool(
        system=ODM,
        path="tools/preprocess_data.py",
        ours="tools/preprocess_data.py",
        flags=_PREPROCESS,
    ),
    *(
        Tool(
            system=ODM,
            path=f"tools/{name}.py",
            ours="tools/convert_checkpoint.py",
            flags={**_same("--input_dir", "--config_file", "--output_dir"), "--upload": _NO_UPLOAD},
        )
        for name in ("convert_to_hf", "convert_sequential_to_hf")
    ),
    Tool(
        system=ODM,
        path="tools/inspect_checkpoints.py",
        ours="tools/inspect_checkpoints.py",
        flags=_INSPECT,
    ),
    Tool(
        system=ODM,
        path="tools/merge20b.py",
        state="mapped",
        ours="train.py",
        reason=_ANY_LAYOUT,
        flags=_MERGE,
    ),
    Tool(
        system=ODM,
        path="tools/merge_mp_partitions.py",
        state="mapped",
        ours="train.py",
        reason=f"{_ANY_LAYOUT} (theirs imports modules that do not exist)",
        flags={"--model-type": "–"},
    ),
    Tool(
        system=ODM,
        path="tools/create_eval_config.py",
        state="mapped",
        ours="evaluate.py",
        reason=_OVERRIDES,
        flags={
            "--config_path": "the run's own files",
            "--num_fewshot": "`--set eval_num_fewshot=N`",
            "--iteration": "`--set iteration=N`",
        },
    ),
    Tool(
        system=ODM,
        path="tools/create_run_specific_config.py",
        state="mapped",
        ours="deepy.py",
        reason=_OVERRIDES,
    ),
    Tool(system=ODM, path="tools/upload.py", ours="tools/upload.py"),
    *(
        Tool(system=ODM, path=f"tools/{name}.sh", state="mapped", ours="deepy.py", reason=_CLUSTER)
        for name in ("kill", "killall", "sync", "sync_cmd", "syncdir")
    ),
    Tool(
        system=NEOX,
        path="deepy.py",
        ours="deepy.py",
        flags={
            **_LAUNCHER,
            "--autotuning": "refused, as the key `autotuning`; `--plan` works the sizes out",
            "--deepspeed_config": "made by every rank from the resolved configuration",
        },
    ),
    Tool(system=NEOX, path="train.py", ours="train.py"),
    Tool(system=NEOX, path="eval.py", state="mapped", ours="evaluate.py"),
    Tool(system=NEOX, path="generate.py", ours="generate.py"),
    Tool(
        system=NEOX,
        path="prepare_data.py",
        ours="prepare_data.py",
        flags={**_PREPARE, **dict.fromkeys(("-f", "--force-redownload"), "`--overwrite`")},
    ),
    Tool(
        system=NEOX,
        path="megatron/tokenizer/train_tokenizer.py",
        ours="tools/train_tokenizer.py",
        flags=_TRAIN_TOKENIZER,
    ),
    *(
        Tool(
            system=NEOX,
            path=f"tools/ckpts/{name}",
            state="mapped",
            ours="tools/convert_checkpoint.py",
            flags=flags,
        )
        for name, flags in (
            (
                "convert_hf_llama_to_neox.py",
                {
                    "--tp": "any layout loads it",
                    "--pp": "any layout loads it",
                    "--model": "read from its config.json",
                    "--model_path": "`--input_dir`",
                },
            ),
            (
                "convert_hf_to_sequential.py",
                {
                    "--revision": "fetch it first",
                    "--output-dir": "`--output_dir`",
                    "--config": "`--config_file`",
                    "--test": "always: logits are compared",
                    "--download-only": "fetch it first",
                    "--ckpt-tmp-dir": "none is needed",
                    "--hf-model-name": "`--input_dir`, a folder",
                    "--cache-dir": "fetch it first",
                },
            ),
        )
    ),
    Tool(
        system=NEOX,
        path="tools/ckpts/convert_neox_to_hf.py",
        ours="tools/convert_checkpoint.py",
        flags={
            **_same("--input_dir", "--config_file", "--output_dir", "--precision"),
            **_same("--no_save_tokenizer", "--pad-token-id", "--architecture"),
            "--vocab-is-hf-tokenizer": "told by `tokenizer_type`",
        },
    ),
    Tool(
        system=NEOX,
        path="tools/ckpts/convert_neox_to_mamba_ssm.py",
        state="refused",
        reason="Mamba layers are not offered; train a transformer",
        flags=dict.fromkeys(
            ("--input_dir", "--config_file", "--output_dir", "--precision", "--no_save_tokenizer"),
            "–",
        ),
    ),
    Tool(
        system=NEOX,
        path="tools/ckpts/convert_raw_llama_weights_to_neox.py",
        state="refused",
        reason="Meta's own file format is not read; take the same weights in Hugging Face's, and "
        "tools/convert_checkpoint.py",
        flags=dict.fromkeys(
            (
                "--input_dir",
                "--model_size",
                "--output_dir",
                "--num_output_shards",
                "--pipeline_parallel",
            ),
            "–",
        ),
    ),
    Tool(
        system=NEOX,
        path="tools/ckpts/inspect_checkpoints.py",
        ours="tools/inspect_checkpoints.py",
        flags=_INSPECT,
    ),
    Tool(
        system=NEOX,
        path="tools/ckpts/merge20b.py",
        state="mapped",
        ours="train.py",
        reason=_ANY_LAYOUT,
        flags=_MERGE,
    ),
    Tool(system=NEOX, path="tools/ckpts/upload.py", ours="tools/upload.py"),
    Tool(
        system=NEOX,
        path="tools/datasets/merge_datasets.py",
        ours="tools/merge_datasets.py",
        flags={
            "--input": "`--input`, prefixes instead of a folder",
            "--output-prefix": "--output-prefix",
        },
    ),
    Tool(
        system=NEOX,
        path="tools/datasets/dataset_token_count.py",
        ours="tools/dataset_token_count.py",
    ),
    Tool(
        system=NEOX,
        path="tools/datasets/preprocess_data.py",
        ours="tools/preprocess_data.py",
        flags=_PREPROCESS,
    ),
    Tool(
        system=NEOX,
        path="tools/datasets/preprocess_data_with_mask.py",
        ours="tools/preprocess_data_with_mask.py",
        flags={**_PREPROCESS, "--mask-before-token": "--mask-before-token"},
    ),
    Tool(
        system=NEOX,
        path="tools/datasets/preprocess_data_with_chat_template.py",
        ours="tools/preprocess_data_with_chat_template.py",
        flags={
            **_same("--input", "--jsonl-keys", "--no-mask", "--generation-role", "--only-last"),
            **_same("--num-docs", "--tokenizer-path", "--ftfy", "--output-prefix"),
            **_same("--dataset-impl", "--workers", "--log-interval"),
            **_same("--for-rm", "--reward-key", "--binary-reward"),
        },
    ),
    Tool(
        system=NEOX,
        path="tools/datasets/multinode_prepare_data.sh",
        state="mapped",
        ours="tools/preprocess_data.py",
        reason="one call a node on its part of the files, then tools/merge_datasets.py",
    ),
    *(
        Tool(
            system=NEOX,
            path=f"tools/bash/{name}.sh",
            state="mapped",
            ours="deepy.py",
            reason=_CLUSTER,
        )
        for name in ("kill", "killall", "sync", "sync_cmd", "syncdir")
    ),
)
