"""lm-eval on an exported folder answers every request as our model class does on the run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import exchange, local_tasks
from support.exchange import LLAMA, NEOX
from support.lone_job import Alone

from megatron.engine.frozen import FrozenSequential
from megatron.exchange.export import ExportOptions, export
from megatron.exchange.source import find_source
from megatron.inference.crew import Crew
from megatron.inference.model import InferenceModel
from megatron.inference.task_seeds import task_seeds
from megatron.inference.tasks import TaskRequest, TaskSet
from megatron.model.gpt import GPT
from megatron.parallel.topology import Topology
from megatron.tokenizer import build_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

VOCABULARY = 300
PARALLEL = {**NEOX, "gpt_j_residual": True, "no_weight_tying": True, "rotary_pct": 0.25}
# Keys, tokenizer, and how many tokens the model takes: 256 new ones fit into 300.
CASES = {
    "bytes": (NEOX, "bytes", 48),
    "special tokens": (PARALLEL, "plain", 48),
    "its own tokens around a text": (
        {**LLAMA, "sliding_window_width": 8},
        "settings",
        48,
    ),
    "long": (NEOX, "plain", 300),
}


def tokenizer_keys(kind: str, folder: Path) -> dict[str, str]:
    """Make a tokenizer; return the keys that name it."""
    if kind == "bytes":
        return {"tokenizer_type": "CharLevelTokenizer"}
    file = local_tasks.make_tokenizer(folder / "tokenizer.json")
    if kind == "settings":
        from tokenizers import Tokenizer, processors

        backend = Tokenizer.from_file(str(file))
        backend.add_special_tokens(["<s>", "</s>", "<pad>"])
        begin = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=begin
        )
        backend.save(str(file))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": 0}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"tokenizer_type": "HFTokenizer", "vocab_file": str(file)}


def both(folder: Path, keys: dict[str, Any], kind: str, length: int) -> tuple[Any, Any]:
    """Return our model class on random weights, and theirs on the folder they are exported to."""
    from lm_eval.models.huggingface import HFLM

    from megatron.inference.harness import CrewLM

    named = tokenizer_keys(kind, folder)
    keys = {**keys, "vocab_size": VOCABULARY, "seq_length": length, **named}
    model = exchange.config(folder / "run", keys).model
    weights = exchange.random_weights(model, seed=3)
    exchange.save(folder / "run", keys, weights)
    source = find_source(folder / "run", step=None, say=print)
    export(source, folder / "hf", ExportOptions(), say=print)
    whole = GPT(model, seed=0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            value = weights.read(name)
            parameter.zero_()[tuple(map(slice, value.shape))].copy_(value)
    crew = Crew(
        Alone(),
        InferenceModel(
            model=FrozenSequential(whole.eval(), precision="fp32", device=torch.device("cpu")),
            topology=Topology.single(),
            device=torch.device("cpu"),
            vocab_size=VOCABULARY,
            padded_vocab_size=model.padded_vocab_size(),
            longest=length,
            rows=3,
        ),
        build_tokenizer(named["tokenizer_type"], named.get("vocab_file")),
    )
    return CrewLM(crew), HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=1)


def instances(*requests: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="any", doc={}, arguments=request, idx=number)
        for number, request in enumerate(requests)
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_request(tmp_path, case):
    keys, kind, length = CASES[case]
    ours, theirs = both(tmp_path, keys, kind, length)
    assert ours.max_length == theirs.max_length == length
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    text, eos = local_tasks.text, theirs.tokenizer.decode([theirs.eot_token_id])
    pairs = instances(
        ("", "ab"), ("", eos + "ab"), ("ab cab ", " bad"), ("ab\n", "cab"), (eos + "ab", " cab"),
        ("ab", eos), ("é ü", "ß 数"), (text(1, 80), " " + text(2, 3)), (text(1, 9), " cafe"),
    )  # fmt: skip
    found = zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    )
    for (own, greedy), (other, is_greedy) in found:
        assert own == pytest.approx(other, rel=1e-5)
        assert greedy == is_greedy
    pages = instances(("ab",), (text(4, 100),), (eos + "ab cab",), ("数é ",))
    assert ours.loglikelihood_rolling(pages) == pytest.approx(
        theirs.loglikelihood_rolling(pages, disable_tqdm=True), rel=1e-5
    )
    nine = {"max_gen_toks": 9}
    prompts = [
        ("ab cab", {"until": ["e", "\n"], **nine}),
        ("ab cab", {"until": "e", **nine}),
        ("bad", {"until": [], "max_new_tokens": 12}),
        (text(5, 80), {"until": ["q"], **nine}),
        ("fade", {"until": ["q", ""], "max_gen_toks": 20, "temperature": 0}),
        ("fade", {"until": ["ab", "b", "da"], "do_sample": False, "max_gen_toks": 20}),
        (eos + "ab", {"until": ["q"], **nine}),
        *[(text(40 + n, 2 + n), {"until": ["q"], **nine}) for n in range(5)],
    ]
    if length > 256:
        prompts.append(("ab", {"until": ["\n\n"]}))
    # Neither side may change the other's settings.
    asked = [instances(*((a, dict(b)) for a, b in prompts)) for _ in range(2)]
    written = ours.generate_until(asked[0])
    assert written == theirs.generate_until(asked[1], disable_tqdm=True)
    assert len(set(written)) > 5


def test_tasks_that_shuffle_begin_where_theirs_begin(tmp_path, monkeypatch):
    local_tasks.make_tasks(tmp_path)
    tasks = TaskSet(TaskRequest(tasks=("local_next",), include=(str(tmp_path),)))
    drawn: list[float] = []

    def evaluate(**options: Any) -> dict[str, Any]:
        drawn.extend([random.random(), np.random.random()])
        return {}

    monkeypatch.setattr("lm_eval.evaluator.evaluate", evaluate)
    monkeypatch.setattr(tasks, "load", dict)
    before = random.getstate(), np.random.get_state()[1].tolist()
    tasks.measure(Crew(Alone(), None, build_tokenizer("CharLevelTokenizer")), seed=1)
    assert drawn == [random.Random(0).random(), np.random.RandomState(1234).random()]
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(KeyError), task_seeds():
        raise KeyError
    assert before[0] == random.getstate()
