"""GPT-NeoX's data keys, mapped onto ``domains:``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from megatron.config.draft import Draft
from megatron.config.neox import is_off
from megatron.config.node import Node
from megatron.config.problems import shorten
from megatron.config.suggest import did_you_mean

_PARTS = ("train", "valid", "test")
_BESIDE_TRAIN = (
    "valid_data_paths",
    "test_data_paths",
    "train_data_weights",
    *(f"{part}_label_data_paths" for part in _PARTS),
)
_SUFFIXES = ("_document", "_text", "_content")
_SPLIT_WORDS = frozenset({"train", "valid", "val", "validation", "test", "data", "text"})


def map_data_keys(draft: Draft, keys: dict[str, Node]) -> None:
    """Turn ``data_path`` or ``train_data_paths`` and their companions into domains.

    Args:
        draft: receives ``domains`` and, for ``weight_by_num_documents``, start weights.
        keys: the data keys that were given (see ``neox.DATA_KEYS``).
    """
    keys = {key: node for key, node in keys.items() if node.value is not None}
    single, several = keys.get("data_path"), keys.get("train_data_paths")
    orphan = next((k for k in _BESIDE_TRAIN if k in keys), None)
    domains = draft.get("", "domains")
    if domains is not None and (single or several or orphan):
        node = single or several or keys[str(orphan)]
        draft.problems.add(
            node, f"contradicts the domains block in {domains.mark}; give the data once", show=False
        )
    elif single and several:
        draft.problems.add(
            several, f"contradicts data_path in {single.mark}; keep one of the two", show=False
        )
    elif single:
        _map_single(draft, keys, single)
    elif several:
        _map_lists(draft, keys, several)
    elif orphan:
        draft.problems.add(keys[orphan], "needs train_data_paths beside it", show=False)
    _map_document_weights(draft, keys)


def _map_document_weights(draft: Draft, keys: dict[str, Node]) -> None:
    by_documents, alpha = keys.get("weight_by_num_documents"), keys.get("weighted_sampler_alpha")
    if by_documents is not None and not isinstance(by_documents.value, bool):
        draft.problems.add(by_documents, "should be true or false")
    elif by_documents is not None and by_documents.value:
        draft.put("mixing", "weights", replace(by_documents, value="documents"))
        if alpha is not None:
            draft.put("mixing", "weights_alpha", alpha)
    elif alpha is not None:
        draft.ignore(alpha.name, "belongs to weight_by_num_documents")


def _map_single(draft: Draft, keys: dict[str, Node], node: Node) -> None:
    if not isinstance(node.value, str) or not node.value:
        draft.problems.add(node, "should be the path of one data set, without .bin or .idx")
        return
    name = names_of([node.value])[0]
    domains = {name: {"train": node, "weight": replace(node, value=1.0)}}
    _beside(draft, keys.get("train_label_data_paths"), "train", [name], domains)
    for key in ("valid_label_data_paths", "test_label_data_paths"):
        if key in keys:
            draft.problems.add(keys[key], "data_path is cut by split: give train_label_data_paths")
    _put(draft, domains, node)


def _map_lists(draft: Draft, keys: dict[str, Node], train: Node) -> None:
    paths = {part: _paths(draft, keys.get(f"{part}_data_paths")) for part in _PARTS}
    if any(found is None for found in paths.values()):
        return
    entries = {part: found or [] for part, found in paths.items()}
    namer = parent_names if _named(keys) else names_of
    names = namer([str(node.value) for node in entries["train"]])
    if _repeated(draft, names, entries["train"]):
        return
    domains: dict[str, dict[str, Node]] = {
        name: {"train": node} for name, node in zip(names, entries["train"], strict=True)
    }
    matched = {"train": names}
    for part in ("valid", "test"):
        matched[part] = _match(draft, part, entries[part], names, namer, domains)
    _weigh(draft, keys.get("train_data_weights"), names, entries["train"], domains)
    for part in _PARTS:
        _beside(draft, keys.get(f"{part}_label_data_paths"), part, matched[part], domains)
    for part in ("valid", "test"):
        _weigh_part(draft, keys.get(f"{part}_data_weights"), part, matched[part], domains)
    _put(draft, domains, train)


def _named(keys: dict[str, Node]) -> bool:
    return any(
        key in keys and not is_off(keys[key].plain())
        for key in ("use_named_train_datasets", "use_named_eval_datasets")
    )


def _paths(draft: Draft, node: Node | None) -> list[Node] | None:
    """Return a list's paths, or ``None`` after reporting what is wrong with them."""
    if node is None:
        return []
    entries = node.value if isinstance(node.value, list) else [node]
    for entry in entries:
        if not isinstance(entry.value, str) or not entry.value:
            draft.problems.add(entry, "should be a path without .bin or .idx")
            return None
    if not entries:
        draft.problems.add(node, "should hold at least one path")
        return None
    return list(entries)


def _repeated(draft: Draft, names: Sequence[str], entries: Sequence[Node]) -> bool:
    for index, name in enumerate(names):
        if name in names[:index]:
            first = entries[names.index(name)]
            draft.problems.add(
                entries[index],
                f"gives the same domain name '{name}' as {shorten(first.value)}; "
                "write a domains block: {name: {train: [PATH, PATH], weight: …}}",
            )
            return True
    return False


def _match(
    draft: Draft,
    part: str,
    entries: Sequence[Node],
    names: Sequence[str],
    namer: Callable[[Sequence[str]], list[str]],
    domains: dict[str, dict[str, Node]],
) -> list[str]:
    """Give every validation or test path to its domain: by name, else by its place in the list.

    Lists of another length are matched by name, and what is nobody's becomes a target, which is
    measured and not trained on.  The domains' names are returned, in the order of the paths.
    """
    if not entries:
        return []
    own = namer([str(node.value) for node in entries])
    if len(set(own)) < len(own) and len(entries) != len(names):
        draft.problems.add(
            entries[0],
            f"the {len(entries)} {part} paths cannot be matched to the {len(names)} training "
            "paths: two have one name, and there is not one for each; write a domains block",
        )
        return []
    by_name = len(set(own)) == len(own) and (set(own) <= set(names) or len(own) != len(names))
    matched = own if by_name else list(names)
    for name, node in zip(matched, entries, strict=True):
        domains.setdefault(name, {"target": replace(node, value=True)})[part] = node
    return matched


def _weigh(
    draft: Draft,
    weights: Node | None,
    names: Sequence[str],
    entries: Sequence[Node],
    domains: dict[str, dict[str, Node]],
) -> None:
    """Add the weights; GPT-NeoX's default is 1 for every path."""
    if weights is None:
        for name, node in zip(names, entries, strict=True):
            domains[name]["weight"] = replace(node, value=1.0)
        return
    _one_each(draft, weights, "train", "weight", names, domains)


def _weigh_part(
    draft: Draft,
    weights: Node | None,
    part: str,
    matched: Sequence[str],
    domains: dict[str, dict[str, Node]],
) -> None:
    """Add the weights of the averages over held-out losses."""
    if weights is not None:
        _one_each(draft, weights, part, f"{part}_weight", matched, domains)


def _one_each(
    draft: Draft,
    weights: Node,
    part: str,
    key: str,
    names: Sequence[str],
    domains: dict[str, dict[str, Node]],
) -> None:
    """Give every domain of a part its weight under ``key``."""
    given = weights.value if isinstance(weights.value, list) else [weights]
    if len(given) != len(names):
        draft.problems.add(
            weights, f"{len(given)} weights for {len(names)} {part}_data_paths; give one for each"
        )
        return
    for name, node in zip(names, given, strict=True):
        domains[name][key] = node


def _beside(
    draft: Draft,
    labels: Node | None,
    part: str,
    matched: Sequence[str],
    domains: dict[str, dict[str, Node]],
) -> None:
    """Add the paths of labels, which stand in the order of the data's."""
    entries = _paths(draft, labels)
    if not entries or labels is None:
        return
    if len(entries) != len(matched):
        draft.problems.add(
            labels, f"{len(entries)} paths for {len(matched)} {part}_data_paths; give one for each"
        )
        return
    for name, node in zip(matched, entries, strict=True):
        domains[name][f"{part}_labels"] = node


def _put(draft: Draft, domains: dict[str, dict[str, Node]], node: Node) -> None:
    entries = {name: replace(node, value=dict(parts)) for name, parts in domains.items()}
    draft.put("", "domains", replace(node, value=dict(entries)))


def parent_names(paths: Sequence[str]) -> list[str]:
    """Name each path by the folder that it lies in, as the online-data-mixing fork does."""
    return [PurePosixPath(path).parent.name or PurePosixPath(path).name for path in paths]


def names_of(paths: Sequence[str]) -> list[str]:
    """Name each path by its file name, or by its folder where file names say nothing."""
    bases = [_base(path) for path in paths]
    if len(set(bases)) == len(bases) and not _SPLIT_WORDS & set(bases):
        return bases
    parents = parent_names(paths)
    if len(set(parents)) == len(parents):
        return parents
    both = [f"{parent}_{base}" for parent, base in zip(parents, bases, strict=True)]
    return both


def _base(path: str) -> str:
    name = PurePosixPath(path).name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix) or name
    for word in _SPLIT_WORDS:
        name = name.removesuffix(f"_{word}") or name
    return name or path


def map_weights(draft: Draft) -> None:
    """Turn ``mixing: {weights: {domain: number}}`` into the domains' own weights."""
    weights, domains = draft.get("mixing", "weights"), draft.get("", "domains")
    if weights is None or not isinstance(weights.value, dict):
        return
    known = domains.value if domains is not None and isinstance(domains.value, dict) else {}
    filled = dict(known)
    for name, node in weights.value.items():
        domain = filled.get(name)
        if domain is None:
            draft.problems.add(
                node, f"there is no domain '{name}'{did_you_mean(name, known)}", show=False
            )
        elif isinstance(domain.value, dict):
            present = domain.value.get("weight")
            if present is None or present.value is None:
                pass
            elif present.mark.override != node.mark.override:
                node = present if present.mark.override else node
            elif not present.same_as(node):
                draft.problems.add(
                    node, f"contradicts {present.name}: {present.value} in {present.mark}"
                )
            filled[name] = replace(domain, value={**domain.value, "weight": node})
    if domains is not None and known:
        draft.groups[""]["domains"] = replace(domains, value=filled)
    draft.groups["mixing"]["weights"] = replace(weights, value="given")
