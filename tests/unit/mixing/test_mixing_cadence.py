"""The ready configurations update often enough to be seen in a quickstart, whatever the method.

The mixers are built from the configurations as a run builds them and driven over the
quickstart's steps with made-up losses; nothing is trained.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.mixing import with_signals
from support.source import ROOT

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.config import Config, load_config, resolve_batch

FIXED = {"static", "average_of_ledger"}
"""The methods that never update."""


def quickstart(method: str, folder: Path) -> Config:
    """Read the quickstart with a ready mixing file, the products of a quickstart in ``folder``."""
    plain = load_config(["local/quickstart", f"mixing/{method}"], conf_dir=str(ROOT / "configs"))
    mixing = plain.mixing
    text = json.dumps(mixing.options).replace("runs/quickstart", str(folder))
    kept = mixing.model_copy(update={"options": json.loads(text)})
    return plain.model_copy(update={"mixing": kept})


def make_products(folder: Path, names: list[str], steps: int) -> None:
    """Write the records of a run whose mixture moved."""
    random = np.random.default_rng(0)
    rows = [dict(zip(names, p.tolist(), strict=True)) for p in random.dirichlet(np.ones(7), steps)]
    (folder / "mixture.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "probability": row}) + "\n"
            for step, row in enumerate(rows, start=1)
        )
    )
    losses = dict(zip(names, [1.0] * len(names), strict=True))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "valid_loss": losses}) + "\n")


def drive(config: Config) -> tuple[list[int], list[bool]]:
    """Return the steps whose mixture or loss weights changed, and whether each was a probe's."""
    steps, names = config.training.train_iters, list(config.domains)
    total = resolve_batch(config.batch, config.launch.num_gpus or 1)[2]
    context = RunContext(
        total_steps=steps,
        tokens_per_step=total * config.model.context_length,
        samples_per_step=total,
        draws_per_step=total,
        samples_per_epoch=(1e4,) * len(names),
        vocab_size=4096,
        count_losses=np.zeros_like,
    )
    mixer = build_mixer(
        config.mixing.method,
        domains=names,
        weights=np.arange(1.0, len(names) + 1),
        context=context,
        **config.mixing.options,
    )
    rates = np.linspace(0.1, 0.4, len(names))
    changed, probing = [], []
    before: list[Any] | None = None
    for step in range(1, steps + 1):
        losses = 2.0 + 5.0 / step**rates
        decision = mixer.decide(step=step)
        if decision.validate:
            mixer.observe(Observation(step - 1, valid_loss=losses + 0.1))
            decision = mixer.decide(step=step)
        counts = np.full(len(names), 512.0)
        seen = with_signals(Observation(step, loss_sum=losses * counts, token_count=counts))
        if decision.measure:
            decision = mixer.foresee(seen)
        probing.append(decision.probe is not None)
        if decision.probe is None:
            given = decision.loss_weights
            now = [
                decision.sampling_weights.tolist(),
                None if given is None else given.tolist(),
            ]
            if before is not None and now != before:
                changed.append(step)
            before = now
        mixer.observe(seen)
    return changed, probing


@pytest.mark.parametrize("method", available_methods())
def test_its_cadence_fits_the_quickstart(method: str, tmp_path: Path) -> None:
    config = quickstart(method, tmp_path)
    assert config.training.train_iters == 200
    make_products(tmp_path, list(config.domains), config.training.train_iters)
    changed, probing = drive(config)
    if method in FIXED:
        assert not changed
    else:
        assert len(changed) >= 3, changed
    if method == "aioli":
        left = sum(a and not b for a, b in itertools.pairwise(probing))
        assert left >= 2


def test_the_paper_settings_lie_beside_those_that_differ() -> None:
    """A ready file that was made shorter for the quickstart has the paper's cadence beside it."""
    folder = ROOT / "configs" / "mixing"
    for method in ("ado", "aioli", "doge", "doremi", "dynamic_loading", "skillit"):
        assert (folder / f"{method}_paper.yml").is_file(), method
