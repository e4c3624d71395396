"""From a corpus's name to token files and the configuration that names them."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron.data.corpora import hub, mixbench, quickstart
from megatron.data.corpora.documents import cut_documents
from megatron.data.corpora.download import fetch, unpack
from megatron.data.corpora.public import Corpus, Files, Hub, find
from megatron.data.corpora.tokenise import TokenizerChoice, tokenise
from megatron.errors import DataError, RunError

Say = Callable[[str], None]

_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_VOCABULARY = (
    f"{_GPT2}/encoder.json",
    "gpt2-vocab.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)
GPT2_MERGES = (
    f"{_GPT2}/vocab.bpe",
    "gpt2-merges.txt",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
_TEXT_ENDINGS = (
    *(".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    *(".parquet", ".txt", ".txt.gz", ".txt.zst"),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        name: the corpus, or "quickstart", or "mixbench".
        data_dir: folder under which every corpus has its own.
        tokenizer: the value of ``tokenizer_type``.
        vocab_file: its vocabulary; ``None``: GPT-2's is fetched.
        merge_file: its merges; ``None``: GPT-2's are fetched.
        source: another place to take the corpus from.
        limits: how much of each domain is wanted.
        workers: processes that tokenise.
        families: of MixBench, which ones; empty: all.
    """

    name: str
    data_dir: Path
    tokenizer: str = "GPT2BPETokenizer"
    vocab_file: Path | None = None
    merge_file: Path | None = None
    source: str | None = None
    limits: hub.Limits = field(default_factory=hub.Limits)
    workers: int = 1
    families: tuple[str, ...] = ()


def prepare(request: Request, *, say: Say = print) -> None:
    """Do what ``request`` asks: fetch, tokenise, write ``data.yml``; what is done stays.

    Raises:
        DataError: the corpus is unknown, cannot be fetched, or does not fit what was begun.
        RunError: another process is preparing the same corpus.
    """
    if request.families and request.name != mixbench.NAME:
        raise DataError(
            f"--families chooses families of {mixbench.NAME}, and '{request.name}' has none; leave "
            f"it out, or prepare {mixbench.NAME}"
        )
    if request.name == "quickstart":
        with _alone(request.data_dir / "quickstart"):
            quickstart.prepare(request.data_dir / "quickstart", say=say)
        return
    if request.name == mixbench.NAME:
        root = request.data_dir / mixbench.NAME
        with _alone(root):
            mixbench.prepare(root, request.families or tuple(mixbench.FAMILIES), say=say)
        return
    if request.name == "pass":  # NeoX's name for "fetch the tokenizer only"
        _tokenizer(request, say)
        return
    corpus = find(request.name)
    root = request.data_dir / corpus.name
    with _alone(root):
        choice = _tokenizer(request, say)
        texts = _texts(corpus, request, root / "raw", say)
        for name, files in texts.items():
            prefix = _prefix(corpus, request.data_dir, name)
            new = tokenise(files, prefix, choice, workers=request.workers, say=say)
            state = "is at" if new else "was done before, at"
            say(f"{corpus.name}: domain {name} {state} {prefix}_text_document")
        target = root / "data.yml"
        target.write_text(data_config(corpus, request.data_dir, choice), encoding="utf-8")
        say(f"{corpus.name}: done; train on it with: ./deepy.py train.py MODEL.yml {target}")


def data_config(corpus: Corpus, data_dir: Path, choice: TokenizerChoice) -> str:
    """Return the configuration that names a prepared corpus's domains and its tokenizer."""
    lines = [f"# {corpus.about}.", f"# Made by: prepare_data.py {corpus.name}", ""]
    lines.append(f"tokenizer_type: {choice.kind}")
    for key, path in (("vocab_file", choice.vocab_file), ("merge_file", choice.merge_file)):
        if path is not None:
            lines.append(f"{key}: {path}")
    lines += ["", "# Shares of documents for training, validation and test."]
    lines += ['split: "969,30,1"', "", "domains:"]
    for name in corpus.domain_names.values():
        lines += [f"  {name}:", f"    train: {_prefix(corpus, data_dir, name)}_text_document"]
    return "\n".join(lines) + "\n"


def _prefix(corpus: Corpus, data_dir: Path, domain: str) -> Path:
    if domain == corpus.name and not corpus.domains:
        return data_dir / corpus.name / corpus.name
    return data_dir / corpus.name / domain / domain


def _texts(corpus: Corpus, request: Request, raw: Path, say: Say) -> Mapping[str, list[Path]]:
    if isinstance(corpus.source, Hub):
        return hub.bring(corpus, raw, source=request.source, limits=request.limits, say=say)
    return {corpus.name: _files(corpus.source, request, raw, say)}


def _files(source: Files, request: Request, raw: Path, say: Say) -> list[Path]:
    if request.limits != hub.Limits():
        raise DataError(
            f"'{request.name}' is fetched as whole files: --max-documents and --max-bytes do not "
            "apply to it"
        )
    urls = (request.source,) if request.source else source.urls
    hashes = source.sha256 if not request.source else ()
    found: list[Path] = []
    for number, url in enumerate(urls):
        say(f"fetching {url}")
        expected = hashes[number] if hashes else None
        archive = fetch(url, raw, sha256=expected, say=say)
        found += unpack(archive, raw / f"{archive.name}.unpacked")
    if source.document_end is not None:
        return [
            cut_documents(path, raw / f"{path.name}.jsonl", source.document_end) for path in found
        ]
    texts = [path for path in found if path.name.endswith(_TEXT_ENDINGS)]
    if not texts:
        raise DataError(
            f"{', '.join(urls)} holds no file of a kind that can be read "
            f"({' '.join(_TEXT_ENDINGS)})"
        )
    return texts


def _tokenizer(request: Request, say: Say) -> TokenizerChoice:
    kind, vocabulary, merges = request.tokenizer, request.vocab_file, request.merge_file
    for path in (vocabulary, merges):
        if path is not None and not path.exists():
            raise DataError(f"the tokenizer's file {path} does not exist")
    if kind == "GPT2BPETokenizer":
        if (vocabulary is None) != (merges is None):
            raise DataError("a GPT-2 BPE needs both --vocab-file and --merge-file, or neither")
        if vocabulary is None or merges is None:
            vocabulary, merges = (
                fetch(url, request.data_dir, name=name, sha256=sha256, say=say)
                for url, name, sha256 in (GPT2_VOCABULARY, GPT2_MERGES)
            )
    elif kind not in ("CharLevelTokenizer", "HFGPT2Tokenizer") and vocabulary is None:
        raise DataError(f"--tokenizer {kind} needs --vocab-file")
    return TokenizerChoice(kind=kind, vocab_file=vocabulary, merge_file=merges)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is preparing {folder}; wait for it to end") from error
        yield
