"""The text that people read, and the figures that programs read."""

import json
import re

import eplb_rs
import numpy as np
import pytest
from eplb_rs._words import duration, id_ranges, printable, quantity
from eplb_rs.loads import read_loads
from eplb_rs.report import PlanningTime, Report, Style, placement_before
from recordings import ESFT, deepseek_r1_report


@pytest.fixture(scope="module")
def report():
    return deepseek_r1_report(time=PlanningTime(512.3, 100), assumed={"--nodes": 4})


def small(load, topology, **options):
    return Report(plan=eplb_rs.Planner(topology, policy="deepseek", **options).plan(load))


TEXT = """\
loads       deepseek_r1_1k1k.json (SGLang recorder)
model       58 layers x 256 experts in 8 groups
            layers 0-2 carry no load and are left out
machines    4 nodes x 8 GPUs x 9 slots = 288 slots, 32 spare
policy      deepseek, hierarchical: each group of experts stays on one node
assumed     --nodes 4
planned in  0.512 ms (median of 100 calls)

                                       before     after     bound
balance (mean / max rank load)         0.2266    0.7947    0.7996
imbalance (max / mean)                  4.413     1.258     1.251
imbalance of the worst layer            8.235     1.766     1.680
largest rank load, sum of layers      68.53 M   19.54 M   19.42 M
largest rank load, above the bound    341.3 %     0.6 %     0.0 %
duplicates (expert twice on a rank)         0       170         0

worst layers  before   after        hottest experts   of layer  replicas  each*
          49   2.457   1.766        layer 32    220      12.4 %         7   0.57
          14   4.444   1.654        layer 38     42      12.4 %         7   0.57
                                        * load of a replica; 1 = mean rank load

Rank loads of layer 57 (the worst before), a bar per rank; 1 = mean
      before, max 8.24                   after, max 1.62
  8.2     █
          █
          █
          █                     ▆
          █▁                 ▃▃ █        ▁▁▁▁▁▁▁▁
      ▂▁▂███▅▅█▂▂▁▂▃▃▃▅▁▁▄▂▁▄██▄██▃▂▃▂   ████████▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▄▄▄▄▄▄▄▄
 rank 0       8       16      24         0       8       16      24
"""


def test_text(report):
    assert report.text(top=2) == TEXT


def test_text_fits_a_screen(report):
    lines = report.text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("gpus", [1, 3, 32, 64, 144, 1000])
def test_bars_fit_any_width_and_any_number_of_ranks(width, blocks, gpus):
    load = np.random.default_rng(0).integers(0, 1000, (3, 64))
    slots = -(-64 // gpus) + 1
    text = small(load, eplb_rs.Topology(1, gpus, slots)).text(Style(width=width, blocks=blocks))
    assert blocks or text.isascii()
    assert ("Rank loads" in text) == (gpus > 1)
    bars = "".join(text.partition("Rank loads")[1:]).splitlines()
    assert all(len(line) <= width for line in bars)


def test_colours_do_not_change_the_text(report):
    coloured = report.text(Style(colour=True))
    assert "\x1b[32m" in coloured
    bare = re.sub(r"\x1b\[\d+m", "", coloured)
    assert [line.rstrip() for line in bare.splitlines()] == report.text().splitlines()
    assert "\x1b" not in report.text()


def test_ascii(report):
    for text in (report.text(Style(blocks=False)), report.layer_text(57, Style(blocks=False))):
        assert text.isascii()


def test_layer_text(report):
    text = report.layer_text(57)
    assert text.startswith("Layer 57: 256 experts in 288 slots of 32 ranks\n")
    assert "imbalance 8.235 before, 1.621 after, 1.620 at best; 2 duplicates" in text
    assert "222x2" in text
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if re.match(r" *\d+ +\S+ k", line)]
    assert len(rows) == 32
    # Every slot of the layer is there.
    held = [name for row in rows for name in row.split()[5:]]
    slots = sum(int(name.partition("x")[2] or 1) for name in held)
    assert slots == 288


def test_layer_that_is_not_there(report):
    for call in (report.layer_text, report.row_of, lambda layer: report.figures(layer=layer)):
        with pytest.raises(eplb_rs.InvalidInputError) as caught:
            call(2)
        assert caught.value.code == "out_of_range"
        assert "3-60" in caught.value.expected


def test_figures(report):
    figures = report.figures(top=3)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["format"] == "eplb-rs report"
    plan, before = report.plan, placement_before(report.plan)
    assert figures["after"]["balance"] == plan.balance
    assert figures["before"]["balance"] == before.balance
    assert figures["before"]["worst_layer"] == 57
    assert figures["groups_stay"] is True
    assert figures["loads"]["empty_layers"] == [0, 1, 2]
    assert figures["planning"] == {"median_us": 512.3, "num_calls": 100}
    assert figures["lower_bound"] == pytest.approx(plan.lower_bound.sum())
    largest = plan.rank_load.max(axis=1)
    assert figures["above_bound"] == pytest.approx(largest.sum() / plan.lower_bound.sum() - 1)
    assert [layer["layer"] for layer in figures["layers"]] == list(range(3, 61))
    for row, layer in enumerate(figures["layers"]):
        assert layer["imbalance_after"] == plan.layer_imbalance[row]
        assert layer["largest_rank_load_after"] == largest[row]
        assert layer["largest_rank_load_before"] >= layer["lower_bound"]
    assert len(figures["hottest_experts"]) == 3
    one = report.figures(layer=57)["layers"]
    assert [layer["layer"] for layer in one] == [57]
    assert one[0]["rank_load_after"] == plan.rank_load[54].tolist()


def test_hottest_experts_are_those_of_the_largest_share():
    load = [[1, 1, 1, 97], [100, 100, 700, 100]]
    hot = small(load, eplb_rs.Topology(1, 2, 3)).hottest_experts(3)
    assert [(h.layer_id, h.expert, h.share) for h in hot] == [
        (0, 3, pytest.approx(0.97)),
        (1, 2, pytest.approx(0.7)),
        (1, 0, pytest.approx(0.1)),
    ]
    assert hot[0].num_replicas == 3
    assert hot[0].per_replica == pytest.approx(0.97 * 2 / 3)


def test_worst_layers_with_ties():
    report = small(np.ones((5, 4)), eplb_rs.Topology(1, 2, 2))
    assert report.worst_layers(3) == [0, 1, 2]
    assert report.worst_layers(9) == [0, 1, 2, 3, 4]


def test_before_is_what_engines_start_with(report):
    slots = np.arange(288) % 256
    assert (report.before.phy2log == slots).all()
    assert report.before.layer_ids == report.plan.layer_ids


@pytest.mark.parametrize(
    ("topology", "groups", "want"),
    [
        ((4, 8, 9), 8, "hierarchical: each group of experts stays on one node"),
        ((4, 8, 9), 1, "global: any expert on any node"),
        ((4, 8, 9), 2, "global: any expert on any node"),
        ((1, 32, 9), 8, "on one node"),
    ],
)
def test_reach_is_read_off_the_placement(report, topology, groups, want):
    load = report.plan.expert_load
    other = small(load, eplb_rs.Topology(*topology), num_groups=groups)
    assert dict(other.facts())["policy"] == f"deepseek, {want}"


def test_zero_load():
    report = small(np.zeros((2, 4)), eplb_rs.Topology(1, 2, 3))
    for text in (report.text(), report.layer_text(1), report.text(Style(blocks=False))):
        assert "nan" not in text
        assert "inf" not in text
    figures = report.figures(layer=0)
    json.dumps(figures, allow_nan=False)
    assert figures["above_bound"] == 0.0
    assert figures["after"]["balance"] == 1.0


def test_windows_are_named():
    trace = read_loads(ESFT, windows="30:34")
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 8, 9)).plan(trace.total)
    text = Report(plan=plan, trace=trace).text()
    assert "windows 30-33 of 129 (law, translation), summed" in text


def test_names_from_outside_cannot_move_the_cursor(tmp_path):
    content = {"load_history": [{"logical_expert_load": [[1, 2]]}] * 2, "labels": ["\x1b[2J", "b"]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    trace = read_loads(path, windows=0)
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 2, 1)).plan(trace.total)
    text = Report(plan=plan, trace=trace).text()
    assert "\x1b" not in text
    assert r"\x1b[2J" in text


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.0, "0"),
        (7.0, "7"),
        (0.25, "0.2500"),
        (12.345, "12.35"),
        (999.0, "999"),
        (999.94, "999.9"),
        (1000.0, "1.000 k"),
        (999_949.0, "999.9 k"),
        (999_999.0, "1.000 M"),
        (15.53e6, "15.53 M"),
        (2.5e9, "2.500 G"),
        (1e15, "1000 T"),
    ],
)
def test_quantity(value, want):
    assert quantity(value) == want


@pytest.mark.parametrize(
    ("time_us", "want"),
    [(0.4, "0 us"), (38.2, "38 us"), (374.0, "0.374 ms"), (12_345.0, "12.3 ms"), (2e6, "2.00 s")],
)
def test_duration(time_us, want):
    assert duration(time_us) == want


def test_id_ranges():
    assert id_ranges([]) == ""
    assert id_ranges([3]) == "3"
    assert id_ranges([5, 1, 0, 2, 7]) == "0-2, 5, 7"


def test_printable():
    assert printable("naïve café") == "naïve café"
    assert printable("a\nb\x1b[0m") == r"a\nb\x1b[0m"
