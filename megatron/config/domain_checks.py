"""Rules about domains, their weights, and what reads them."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.config.draft import Draft
from megatron.config.suggest import did_you_mean


def check_domains(config: Config, draft: Draft) -> None:
    """Add a problem for every rule that is broken."""
    _check_targets(config, draft)
    _check_weights(config, draft)
    _check_bounds(config, draft)
    _check_guardrail(config, draft)
    _check_reading(config, draft)


def _check_targets(config: Config, draft: Draft) -> None:
    """Something is trained on, and what is only measured has no share in it."""
    domains = draft.get("", "domains")
    for name, domain in config.domains.items():
        if domain.target and domain.weight:
            node = domains.at([name]) if domains is not None else None
            draft.refuse_at(
                node, name, "is a target, which is never trained on; leave its weight out"
            )
    if not config.trained:
        draft.refuse_at(domains, "domains", "every domain is a target; one must be trained on")


def _check_weights(config: Config, draft: Draft) -> None:
    weighted = {name for name, domain in config.trained.items() if domain.weight is not None}
    unweighted = [name for name in config.trained if name not in weighted]
    mode = config.mixing.weights
    if mode not in (None, "given") or not (weighted or mode == "given"):
        return
    domains = draft.get("", "domains")
    if unweighted:
        text = "has no weight, though "
        text += "mixing.weights is 'given'" if mode == "given" else "other domains have one"
        text += "; give every domain a weight, or choose mixing: {weights: natural}"
        node = domains.at([unweighted[0]]) if domains is not None else None
        draft.refuse_at(node, unweighted[0], text)
    elif not any(domain.weight for domain in config.trained.values()):
        draft.refuse_at(domains, "domains", "every weight is 0; at least one must be above 0")


def _group_names(config: Config, domains: list[str]) -> list[str]:
    """Return the names of the groups that the domains are in; none without groups."""
    groups = config.mixing.options.get("groups")
    if groups is None:
        return []
    members = groups.get("members")
    found = [name.partition("/")[0] for name in domains] if members is None else [*members]
    return list(dict.fromkeys(found))


def _check_bounds(config: Config, draft: Draft) -> None:
    """Floors and ceilings name existing domains, and some distribution keeps to them."""
    names = list(config.trained)
    groups = _group_names(config, names)
    for key, missing in (("floor", 0.0), ("ceiling", 1.0)):
        node = draft.options.get(key)
        if node is None or key not in config.mixing.options:
            continue
        value = config.mixing.options[key]
        if isinstance(value, dict):
            known = [*names, *groups]
            unknown = [name for name in value if name not in known]
            kind = "domain or group" if groups else "domain"
            for name in unknown:
                draft.problems.add(
                    node.at([name]), f"there is no {kind} '{name}'{did_you_mean(name, known)}"
                )
            if groups:
                continue  # of two levels: the groups themselves check them together
            bounds = [value.get(name, missing) for name in names]
            if unknown:
                continue
        elif isinstance(value, list):
            bounds = value
            if len(value) != len(names):
                text = f"{len(value)} values for {len(names)} domains ({', '.join(names)})"
                draft.problems.add(node, text)
                continue
        elif groups:
            continue  # one number is for groups
        else:
            bounds = [value] * len(names)
        total = sum(bounds)
        if not all(0 <= bound <= 1 for bound in bounds):
            draft.problems.add(node, "should be between 0 and 1")
        elif key == "floor" and total > 1 + 1e-12:
            draft.problems.add(node, f"the floors of {len(names)} domains sum to {total:.6g} > 1")
        elif key == "ceiling" and total < 1 - 1e-12:
            draft.problems.add(node, f"the ceilings of {len(names)} domains sum to {total:.6g} < 1")


def _check_guardrail(config: Config, draft: Draft) -> None:
    """A guardrail sees report validations, and nothing without them."""
    training, node = config.training, draft.options.get("guardrail")
    if node is None or config.mixing.options.get("guardrail") is None:
        return
    if training.eval_iters == 0:
        draft.problems.add(
            node, "eval_iters is 0, so that there are no validations to see; raise it", show=False
        )
    elif training.eval_interval >= training.train_iters:
        draft.problems.add(
            node,
            f"eval_interval is {training.eval_interval}, so that no validation comes before the "
            f"end of the {training.train_iters} steps; lower it",
            show=False,
        )


def _check_reading(config: Config, draft: Draft) -> None:
    """What becomes of windows fits the data and what is compared by their place."""
    data = config.data
    labelled = [name for name, domain in config.trained.items() if domain.train_labels]
    marks = (data.fim_prefix_token, data.fim_suffix_token, data.fim_middle_token)
    if data.fim_rate and labelled:
        draft.refuse(
            "data",
            "fim_rate",
            f"moves tokens, and the labels of '{labelled[0]}' stay; use fim_rate: 0, or no labels",
        )
    if data.fim_rate and config.tokenizer.tokenizer_type is None:
        names = [mark for mark in marks if isinstance(mark, str)]
        if names or data.fim_level == "character":
            why = f"to know {names[0]}" if names else "to cut between characters"
            draft.refuse(
                "data",
                "fim_rate",
                f"needs tokenizer_type and vocab_file {why} (or fim_level: token and ids)",
            )
    _check_curriculum(config, draft)


def _check_curriculum(config: Config, draft: Draft) -> None:
    """Every length of a curriculum can be run."""
    curriculum, full = config.data.curriculum_learning, config.model.context_length
    if curriculum is None or not curriculum.enabled:
        return
    steps = curriculum.lengths(min(config.training.train_iters, curriculum.steps + 1), full)
    ranks = config.parallel.model_parallel_size if config.parallel.sequence_parallel else 1
    if max(steps) > full:
        text = f"reaches {max(steps)} tokens, and seq_length is {full}"
    elif any(length % ranks for length in steps):
        wrong = next(length for length in steps if length % ranks)
        text = (
            f"has rows of {wrong} tokens, which {ranks} tensor ranks cannot divide under "
            f"sequence_parallel; use a difficulty_step that is a multiple of {ranks}"
        )
    else:
        return
    draft.refuse("data", "curriculum_learning", text)
