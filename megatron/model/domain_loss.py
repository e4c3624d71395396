"""The loss of a micro-batch whose samples come from several domains."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.model.embedding import Output
from megatron.parallel.cross_entropy import token_cross_entropy, weighted_cross_entropy
from megatron.parallel.scratch import Scratch
from megatron.parallel.sequence import enter_shared
from megatron.parallel.topology import Topology

Labels = tuple[torch.Tensor, ...]
"""targets int64 [B, S], loss_mask float [B, S], domain_ids int64 [B], sample_weight float [B] and,
where losses are compared with a reference model's, its losses float [B, S]."""

Observer = Callable[..., None]
"""Takes loss_sum float64 [B] (nats), token_count float64 [B], domain_ids int64 [B] and, with a
reference, the sums of max(loss - reference, 0) and of the reference's losses, float64 [B] each."""


class DomainLoss:
    """Σ_b sample_weight[b] · Σ_s loss_mask[b, s] · ℓ[b, s], told to an observer per sample.

    Sample weights carry everything that turns the sum into the mean over the global batch,
    so no count and no division is left to do here, and nothing waits for the device.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        topology: Topology | None = None,
        chunk_tokens: int = 1024,
        observe: Observer | None = None,
        half: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        """Make the loss.

        Args:
            vocab_size: number of token ids; the output weight's rows beyond are padding, which
                no probability goes to.
            topology: whose tensor ranks divide the vocabulary; None for one process.
            chunk_tokens: tokens whose logits exist at the same time.
            observe: called once per forward with each sample's own sums, detached.
            half: take the softmax in the logits' own type instead of float32.
            z_loss: factor of the z-loss that is trained on beside, see
                :func:`megatron.parallel.cross_entropy.weighted_cross_entropy`.
        """
        self.vocab_size = vocab_size
        self.topology = topology or Topology.single()
        self.chunk_tokens = chunk_tokens
        self.observe = observe
        self.half, self.z_loss = half, z_loss
        self._scratch = Scratch()

    def __call__(self, output: Output, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the micro-batch's loss (float32 scalar).

        Args:
            output: hidden states ``[B, S, H]`` (or this rank's part of the sequence where it
                is divided), this rank's rows of the output weight and perhaps a further loss.
            labels: targets, loss mask, domain ids, sample weights, perhaps reference losses
                (see ``Labels``).
        """
        hidden, weight, *extra = output
        targets, mask, domain_ids, sample_weight, *reference = labels
        mask = mask.float()
        token_weights = mask * sample_weight.float()[:, None]
        loss, losses = weighted_cross_entropy(
            enter_shared(hidden, self.topology).flatten(0, 1),
            weight,
            targets.flatten(),
            token_weights.flatten(),
            vocab_size=self.vocab_size,
            topology=self.topology,
            chunk_tokens=self.chunk_tokens,
            half=self.half,
            z_loss=self.z_loss,
            scratch=self._scratch,
        )
        if self.observe is not None:
            with torch.no_grad():
                losses = losses.view_as(mask)
                # What is masked may hold anything in a reference, NaN too.
                reference = [torch.where(mask > 0, other.float(), 0.0) for other in reference]
                excess = [(losses - other).clamp(min=0.0) for other in reference]
                self.observe(
                    _sums(losses, mask),
                    mask.sum(dim=1, dtype=torch.float64),
                    domain_ids,
                    *(_sums(part, mask) for part in (*excess, *reference)),
                )
        # What balances experts trains the model and is no domain's loss.
        return loss + extra[0].sum() if extra else loss

    def token_losses(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return every token's loss, float32 ``[B, S]`` in nats; no gradient flows.

        Args:
            hidden: see :meth:`__call__`.
            weight: this rank's rows of the output weight.
            targets: int64 ``[B, S]``, of the whole sequence.
        """
        losses = token_cross_entropy(
            enter_shared(hidden, self.topology).flatten(0, 1),
            weight,
            targets.flatten(),
            vocab_size=self.vocab_size,
            topology=self.topology,
            chunk_tokens=self.chunk_tokens,
        )
        return losses.view_as(targets)


def _sums(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row's unmasked losses, float64 [B]."""
    return (losses * mask).sum(dim=1, dtype=torch.float64)
