"""Our models as lm-eval's: the one module that lm-eval's classes are imported in.

Contexts are cut, split and scored as lm-eval's own model of transformers does, so that numbers
can be compared with published ones.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.errors import ConfigError
from megatron.inference.crew import Crew, Decoding
from megatron.inference.generate import Prompt
from megatron.inference.sample import Sampling
from megatron.inference.score import Request

_NEW_TOKENS = 256  # lm-eval's own default
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class CrewLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's three kinds of request on rank 0, with all ranks at work."""

    def __init__(self, crew: Crew, *, seed: int = 1234) -> None:
        """Answer with ``crew``, which rank 0 leads; ``seed`` is of sampled answers."""
        super().__init__()
        self._crew, self._tokenizer = crew, crew.tokenizer
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context is replaced by."""
        return self._tokenizer.bos

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at once."""
        return self._crew.model.longest

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches of requests."""
        return f"{self._tokenizer.name}-{self._tokenizer.sha256}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, with what the tokenizer puts around it.

        Nothing is put around a text that begins as documents do, or where the caller says so.
        """
        begins = string.startswith(self._tokenizer.decode([self.prefix_token_id]))
        if add_special_tokens is False or (add_special_tokens is None and begins):
            return self._tokenizer.encode_bare(string)
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._crew.score([Request(context, rest) for _, context, rest in requests])
        return [(one.log_probability, one.greedy) for one in scores]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each (context, continuation)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-probability of whole texts, each window with as much context as fits."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [Request(*make_disjoint_window(pair)) for pair in own]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._crew.score(windows))
        return [sum(next(scores).log_probability for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to what ends it."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            contexts = [requests[number].args[0] for number in numbers]
            found = self._continue(contexts, numbers, requests[numbers[0]].args[1])
            for number, text in zip(numbers, found, strict=True):
                answers[number] = text
        return answers

    def _continue(
        self, contexts: list[str], numbers: list[int], options: dict[str, Any]
    ) -> list[str]:
        longest = self.max_length
        settings: dict[str, Any] = dict(
            normalize_gen_kwargs(options, _NEW_TOKENS if longest > _NEW_TOKENS else longest // 2)
        )
        new_tokens = int(settings.pop("max_gen_toks"))
        if new_tokens >= longest:
            raise ConfigError(
                f"max_gen_toks of a task is {new_tokens}, and the model takes {longest} tokens in "
                "all; set a lower one under the task's generation_kwargs"
            )
        stop = handle_stop_sequences(
            [text for text in settings.pop("until", []) if text is not None],
            eos=self._tokenizer.decode([self.eot_token_id]),
        )
        if "" in stop:
            # In any text there is an empty one: the first token ends the answer.
            new_tokens = 1
        # Of a context that is too long the end is kept; an empty one begins a document.
        tokens = [
            self.tok_encode(text)[new_tokens - longest :] or [self._tokenizer.eod]
            for text in contexts
        ]
        decoding = Decoding(
            sampling=_sampling(settings, self._seed),
            stop=tuple(stop),
            stop_token=self._tokenizer.eod,
        )
        prompts = [
            Prompt(tokens=row, number=number, new_tokens=new_tokens)
            for row, number in zip(tokens, numbers, strict=True)
        ]
        found = self._crew.generate(prompts, decoding)
        texts = [self._tokenizer.decode_text(one.tokens) for one in found]
        return [postprocess_generated_text(text, stop, None) for text in texts]


def _sampling(settings: dict[str, Any], seed: int) -> Sampling:
    """Read what a task says about drawing tokens.

    Raises:
        ConfigError: it asks for another way of decoding.
    """
    draws = bool(settings.pop("do_sample", False))
    temperature = float(settings.pop("temperature", 1.0 if draws else 0.0))
    top_k, top_p = int(settings.pop("top_k", 0) or 0), float(settings.pop("top_p", 0.0) or 0.0)
    for name, value in settings.items():
        if _NEUTRAL.get(name, object()) != value:
            raise ConfigError(
                f"a task's generation_kwargs ask for {name}: {value!r}, which is not offered; "
                "use do_sample, temperature, top_k, top_p, until and max_gen_toks"
            )
    if not draws:
        return Sampling(seed=seed)
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
