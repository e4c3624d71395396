"""Training in one process with plain PyTorch: what every layout is held to.

Nothing of neomix computes here.  Taken from it are only the initial weights (by name), the
windows of a domain and the sampler that turns a distribution into samples; the transformer,
the loss, accumulation, clipping, optimizer, schedule and mixing rules are written anew, from
the papers and from METHODS, in the plainest way there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from support.rules import Batch, Rule

from megatron.data.domain import Domain, open_domain
from megatron.data.sampler import Sampler
from megatron.data.validation import ValidationSet

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A GPT in functions of its named weights.

    Attributes:
        layers: number of blocks.
        heads: query heads.
        kv_heads: key and value heads.
        rotated: rotated dimensions of each head.
        parallel: attention and MLP read the same stream.
        tied: the output weight is the embedding.
        rms: RMS norm instead of layer norm.
        gated: SwiGLU instead of GELU.
        vocabulary: token ids; rows beyond are not looked at.
    """

    layers: int
    heads: int
    kv_heads: int
    rotated: int
    parallel: bool
    tied: bool
    rms: bool
    gated: bool
    vocabulary: int

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Transformer:
        """Read a configuration's mapping, in GPT-NeoX's names."""
        heads = content["num_attention_heads"]
        return cls(
            layers=content["num_layers"],
            heads=heads,
            kv_heads=content.get("num_kv_heads", heads),
            rotated=int(content["hidden_size"] // heads * content["rotary_pct"]),
            parallel=content.get("gpt_j_residual", False),
            tied=not content.get("no_weight_tying", False),
            rms=content.get("norm", "layernorm") == "rmsnorm",
            gated=content.get("activation", "gelu") == "swiglu",
            vocabulary=content["vocab_size"],
        )

    def token_losses(
        self, weights: Weights, tokens: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the cross-entropy of every token, [B, S], over the true vocabulary."""
        embedding = weights["tied_modules.embed.word_embeddings.weight" if self.tied else _INPUT]
        x = F.embedding(tokens, embedding)
        for layer in range(self.layers):
            own = _under(weights, f"{layer + 1}.")
            attended = x + self._attention(own, self._norm(own, "input_layernorm", x))
            source = x if self.parallel else attended
            x = attended + self._mlp(own, self._norm(own, "post_attention_layernorm", source))
        x = self._norm(_under(weights, f"{self.layers + 1}."), "norm", x)
        output = embedding if self.tied else weights[f"{self.layers + 2}.final_linear.weight"]
        logits = x @ output[: self.vocabulary].T
        chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
        return torch.logsumexp(logits, dim=-1) - chosen

    def _norm(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.rms:
            scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-8)
            return x * scale * weights[f"{name}.scale"]
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(variance + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def _attention(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        size = hidden // self.heads
        fused = _linear(weights, "attention.query_key_value", x)
        if self.kv_heads == self.heads:
            query, key, value = fused.view(batch, length, self.heads, 3, size).unbind(3)
        else:
            query, key, value = (
                part.view(batch, length, -1, size)
                for part in fused.split([hidden, *2 * [self.kv_heads * size]], dim=-1)
            )
        shared = self.heads // self.kv_heads
        query, key = self._rotate(query), self._rotate(key).repeat_interleave(shared, dim=2)
        value = value.repeat_interleave(shared, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        probability = scores.masked_fill(future, -math.inf).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", probability, value)
        return _linear(weights, "attention.dense", attended.reshape(batch, length, hidden))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turn the pairs (i, i + rotated / 2) of [B, S, heads, size] by position × frequency."""
        half = self.rotated // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = (torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency)[:, None]
        first, second, rest = x.split([half, half, x.shape[-1] - self.rotated], dim=-1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag, rest], dim=-1)

    def _mlp(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        inner = _linear(weights, "mlp.dense_h_to_4h", x)
        if self.gated:
            up, gate = inner.chunk(2, dim=-1)
            inner = up * gate * torch.sigmoid(gate)
        else:
            inner = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
        return _linear(weights, "mlp.dense_4h_to_h", inner)


_INPUT = "0.word_embeddings.weight"


def _under(weights: Weights, prefix: str) -> Weights:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    product = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return product if bias is None else product + bias


# The loop.


class Reference:
    """One run, step by step.

    Args:
        content: the configuration as the layouts get it, in GPT-NeoX's names.
        weights: initial weights by name, without padding.
        mixture: the mixing rule.
        loss_weights: by step, the weight of each domain's tokens [K]; None = 1.
        eod: token after which the loss is masked, or None.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        mixture: Rule,
        *,
        loss_weights: Callable[[int], np.ndarray] | None = None,
        eod: int | None = None,
    ) -> None:
        self.content = content
        self.model = Transformer.of(content)
        self.weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        self.mixture, self.loss_weights, self.eod = mixture, loss_weights, eod
        params = content["optimizer"]["params"]
        matrices = [value for value in self.weights.values() if value.dim() > 1]
        vectors = [value for value in self.weights.values() if value.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": content["weight_decay"]},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=params["lr"],
            betas=tuple(params["betas"]),
            eps=params["eps"],
            foreach=False,
            fused=False,
        )
        self.lag = content["mixing"].get("lag", 0)
        self.ahead: np.ndarray | None = None
        self.names = list(content["domains"])
        self.domains = open_parts(content, "train")
        self.sampler = Sampler(
            self.names,
            self.domains,
            seed=content["seed"],
            global_batch=content["train_batch_size"],
            draw=content["mixing"]["draw"],
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to min_lr, at the rates that GPT-NeoX gives."""
        peak, least = self.content["optimizer"]["params"]["lr"], self.content["min_lr"]
        total = self.content["train_iters"]
        warmup, done = self.content["warmup"] * total, step - 1
        if done <= warmup:
            return float(peak * max(done, 1) / warmup)
        part = (done - warmup) / (total - warmup)
        return float(least + (peak - least) * (1 + math.cos(math.pi * part)) / 2)

    def step(self, step: int) -> dict[str, Any]:
        """Train one step; return what the layouts' ledger holds of it."""
        self.mixture.before(step, self)
        p = self.mixture.decide(step) if self.ahead is None else self.ahead
        if self.lag:
            self.ahead = self.mixture.decide(step + 1)  # before this step is observed
        drawn = self.sampler.plan(step, p).sample_ids(self.names)
        place = np.array([self.names.index(name) for name, _, _ in drawn])
        windows = [
            self.domains[k].sample(epoch, index)
            for k, (_, epoch, index) in zip(place, drawn, strict=True)
        ]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        mask = self._mask(tokens)
        batch = Batch(drawn=drawn, place=place, tokens=tokens, mask=mask)
        factors = self._factors(step, batch)
        weight = mask * torch.from_numpy(factors[place]).float()[:, None]
        losses = self._backward(tokens, weight)
        norm = self._clip()
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        loss, count = self._by_domain(losses, mask, place)
        self.mixture.observe(step, loss, count > 0, p, batch, losses)
        return {
            "step": step,
            "samples": drawn,
            "weights": p.tolist(),
            "loss_weights": (factors / factors.sum()).tolist(),
            "domain_loss": loss.tolist(),
            "tokens": count.tolist(),
            "grad_norm": norm,
            "lr": lr,
        }

    def _factors(self, step: int, batch: Batch) -> np.ndarray:
        """Return the weight of each domain's tokens in the loss, [K]."""
        if self.loss_weights is not None:
            return self.loss_weights(step)
        factors = self.mixture.factors(step, self, batch)
        return np.ones(len(self.names)) if factors is None else factors

    def validation(self, samples: int) -> np.ndarray:
        """Return every domain's mean loss over its first ``samples`` validation windows."""
        result = []
        for domain in open_parts(self.content, "valid"):
            wanted = ValidationSet(domain, samples, seed=self.content["seed"]).windows
            places = [domain.window_at(0, int(window)) for window in wanted]
            length = self.content["seq_length"] + 1
            windows = [reader.read(start, start + length) for reader, start in places]
            tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
            mask = self._mask(tokens)
            with torch.no_grad():
                losses = self.model.token_losses(self.weights, tokens[:, :-1], tokens[:, 1:])
            result.append(float((losses.double() * mask).sum() / mask.sum()))
            domain.close()
        return np.array(result)

    def _mask(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs = tokens[:, :-1]
        return torch.ones(inputs.shape) if self.eod is None else (inputs != self.eod).float()

    def _backward(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of Σ w·ℓ ÷ Σ w, two rows at a time; return all losses."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for rows, own in zip(tokens.split(2), weight.split(2), strict=True):
            losses = self.model.token_losses(self.weights, rows[:, :-1], rows[:, 1:])
            ((losses * own).sum() / weight.sum()).backward()
            parts.append(losses.detach())
        return torch.cat(parts)

    def _clip(self) -> float:
        """Scale all gradients so that their common norm is at most the bound; return it before."""
        gradients = [value.grad for value in self.weights.values()]
        assert all(gradient is not None for gradient in gradients)
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        bound = self.content["gradient_clipping"]
        if norm > bound:
            for gradient in gradients:
                gradient.mul_(bound / (norm + 1e-6))
        return norm

    def _by_domain(
        self, losses: torch.Tensor, mask: torch.Tensor, place: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return each domain's mean loss (NaN = absent) and token count, float64 [K]."""
        mean, count = np.full(len(self.names), np.nan), np.zeros(len(self.names))
        for k in range(len(self.names)):
            own = torch.from_numpy(place == k)
            count[k] = float(mask[own].sum())
            if count[k]:
                mean[k] = float((losses[own].double() * mask[own]).sum()) / count[k]
        return mean, count


def open_parts(content: Mapping[str, Any], part: str) -> list[Domain]:
    """Open every domain of a configuration's mapping on a part of its split."""
    return [
        open_domain(
            name,
            [entry["train"]],
            seq_length=content["seq_length"],
            seed=content["seed"],
            split=(content["split"], part),
            epoch_offset=part == "train" and content.get("epoch_offset", True),
        )
        for name, entry in content["domains"].items()
    ]
