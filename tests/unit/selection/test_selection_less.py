"""LESS against plain loops, explicit matrices and torch's own optimizer."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import local_tasks
from support.exchange import LLAMA, NEOX
from support.selecting import Made, document, make_models, quiet

from megatron.data.permutation import derive, hash_key
from megatron.errors import ConfigError, DataError
from megatron.selection import less, projection
from megatron.selection.base import Target
from megatron.selection.less import Less
from megatron.selection.less_examples import Example, ExampleFile, write_examples
from megatron.selection.less_features import open_features
from megatron.selection.less_gradients import LoraState, precondition
from megatron.selection.less_settings import LessSettings
from megatron.selection.less_warmup import WarmupSettings, epoch_path, read_state
from megatron.selection.lora_model import attention_modules
from megatron.selection.model_folder import tokenizer_identity
from megatron.selection.projection import Projection

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

SMALL = LessSettings(
    warmup_share=0.5, epochs=3, warmup_batch=4, rate=5e-3, dimension=192, max_tokens=40, seed=5
)
NEOX_MODEL = {**NEOX, "gpt_j_residual": True, "rotary_pct": 0.25, "no_weight_tying": True}
CHAT = (("user", "ab cab?"), ("assistant", "bad cab"), ("user", "fed"), ("assistant", "face"))


KEYS = {"neox": NEOX_MODEL, "llama": LLAMA}


@pytest.fixture(scope="module", params=["neox", "llama"])
def each(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_models(folder, KEYS[request.param], length=96)[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of ours, and the folder that it is exported to."""
    return make_models(tmp_path_factory.mktemp("made"), LLAMA, length=96)


@pytest.fixture(scope="module")
def model(both: tuple[Path, Path]) -> Path:
    return both[1]


def corpus() -> Made:
    made = [document(n, local_tasks.text(n, 4 + 5 * n)) for n in range(9)]
    made.append(document(9, ""))
    made.append(document(10, "", *CHAT))
    made.append(document(11, "", ("user", "only asked")))
    return Made(made)


def targets() -> list[Target]:
    chats = (document(0, "", *CHAT), document(1, "", ("user", "x"), ("assistant", "dead beef")))
    plain = tuple(document(n, local_tasks.text(50 + n, 12)) for n in range(3))
    return [Target(name="chats", documents=chats), Target(name="plain", documents=plain)]


def prepared(given: Path, folder: Path, **changes: Any) -> Less:
    selector = Less(model=str(given), settings=replace(SMALL, **changes), device="cpu")
    selector.prepare(corpus(), targets(), folder, quiet)
    selector.open(folder, targets())
    return selector


def explicit_signs(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Every sign by whole numbers of Python's."""
    words, key = -(-dimension // 64), hash_key("less-projection", seed)
    signs = np.empty((rows, dimension))
    for row in range(rows):
        for column in range(dimension):
            word = derive(key, row * words + column // 64)
            signs[row, column] = 1.0 if word >> (column % 64) & 1 else -1.0
    return signs


def test_signs_are_those_of_the_hash_in_any_block(monkeypatch):
    rows = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    for dimension in (64, 100, 192):
        signs = explicit_signs(37, dimension, seed=8)
        found = Projection(dimension=dimension, seed=8)(rows)
        expected = rows.double().numpy() @ signs / math.sqrt(dimension)
        assert np.allclose(found.numpy(), expected, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(projection, "_BLOCK_SIGNS", 5 * dimension)
            assert np.allclose(Projection(dimension=dimension, seed=8)(rows), expected, atol=1e-5)
        assert not np.allclose(Projection(dimension=dimension, seed=9)(rows), expected, atol=0.1)
    many = Projection(dimension=8192, seed=0).signs(1000, 1400, torch.device("cpu"))
    assert abs(many.mean().item()) < 3e-3
    assert (many @ many.T / 8192 - torch.eye(400)).abs().max() < 0.07


def test_adams_update_is_the_next_step_of_torchs_adamw():
    generator = torch.Generator().manual_seed(2)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        parameter.grad = torch.randn(50, generator=generator) * 1e-3
        optimizer.step()
    kept = optimizer.state[parameter]
    state = LoraState(
        values=parameter.detach().clone(), first=kept["exp_avg"].clone(),
        second=kept["exp_avg_sq"].clone(), step=3, rate=0.1,
    )  # fmt: skip
    gradient = torch.randn(50, generator=generator) * 1e-3
    parameter.grad = gradient.clone()
    optimizer.step()
    update = precondition(gradient[None], state, "adam")[0]
    assert torch.allclose(state.values - 0.1 * update, parameter, atol=1e-6)
    assert torch.equal(precondition(gradient[None], state, "sgd")[0], gradient)
    assert torch.equal(precondition(gradient[None], state, "sign")[0], gradient.sign())


def test_influence_equals_a_dense_computation(each, tmp_path):
    selector = prepared(each, tmp_path)
    documents = corpus().documents
    found, cost = selector.score(documents)
    tools = open_features(each, SMALL, batch_tokens=64, device="cpu")
    signs = explicit_signs(tools.lora.size, SMALL.dimension, SMALL.seed)

    def gradient(example: Example, state: LoraState) -> np.ndarray:
        parameters, values = tools.lora.parameters(), tools.lora.unpack(state.values)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
                parameter.grad = None
        tokens = torch.tensor(example.tokens[None].astype(np.int64))
        labels = torch.tensor(example.labels[None].astype(np.int64))
        tools.lora.model(input_ids=tokens, labels=labels).loss.backward()
        return np.concatenate([one.grad.double().numpy().ravel() for one in parameters.values()])

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / np.linalg.norm(vector)

    states = [read_state(tmp_path, epoch) for epoch in range(SMALL.epochs)]
    rates = np.array([state.rate for state in states])
    assert len(set(rates)) == 3
    made = [tools.maker.make(one) for one in documents]
    dense = np.full(found.shape, np.nan)
    for row, example in enumerate(made):
        if example is not None:
            dense[row] = 0.0
    for state, weight in zip(states, rates / rates.sum(), strict=True):
        first, second = state.first.double().numpy(), state.second.double().numpy()
        wanted = [
            [unit(gradient(tools.maker.make(one), state) @ signs) for one in target.documents]
            for target in targets()
        ]
        for row, example in enumerate(made):
            if example is None:
                continue
            g = gradient(example, state)
            m = (0.9 * first + 0.1 * g) / (1 - 0.9 ** (state.step + 1))
            v = (0.999 * second + 0.001 * g**2) / (1 - 0.999 ** (state.step + 1))
            feature = unit(m / (np.sqrt(v) + 1e-8) @ signs)
            for column, examples in enumerate(wanted):
                dense[row, column] += weight * np.mean([feature @ one for one in examples])
    assert np.allclose(found, dense, atol=1e-4, equal_nan=True)
    assert np.isnan(found[[9, 11]]).all()
    assert np.nanstd(found, axis=0).min() > 0.01
    lengths = [len(example.tokens) for example in made if example is not None]
    assert cost.tokens == 3 * sum(lengths)
    forward = sum(2 * tools.lora.matrices * n for n in lengths)
    assert cost.flops == pytest.approx(3 * 3 * forward, rel=0.2)


def test_no_score_depends_on_the_batch(model, tmp_path):
    selector = prepared(model, tmp_path)
    documents = corpus().documents
    together = selector.score(documents)[0]
    alone = np.concatenate([selector.score([one])[0] for one in documents])
    assert np.allclose(together, alone, atol=1e-5, equal_nan=True)
    # A model that vmap cannot run is run one example at a time.
    gradients = selector._opened.tools.gradients
    gradients._together = False
    assert np.allclose(together, selector.score(documents)[0], atol=1e-5, equal_nan=True)
    narrow = Less(model=str(model), settings=SMALL, device="cpu", batch_tokens=50)
    narrow.open(tmp_path, targets())
    assert np.allclose(together, narrow.score(documents)[0], atol=1e-5, equal_nan=True)


def test_vmap_is_given_up_where_it_fails(model, tmp_path, monkeypatch):
    selector = prepared(model, tmp_path, epochs=1)
    together = selector.score(corpus().documents)[0]

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("vmap: data-dependent control flow")

    monkeypatch.setattr("megatron.selection.less_gradients.vmap", refuse)
    assert np.allclose(together, selector.score(corpus().documents)[0], atol=1e-5, equal_nan=True)
    assert selector._opened.tools.gradients._together is False


def test_a_stopped_warm_up_goes_on_to_the_same_bits(model, tmp_path):
    prepared(model, tmp_path / "whole")
    for number, words in enumerate(("drawing", "epoch 1", "epoch 2", "plain at checkpoint 2")):
        folder = tmp_path / "cut"

        def stop(line: str, words: str = words) -> None:
            if words in line:
                raise KeyboardInterrupt

        selector = Less(model=str(model), settings=SMALL, device="cpu")
        with pytest.raises(KeyboardInterrupt):
            selector.prepare(corpus(), targets(), folder, stop)
        assert epoch_path(folder, 0).is_file() == (number > 0)
    cost = selector.prepare(corpus(), targets(), folder, quiet)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert len(names) == 1 + 3 + 3 * 2
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # What was done before counts: the call that goes on reports the whole cost.
    again = selector.prepare(corpus(), targets(), tmp_path / "whole", quiet)
    assert again == cost
    assert cost.tokens > 0


def test_the_warm_up_learns_and_the_seed_decides(model, tmp_path):
    lines: list[str] = []
    settings = replace(SMALL, warmup_share=1.0, epochs=6, dropout=0.0)
    Less(model=str(model), settings=settings, device="cpu").prepare(
        corpus(), targets(), tmp_path / "a", lines.append
    )
    losses = [float(line.rpartition(" ")[2]) for line in lines if "mean loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
    firsts = {}
    for name, changes in {
        "same": {}, "seed": {"seed": 6}, "dropout": {"dropout": 0.3}, "rank": {"rank": 4},
        "alpha": {"alpha": 8.0}, "batch": {"warmup_batch": 3}, "rate": {"rate": 1e-3},
        "share": {"warmup_share": 0.2}, "cut": {"max_tokens": 30}, "bf16": {"dtype": "bf16"},
        "modules": {"lora_targets": ("v_proj",)},
    }.items():  # fmt: skip
        settings = replace(SMALL, epochs=1, **changes)
        Less(model=str(model), settings=settings, device="cpu").prepare(
            corpus(), targets(), tmp_path / name, quiet
        )
        firsts[name] = read_state(tmp_path / name, 0).values
    for name, values in firsts.items():
        same = firsts["same"]
        assert name == "same" or values.shape != same.shape or not torch.equal(values, same), name


def test_options_reach_the_selector_and_decide_its_scores(model, tmp_path):
    parser = argparse.ArgumentParser()
    less.add_arguments(parser)
    given = ["--model", str(model), "--lora-rank", "2", "--lora-alpha", "3", "--lora-dropout", "0",
             "--lora-targets", "v_proj", "--warmup-share",
             "0.3", "--epochs", "2", "--warmup-batch", "5", "--learning-rate", "0.1", "--dimension",
             "7", "--gradient-type", "sign", "--max-tokens", "11", "--seed", "4", "--dtype",
             "bf16", "--batch-tokens", "99", "--device", "cpu"]  # fmt: skip
    selector = less.from_options(parser.parse_args(given))
    default = less.from_options(parser.parse_args(["--model", str(model)]))
    ours, theirs = selector.parameters(), default.parameters()
    json.dumps(ours)
    assert {key for key in ours if ours[key] == theirs[key]} == {"model"}
    assert (selector.batch_tokens, selector.device) == (99, "cpu")
    assert (theirs["rank"], theirs["alpha"], theirs["epochs"]) == (8, 32.0, 4)
    assert (theirs["warmup_share"], theirs["dimension"]) == (0.05, 8192)
    adam = prepared(model, tmp_path).score(corpus().documents)[0]
    for change in ({"gradient_type": "sgd"}, {"gradient_type": "sign"}):
        other = Less(model=str(model), settings=replace(SMALL, **change), device="cpu")
        other.open(tmp_path, targets())
        assert np.nanmax(np.abs(other.score(corpus().documents)[0] - adam)) > 0.01
    for flag, value in (("warmup_share", 0.0), ("dropout", 1.0), ("alpha", 0.0), ("rate", 0.0)):
        with pytest.raises(ConfigError, match="must be"):
            LessSettings(**{flag: value})
    with pytest.raises(ConfigError, match="no such module"):
        prepared(model, tmp_path / "other", lora_targets=("v_projj",))


def test_answers_alone_are_learned(model, tmp_path):
    whole = replace(SMALL, max_tokens=90)
    maker = open_features(model, whole, batch_tokens=64, device="cpu").maker
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    chat = maker.make(document(0, "", *CHAT))
    learned = tokenizer.decode([int(n) for n in chat.labels if n != -100], skip_special_tokens=True)
    assert learned == "bad cab\nface\n"
    assert tokenizer.decode([int(n) for n in chat.tokens]).startswith("<|user|>\nab cab?\n<|assi")
    plain = maker.make(document(0, local_tasks.text(1, 90)))
    assert len(plain.tokens) == whole.max_tokens
    assert plain.learned == whole.max_tokens - 1
    ids = np.arange(5, 12, dtype=np.uint16)
    labels = np.where(ids > 8, ids, -100).astype(np.int32)
    own = replace(
        document(0, "text"), tokens=ids, labels=labels, tokenizer=tokenizer_identity(model)
    )
    assert maker.make(own).labels.tolist() == labels.tolist()
    assert maker.make(replace(own, labels=None)).labels.tolist() == ids.tolist()
    other = maker.make(replace(own, tokenizer="0" * 64))
    assert other.tokens.tolist() == tokenizer("text")["input_ids"]
    nothing = Target(name="asked", documents=(document(0, "", ("user", "only asked")),))
    with pytest.raises(DataError, match="--target asked"):
        Less(model=str(model), settings=SMALL, device="cpu").prepare(
            corpus(), [nothing], tmp_path, quiet
        )
    write_examples(tmp_path / "kept", [chat, plain])
    kept = ExampleFile(tmp_path / "kept")
    assert np.array_equal(kept[1].tokens, plain.tokens)
    assert np.array_equal(kept[0].labels, chat.labels)


def test_a_run_of_ours_is_exported_by_whoever_makes_the_selector(both, tmp_path):
    ours, hf = both
    selector = Less(model=str(ours), settings=SMALL, device="cpu")
    with pytest.raises(ConfigError, match="convert_checkpoint"):
        selector.prepare(corpus(), targets(), tmp_path / "work", quiet)

    def exporter(given: str, folder: Path, say: Any) -> None:
        assert given == str(ours)
        if not folder.exists():
            folder.symlink_to(hf)

    selector.exporter = exporter
    selector.prepare(corpus(), targets(), tmp_path / "work", quiet)
    selector.open(tmp_path / "work", targets())
    direct = prepared(hf, tmp_path / "direct")
    documents = corpus().documents
    assert np.array_equal(selector.score(documents)[0], direct.score(documents)[0], equal_nan=True)
    assert selector.parameters()["model"] != direct.parameters()["model"]


def test_what_the_model_cannot_learn_of_is_told_before_the_warm_up(model, tmp_path):
    selector = Less(model=str(model), settings=SMALL, device="cpu")
    asked = [Target(name="asked", documents=(document(0, "", ("user", "only asked")),))]
    with pytest.raises(DataError, match="--target asked: none of its 1 examples"):
        selector.prepare(corpus(), asked, tmp_path, quiet)
    smaller = tmp_path / "smaller"
    shutil.copytree(model, smaller)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    whole.resize_token_embeddings(3)
    whole.save_pretrained(smaller)
    selector = Less(model=str(smaller), settings=SMALL, device="cpu")
    with pytest.raises(DataError, match=r"token id \d+, and the model has 3"):
        selector.prepare(corpus(), targets(), tmp_path, quiet)
    assert not epoch_path(tmp_path, 0).exists()


def test_learning_rates_and_modules():
    settings = WarmupSettings(rate=1.0)
    rates = [settings.rate_at(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0
    assert np.allclose(np.diff(rates[3:]), -1 / 97)
    assert rates[-1] > 0
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16,
                                bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    assert attention_modules(gpt2, ()) == ("c_attn",)
    with pytest.raises(ConfigError, match="not known which"):
        attention_modules(torch.nn.Sequential(torch.nn.Linear(2, 2)), ())


def test_the_command_exports_a_run_and_its_shards_agree_to_the_byte(both, tmp_path):
    from tools import select_data

    records = [{"text": local_tasks.text(n, 3 + n)} for n in range(20)]
    records += [{"messages": [{"role": r, "content": c} for r, c in CHAT]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "t.jsonl").write_text(json.dumps(records[3]) + "\n")

    def score(out: str, method: str, *words: str) -> Path:
        given = ["--train", tmp_path / "train.jsonl", "--out", tmp_path / out, "--device", "cpu",
                 "--chunk-documents", "4", "--model", both[0], *words]  # fmt: skip
        assert select_data.main(["score", "--method", method, *map(str, given)]) == 0
        return tmp_path / out

    less_words = ["--target", f"t={tmp_path / 't.jsonl'}", "--dimension", "64", "--epochs", "1",
                  "--warmup-batch", "4", "--warmup-share", "0.3"]  # fmt: skip
    for method, words in (("ppl", ["--window", "24", "--stride", "8"]), ("less", less_words)):
        whole = score(f"{method}.parquet", method, *words).read_bytes()
        for shard in ("2/3", "0/3", "1/3"):
            score(f"{method}-3.parquet", method, *words, "--shard", shard)
        assert select_data.main(["merge", "--out", str(tmp_path / f"{method}-3.parquet")]) == 0
        assert (tmp_path / f"{method}-3.parquet").read_bytes() == whole
    assert (tmp_path / "less-3.parquet.work/prepared/exported/config.json").is_file()
