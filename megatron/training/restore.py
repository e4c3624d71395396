"""Finding the checkpoint to go on from, and making it fit this run's layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.bundle import STATE_NAME, read_bundle
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.store import CheckpointStore, named_step, store_in
from megatron.checkpoint.vet import DEEPSPEED_GLOBALS, UNIVERSAL_GLOBALS, vet_checkpoint
from megatron.config import Config
from megatron.engine.runtime import Runtime
from megatron.errors import CheckpointError, RunError
from megatron.training.build import Parts, run_facts
from megatron.training.check import Checked
from megatron.training.compatible import check_form, how_to_load, layout_facts, taken_alone
from megatron.training.conversion import universal_form
from megatron.training.domains import OpenDomains
from megatron.training.edits import Edits, find_edits, follow_edits
from megatron.training.forward_check import check_forward_loss
from megatron.training.layout import run_layout
from megatron.training.soft_prompt import load_around_prompt, prompt_values


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run starts from.

    Attributes:
        checkpoint: folder of the checkpoint (our own state is read there).
        engine_files: folder of the files that DeepSpeed loads: the checkpoint itself, or
            its universal form.
        universal: whether they are in the universal format.
        manifest: the checkpoint's manifest.
        weights_only: whether a new run begins with its weights (``finetune``).
        optimizer: whether the optimizer's state is taken up.
    """

    checkpoint: Path
    engine_files: Path
    universal: bool
    manifest: Manifest
    weights_only: bool
    optimizer: bool


def find_checkpoint(
    runtime: Runtime,
    store: CheckpointStore,
    say: Callable[[str], None],
    *,
    only: int | None = None,
) -> tuple[Path, Manifest] | None:
    """Return the newest valid checkpoint of a store, agreed by all ranks.

    Rank 0 looks (every byte is verified) and tells the others.

    Args:
        runtime: ranks and their host-side group.
        store: where to look.
        say: told of checkpoints that are passed over.
        only: the step that alone will do; None takes the newest.
    """
    found: Any = None
    newest = store.newest_valid(report=say, at_most=only) if runtime.rank == 0 else None
    if newest is not None and only in (None, newest[1].step):
        path, manifest = newest
        found = [str(path), manifest.to_bytes().decode()]
    found = runtime.broadcast(found)
    if found is None:
        return None
    return Path(found[0]), Manifest.from_bytes(found[1].encode())


def prepare_source(
    runtime: Runtime,
    store: CheckpointStore,
    found: tuple[Path, Manifest],
    *,
    own: CheckpointStore,
    layout: Mapping[str, Any],
    weights_only: bool,
    optimizer: bool,
    say: Callable[[str], None],
) -> Source:
    """Vet the checkpoint's files and convert them if this run's layout cannot load them.

    Rank 0 does it, the others wait to be told where the files are.

    Args:
        runtime: ranks and their host-side group.
        store: where the checkpoint was found.
        found: its folder and manifest.
        own: the run's own store, for a conversion where ``store`` cannot be written to.
        layout: of the run.
        weights_only: whether a new run begins with its weights.
        optimizer: whether the optimizer's state is taken up.
        say: takes a line for the console.

    Raises:
        CheckpointError: a file holds more than tensors and plain values, or the layouts
            cannot be converted into each other.
        RunError: there is no room for the conversion.
    """
    path, manifest = found
    way = how_to_load(manifest, layout, weights_only=not optimizer)
    answer: dict[str, str] = {}
    if runtime.rank == 0:
        try:
            files = path
            if way == "convert":  # vets what it reads
                home = store if os.access(store.directory, os.W_OK) else own
                files = universal_form(home, path, manifest, say)
            else:
                vet_checkpoint(
                    path, allowed=UNIVERSAL_GLOBALS if way == "universal" else DEEPSPEED_GLOBALS
                )
            answer = {"files": str(files)}
        except (CheckpointError, RunError) as error:
            answer = {"problem": str(error)}
    answer = runtime.broadcast(answer)
    if "problem" in answer:
        raise CheckpointError(answer["problem"])
    return Source(
        checkpoint=path,
        engine_files=Path(answer["files"]),
        universal=way != "directly",
        manifest=manifest,
        weights_only=weights_only,
        optimizer=optimizer,
    )


def find_source(
    config: Config, runtime: Runtime, store: CheckpointStore, say: Callable[[str], None]
) -> Source | None:
    """Return what to start from: the run's own newest checkpoint, else that of ``load``.

    Collective; rank 0 looks, verifies and converts.

    Args:
        config: with ``model.vocab_size`` filled in.
        runtime: ranks and their host-side group.
        store: the run's own checkpoints.
        say: takes a line for the console.

    Raises:
        CheckpointError: ``load`` names nothing valid, or what is found cannot be taken up.
    """
    layout = layout_facts(config, run_layout(config, runtime.world_size))
    own, found, weights_only = store, find_checkpoint(runtime, store, say), False
    load = config.checkpoint.load
    if found is None and load is not None:
        store, weights_only = store_in(load), config.checkpoint.finetune
        only = named_step(load, config.checkpoint.iteration)
        found = find_checkpoint(runtime, store, say, only=only)
        if found is None:
            raise CheckpointError(
                f"load names {load}, which holds no valid checkpoint"
                f"{'' if only is None else f' of step {only}'}; correct it, or leave it out "
                "to start from new weights"
            )
        check_form(
            found[1],
            found[0],
            load_universal=config.checkpoint.load_universal,
            weights_only=taken_alone(config),
        )
    if found is None:
        return None
    return prepare_source(
        runtime,
        store,
        found,
        own=own,
        layout=layout,
        weights_only=weights_only,
        optimizer=config.checkpoint.takes_optimizer(weights_only=weights_only),
        say=say,
    )


def edits_since(source: Source, checked: Checked) -> Edits:
    """Return how the run's domains differ from the checkpoint's.

    Raises:
        CheckpointError: a domain is a part of one that the run never had.
    """
    return find_edits(
        read_bundle(source.checkpoint),
        checked.config.trained,
        checked.weights,
        source.manifest.extra.get("weights"),
    )


def known_fingerprints(source: Source | None, domains: OpenDomains) -> dict[str, str]:
    """Return the fingerprint of every domain that the run has ever had, gone ones included."""
    earlier = {} if source is None or source.weights_only else source.manifest.fingerprints
    return {**earlier, **domains.fingerprints}


def restore(
    checked: Checked, runtime: Runtime, parts: Parts, source: Source, say: Callable[[str], None]
) -> int:
    """Load weights, optimizer, data and mixing state; return the step they are of.

    Args:
        checked: what the run opened.
        runtime: compares what the ranks have read.
        parts: newly built; filled here.
        source: what :func:`find_source` found.
        say: takes a line for the console.

    Raises:
        CheckpointError: the state does not fit the run.
    """
    config, manifest = checked.config, source.manifest
    prompt = prompt_values(parts.engine)
    load_engine(parts, source)
    check_forward_loss(config, runtime, parts.topology, parts.engine, manifest, say)
    if source.weights_only:
        load_around_prompt(config, parts.engine, prompt)
        taken = "weights and the optimizer" if source.optimizer else "weights"
        say(f"starting from the {taken} of {source.checkpoint}, and from step 0")
        return 0
    bundle = read_bundle(source.checkpoint)
    _check_same_on_all_ranks(runtime, source, [bundle["step"], parts.engine.steps_done])
    edits = edits_since(source, checked)
    edits.check_allowed(allowed=config.data.allow_domain_edits)
    parts.planner.load_state_dict(follow_edits(bundle["planner"], edits, checked.mixer))
    parts.guard.load_state_dict(bundle["guard"])
    say(f"loaded {source.checkpoint}{'' if source.optimizer else ' without its optimizer'}")
    for line in edits.lines(learns=bool(checked.mixer.needs)):
        say(line)
    if manifest.config_hash != config.hash():
        say("note: the configuration is not the one that the checkpoint was written with")
    before, now = manifest.extra.get("threads"), run_facts(config)["threads"]
    if before != now:
        say(
            f"note: the checkpoint was written with {before} threads per rank and this process "
            f"has {now}; the last bits of its results may differ"
        )
    return manifest.step


def load_engine(parts: Parts, source: Source) -> None:
    """Load weights and optimizer; collective."""
    files = source.engine_files
    if source.universal:
        parts.engine.load_universal(
            files,
            tensor_rank=parts.topology.tensor_rank,
            tensor_size=parts.topology.tensor_size,
            weights_only=not source.optimizer,
        )
    else:
        parts.engine.load(files.parent, files.name, weights_only=not source.optimizer)


def _check_same_on_all_ranks(runtime: Runtime, source: Source, steps: list[int]) -> None:
    """Check that no rank has read another checkpoint of the same name.

    Raises:
        CheckpointError: naming the ranks that differ from rank 0.
    """
    content = (source.checkpoint / STATE_NAME).read_bytes()
    held = runtime.gather([*steps, hashlib.sha256(content).hexdigest()])
    strangers = [str(rank) for rank, one in enumerate(held) if one != held[0]]
    if strangers:
        raise CheckpointError(
            f"{source.checkpoint} is not the same for all ranks: what rank {', '.join(strangers)} "
            "read there differs from what rank 0 read; the folder must be on a file system that "
            "all nodes share"
        )
