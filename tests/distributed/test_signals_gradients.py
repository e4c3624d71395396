"""Gradient alignments on every layout that can give them, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import runs
from support.pool import RankPools
from support.scenarios import Shape
from support.training import Harness

from megatron.config import load_config
from megatron.data.plan import Plan
from megatron.data.rows import RowReader
from megatron.mixing.gradient_aim import GradientAim
from megatron.model.gpt import GPT
from megatron.signals.gradients import GradientAlignment, spread
from megatron.signals.ledger import Ledger
from megatron.training.check import preflight

BATCH, LENGTH, VOCABULARY = 8, 16, 120
# The third domain is absent, and the second is on one of two data ranks alone.
DOMAIN = [0, 0, 1, 1, 0, 0, 0, 1]
STEP = 3
WEIGHTS = (0.5, 0.2, 0.3)
CLIP = {True: 2.2, False: 2.65}
"""With tied weights and without, between the norms of the gradients here: some are clipped."""

Form = dict[str, Any]
HELD_OUT: Form = {"others": False, "weights": WEIGHTS, "slots": [0, 1, 2]}
OTHERS: Form = {"others": True, "weights": (1 / 3, 1 / 3, 1 / 3), "slots": [0, 1, 2]}
WEIGHED: Form = {"others": True, "weights": WEIGHTS, "slots": [0, 1, 2]}
GROUPED: Form = {"others": False, "weights": WEIGHTS, "slots": [1, 0, 1]}
FORMS = {"held-out": HELD_OUT, "others": OTHERS, "weighed": WEIGHED, "grouped": GROUPED}


def plan(step: int = STEP) -> Plan:
    sample = np.arange(BATCH, dtype=np.int64) + BATCH * step
    return Plan(
        step=step,
        domain=np.array(DOMAIN, dtype=np.int32),
        epoch=np.zeros(BATCH, dtype=np.int64),
        sample=sample,
        weights=np.full(3, 1 / 3),
    )


class Planned:
    """What a measurer is given."""

    def __init__(self, step: int = STEP) -> None:
        self.plan = plan(step)


def aligner(harness: Harness, form: Form) -> GradientAlignment:
    parts, config = harness.parts, harness.config
    eod = runs.EOD if config.training.eod_mask_loss else None

    def reader(domains: Any) -> RowReader:
        return RowReader(
            domains,
            seq_length=LENGTH,
            rows=config.batch.train_micro_batch_size_per_gpu or BATCH,
            masked_token=eod,
            vocab_size=VOCABULARY,
        )

    return GradientAlignment(
        engine=parts.engine,
        topology=parts.topology,
        observer=parts.engine.module.loss_fn.observe,
        ledger=Ledger(3, harness.runtime.device, contributes=parts.topology.tensor_rank == 0),
        training=reader(harness.domains.train),
        held_out=reader(harness.domains.valid),
        aim=GradientAim(others=form["others"], weights=np.array(form["weights"])),
        slots=np.array(form["slots"]),
        max_norm=config.optimizer.gradient_clipping,
        micro_batch=parts.loader.micro_batch,
        accumulation=parts.loader.accumulation,
        device=harness.runtime.device,
    )


def measure(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    harness = Harness(file)
    try:
        found = {}
        for name, form in FORMS.items():
            found[name] = aligner(harness, form).measure(Planned())
        assert all(p.grad is None for p in harness.parts.engine.module.parameters())
        assert harness.parts.engine.module.training
        # Nothing of it is in the step's own sums.
        totals = harness.parts.ledger.reduce()
        assert not totals.token_count.any()
        return found
    finally:
        harness.close()


def train(rank: int, world_size: int, file: Path, measured: bool) -> Any:
    harness = Harness(file)
    try:
        if measured:
            read, form = harness.parts.reader.read, HELD_OUT
            measurer = aligner(harness, form)

            def read_after_measuring(planned: Any) -> Any:
                measurer.measure(Planned(planned.step))
                return read(planned)

            harness.parts.reader.read = read_after_measuring  # type: ignore[method-assign]
        harness.run(4)
        return harness.ledger, {k: v.tobytes() for k, v in harness.parameters().items()}
    finally:
        harness.close()


def write(folder: Path, shape: Shape, micro: int, name: str = "run", **changes: Any) -> Path:
    runs.make_data(folder / "data")
    if changes.get("eod_mask_loss"):
        runs.add_sidecars(folder / "data")
    content = runs.config(
        folder / "data",
        folder / "run",
        **{
            **shape.keys,
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": CLIP[not changes.get("no_weight_tying")],
            **changes,
        },
    )
    return runs.write_config(folder / f"{name}.yml", content)


class Plain:
    """One process, whole tensors, torch's own cross-entropy."""

    def __init__(self, file: Path) -> None:
        checked = preflight(load_config([str(file)]), world_size=1, gpus=0)
        self.config, self.domains = checked.config, checked.domains
        self.model = GPT(self.config.model, seed=self.config.training.seed).eval()

    def gradient(self, windows: list[Any], weights: list[float]) -> torch.Tensor:
        """The clipped gradient of the sum of mean losses of windows with these weights."""
        batch = torch.tensor(np.stack(windows).astype(np.int64))
        hidden, weight = self.model(batch[:, :-1])
        logits = (hidden @ weight[:VOCABULARY].T).flatten(0, 1)
        losses = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(windows), LENGTH)
        mask = torch.ones_like(losses)
        if self.config.training.eod_mask_loss:
            mask = (batch[:, :-1] != runs.EOD).float()
        loss = torch.zeros(())
        for group in sorted(set(weights)):
            own = torch.tensor([w == group for w in weights])
            loss = loss + group * (losses[own] * mask[own]).sum() / mask[own].sum()
        self.model.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.flatten().double() for p in self.model.parameters()])
        norm = float(flat.norm())
        self.norms = [*getattr(self, "norms", []), norm]
        return flat * min(1.0, self.config.optimizer.gradient_clipping / norm)

    def alignment(self, form: Form) -> np.ndarray:
        batch, slots = plan(), np.array(form["slots"])
        rows = [
            self.domains.train[d].sample(0, int(s))
            for d, s in zip(batch.domain, batch.sample, strict=True)
        ]
        gradients: dict[int, torch.Tensor] = {}
        for slot in range(3):
            own = [row for row, d in zip(rows, DOMAIN, strict=True) if slots[d] == slot]
            if own:
                gradients[slot] = self.gradient(own, [1.0] * len(own))
        count = len(set(form["slots"]))
        mean = sum(float(g.norm()) for g in gradients.values()) / count
        if form["others"]:
            factor = np.array(form["weights"]) * 3
            found = {
                i: float(sum(factor[j] * (gi @ gj) for j, gj in gradients.items() if j != i))
                for i, gi in gradients.items()
            }
        else:
            held = self.held_out(form["weights"])
            found = {i: float(g @ held) for i, g in gradients.items()}
        return np.array([found.get(slots[d], 0.0) / mean for d in range(3)])

    def held_out(self, weights: tuple[float, ...]) -> torch.Tensor:
        windows, shares = [], []
        for index, count in enumerate(spread(np.array(weights), BATCH).tolist()):
            domain = self.domains.valid[index]
            assert domain is not None
            for place in range((STEP - 1) * count, STEP * count):
                epoch, sample = divmod(place, domain.num_windows(0))
                windows.append(domain.sample(epoch, sample))
                shares.append(weights[index])
        return self.gradient(windows, shares)


LAYOUTS = {
    "one": (Shape(), 8, {}),
    "accumulation": (Shape(), 2, {"gradient_accumulation_steps": 4}),
    "data": (Shape(data=2), 2, {"gradient_accumulation_steps": 2}),
    "zero-2": (Shape(data=2, zero=2), 4, {}),
    "tensor": (Shape(tensor=2), 8, {}),
    "sequence": (Shape(tensor=2, sequence=True, zero=2), 4, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize(
    ("masked", "tied"),
    [
        (False, True),
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_alignments_equal_plain_pytorch(
    pools: RankPools, tmp_path: Path, masked: bool, tied: bool
) -> None:
    changes = {
        "eod_mask_loss": masked,
        "no_weight_tying": not tied,
        "checkpoint_activations": masked,
        "make_vocab_size_divisible_by": 50,
    }
    plain = Plain(write(tmp_path, Shape(), 8, "plain", **changes))
    expected = {name: plain.alignment(form) for name, form in FORMS.items()}
    assert min(plain.norms) < CLIP[tied] < max(plain.norms), plain.norms
    assert np.abs(expected["held-out"][:2]).min() > 1e-3
    for layout, (shape, micro, more) in LAYOUTS.items():
        file = write(tmp_path, shape, micro, layout, **changes, **more)
        for found in pools.call(measure, shape.world, file):
            for name, value in expected.items():
                np.testing.assert_allclose(
                    found[name]["gradient_alignment"],
                    value,
                    rtol=1e-5,
                    atol=1e-7,
                    err_msg=f"{layout}, {name}",
                )
            assert found["others"]["gradient_alignment"][2] == 0
            tokens = found["others"]["token_count"]
            assert tokens[2] == 0
            assert masked or tokens.tolist() == [5 * LENGTH, 3 * LENGTH, 0]
            assert found["others"]["loss_sum"][0] / tokens[0] == pytest.approx(4.8, abs=0.3)


@pytest.mark.slow
def test_tensor_and_data_ranks_together(pools: RankPools, tmp_path: Path) -> None:
    plain = Plain(write(tmp_path, Shape(), 8, "plain"))
    shape = Shape(tensor=2, data=2)
    file = write(tmp_path, shape, 2, "four", gradient_accumulation_steps=2)
    for found in pools.call(measure, 4, file):
        for name, form in FORMS.items():
            np.testing.assert_allclose(
                found[name]["gradient_alignment"], plain.alignment(form), rtol=1e-5, atol=1e-7
            )


def test_in_half_precision_it_is_nearly_so(pools: RankPools, tmp_path: Path) -> None:
    plain = Plain(write(tmp_path, Shape(), 8, "plain"))
    expected = plain.alignment(HELD_OUT)
    file = write(tmp_path, Shape(data=2, zero=1), 4, "half", precision="bfloat16")
    for found in pools.call(measure, 2, file):
        np.testing.assert_allclose(
            found["held-out"]["gradient_alignment"], expected, rtol=0.1, atol=0.02
        )


@pytest.mark.parametrize("zero", [1, 2])
def test_measuring_leaves_training_as_it_was(pools: RankPools, tmp_path: Path, zero: int) -> None:
    """The same losses and weights to the bit, dropout included."""
    file = write(tmp_path, Shape(data=2, zero=zero), 2, gradient_accumulation_steps=2)
    with_it = pools.call(train, 2, file, True)
    without = pools.call(train, 2, file, False)
    assert with_it == without
