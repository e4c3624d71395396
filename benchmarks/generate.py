"""Tokens per second of generation against transformers, on the same weights, with caches.

Greedy continuations of the same prompts; the tokens of both have to be the same.  Both run in this
process, turn by turn.

    python benchmarks/generate.py
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from typing import Any

import numpy as np
import torch

from benchmarks.support.measure import compared, machine, race, rounded, shown, write
from benchmarks.support.peers import hugging_face


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    results = [_compare(rows, options) for rows in options.rows]
    content = {
        "benchmark": "generate",
        "command": "python benchmarks/generate.py",
        "machine": machine("torch", "transformers"),
        "settings": vars(options),
        "results": results,
    }
    if options.write:
        print(f"wrote {write('generate', content)}")


def _compare(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    from megatron.config.model import ModelConfig
    from megatron.engine.frozen import FrozenSequential, lay_out_for_few_rows
    from megatron.inference.generate import Prompt, generate
    from megatron.inference.model import InferenceModel
    from megatron.model import GPT
    from megatron.parallel.topology import Topology

    config = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        seq_length=options.prompt + options.new,
        max_position_embeddings=options.prompt + options.new,
        vocab_size=options.vocabulary,
        rotary_pct=0.25,
        gpt_j_residual=True,
        no_weight_tying=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    ours = GPT(config, seed=0)
    theirs: Any = hugging_face(config, ours).model.eval()
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    theirs.to(device)
    ours.to(device)
    lay_out_for_few_rows(ours)
    model = InferenceModel(
        model=FrozenSequential(ours, precision="fp32", device=device),
        topology=Topology.single(),
        device=device,
        vocab_size=options.vocabulary,
        padded_vocab_size=config.padded_vocab_size(),
        longest=options.prompt + options.new,
        rows=rows,
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, options.vocabulary, (rows, options.prompt))
    prompts = [
        Prompt(tokens=row.tolist(), number=number, new_tokens=options.new)
        for number, row in enumerate(tokens)
    ]
    inputs = torch.from_numpy(tokens).to(device)
    found: dict[str, list[list[int]]] = {}

    def we() -> None:
        found["neomix"] = [result.tokens for result in generate(model, prompts)]

    def they() -> None:
        with torch.no_grad():
            whole = theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=None,
            )
        found["transformers"] = whole[:, options.prompt :].tolist()

    times = race({"neomix": we, "transformers": they}, turns=options.turns)
    assert found["neomix"] == found["transformers"], "the continuations differ"
    result = {
        "rows": rows,
        "tokens_per_second": {
            name: rounded(rows * options.new / statistics.median(one.processor))
            for name, one in times.items()
        },
        "time_over_ours": compared(times["transformers"], times["neomix"]),
    }
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["tokens_per_second"].items())
    print(
        f"{rows} × {options.new} tokens after {options.prompt}: tokens/s {rates}; transformers' "
        f"time / ours {shown(result['time_over_ours']['processor'])}, by the clock "
        f"{shown(result['time_over_ours']['wall'])}; same tokens",
        flush=True,
    )
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
