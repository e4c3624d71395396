"""What a choice leaves behind: its records, a domain to train on, and a configuration fragment.

A journal beside them says what was asked and how far it came, so that the same command goes on
after a kill, and another one is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import DataError, RunError
from megatron.selection.base import FloatArray, Say
from megatron.selection.choose import Places
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.domain_output import (
    DomainFiles,
    TokenizerChoice,
    copy_tokens,
    encode_conversations,
    encode_texts,
    is_tokenised,
)
from megatron.selection.work import WorkFolder, difference, write_json
from megatron.selection.written import write_records

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """Where a choice goes, and what shall be made of it.

    Attributes:
        folder: of all files.
        name: that they begin with.
        settings: what decides the choice, JSON-able; another one is another choice.
        field: key that holds the text or the conversation; None = as the corpus was read.
        domain: name of the domain.
        about: a line that says what was chosen, for the fragment.
        choice: the tokenizer; without one (and without tokens) no domain is made.
        config_keys: keys of the tokenizer for the fragment.
        workers: processes that tokenise.
        overwrite: write over what is there.
        scoring: what the table has cost, for whoever counts it against a budget; no part of the
            choice.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    field: str | None
    domain: str
    about: str
    choice: TokenizerChoice
    config_keys: Mapping[str, str]
    scoring: Mapping[str, Any]
    workers: int = 1
    overwrite: bool = False

    def path(self, ending: str) -> Path:
        """Return the path of a file with this ending."""
        return self.folder / f"{self.name}{ending}"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What was written.

    Attributes:
        records: the file of records.
        domain: the domain's files; None without a tokenizer.
        fragment: the configuration; None without a domain.
        already_done: all of it was there.
    """

    records: Path
    domain: DomainFiles | None
    fragment: Path | None
    already_done: bool = False


def write_outputs(
    corpus: DocumentCorpus,
    chosen: Places,
    scores: FloatArray,
    request: OutputRequest,
    say: Say = lambda line: None,
) -> Outputs:
    """Write a choice; go on where a killed call stopped.

    Args:
        corpus: that was scored.
        chosen: [k] places in it, in order.
        scores: [n] of all its documents.
        request: where to.
        say: takes lines for the user.

    Raises:
        DataError: the place holds another choice.
        RunError: another process writes it, or the disk is full.
    """
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--out {request.folder}: cannot be made: {error.strerror or error}"
        ) from None
    with WorkFolder(path=request.folder).lock(f".{request.name}"):
        state = _take_up(request)
        if state.get("state") == "done":
            return _found(request, state)
        records = request.path(".jsonl")
        if state.get("state") != "written" or not records.exists():
            _save(request, "writing")
            written = write_records(corpus, chosen, scores, records)
            state = {"conversations": written.conversations}
            _save(request, "written", **state)
        domain = _write_domain(corpus, chosen, request, int(state["conversations"]), say)
        fragment = None
        if domain is not None:
            fragment = request.path(".yml")
            fragment.write_text(fragment_text(request, domain), encoding="utf-8")
        facts = None if domain is None else vars(domain)
        _save(request, "done", conversations=state["conversations"], domain=facts)
    return Outputs(records=records, domain=domain, fragment=fragment)


def fragment_text(request: OutputRequest, domain: DomainFiles) -> str:
    """Return the configuration that trains on a choice."""
    block: dict[str, str] = {"train": domain.prefix}
    if domain.labels is not None:
        block["train_labels"] = domain.labels
    content = {**request.config_keys, "domains": {request.domain: block}}
    lines = [
        f"# {request.about}",
        "# Made by: tools/select_data.py select.  split cuts validation data from it, unless the",
        "# domain has a valid of its own.",
        "",
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
    ]
    return "\n".join(lines)


def _write_domain(
    corpus: DocumentCorpus,
    chosen: Places,
    request: OutputRequest,
    conversations: int,
    say: Say,
) -> DomainFiles | None:
    prefix, records = str(request.path("")), request.path(".jsonl")
    choice = request.choice
    if is_tokenised(corpus):
        return copy_tokens(corpus, chosen, prefix)
    talks = conversations > 0 and (choice.chat_path is not None or choice.kind is not None)
    if talks or (choice.chat_path is not None and choice.kind is None):
        return encode_conversations(records, request.field, choice, prefix, workers=request.workers)
    if choice.kind is None:
        return None
    return encode_texts(records, request.field, choice, prefix, workers=request.workers, say=say)


def _take_up(request: OutputRequest) -> dict[str, Any]:
    """Return how far an earlier call came with the same choice; {} to start.

    Raises:
        DataError: the place holds something else.
    """
    path = request.path(".selection.json")
    if request.overwrite:
        _forget(request)
        return {}
    try:
        found = json.loads(path.read_bytes())
        then = found["settings"]
    except FileNotFoundError:
        if request.path(".jsonl").exists():
            raise DataError(
                f"{request.path('.jsonl')} exists, and nothing says how it was made; give "
                "--overwrite to replace it, or another --out or --name"
            ) from None
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error}); --overwrite starts again") from None
    other = difference(json.loads(json.dumps(dict(request.settings))), then)
    if other is not None:
        raise DataError(
            f"{request.path('.jsonl')}: holds another choice ({other}); give --overwrite to "
            "replace it, or another --out or --name"
        )
    return dict(found)


def _forget(request: OutputRequest) -> None:
    """Remove what an earlier choice of this name left behind, and nothing else."""
    endings = [".jsonl", ".yml", ".selection.json", ".preprocess.json"]
    for kind in ("token", "chat", request.field or "text"):
        for what in ("", "_label"):
            stem = f"_{kind}{what}_document"
            endings += [stem + ending for ending in (".bin", ".idx", ".meta.json")]
            endings += [stem + ending for ending in (".bin.tmp", ".idx.tmp")]
    for ending in endings:
        request.path(ending).unlink(missing_ok=True)


def _save(request: OutputRequest, state: str, **more: Any) -> None:
    content = {
        "version": _VERSION,
        "state": state,
        "settings": dict(request.settings),
        "about": request.about,
        "scoring": dict(request.scoring),
        **more,
    }
    write_json(request.path(".selection.json"), content)


def _found(request: OutputRequest, state: Mapping[str, Any]) -> Outputs:
    domain = None if state.get("domain") is None else DomainFiles(**state["domain"])
    return Outputs(
        records=request.path(".jsonl"),
        domain=domain,
        fragment=None if domain is None else request.path(".yml"),
        already_done=True,
    )
