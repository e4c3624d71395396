"""GPT-NeoX's checkpoints, made here from a known model in the forms that its versions leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import exchange
from support.exchange import LLAMA, NEOX, VOCABULARY, Held

from megatron.errors import CheckpointError, ConfigError
from megatron.exchange.neox_files import NeoxOptions, is_deepspeed
from megatron.exchange.neox_import import NeoxSource, import_deepspeed
from megatron.exchange.source import find_source
from megatron.exchange.weights import open_weights, parameters, partition_of

pytest.importorskip("transformers")
PADDED = 112


def quiet(text: str) -> None:
    """Take a line for the console."""


def neox_state(
    model: Any, weights: Held, ranks: int, *, names: str = "dense", heads: bool = False
) -> list[dict[int, dict[str, torch.Tensor]]]:
    """Return every tensor rank's parameters by GPT-NeoX's layer and name."""
    found: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(ranks)]
    for name, parameter in parameters(model).items():
        first, _, own = name.partition(".")
        if first == "tied_modules":
            layer, own = 0, "word_embeddings.weight"
        else:
            index = int(first)
            layer = index if index == 0 else index + (1 if index <= model.num_layers else 2)
        for rank, part in enumerate(divided(model, weights.read(name), parameter, own, ranks)):
            if heads and "query_key_value" in own:
                part = by_head(model, part, ranks)
            for key, value in renamed(own, part, names):
                found[rank].setdefault(layer, {})[key] = value
    for rank in found:
        for layer in range(2, model.num_layers + 2):
            rank[layer]["attention.rotary_emb.inv_freq"] = torch.ones(4)
    return found


def divided(
    model: Any, full: torch.Tensor, parameter: Any, own: str, ranks: int
) -> list[torch.Tensor]:
    if own in ("word_embeddings.weight", "final_linear.weight"):
        padded = torch.full((PADDED, full.shape[1]), 0.5)
        padded[: len(full)] = full
        return [part.clone() for part in padded.chunk(ranks)]
    if own in ("attention.dense.bias", "mlp.dense_4h_to_h.bias") and model.gpt_j_residual:
        # Every rank adds its own part before the sum: unequal ones.
        shares = [full * 0.25, full * 0.75] if ranks == 2 else [full]
        return shares
    partition = partition_of(parameter)
    if partition is not None:
        return [partition.part(full, rank, ranks).clone() for rank in range(ranks)]
    if "layernorm" in own or own.startswith("norm."):
        # Norms drift apart by a little; their mean is the norm.
        shift = 0.0 if ranks == 1 else 2.0**-6
        return [full - shift, full + shift][:ranks] if ranks == 2 else [full]
    return [full.clone() for _ in range(ranks)]


def by_head(model: Any, part: torch.Tensor, ranks: int) -> torch.Tensor:
    """Order ``[queries | keys | values]`` as older versions do: head by head, with its share."""
    heads, kv = model.num_attention_heads // ranks, model.num_kv_heads // ranks
    size = model.head_size
    query, key, value = part.split([heads * size, kv * size, kv * size])
    share = kv * size // heads
    rows = []
    for head in range(heads):
        rows.append(query[head * size : (head + 1) * size])
        rows += [one[head * share : (head + 1) * share] for one in (key, value)]
    return torch.cat(rows)


def renamed(own: str, part: torch.Tensor, names: str) -> list[tuple[str, torch.Tensor]]:
    if names == "linear":
        return [(own.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2"), part)]
    if names == "w" and "dense_h_to_4h" in own:
        up, gate = part.chunk(2)
        kind = own.rpartition(".")[2]
        return [(f"mlp.w1.{kind}", gate.clone()), (f"mlp.w3.{kind}", up.clone())]
    if names == "w":
        return [(own.replace("dense_4h_to_h", "w2"), part)]
    return [(own, part)]


def write(
    folder: Path,
    keys: dict[str, Any],
    state: list[dict[int, dict[str, torch.Tensor]]],
    *,
    pipeline: bool,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder as GPT-NeoX does, with its configuration; return it."""
    step = folder / "global_step12"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step12")
    content = {key.replace("_", "-"): value for key, value in keys.items()}
    content |= {"train-iters": 10, "train_micro_batch_size_per_gpu": 1, "data-path": "none"}
    content["optimizer"] = {"type": "Adam", "params": {"lr": 0.001}}
    (step / "configs/model.yml").write_text(yaml.safe_dump(content))
    generator = ("MT19937", np.arange(4, dtype=np.uint32), 624, 0, 0.0)
    for rank, layers in enumerate(state):
        module: dict[str, torch.Tensor] | None = None
        if pipeline:
            for layer, tensors in layers.items():
                file = step / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                torch.save({name: value.to(dtype) for name, value in tensors.items()}, file)
        else:
            module = {
                f"sequential.{layer}.{name}": value.to(dtype)
                for layer, tensors in layers.items()
                for name, value in tensors.items()
            }
        torch.save(
            {"module": module, "iteration": 12, "np_rng_state": generator, "names": {"a", "b"}},
            step / f"mp_rank_{rank:02d}_model_states.pt",
        )
    return folder


def neox_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys as GPT-NeoX would have them: no vocabulary, our padding."""
    return {key: value for key, value in keys.items() if key != "vocab_size"} | {
        "pos_emb": "rotary"
    }


UNTIED = {**NEOX, "no_weight_tying": True, "gpt_j_residual": True, "rotary_pct": 0.25}
GATED = {**LLAMA, "intermediate_size": 64}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("tied", NEOX, {}, False),
    ("untied", UNTIED, {}, True),
    ("linear", NEOX, {"names": "linear"}, True),
    ("llama", GATED, {"names": "linear"}, False),
    ("old-llama", GATED, {"names": "w", "heads": True}, True),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "keys", "form", "pipeline"), CASES, ids=[c[0] for c in CASES])
def test_every_form_is_read(
    tmp_path: Path,
    name: str,
    keys: dict[str, Any],
    form: dict[str, Any],
    pipeline: bool,
    ranks: int,
) -> None:
    model = exchange.config(tmp_path / "known", keys).model
    weights = exchange.random_weights(model)
    state = neox_state(model, weights, ranks, **form)
    if not model.no_weight_tying and not pipeline:
        # The tied output may be there once more, as the embedding.
        for rank in state:
            rank[model.num_layers + 4] = dict(rank[0])
    # The files say how wide the MLP is, whatever a version makes of the key.
    given = {k: v for k, v in neox_keys(keys).items() if k != "intermediate_size"}
    folder = write(tmp_path / "neox", given, state, pipeline=pipeline)
    assert is_deepspeed(folder)
    assert is_deepspeed(folder / "global_step12")
    said: list[str] = []
    source = NeoxSource(given=folder, vocab_size=VOCABULARY)
    import_deepspeed(source, tmp_path / "ours", say=said.append)
    assert "logits agree with" in said[-1]
    found = find_source(tmp_path / "ours", step=12, say=quiet)
    ignored = {"make_vocab_size_divisible_by"}
    assert found.model.model_dump(exclude=ignored) == model.model_dump(exclude=ignored)
    with open_weights(
        found.path, found.manifest, model, exact=False, scratch=tmp_path, say=quiet
    ) as held:
        for key, value in weights.tensors.items():
            assert torch.allclose(held.read(key), value, rtol=1e-6, atol=1e-7), key


def test_rows_of_padding_are_kept_unless_they_are_named(tmp_path: Path) -> None:
    model = exchange.config(tmp_path / "known", NEOX).model
    state = neox_state(model, exchange.random_weights(model), 2)
    folder = write(tmp_path / "neox", neox_keys(NEOX), state, pipeline=True, dtype=torch.bfloat16)
    said: list[str] = []
    import_deepspeed(NeoxSource(given=folder), tmp_path / "ours", say=said.append)
    assert f"the embedding's {PADDED} rows are all kept" in said[0]
    found = find_source(tmp_path / "ours", step=None, say=quiet)
    assert found.model.vocab_size == PADDED
    assert found.manifest.layout["precision"] == "bf16"
    with pytest.raises(CheckpointError, match="fewer than vocab_size 500"):
        import_deepspeed(NeoxSource(given=folder, vocab_size=500), tmp_path / "other", say=quiet)


def test_biases_after_a_sum(tmp_path: Path) -> None:
    """What GPT-NeoX computes decides: parts with ``gpt_j_residual``, copies without."""
    for residual in (False, True):
        keys = {**UNTIED, "gpt_j_residual": residual}
        place = tmp_path / str(residual)
        model = exchange.config(place / "known", keys).model
        weights = exchange.random_weights(model)
        state = neox_state(model, weights, 2)
        folder = write(place / "neox", neox_keys(keys), state, pipeline=False)
        name = "1.attention.dense.bias"
        for way, factor in (("auto", 1.0), ("sum", 1.0 if residual else 2.0), ("copies", None)):
            options = NeoxOptions(row_biases=way)  # type: ignore[arg-type]
            source = NeoxSource(given=folder, vocab_size=VOCABULARY, options=options)
            import_deepspeed(source, place / way, say=quiet)
            file = place / way / "global_step12/zero" / name / "fp32.pt"
            share = factor or (0.5 if residual else 1.0)
            assert torch.allclose(torch.load(file)["param"], weights.read(name) * share)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = exchange.config(tmp_path / "known", UNTIED).model
    weights = exchange.random_weights(model)
    state = neox_state(model, weights, 1)
    folder = write(tmp_path / "neox", neox_keys(UNTIED), state, pipeline=False)
    step = folder / "global_step12"
    other = tmp_path / "other.yml"

    def refused(match: str, **changes: Any) -> None:
        content = yaml.safe_load((step / "configs/model.yml").read_text())
        other.write_text(yaml.safe_dump({**content, **changes}))
        source = NeoxSource(given=folder, vocab_size=VOCABULARY, config_files=[str(other)])
        with pytest.raises((CheckpointError, ConfigError), match=match):
            import_deepspeed(source, tmp_path / "ours", say=quiet)
        assert not (tmp_path / "ours").exists()

    refused("files of experts are not read", moe_num_experts=4)
    refused(r"4\.input_layernorm|layer 4|norm", **{"num-layers": 3})
    refused(r"has not: 6\.final_linear\.weight", **{"no-weight-tying": False})
    refused(r"1\.attention\.query_key_value\.weight: parts of shape", **{"num-kv-heads": 2})
    (step / "configs/model.yml").unlink()
    with pytest.raises(CheckpointError, match="--config_file"):
        import_deepspeed(NeoxSource(given=folder), tmp_path / "ours", say=quiet)
    torch.save({"module": {}, "x": Hostile()}, step / "mp_rank_00_model_states.pt")
    source = NeoxSource(given=folder, vocab_size=VOCABULARY, config_files=[str(other)])
    with pytest.raises(CheckpointError, match="unpickling it would run"):
        import_deepspeed(source, tmp_path / "ours", say=quiet)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)
