"""bm25s's index of a batch of documents, weighted by the statistics of the whole corpus.

Imported only where bm25s is known to be installed.
"""

from __future__ import annotations

import itertools
from typing import Any

import bm25s
import numpy as np
from bm25s import scoring
from numpy.typing import NDArray

from megatron.selection.base import FloatArray


class CorpusIndex(bm25s.BM25):  # type: ignore[misc]  # bm25s has no types
    """An index that gives a document the same numbers in whatever batch it stands.

    bm25s by itself takes frequencies and the average length from what it indexes, and knows no
    weight below zero to replace.  Here both come from the corpus; how a term's frequency
    saturates, the index and the summing are bm25s's, in float64.  Its variant ``atire`` has
    Okapi's formula in rank_bm25's order of operations (``lucene`` is the same one without the
    factor k1 + 1), and it sums in the order of the query: scores are rank_bm25's to the bit.
    """

    def __init__(self, *, weights: FloatArray, mean_length: float, k1: float, b: float) -> None:
        """Keep the corpus's numbers.

        Args:
            weights: [terms], what a term's saturated frequency is multiplied by.
            mean_length: words in a document of the corpus.
            k1: how late a repeated term saturates.
            b: how much a long document is marked down.
        """
        super().__init__(k1=k1, b=b, method="atire", dtype="float64")
        self._weights = weights
        self._mean_length = mean_length

    def build_index_from_ids(
        self,
        unique_token_ids: list[int],
        corpus_token_ids: list[list[int]],
        show_progress: bool = True,
        leave_progress: bool = False,
    ) -> dict[str, Any]:
        """Return what bm25s keeps of an index: a compressed sparse column matrix.

        Args:
            unique_token_ids: of the terms, 0 to the number of weights.
            corpus_token_ids: of each document, in order, the ids of its words; a word that is no
                term has the number of terms as its id, and counts for the length alone.
            show_progress: bm25s's; there is none to show.
            leave_progress: likewise.
        """
        counts = _counts(corpus_token_ids, len(self._weights))
        lengths = np.fromiter(map(len, corpus_token_ids), np.float64, len(corpus_token_ids))
        saturated = scoring._select_tfc_scorer(self.method)(
            tf_array=counts.data,
            l_d=np.repeat(lengths, np.diff(counts.indptr)),
            l_avg=self._mean_length,
            k1=self.k1,
            b=self.b,
            delta=self.delta,
        )
        counts.data = saturated * self._weights[counts.indices]
        columns = counts.tocsc()
        self.nonoccurrence_array = None
        return {
            "data": columns.data,
            "indices": columns.indices,
            "indptr": columns.indptr,
            "num_docs": len(corpus_token_ids),
        }


def _counts(documents: list[list[int]], terms: int) -> Any:
    """Return how often each term stands in each document, [documents, terms], by rows."""
    from scipy import sparse

    ends = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents)), out=ends[1:])
    ids: NDArray[np.int64] = np.fromiter(
        itertools.chain.from_iterable(documents), np.int64, int(ends[-1])
    )
    is_term = ids < terms
    before = np.concatenate([[0], np.cumsum(is_term)])
    kept = ids[is_term]
    found = sparse.csr_matrix(
        (np.ones(len(kept)), kept, before[ends]), shape=(len(documents), terms)
    )
    found.sum_duplicates()
    return found
