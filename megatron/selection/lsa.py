"""Latent semantic analysis: sentence vectors without a model and without a network.

Words are hashed to features, weighted by TF-IDF (with 1 + ln f for a word that stands f times) and
projected on the leading directions of a sample of the corpus by a truncated SVD (Deerwester et al.
1990, Indexing by Latent Semantic Analysis).  Costs no model FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.checkpoint.files import replacing
from megatron.errors import ConfigError, DataError
from megatron.selection import libraries
from megatron.selection.base import Corpus, Cost, FloatArray, Say
from megatron.selection.encoder import TextOf

PURPOSE: Final = "--method embed --model lsa"

_FILE: Final = "lsa.npz"
_TEXTS_AT_ONCE: Final = 1024
_CHARACTERS_AT_ONCE: Final = 1 << 24
_PASS_OVER: Final = 50  # documents between two of the sample that are rather read than sought past


@dataclass(kw_only=True)
class LsaEncoder:
    """Vectors by hashed TF-IDF and a truncated SVD.

    Attributes:
        dimensions: of a vector, fewer if the sample has fewer documents.
        features: that words are hashed to.
        documents: of the corpus that the SVD is fitted on, at even distances.
        seed: of the randomised SVD.
    """

    dimensions: int = 128
    features: int = 1 << 16
    documents: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; raises ConfigError."""
        self._tfidf: Any = None
        self._directions: FloatArray | None = None
        if self.dimensions >= self.features:
            raise ConfigError(
                f"--lsa-dimensions {self.dimensions}: must be below --lsa-features "
                f"({self.features})"
            )

    def parameters(self) -> Mapping[str, Any]:
        """Return the settings."""
        return {"encoder": "lsa", **asdict(self)}

    def prepare(self, corpus: Corpus, text_of: TextOf, folder: Path, say: Say) -> None:
        """Fit weights and directions on a sample, unless the folder has them."""
        if (folder / _FILE).exists():
            return
        decomposition = libraries.load("sklearn.decomposition", PURPOSE)
        sparse = libraries.load("scipy.sparse", PURPOSE)
        texts = (text_of(one) for one in sample(corpus, self.documents))
        blocks = [self._counts(block) for block in _blocks(texts)]
        counts = sparse.vstack(blocks, format="csr") if blocks else None
        if counts is None or counts.nnz == 0:
            raise DataError("--model lsa: no document of the corpus has a word")
        say(f"fitting the vectors on {counts.shape[0]:,} of {len(corpus):,} documents")
        tfidf = _transformer().fit(counts)
        # Features that nothing has get no direction, and would take time; the SVD wants two.
        used = np.union1d(np.flatnonzero(counts.getnnz(axis=0)), [0, 1])
        dimensions = min(self.dimensions, counts.shape[0], len(used))
        svd = decomposition.TruncatedSVD(dimensions, algorithm="randomized", random_state=self.seed)
        # A sample without any variance has no explained share of it, which nobody asks for.
        with np.errstate(invalid="ignore", divide="ignore"):
            svd.fit(tfidf.transform(counts)[:, used])
        with replacing(folder / _FILE) as out:
            np.savez(out, idf=tfidf.idf_, used=used, directions=svd.components_.T)

    def open(self, folder: Path) -> None:
        """Read what was fitted."""
        with np.load(folder / _FILE) as fitted:
            self._tfidf = _transformer()
            self._tfidf.idf_ = fitted["idf"]
            directions = fitted["directions"]
            self._directions = np.zeros((self.features, directions.shape[1]))
            self._directions[fitted["used"]] = directions

    def encode(self, texts: Sequence[str]) -> tuple[FloatArray, Cost]:
        """Return vectors; zero for a text whose words no document of the sample has."""
        assert self._directions is not None
        found = np.empty((len(texts), self._directions.shape[1]))
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            block = texts[start : start + _TEXTS_AT_ONCE]
            weighted = self._tfidf.transform(self._counts(block), copy=False)
            found[start : start + len(block)] = weighted @ self._directions
        return found, Cost()

    def _counts(self, texts: Sequence[str]) -> Any:
        """Return how often each feature stands in each text, a sparse matrix."""
        text = libraries.load("sklearn.feature_extraction.text", PURPOSE)
        hashing = text.HashingVectorizer(
            analyzer=str.split,
            n_features=self.features,
            alternate_sign=False,
            norm=None,
            dtype=np.float64,
        )
        return hashing.transform(texts)


def _transformer() -> Any:
    text = libraries.load("sklearn.feature_extraction.text", PURPOSE)
    return text.TfidfTransformer(sublinear_tf=True)


def sample(corpus: Corpus, most: int) -> Iterator[Any]:
    """Yield at most so many documents of a corpus, at even distances, in order."""
    size = len(corpus)
    wanted = [at * size // min(most, size) for at in range(min(most, size))]
    if size > most * _PASS_OVER:
        for at in wanted:
            yield from corpus.read(at, at + 1)
        return
    chosen = iter(wanted)
    following = next(chosen, None)
    for at, document in enumerate(corpus.read()):
        if at == following:
            yield document
            following = next(chosen, None)


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield texts in lists that are not too long."""
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if len(block) == _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield block
            block, characters = [], 0
    if block:
        yield block
