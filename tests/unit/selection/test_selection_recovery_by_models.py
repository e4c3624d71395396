"""A fifth of a corpus is in the target's language: what a model's scores find of it.

All languages have the same words, so that counting them tells nothing; only their order differs.
An even draw finds a fifth.  The stated margins: perplexity finds at least 90 %, LESS at least 60 %.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import languages
from support.selecting import Made, document, quiet

from megatron.selection.base import Selector, Target
from megatron.selection.less import Less
from megatron.selection.less_settings import LessSettings
from megatron.selection.perplexity import Perplexity
from megatron.selection.random_order import Random

pytest.importorskip("peft")

SIZE = 150
SHARE = SIZE // 5


def corpus() -> tuple[Made, np.ndarray]:
    """Return the documents, and which are in the target's language."""
    order = np.random.default_rng(3).permutation(SIZE)
    spoken = np.where(order < SHARE, 0, 1 + order % 4)
    texts = [languages.text(int(one), int(n)) for one, n in zip(spoken, order, strict=True)]
    return Made([document(n, one) for n, one in enumerate(texts)]), spoken == 0


def target() -> Target:
    examples = (document(n, languages.text(0, 10_000 + n)) for n in range(16))
    return Target(name="zero", documents=tuple(examples))


def found(selector: Selector, folder: Path, *, lowest: bool = False) -> float:
    """Return the share of the target's language among the documents that are taken."""
    made, wanted = corpus()
    targets = [target()] if selector.needs_targets else []
    selector.prepare(made, targets, folder, quiet)
    selector.open(folder, targets)
    scores = selector.score(made.documents)[0].max(axis=1)
    taken = np.argsort(scores if lowest else -scores, kind="stable")[:SHARE]
    return float(wanted[taken].mean())


def test_the_lowest_perplexities_under_a_model_of_the_target(tmp_path):
    texts = [one.text for one in target().documents]
    model = languages.train_model(tmp_path / "model", texts, steps=50)
    share = found(Perplexity(model=str(model), device="cpu"), tmp_path, lowest=True)
    drawn = np.mean([found(Random(seed=seed), tmp_path) for seed in range(20)])
    assert abs(drawn - 0.2) < 0.06
    assert share >= 0.9 > drawn + 0.6


def test_the_highest_influence_on_the_target(tmp_path):
    every = [languages.text(n % 5, 50_000 + n) for n in range(400)]
    model = languages.train_model(tmp_path / "model", every, steps=80)
    settings = LessSettings(
        warmup_share=0.3, epochs=2, warmup_batch=8, dimension=1024, max_tokens=64
    )
    share = found(Less(model=str(model), settings=settings, device="cpu"), tmp_path / "work")
    assert share >= 0.6
