"""Runs of the same configuration in many layouts, and how far they are from the reference."""

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
from support.reference import Fixed, Odm, Reference, piecewise_linear
from support.training import Harness

from megatron.config import load_config
from megatron.mixing.base import Decision
from megatron.model.gpt import GPT
from megatron.parallel.layout import Layout
from megatron.parallel.partition import Partition
from megatron.parallel.topology import Topology
from megatron.training.check import preflight
from megatron.training.loop import Ending

STEPS = 50
"""What the schedules are cut for; a shorter run is the beginning of this one."""
TOKEN_WEIGHTS = np.array([0.25, 1.0, 3.0])
VOCABULARY = 123
_VALIDATED = 7  # windows per domain: not a multiple of any layout's rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layout and a ZeRO stage."""

    tensor: int = 1
    pipe: int = 1
    data: int = 1
    zero: int = 1

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
            "zero_optimization": {"stage": self.zero},
        }

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.pipe}-dp{self.data}-zero{self.zero}"


SHAPES = [
    Shape(tensor=tensor, pipe=pipe, data=data, zero=zero)
    for tensor, pipe, data in (
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (2, 2, 1),
        (2, 1, 2),
        (1, 2, 2),
        (2, 2, 2),
    )
    for zero in ((1, 2, 3) if pipe == 1 else (1,))
]
"""Every layout of at most two ranks an axis, with every ZeRO stage that it allows."""

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
    mixture: Callable[[], Fixed | Odm]
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
    )
}


class Case:
    """A scenario with its data and its reference run, ready to be trained in any layout."""

    def __init__(self, scenario: Scenario, folder: Path, replayed: Case | None = None) -> None:
        self.scenario, self.folder = scenario, folder
        mixing, self._mixture = dict(scenario.mixing), scenario.mixture()
        if replayed is not None:
            # The recorded distributions and loss weights decide, to the bit.
            mixing["replay"] = str(folder / f"{scenario.name}.jsonl")
            rows = [np.array(record["weights"]) for record in replayed.records]
            self._mixture = Fixed(lambda step: rows[step - 1])
            _write_ledger(Path(mixing["replay"]), rows)
        self.content = self._content(mixing)

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

    def _model(self, topology: Topology, device: str) -> GPT:
        checked = preflight(load_config([str(self.file(Shape()))]), world_size=1, gpus=0)
        checked.domains.close()
        seed = checked.config.training.seed
        return GPT(checked.config.model, topology, seed=seed, device=device)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The initial weights by name, without padding."""
        model = self._model(Topology.single(), device="cpu")
        return {
            name: value.detach() if value.partition is None else value.partition.unpad(value.data)
            for name, value in model.named_parameters()
        }

    @cached_property
    def _run(self) -> dict[str, Any]:
        reference = Reference(
            self.content,
            self.weights,
            self._mixture,
            loss_weights=loss_weights if self.scenario.weighted else None,
            eod=runs.EOD if self.scenario.masked else None,
        )
        records, valid = [], {0: reference.validation(_VALIDATED)}
        for step in range(1, STEPS + 1):
            records.append(reference.step(step))
            if step in (10, STEPS):
                valid[step] = reference.validation(_VALIDATED)
        final = {name: value.detach() for name, value in reference.weights.items()}
        return {"records": records, "valid": valid, "final": final}

    @property
    def records(self) -> list[dict[str, Any]]:
        """The reference's ledger."""
        records: list[dict[str, Any]] = self._run["records"]
        return records

    @property
    def valid(self) -> dict[int, np.ndarray]:
        """The reference's validation losses, by step."""
        valid: dict[int, np.ndarray] = self._run["valid"]
        return valid

    @property
    def final(self) -> dict[str, torch.Tensor]:
        """The reference's weights after the last step."""
        final: dict[str, torch.Tensor] = self._run["final"]
        return final


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


# Inside a rank.


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


class Weighted:
    """A mixer whose decisions weigh the domains' tokens too."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def decide(self, step: int) -> Decision:
        """Decide as the inner mixer does."""
        decision = self._inner.decide(step)
        return Decision(
            sampling_weights=decision.sampling_weights, loss_weights=loss_weights(step)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Ordered(Harness):
    """A harness that measures and keeps what it is told to between steps."""

    def __init__(self, file: Path, order: Order) -> None:
        super().__init__(file)
        self.order = order
        self.valid: dict[int, list[float]] = {}
        self.kept: dict[int, dict[str, np.ndarray]] = {}
        if order.weighted:
            self.parts.planner._mixer = Weighted(self.parts.planner._mixer)

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Measure and keep what is due."""
        if step in self.order.validate:
            self.valid[step] = self.parts.validation.measure(self.parts.engine).tolist()
        if step in self.order.keep:
            self.kept[step] = self.parameters()


def train(rank: int, world_size: int, file: Path, order: Order) -> dict[str, Any]:
    """Train as ordered, in one rank; return what it saw."""
    harness = Ordered(file, order)
    try:
        harness.after_step(0, None)
        harness.run(order.steps)
        return {
            "ledger": harness.ledger,
            "state": harness.parts.planner.state_dict(),
            "valid": harness.valid,
            "kept": harness.kept,
        }
    finally:
        harness.close()


# What came of it.


def whole(
    kept: Sequence[Mapping[str, np.ndarray]], cuts: Mapping[str, Partition | None], layout: Layout
) -> dict[str, np.ndarray]:
    """Put the ranks' parts together; what several ranks hold has to be the same to the bit.

    Args:
        kept: by rank, the parts by name.
        cuts: how the tensor ranks divide each parameter.
        layout: of the ranks.
    """
    found: dict[str, dict[tuple[int, int], list[np.ndarray]]] = {}
    for rank, parts in enumerate(kept):  # tensor ranks follow each other
        place = layout.coordinates(rank)
        for name, value in parts.items():
            found.setdefault(name, {}).setdefault((place.pipe, place.data), []).append(value)
    result: dict[str, np.ndarray] = {}
    for name, groups in found.items():
        copies = [_joined(group, cuts[name]) for group in groups.values()]
        for copy in copies[1:]:
            assert np.array_equal(copies[0], copy), f"{name} differs between data ranks or stages"
        result[name] = copies[0]
    return result


def _joined(parts: list[np.ndarray], cut: Partition | None) -> np.ndarray:
    if cut is None:
        for part in parts[1:]:
            assert np.array_equal(parts[0], part), "a replicated parameter differs"
        return parts[0]
    padded = cut.join([torch.from_numpy(part) for part in parts])
    extra = padded[cut.padded_from :] if cut.padded_from is not None else padded[:0]
    assert not extra.any(), "padding is not zero"
    return cut.unpad(padded).numpy()


def allowed(step: int) -> float:
    """Relative difference that fp32 may show after so many steps."""
    if step <= 1:
        return 1e-6
    return 1e-5 if step <= 10 else 1e-4


def relative(one: Any, other: Any) -> float:
    """Return the largest relative difference; what is NaN in one has to be NaN in both."""
    first, second = np.atleast_1d(np.array(one, float)), np.atleast_1d(np.array(other, float))
    assert np.array_equal(np.isnan(first), np.isnan(second)), f"{first} and {second}"
    there = ~np.isnan(first)
    if not there.any():
        return 0.0
    return float((np.abs(first - second) / np.abs(second))[there].max())


COMPARED = ("domain_loss", "grad_norm", "weights")


def assert_ranks_agree(results: Sequence[Mapping[str, Any]]) -> None:
    """Check that every rank saw the same ledger and holds the same state, to the bit."""
    for name in ("ledger", "state", "valid"):
        texts = [json.dumps(result[name], sort_keys=True) for result in results]
        assert len(set(texts)) == 1, f"the ranks differ in {name}"


def assert_equal(
    ledger: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    bound: Callable[[int], float] = allowed,
    compared: Sequence[str] = COMPARED,
) -> dict[str, dict[int, float]]:
    """Check a run's ledger against the reference's.

    Returns:
        The worst relative difference of each quantity at step 1, and up to 10 and all steps.
    """
    worst = {name: {1: 0.0, 10: 0.0, STEPS: 0.0} for name in compared}
    for own, other in zip(ledger, records, strict=False):
        step = own["step"]
        assert step == other["step"]
        assert own["samples"] == other["samples"], f"step {step} drew other samples"
        assert own["tokens"] == other["tokens"], f"step {step} counts other tokens"
        assert own["lr"] == _close(other["lr"]), f"step {step} has another learning rate"
        assert not own["skipped"]
        for name in compared:
            difference = relative(own[name], other[name])
            assert difference <= bound(step), (
                f"step {step}: {name} differs by {difference:.2g}: {own[name]}, {other[name]}"
            )
            for until in worst[name]:
                if step <= until:
                    worst[name][until] = max(worst[name][until], difference)
    return worst


def _close(value: float) -> Any:
    import pytest

    return pytest.approx(value, rel=1e-12)
