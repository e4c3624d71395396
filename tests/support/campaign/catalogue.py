"""The fault table: R1 to R17, and the rows that we add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.campaign import disk, files, hostile, kills, network, nonfinite, sampling, texts
from support.campaign.by_tests import pytest_row
from support.campaign.row import Row, Trials

CRASH = "tests/unit/checkpoint/test_checkpoint_crash.py"
TORN = "tests/resume/test_resume_torn_save.py"
CELLS = "tests/resume/test_resume_cells.py"
LAYOUT = "tests/resume/test_resume_layout.py"
EXCHANGE = "tests/unit/exchange", "tests/e2e/test_exchange.py"

_TABLE: tuple[tuple[str, str, Trials, Mapping[str, Any]], ...] = (
    (  # R1
        "crash at every disk operation of a save (also half a write, also loss of power)",
        "the newest complete checkpoint loads, every time",
        pytest_row(CRASH, "-k", "crash_at_every_operation"),
        {},
    ),
    (  # R2
        "SIGKILL at random moments of real training, 2 ranks",
        "0 unusable; at most one save interval lost; then the same run to the bit",
        kills.killed,
        {"ci": 20, "release": 200},
    ),
    (  # R3
        "one rank dies inside a save, at each of its files",
        "`latest` never names an incomplete checkpoint; all ranks load the same",
        pytest_row(TORN, CRASH, "-k", "dies_inside_a_save", quick=(TORN, "-k", "tensor")),
        {},
    ),
    (  # R4
        "kill and resume in every layout, static and online mixing",
        "losses, weights, optimizer, sample ids and mixing weights equal to the bit",
        pytest_row(CELLS, quick=(CELLS, "-k", "odm")),
        {"ci": 8, "release": 24},
    ),
    (  # R5
        "change of layout between save and load",
        "state bit-equal; sample ids equal; 20 losses within 2e-3 (bf16), 1e-5 (fp32)",
        pytest_row(LAYOUT, "-k", "changes_its_layout"),
        {"ci": 4, "release": 12},
    ),
    (  # R6
        "any data ranks 1–16, micro-batch, accumulation, stop points, weight changes",
        "ordered global sample ids identical; no repeat inside an epoch",
        sampling.same_order,
        {"ci": 300, "release": 5000},
    ),
    (  # R7
        "weights down to 0.001, tiny domains",
        "within 1 sample (static), inside the exact 4σ binomial bound (drawn)",
        sampling.realised_shares,
        {"ci": 50, "release": 500, "quick": 20},
    ),
    (  # R8
        "truncated, flipped, swapped, foreign, wrongly typed `.bin`/`.idx`",
        "size, type, foreign: refused at opening; flips: found by --verify; no traceback",
        files.damaged_data,
        {"ci": 200, "release": 2000, "quick": 50},
    ),
    (  # R9
        "flipped bit, truncation, missing, extra, exchanged file in a checkpoint",
        "all detected; falls back, and says so",
        files.damaged_checkpoints,
        {"ci": 100, "release": 1000, "quick": 30},
    ),
    (  # R10
        "split, seed or content changed while stored losses are there",
        "never reused",
        files.changed_since,
        {"ci": 20, "release": 20, "quick": 6},
    ),
    (  # R11
        "disk full, at any moment of a run (small tmpfs)",
        "ends with path and bytes; earlier checkpoints load; given room, the same run",
        disk.full,
        {"ci": 20, "release": 100},
    ),
    (  # R12
        "NaN or infinity in loss, gradient or reward, on one rank, at random steps",
        "no parameter or mixing weight changes; the policy holds alike on all ranks",
        nonfinite.poisoned,
        {"ci": 20, "release": 100},
    ),
    (  # R13
        "malicious pickle, .npy, YAML tag, model repository with code, path in a tag",
        "0 executed",
        hostile.payloads,
        {},
    ),
    (  # R14
        "mutated configurations: keys, types, ranges, duplicates, broken text",
        "a configuration or one error, no traceback; ≥ 95 % of suggestions right",
        texts.mutated_configurations,
        {"ci": 500, "release": 10_000},
    ),
    (  # R15
        "SIGTERM in warm-up, step, validation, save",
        "checkpoint at the current step ≥ 95 %, exit code set, same command resumes",
        kills.stopped,
        {"ci": 12, "release": 60, "allowed": 0.05},
    ),
    (  # R16
        "a second run in the same folder",
        "refused, naming the first",
        kills.second,
        {"ci": 5, "release": 5},
    ),
    (  # R17
        "exchange with Hugging Face, each architecture, both ways",
        "largest difference of logits ≤ 1e-5 in fp32; names one to one",
        pytest_row(*EXCHANGE),
        {},
    ),
    (  # R18
        "mutated JSON Lines",
        "read as Python's own reader reads them, or one error that names the file",
        texts.mutated_lines,
        {"ci": 300, "release": 5000, "quick": 100},
    ),
    (  # R19
        "the link between two nodes is cut (network namespaces)",
        "ends with its own message in bounded time; resumes to the same run",
        network.cut,
        {"ci": 1, "release": 3},
    ),
    (  # R20
        "the loss spikes, under ZeRO 1 to 3, a pipeline, offloading",
        "the policy holds alike on all ranks; an update left out leaves no trace",
        pytest_row(
            "tests/distributed/test_spike_policies.py",
            "tests/unit/training/test_training_spikes.py",
        ),
        {},
    ),
)
"""Fault, what must hold, its trials, and the fields of a row that say how many."""

ROWS = tuple(
    Row(name=f"R{number}", fault=fault, criterion=criterion, run=run, **counts)
    for number, (fault, criterion, run, counts) in enumerate(_TABLE, start=1)
)
"""In the order of the table; those behind R17 are ours."""


def row(name: str) -> Row:
    """Return a row by its name."""
    return next(row for row in ROWS if row.name == name)
