"""One training run in one rank's process, from start to end."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config
from megatron.engine.frozen import PRECISIONS
from megatron.engine.host_copy import HostCopies
from megatron.engine.runtime import Runtime, open_board
from megatron.engine.universal import universal_info
from megatron.launch.stop import StopFlag
from megatron.model.accounting import parameter_count
from megatron.model.gpt import GPT
from megatron.model.kernels import attention_kernels
from megatron.monitor.overhead import overhead_text
from megatron.training.agreement import Agreement
from megatron.training.build import Parts, build, run_facts
from megatron.training.check import Checked, preflight
from megatron.training.compatible import (
    WITHOUT_OPTIMIZER,
    check_same_data,
    check_same_model,
    layout_facts,
    model_facts,
)
from megatron.training.forward_check import keep_forward_loss
from megatron.training.live_tasks import live_tasks
from megatron.training.loop import Ending, Loop
from megatron.training.milestones import Milestones
from megatron.training.plan import checkpoint_bytes
from megatron.training.product import NAME as MIXTURE
from megatron.training.product import write_mixture
from megatron.training.profiling import write_communication
from megatron.training.restore import (
    Source,
    edits_since,
    find_source,
    known_fingerprints,
    restore,
)
from megatron.training.saving import Behind, Saver
from megatron.training.schedule import (
    FACT,
    schedule_facts,
    schedule_note,
    with_checkpoint_schedule,
)
from megatron.training.stall import ENDING, RESTORING, SAVING, Heartbeat, Watchdog
from megatron.training.summary import startup_report
from megatron.training.take_back import take_back

EXIT_DONE = 0


def run(config: Config, runtime: Runtime, stop: StopFlag) -> int:
    """Train what ``config`` describes, from its newest checkpoint on if there is one.

    Returns:
        The exit code: 0 when the run is complete, else the stop flag's.

    Raises:
        NeomixError: the data, the checkpoint or the configuration does not fit.
    """
    heartbeat = Heartbeat()
    watchdog = Watchdog(
        heartbeat,
        open_board(runtime),
        rank=runtime.rank,
        host=socket.gethostname(),
        report_after=config.training.stall_report,
        end_after=config.training.stall_timeout,
    ).start()
    try:
        return _run(config, runtime, stop, heartbeat)
    finally:
        watchdog.stop()


def _run(config: Config, runtime: Runtime, stop: StopFlag, heartbeat: Heartbeat) -> int:
    say = _speaker(runtime)
    gpus = torch.cuda.device_count() if runtime.device.type == "cuda" else 0
    checked = preflight(config, world_size=runtime.world_size, gpus=gpus)
    config, domains = checked.config, checked.domains
    store = CheckpointStore(
        config.checkpoint.save_dir, keep_last=config.checkpoint.keep_last_n_checkpoints
    )
    if runtime.rank == 0:
        store.sweep()
    heartbeat.at(RESTORING)
    source = find_source(config, runtime, store, say)
    if source is not None and _complete(checked, source):
        say(
            f"nothing to do: {source.checkpoint} is complete ({source.manifest.step} of "
            f"{config.training.train_iters} steps); raise train_iters to go on"
        )
        return EXIT_DONE
    checked = follow_schedule(checked, source, say)
    config = checked.config
    parts = build(config, runtime, domains, checked.mixer, say)
    layout = parts.topology.layout
    startup_report(config, domains, checked.weights, layout, say, on_cpu=gpus == 0)
    say(f"attention: {_kernels(config, runtime)}")
    start = restore(checked, runtime, parts, source, say) if source is not None else 0
    saver = _saver(config, runtime, checked, store, parts, source)

    def go_back(step: int, count: Callable[[str], None]) -> str:
        heartbeat.at(SAVING, step)
        saver.wait()  # the newest checkpoint may be the one that is being written
        heartbeat.at(RESTORING, step)
        return take_back(
            step, count, config=config, runtime=runtime, store=store, parts=parts, say=say
        )

    parts.guard.go_back = go_back
    milestones = _milestones(config, runtime, checked, saver, parts, heartbeat)
    if runtime.rank == 0:
        _write_config(config)
    parts.sinks.start(start or None, _description(config, checked, parts))
    try:
        step, ending = _train(config, runtime, parts, milestones, stop, start=start)
        write_communication(config, runtime)
    except BaseException:
        # All that went before is good: what is being written of it may become complete.
        heartbeat.at(SAVING)
        with contextlib.suppress(Exception):
            saver.wait(config.checkpoint.save_timeout)
        raise
    finally:
        heartbeat.at(ENDING)
        parts.sinks.close()
        parts.close()
    why = parts.planner.end_of_data if ending is Ending.EXHAUSTED else ending.value
    say(f"ended after step {step} of {config.training.train_iters}: {why}")
    if parts.planner.result() is not None:
        say(f"the mixture that {config.mixing.method} found: {config.run_dir}/{MIXTURE}")
    if spent := parts.overhead.total:
        say(f"mixing took {overhead_text(spent)} of this process")
    return stop.exit_code if ending is Ending.STOPPED else EXIT_DONE


def _train(
    config: Config,
    runtime: Runtime,
    parts: Parts,
    milestones: Milestones,
    stop: StopFlag,
    *,
    start: int,
) -> tuple[int, Ending]:
    interval = config.training.exit_interval
    loop = Loop(
        engine=parts.engine,
        planner=parts.planner,
        reader=parts.reader,
        foresight=parts.foresight,
        ledger=parts.ledger,
        guard=parts.guard,
        recorder=parts.recorder,
        learning_rate=parts.learning_rate,
        # A save that fails behind the steps ends the run on all ranks after the same step.
        stop_requested=lambda: stop.requested or milestones.saver.failed,
        exits_at=lambda step: interval is not None and step % interval == 0,
        after_step=milestones.after_step,
        device=runtime.device,
        heartbeat=milestones.heartbeat,
        overhead=parts.overhead,
    )
    if start == 0:
        milestones.before_first()
    return loop.run(start=start, last=config.training.train_iters)


def _saver(
    config: Config,
    runtime: Runtime,
    checked: Checked,
    store: CheckpointStore,
    parts: Parts,
    source: Source | None,
) -> Saver:
    weights = checked.weights / checked.weights.sum()
    if config.checkpoint.no_save_optim:
        parts.engine.leave_optimizer_out()
    behind = None
    if config.checkpoint.async_save:
        copies = HostCopies(pinned=runtime.device.type == "cuda")
        behind = Behind(runtime=runtime.beside(), copies=copies)
    return Saver(
        runtime=runtime,
        store=store,
        engine=parts.engine,
        planner=parts.planner,
        guard=parts.guard,
        sinks=parts.sinks,
        domains=list(checked.domains.names),
        layout=layout_facts(config, parts.topology.layout),
        config_hash=config.hash(),
        fingerprints=known_fingerprints(source, checked.domains),
        facts={
            **run_facts(config),
            FACT: schedule_facts(config),
            **({WITHOUT_OPTIMIZER: True} if config.checkpoint.no_save_optim else {}),
            "weights": dict(zip(checked.domains.names, weights.tolist(), strict=True)),
        },
        universal_info=_universal_info(config),
        measured=keep_forward_loss(config, runtime, parts.topology, parts.engine),
        bytes_needed=checkpoint_bytes(config),
        behind=behind,
    )


def _milestones(
    config: Config,
    runtime: Runtime,
    checked: Checked,
    saver: Saver,
    parts: Parts,
    heartbeat: Heartbeat,
) -> Milestones:
    weights = checked.weights / checked.weights.sum()
    last = config.training.train_iters

    def write_product(step: int) -> None:
        if runtime.rank == 0:
            write_mixture(
                config.checkpoint.run_dir,
                checked.domains.names,
                parts.planner.result,
                method=config.mixing.method,
                step=step,
            )

    return Milestones(
        engine=parts.engine,
        validation=parts.validation,
        test=parts.test,
        agreement=Agreement(
            gather=runtime.gather,
            state=parts.planner.state_dict,
            interval=config.training.state_check_interval,
        ),
        review=parts.planner.review,
        say=_speaker(runtime),
        saver=saver,
        write_product=write_product,
        recorder=parts.recorder,
        throughput=parts.throughput,
        eval_interval=config.training.eval_interval,
        saves_at=lambda step: config.checkpoint.saves_at(step, last),
        weights=weights,
        tasks=live_tasks(config, runtime, parts),
        tasks_interval=config.evaluation.eval_tasks_interval or config.training.eval_interval,
        heartbeat=heartbeat,
    )


def _description(config: Config, checked: Checked, parts: Parts) -> dict[str, Any]:
    """Return what the sinks and the report are told of the run."""
    names, tokens = checked.domains.names, checked.domains.token_counts
    return {
        "config": config.model_dump(mode="json"),
        "method": config.mixing.method,
        "seed": config.training.seed,
        "total_steps": config.training.train_iters,
        "parameters": parameter_count(config.model),
        "train_tokens": dict(zip(names, map(int, tokens), strict=True)),
        "samples_seen": dict(zip(names, map(int, parts.samples_seen()), strict=True)),
    }


def _complete(checked: Checked, source: Source) -> bool:
    """Tell whether there is nothing left to do; check that the checkpoint is of this run.

    Raises:
        CheckpointError: it is of another model, or of other data.
    """
    config, domains = checked.config, checked.domains
    check_same_model(source.manifest, model_facts(config), adapted=source.weights_only)
    if source.weights_only:
        return False
    if source.manifest.step >= config.training.train_iters:
        return True
    check_same_data(
        source.manifest, domains.fingerprints, allow_changed=config.data.allow_changed_data
    )
    allowed = config.data.allow_domain_edits
    edits_since(source, checked).check_allowed(allowed=allowed)
    return False


def follow_schedule(checked: Checked, source: Source | None, say: Callable[[str], None]) -> Checked:
    """Let a resumed run follow its checkpoint's learning-rate schedule where that is asked for.

    Raises:
        CheckpointError: the checkpoint does not say what its schedule was.
    """
    if source is None or source.weights_only:
        return checked
    config = checked.config
    if config.schedule.use_checkpoint_lr_scheduler:
        return replace(checked, config=with_checkpoint_schedule(config, source.manifest))
    if (note := schedule_note(config, source.manifest)) is not None:
        say(note)
    return checked


def _universal_info(config: Config) -> dict[str, Any]:
    """Describe the parameters of the whole model, of which this rank may hold but a part."""
    assert config.model.vocab_size is not None
    whole = GPT(config.model, seed=config.training.seed, device="meta")
    return universal_info(dict(whole.named_parameters()), config.model.vocab_size)


def _kernels(config: Config, runtime: Runtime) -> str:
    """Return in words which kernel each kind of attention runs on."""
    told = attention_kernels(
        config.model, device=runtime.device, dtype=PRECISIONS[config.precision]
    )
    said = [f"{kind} by torch's {kernel} kernel" for kind, kernel in told.items()]
    return ", ".join(said) or "none"


def _write_config(config: Config) -> None:
    path = Path(config.checkpoint.run_dir) / "config.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.resolved_yaml(), encoding="utf-8")


def _speaker(runtime: Runtime) -> Callable[[str], None]:
    def say(text: str) -> None:
        if runtime.rank == 0:
            print(text, file=sys.stdout, flush=True)

    return say
