"""``deepy.py --check``: open everything the run would, compute what it would take, start nothing.

No torch is imported, so the answer comes in a second or two.  A launch does the first part of
it too, before any rank is started.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.checkpoint.bundle import read_bundle
from megatron.checkpoint.store import CheckpointStore, named_step, store_in
from megatron.config import Config, deepspeed_config, resolve_batch
from megatron.data.domain import Domain
from megatron.data.ingest.overlap import Overlap, Span, overlap
from megatron.errors import CheckpointError, ConfigError, NeomixError, RunError
from megatron.mixing import RunContext, Signal, build_mixer
from megatron.mixing.controller import Controller
from megatron.training.compatible import (
    check_form,
    check_same_data,
    check_same_model,
    how_to_load,
    layout_facts,
    model_facts,
    taken_alone,
)
from megatron.training.compiler import check_compiler
from megatron.training.counting import counter
from megatron.training.domains import OpenDomains, open_run_domains, start_weights
from megatron.training.edits import find_edits
from megatron.training.epochs import with_steps
from megatron.training.inference_options import check_tasks
from megatron.training.layout import layer_bounds, run_layout
from megatron.training.plan import checkpoint_bytes
from megatron.training.reference_options import check_reference_source
from megatron.training.signals_fit import asked_ahead, check_signals
from megatron.training.summary import check_device, complete, startup_report

FloatArray = npt.NDArray[np.float64]

_FEW_WINDOWS = 10
_LOOKED_AT = 5_000
_SCANNED_TOKENS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check has opened and worked out.

    Attributes:
        config: the configuration, complete.
        domains: the opened data; the caller closes it.
        weights: start weights of the mixture [K].
        mixer: the controller, before its first step.
    """

    config: Config
    domains: OpenDomains
    weights: FloatArray
    mixer: Controller


def preflight(config: Config, *, world_size: int, gpus: int) -> Checked:
    """Do what every rank would do first, so that what cannot start fails at once and once.

    Args:
        config: the loaded configuration.
        world_size: ranks of the job.
        gpus: GPUs of this node; 0 means a CPU run.

    Raises:
        NeomixError: the first thing that the run would stop at.
    """
    data_size = run_layout(config, world_size).data_size
    micro, accumulation, total = resolve_batch(config.batch, data_size)
    check_device(config, on_cpu=gpus == 0)
    if config.training.torch_compile:
        check_compiler(on_cpu=gpus == 0)
    check_tasks(config)
    deepspeed_config(config, micro=micro, accumulation=accumulation, data_size=data_size)
    domains = open_run_domains(config)
    try:
        config = with_steps(complete(config, domains), domains, total)
        layer_bounds(config)
        weights = start_weights(config.mixing, config.domains, domains)
        mixer = build_controller(config, domains, weights, micro=micro, total=total)
        _check_signals(config, domains, weights, mixer, world_size=world_size)
    except NeomixError:
        domains.close()
        raise
    return Checked(config=config, domains=domains, weights=weights, mixer=mixer)


def check(config: Config, *, world_size: int, gpus: int, say: Callable[[str], None] = print) -> int:
    """Check a configuration as a run of ``world_size`` ranks would find it, and report.

    Args:
        config: the loaded configuration.
        world_size: ranks of the job.
        gpus: GPUs of this node; 0 means a CPU run.
        say: takes the lines of the report.

    Returns:
        0; what does not fit is raised.

    Raises:
        NeomixError: the first thing that the run would stop at.
    """
    checked = preflight(config, world_size=world_size, gpus=gpus)
    config, domains = checked.config, checked.domains
    try:
        layout = run_layout(config, world_size)
        startup_report(config, domains, checked.weights, layout, say, on_cpu=gpus == 0)
        _check_read(domains)
        _check_disk(config, say)
        _check_resume(checked, world_size, say)
        _warn(config, domains, gpus, say)
    finally:
        domains.close()
    say("check: everything the run needs is there")
    return 0


def build_controller(
    config: Config, domains: OpenDomains, weights: FloatArray, *, micro: int, total: int
) -> Controller:
    """Build the mixer of a run and let it decide once: its own checks belong to the run's.

    Args:
        config: with ``model.vocab_size`` filled in.
        domains: opened data.
        weights: start weights [K].
        micro: samples of a micro-batch.
        total: samples of a global batch.

    Raises:
        ConfigError: an option is wrong.
    """
    samples_per_draw = {"sample": 1, "micro_batch": micro, "step": total}[config.mixing.unit]
    mixer = build_mixer(
        config.mixing.method,
        domains=domains.names,
        weights=weights,
        context=RunContext(
            total_steps=config.training.train_iters,
            # Of a curriculum, the mean: a stage given in tokens ends about there.
            tokens_per_step=total
            * config.data.tokens_per_row(config.training.train_iters, config.model.context_length)
            // config.training.train_iters,
            samples_per_step=total,
            draws_per_step=total // samples_per_draw,
            samples_per_epoch=tuple(float(domain.num_windows(0)) for domain in domains.train),
            vocab_size=config.model.vocab_size,
            targets=domains.targets,
            count_losses=counter(domains, config.model),
        ),
        **config.mixing.options,
    )
    mixer.decide(step=1)
    return mixer


def _check_signals(
    config: Config,
    domains: OpenDomains,
    weights: FloatArray,
    mixer: Controller,
    *,
    world_size: int,
) -> None:
    """Check that the data, the layout and what is at hand can give what the method reads."""
    held_out = {Signal.VALID_LOSS, Signal.BATCH_VALID_LOSS}
    aim = mixer.gradient_aim
    wanted = [
        bool(mixer.needs & held_out) or (aim is not None and not aim.others and aim.weights[k] > 0)
        for k in range(len(domains.measured))
    ]
    blind = [
        name
        for name, part, asked in zip(domains.measured, domains.valid, wanted, strict=True)
        if part is None and asked
    ]
    if blind:
        raise ConfigError(
            f"mixing.method: '{config.mixing.method}' is driven by held-out losses, and "
            f"{', '.join(blind)} has no validation data; give the domain a `valid`, or a split "
            f"with a share for it"
        )
    options = config.mixing.options
    ahead = asked_ahead(
        mixer,
        warmup_steps=options["warmup_steps"],
        update_every=options["update_every"],
    )
    curriculum = config.data.curriculum_learning
    if curriculum is not None and curriculum.enabled and ahead:
        raise ConfigError(
            f"mixing.method: '{config.mixing.method}' measures a step before it trains, in rows of "
            "full length, and curriculum_learning makes them shorter; switch one of the two off"
        )
    check_signals(
        config.mixing.method,
        needs=mixer.needs,
        ahead=ahead,
        layout=run_layout(config, world_size),
        zero_stage=config.zero_stage,
    )
    if Signal.EXCESS_LOSS in mixer.needs:
        check_reference_source(config, domains, weights, world_size=world_size)


def _check_read(domains: OpenDomains) -> None:
    """Read one sample of every part, which a damaged disk would refuse."""
    for domain in (*domains.train, *domains.valid, *domains.test):
        if domain is not None:
            domain.sample(0, 0)


def _check_disk(config: Config, say: Callable[[str], None]) -> None:
    folder = Path(config.checkpoint.save_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise RunError(f"cannot write into {folder}; give another run_dir, or make it writable")
    free = shutil.disk_usage(folder).free
    one = checkpoint_bytes(config)
    kept = config.checkpoint.keep_last_n_checkpoints
    last = config.training.train_iters
    saves = sum(config.checkpoint.saves_at(step, last) for step in range(last + 1))
    # While one is written the oldest is still there.
    needed = one * (min(saves, kept + 1) if kept else saves)
    say(
        f"disk: {saves} checkpoints of about {one / 2**20:,.0f} MiB, {kept or 'all'} kept: about "
        f"{needed / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free in {folder}"
    )
    if config.checkpoint.async_save:
        say(f"async_save: a copy of that size in host memory, {one / 2**20:,.0f} MiB for all ranks")
    if needed > free:
        raise RunError(
            f"the checkpoints need about {needed:,} bytes and {folder} has {free:,} free; free "
            "space, raise save_interval, lower keep_last_n_checkpoints, or give another run_dir"
        )


def _check_resume(checked: Checked, world_size: int, say: Callable[[str], None]) -> None:
    """Compare the checkpoint that the run starts from with it; hashes are left to the run."""
    config, domains = checked.config, checked.domains
    own, load = CheckpointStore(config.checkpoint.save_dir), config.checkpoint.load
    resumes = bool(own.steps())
    store = own if resumes or load is None else store_in(load)
    only = None
    if load is not None and not resumes:
        only = named_step(load, config.checkpoint.iteration)
    if not (steps := [step for step in store.steps() if only in (None, step)]):
        if load is not None:
            raise CheckpointError(
                f"load names {load}, which holds no checkpoint"
                f"{'' if only is None else f' of step {only}'}; correct it, or leave it out to "
                "start from new weights"
            )
        return
    path = store.path(steps[-1])
    try:
        manifest = store.read_manifest(path)
    except CheckpointError as error:
        say(f"resume: {path} would be passed over ({error})")
        return
    if not resumes:
        check_form(
            manifest,
            path,
            load_universal=config.checkpoint.load_universal,
            weights_only=taken_alone(config),
        )
    weights_only = config.checkpoint.finetune and not resumes
    check_same_model(manifest, model_facts(config), adapted=weights_only)
    layout = layout_facts(config, run_layout(config, world_size))
    told: list[str] = []
    if weights_only:
        taken = "weights and the optimizer" if config.checkpoint.finetune_optimizer else "weights"
        start = f"finetune: the run starts from the {taken} of {path}, at step 0"
    else:
        allow = config.data.allow_changed_data
        check_same_data(manifest, domains.fingerprints, allow_changed=allow)
        if manifest.step >= config.training.train_iters:
            say(f"resume: the run is complete, by {path}")
            return
        given = manifest.extra.get("weights")
        edits = find_edits(read_bundle(path), config.trained, checked.weights, given)
        edits.check_allowed(allowed=config.data.allow_domain_edits)
        told = edits.lines(learns=bool(checked.mixer.needs))
        start = f"resume: the run goes on after step {manifest.step} from {path}"
    bare = not config.checkpoint.takes_optimizer(weights_only=weights_only)
    converted = how_to_load(manifest, layout, weights_only=bare) == "convert"
    say(start + (", which is converted to this run's layout first" if converted else ""))
    for line in told:
        say(line)


def _warn(
    config: Config,
    domains: OpenDomains,
    gpus: int,
    say: Callable[[str], None],
) -> None:
    if gpus and config.mixing.lag == 0 and config.mixing.method != "static":
        say(
            "advice: on GPUs, mixing.lag: 1 lets the next batch be read while a step runs; a "
            "decision then trails its losses by one step"
        )
    for domain in domains.train:
        windows = domain.num_windows(0)
        if windows < _FEW_WINDOWS:
            say(f"warning: domain '{domain.name}' has only {windows} windows; it repeats often")
    _warn_of_overlap(domains, say)


def _warn_of_overlap(domains: OpenDomains, say: Callable[[str], None]) -> None:
    """Say which validation data is found in the training data, of whatever domain.

    All validation parts are looked for at once; only where something is found is each part
    looked at by itself.  Both sides are sampled when large, so that a check stays short.
    """
    train = [span for domain in domains.train for span in _spans(domain)]
    parts = {name: _spans(part) for name, part in zip(domains.measured, domains.valid, strict=True)}

    def found(spans: list[Span]) -> Overlap:
        return overlap(train, spans, max_documents=_LOOKED_AT, max_scan_tokens=_SCANNED_TOKENS)

    everything = [span for spans in parts.values() for span in spans]
    if not everything or not found(everything).similar:
        return
    for name, spans in parts.items():
        result = found(spans) if spans else None
        if result is not None and result.similar:
            say(
                f"warning: domain '{name}' validates on what is trained on: "
                f"{result.similar:,} of {result.documents:,} validation documents looked at are "
                f"in the training data ({result.exact:,} of them exactly); its validation loss "
                "says little (tools/inspect_dataset.py --overlap looks at all of it)"
            )


def _spans(domain: Domain | None) -> list[Span]:
    if domain is None:
        return []
    return [
        (source.reader, source.documents.first, source.documents.last) for source in domain.sources
    ]
