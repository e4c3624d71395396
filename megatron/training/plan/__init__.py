"""What a run would need on a layout of any size, worked out from integers.  No torch in here."""

from megatron.training.plan.assumptions import Assumptions
from megatron.training.plan.compute import Plan, StagePlan, checkpoint_bytes, make_plan

__all__ = ["Assumptions", "Plan", "StagePlan", "checkpoint_bytes", "make_plan"]
