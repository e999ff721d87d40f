"""A replayed trace: held to a replay of a few lines, figures to the page, words to the terminal."""

import html as html_module
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from eplb_rs import InvalidInputError, Planner, Topology, cli
from eplb_rs.loads import read_loads
from eplb_rs.scenarios import Outlook
from eplb_rs.shares import Splitter
from eplb_rs.simulate import Links, simulate
from eplb_rs.simulate_page import page
from eplb_rs.simulate_report import SimulationReport
from recordings import ESFT
from reference import rebalance_experts
from scipy.optimize import linprog

LINKS = Links(17.3e6, 400.0, 50.0)


@pytest.fixture(scope="module")
def trace():
    return read_loads(ESFT)


@pytest.fixture(scope="module")
def report(trace):
    """32 windows of 1,024 tokens on 72 slots of 8 GPUs, every policy and way of splitting."""
    simulation = simulate(
        trace,
        Topology(1, 8, 9),
        merge=4,
        estimator="last",
        shares=["uniform", "past", "arriving"],
        links=LINKS,
        max_moves=400,
    )
    return SimulationReport(simulation=simulation, trace=trace, assumed={"--nodes": 1})


def outcome(simulation, policy, shares="uniform"):
    (found,) = (one for one in simulation.outcomes if (one.policy, one.shares) == (policy, shares))
    return found


def rank_loads(phy2log, load, num_ranks):
    """`[L, D]`, what ranks carry if replicas share evenly."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in phy2log])
    share = np.take_along_axis(load / counts, phy2log, axis=1)
    return share.reshape(len(load), num_ranks, -1).sum(axis=2)


def balance(loads):
    return loads.mean(axis=1).sum() / loads.max(axis=1).sum()


def moves(before, after, num_ranks):
    """Experts that arrive on a rank which did not hold them."""
    return sum(
        len(set(new) - set(old))
        for a, b in zip(before, after, strict=True)
        for old, new in zip(a.reshape(num_ranks, -1), b.reshape(num_ranks, -1), strict=True)
    )


# The replay


def test_deepseek_is_what_a_few_lines_of_numpy_make_of_it(trace, report):
    windows = trace.loads[:128].reshape(32, 4, 26, 64).sum(axis=1)
    plans = [rebalance_experts(window, 72, 1, 1, 8)[0] for window in windows[:-1]]
    found = outcome(report.simulation, "deepseek")
    expected = [balance(rank_loads(*pair, 8)) for pair in zip(plans, windows[1:], strict=True)]
    np.testing.assert_allclose(found.balance, expected, rtol=1e-6)
    assert found.mean_balance == pytest.approx(np.mean(expected), rel=1e-6)
    pooled = [rank_loads(*pair, 8) for pair in zip(plans, windows[1:], strict=True)]
    mean = sum(loads.mean(axis=1) for loads in pooled)
    largest = sum(loads.max(axis=1) for loads in pooled)
    np.testing.assert_allclose(found.layer_balance, mean / largest, rtol=1e-6)
    assert found.total_balance == pytest.approx(mean.sum() / largest.sum(), rel=1e-6)
    assert found.steps.windows.tolist() == list(range(1, 32))
    assert found.steps.moves[0] == 0
    arrived = [moves(a, b, 8) for a, b in pairwise(plans)]
    assert found.steps.moves[1:].tolist() == arrived


def test_trivial_and_oracle(trace, report):
    windows = trace.loads[:128].reshape(32, 4, 26, 64).sum(axis=1)
    start = np.tile(np.arange(72) % 64, (26, 1))
    found = outcome(report.simulation, "trivial")
    expected = [balance(rank_loads(start, window, 8)) for window in windows[1:]]
    np.testing.assert_allclose(found.balance, expected, rtol=1e-6)
    assert len(found.steps) == 0
    planner = Planner(Topology(1, 8, 9), policy="balanced")
    found = outcome(report.simulation, "oracle")
    expected = [planner.plan(window).balance for window in windows[1:]]
    np.testing.assert_allclose(found.balance, expected, rtol=1e-12)
    assert found.balance.min() > 0.99


def test_balanced_goes_on_from_the_plan_in_force_within_its_budget(trace, report):
    windows = trace.loads[:128].reshape(32, 4, 26, 64).sum(axis=1)
    planner = Planner(Topology(1, 8, 9), policy="balanced")
    plan, scores = None, {"uniform": [], "past": [], "arriving": []}
    for past, window in pairwise(windows):
        plan = planner.plan(past, previous=plan, max_moves=None if plan is None else 400)
        splitter = Splitter(plan)
        for name, rank_load in (
            ("uniform", plan.with_load(window).rank_load),
            ("past", splitter.split(past).applied_to(window).rank_load),
            ("arriving", splitter.split(window).rank_load),
        ):
            scores[name].append(balance(rank_load))
    for name, expected in scores.items():
        found = outcome(report.simulation, "balanced", name)
        np.testing.assert_allclose(found.balance, expected, rtol=1e-6)
        assert 0 < found.steps.moves.max() <= 400


def test_scenarios_are_the_windows_since_the_last_shift(trace):
    """Each way of splitting has plans of its own, made with it in mind."""
    loads = trace.loads[:128, :8]  # of eight layers
    windows = loads.reshape(16, 8, 8, 64).sum(axis=1).astype(np.float32)
    simulation = simulate(
        windows, Topology(1, 8, 9), policies="scenarios", max_moves=144, iterations=200
    )
    assert (np.flatnonzero(simulation.shifted) + 1).tolist() == [4, 8, 12]
    planner = Planner(Topology(1, 8, 9), policy="balanced", iterations=200)
    for shares, split in (("uniform", "uniform"), ("arriving", "shares")):
        plan, expected = None, []
        for number in range(1, 16):
            since = max(start for start in (0, 4, 8, 12) if start < number)
            plan = planner.plan_windows(
                windows[max(since, number - 8) : number],
                previous=plan,
                max_moves=None if plan is None else 144,
                split=split,
                outlook=replace(Outlook.for_split(split), shift_threshold=None),
            )
            met = plan.with_load(windows[number])
            met = met.with_shares() if shares == "arriving" else met
            expected.append(met.balance)
        found = outcome(simulation, "scenarios", shares)
        np.testing.assert_allclose(found.balance, expected, rtol=1e-6)
        assert 0 < found.steps.moves.max() <= 144
        assert found.steps.plan_us.min() > 0


def test_an_arriving_split_is_the_optimum_of_a_linear_program(report, trace):
    """The last window under the reference's plan: a layer's least largest rank load."""
    windows = trace.loads[120:128].reshape(2, 4, 26, 64).sum(axis=1)
    phy2log = rebalance_experts(windows[0], 72, 1, 1, 8)[0]
    total = 0.0
    for row, load in zip(phy2log, windows[1], strict=True):
        # Variables: tokens of each slot, then the level.
        ranks = np.zeros((8, 73))
        ranks[np.arange(72) // 9, np.arange(72)] = 1
        ranks[:, 72] = -1
        experts = np.zeros((64, 73))
        experts[row, np.arange(72)] = 1
        cost = np.eye(73)[72]
        total += linprog(cost, ranks, np.zeros(8), experts, load).fun
    found = outcome(report.simulation, "deepseek", "arriving")
    assert found.largest[-1] == pytest.approx(total, rel=1e-6)


def test_plans_are_made_at_intervals_and_serve_until_the_next():
    rng = np.random.default_rng(0)
    trace = rng.integers(1, 100, (11, 2, 6)).astype(np.float32)
    simulation = simulate(
        trace,
        Topology(1, 2, 4),
        policies="deepseek",
        shares="uniform",
        estimator="average:2",
        interval=3,
        shift_threshold=None,
    )
    (found,) = simulation.outcomes
    assert found.steps.windows.tolist() == [1, 4, 7, 10]
    expected = []
    for number in range(1, 11):
        planned = (number - 1) // 3 * 3  # the last window that the plan could know
        estimate = trace[max(planned - 1, 0) : planned + 1].mean(axis=0)
        phy2log = rebalance_experts(estimate, 8, 1, 1, 2)[0]
        expected.append(balance(rank_loads(phy2log, trace[number], 2)))
    np.testing.assert_allclose(found.balance, expected, rtol=1e-6)


def test_windows_after_a_shift_are_stale_until_the_next_plan():
    law, code = np.tile([60.0, 30, 5, 5], (1, 1)), np.tile([5.0, 5, 30, 60], (1, 1))
    trace = np.array([law] * 7 + [code] * 7)
    simulation = simulate(trace, Topology(1, 2, 3), interval=4, policies=["deepseek"])
    # Windows 1 to 13; plans serve from 1, 5, 9, 13; the domain shifts with window 7.
    assert (np.flatnonzero(simulation.shifted) + 1).tolist() == [7]
    assert (np.flatnonzero(simulation.stale) + 1).tolist() == [7, 8]


def test_idle_windows_are_taken():
    trace = np.zeros((6, 2, 4))
    trace[3] = [[1, 2, 3, 4], [0, 0, 0, 0]]
    simulation = simulate(trace, Topology(1, 2, 3), shares=["uniform", "past", "arriving"])
    for one in simulation.outcomes:
        assert one.balance.shape == (5,)
        assert (one.balance[[0, 1, 3, 4]] == 1).all()
        assert one.layer_balance[1] == 1


def test_threads_and_repeats_change_no_figure(trace):
    def figures(threads):
        simulation = simulate(trace, Topology(1, 8, 9), merge=8, threads=threads)
        return [(one.largest.tolist(), one.steps.moves.tolist()) for one in simulation.outcomes]

    assert figures(1) == figures(1) == figures(2)


def test_progress_is_told(trace):
    told = []
    simulate(trace, Topology(1, 8, 9), merge=16, progress=lambda *pair: told.append(pair))
    assert told == [(number, 8) for number in range(1, 9)]


@pytest.mark.parametrize(
    ("settings", "code", "argument"),
    [
        ({"trace": np.ones((2, 4))}, "wrong_shape", "trace"),
        ({"trace": np.ones((1, 2, 4))}, "too_small", "trace"),
        ({"trace": [[[1, 2], [3]]]}, "wrong_type", "trace"),
        ({"trace": -np.ones((3, 2, 4))}, "negative", "trace"),
        ({"trace": np.full((3, 2, 4), "x")}, "wrong_dtype", "trace"),
        ({"merge": 2}, "too_small", "trace"),
        ({"merge": 0}, "not_positive", "merge"),
        ({"interval": 1.5}, "not_integer", "interval"),
        ({"policies": ["greedy"]}, "unknown", "policies"),
        ({"policies": []}, "empty", "policies"),
        ({"policies": 3}, "unknown", "policies"),
        ({"shares": ["some"]}, "unknown", "shares"),
        ({"estimator": "tea leaves"}, "unknown", "estimator"),
        ({"max_moves": -1}, "negative", "max_moves"),
        ({"num_groups": 3}, "not_divisor", "num_groups"),
        ({"topology": 8}, "wrong_type", "topology"),
        ({"topology": Topology(1, 1, 3)}, "too_small", "num_replicas"),
        ({"trace": np.ones((3, 2, 0))}, "empty", "trace"),
        ({"links": 17.3e6}, "wrong_type", "links"),
        ({"links": Links(0)}, "out_of_range", "expert_bytes"),
        ({"links": Links(1, 1, float("inf"))}, "out_of_range", "inter_node_gb_s"),
        ({"links": Links(1, 1)}, "inconsistent", "inter_node_gb_s"),
    ],
)
def test_what_cannot_be_replayed_is_refused(settings, code, argument):
    given = {"trace": np.ones((3, 2, 4)), "topology": Topology(1, 2, 3)} | settings
    with pytest.raises(InvalidInputError) as caught:
        simulate(given.pop("trace"), given.pop("topology"), **given)
    assert (caught.value.code, caught.value.argument) == (code, argument)


# What it says


def test_figures_are_json_and_as_documented(report):
    figures = json.loads(json.dumps(report.figures(), allow_nan=False))
    documented = set(re.findall(r"``([a-z_]+)``", SimulationReport.figures.__doc__))
    for part in (figures, figures["outcomes"][0], figures["windows"][0], figures["verdict"]):
        assert set(part) <= documented
    assert len(figures["windows"]) == len(figures["outcomes"][0]["balance"]) == 31
    assert [window["window"] for window in figures["windows"] if window["shifted"]] == [8, 16, 24]
    assert [window["label"] for window in figures["windows"]][7:9] == ["translation"] * 2


def test_the_verdict_prefers_few_moves_among_equals(report):
    verdict = report.verdict
    able = [one for one in report.simulation.outcomes if one.policy != "oracle"]
    best = max(one.mean_balance for one in able)
    good = [one for one in able if one.mean_balance >= best - 0.005]
    assert verdict.outcome in good
    fewest = min(one.steps.moves_per_step for one in good)
    assert verdict.outcome.steps.moves_per_step == fewest
    assert verdict.headline.startswith(f"Use {verdict.outcome.policy}: plan anew after every")


def test_where_moves_cost_more_than_they_save_experts_stay(report):
    def verdict(window_s):
        return SimulationReport(simulation=report.simulation, window_s=window_s).verdict

    assert verdict(0.001).outcome.policy == "trivial"
    assert verdict(0.001).headline.startswith("Leave the experts where they are")
    assert verdict(10.0).outcome.policy != "trivial"
    # What is said to pay does.
    pays = re.search(r"more than ([\d.]+) (m?s) a window", " ".join(verdict(10.0).reasons))
    seconds = float(pays[1]) * (0.001 if pays[2] == "ms" else 1)
    chosen, simulation = verdict(10.0).outcome, report.simulation
    gain = 1 - outcome(simulation, "trivial").mean_balance / chosen.mean_balance
    assert seconds * gain == pytest.approx(chosen.steps.transfer_s[1:].mean(), rel=0.01)
    with pytest.raises(InvalidInputError):
        SimulationReport(simulation=report.simulation, window_s=-1.0)


@pytest.fixture(scope="module")
def text(report):
    return page(report)


def test_every_number_of_the_page_is_in_the_figures(report, text):
    figures = report.figures()
    tables = re.findall(r"<table>.*?</table>", text, re.DOTALL)
    cells = [
        [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.split(r"<tr[^>]*>", table)[1:]]
        for table in tables
    ]
    names, *rows = cells[0]
    assert len(rows) == len(figures["outcomes"]) == 12
    for row, one in zip(rows, figures["outcomes"], strict=True):
        cell = dict(zip(names, row, strict=True))
        assert cell["policy"].split()[0] == one["policy"]
        assert cell["shares"] == one["shares"]
        assert cell["balance"] == f"{one['mean_balance']:.4f}"
        assert cell["worst"] == f"{one['worst_balance']:.4f}"
        assert cell["after shift"] == f"{one['balance_after_shifts']:.4f}"
        assert cell["time"] == f"{100 * one['relative_time']:.0f} %"
        if one["num_plans"]:
            assert cell["moves"] == f"{one['moves_per_plan']:.0f}"
            assert cell["of slots"] == f"{100 * one['moves_share']:.1f} %"
            size = {"M": 1e6, "G": 1e9}[cell["bytes"].split()[1][0]]
            assert float(cell["bytes"].split()[0]) * size == pytest.approx(
                one["bytes_per_plan"], rel=1e-3
            )
            assert in_us(cell["moved in"]) == pytest.approx(
                1e6 * one["transfer_s_per_plan"], rel=0.01
            )
            assert in_us(cell["planned in"]) == pytest.approx(one["plan_us"]["median"], rel=0.02)
            assert in_us(cell["at most"]) == pytest.approx(one["plan_us"]["max"], rel=0.02)
        if one["split_us"]:
            assert in_us(cell["split in"]) == pytest.approx(one["split_us"]["median"], abs=1)
    for number, row in enumerate(cells[1][1:]):
        window = figures["windows"][number]
        assert row[:4] == [
            str(window["window"]),
            window["label"],
            f"{window['distance']:.3f}",
            "shift" * window["shifted"],
        ]
        assert row[4:] == [f"{one['balance'][number]:.4f}" for one in figures["outcomes"]]
    for number, row in enumerate(cells[2][1:]):
        expected = [f"{one['layer_balance'][number]:.4f}" for one in figures["outcomes"]]
        assert row == [str(report.trace.layer_ids[number]), *expected]
    plain = html_module.unescape(text)
    for sentence in (figures["verdict"]["headline"], *figures["verdict"]["reasons"]):
        assert sentence in plain


def in_us(text):
    number, unit = text.split()
    return float(number) * {"us": 1.0, "ms": 1e3, "s": 1e6}[unit]


def test_the_page_needs_nothing_else_and_is_described(text):
    assert not re.search(r'(src|href|srcset)="(?!data:)', text)
    assert "<script" not in text
    assert "url(" not in text
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert len(re.findall(r"<h1>", text)) == 1
    pictures = re.findall(r"<picture>.*?</picture>", text, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.count("<source") == 3
        assert re.search(r'<img alt="[^"]{40,}"', picture)


def test_names_from_the_trace_are_escaped(report):
    simulation = simulate(np.random.default_rng(0).random((4, 2, 6)), Topology(1, 2, 4))
    object.__setattr__(simulation, "labels", ("<script>", "a", "$x$"))
    text = page(SimulationReport(simulation=simulation))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_text_fits_the_screen(report):
    from eplb_rs.report import Style

    for width in (40, 80, 132):
        text = report.text(Style(width=width))
        assert max(map(len, text.splitlines())) <= width
    assert report.text(Style(blocks=False)).isascii()
    assert "Use " in report.text()


# The command


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = cli.main(["simulate", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_prints_and_writes_the_same(run, tmp_path):
    options = [ESFT, "--merge", 8, "--gpus", 8, "--replicas", 72, "--policy", "deepseek", "trivial"]
    code, out, err = run(*options, "--html", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert "wrote" in out
    code, printed, _ = run(*options, "--json")
    figures = json.loads(printed)
    text = (tmp_path / "page.html").read_text()
    for one in figures["outcomes"]:
        assert f"{one['mean_balance']:.4f}" in out
        assert f"{one['mean_balance']:.4f}" in text
    assert figures["assumed"] == {"--nodes": 1, "--groups": 1}
    assert figures["verdict"]["headline"] in html_module.unescape(text)


def test_a_part_of_the_slots_as_the_budget(run):
    options = [ESFT, "--merge", 16, "--gpus", 8, "--policy", "balanced", "--json"]
    _, part, _ = run(*options, "--max-moves", "10%")
    _, number, _ = run(*options, "--max-moves", 26 * 72 // 10)
    assert json.loads(part)["max_moves"] == json.loads(number)["max_moves"] == 187
    plans = json.loads(part)["outcomes"][0]["plans"]
    assert 0 < max(plans["moves"]) <= 187


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "greedy"], ["--policy", "trivial or deepseek"]),
        (["--shares", "some"], ["--shares", "uniform or past or arriving"]),
        (["--estimator", "x"], ["--estimator", "backtest"]),
        (["--merge", "129"], ["TRACE", "at least 2"]),
        (["--max-moves", "x%"], ["--max-moves", "25%"]),
        (["--max-moves", "-1"], ["--max-moves"]),
        (["--gb-s", "50"], ["--expert-bytes", "--gb-s"]),
        (["--expert-bytes", "1", "--window-s", "1"], ["--gb-s", "--window-s"]),
        (["--expert-bytes", "1", "--gb-s", "0"], ["--gb-s (0.0)"]),
        (["--expert-bytes", "1", "--gb-s", "1", "--window-s", "nan"], ["--window-s (nan)"]),
        (["--html", "nowhere/page.html"], ["--html", "No such folder"]),
        (["--html", str(ESFT)], ["--html", "another file"]),
        (["--replicas", "65"], ["--replicas (65)", "64, 72"]),
        (["--interval", "0"], ["--interval"]),
    ],
)
def test_the_command_refuses_in_its_own_words(run, options, words):
    code, out, err = run(ESFT, "--gpus", "8", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("eplb simulate: error: ")
    for word in words:
        assert word in err


def test_help_has_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "eplb simulate trace.json --gpus 8 --html page.html" in out
    for name in (
        "trivial",
        "deepseek",
        "balanced",
        "scenarios",
        "oracle",
        "uniform",
        "past",
        "arriving",
    ):
        assert re.search(rf"^  {name} ", out, re.MULTILINE)


def test_progress_is_shown_where_it_is_asked_for():
    command = [sys.executable, "-m", "eplb_rs", "simulate", str(ESFT), "--merge", "16"]
    command += ["--gpus", "8", "--policy", "trivial"]
    for asked in (True, False):
        done = subprocess.run(
            [*command, *["--progress"] * asked], capture_output=True, text=True, check=True
        )
        assert ("8/8" in done.stderr) is asked
        assert "trivial" in done.stdout
