"""R13: payloads that would run something, given to everything that reads files of others."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from support.campaign.pickles import INERT, PAYLOADS, touch
from support.campaign.row import Bench, Trial, attempt, must

import megatron.mixing  # noqa: F401  (registers the methods)
from megatron.checkpoint import CheckpointStore, Manifest, vet_checkpoint, vet_file
from megatron.checkpoint.manifest import _spell as spelled
from megatron.config import load_config
from megatron.data.bigram import Bigram
from megatron.errors import NeomixError
from megatron.exchange.command import Conversion, run_conversion
from megatron.exchange.inspection import read_folder
from megatron.exchange.weights import load_file

Load = Callable[[], object]
Write = Callable[[Path, Path], None]
SHAPE = {
    "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 8,
}  # fmt: skip
RUN = {
    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8,
    "vocab_size": 32, "train_iters": 1, "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "domains": {"a": {"train": "a"}},
}  # fmt: skip


def payloads(bench: Bench, trials: int) -> Iterator[Trial]:
    """R13: each payload at each loader; ``trials`` of them, or all if that is 0."""
    every = [*_pickled(bench), *_tagged(bench), *_arrays(bench), *_remote_code(bench)]
    every += [*_tags(bench), *_manifests(bench)]
    if 0 < trials < len(every):
        chosen = bench.chance("some").sample(range(len(every)), trials)
        every = [every[number] for number in sorted(chosen)]
    for name, sentinel, load in every:
        yield attempt(partial(_try, name, sentinel, load))


def _try(name: str, sentinel: Path, load: Load) -> None:
    try:
        load()
    except NeomixError as error:
        must(str(error), f"{name}: an error without words")
    except (KeyError, TypeError, AttributeError):
        # A whole checkpoint by its checksums, harmless by its names, and empty of weights.
        if not any(name.startswith(f"{harmless} at ") for harmless in INERT):
            raise
    must(not sentinel.exists(), f"{name}: the payload ran")


Case = tuple[str, Path, Load]


def _convert(folder: Path, **options: Any) -> Load:
    asked = Conversion(input=folder, output=folder.with_name("output"), **options)
    return lambda: run_conversion(asked, say=_silent, warn=_silent)


def _silent(line: str) -> None:
    pass


def _pickled(bench: Bench) -> Iterator[Case]:
    """Yield checkpoints of ours, of Hugging Face and of GPT-NeoX whose pickles do something."""
    for number, (name, write) in enumerate(PAYLOADS.items()):
        folder = bench.fresh(f"pickle{number}")
        sentinel = folder / "sentinel"
        for loader, load in _pickle_loaders(folder, sentinel, write).items():
            yield f"{name} at {loader}", sentinel, load


def _pickle_loaders(folder: Path, sentinel: Path, write: Write) -> dict[str, Load]:
    ours = _our_run(folder / "ours", sentinel, write)
    theirs = folder / "hf" / "model"
    theirs.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write(theirs / "pytorch_model.bin", sentinel)
    neox = folder / "neox" / "run"
    (neox / "global_step1").mkdir(parents=True)
    (neox / "latest").write_text("global_step1", encoding="utf-8")
    (neox / "run.yml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    for file in ("mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt"):
        write(neox / "global_step1" / file, sentinel)
    file = ours / "checkpoints" / "global_step1" / "mp_rank_00_model_states.pt"
    return {
        "vet_file": lambda: vet_file(file),
        "vet_checkpoint": lambda: vet_checkpoint(file.parent),
        "load_file": lambda: load_file(file),
        "inspect_checkpoints": lambda: read_folder(file.parent),
        "convert to universal": _convert(ours, to="universal"),
        "convert to hf": _convert(ours, to="hf"),
        "import from hf": _convert(theirs),
        "import from neox": _convert(neox, config_file=[str(neox / "run.yml")]),
    }


def _our_run(folder: Path, sentinel: Path, write: Write) -> Path:
    """Write a run's folder whose checkpoint is whole by its manifest."""
    store = CheckpointStore(folder / "checkpoints")
    temporary = store.begin(1)
    files = [temporary / "mp_rank_00_model_states.pt", temporary / "state.json"]
    write(files[0], sentinel)
    files[1].write_text("{}", encoding="utf-8")
    layout = {"tensor_size": 1, "pipe_size": 1, "data_size": 1, "zero_stage": 1}
    store.commit(1, store.seal_files(files), layout={**layout, "precision": "fp32"})
    (folder / "config.yml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return folder


YAML = (
    "!!python/object/apply:os.mkdir [SENTINEL]",
    "!!python/object/new:os.mkdir [SENTINEL]",
    '!!python/object/apply:subprocess.check_call [["mkdir", SENTINEL]]',
    "!!python/object/apply:eval [\"__import__('os').mkdir('SENTINEL')\"]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [SENTINEL]",
    '&a !!python/object/apply:os.mkdir ["SENTINEL"]',
)


def _tagged(bench: Bench) -> Iterator[Case]:
    """Yield configurations with tags that PyYAML's unsafe loaders obey."""
    from megatron.experiments.compare.fields import read_block

    for number, text in enumerate(YAML):
        folder = bench.fresh(f"yaml{number}")
        sentinel = folder / "sentinel"
        value = text.replace("SENTINEL", str(sentinel))
        plain = yaml.safe_dump(RUN)
        for place, content in (("value", f"{plain}run_dir: {value}\n"), ("root", value)):
            file = folder / f"{place}.yml"
            file.write_text(content, encoding="utf-8")
            name = f"{text} as {place}"
            yield f"{name} at load_config", sentinel, partial(load_config, [str(file)])
            yield f"{name} at a study's file", sentinel, partial(read_block, file)
            yield f"{name} by import from neox", sentinel, _with_config(bench, folder, file, place)
        over = f"run_dir={value}"
        base = folder / "base.yml"
        base.write_text(plain, encoding="utf-8")
        yield f"{text} by --set", sentinel, partial(load_config, [str(base)], overrides=[over])


def _with_config(bench: Bench, folder: Path, file: Path, place: str) -> Load:
    neox = folder / f"neox-{place}"
    (neox / "global_step1").mkdir(parents=True)
    (neox / "latest").write_text("global_step1", encoding="utf-8")
    (neox / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(b"")
    return _convert(neox, config_file=[str(file)])


def _arrays(bench: Bench) -> Iterator[Case]:
    """Yield arrays of objects, which NumPy would unpickle."""
    folder = bench.fresh("npy")
    sentinel = folder / "sentinel"
    array = np.empty(1, dtype=object)
    array[0] = touch(sentinel)
    np.save(folder / "model.npy", array, allow_pickle=True)
    np.savez(folder / "index.npz", head=array)
    (folder / "bare.npy").write_bytes(pickle.dumps(touch(sentinel)))
    from megatron.selection.part import read_index

    for name in ("model.npy", "bare.npy", "index.npz"):
        yield f"{name} at bigram_model", sentinel, partial(Bigram.load, folder / name)
        yield f"{name} as an index", sentinel, partial(read_index, folder / name, {})


CODE = """
import os
os.makedirs({sentinel!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    pass
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def _remote_code(bench: Bench) -> Iterator[Case]:
    """Yield a model's folder that brings a program of its own."""
    from megatron.exchange.logits import their_logits
    from megatron.exchange.tokenizer_files import check_tokenizer
    from megatron.selection.model_folder import load_causal, load_tokenizer
    from megatron.tokenizer.chat import chat_tokenizer

    folder = bench.fresh("remote") / "model"
    folder.mkdir()
    sentinel = folder.with_name("sentinel")
    (folder / "evil.py").write_text(CODE.format(sentinel=str(sentinel)), encoding="utf-8")
    mapped = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": [None, "evil.EvilTokenizer"],
    }
    config = {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": mapped, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": mapped}), encoding="utf-8"
    )
    import torch

    torch.save({}, folder / "pytorch_model.bin")
    tokens = torch.zeros((1, 2), dtype=torch.long)
    loads: dict[str, Load] = {
        "import from hf": _convert(folder),
        "comparing logits": partial(their_logits, folder, tokens),
        "a tokenizer's check": partial(check_tokenizer, folder, None),  # type: ignore[arg-type]
        "selection's model": partial(load_causal, folder, "a test", torch.float32),
        "selection's tokenizer": partial(load_tokenizer, folder, "a test"),
        "a chat template": partial(chat_tokenizer, str(folder)),
    }
    for name, load in loads.items():
        yield f"remote code at {name}", sentinel, load


PATHS = (
    "../evil", "/tmp/evil", "global_step1/../../evil", "..", ".", "", "global_step1/x",
    "global_step-1", "global_step1\0", "global_step1\n../evil", "global_step1.tmp", "~", "a/../b",
    "global_step1/..", "\\..\\evil", "global_step١",
)  # fmt: skip


def _tags(bench: Bench) -> Iterator[Case]:
    """Yield checkpoints' names that lead out of their folder."""
    for number, tag in enumerate(PATHS):
        folder = bench.fresh(f"tag{number}")
        sentinel = folder / "sentinel"
        store = CheckpointStore(folder / "checkpoints")
        yield f"tag {tag!r}", sentinel, partial(_stays_inside, store, tag)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text(tag, encoding="utf-8")
        yield f"latest {tag!r}", sentinel, store.sweep
        yield f"latest {tag!r} by conversion", sentinel, _convert(folder)


def _stays_inside(store: CheckpointStore, tag: str) -> None:
    path = store.path_of_tag(tag)
    must(path.parent == store.directory, f"{tag!r} leads to {path}")
    raise AssertionError(f"{tag!r} passes for a checkpoint's name")


def _manifests(bench: Bench) -> Iterator[Case]:
    """Yield manifests that name files outside of the checkpoint."""
    entry = {"size": 0, "sha256": "0" * 64}
    for number, name in enumerate(("../evil", "/etc/passwd", "a/../../evil", "", ".", "a//b")):
        folder = bench.fresh(f"manifest{number}")
        held = json.loads(Manifest(step=1, files={}).to_bytes())
        body = {**held, "files": {name: entry}}
        del body["sha256"]
        content = spelled({**body, "sha256": hashlib.sha256(spelled(body)).hexdigest()})
        load = partial(_refused_manifest, content)
        yield f"manifest with {name!r}", folder / "sentinel", load


def _refused_manifest(content: bytes) -> None:
    try:
        Manifest.from_bytes(content)
    except NeomixError as error:
        must("not a path inside" in str(error), f"{error}: {content!r}")
        return
    raise AssertionError(f"taken: {content!r}")
