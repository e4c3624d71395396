"""lm-eval's numbers through our model class are those of its own model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support import local_tasks
from support.hugging import gpt_neox, shaken
from support.lone_job import Alone
from support.model_spec import TestSpec

from megatron.config.evaluation import GenerationConfig
from megatron.engine.frozen import FrozenSequential
from megatron.errors import ConfigError, DataError
from megatron.inference.crew import Crew, Decoding
from megatron.inference.generate import Prompt
from megatron.inference.model import InferenceModel
from megatron.inference.sample import Sampling
from megatron.inference.samples import write_samples
from megatron.inference.score import Request
from megatron.inference.tasks import TaskRequest, TaskSet, match, numbers
from megatron.launch.stop import StopFlag
from megatron.model.kv_cache import KVCache
from megatron.parallel.topology import Topology
from megatron.tokenizer import build_tokenizer
from megatron.training.generation import decoding_of, write_file

LONGEST = 48
"""Tokens that the model takes, fewer than some contexts have."""
SPEC = TestSpec(vocab_size=290, no_weight_tying=True, rotary_pct=0.5, seq_length=LONGEST)


class Both(NamedTuple):
    crew: Crew
    theirs: Any
    folder: Path


def crew_of(model: Any, tokenizer: Any, rows: int) -> Crew:
    return Crew(
        Alone(),
        InferenceModel(
            model=model,
            topology=Topology.single(),
            device=torch.device("cpu"),
            vocab_size=SPEC.vocab_size,
            padded_vocab_size=SPEC.padded_vocab_size(),
            longest=LONGEST,
            rows=rows,
        ),
        tokenizer,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Both:
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = build_tokenizer(
        "HFTokenizer", str(local_tasks.make_tokenizer(folder / "tokenizer.json"))
    )
    assert tokenizer.vocab_size <= SPEC.vocab_size
    local_tasks.make_tasks(folder / "tasks")
    model = shaken(SPEC)
    theirs = gpt_neox(model, SPEC, longest=LONGEST)
    frozen = FrozenSequential(model, precision="fp32", device=torch.device("cpu"))
    return Both(crew_of(frozen, tokenizer, rows=4), theirs, folder)


@pytest.fixture(autouse=True)
def _datasets_here(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp())


def tasks(folder: Path, *names: str, **options: Any) -> TaskSet:
    return TaskSet(TaskRequest(tasks=names, include=(str(folder / "tasks"),), **options))


@pytest.mark.parametrize("shots", [None, 2])
def test_every_kind_of_request_gives_their_numbers(both, shots):
    import transformers
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from megatron.inference.harness import CrewLM

    chosen = tasks(both.folder, "local_*", num_fewshot=shots, bootstrap_iters=20)
    assert sorted(chosen.names) == sorted(local_tasks.TASKS)
    found = both.crew.lead(lambda crew: chosen.measure(crew, seed=1))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(both.folder / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    both.theirs.generation_config.pad_token_id = both.crew.tokenizer.eod
    both.theirs.generation_config.eos_token_id = both.crew.tokenizer.eod
    expected = simple_evaluate(
        model=(hf := HFLM(pretrained=both.theirs, tokenizer=tokenizer, batch_size=3)),
        tasks=list(chosen.names),
        num_fewshot=shots,
        task_manager=chosen._manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    ours, theirs = numbers(found), numbers(expected)
    assert set(ours) == set(theirs) == set(local_tasks.TASKS)
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            if "stderr" not in name:
                assert ours[task][name] == pytest.approx(value, rel=1e-4, abs=1e-9), (task, name)
    assert found["n-samples"]["local_next"]["effective"] == 11
    assert {found["n-shot"][name] for name in chosen.names} == {shots or 0}
    assert ours["local_choice"]["acc_stderr"] > 0
    written = CrewLM(both.crew).generate_until(_requests())
    assert written == hf.generate_until(_requests())
    assert len(set(written)) > 2


def _requests() -> list[Any]:
    from lm_eval.api.instance import Instance

    options = ({"until": ["q"], "max_gen_toks": 9}, {"until": ["\n"], "max_gen_toks": 4})
    return [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(local_tasks.text(n, 3 + 25 * (n % 2)), dict(options[n % 2])),
            idx=n,
        )
        for n in range(5)
    ]


def test_limit_and_names(both):
    chosen = tasks(both.folder, "local_nex?", limit=3.0)
    assert chosen.names == ("local_next",)
    found = chosen.measure(both.crew, seed=1)
    assert found["n-samples"]["local_next"]["effective"] == 3
    half = tasks(both.folder, "local_next", limit=0.5).measure(both.crew, seed=1)
    assert half["n-samples"]["local_next"]["effective"] == 6
    assert match(["a*", "x"], ["ab", "b", "ac"]) == (["ab", "ac"], ["x"])
    with pytest.raises(ConfigError, match="is no folder"):
        TaskSet(TaskRequest(tasks=("a",), include=(str(both.folder / "none"),)))


def test_data_that_is_not_here_is_named(both, monkeypatch):
    import datasets

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"local_next could not be loaded.*Couldn't reach 'some/da"):
        tasks(both.folder, "local_next").load()


def test_greedy_text_is_that_of_transformers(both):
    tokens = [[5, 7, 11, 13, 17, 19, 23], [101, 7], [33, 44, 55]]
    prompts = [Prompt(tokens=t, number=n, new_tokens=12) for n, t in enumerate(tokens)]
    cached = both.crew.generate(prompts, Decoding())
    again = both.crew.generate(prompts, Decoding(recompute=True, logits=True))
    for row, one, other in zip(tokens, cached, again, strict=True):
        expected = both.theirs.generate(
            torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, len(row) :].tolist()
        assert one.tokens == other.tokens == expected
        assert not one.finished
        assert not one.logits
        assert [max(range(290), key=logits.__getitem__) for logits in other.logits] == expected
    assert len(set(map(tuple, (one.tokens for one in cached)))) == 3
    stopped = both.crew.generate(prompts, Decoding(stop_token=cached[1].tokens[4]))
    where = cached[1].tokens.index(cached[1].tokens[4])
    assert stopped[1].tokens == cached[1].tokens[:where]
    assert stopped[1].finished


def test_samples_do_not_depend_on_the_batch(both):
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=7)
    prompts = [
        Prompt(tokens=[n + 1] * (1 + n % 4), number=n, new_tokens=3 + n % 5) for n in range(9)
    ]
    many = both.crew.generate(prompts, Decoding(sampling=sampling))
    assert [len(one.tokens) for one in many] == [3 + n % 5 for n in range(9)]
    single = crew_of(both.crew.model.model, both.crew.tokenizer, rows=1)
    assert single.generate(prompts[::-1], Decoding(sampling=sampling))[::-1] == many
    other = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=8)
    assert both.crew.generate(prompts, Decoding(sampling=other)) != many


def test_texts_end_at_stop_strings_and_say_what_hinders_them(both):
    crew = both.crew
    prompts = ["ab cab", "", "bad " * 80, "fade " * 12]
    free = list(write_samples(crew, prompts, Decoding(), maximum_tokens=20))
    assert [sample.context for sample in free] == prompts
    assert free[0].length == 20
    assert not free[0].finished
    assert free[2].length == 0
    assert "did not start" in (free[2].message or "")
    assert len(crew.tokenizer.encode(prompts[3])) + free[3].length <= LONGEST
    middle = free[0].text[len(free[0].text) // 2 :][:3]
    cut = next(write_samples(crew, prompts[:1], Decoding(stop=(middle,)), maximum_tokens=20))
    assert cut.finished
    assert cut.text == free[0].text[: free[0].text.index(middle)]
    assert cut.length <= 20
    assert set(cut.line()) == {
        *("context", "text", "length", "finished", "message", "duration_seconds"),
    }
    drawn = Decoding(sampling=Sampling(temperature=1.0), logits=True)
    three = list(write_samples(crew, prompts[:1], drawn, maximum_tokens=4, repeats=3))
    assert len({sample.text for sample in three}) == 3
    assert all(len(sample.logits or []) == sample.length for sample in three)


@pytest.mark.option("maximum_tokens", "num_samples", "prompt_end", "recompute", "return_logits")
@pytest.mark.option("sample_input_file", "sample_output_file", "text_gen_type")
def test_samples_are_written_as_asked(both, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab cab\nbad### dab add###\n")

    def written(**keys: Any) -> list[dict[str, Any]]:
        options = GenerationConfig(**keys)
        decoding = decoding_of(options, seed=3, stop_token=-1)
        write_file(both.crew, options, decoding, StopFlag(), lambda line: None)
        assert options.sample_output_file is not None
        text = Path(options.sample_output_file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    # A cache would be attached to the model; whoever recomputes has none.
    monkeypatch.setattr(KVCache, "attached", None)
    asked = written(
        text_gen_type="input-file",
        sample_input_file=str(prompts),
        sample_output_file=str(tmp_path / "new" / "out.jsonl"),
        prompt_end="###",
        num_samples=2,
        maximum_tokens=3,
        temperature=1.5,
        return_logits=True,
        recompute=True,
    )
    assert [one["context"] for one in asked] == ["ab cab\nbad"] * 2 + ["dab add"] * 2
    assert [one["length"] for one in asked] == [len(one["logits"]) for one in asked] == [3] * 4
    with pytest.raises(TypeError):
        written(text_gen_type="unconditional", sample_output_file=str(tmp_path / "none"))
    monkeypatch.undo()
    free = written(text_gen_type="unconditional", sample_output_file=str(tmp_path / "free"))
    assert [(one["context"], one["length"]) for one in free] == [("", LONGEST - 1)]


@pytest.mark.option("temperature", "top_k", "top_p")
def test_keys_say_how_tokens_are_drawn(both, tmp_path):
    def text(**keys: Any) -> str:
        out = str(tmp_path / "out")
        options = GenerationConfig(text_gen_type="unconditional", sample_output_file=out, **keys)
        decoding = decoding_of(options, seed=3, stop_token=-1)
        write_file(both.crew, options, decoding, StopFlag(), lambda line: None)
        return json.loads(Path(out).read_text(encoding="utf-8"))["text"]

    greedy = text()
    assert text(temperature=1e-4) == greedy
    hot = text(temperature=50.0)
    assert hot not in (greedy, text(temperature=1.0))
    # A bound that leaves one token is greedy, however hot; without a temperature a bound draws.
    assert text(temperature=50.0, top_k=1) == text(temperature=50.0, top_p=1e-6) == greedy
    assert text(temperature=50.0, top_k=5) not in (hot, greedy)
    assert text(temperature=50.0, top_p=0.5) not in (hot, greedy)
    assert text(top_k=290) == text(temperature=1.0)


def test_scores_are_those_of_a_naive_loop(both):
    requests = [
        Request([3, 4, 5], [6, 7]),
        Request([9], [10]),
        Request(list(range(1, 60)), [5, 6, 7]),
        Request([0], list(range(40))),
    ]
    with torch.no_grad():
        greedy = both.theirs(torch.tensor([[21, 22]])).logits[0, -1].argmax().item()
    requests.append(Request([21, 22], [greedy]))
    for request, score in zip(requests, both.crew.score(requests), strict=True):
        whole = [*request.context, *request.continuation][-(LONGEST + 1) :]
        with torch.no_grad():
            logits = both.theirs(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        count = len(request.continuation)
        part = logits[-count:].gather(1, torch.tensor(whole[-count:])[:, None])
        assert score.log_probability == pytest.approx(part.sum().item(), abs=1e-4)
        assert score.greedy == bool(logits[-count:].argmax(-1).tolist() == whole[-count:])
    assert both.crew.score(requests)[-1].greedy
    with pytest.raises(DataError, match="holds the token id 290"):
        both.crew.score([Request([1], [290])])
    with pytest.raises(DataError, match="49 tokens at once"):
        both.crew.score([Request([1], [2] * 49)])


def test_followers_hear_of_a_failure():
    from megatron.errors import RunError

    said: list[Any] = []
    leader = SimpleNamespace(rank=0, broadcast=said.append)

    def fail(crew: Crew) -> None:
        raise DataError("no such data")

    with pytest.raises(DataError):
        Crew(leader, None, None).lead(fail)
    follower = SimpleNamespace(rank=1, broadcast=lambda value: said[0])
    with pytest.raises(RunError, match="no such data"):
        Crew(follower, None, None).lead(fail)
