"""Steps of training on the same weights and batches: our engine's, and a plain loop's.

Ours is the engine of a run as a configuration builds it (DeepSpeed, ZeRO 1, per-domain losses
observed).  The plain loop is what its users write: forward, backward, fused AdamW.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import yaml

from benchmarks.support.peers import Peer, saved_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-NeoX": {
        "rotary_pct": 0.25,
        "gpt_j_residual": True,
        "no_weight_tying": True,
    },
    "GPT-2": {"pos_emb": "learned", "gpt_j_residual": False, "no_weight_tying": False},
    "Megatron": {"rotary_pct": 0.25, "gpt_j_residual": False, "no_weight_tying": True},
}
"""Architectures: a peer trains the one that it has, and ours is configured likewise."""
STEPS = 4
"""Steps whose batches differ; after them the first comes again."""
_LR = 3e-4
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the model is, and a step.

    Attributes:
        layers: blocks.
        hidden: width.
        heads: of attention.
        vocabulary: ids.
        sequence: tokens of a row.
        batch: rows of a micro-batch.
        accumulate: micro-batches of a step.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    accumulate: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.accumulate * self.sequence

    def batches(self, device: torch.device) -> torch.Tensor:
        """Return token ids of all steps, [steps, accumulate, batch, sequence + 1]."""
        generator = torch.Generator().manual_seed(0)
        size = (STEPS, self.accumulate, self.batch, self.sequence + 1)
        # A skewed distribution, so that there is something to learn.
        return (self.vocabulary * torch.rand(size, generator=generator) ** 4).long().to(device)


class Ours:
    """Our engine.

    Attributes:
        losses: of the steps so far, nats per token.
    """

    def __init__(
        self, shape: Shape, family: str, dtype: str, device: torch.device, **changes: Any
    ) -> None:
        """Build it.

        Args:
            shape: of the model and a step.
            family: one of :data:`FAMILIES`.
            dtype: "fp32", or "bf16" with master weights in fp32.
            device: where it runs.
            changes: to the configuration.
        """
        from megatron.signals.ledger import Ledger

        self.losses: list[float] = []
        self._ledger = Ledger(1, device)
        self.config, self.engine = _build(
            {**_content(shape, family, dtype), **changes}, self._ledger
        )
        self._batches = [
            [(tokens[:, :-1].contiguous(), _labels(tokens)) for tokens in step]
            for step in shape.batches(device)
        ]

    def step(self) -> None:
        """Train one step."""
        number = len(self.losses)
        self.engine.train_step(number + 1, iter(self._batches[number % STEPS]), lr=_LR)
        self.losses.append(self._ledger.reduce().mean_loss)

    def saved(self) -> int:
        """Return the bytes that a micro-batch keeps for its backward pass, weights left out."""
        tokens, labels = self._batches[0][0]
        model = self.engine.module
        return saved_bytes(model, lambda: model(tokens, labels))

    def close(self) -> None:
        """Let go of what it holds."""
        self.engine._engine.destroy()


class Theirs:
    """A plain loop around a peer's model: autocast in bf16 where it keeps weights in fp32.

    Attributes:
        losses: of the steps so far, nats per token.
    """

    def __init__(
        self, peer: Peer, shape: Shape, dtype: str, device: torch.device, *, compiled: bool
    ) -> None:
        """Take a model.

        Args:
            peer: the model, with our weights.
            shape: of a step.
            dtype: "fp32" or "bf16".
            device: where it runs.
            compiled: run it through ``torch.compile``.
        """
        self.losses: list[float] = []
        self._model = peer.model.to(device)
        forward = torch.compile(peer.logits) if compiled else peer.logits
        self._logits: Callable[[torch.Tensor], torch.Tensor] = forward
        self._autocast = dtype == "bf16" and not peer.holds_half
        own = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if dtype == "bf16" and peer.holds_half:
            masters = [parameter.detach().float().requires_grad_() for parameter in own]
            self._model.bfloat16()
            self._pairs = list(zip(masters, own, strict=True))
            own = masters
        self._optimizer = torch.optim.AdamW(
            own, lr=_LR, betas=_BETAS, eps=1e-8, weight_decay=0.0, fused=True
        )
        self._batches = [
            [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in step]
            for step in shape.batches(device)
        ]

    def step(self) -> None:
        """Train one step."""
        micro_batches = self._batches[len(self.losses) % STEPS]
        losses = []
        for tokens, targets in micro_batches:
            loss = self._loss(tokens, targets) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        self._update()
        self.losses.append(float(torch.stack(losses).sum()))

    def saved(self) -> int:
        """Return the bytes that a micro-batch keeps for its backward pass, weights left out."""
        return saved_bytes(self._model, lambda: self._loss(*self._batches[0][0]))

    def close(self) -> None:
        """Let go of what it holds."""
        self._model.zero_grad()

    def _loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._autocast):
            logits = self._logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def _update(self) -> None:
        for master, parameter in self._pairs:
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        for master, parameter in self._pairs:
            parameter.copy_(master)


def _content(shape: Shape, family: str, dtype: str) -> dict[str, Any]:
    return {
        **FAMILIES[family],
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "seq_length": shape.sequence,
        "max_position_embeddings": shape.sequence,
        "vocab_size": shape.vocabulary,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "train_batch_size": shape.batch * shape.accumulate,
        "train_micro_batch_size_per_gpu": shape.batch,
        "train_iters": 1,
        "num_gpus": 1,
        "gradient_clipping": 0.0,
        "weight_decay": 0.0,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": _LR, "betas": list(_BETAS), "eps": 1e-8},
        },
        "zero_optimization": {"stage": 1},
        "domains": {"one": {"train": "data/one"}},
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }


def _build(content: Mapping[str, Any], ledger: Any) -> tuple[Any, Any]:
    from megatron.config import load_config, resolve_batch
    from megatron.parallel.layout import Layout
    from megatron.parallel.topology import Topology
    from megatron.signals.validation import LossObserver
    from megatron.training.engines import Batch, build_engine

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.yml"
        file.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
        config = load_config([str(file)])
    topology = Topology.create(Layout(world_size=1, tensor_size=1, pipe_size=1), 0)
    batch = Batch(*resolve_batch(config.batch, 1))
    return config, build_engine(config, topology, batch, LossObserver(ledger))


def _labels(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows, length = batch.shape[0], batch.shape[1] - 1
    return (
        batch[:, 1:].contiguous(),
        torch.ones(rows, length, device=batch.device),
        torch.zeros(rows, dtype=torch.int64, device=batch.device),
        torch.full((rows,), 1 / (rows * length), device=batch.device),
    )


class Peaks:
    """The most memory on a GPU that a contestant's turn takes beyond what lies there anyway.

    Attributes:
        bytes: by name; 0 without a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing."""
        self.bytes: dict[str, int] = {}
        self._device = device

    @contextlib.contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Watch one turn."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
        self.bytes[name] = max(self.bytes.get(name, 0), most)
