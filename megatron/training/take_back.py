"""Going back to the weights of the newest checkpoint while the data goes on."""

from __future__ import annotations

from collections.abc import Callable

from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config
from megatron.engine.runtime import Runtime
from megatron.engine.undo import count_on_from
from megatron.errors import RunError
from megatron.training.build import Parts
from megatron.training.compatible import layout_facts
from megatron.training.layout import run_layout
from megatron.training.restore import find_checkpoint, load_engine, prepare_source


def take_back(
    step: int,
    count: Callable[[str], None],
    *,
    config: Config,
    runtime: Runtime,
    store: CheckpointStore,
    parts: Parts,
    say: Callable[[str], None],
) -> str:
    """Undo the updates since the run's newest checkpoint; data, mixing and steps go on.

    Args:
        step: the last one done.
        count: called with the checkpoint's name before it is loaded; may refuse.
        config: of the run.
        runtime: the ranks.
        store: the run's own checkpoints.
        parts: of the run.
        say: takes a line for the console.

    Returns:
        The checkpoint's name.

    Raises:
        RunError: there is no checkpoint yet.
    """
    found = find_checkpoint(runtime, store, say)
    if found is None:
        raise RunError(
            f"step {step}: the loss has spiked, and there is no checkpoint to go back to yet; "
            "lower save_interval, or the learning rate"
        )
    count(found[0].name)
    layout = layout_facts(config, run_layout(config, runtime.world_size))
    source = prepare_source(
        runtime,
        store,
        found,
        own=store,
        layout=layout,
        weights_only=False,
        optimizer=config.checkpoint.takes_optimizer(weights_only=False),
        say=say,
    )
    load_engine(parts, source)
    count_on_from(parts.engine, step)
    return source.checkpoint.name
