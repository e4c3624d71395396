"""How long a run is and where its learning rate ends, by other keys than ours."""

from __future__ import annotations

from dataclasses import replace

from megatron.config.draft import Draft
from megatron.config.run import STEPS_OF_EPOCHS


def complete_schedule(draft: Draft) -> None:
    """Fill in the end of the schedule and of the run, and note what a scheduler decides alone."""
    _complete_epochs(draft)
    _complete_end(draft)
    block = draft.get("schedule", "scheduler")
    if block is not None and block.value is not None:
        others = "lr_decay_style, lr_decay_iters, warmup, min_lr"
        draft.ignore(others, "the block scheduler decides the learning rate")


def _complete_end(draft: Draft) -> None:
    """Read ``decay_lr_to``, the learning rate at the end as a share of the peak."""
    share = draft.groups.get("", {}).pop("decay_lr_to", None)
    if share is None or share.value is None:
        return
    peak = draft.get("optimizer", "lr")
    if isinstance(share.value, bool) or not isinstance(share.value, int | float):
        draft.problems.add(share, "should be a number from 0 to 1")
    elif not 0 <= share.value <= 1:
        draft.problems.add(share, "should be from 0 to 1, a share of the peak learning rate")
    elif peak is not None and isinstance(peak.value, int | float):
        # Written as a decimal would be: 0.1 × 3e-4 is 3e-5.
        end = float(f"{share.value * peak.value:.12g}")
        draft.put("schedule", "min_lr", replace(share, value=end))


def _complete_epochs(draft: Draft) -> None:
    """Leave the number of steps open under ``train_epochs``, until the data has been counted."""
    training = draft.groups.setdefault("training", {})
    epochs, steps = training.get("train_epochs"), training.get("train_iters")
    if epochs is not None and epochs.value is not None and (steps is None or steps.value is None):
        training["train_iters"] = replace(epochs, value=STEPS_OF_EPOCHS)
