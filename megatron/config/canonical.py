"""From a user's keys to groups: every key is honoured, mapped, refused or noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron.config.amp import read_amp
from megatron.config.attention import DENSE, SPARSE
from megatron.config.blocks import (
    complete_optimizer,
    put_optimizer_type,
    put_zero_option,
    read_bf16,
    read_bnb,
    read_fp16,
    read_optimizer,
    read_precision,
    read_zero,
)
from megatron.config.config import FLAT_GROUPS
from megatron.config.domains import map_data_keys, map_weights
from megatron.config.draft import Draft
from megatron.config.model import GATED, GATED_MULTIPLE, ModelConfig
from megatron.config.monitors import (
    read_activation_checkpointing,
    read_tensorboard,
    read_wandb,
)
from megatron.config.neox import (
    ALIASES,
    DATA_KEYS,
    LAUNCHER_KEYS,
    REFUSED,
    SAMPLING_KEYS,
    WITHOUT_EFFECT,
    ZERO_ALIASES,
)
from megatron.config.node import Node
from megatron.config.optimizers import OPTIMIZER_PARAMS
from megatron.config.problems import Problems
from megatron.config.run import CheckpointConfig, is_run_name
from megatron.config.sampling import map_sampling_keys
from megatron.config.schedule_keys import complete_schedule
from megatron.config.suggest import did_you_mean

FIELDS: dict[str, tuple[str, str]] = {
    name: (group, name) for group, model in FLAT_GROUPS.items() for name in model.model_fields
}
IGNORED_KEY = "keys_without_effect"
_Reader = Callable[..., None]
_READERS: dict[str, _Reader] = {
    "optimizer": read_optimizer,
    "optimizer_type": put_optimizer_type,
    "use_bnb_optimizer": read_bnb,
    "fp16": read_fp16,
    "bf16": read_bf16,
    "precision": read_precision,
    "amp": read_amp,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "activation_checkpointing": read_activation_checkpointing,
    "zero_optimization": read_zero,
    **{key: partial(put_zero_option, key=option) for key, option in ZERO_ALIASES.items()},
}
_OWN = (
    "split",
    "domains",
    "mixing",
    "deepspeed_extra_args",
    "bias_gelu_fusion",
    "num_unique_layers",
    "decay_lr_to",
    "fp32_allreduce",
    "data_types",
    *LAUNCHER_KEYS,
)


def accepted_keys() -> list[str]:
    """Name every key that has a meaning here, without those that are refused or ignored."""
    return [*FIELDS, *_READERS, *_OWN, *ALIASES, *DATA_KEYS, *SAMPLING_KEYS]


def known_keys() -> list[str]:
    """Name every key that is known, the accepted ones first."""
    return [*accepted_keys(), *REFUSED, *WITHOUT_EFFECT]


def canonicalise(tree: dict[str, Node], problems: Problems) -> Draft:
    """Sort a merged tree's keys into a draft of the typed groups."""
    draft = Draft(problems=problems)
    later: dict[str, Node] = {}
    for key, node in tree.items():
        if node.value is None and node.mark.override and key in known_keys():
            continue  # --set key=null gives back the default
        if key in DATA_KEYS or key in SAMPLING_KEYS:
            later[key] = node
        else:
            _read_key(draft, key, node)
    map_data_keys(draft, {k: n for k, n in later.items() if k in DATA_KEYS})
    map_sampling_keys(draft, {k: n for k, n in later.items() if k in SAMPLING_KEYS})
    map_weights(draft)
    _complete(draft)
    return draft


def _read_key(draft: Draft, key: str, node: Node) -> None:
    if key in _READERS:
        if node.value is not None:
            _READERS[key](draft, node=node)
    elif key == "attention_config":
        _read_attention(draft, node)
    elif key == "num_nodes" and node.value == -1:
        pass  # GPT-NeoX: as many as the hostfile has
    elif key in FIELDS:
        draft.put(*FIELDS[key], node)
    elif key in ALIASES:
        if node.value is not None:
            draft.put(*ALIASES[key], node)
    elif key in ("split", "domains", IGNORED_KEY):
        draft.put("", key, node)
    elif key == "mixing":
        for name, entry in draft.block(node).items():
            draft.put("mixing", name, entry)
    elif key == "deepspeed_extra_args":
        _read_extra(draft, node)
    elif key == "data_types":
        draft.put("deepspeed", key, node)
    elif key == "fp32_allreduce":
        _read_allreduce(draft, node)
    elif key in ("bias_gelu_fusion", "num_unique_layers", "decay_lr_to", *LAUNCHER_KEYS):
        draft.put("", key, node)
    else:
        _read_foreign(draft, key, node)


def _read_foreign(draft: Draft, key: str, node: Node) -> None:
    """Refuse, note or reject a key that has no meaning here."""
    if key in REFUSED:
        if not REFUSED[key].agrees(node.plain()):
            draft.problems.add(node, f"refused: {REFUSED[key].instead}")
    elif key in WITHOUT_EFFECT:
        if node.value is not None:
            draft.ignore(node.name, WITHOUT_EFFECT[key])
    else:
        draft.problems.add(node, f"unknown key{_suggestion(key)}", show=False)


def _suggestion(key: str) -> str:
    for block, names in BLOCK_OF.items():
        if key in names:
            return f"; it belongs into the block '{block}'"
    return did_you_mean(key, known_keys())


BLOCK_OF: dict[str, tuple[str, ...]] = {
    "optimizer: {params: …}": OPTIMIZER_PARAMS,
    "mixing": ("method", "floor", "ceiling", "warmup_steps", "smoothing_factor", "update_every"),
    "domains": ("train", "valid", "test", "weight"),
    "zero_optimization": ("stage",),
}


def _read_attention(draft: Draft, node: Node) -> None:
    """Note it where every layer is global or flash attention, which is so anyway."""
    if node.value is None:
        return
    if not isinstance(node.value, list):
        draft.problems.add(node, "should be a list such as [[[flash], all]]")
        return
    draft.put("model", "attention_config", node)
    names = {str(entry.value).lower() for entry in _leaves(node) if isinstance(entry.value, str)}
    if names <= {*DENSE, "all"}:
        draft.ignore(node.name, "attention is global, by the fastest kernel at hand")


def _complete_attention(draft: Draft) -> None:
    """Note settings of positions and of sparse attention that belong to another kind."""
    kinds = draft.get("model", "attention_config")
    sparse = kinds is not None and any(
        str(entry.value).lower() in SPARSE for entry in _leaves(kinds)
    )
    position = draft.get("model", "pos_emb")
    name = "rotary" if position is None else str(position.value).lower()
    for key, used, what in (
        ("sparsity_config", sparse, "belongs to sparse attention, which attention_config asks for"),
        ("rpe_num_buckets", name == "rpe", "belongs to pos_emb: rpe"),
        ("rpe_max_distance", name == "rpe", "belongs to pos_emb: rpe"),
        (
            "opt_pos_emb_offset",
            name in ("learned", "sinusoidal"),
            "belongs to learned and sinusoidal positions",
        ),
    ):
        node = draft.get("model", key)
        if node is None or used:
            continue
        fields = draft.groups["model"]
        given = ModelConfig.model_fields[key].default
        if node.value not in (None, given, {}):
            draft.ignore(node.name, what)
        if node.value is None or isinstance(node.value, (int, dict)):
            del fields[key]


def _leaves(node: Node) -> list[Node]:
    if isinstance(node.value, list):
        return [leaf for entry in node.value for leaf in _leaves(entry)]
    return [node]


def _read_allreduce(draft: Draft, node: Node) -> None:
    if not isinstance(node.value, bool):
        if node.value is not None:
            draft.problems.add(node, "should be true or false")
    elif node.value:
        draft.put("parallel", "communication_data_type", replace(node, value="fp32"))


_NOT_EXTRA = {
    "optimizer": "use the optimizer block",
    "scheduler": "use scheduler as a key of its own",
    "prescale_gradients": "use prescale_gradients as a key of its own",
    "gradient_predivide_factor": "use gradient_predivide_factor as a key of its own",
    "train_batch_size": "use train_batch_size as a key of its own",
    "train_micro_batch_size_per_gpu": "use train_micro_batch_size_per_gpu as a key of its own",
    "gradient_accumulation_steps": "use gradient_accumulation_steps as a key of its own",
    "gradient_clipping": "use gradient_clipping as a key of its own",
    "fp16": "use the fp16 block",
    "bf16": "use precision: bf16",
    "bfloat16": "use precision: bf16",
    "amp": "use amp as a key of its own, or precision",
}


def _read_extra(draft: Draft, node: Node) -> None:
    for key, entry in draft.block(node).items():
        if key in _NOT_EXTRA:
            draft.problems.add(entry, f"refused here: {_NOT_EXTRA[key]}")
        else:
            draft.put("deepspeed", key, entry)


def _complete(draft: Draft) -> None:
    """Fill in what one key implies for another."""
    complete_optimizer(draft)
    _complete_launcher(draft)
    _complete_activation(draft)
    _complete_attention(draft)
    _complete_width(draft)
    _complete_norm(draft)
    complete_schedule(draft)
    _complete_sharing(draft)
    _name_run(draft)
    factor, scale = draft.get("checkpoint", "checkpoint_factor"), None
    if (node := draft.get("checkpoint", "checkpoint_scale")) is not None:
        scale = str(node.value).lower()
    if factor is not None and factor.value is not None and scale != "log":
        del draft.groups["checkpoint"]["checkpoint_factor"]
        draft.put("checkpoint", "save_interval", factor)
    logging = draft.groups.setdefault("logging", {})
    folder = logging.get("tensorboard_dir")
    if folder is not None and folder.value is not None and "use_tensorboard" not in logging:
        logging["use_tensorboard"] = replace(folder, value=True)
    for key in ("use_wandb", "use_comet"):
        if key in logging and logging[key].value is None:
            del logging[key]
    kind, merges = draft.get("tokenizer", "tokenizer_type"), draft.get("tokenizer", "merge_file")
    if merges is not None and merges.value is not None and (kind is None or kind.value is None):
        fields = draft.groups["tokenizer"]
        fields["tokenizer_type"] = replace(merges, value="GPT2BPETokenizer")
    options = draft.groups.pop("zero_options", {})
    if options:
        first = next(iter(options.values()))
        draft.put("zero", "options", replace(first, name="zero_optimization", value=dict(options)))


def _name_run(draft: Draft) -> None:
    """Append ``run_name`` to ``run_dir``, unless the command line names the folder whole."""
    name, folder = draft.get("checkpoint", "run_name"), draft.get("checkpoint", "run_dir")
    if name is None or name.value is None or not is_run_name(name.value):
        return  # what is no name is reported with the other fields
    del draft.groups["checkpoint"]["run_name"]
    if folder is not None and folder.mark.override and not name.mark.override:
        return
    given = CheckpointConfig.model_fields["run_dir"].default
    if folder is not None and folder.value is not None:
        given = folder.value
    if isinstance(given, str) and given:
        path = f"{given.rstrip('/')}-{name.value}"
        draft.groups["checkpoint"]["run_dir"] = replace(folder or name, value=path)


def _complete_launcher(draft: Draft) -> None:
    """Let ``deepspeed_mpi: true`` and the like name the launcher."""
    for key, launcher in LAUNCHER_KEYS.items():
        node = draft.groups.get("", {}).pop(key, None)
        if node is None or not isinstance(node.value, bool):
            if node is not None and node.value is not None:
                draft.problems.add(node, "should be true or false")
            continue
        named = draft.get("launch", "launcher")
        same = named is not None and str(named.value).lower() == launcher
        if node.value and not same:
            draft.put("launch", "launcher", replace(node, value=launcher))


def _complete_activation(draft: Draft) -> None:
    """``bias_gelu_fusion`` computes the tanh approximation of gelu, and nothing else."""
    fusion = draft.groups.get("", {}).pop("bias_gelu_fusion", None)
    if fusion is None or fusion.value is None or fusion.value is False:
        return
    if fusion.value is not True:
        draft.problems.add(fusion, "should be true or false")
        return
    activation = draft.get("model", "activation")
    if activation is None or str(activation.value).lower() == "gelu":
        draft.groups.setdefault("model", {})["activation"] = replace(fusion, value="gelu_tanh")
    elif str(activation.value).lower() != "gelu_tanh":
        draft.ignore(fusion.name, "belongs to the activation gelu")


def _complete_width(draft: Draft) -> None:
    """Read the width of a gated MLP as GPT-NeoX counts it: three times its own.

    A value above six times ``hidden_size`` can be meant no other way; it is divided by three and
    rounded up as theirs is. Smaller ones are the width itself.
    """
    width, hidden = draft.get("model", "intermediate_size"), draft.get("model", "hidden_size")
    activation, multiple = draft.get("model", "activation"), draft.get("model", "mlp_multiple_of")
    values = [node.value for node in (width, hidden) if node is not None]
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    if len(whole) < 2 or activation is None or str(activation.value).lower() not in GATED:
        return
    assert width is not None
    step = GATED_MULTIPLE if multiple is None else multiple.value
    if whole[0] <= 6 * whole[1] or not isinstance(step, int) or step < 1:
        return
    own = -(-(whole[0] // 3) // step) * step
    draft.groups["model"]["intermediate_size"] = replace(width, value=own)
    draft.ignore(width.name, f"{whole[0]} is three times the width, as in GPT-NeoX: it is {own}")


def _complete_norm(draft: Draft) -> None:
    """Read the names of TransformerEngine's norms, and note what belongs to another norm."""
    norm = draft.get("model", "norm")
    name = "layernorm" if norm is None else str(norm.value).lower()
    if norm is not None and name in ("te_layernorm", "te_rmsnorm"):
        name = name.removeprefix("te_")
        draft.groups["model"]["norm"] = replace(norm, value=name)
    bias = draft.get("model", "use_bias_in_norms")
    if bias is not None and bias.value is True and name != "layernorm":
        draft.ignore(bias.name, f"{name} has no bias")
    tied, side = draft.get("model", "gpt_j_tied"), draft.get("model", "gpt_j_residual")
    if tied is not None and tied.value is True and (side is None or not side.value):
        draft.ignore(tied.name, "belongs to gpt_j_residual: true")


def _complete_sharing(draft: Draft) -> None:
    """Check ``num_unique_layers`` as GPT-NeoX does, which does no more with it."""
    node = draft.groups.get("", {}).pop("num_unique_layers", None)
    if node is None or node.value is None:
        return
    layers = draft.get("model", "num_layers")
    count = None if layers is None else layers.value
    if not isinstance(node.value, int) or isinstance(node.value, bool) or node.value < 1:
        draft.problems.add(node, "should be a whole number of at least 1")
    elif isinstance(count, int) and count % node.value:
        draft.problems.add(node, f"does not divide num_layers ({count})")
    else:
        draft.ignore(
            node.name, "layers do not share weights; GPT-NeoX too only checks it against num_layers"
        )
