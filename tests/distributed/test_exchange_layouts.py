"""A model from Hugging Face in every layout, and out of every layout again: the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs
from support.bundles import write_bundle
from support.gloo import run_ranks
from support.training import Harness

from megatron.checkpoint.store import CheckpointStore
from megatron.engine.universal import universal_info
from megatron.exchange.export import ExportOptions, export
from megatron.exchange.hf_import import import_hugging_face
from megatron.exchange.source import find_source
from megatron.inference.crew import Crew, Decoding
from megatron.inference.generate import Prompt
from megatron.tokenizer import build_tokenizer
from megatron.training.build import run_facts
from megatron.training.compatible import layout_facts
from megatron.training.inference import crew_of
from megatron.training.layout import run_layout

transformers = pytest.importorskip("transformers")

TOKENIZER = build_tokenizer("CharLevelTokenizer")
PROMPT = [5, 41, 7]
NEW = 10
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
# Four for each of two models would say little more.
LEFT_OUT = {("neox", "zero3"), ("llama", "bf16")}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "pipe": {"pipe_parallel_size": 2},
    "zero3": {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "Lion", "params": {"lr": 1e-3}},
    },
    "bf16": {"model_parallel_size": 2, "precision": "bfloat16"},
}


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    library = transformers
    return {
        "neox": library.GPTNeoXForCausalLM(
            library.GPTNeoXConfig(**SIZES, tie_word_embeddings=True, rotary_pct=0.5)
        ),
        "llama": library.LlamaForCausalLM(
            library.LlamaConfig(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-5)
        ),
    }


def body(rank: int, world_size: int, files: list[tuple[Path, Path]]) -> list[Any]:
    found = []
    for file, ours in files:
        harness = Harness(file)
        engine, topology = harness.parts.engine, harness.parts.topology
        engine.load_universal(
            ours / "global_step0",
            tensor_rank=topology.tensor_rank,
            tensor_size=topology.tensor_size,
            weights_only=True,
        )
        config = harness.config
        tokens = greedy(crew_of(config, harness.runtime, topology, engine, TOKENIZER, rows=1))
        before = save(harness, file, 0)
        harness.run(1)
        found.append((tokens, before, save(harness, file, 1)))
        harness.close()
    return found


def greedy(crew: Crew) -> list[int] | None:
    """Continue the prompt; None on ranks that only follow."""
    prompt = Prompt(tokens=PROMPT, number=0, new_tokens=NEW)
    return crew.lead(lambda crew: crew.generate([prompt], Decoding())[0].tokens)


def save(harness: Harness, file: Path, step: int) -> list[str]:
    """Save as a run does, one process after the other; return this rank's files."""
    from megatron.model.gpt import GPT

    config, runtime = harness.config, harness.runtime
    store = CheckpointStore(file.with_suffix("") / "checkpoints")
    if runtime.rank == 0:
        store.begin(step)
        config_file = store.directory.parent / "config.yml"
        config_file.write_text(config.resolved_yaml())
    runtime.barrier()
    whole = dict(GPT(config.model, seed=0, device="meta").named_parameters())
    info = universal_info(whole, 120)
    temporary = store.temporary_path(step)
    written = harness.parts.engine.save(
        temporary.parent, temporary.name, {"universal_checkpoint_info": info}
    )
    if runtime.rank == 0:
        written.append(write_bundle(temporary, step=step, domains=["a"], planner={}, guard={}))
    entries = runtime.gather(store.seal_files(written))
    if runtime.rank == 0:
        store.commit(
            step,
            {name: entry for part in entries for name, entry in part.items()},
            layout=layout_facts(config, run_layout(config, runtime.world_size)),
            extra=run_facts(config),
        )
    runtime.barrier()
    return [str(path) for path in written]


def test_in_and_out_of_every_layout(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    files: dict[tuple[str, str], tuple[Path, Path]] = {}
    known = models()
    for kind, model in known.items():
        model.save_pretrained(tmp_path / kind)
        ours = tmp_path / f"{kind}-ours"
        import_hugging_face(tmp_path / kind, ours, say=lambda _: None)
        keys = find_source(ours, step=None, say=lambda _: None).model.model_dump(
            exclude_defaults=True
        )
        for name, layout in LAYOUTS.items():
            if (kind, name) in LEFT_OUT:
                continue
            place = tmp_path / f"{kind}-{name}"
            content = runs.config(tmp_path / "data", place, **layout)
            content |= {**keys, "rotary_pct": keys.get("rotary_pct", 1.0)}
            content |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
            files[kind, name] = (
                runs.write_config(tmp_path / f"{kind}-{name}.yml", content), ours
            )  # fmt: skip
    results = run_ranks(body, 2, list(files.values()))[0]
    for ((kind, name), (file, _)), (tokens, _, _) in zip(files.items(), results, strict=True):
        model = known[kind].eval()
        expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
        if name != "bf16":
            assert [*PROMPT, *tokens] == expected[0].tolist(), (kind, name)
        check(file.with_suffix(""), model, name, tmp_path / f"out-{kind}-{name}")


def check(run: Path, model: Any, name: str, out: Path) -> None:
    """Export both checkpoints of a run, and compare with the model that it began with."""
    before = dict(model.state_dict())
    if name != "zero3":
        # Of step 0, before anything was learnt: bit for bit what came in.
        exported(run, 0, out / "first", "auto")
        first = transformers.AutoModelForCausalLM.from_pretrained(out / "first", dtype="auto")
        for key, value in first.state_dict().items():
            assert value.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
            assert torch.equal(value, before[key].to(value.dtype)), key
    exported(run, 1, out / "second", "fp32")
    second = transformers.AutoModelForCausalLM.from_pretrained(out / "second")
    state = second.state_dict()
    moved = [key for key, value in state.items() if not torch.equal(value, before[key])]
    assert len(moved) > len(state) // 2
    assert all(torch.allclose(value, before[key], atol=0.05) for key, value in state.items())
    if name == "bf16":
        # The optimizer's own weights, not those that the model computes with.
        exported(run, 1, out / "rounded", "auto")
        rounded = transformers.AutoModelForCausalLM.from_pretrained(out / "rounded", dtype="auto")
        for key, value in rounded.state_dict().items():
            assert torch.equal(value, state[key].to(torch.bfloat16)), key
        assert any(not torch.equal(value.bfloat16().float(), value) for value in state.values())


def exported(run: Path, step: int, output: Path, precision: str) -> None:
    source = find_source(run, step=step, say=lambda _: None)
    export(source, output, ExportOptions(precision=precision), say=lambda _: None)
