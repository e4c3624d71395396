"""A report validation, as a controller's guardrail is told of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.mixing.observation import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Reported:
    """Held-out losses of the reported validation set, the same windows every time.

    Attributes:
        step: training steps done when it was measured.
        loss: mean nats per token of each domain, then of each objective-only one, [K + M];
            NaN where nothing is held out.
        window_loss: mean nats per token of each held-out window, [N], in an order that
            never changes.
        window_domain: whose window it is, [N], an index into ``loss``.
    """

    step: int
    loss: FloatArray
    window_loss: FloatArray
    window_domain: npt.NDArray[np.int64]
