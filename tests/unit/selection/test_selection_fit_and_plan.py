"""``tools/select_data.py fit`` and ``plan``: what they write, and the figures."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import yaml
from support.gain_runs import COSTS, gain_runs, write_csv
from support.report_runs import write_run
from support.source import ROOT

import megatron.mixing  # noqa: F401
from megatron.config import load_config
from megatron.errors import ConfigError, DataError, NeomixError
from megatron.model.accounting import training_flops
from megatron.selection.budget_fit import fit_runs
from megatron.selection.budget_report import markdown_html
from megatron.selection.commands import fit, load_command, plan
from megatron.selection.commands.planning import asked_prices
from megatron.selection.figures_fit import pareto_front, performance_figure
from megatron.selection.finished_runs import chosen_of, read_finished
from megatron.selection.gains import gains_facts, read_gains
from megatron.selection.similarity import read_score_names, similarity
from megatron.selection.table import Scores, TableFacts, TableWriter

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

PRICED = ["--corpus-tokens", "1e9", "--selector", "ppl=7B", "less=7B"]


def command(module, *words):
    parser = module.make_parser("x", list(words))
    options = parser.parse_args([str(word) for word in words])
    options.words = ["tools/select_data.py", *map(str, words)]
    return module.run(options)


def score_table(path, scores, method="bm25", data="corpus"):
    count = len(scores)
    facts = TableFacts(
        method=method,
        parameters={},
        aggregate="none",
        task="exam",
        subtasks=(),
        documents=count,
        data=data,
        parts=({"name": "a", "documents": count, "sha256": ""},),
        targets={},
    )
    writer = TableWriter(path, facts)
    writer.add(
        Scores(
            ids=tuple(map(str, range(count))),
            sources=("a",) * count,
            numbers=np.arange(count),
            tokens=np.full(count, -1),
            words=np.ones(count, dtype=np.int64),
            subtasks=np.zeros((count, 0)),
            score=np.asarray(scores, dtype=np.float64),
        )
    )
    writer.close()
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("fit")
    runs = gain_runs(noise=1e-3)
    draw = np.random.default_rng(0)
    base = draw.normal(size=400)
    tables = [
        f"{name}={score_table(out / f'{name}.parquet', base + draw.normal(size=400), name)}"
        for name in ("bm25", "less")
    ]
    words = [write_csv(runs, out / "runs.csv"), "--out", out / "law", "--unit", "accuracy"]
    assert command(fit, *words, "--best", "1", *PRICED, "--scores", *tables) == 0
    return out / "law"


def drawn(path):
    """Return width and height of a picture, in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_fit_writes_laws_figures_and_a_page(fitted, capsys):
    names = ["performance-exam", "fixed-budget-exam", "break-even-exam", "simulation-exam"]
    page = (fitted / "report.html").read_text()
    for name in [*names, "similarity"]:
        width, height = drawn(fitted / f"{name}.png")
        assert width > 900
        assert height > 400
    assert page.count("data:image/png;base64,") == 5
    assert "src=" not in page.replace('src="data:image/png', "")
    assert "Performance against compute: exam" in page
    assert "tools/select_data.py" in page
    text = (fitted / "fit.md").read_text()
    assert "| exam | 7B | ppl | 14 |" in text
    assert "Student's t" in text
    assert len(json.loads((fitted / "gains.json").read_text())["gains"]) == 8


def test_the_same_runs_give_the_same_figures(fitted, tmp_path):
    gains = read_gains(fitted)
    again = [performance_figure(gains, "exam"), performance_figure(gains, "exam")]
    assert again[0].png == again[1].png


def test_plan_says_what_to_choose_by(fitted, tmp_path, capsys):
    words = [fitted, "--budget", "1e19", "2e20", "--size", "7B", "70B", "--out", tmp_path]
    assert command(plan, *words, *PRICED) == 0
    shown = capsys.readouterr().out
    assert "Compute-optimal: **bm25**, 0.0% of the budget on choosing" in shown
    assert "size extrapolated" in shown
    found = json.loads((tmp_path / "plan.json").read_text())["plans"][0]
    assert found["prices"]["ppl"]["flops"] == COSTS["ppl"]
    best = {(one["model"], one["budget"]): one for one in found["choices"] if one["best"]}
    assert best["7B", 1e19]["method"] == "bm25"
    assert best["70B", 2e20]["method"] in ("ppl", "less")
    assert best["70B", 2e20]["choosing_share"] > 0
    ratios = {(one["method"], one["share"]): one["ratio"] for one in found["break_even_sizes"]}
    assert ratios["ppl", 0.5] < ratios["ppl", 0.05]
    assert ratios["ppl", 0.25] < ratios["less", 0.25]
    assert (tmp_path / "plan.md").read_text() in shown
    assert drawn(tmp_path / "break-even-exam.png")[0] > 900
    assert "Break-even sizes" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--shares", "0.3"], lambda one: {b["share"] for b in one["break_even_sizes"]} == {0.3}),
        (
            ["--against", "random"],
            lambda one: (
                {b["method"] for b in one["break_even_sizes"]} == {"ppl", "less"}
                and {b["against"] for b in one["break_even_sizes"]} == {"random"}
            ),
        ),
        (
            ["--less-checkpoints", "4"],
            lambda one: one["prices"]["less"]["flops"] == pytest.approx(COSTS["less"] * 4.2 / 1.2),
        ),
        (
            ["--warm-up-tokens", "0", "--target-tokens", "1e8"],
            lambda one: one["prices"]["less"]["flops"] == pytest.approx(6 * 7e9 * 1.1e9),
        ),
        (
            ["--size", str(ROOT / "configs/models/160m.yml"), "--vocab-size", "50304"],
            lambda one: 1.6e8 < one["choices"][0]["parameters"] < 1.7e8,
        ),
    ],
)
def test_every_flag_of_plan_does_something(fitted, tmp_path, words, check):
    assert command(plan, fitted, "--budget", "1e20", "--out", tmp_path, *PRICED, *words) == 0
    assert check(json.loads((tmp_path / "plan.json").read_text())["plans"][0])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--budget", "much"], "--budget is 'much'"),
        (["--budget", "1e19", "--task", "exm"], "did you mean 'exam'"),
        (["--budget", "1e19", "--selector", "ppl"], "write METHOD=SIZE"),
        (["--budget", "1e19", "--size", "none.yml"], "neither a size"),
        (["--budget", "1e19", "--selector", "ppl=7B"], "give --corpus-tokens"),
        (["--budget", "1e19", "--shares", "2"], "in .0, 1."),
        (["--budget", "1e19", "--target-tokens", "1e6"], "belongs to --selector embed=SIZE"),
        (
            ["--budget", "1e19", *PRICED[:-1], "--less-checkpoints", "4"],
            "belongs to --selector less=SIZE",
        ),
        (
            ["--budget", "1e19", "--size", str(ROOT / "configs/models/160m.yml")],
            "give --vocab-size",
        ),
    ],
)
def test_wrong_words_are_refused(fitted, tmp_path, words, match):
    with pytest.raises(NeomixError, match=match):
        command(plan, fitted, "--out", tmp_path, *words)


def test_flags_of_fit_reach_the_law(tmp_path):
    table = write_csv(gain_runs(sizes=(7e9,), noise=2e-3), tmp_path / "runs.csv")

    def laws(*words):
        options = fit.make_parser("x", []).parse_args([str(table), "--out", "x", *words])
        fit.fill(options)
        gains = fit_runs(fit.asked_runs(options), fit.asked_request(options, asked_prices(options)))
        return gains_facts(gains)

    plain, given = laws(), laws("--ceiling", "7B=0.61")
    assert given["gains"][0]["fixed"]
    assert given["gains"][0]["law"][2] == 0.61
    assert not plain["gains"][0]["fixed"]

    def width(found):
        return found["gains"][0]["high"][1] - found["gains"][0]["low"][1]

    assert width(laws("--confidence", "0.5")) < width(plain) / 2
    drawn_anew = laws("--intervals", "bootstrap", "--replicates", "50", "--seed", "3")
    assert len(drawn_anew["gains"][0]["draws"]) == 50
    assert drawn_anew["intervals"] == "bootstrap"
    both = laws("--compute", "total")
    ppl = next(one for one in both["gains"] if one["method"] == "ppl")
    assert min(ppl["flops"]) > COSTS["ppl"]
    assert laws("--best", "0.595")["gains"][0]["law"][2] <= 0.595
    losses = gain_runs(sizes=(7e9,), start=3.5, ceiling=2.8)
    table = write_csv(losses, tmp_path / "losses.csv")
    assert laws("--better", "lower", "--unit", "nats")["better"] == "lower"


def test_a_law_that_fails_is_named_and_the_code_says_so(tmp_path, capsys):
    runs = [
        type(run)(**{**vars(run), "performance": 0.5}) if run.method == "ppl" else run
        for run in gain_runs(sizes=(7e9,))
    ]
    table = write_csv(runs, tmp_path / "runs.csv")
    assert command(fit, table, "--out", tmp_path / "law") == 1
    assert "not fitted: exam, 7B, ppl: the performance is 0.5" in capsys.readouterr().err
    assert "Not fitted: exam, 7B, ppl" in (tmp_path / "law" / "fit.md").read_text()


def test_wrong_words_of_fit_are_refused(tmp_path):
    table = write_csv(gain_runs(sizes=(7e9,)), tmp_path / "runs.csv")
    for words, match in (
        ([], "there are no runs"),
        ([table, "--confidence", "1"], "between 0 and 1"),
        ([table, "--replicates", "3"], "50 or more"),
        ([table, "--scores", "a.parquet"], "two or more"),
        (["--runs", tmp_path], "holds no run"),
        ([table, "--runs", tmp_path], "--better"),
        ([table, "--measure", "loss/a"], "belongs to --runs"),
        ([table, "--similarity-share", "0.1"], "belongs to --scores"),
        ([table, "--better", "lower", "--best", "1"], "--best 1"),
        ([table, "--warm-up-tokens", "1e6"], "belongs to --selector less=SIZE"),
    ):
        with pytest.raises(NeomixError, match=match):
            command(fit, *words, "--out", tmp_path / "law")


def test_the_tool_has_both_commands():
    assert load_command("fit") is fit
    words = [sys.executable, "tools/select_data.py", "plan", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--budget" in done.stdout


def test_the_pareto_front_is_the_brute_force_one():
    draw = np.random.default_rng(0)
    flops, performance = draw.integers(1, 20, 60).astype(float), draw.integers(0, 15, 60) / 15
    for sign in (1.0, -1.0):
        front = pareto_front(flops, performance, sign)
        better = [
            {
                (flops[i], performance[i])
                for i in range(60)
                if not any(
                    flops[j] <= flops[i]
                    and sign * performance[j] >= sign * performance[i]
                    and (flops[j], performance[j]) != (flops[i], performance[i])
                    for j in range(60)
                )
            }
        ][0]
        assert {(flops[i], performance[i]) for i in front} == better
        assert list(flops[front]) == sorted(flops[front])


def test_similarity_is_counted_over_what_is_chosen(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    one, two = draw.normal(size=200), draw.normal(size=200)
    two[7] = np.nan
    names = read_score_names(
        [
            f"one={score_table(tmp_path / 'one.parquet', one)}",
            f"two={score_table(tmp_path / 'two.parquet', two)}",
            f"back:low={score_table(tmp_path / 'back.parquet', one)}",
        ]
    )
    found = similarity(names, 0.1)
    keep = np.isfinite(two)
    assert found.documents == 199
    best = [set(np.argsort(-v[keep])[:20]) for v in (one, two, -one)]
    for row in range(3):
        for column in range(3):
            both, either = best[row] & best[column], best[row] | best[column]
            assert found.jaccard[row, column] == pytest.approx(len(both) / len(either))
    truth = stats.spearmanr(one[keep], two[keep]).statistic
    assert found.rank[0, 1] == pytest.approx(truth)
    assert found.rank[0, 2] == pytest.approx(-1)
    other = score_table(tmp_path / "other.parquet", one, data="another")
    with pytest.raises(DataError, match="another corpus"):
        similarity(read_score_names([*[f"a={tmp_path / 'one.parquet'}"], f"b={other}"]), 0.1)
    with pytest.raises(ConfigError, match="name of its own"):
        read_score_names(["a=x", "a=y"])
    with pytest.raises(ConfigError, match="'mid' is neither"):
        read_score_names(["a:mid=x"])


def test_our_markdown_becomes_html():
    text = "# No\n\n## A & B\n\n**Yes** <i>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- x\n- y\n"
    html = markdown_html(text)
    assert "No" not in html
    assert "<h2>A &amp; B</h2>" in html
    assert "<b>Yes</b> &lt;i&gt;" in html
    assert '<th scope="row">1</th><td>2</td>' in html
    assert html.count("<li>") == 2


def note(path, method, flops, order="top"):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": {"method": method, "order": order, "data": "corpus"},
        "scoring": {"flops": flops, "documents": 9, "tokens": 9},
    }
    path.write_text(json.dumps(content))


def test_what_a_run_chose_by_is_found_beside_its_domains(tmp_path):
    note(tmp_path / "a.selection.json", "ppl", 1e9, order="low")
    note(tmp_path / "a-b.selection.json", "less", 2e9)

    def chosen(*names):
        domains = {name: {"train": [str(tmp_path / name)]} for name in names}
        return chosen_of({"domains": domains})

    assert chosen("a_text_document") == type(chosen())(method="ppl-low", flops=1e9)
    assert chosen("a-b_text_document").method == "less"
    assert chosen("c_text_document").method == "random"
    both = chosen("a_text_document", "a-b_text_document")
    assert both == type(both)(method="less+ppl-low", flops=3e9)
    (tmp_path / "a.selection.json").write_text("{}")
    with pytest.raises(DataError, match="choose them again"):
        chosen("a_text_document")


CONFIG = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "vocab_size": 128,
    "train_iters": 60,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
}


def finished(folder, chosen, **facts):
    write_run(folder, **facts)
    domains = {name: {"train": str(chosen)} for name in ("code", "prose", "names")}
    content = {**CONFIG, "domains": domains, "run_dir": str(folder)}
    (folder / "config.yml").write_text(yaml.safe_dump(content))
    return folder


def test_finished_runs_become_rows(tmp_path):
    note(tmp_path / "data" / "a.selection.json", "ppl", 1e9)
    runs = tmp_path / "runs"
    finished(runs / "one", tmp_path / "data" / "a_text_document", gain=0.5, seed=3)
    finished(runs / "two", tmp_path / "data" / "b_text_document", steps=20, planned=20)
    rows = {row.method: row for row in read_finished([runs], task="own")}
    assert set(rows) == {"ppl", "random", "none"}
    config = load_config([str(runs / "one" / "config.yml")])
    tokens = sum(
        sum(json.loads(line)["tokens"].values())
        for line in (runs / "one" / "mixture.jsonl").read_text().splitlines()
    )
    assert rows["ppl"].training == pytest.approx(training_flops(config.model, tokens))
    assert rows["ppl"].choosing == 1e9
    assert rows["ppl"].seed is None or rows["ppl"].task == "own"
    records = (runs / "one" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["valid_loss"] for line in records if "valid_loss" in line]
    assert rows["ppl"].performance == pytest.approx(np.mean(list(losses[-1].values())))
    one = read_finished([runs / "one"], measure="loss/code")[0]
    assert one.performance == pytest.approx(losses[-1]["code"])
    if "none" in rows:
        assert rows["none"].training == 0
    for measure, match in (("loss/cod", "did you mean 'code'"), ("exam/acc", "no task")):
        with pytest.raises(DataError, match=match):
            read_finished([runs], measure=measure)
    with pytest.raises(DataError, match="no such folder"):
        read_finished([tmp_path / "none"])


def test_finished_runs_are_fitted_as_losses(tmp_path):
    """Losses of runs of several lengths, written as train.py does."""
    for steps in (20, 40, 60, 80, 100):
        for seed in (1, 2):
            # 1 - exp(-2 share): the fall of the law, from 6.1 to 3.1 nats.
            fall = 3.0 * (1 - np.exp(-2 * steps / 100)) - 3.0
            folder = tmp_path / f"r{steps}-{seed}"
            finished(
                folder,
                tmp_path / "plain",
                steps=steps,
                planned=steps,
                gain=fall,
                seed=seed,
                validate_every=20,
            )
    out = tmp_path / "law"
    assert command(fit, "--runs", *sorted(tmp_path.glob("r*")), "--out", out) == 0
    found = json.loads((out / "gains.json").read_text())
    assert found["better"] == "lower"
    assert found["unit"] == "nats per token"
    one = found["gains"][0]
    assert one["method"] == "random"
    assert one["law"] == pytest.approx([6.1, 2.0, 3.1], rel=0.02)
