"""What is trained to compare layouts: layouts, scenarios, and the reference run of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import runs
from support.reference import Reference, open_parts
from support.rules import Doge, Doremi, Fixed, NaiveValidation, Odm, Rule, piecewise_linear
from support.store import write_store

from megatron.config import Config, load_config
from megatron.model.gpt import GPT
from megatron.parallel.layout import Layout
from megatron.parallel.partition import Partition
from megatron.parallel.topology import Topology
from megatron.training.check import preflight

STEPS = 50
"""What the schedules are cut for; a shorter run is the beginning of this one."""
REPLAYED = 8
"""Steps of the ledger that is replayed."""
LOOKED_AT = (0, 10, STEPS)
"""Steps after which validation losses and weights are compared."""
TOKEN_WEIGHTS = np.array([0.25, 1.0, 3.0])
VOCABULARY = 123
_VALIDATED = 7  # windows per domain: not a multiple of any layout's rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layout and a ZeRO stage, and whether tensor ranks divide the sequence too."""

    tensor: int = 1
    pipe: int = 1
    data: int = 1
    zero: int = 1
    sequence: bool = False

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipe * self.data

    @property
    def layout(self) -> Layout:
        """The arrangement of the ranks."""
        return Layout(world_size=self.world, tensor_size=self.tensor, pipe_size=self.pipe)

    @property
    def keys(self) -> dict[str, Any]:
        """What a configuration says of it."""
        return {
            "num_gpus": self.world,
            "model_parallel_size": self.tensor,
            "pipe_parallel_size": self.pipe,
            "sequence_parallel": self.sequence,
            "zero_optimization": {"stage": self.zero},
        }

    def __str__(self) -> str:
        tensor = f"tp{self.tensor}{'s' if self.sequence else ''}"
        return f"{tensor}-pp{self.pipe}-dp{self.data}-zero{self.zero}"


_SIZES = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (2, 2, 2),
)
SHAPES = [
    Shape(tensor=tensor, pipe=pipe, data=data, zero=zero, sequence=sequence)
    for tensor, pipe, data in _SIZES
    for zero in ((1, 2, 3) if pipe == 1 else (1,))
    for sequence in ((False, True) if tensor > 1 else (False,))
]
"""Every layout of at most two ranks an axis, with all that it allows."""

NEOX = {"gpt_j_residual": True, "rotary_pct": 0.5, "make_vocab_size_divisible_by": 50}
SEQUENTIAL = {"rotary_pct": 1.0, "no_weight_tying": True, "make_vocab_size_divisible_by": 40}
LLAMA = {
    "rotary_pct": 1.0,
    "no_weight_tying": True,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "intermediate_size": 48,
    "num_kv_heads": 2,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    # Of two tensor ranks the second holds nothing but padding.
    "make_vocab_size_divisible_by": 128,
}
GIVEN = {"walk": 0.2, "drift": 0.5, "noise": 0.3}
LATER = {"walk": 0.6, "drift": 0.1, "noise": 0.3}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is trained and how it is mixed, whatever the layout.

    Attributes:
        name: of the scenario.
        changes: keys of the configuration that are the scenario's own.
        mixing: the block ``mixing``; "replay" stands for the ledger of another scenario.
        mixture: the same rule in the reference.
        weighted: whether the mixer also weighs the domains' losses.
        masked: whether the loss is masked behind ends of documents.
        replays: scenario whose ledger is replayed.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    mixing: Mapping[str, Any] = field(default_factory=dict)
    mixture: Callable[[], Rule]
    weighted: bool = False
    masked: bool = False
    replays: str | None = None


def _given() -> np.ndarray:
    weights = np.array(list(GIVEN.values()))
    return weights / weights.sum()


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="odm",
            changes=NEOX,
            mixing={"method": "odm", "draw": "multinomial", "weights": "uniform"},
            mixture=lambda: Odm(np.ones(3)),
        ),
        Scenario(
            name="odm-apportion",
            changes={**LLAMA, "pipe_partition_method": "parameters"},
            mixing={
                "method": "odm",
                "draw": "apportion",
                "weights": GIVEN,
                "smoothing_factor": 0.5,
                "lag": 1,
            },
            mixture=lambda: Odm(_given(), alpha=0.5),
            masked=True,
        ),
        Scenario(
            name="static",
            changes={
                **SEQUENTIAL,
                "no_weight_tying": False,
                "pipe_partition_method": "uniform",
                "checkpoint_activations": True,
                "checkpoint_num_layers": 2,
            },
            mixing={"method": "static", "draw": "apportion", "weights": GIVEN},
            mixture=lambda: Fixed(lambda step: _given()),
            weighted=True,
        ),
        Scenario(
            name="schedule",
            changes={**SEQUENTIAL, "pipe_partition_method": "type:transformer|final"},
            mixing={
                "method": "schedule",
                "draw": "multinomial",
                "interpolation": "linear",
                "stages": [
                    {"weights": GIVEN, "steps": 6},
                    {"weights": LATER, "steps": 20},
                    {"weights": "uniform"},
                ],
            },
            mixture=lambda: Fixed(
                piecewise_linear([1, 7, 27], [[*GIVEN.values()], [*LATER.values()], [1, 1, 1]])
            ),
            masked=True,
        ),
        Scenario(
            name="replay",
            changes={**LLAMA, "no_weight_tying": False, "pipe_partition_method": "uniform"},
            mixing={"method": "schedule", "draw": "apportion"},
            mixture=lambda: Fixed(lambda step: _given()),
            weighted=True,
            replays="odm",
        ),
        # One method of each further kind of signal: held-out losses, a reference, gradients.
        Scenario(
            name="held-out",
            changes=SEQUENTIAL,
            mixing={
                "method": "naive_validation",
                "draw": "multinomial",
                "weights": GIVEN,
                "update_every": 2,
                "validation_samples": 5,
            },
            mixture=lambda: NaiveValidation(_given(), every=2, samples=5),
            masked=True,
        ),
        Scenario(
            name="excess",
            changes={**NEOX, "epoch_offset": False},
            mixing={
                "method": "doremi",
                "draw": "apportion",
                "weights": GIVEN,
                "reference_losses": "store",
                "eta": 0.5,
                "smoothing": 1e-3,
            },
            mixture=lambda: Doremi(_given(), eta=0.5, smoothing=1e-3, vocabulary=VOCABULARY),
            masked=True,
        ),
        Scenario(
            name="gradients",
            changes=LLAMA,
            mixing={
                "method": "doge",
                "draw": "apportion",
                "weights": GIVEN,
                "target": "all",
                "mu": 0.02,
            },
            mixture=lambda: Doge(_given(), mu=0.02, clip=5.0, bound=0.7),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a rank does with a configuration.

    Attributes:
        steps: to train.
        weighted: let the mixer weigh losses too.
        validate: steps after which the validation sets are measured.
        keep: steps after which the weights are kept.
    """

    steps: int = 10
    weighted: bool = False
    validate: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()


class Case:
    """A scenario with its data and its reference run, ready to be trained in any layout.

    Args:
        scenario: what is trained.
        folder: holds ``data``; takes the configurations.
        replayed: the case whose first steps are replayed, where the scenario says so.
        changes: further keys of the configuration.
    """

    def __init__(
        self, scenario: Scenario, folder: Path, replayed: Case | None = None, **changes: Any
    ) -> None:
        self.scenario, self.folder = scenario, folder
        mixing, mixture = dict(scenario.mixing), scenario.mixture()
        if replayed is not None:
            # The recorded distributions decide, to the bit; the last one holds from its end on.
            mixing["replay"] = str(folder / f"{scenario.name}.jsonl")
            rows = [np.array(record["weights"]) for record in replayed.records(REPLAYED)[:REPLAYED]]
            mixture = Fixed(lambda step: rows[min(step, REPLAYED) - 1])
            _write_ledger(Path(mixing["replay"]), rows)
        if "reference_losses" in mixing:
            mixing["reference_losses"] = str(folder / "store")
        self.content = {**self._content(mixing), **changes}
        self._mixture = mixture
        self._records: list[dict[str, Any]] = []
        self._valid: dict[int, np.ndarray] = {}
        self._weights: dict[int, dict[str, np.ndarray]] = {}

    def _content(self, mixing: Mapping[str, Any]) -> dict[str, Any]:
        return runs.config(
            self.folder / "data",
            self.folder / "run",
            **{
                "num_layers": 4,
                "num_attention_heads": 4,
                "vocab_size": VOCABULARY,
                "seed": 1234,
                "train_iters": STEPS,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "weight_decay": 0.1,
                "gradient_clipping": 0.7,
                "warmup": 0.1,
                "lr_decay_style": "cosine",
                "min_lr": 1e-3,
                "max_validation_samples_per_dataset": _VALIDATED,
                # A large eps keeps Adam from blowing a gradient of rounding's size up to a step.
                "optimizer": {
                    "type": "Adam",
                    "params": {"lr": 3e-2, "betas": [0.9, 0.95], "eps": 1e-2},
                },
                "eod_mask_loss": self.scenario.masked,
                "mixing": mixing,
                **self.scenario.changes,
            },
        )

    def file(self, shape: Shape, **changes: Any) -> Path:
        """Write the configuration of one layout."""
        self.make_store()
        text = json.dumps({str(shape): changes}, sort_keys=True, default=str)
        tag = hashlib.sha256(text.encode()).hexdigest()[:8]
        path = self.folder / f"{self.scenario.name}-{shape}-{tag}.yml"
        return runs.write_config(path, {**self.content, **shape.keys, **changes})

    @property
    def order(self) -> Order:
        """How ranks are told to run it."""
        return Order(weighted=self.scenario.weighted and self.scenario.replays is None)

    def cuts(self, layout: Layout) -> dict[str, Partition | None]:
        """Return how a layout's tensor ranks divide every parameter."""
        model = self._model(Topology(layout=layout, rank=0), device="meta")
        return {name: value.partition for name, value in model.named_parameters()}

    @cached_property
    def _config(self) -> Config:
        checked = preflight(load_config([str(self.file(Shape()))]), world_size=1, gpus=0)
        checked.domains.close()
        return checked.config

    def _model(self, topology: Topology, device: str) -> GPT:
        seed = self._config.training.seed
        return GPT(self._config.model, topology, seed=seed, device=device)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The initial weights by name, without padding."""
        model = self._model(Topology.single(), device="cpu")
        return {
            name: value.detach() if value.partition is None else value.partition.unpad(value.data)
            for name, value in model.named_parameters()
        }

    @cached_property
    def _reference(self) -> Reference:
        weighed = loss_weights if self.scenario.weighted else None
        if self.scenario.replays is not None:
            weighed = _replayed_loss_weights
        return Reference(
            self.content,
            self.weights,
            self._mixture,
            loss_weights=weighed,
            eod=runs.EOD if self.scenario.masked else None,
        )

    def make_store(self) -> None:
        """Write the losses that the scenario compares with, where it does."""
        folder = self.content["mixing"].get("reference_losses")
        if folder is not None and not Path(folder).exists():
            domains = open_parts(self.content, "train")
            write_store(Path(folder), domains, split=self.content["split"], vocab_size=VOCABULARY)

    def records(self, steps: int) -> list[dict[str, Any]]:
        """Return the reference's ledger of at least so many steps."""
        if not self._weights:
            self._look(0)
        for step in range(len(self._records) + 1, steps + 1):
            self._records.append(self._reference.step(step))
            self._look(step)
        return self._records

    def _look(self, step: int) -> None:
        if step in LOOKED_AT:
            self._valid[step] = self._reference.validation(_VALIDATED)
            self._weights[step] = {
                name: value.detach().numpy().copy()
                for name, value in self._reference.weights.items()
            }

    def valid(self, step: int) -> np.ndarray:
        """Return the reference's validation losses [K] after a step of ``LOOKED_AT``."""
        self.records(step)
        return self._valid[step]

    def weights_after(self, step: int) -> dict[str, np.ndarray]:
        """Return the reference's weights after a step of ``LOOKED_AT``."""
        self.records(step)
        return self._weights[step]


def _write_ledger(path: Path, rows: Sequence[np.ndarray]) -> None:
    lines = [
        json.dumps(
            {
                "step": step,
                "probability": dict(zip(runs.DOMAINS, row.tolist(), strict=True)),
                "loss_weight": dict(zip(runs.DOMAINS, loss_weights(step).tolist(), strict=True)),
            }
        )
        for step, row in enumerate(rows, start=1)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def loss_weights(step: int) -> np.ndarray:
    """Weigh the domains' tokens, differently at every step."""
    return np.roll(TOKEN_WEIGHTS, step) * step


def _replayed_loss_weights(step: int) -> np.ndarray:
    return loss_weights(min(step, REPLAYED))
