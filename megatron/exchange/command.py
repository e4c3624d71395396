"""``tools/convert_checkpoint.py``: which conversion a command line asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron.errors import CheckpointError, ConfigError
from megatron.exchange.export import ExportOptions, export
from megatron.exchange.hf_import import import_hugging_face, is_hugging_face
from megatron.exchange.neox_files import GroupedLayout, NeoxOptions, RowBiases, is_deepspeed
from megatron.exchange.neox_import import NeoxSource, import_deepspeed
from megatron.exchange.shards import parse_size
from megatron.exchange.source import find_source
from megatron.training.convert import choose, convert, describe

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is asked for; names are those of the command line.

    Attributes:
        input: folder of ours, of Hugging Face, or of DeepSpeed's GPT-NeoX files.
        output: where the result goes; None with ``info``.
        info: say what the checkpoint holds, and write nothing.
        to: ``hf``, ``universal``, or ``auto``.
        step: which checkpoint.
        config_file: configuration of the training.
        workers: processes that convert to the universal format.
        architecture: see :class:`ExportOptions`.
        precision: see there.
        max_shard_size: see there; as text.
        pad_token_id: see there.
        no_save_tokenizer: leave the tokenizer out.
        tolerance: largest relative difference of logits.
        vocab_size: see :class:`NeoxSource`.
        row_biases: see :class:`NeoxOptions`.
        grouped_layout: see there.
    """

    input: Path
    output: Path | None = None
    info: bool = False
    to: Literal["auto", "universal", "hf"] = "auto"
    step: int | None = None
    config_file: list[str] = field(default_factory=list)
    workers: int = 1
    architecture: str = "auto"
    precision: str = "auto"
    max_shard_size: str = "5GB"
    pad_token_id: int | None = None
    no_save_tokenizer: bool = False
    tolerance: float = 1e-5
    vocab_size: int | None = None
    row_biases: RowBiases = "auto"
    grouped_layout: GroupedLayout = "auto"


def run_conversion(asked: Conversion, *, say: Say, warn: Say) -> None:
    """Do what is asked.

    Args:
        asked: the command line.
        say: takes a line of the result.
        warn: takes a line about what goes on.

    Raises:
        NeomixError: it cannot be done; nothing was written.
    """
    if not asked.input.is_dir():
        raise CheckpointError(f"{asked.input} is no folder; give a checkpoint's, or a model's")
    if not asked.tolerance > 0:
        raise ConfigError(f"--tolerance is {asked.tolerance}; it must be above 0")
    if asked.info:
        _describe(asked, say, warn)
        return
    assert asked.output is not None
    if is_hugging_face(asked.input):
        _from_hugging_face(asked, asked.output, say, warn)
    elif is_deepspeed(asked.input):
        _from_deepspeed(asked, asked.output, say, warn)
    elif asked.to == "hf":
        _to_hugging_face(asked, asked.input, asked.output, say, warn)
    else:
        path = convert(asked.input, asked.output, step=asked.step, workers=asked.workers, say=warn)
        say(f"{path}\nload it with load: {asked.output} and load_universal: true")


def _describe(asked: Conversion, say: Say, warn: Say) -> None:
    if is_hugging_face(asked.input) or is_deepspeed(asked.input):
        raise CheckpointError(
            f"{asked.input} is no checkpoint of ours; convert it, and --info says what it holds"
        )
    for line in describe(*choose(asked.input, asked.step, verified=False, say=warn)):
        say(line)


def _to_hugging_face(asked: Conversion, source: Path, output: Path, say: Say, warn: Say) -> None:
    options = ExportOptions(
        architecture=asked.architecture,
        precision=asked.precision,
        tokenizer=not asked.no_save_tokenizer,
        pad=asked.pad_token_id,
        max_shard_size=parse_size(asked.max_shard_size),
        tolerance=asked.tolerance,
    )
    step = asked.step if source is asked.input else None
    files = asked.config_file if source is asked.input else []
    found = find_source(source, step=step, config_files=files, say=warn)
    export(found, output, options, say=warn)
    say(f"{output}\nload it with AutoModelForCausalLM.from_pretrained({str(output)!r})")


def _from_hugging_face(asked: Conversion, output: Path, say: Say, warn: Say) -> None:
    if asked.to == "hf":
        raise ConfigError(f"{asked.input} is a Hugging Face folder already; leave --to out")
    import_hugging_face(
        asked.input, output, step=asked.step, tokenizer=not asked.no_save_tokenizer,
        tolerance=asked.tolerance, say=warn,
    )  # fmt: skip
    _told(output, say)


def _from_deepspeed(asked: Conversion, output: Path, say: Say, warn: Say) -> None:
    source = NeoxSource(
        given=asked.input,
        step=asked.step,
        config_files=asked.config_file,
        vocab_size=asked.vocab_size,
        options=NeoxOptions(row_biases=asked.row_biases, grouped=asked.grouped_layout),
    )
    if asked.to != "hf":
        import_deepspeed(source, output, tolerance=asked.tolerance, say=warn)
        _told(output, say)
        return
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=output.absolute().parent) as place:
        ours = Path(place) / "ours"
        import_deepspeed(source, ours, tolerance=asked.tolerance, say=warn)
        _to_hugging_face(asked, ours, output, say, warn)


def _told(output: Path, say: Say) -> None:
    say(f"{output}\nstart from it with {output}/model.yml, load: {output} and finetune: true")
