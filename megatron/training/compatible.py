"""Whether a checkpoint fits the run that would take it up.  No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megatron.checkpoint.manifest import Manifest
from megatron.config import Config, ModelConfig
from megatron.config.optimisation import OptimizerConfig
from megatron.engine.universal import ADAM_STATE, check_convertible
from megatron.errors import CheckpointError
from megatron.parallel.layout import Layout
from megatron.training.layout import layer_bounds

NOT_ARCHITECTURE = {
    "hidden_dropout",
    "soft_prompt_tuning",
    "lora",
    "attention_dropout",
    "reset_attention_mask",
    "reset_position_ids",
    "eod_token_id",
    "init_method",
    "init_method_std",
    "output_layer_init_method",
    "moe_jitter_eps",
    "moe_loss_coeff",
    "moe_z_loss_coeff",
    "moe_lbl_in_fp32",
    "checkpoint_activations",
    "checkpoint_num_layers",
    "checkpoint_in_cpu",
    "seq_length",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "expansion_factor",
    "mlp_multiple_of",
}

LORA = "lora"
"""Key of the low-rank updates in what :func:`model_facts` says; absent where there are none."""

WITHOUT_OPTIMIZER = "without_optimizer"
"""Name among a manifest's facts of a checkpoint that holds no optimizer's state."""

OPTIMIZER = "optimizer"
"""Name of what :func:`layout_facts` says of the optimizer."""

IMPORTED = "imported"
"""Key of a manifest's ``extra`` that says from which other program's files a checkpoint comes."""

_WEIGHTS_FILES = ("tensor_size", "pipe_size", "stage_bounds", "padded_vocab_size")


def layout_facts(config: Config, layout: Layout) -> dict[str, object]:
    """Return what decides whether DeepSpeed's files can be loaded as they are.

    Args:
        config: with ``model.vocab_size`` filled in.
        layout: of the run's ranks.
    """
    return {
        "data_size": layout.data_size,
        "tensor_size": layout.tensor_size,
        "pipe_size": layout.pipe_size,
        "stage_bounds": layer_bounds(config),
        "padded_vocab_size": config.model.padded_vocab_size(layout.tensor_size),
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        **({"expert_size": layout.expert_size} if layout.expert_size > 1 else {}),
        **_optimizer_facts(config.optimizer),
    }


def optimizer_state(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """Name what an optimizer keeps of every number, and ``step`` where it counts its steps."""
    return (*optimizer.state, *(("step",) if optimizer.kind.counts else ()))


def _optimizer_facts(optimizer: OptimizerConfig) -> dict[str, object]:
    """Return which state the files hold; nothing is said of Adam's, which is the usual one."""
    if optimizer.type in ("adam", "adamw"):
        return {}
    state = list(optimizer_state(optimizer))
    return {
        OPTIMIZER: {
            "type": optimizer.type,
            "state": state,
            "convertible": optimizer.kind.convertible,
        }
    }


def saved_state(layout: Mapping[str, Any], path: object, *, weights_only: bool) -> tuple[str, ...]:
    """Return the names of the optimizer's tensors that a conversion carries over.

    Args:
        layout: of the checkpoint.
        path: its folder, for the message.
        weights_only: whether only the weights are wanted.

    Raises:
        CheckpointError: that optimizer's state belongs to the layout that wrote it.
    """
    saved = layout.get(OPTIMIZER)
    if saved is None:
        return ADAM_STATE
    if saved["convertible"]:
        return tuple(saved["state"])
    if weights_only:
        return ()
    raise CheckpointError(
        f"{path} holds the state of {saved['type']}, which belongs to the layout that wrote it and "
        "cannot be laid out anew; resume with that layout, or set no_load_optim: true to go on "
        "with an optimizer that starts afresh"
    )


def _check_same_optimizer(
    manifest: Manifest, saved: Mapping[str, Any], layout: Mapping[str, Any]
) -> None:
    """Refuse the state of another kind of optimizer.

    Raises:
        CheckpointError: naming both.
    """
    if saved.get(OPTIMIZER) != layout.get(OPTIMIZER):
        names = [(one.get(OPTIMIZER) or {"type": "Adam"})["type"] for one in (saved, layout)]
        detail = " with other parameters" if names[0] == names[1] else ""
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was written by the optimizer {names[0]} and "
            f"the run has {names[1]}{detail}, which keeps another state; take the checkpoint's "
            "optimizer, or set no_load_optim: true to go on with one that starts afresh (or "
            "finetune: true to begin a new run with the weights alone)"
        )


def how_to_load(
    manifest: Manifest, layout: Mapping[str, Any], *, weights_only: bool
) -> Literal["directly", "universal", "convert"]:
    """Return how a run of this layout loads a checkpoint.

    Args:
        manifest: of the checkpoint.
        layout: of the run, as :func:`layout_facts` gives it.
        weights_only: whether a new run begins with the checkpoint's weights.

    Returns:
        ``"directly"`` the files as the layout's own; ``"universal"`` where they are in the
        universal format; ``"convert"`` where they must be converted to it first.

    Raises:
        CheckpointError: the layouts cannot be converted into each other, or the optimizer is
            another one.
    """
    saved = dict(manifest.layout)
    if manifest.extra.get(WITHOUT_OPTIMIZER) and not weights_only:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was written with no_save_optim, without the "
            "optimizer's state; set no_load_optim: true to go on with an optimizer that starts "
            "afresh, or finetune: true to begin a new run with the weights"
        )
    if not weights_only:
        _check_same_optimizer(manifest, saved, layout)
    if saved.get("universal"):
        check_convertible(saved, layout)
        return "universal"
    keys = _WEIGHTS_FILES if weights_only else layout.keys() | saved.keys()
    # Under ZeRO 3 weights are divided like the optimizer's state and are nowhere whole.
    whole = not weights_only or 3 not in (saved.get("zero_stage"), layout["zero_stage"])
    if whole and all(saved.get(key) == layout.get(key) for key in keys):
        return "directly"
    check_convertible(saved, layout)
    saved_state(saved, f"the checkpoint of step {manifest.step}", weights_only=weights_only)
    return "convert"


def check_form(
    manifest: Manifest, path: object, *, load_universal: bool, weights_only: bool = True
) -> None:
    """Check that the checkpoint that ``load`` names is in the form that was announced.

    Raises:
        CheckpointError: with the key to set, or the tool to run.
    """
    if (origin := manifest.extra.get(IMPORTED)) is not None:
        if not weights_only:
            raise CheckpointError(
                f"{path} comes from {origin} and holds weights alone; set finetune: true to start "
                "a new run from them (and leave finetune_optimizer out)"
            )
        return
    universal = bool(manifest.layout.get("universal"))
    if load_universal and not universal:
        raise CheckpointError(
            f"load_universal is set, and {path} is not in the universal format: convert it with "
            "tools/convert_checkpoint.py, or leave load_universal out (a run converts what it "
            "loads by itself where its layout differs)"
        )
    if universal and not load_universal:
        raise CheckpointError(
            f"{path} is in the universal format; set load_universal: true to start from it"
        )


def taken_alone(config: Config) -> bool:
    """Tell whether a run takes nothing but weights from the checkpoint that ``load`` names."""
    return config.checkpoint.finetune and not config.checkpoint.finetune_optimizer


def model_facts(config: Config) -> dict[str, object]:
    """Return what a checkpoint's model must agree in with the configuration's."""
    return facts_of(config.model)


def facts_of(model: ModelConfig) -> dict[str, object]:
    """Return those of a model."""
    facts = model.model_dump(mode="json", exclude=NOT_ARCHITECTURE)
    if model.lora is not None:
        facts[LORA] = model.lora.model_dump(mode="json", exclude={"dropout"})
    return facts


def check_same_model(
    manifest: Manifest, model: Mapping[str, Any], *, adapted: bool = False
) -> None:
    """Refuse a checkpoint of another architecture, before DeepSpeed trips over its shapes.

    Args:
        manifest: of the checkpoint.
        model: what :func:`model_facts` says of the run's.
        adapted: the run starts from the checkpoint's weights, and may add updates to them.

    Raises:
        CheckpointError: naming every key that differs, with both values.
    """
    saved = manifest.extra.get("model", {})
    before, now = saved.get(LORA), model.get(LORA)
    if before != now and (before is not None or not adapted):
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} has lora: {before}, and the configuration "
            f"lora: {now}; set it alike. The model with its updates added to its weights is made "
            "by tools/convert_checkpoint.py"
        )
    changed = [
        f"{key} (checkpoint {saved[key]!r}, configuration {value!r})"
        for key, value in model.items()
        if key in saved and saved[key] != value
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} is of another model: {', '.join(changed)}; "
            "set these keys to the checkpoint's values, or start in another run_dir"
        )


def check_same_data(
    manifest: Manifest, fingerprints: Mapping[str, Any], *, allow_changed: bool
) -> None:
    """Refuse to go on with other data under the same names.

    Domains may be added or left out (the mixing state says itself whether it can follow);
    what a domain holds may not change unnoticed.

    Raises:
        CheckpointError: naming the domains whose data has changed.
    """
    changed = [
        name
        for name, value in fingerprints.items()
        if name in manifest.fingerprints and manifest.fingerprints[name] != value
    ]
    if changed and not allow_changed:
        raise CheckpointError(
            f"the training data of {', '.join(repr(name) for name in changed)} is not what the "
            f"checkpoint of step {manifest.step} was trained on (its fingerprint differs); put "
            "the old data back, start another run_dir, or set allow_changed_data: true"
        )
