"""Convert a checkpoint: to any layout, to Hugging Face, from Hugging Face, from GPT-NeoX.

    tools/convert_checkpoint.py --input runs/mine --to hf --output mine-hf
    tools/convert_checkpoint.py --input pythia-160m --output runs/pythia
    tools/convert_checkpoint.py --input 20B --config_file 20B.yml --output runs/20B
    tools/convert_checkpoint.py --input runs/mine --output runs/mine-universal
    tools/convert_checkpoint.py --input runs/mine --info

What the input is, is seen from its files.  A checkpoint of ours becomes, with `--to hf`, a
folder that AutoModelForCausalLM loads, and otherwise one in DeepSpeed's universal format with the
state of data and mixing, which a run starts from with `load` and `load_universal: true`, whatever
its number of data, tensor and pipeline ranks and its ZeRO stage.  A Hugging Face folder and a
GPT-NeoX checkpoint become checkpoints of weights alone, which a run in any layout starts from with
`load` and `finetune: true`; the YAML of the model lies beside them (`model.yml`).  Logits are
compared with transformers' before the output gets its name.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and convert."""
    options = _parser().parse_args(arguments)
    # Everything is done on the host; DeepSpeed would look for devices.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import megatron.mixing  # noqa: F401  (configurations name its methods)
    from megatron.exchange.command import Conversion, run_conversion

    given = {name: getattr(options, name) for name in Conversion.__dataclass_fields__}
    run_conversion(Conversion(**given), say=_say, warn=_warn)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", "--input_dir", required=True, metavar="FOLDER", type=Path,
        help="a run's folder, its folder of checkpoints, one checkpoint; a Hugging Face folder; or "
        "a GPT-NeoX checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--step", "--iteration", type=int, metavar="N",
        help="which checkpoint (default: newest); of a Hugging Face model: the step it counts as",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--output", "--output_dir", metavar="FOLDER", type=Path, help="where the result goes"
    )
    what.add_argument("--info", action="store_true", help="say what the checkpoint holds")
    parser.add_argument(
        "--to", choices=("auto", "universal", "hf"), default="auto",
        help="form of the result (default: the universal format for ours, ours for others)",
    )  # fmt: skip
    parser.add_argument(
        "--config_file", nargs="+", default=[], metavar="YAML",
        help="configuration of the training, where it is not with the checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N",
        help="processes that convert to the universal format, each with one rank's part in memory "
        "(default: 1)",
    )  # fmt: skip
    _add_exchange(parser)
    return parser


def _add_exchange(parser: argparse.ArgumentParser) -> None:
    to_hf = parser.add_argument_group("to Hugging Face")
    to_hf.add_argument(
        "--architecture", choices=("auto", "neox", "llama", "mistral", "mixtral"), default="auto",
        help="model class (default: the first that computes the same)",
    )  # fmt: skip
    to_hf.add_argument(
        "--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto",
        help="of the weights (default: as trained)",
    )  # fmt: skip
    to_hf.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)"
    )
    to_hf.add_argument(
        "--pad_token_id", "--pad-token-id", dest="pad_token_id", type=int, metavar="ID",
        help="token that fills up batches (default: none)",
    )  # fmt: skip
    both = parser.add_argument_group("to and from Hugging Face")
    both.add_argument(
        "--no_save_tokenizer", action="store_true", help="leave the tokenizer's files out"
    )
    both.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X",
        help="largest difference of logits, relative to the largest logit (default: 1e-5)",
    )  # fmt: skip
    neox = parser.add_argument_group("from GPT-NeoX")
    neox.add_argument(
        "--vocab_size", type=_positive, metavar="N",
        help="true token ids; rows beyond are padding and cut (default: the tokenizer's, or all)",
    )  # fmt: skip
    neox.add_argument(
        "--row_biases", choices=("auto", "sum", "copies"), default="auto",
        help="biases after a sum over tensor ranks: parts of it, or copies (default: parts under "
        "gpt_j_residual)",
    )  # fmt: skip
    neox.add_argument(
        "--grouped_layout", choices=("auto", "blocks", "heads"), default="auto",
        help="order in query_key_value of shared heads (default: seen from other names)",
    )  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _say(text: str) -> None:
    print(text, flush=True)


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
