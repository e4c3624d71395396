"""The composition root of what looks at a model: evaluation by tasks, and generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.config import Config, resolve_batch
from megatron.engine.frozen import FrozenModel, lay_out_for_few_rows
from megatron.engine.runtime import Runtime
from megatron.inference.crew import Crew
from megatron.inference.model import InferenceModel, Runnable
from megatron.inference.tasks import TaskRequest
from megatron.parallel.topology import Topology
from megatron.tokenizer import Tokenizer
from megatron.training.frozen import build_frozen, on_first, reload_frozen, share_weights
from megatron.training.inference_options import Say, find_model
from megatron.training.layout import frozen_layout


def task_request(config: Config, *, most_resamples: int | None = None) -> TaskRequest:
    """Return what the configuration says of tasks.

    Args:
        config: of the run.
        most_resamples: bound of those for standard errors.
    """
    evaluation = config.evaluation
    iters = evaluation.eval_bootstrap_iters
    return TaskRequest(
        tasks=evaluation.eval_tasks,
        include=tuple(evaluation.eval_include_path or ()),
        num_fewshot=evaluation.eval_num_fewshot,
        limit=evaluation.eval_limit,
        bootstrap_iters=iters if most_resamples is None else min(iters, most_resamples),
    )


@dataclass(kw_only=True)
class OpenModel:
    """A frozen model of the run, with the weights of one checkpoint at a time.

    Attributes:
        config: of the run, with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        topology: this rank's place.
        rows: sequences that a data rank runs at once.
        cache: folder for converted weights.
        say: takes a line for the console.
        weights: of the run's mixture at its start, as the newest loaded checkpoint has them.
    """

    config: Config
    runtime: Runtime
    topology: Topology
    rows: int
    cache: Path
    say: Say
    weights: dict[str, float] | None = None
    _model: FrozenModel | None = None

    @classmethod
    def create(
        cls, config: Config, runtime: Runtime, *, rows: int | None, cache: Path, say: Say
    ) -> OpenModel:
        """Arrange the ranks; collective.

        Args:
            config: of the run.
            runtime: ranks and device.
            rows: sequences that a data rank runs at once; None takes the run's micro-batch.
            cache: folder for converted weights.
            say: takes a line for the console.
        """
        layout = frozen_layout(config, runtime.world_size)
        micro, _, _ = resolve_batch(config.batch, layout.data_size)
        return cls(
            config=config,
            runtime=runtime,
            topology=Topology.create(layout, runtime.rank),
            rows=rows or micro,
            cache=cache,
            say=say,
        )

    def load(self, step: int | None) -> tuple[FrozenModel, int]:
        """Return the model with the weights of a checkpoint, and its step; collective.

        Every rank has read its weights then, so that the cache may go.

        Args:
            step: of the checkpoint; None takes the newest.

        Raises:
            CheckpointError: there is none, or it does not fit.
        """
        quiet: Say = lambda text: None  # noqa: E731
        found_step = on_first(
            self.runtime,
            lambda: find_model(self.config, step=step, verified=True, say=self.say).manifest.step,
        )
        found = find_model(self.config, step=found_step, verified=False, say=quiet)
        self.weights = found.manifest.extra.get("weights")
        size = {"vocab_size": found.config.model.vocab_size}
        self.config = self.config.model_copy(
            update={"model": self.config.model.model_copy(update=size)}
        )
        files = share_weights(found, self.runtime, cache=self.cache, say=self.say)
        if self._model is None:
            self._model = build_frozen(
                found, files, self.config, self.runtime, self.topology, micro=self.rows,
                accumulation=1,
            )  # fmt: skip
            lay_out_for_few_rows(self._model.module)
        else:
            reload_frozen(self._model, files, self.topology)
        self.runtime.barrier()
        self.say(f"model: {found.path}")
        return self._model, found_step

    def crew(self, model: FrozenModel, tokenizer: Tokenizer) -> Crew:
        """Return the ranks at the service of the first."""
        return crew_of(self.config, self.runtime, self.topology, model, tokenizer, rows=self.rows)


def crew_of(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    model: Runnable,
    tokenizer: Tokenizer,
    *,
    rows: int,
) -> Crew:
    """Put a model that trains, or a frozen one, at the service of rank 0.

    Args:
        config: with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        topology: this rank's place.
        model: runs sequences.
        tokenizer: of the run.
        rows: sequences that a data rank runs at once.
    """
    spec = config.model
    assert spec.vocab_size is not None
    return Crew(
        runtime,
        InferenceModel(
            model=model,
            topology=topology,
            device=runtime.device,
            vocab_size=spec.vocab_size,
            padded_vocab_size=spec.padded_vocab_size(topology.tensor_size),
            longest=spec.max_position_embeddings or spec.context_length,
            rows=rows,
        ),
        tokenizer,
    )
