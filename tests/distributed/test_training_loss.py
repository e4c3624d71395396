"""The loss of a step is the mean over the global batch, however that is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import runs
from support.pool import RankPools
from support.training import Harness

from megatron.mixing.base import Decision
from megatron.model.gpt import GPT, param_groups

STEPS = 5
TOKEN_WEIGHTS = np.array([0.25, 1.0, 3.0])


class Weighted:
    """A mixer whose decisions weigh the domains' tokens."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def decide(self, step: int) -> Decision:
        decision = self._inner.decide(step)
        return Decision(
            sampling_weights=decision.sampling_weights, loss_weights=TOKEN_WEIGHTS * step
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def body(rank: int, world_size: int, file: Path, weighted: bool) -> dict[str, Any]:
    harness = Harness(file)
    if weighted:
        planner = harness.parts.planner
        planner._mixer = Weighted(planner._mixer)
    harness.run(STEPS)
    parameters = harness.parameters()
    harness.close()
    return {"ledger": harness.ledger, "parameters": parameters}


def write(folder: Path, ranks: int, accumulation: int, **changes: Any) -> Path:
    runs.make_data(folder / "data")
    content = runs.config(
        folder / "data",
        folder / "run",
        num_gpus=ranks,
        gradient_accumulation_steps=accumulation,
        train_micro_batch_size_per_gpu=8 // (ranks * accumulation),
        train_iters=STEPS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # A large eps keeps Adam from blowing a gradient of rounding's size up to a full step.
        optimizer={"type": "Adam", "params": {"lr": 3e-2, "betas": [0.9, 0.95], "eps": 1e-2}},
        **changes,
    )
    return runs.write_config(folder / f"config-{ranks}-{accumulation}.yml", content)


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_masks_and_weights_mean_the_same_on_every_layout(
    pools: RankPools, tmp_path: Path, weighted: bool
) -> None:
    layouts = [(1, 1), (1, 4), (2, 1), (2, 4)]
    results = []
    for ranks, accumulation in layouts:
        file = write(tmp_path, ranks, accumulation, eod_mask_loss=True)
        runs.add_sidecars(tmp_path / "data")
        per_rank = pools.call(body, ranks, file, weighted)
        assert all(result["ledger"] == per_rank[0]["ledger"] for result in per_rank)
        results.append(per_rank[0])
    reference = results[0]
    masked = [sum(step["tokens"]) for step in reference["ledger"]]
    assert all(tokens < 8 * 16 for tokens in masked), "no token was masked: the test is void"
    for result in results[1:]:
        for one, other in zip(reference["ledger"], result["ledger"], strict=True):
            assert one["samples"] == other["samples"]
            assert one["tokens"] == other["tokens"]
            np.testing.assert_allclose(one["domain_loss"], other["domain_loss"], rtol=1e-6)
            np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=3e-6)
        for name, value in reference["parameters"].items():
            np.testing.assert_allclose(result["parameters"][name], value, atol=2e-6, err_msg=name)


def test_steps_equal_plain_pytorch(pools: RankPools, tmp_path: Path) -> None:
    """The same batches through torch's own cross-entropy, clipping and AdamW."""
    file = write(tmp_path, 2, 2)
    trained = pools.call(body, 2, file, True)[0]

    harness_config, domains = _open(file)
    model = GPT(harness_config.model, seed=harness_config.training.seed)
    optimizer = torch.optim.AdamW(
        param_groups(model, harness_config.optimizer.weight_decay),
        lr=1.0,
        betas=harness_config.optimizer.betas,
        eps=harness_config.optimizer.eps,
    )
    by_name = {domain.name: domain for domain in domains.train}
    for record in trained["ledger"]:
        windows = [by_name[name].sample(epoch, index) for name, epoch, index in record["samples"]]
        batch = torch.tensor(np.stack(windows).astype(np.int64))
        hidden, weight = model(batch[:, :-1])
        losses = F.cross_entropy(
            (hidden @ weight[:120].T).flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        ).view(8, 16)
        names = [name for name, _, _ in record["samples"]]
        token_weight = torch.tensor(
            [TOKEN_WEIGHTS[domains.names.index(name)] * record["step"] for name in names]
        )
        loss = (losses * token_weight[:, None]).sum() / (token_weight.sum() * 16)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        np.testing.assert_allclose(float(norm), record["grad_norm"], rtol=2e-5)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()
        for place, name in enumerate(domains.names):
            own = torch.tensor([other == name for other in names])
            if own.any():
                np.testing.assert_allclose(
                    losses[own].mean().item(), record["domain_loss"][place], rtol=2e-6
                )
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(
            trained["parameters"][name], parameter.detach().numpy(), atol=5e-6, err_msg=name
        )


def _open(file: Path) -> tuple[Any, Any]:
    import megatron.mixing  # noqa: F401
    from megatron.config import load_config
    from megatron.training.domains import open_domains
    from megatron.training.summary import complete

    config = load_config([str(file)])
    domains = open_domains(
        config.domains,
        split=config.split,
        seq_length=config.model.seq_length,
        seed=config.training.seed,
    )
    return complete(config, domains), domains
