"""The public corpora that ``prepare_data.py`` knows by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A corpus on the Hugging Face hub.

    Attributes:
        repository: its name there ("owner/name").
        configuration: the subset of it, if it has several.
        split: the split to read.
        text: field that holds the text.
        domain: dotted field that names a document's domain; ``None``: one domain.
        files: files to read instead of the whole, as patterns in the repository.
        gated: whether its owner asks for an agreement first.
    """

    repository: str
    configuration: str | None = None
    split: str = "train"
    text: str = "text"
    domain: str | None = None
    files: tuple[str, ...] = ()
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class Files:
    """A corpus of plain files.

    Attributes:
        urls: addresses of the files: JSON lines, text, or archives of such.
        sha256: their hashes, where known, in the same order.
        document_end: what ends a document in a file that holds many as plain text.
    """

    urls: tuple[str, ...]
    sha256: tuple[str, ...] = ()
    document_end: str | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named public corpus.

    Attributes:
        name: what the user calls it.
        source: where it is.
        about: one line on what it is.
        domains: its domains by their value in the source's domain field; those not listed
            are left out.  Empty: one domain named as the corpus.
    """

    name: str
    source: Hub | Files
    about: str
    domains: tuple[str, ...] = ()

    @property
    def domain_names(self) -> dict[str, str]:
        """The domains' names here by their value in the source."""
        return {value: slug(value) for value in self.domains} if self.domains else {"": self.name}


def slug(value: str) -> str:
    """Return a domain's value as a name: lower case, words joined by ``_``.

    >>> slug("RedPajamaStackExchange"), slug("NIH ExPorter"), slug("C++")
    ('stackexchange', 'nih_exporter', 'cpp')
    """
    plain = value.removeprefix("RedPajama").lower().replace("+", "p").replace("#", "sharp")
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")


_PILE = Hub(repository="monology/pile-uncopyrighted", domain="meta.pile_set_name")
_PILE_SETS = (
    *("ArXiv", "DM Mathematics", "Enron Emails", "EuroParl", "FreeLaw", "Github"),
    *("Gutenberg (PG-19)", "HackerNews", "NIH ExPorter", "PhilPapers", "Pile-CC"),
    *("PubMed Abstracts", "PubMed Central", "StackExchange", "USPTO Backgrounds"),
    *("Ubuntu IRC", "Wikipedia (en)"),
)
_SLIMPAJAMA_SETS = (
    *("RedPajamaArXiv", "RedPajamaBook", "RedPajamaC4", "RedPajamaCommonCrawl"),
    *("RedPajamaGithub", "RedPajamaStackExchange", "RedPajamaWikipedia"),
)
_STACK_LANGUAGES = (
    *("C", "C#", "C++", "Go", "Java", "JavaScript", "Python", "Ruby", "Rust", "Shell"),
    *("SQL", "TypeScript"),
)


def _pile_set(name: str, *values: str) -> Corpus:
    about = f"The Pile's {', '.join(values)} (the whole Pile is read through for it)"
    return Corpus(name=name, source=_PILE, about=about, domains=values)


def _catalogue() -> dict[str, Corpus]:
    corpora = [
        Corpus(
            name="slimpajama",
            source=Hub(repository="DKYoon/SlimPajama-6B", domain="meta.redpajama_set_name"),
            about="SlimPajama, a sample of 6 B tokens in seven domains",
            domains=_SLIMPAJAMA_SETS,
        ),
        Corpus(
            name="slimpajama_627b",
            source=Hub(repository="cerebras/SlimPajama-627B", domain="meta.redpajama_set_name"),
            about="SlimPajama, whole: 627 B tokens in seven domains",
            domains=_SLIMPAJAMA_SETS,
        ),
        Corpus(
            name="fineweb",
            source=Hub(repository="HuggingFaceFW/fineweb", configuration="sample-10BT"),
            about="FineWeb, its sample of 10 B tokens",
        ),
        Corpus(
            name="fineweb_edu",
            source=Hub(repository="HuggingFaceFW/fineweb-edu", configuration="sample-10BT"),
            about="FineWeb-Edu, its sample of 10 B tokens",
        ),
        Corpus(
            name="the_stack",
            source=Hub(
                repository="bigcode/the-stack-smol", text="content", domain="lang", gated=True
            ),
            about="The Stack's small sample, a domain per language",
            domains=_STACK_LANGUAGES,
        ),
        Corpus(
            name="pile",
            source=_PILE,
            about="The Pile without its withdrawn parts, in 17 domains",
            domains=_PILE_SETS,
        ),
        Corpus(
            name="pile_subset",
            source=Hub(
                repository="monology/pile-uncopyrighted",
                domain="meta.pile_set_name",
                files=("train/00.jsonl.zst",),
            ),
            about="one thirtieth of the same",
            domains=_PILE_SETS,
        ),
        Corpus(
            name="c4",
            source=Hub(repository="allenai/c4", configuration="en"),
            about="C4, English",
        ),
        Corpus(
            name="c4_openwebtext",
            source=Hub(repository="allenai/c4", configuration="realnewslike"),
            about="C4, news-like pages",
        ),
        Corpus(
            name="openwebtext",
            source=Hub(repository="Skylion007/openwebtext"),
            about="OpenWebText",
        ),
        Corpus(
            name="openwebtext2",
            source=Files(
                urls=(
                    "https://huggingface.co/datasets/segyges/OpenWebText2/resolve/main/"
                    "openwebtext2.jsonl.zst.tar",
                )
            ),
            about="OpenWebText2",
        ),
        Corpus(
            name="enron",
            source=Files(urls=("http://eaidata.bmk.sh/data/enron_emails.jsonl.zst",)),
            about="Enron's e-mails",
        ),
        Corpus(
            name="github",
            source=Files(urls=("http://eaidata.bmk.sh/data/github_small.jsonl.zst",)),
            about="code from GitHub, a small sample",
        ),
        Corpus(
            name="enwik8",
            source=Files(urls=("http://mattmahoney.net/dc/enwik8.zip",), document_end="</page>\n"),
            about="the first 100 MB of Wikipedia",
        ),
        _pile_set("arxiv", "ArXiv"),
        _pile_set("europarl", "EuroParl"),
        _pile_set("freelaw", "FreeLaw"),
        _pile_set("nih", "NIH ExPorter"),
        _pile_set("pubmed", "PubMed Abstracts", "PubMed Central"),
        _pile_set("hackernews", "HackerNews"),
        _pile_set("stackexchange", "StackExchange"),
        _pile_set("ubuntu_irc", "Ubuntu IRC"),
    ]
    return {corpus.name: corpus for corpus in corpora}


CORPORA: Mapping[str, Corpus] = _catalogue()

WITHDRAWN: Mapping[str, str] = {
    "books1": "openwebtext",
    "books3": "pile (its domain gutenberg_pg_19)",
    "youtube_subtitles": "fineweb",
}


def find(name: str) -> Corpus:
    """Return the corpus called ``name`` (``-`` and ``_`` alike).

    Raises:
        DataError: it is unknown, or was withdrawn by who published it.
    """
    key = name.replace("-", "_").lower()
    if key in WITHDRAWN:
        raise DataError(
            f"the corpus '{name}' was withdrawn by its publishers and cannot be fetched any more; "
            f"the nearest that can: {WITHDRAWN[key]}. A copy of your own is prepared with "
            "tools/preprocess_data.py"
        )
    if key not in CORPORA:
        known = ["quickstart", *CORPORA]
        raise DataError(
            f"unknown corpus '{name}'{did_you_mean(key, known)} (available: {', '.join(known)})"
        )
    return CORPORA[key]
