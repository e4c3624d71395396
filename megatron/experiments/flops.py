"""What runs and methods cost in floating-point operations, by formula.

Multiplications and additions of the matrix products and of attention (two per
multiply-add); norms, activations, the softmax, the optimizer and recomputed activations are
not counted.  Reports state the causal form; the full form is what a counter sees that knows
nothing of the mask (Narayanan et al. 2021, appendix; Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from megatron.errors import ConfigError, did_you_mean
from megatron.model.accounting import forward_flops, training_flops
from megatron.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Tokens that one run sent through a model, by what for.

    Attributes:
        trained: of its training steps.
        validation: of held-out losses measured for the method (not for the report), forward.
        reference: of a reference model's passes over the run's batches, forward.
        foresight: of losses measured before a step trains, forward.
        gradients: of gradients measured before a step trains, forward and backward.
        probes: of training steps drawn to learn about the domains.  They train too, and are
            part of ``trained``: shown, and not charged again.
    """

    trained: float
    validation: float = 0.0
    reference: float = 0.0
    foresight: float = 0.0
    gradients: float = 0.0
    probes: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for one in fields(self):
            if not getattr(self, one.name) >= 0:
                raise ConfigError(f"{one.name} is {getattr(self, one.name)} tokens; never below 0")
        if self.probes > self.trained:
            raise ConfigError(
                f"probes are {self.probes:,.0f} of {self.trained:,.0f} tokens trained on; "
                f"probing steps are training steps"
            )


def spent_by_ledger(
    trained: float, extra_tokens: Mapping[str, float], *, foresight_trains: bool
) -> Spent:
    """Read what a run's ledger or report adds up under ``extra_tokens``.

    Args:
        trained: tokens of the training steps.
        extra_tokens: tokens by kind: validation, probes, reference, foresight.
        foresight_trains: whether what was measured ahead are gradients (``doge``) and not
            losses.

    Raises:
        ConfigError: an unknown kind, which would go uncharged.
    """
    known = ("validation", "probes", "reference", "foresight")
    for kind in extra_tokens:
        if kind not in known:
            raise ConfigError(
                f"extra tokens of the kind '{kind}' have no price{did_you_mean(kind, known)}"
            )
    given = {kind: float(tokens) for kind, tokens in extra_tokens.items()}
    if foresight_trains and "foresight" in given:
        given["gradients"] = given.pop("foresight")
    return Spent(trained=trained, **given)


@dataclass(frozen=True, kw_only=True)
class Charges:
    """What a method costs in all, in operations.

    Attributes:
        training: of the run that is compared, probing steps included.
        validation: of held-out losses measured for the method.
        reference: of a reference model beside the run: its passes, not its training.
        foresight: of losses and gradients measured before steps train.
        proxies: of all proxy runs, with what they were charged themselves.
        references: of training the reference models.
        probes: the part of ``training`` that probed; not added to the total.
    """

    training: float
    validation: float = 0.0
    reference: float = 0.0
    foresight: float = 0.0
    proxies: float = 0.0
    references: float = 0.0
    probes: float = 0.0

    @property
    def total(self) -> float:
        """All of it, each operation once."""
        return self.training + self.beside

    @property
    def beside(self) -> float:
        """All but the training steps of the run itself."""
        return self.validation + self.reference + self.foresight + self.proxies + self.references


def charge(
    spec: ModelSpec,
    spent: Spent,
    *,
    reference_spec: ModelSpec | None = None,
    proxies: tuple[Charges, ...] = (),
    references: tuple[Charges, ...] = (),
    causal: bool = True,
) -> Charges:
    """Price a run, and put on its bill the runs without which it could not have been.

    A proxy or reference that several methods share is charged to each of them in full:
    each would have needed it alone.

    Args:
        spec: the run's architecture.
        spent: tokens of the run, by what for.
        reference_spec: of the reference that runs beside it; None = the run's own.
        proxies: the bills of proxy runs.
        references: the bills of training reference models.
        causal: see :func:`megatron.model.accounting.training_flops`.
    """
    reference = reference_spec or spec
    return Charges(
        training=training_flops(spec, spent.trained, causal=causal),
        validation=forward_flops(spec, spent.validation, causal=causal),
        reference=forward_flops(reference, spent.reference, causal=causal),
        foresight=forward_flops(spec, spent.foresight, causal=causal)
        + training_flops(spec, spent.gradients, causal=causal),
        proxies=sum(one.total for one in proxies),
        references=sum(one.total for one in references),
        probes=training_flops(spec, spent.probes, causal=causal),
    )


def steps_within(budget: float, *, per_step: float, fixed: float = 0.0) -> int:
    """Return how many steps a budget of operations pays for.

    Args:
        budget: operations in all, the same for every method.
        per_step: operations of one step: training, and what is measured for it on average.
        fixed: operations before the first step: proxies and references.

    Raises:
        ConfigError: not even one.
    """
    steps = int((budget - fixed) * (1 + 1e-12) // per_step)  # a budget of n steps is n steps
    if steps < 1:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs does not pay for one step: {fixed:.3g} go to "
            f"proxies and references, and a step costs {per_step:.3g}; raise it"
        )
    return steps
