"""The fault table: R1 to R17, and the rows that we add."""

from __future__ import annotations

from support.campaign import disk, files, hostile, kills, network, nonfinite, sampling, texts
from support.campaign.by_tests import pytest_row
from support.campaign.row import Row

CRASH = "tests/unit/checkpoint/test_checkpoint_crash.py"
TORN = "tests/resume/test_resume_torn_save.py"
CELLS = "tests/resume/test_resume_cells.py"
LAYOUT = "tests/resume/test_resume_layout.py"
EXCHANGE = "tests/unit/exchange", "tests/e2e/test_exchange.py"

ROWS = (
    Row(
        name="R1",
        fault="crash at every disk operation of a save (also half a write, also loss of power)",
        criterion="the newest complete checkpoint loads, every time",
        run=pytest_row(CRASH, "-k", "crash_at_every_operation"),
        ci=0,
        release=0,
    ),
    Row(
        name="R2",
        fault="SIGKILL at random moments of real training, 2 ranks",
        criterion="0 unusable; at most one save interval lost; then the same run to the bit",
        run=kills.killed,
        ci=20,
        release=200,
    ),
    Row(
        name="R3",
        fault="one rank dies inside a save, at each of its files",
        criterion="`latest` never names an incomplete checkpoint; all ranks load the same",
        run=pytest_row(TORN, CRASH, "-k", "dies_inside_a_save", quick=(TORN, "-k", "tensor")),
        ci=0,
        release=0,
    ),
    Row(
        name="R4",
        fault="kill and resume in every layout, static and online mixing",
        criterion="losses, weights, optimizer, sample ids and mixing weights equal to the bit",
        run=pytest_row(CELLS, quick=(CELLS, "-k", "odm")),
        ci=8,
        release=24,
    ),
    Row(
        name="R5",
        fault="change of layout between save and load",
        criterion="state bit-equal; sample ids equal; 20 losses within 2e-3 (bf16), 1e-5 (fp32)",
        run=pytest_row(LAYOUT, "-k", "changes_its_layout"),
        ci=4,
        release=12,
    ),
    Row(
        name="R6",
        fault="any data ranks 1–16, micro-batch, accumulation, stop points, weight changes",
        criterion="ordered global sample ids identical; no repeat inside an epoch",
        run=sampling.same_order,
        ci=300,
        release=5000,
    ),
    Row(
        name="R7",
        fault="weights down to 0.001, tiny domains",
        criterion="within 1 sample (static), inside the exact 4σ binomial bound (drawn)",
        run=sampling.realised_shares,
        ci=50,
        release=500,
        quick=20,
    ),
    Row(
        name="R8",
        fault="truncated, flipped, swapped, foreign, wrongly typed `.bin`/`.idx`",
        criterion="size, type, foreign: refused at opening; flips: found by --verify; no traceback",
        run=files.damaged_data,
        ci=200,
        release=2000,
        quick=50,
    ),
    Row(
        name="R9",
        fault="flipped bit, truncation, missing, extra, exchanged file in a checkpoint",
        criterion="all detected; falls back, and says so",
        run=files.damaged_checkpoints,
        ci=100,
        release=1000,
        quick=30,
    ),
    Row(
        name="R10",
        fault="split, seed or content changed while stored losses are there",
        criterion="never reused",
        run=files.changed_since,
        ci=20,
        release=20,
        quick=6,
    ),
    Row(
        name="R11",
        fault="disk full, at any moment of a run (small tmpfs)",
        criterion="ends with path and bytes; earlier checkpoints load; given room, the same run",
        run=disk.full,
        ci=20,
        release=100,
    ),
    Row(
        name="R12",
        fault="NaN or infinity in loss, gradient or reward, on one rank, at random steps",
        criterion="no parameter or mixing weight changes; the policy holds alike on all ranks",
        run=nonfinite.poisoned,
        ci=20,
        release=100,
    ),
    Row(
        name="R13",
        fault="malicious pickle, .npy, YAML tag, model repository with code, path in a tag",
        criterion="0 executed",
        run=hostile.payloads,
        ci=0,
        release=0,
    ),
    Row(
        name="R14",
        fault="mutated configurations: keys, types, ranges, duplicates, broken text",
        criterion="a configuration or one error, no traceback; ≥ 95 % of suggestions right",
        run=texts.mutated_configurations,
        ci=500,
        release=10_000,
    ),
    Row(
        name="R15",
        fault="SIGTERM in warm-up, step, validation, save",
        criterion="checkpoint at the current step ≥ 95 %, exit code set, same command resumes",
        run=kills.stopped,
        ci=12,
        release=60,
        allowed=0.05,
    ),
    Row(
        name="R16",
        fault="a second run in the same folder",
        criterion="refused, naming the first",
        run=kills.second,
        ci=5,
        release=5,
    ),
    Row(
        name="R17",
        fault="exchange with Hugging Face, each architecture, both ways",
        criterion="largest difference of logits ≤ 1e-5 in fp32; names one to one",
        run=pytest_row(*EXCHANGE),
        ci=0,
        release=0,
    ),
    Row(
        name="R18",
        fault="mutated JSON Lines",
        criterion="read as Python's own reader reads them, or one error that names the file",
        run=texts.mutated_lines,
        ci=300,
        release=5000,
        quick=100,
    ),
    Row(
        name="R19",
        fault="the link between two nodes is cut (network namespaces)",
        criterion="ends with its own message in bounded time; resumes to the same run",
        run=network.cut,
        ci=1,
        release=3,
    ),
    Row(
        name="R20",
        fault="the loss spikes, under ZeRO 1 to 3, a pipeline, offloading",
        criterion="the policy holds alike on all ranks; an update left out leaves no trace",
        run=pytest_row(
            "tests/distributed/test_spike_policies.py",
            "tests/unit/training/test_training_spikes.py",
        ),
        ci=0,
        release=0,
    ),
)
"""In the order of the table; those behind R17 are ours."""


def row(name: str) -> Row:
    """Return a row by its name."""
    return next(row for row in ROWS if row.name == name)
