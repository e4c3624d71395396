"""Forward passes kept with checkpoints, characters, operations, tables, and inputs on the host."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from support import runs

import megatron.mixing  # noqa: F401
from megatron.config import Config, load_config
from megatron.config.profiling import FlopsProfilerConfig
from megatron.engine.observer import StepOutcome
from megatron.errors import CheckpointError, ConfigError
from megatron.monitor.charts import validation_scalars
from megatron.monitor.record import ValidationRecord
from megatron.monitor.tables import CsvSink
from megatron.parallel import rng
from megatron.parallel.layout import Layout
from megatron.parallel.topology import Topology
from megatron.training import characters, forward_check
from megatron.training.check import preflight
from megatron.training.compatible import WITHOUT_OPTIMIZER, how_to_load, layout_facts
from megatron.training.domains import open_run_domains
from megatron.training.flops import FlopsProfiler
from megatron.training.plan.activations import Setting, stage_activations
from megatron.training.profiling import StepProfiler


def configured(folder: Path, **changes: Any) -> Config:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(runs.config(folder, folder / "run", **changes)))
    return load_config([str(path)])


@pytest.mark.option("checkpoint_validation_with_forward_pass")
def test_weights_that_came_back_changed_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    config = configured(tmp_path, checkpoint_validation_with_forward_pass=True)
    parts: Any = (None, None, None)
    monkeypatch.setattr(forward_check, "forward_loss", lambda *_: 4.25)
    kept = forward_check.keep_forward_loss(config, *parts)()
    assert kept == {"forward_loss": 4.25}
    said: list[str] = []

    def check(saved: dict[str, Any], config: Config = config) -> None:
        manifest: Any = SimpleNamespace(step=7, extra=saved)
        forward_check.check_forward_loss(config, *parts, manifest, said.append)

    check(kept)
    check({})
    assert "gives what it gave" in said[0]
    assert "no forward pass to compare with" in said[1]
    with pytest.raises(CheckpointError, match=r"had a loss of 4\.200000 .* and have 4\.250000 now"):
        check({"forward_loss": 4.2})
    off = configured(tmp_path)
    assert forward_check.keep_forward_loss(off, *parts)() == {}
    check({"forward_loss": 4.2}, off)
    assert len(said) == 2


@pytest.mark.option("no_save_optim")
def test_a_checkpoint_without_its_optimizer_says_so(tmp_path: Path) -> None:
    config = configured(tmp_path)
    layout = layout_facts(config, Layout(world_size=2))
    manifest: Any = SimpleNamespace(step=5, layout=dict(layout), extra={WITHOUT_OPTIMIZER: True})
    with pytest.raises(CheckpointError, match="set no_load_optim: true"):
        how_to_load(manifest, layout, weights_only=False)
    assert how_to_load(manifest, layout, weights_only=True) == "directly"
    cut = layout_facts(config, Layout(world_size=2, tensor_size=2))
    assert how_to_load(manifest, cut, weights_only=True) == "convert"


@pytest.mark.option("char_level_ppl")
def test_a_perplexity_of_characters(tmp_path: Path, monkeypatch: Any) -> None:
    """Of a tokenizer whose tokens are two characters, but for the low ones, which are three."""
    runs.make_data(tmp_path)
    tokenizer = {"tokenizer_type": "CharLevelTokenizer", "vocab_size": 512}
    config = configured(tmp_path, char_level_ppl=True, **tokenizer)
    stand_in = SimpleNamespace(
        decode_text=lambda ids: "".join("ab" if one >= 20 else "abc" for one in ids)
    )
    monkeypatch.setattr(characters, "run_tokenizer", lambda config, purpose: stand_in)
    domains = open_run_domains(config)
    try:
        found = characters.tokens_per_character(config, domains, 4)
        plain = configured(tmp_path, **tokenizer)
        assert characters.tokens_per_character(plain, domains, 4) == {}
    finally:
        domains.close()
    assert sorted(found) == sorted(runs.DOMAINS)
    # Tokens below 20 are all that "walk" has but the ends of documents.
    assert 1 / 3 <= found["walk"] < found["noise"] <= 1 / 2
    record = ValidationRecord(
        step=1, valid_loss={"walk": 2.0}, character_loss={"walk": 2.0 * found["walk"]}
    )
    scalars = validation_scalars(record)
    assert scalars["validation/lm_loss_char_lvl_ppl/walk"] == math.exp(2.0 * found["walk"])


@pytest.mark.option("train_epochs")
def test_epochs_become_steps_when_the_data_is_opened(tmp_path: Path) -> None:
    runs.make_data(tmp_path)
    content = runs.config(tmp_path, tmp_path / "run", train_epochs=3)
    del content["train_iters"]
    config = load_config([str(runs.write_config(tmp_path / "config.yml", content))])
    checked = preflight(config, world_size=2, gpus=0)
    windows = sum(domain.num_windows(0) for domain in checked.domains.train)
    checked.domains.close()
    steps = checked.config.training.train_iters
    assert steps == 3 * windows // 8 > 1
    again = tmp_path / "resolved.yml"
    again.write_text(checked.config.resolved_yaml())
    assert load_config([str(again)]).training == checked.config.training
    content |= {"train_batch_size": 40_000, "train_epochs": 1}
    huge = load_config([str(runs.write_config(tmp_path / "huge.yml", content))])
    with pytest.raises(ConfigError, match="have no batch of 40000"):
        preflight(huge, world_size=2, gpus=0)


@pytest.mark.option("flops_profiler")
def test_a_profile_counts_products_by_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4))
    file = tmp_path / "flops.txt"
    asked = FlopsProfilerConfig(enabled=True, profile_step=2, top_modules=1)
    profiler = FlopsProfiler(model, asked, file)
    for step in (1, 2, 3):
        profiler.begin(step, loss_scale=1.0)
        model(torch.ones(3, 8)).sum().backward()
        profiler.end(step, StepOutcome(grad_norm=None, skipped=False))
        assert file.exists() == (step >= 2)
    first, second = 2 * 3 * 8 * 16, 2 * 3 * 16 * 4
    # The first layer's input needs no gradient, so that it has one product in backward.
    lines = file.read_text().splitlines()
    assert f"total {2 * first + 3 * second:,}" in lines
    assert any(line.startswith(f"  0 {2 * first:,} ") for line in lines)
    assert any(line.startswith(f"  1 {3 * second:,} ") for line in lines)
    few = FlopsProfilerConfig(enabled=True, detailed=False, module_depth=0)
    quiet = FlopsProfiler(model, few, file)
    quiet.begin(1, loss_scale=1.0)
    model(torch.ones(3, 8))
    quiet.end(1, StepOutcome(grad_norm=None, skipped=False))
    assert not any(
        "every module" in line or "depth" in line for line in file.read_text().splitlines()
    )


@pytest.mark.option("csv_monitor")
def test_tables_are_cut_on_a_resume_and_leave_others_alone(tmp_path: Path) -> None:
    strangers = tmp_path / "mine.csv"
    strangers.write_text("a,b\n1,2\n")
    sink = CsvSink(tmp_path)
    sink.open(None, {})
    for step in (1, 2, 3):
        sink.emit({"train/loss": step / 3}, step)
    again = CsvSink(tmp_path)
    again.open(2, {})
    again.emit({"train/loss": 0.5}, 3)
    with (tmp_path / "train_loss.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "train/loss"],
            ["1", repr(1 / 3)],
            ["2", repr(2 / 3)],
            ["3", "0.5"],
        ]
    CsvSink(tmp_path).open(None, {})
    assert not (tmp_path / "train_loss.csv").exists()
    assert strangers.read_text() == "a,b\n1,2\n"


@pytest.mark.option("checkpoint_in_cpu")
def test_inputs_of_recomputed_blocks_are_kept_on_the_host(tmp_path: Path, monkeypatch: Any) -> None:
    kept: list[tuple[int, ...]] = []
    plain = rng.save_on_cpu

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda value: (kept.append(tuple(value.shape)), pack(value))[1]

    monkeypatch.setattr(rng, "save_on_cpu", Counted)
    gradients = []
    for on_host in (False, True):
        dropout = rng.DropoutRng(seed=1, topology=Topology.single(), inputs_on_host=on_host)
        dropout.begin(step=1, micro_batch=0)
        value = torch.arange(6.0).view(2, 3).requires_grad_()
        dropout.recomputed(lambda x: (x.sin() * x).exp(), value).sum().backward()
        gradients.append(value.grad)
        assert ((2, 3) in kept) is on_host
    assert torch.equal(*gradients)
    model = configured(
        tmp_path, checkpoint_activations=True, checkpoint_in_cpu=True, num_layers=8
    ).model
    sizes = [
        stage_activations(
            model, Setting(micro_batch=2, width=2, inputs_on_host=on_host), 0, 11, 1
        ).saved
        for on_host in (False, True)
    ]
    assert sizes[0] - sizes[1] == 7 * 2 * 16 * 32 * 2


@pytest.mark.option("memory_profiling_path")
def test_allocations_may_go_to_another_file(tmp_path: Path, monkeypatch: Any) -> None:
    written: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    config = configured(tmp_path, memory_profiling_path=str(tmp_path / "a" / "m.pickle"))
    for file in (None, Path(str(config.logging.memory_profiling_path))):
        profiler = StepProfiler(
            tmp_path, first=1, end=2, trace=False, memory=True, memory_file=file
        )
        profiler.begin(1, loss_scale=1.0)
        profiler.end(1, StepOutcome(grad_norm=None, skipped=False))
    assert written == [str(tmp_path / "memory.pickle"), str(tmp_path / "a" / "m.pickle")]
