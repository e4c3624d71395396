"""``load_config``: files and overrides in, a checked configuration out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from megatron.config.canonical import IGNORED_KEY, canonicalise
from megatron.config.checks import check
from megatron.config.config import Config
from megatron.config.draft import Draft
from megatron.config.merge import read_all
from megatron.config.mixing import MixingConfig, option_names, typed_options
from megatron.config.problems import Problems
from megatron.config.report import report_group_errors, report_option_errors
from megatron.config.suggest import did_you_mean
from megatron.errors import NeomixError
from megatron.registry import mixing_methods


def load_config(
    files: Sequence[str], *, conf_dir: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read, merge and check configuration files.

    The mixing methods must have been registered (``import megatron.mixing``).

    Args:
        files: names of the files; ``.yml`` may be left out.
        conf_dir: folder that relative names start from.
        overrides: ``key=value`` texts that win over the files; the value is YAML.

    Raises:
        ConfigError: all problems that were found, each with file, line, key and value.
    """
    if not mixing_methods:
        raise RuntimeError("no mixing method is registered; import megatron.mixing first")
    problems = Problems()
    if not files:
        problems.add_plain("no configuration file was given")
    tree = read_all(files, conf_dir, overrides, problems)
    if not tree:
        problems.raise_if_any()
    draft = canonicalise(tree, problems)
    config = _typed(draft, list(files))
    if config is not None:
        check(config, draft)
    problems.raise_if_any()
    assert config is not None
    return config


def _typed(draft: Draft, files: list[str]) -> Config | None:
    """Validate all groups; ``None`` after reporting what is wrong."""
    options, options_ok = _mixing_options(draft)
    data: dict[str, Any] = {
        group: {name: node.plain() for name, node in fields.items()}
        for group, fields in draft.groups.items()
        if group
    }
    for group in ("model", "optimizer", "batch", "training"):
        data.setdefault(group, {})
    if not options_ok:
        data.pop("mixing", None)
    elif options:
        data.setdefault("mixing", {})["options"] = options
    for name, node in draft.groups.get("", {}).items():
        data[name] = node.plain()
    data.pop(IGNORED_KEY, None)
    data["ignored"] = _ignored(draft)
    if data.get("precision", "fp32") != "fp16":
        data.pop("fp16", None)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        report_group_errors(draft, error.errors(include_url=False), files)
        return None


def _ignored(draft: Draft) -> tuple[str, ...]:
    """Return the keys without effect: those that a resolved configuration names, and ours."""
    node = draft.get("", IGNORED_KEY)
    earlier = node.plain() if node is not None else []
    if node is not None and not isinstance(earlier, list):
        draft.problems.add(node, "should be a list of texts")
        earlier = []
    lines = [f"{name}: {reason}" for name, reason in draft.ignored.items()]
    return tuple(dict.fromkeys([*map(str, earlier), *lines]))


def _mixing_options(draft: Draft) -> tuple[dict[str, Any], bool]:
    """Take the method's options out of the mixing group and check them.

    Returns:
        All options of the method, and whether method and options are in order.
    """
    fields = draft.groups.setdefault("mixing", {})
    own = MixingConfig.model_fields.keys() - {"options"}
    node = fields.get("method")
    name = node.value if node is not None else MixingConfig.model_fields["method"].default
    if not isinstance(name, str) or name not in mixing_methods:
        if node is not None:
            known = ", ".join(sorted(mixing_methods))
            text = f"unknown mixing method{did_you_mean(str(name), mixing_methods)}"
            draft.problems.add(node, f"{text} (available: {known})")
        return {}, False
    method = mixing_methods[name]
    given = {key: fields.pop(key) for key in list(fields) if key not in own}
    names = option_names(method)
    for key in [key for key in given if key not in names]:
        problem = f"unknown option of mixing method '{name}'"
        draft.problems.add(
            given.pop(key), f"{problem}{did_you_mean(key, [*names, *own])}", show=False
        )
    given = {k: n for k, n in given.items() if not (n.value is None and n.mark.override)}
    draft.options = given
    try:
        return typed_options(method, {key: n.plain() for key, n in given.items()}), True
    except ValidationError as error:
        report_option_errors(draft, error.errors(include_url=False), given, method.options)
    except (NeomixError, ValueError, TypeError, OverflowError, RecursionError) as error:
        first = next(iter(given.values()), None)
        place = replace(first, name="mixing") if first else None
        text = f"options of mixing method '{name}': {error}"
        if place is None:
            draft.problems.add_plain(text)
        else:
            draft.problems.add(place, text, show=False)
    return {}, False
