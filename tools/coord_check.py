#!/usr/bin/env python3
"""Check µP: train small models of several widths, and see whether activations grow with the width.

    python tools/coord_check.py configs/models/160m.yml --widths 64 128 256 --layers 2

The file needs no more than the model's keys.  Both parametrisations are shown: the exponent of
the width that every activation goes with after the last step, and the sizes it is drawn from.
The command ends with 1 if something grows under µP.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    from megatron.training.coord_check import GROWS, Trial, exponents, sizes

    if len(set(options.widths)) < 2 or sorted(options.widths) != options.widths:
        raise ConfigError("--widths: give at least two, ascending; the first is the base model's")
    model = _model(options.files, options.conf_dir, options.layers)
    trial = Trial(widths=options.widths, steps=options.steps, lr=options.lr, seeds=options.seeds)
    report: dict[str, Any] = {"widths": options.widths}
    grown: dict[str, list[str]] = {}
    for kind, use_mup in (("standard", False), ("µP", True)):
        found = sizes(model, trial, use_mup=use_mup)
        powers = exponents(found, trial.widths)
        grown[kind] = [name for name, power in powers.items() if power > GROWS]
        print(f"\n{kind}: mean |activation| after {options.steps} steps")
        print(f"{'':24}" + "".join(f"{width:>10}" for width in trial.widths) + "     power")
        for name, values in found.items():
            numbers = "".join(f"{value:>10.4f}" for value in values[-1])
            print(f"{name:24}{numbers}{powers[name]:>+10.2f}")
        report[kind] = {name: values.tolist() for name, values in found.items()}
    if options.out is not None:
        options.out.write_text(json.dumps(report), encoding="utf-8")
    print()
    for kind, names in grown.items():
        print(f"{kind}: {'grows: ' + ', '.join(names) if names else 'nothing grows'}")
    return 1 if grown["µP"] else 0


def _model(files: Sequence[str], folder: str | None, layers: int) -> Any:
    import megatron.mixing  # noqa: F401  (registers the methods, which a file may name)
    from megatron.config import ModelConfig, load_config

    config: Mapping[str, Any] = load_config(
        files, conf_dir=folder, overrides=_FILLED
    ).model.model_dump()
    kinds = config["attention_config"]
    changed = {"num_layers": layers, "attention_config": kinds and kinds[:layers], "use_mup": False}
    return ModelConfig(**{**config, **changed})


# What a run needs and a model does not.
_FILLED = (
    "train_micro_batch_size_per_gpu=1",
    "train_iters=1",
    "optimizer={type: Adam, params: {lr: 1e-3}}",
    "domains={any: {train: any}}",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="configuration of the model")
    parser.add_argument("-d", dest="conf_dir", metavar="DIR", help="folder that names start from")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="N",
        help="values of hidden_size; the first is the base model's (default: 64 128 256 512)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=2, help="blocks of each model (default: 2)")
    parser.add_argument("--steps", type=int, default=4, help="updates (default: 4)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: 0.01)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each width (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all sizes here, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
