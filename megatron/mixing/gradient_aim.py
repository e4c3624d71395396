"""What a gradient-driven method compares the domains' gradients with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.mixing.observation import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientAim:
    """Asks for gradient alignments of one kind.

    Attributes:
        others: each gradient is compared with those of all other domains of the batch
            (True), or with that of held-out data.
        weights: how much each domain counts, then each that is never trained on, [K + M],
            sum 1.
    """

    others: bool
    weights: FloatArray
