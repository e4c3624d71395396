"""All ranks of a model at the service of the first.

Whatever decides what shall be scored or continued runs on rank 0 alone: it needs no other rank's
data, libraries or random numbers.  The others wait for its orders.  Data ranks share out the work,
and everybody is told the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from megatron.engine.runtime import Runtime
from megatron.errors import NeomixError, RunError
from megatron.inference.generate import Continuation, Prompt, generate
from megatron.inference.model import InferenceModel
from megatron.inference.sample import Sampling
from megatron.inference.score import Request, Score, score, share
from megatron.inference.stop import StopStrings
from megatron.tokenizer import Tokenizer

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How continuations come about.

    Attributes:
        sampling: how tokens are drawn.
        stop: texts that end a continuation.
        stop_token: ends a continuation.
        recompute: run the whole sequence for every token.
        logits: keep the logits.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token: int | None = None
    recompute: bool = False
    logits: bool = False


class Crew:
    """The ranks of a job and the model that they hold together.

    Every rank makes one and calls :meth:`lead`.
    """

    def __init__(self, runtime: Runtime, model: InferenceModel, tokenizer: Tokenizer) -> None:
        """Take up a model.

        Args:
            runtime: ranks and their host-side group.
            model: what all of them hold together.
            tokenizer: recognises the texts that end a continuation.
        """
        self.model, self.tokenizer = model, tokenizer
        self._runtime = runtime

    def lead(self, work: Callable[[Crew], Result]) -> Result | None:
        """Let rank 0 do ``work`` while the others follow its orders; collective.

        Returns:
            What ``work`` returns, on rank 0; None on the others.

        Raises:
            RunError: ``work`` failed, on the ranks that followed; rank 0 raises its error.
        """
        if self._runtime.rank != 0:
            self._follow()
            return None
        try:
            result = work(self)
        except BaseException as error:
            known = isinstance(error, NeomixError)
            self._runtime.broadcast({"problem": str(error) if known else repr(error)})
            raise
        self._runtime.broadcast({"do": "end"})
        return result

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score requests, in their order; on rank 0, while it leads."""
        if not requests:
            return []
        order = {"do": "score", "requests": [[list(a), list(b)] for a, b in requests]}
        self._runtime.broadcast(order)
        return self._score(requests)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Continuation]:
        """Continue prompts, in their order; on rank 0, while it leads."""
        if not prompts:
            return []
        order = {
            "do": "generate",
            "prompts": [asdict(prompt) for prompt in prompts],
            "decoding": asdict(decoding),
        }
        self._runtime.broadcast(order)
        return self._generate(prompts, decoding)

    def _follow(self) -> None:
        while True:
            order = self._runtime.broadcast(None)
            if "problem" in order:
                raise RunError(order["problem"])
            if order["do"] == "end":
                return
            if order["do"] == "score":
                self._score([Request(*request) for request in order["requests"]])
            else:
                settings = dict(order["decoding"])
                settings["sampling"] = Sampling(**settings["sampling"])
                settings["stop"] = tuple(settings["stop"])
                prompts = [Prompt(**prompt) for prompt in order["prompts"]]
                self._generate(prompts, Decoding(**settings))

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        found = score(self.model, requests)
        own = [[number, *found[number]] for number in found]
        scores = {number: Score(value, greedy) for number, value, greedy in self._gathered(own)}
        return [scores[number] for number in range(len(requests))]

    def _generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Continuation]:
        model, stop = self.model, StopStrings(decoding.stop, self.tokenizer.decode)
        ranks, rows = model.topology.data_size, model.rows
        # Of a length together: a batch ends with its last row.
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n].tokens))
        dealt = share(len(order), rows, ranks)[model.topology.data_rank]
        own = []
        for batch in range(-(-len(order) // (rows * ranks))):
            numbers = [order[place] for place in dealt[batch * rows : (batch + 1) * rows]]
            found = generate(
                model,
                [prompts[number] for number in numbers],
                sampling=decoding.sampling,
                stop_token=decoding.stop_token,
                ended=stop.ended,
                recompute=decoding.recompute,
                logits=decoding.logits,
            )
            own += [[n, asdict(one)] for n, one in zip(numbers, found, strict=True)]
        continuations = {number: Continuation(**one) for number, one in self._gathered(own)}
        return [continuations[number] for number in range(len(prompts))]

    def _gathered(self, own: list[Any]) -> list[Any]:
        """Return the results of all data ranks; collective."""
        topology = self.model.topology
        speaks = topology.is_last_stage and topology.tensor_rank == 0
        return [one for part in self._runtime.gather(own if speaks else []) for one in part]
