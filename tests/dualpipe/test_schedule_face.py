"""The Python face: values, round trips, refusals, pictures, the command line."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from dualpipe import METHODS, Costs, DeadlockError, Kind, Schedule, ScheduleError
from dualpipe.cli import main
from dualpipe.draw import grid
from hypothesis import given
from hypothesis import strategies as st
from traces import check_trace

sizes = st.tuples(st.sampled_from(METHODS), st.integers(1, 4), st.integers(1, 9), st.booleans())


def made(size: tuple[str, int, int, bool], **options: object) -> Schedule:
    method, half, micro_batches, forward_only = size
    return Schedule.generate(method, 2 * half, micro_batches, forward_only=forward_only, **options)


@given(sizes, st.booleans())
def test_round_trips(size: tuple[str, int, int, bool], transfers: bool) -> None:
    schedule = made(size, transfers=transfers)
    assert Schedule.parse(schedule.text()) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    words = [
        str(step) for rank in range(schedule.num_ranks) for step in schedule.instructions(rank)
    ]
    lines = schedule.text().splitlines()[-schedule.num_ranks :]
    assert words == [word for line in lines for word in line.partition(":")[2].split()]


@given(sizes)
def test_placing_transfers_again_changes_nothing(size: tuple[str, int, int, bool]) -> None:
    schedule = made(size)
    assert schedule.compute_only().place_transfers() == schedule


@given(sizes, st.floats(0.1, 3), st.floats(0, 1))
def test_timelines_respect_the_order(
    size: tuple[str, int, int, bool], input_time: float, latency: float
) -> None:
    schedule = made(size)
    timeline = schedule.simulate(Costs(backward_input=input_time, latency=latency))
    ended: dict[tuple[bool, int, int, int], float] = {}
    started: dict[tuple[bool, int, int, int], float] = {}
    for rank in range(schedule.num_ranks):
        begin, end = timeline.bounds[rank : rank + 2]
        assert (timeline.start[begin + 1 : end] >= timeline.end[begin : end - 1]).all()
        stream = schedule.instructions(rank)
        offset = sum(len(schedule.instructions(r)) for r in range(rank))
        for at in range(begin, end):
            index = timeline.op[at] - offset
            for step in stream[index : index + 1 + (stream[index].kind is Kind.OVERLAP_F)]:
                if step.kind is not Kind.W:
                    forward = step.kind in {Kind.F, Kind.OVERLAP_F}
                    key = (forward, step.copy, step.stage, step.micro_batch)
                    started[key], ended[key] = timeline.start[at], timeline.end[at]
    for (forward, copy, stage, micro_batch), start in started.items():
        source = (forward, copy, stage + (-1 if forward else 1), micro_batch)
        if source in ended:
            ranks = schedule.placement[copy, [stage, source[2]]]
            moved = latency if ranks[0] != ranks[1] else 0.0
            assert start >= ended[source] + moved - 1e-9
    assert timeline.makespan == max(ended.values(), default=0) or timeline.makespan >= max(
        timeline.end
    )
    np.testing.assert_allclose(timeline.busy + timeline.idle, timeline.makespan)


WORDS = [
    f"{mark}{stage}{copy}{letter}{number}{tail}"
    for stage in (0, 1)
    for copy in ("", "'")
    for mark, letter, number, tail in (
        *(("", letter, number, "") for letter in "FBIW" for number in (0, 1)),
        *(
            (mark, letter, 0, tail)
            for letter in "fb"
            for mark, tail in (("<", ""), ("", ">"), ("", "!"))
        ),
        ("", "R", "", ""),
        ("", "R", "", "!"),
        ("", "U", "", ""),
    )
] + ["(0F0 1B1)", "(1F1 1'B0)"]


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=2, max_size=2), st.booleans()
)
def test_nonsense_is_refused_or_runs(streams: list[list[str]], two_copies: bool) -> None:
    """Whatever stands in a text, the answer is a value or a ScheduleError."""
    second = "copy 1: 2 micro-batches through ranks 1 0\n" if two_copies else ""
    rows = "".join(f"rank {rank}: {' '.join(words)}\n" for rank, words in enumerate(streams))
    text = (
        f"schedule x\nranks 2, stages 2\ncopy 0: 2 micro-batches through ranks 0 1\n{second}{rows}"
    )
    try:
        schedule = Schedule.parse(text, check=False)
    except ScheduleError:
        return
    assert Schedule.parse(schedule.text(), check=False) == schedule
    for call in (
        lambda: schedule.verify(activation_bytes=3, message_bytes=2),
        lambda: schedule.simulate(Costs(message_bytes=1.0), activation_bytes=3),
        lambda: schedule.simulate(sends="blocking", pairs="early_forward"),
        schedule.place_transfers,
        schedule.forward_only,
        schedule.to_csv,
    ):
        with contextlib.suppress(ScheduleError):
            call()


def test_values() -> None:
    schedule = Schedule.generate("dualpipe", 4, 8)
    assert schedule.micro_batches == (4, 4)
    assert schedule.placement.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert not schedule.placement.flags.writeable
    assert schedule != Schedule.generate("dualpipe", 4, 10)
    assert schedule != "schedule"
    assert "2 copies" in repr(schedule)
    with pytest.raises(TypeError):
        Schedule()
    with pytest.raises(ScheduleError):
        schedule.instructions(4)


@pytest.mark.parametrize(
    ("arguments", "options", "code"),
    [
        (("dualpipe", 3, 8), {}, "odd_ranks"),
        (("chimera", 1, 8), {}, "odd_ranks"),
        (("dualpipe", 0, 8), {}, "num_ranks"),
        (("1f1b", 3000, 8), {}, "num_ranks"),
        (("1f1b", -1, 8), {}, "num_ranks"),
        (("1f1b", 2.5, 8), {}, "num_ranks"),
        (("1f1b", True, 8), {}, "num_ranks"),
        (("1f1b", 2**70, 8), {}, "num_ranks"),
        (("1f1b", 2, 0), {}, "num_micro_batches"),
        (("1f1b", 2, "8"), {}, "num_micro_batches"),
        (("1f1b", 1000, 10**6), {}, "layout"),
        (("2f2b", 2, 8), {}, "unknown_method"),
        (("zbv", 2, 8), {"stages_per_rank": 3}, "stages_per_rank"),
        (("looped_bfs", 2, 8), {"stages_per_rank": 0}, "stages_per_rank"),
        (("looped_bfs", 2000, 8), {"stages_per_rank": 2000}, "layout"),
    ],
)
def test_generate_refuses(arguments: tuple, options: dict, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.generate(*arguments, **options)
    error = caught.value
    assert error.code == code
    assert str(error).startswith(f"`{error.argument}` ({error.got}) must be")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, str(copy)) == (error.code, str(error))


@pytest.mark.parametrize(
    ("costs", "code"),
    [
        (Costs(forward=-1.0), "negative_time"),
        (Costs(backward_weight=math.nan), "negative_time"),
        (Costs(forward=math.inf), "negative_time"),
        (Costs(latency=-0.1), "negative_time"),
        (Costs(bandwidth=0.0), "negative_time"),
        (Costs(overlap_factor=-1), "negative_time"),
        (Costs(rank_factor=[1.0]), "length"),
        (Costs(forward=[[1.0]]), "length"),
        (Costs(latency=[1.0, 2.0]), "length"),
        (Costs(pair=[1.0]), "length"),
        (Costs(forward="fast"), "not_a_number"),
        (Costs(forward=None), "negative_time"),
        (Costs(forward=1e308), "too_long"),
        (Costs(latency=math.inf), "too_long"),
        ({"forward": 1.0}, "costs"),
    ],
)
def test_simulate_refuses(costs: Costs, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.generate("1f1b", 2, 4).simulate(costs)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"transports": ["tcp"]}, "transports"),
        ({"transports": []}, "transports"),
        ({"transports": "eager"}, "transports"),
        ({"transports": None}, "transports"),
        ({"max_activations": 1}, "memory"),
        ({"max_activations": -1}, "max_activations"),
        ({"max_bytes": 5}, "sizes"),
        ({"max_bytes": 5, "activation_bytes": 10}, "memory"),
        ({"activation_bytes": [1.0]}, "length"),
        ({"activation_bytes": -1}, "sizes"),
    ],
)
def test_verify_refuses(options: dict, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.generate("1f1b", 2, 4).verify(**options)
    assert caught.value.code == code


GOOD = Schedule.generate("1f1b", 2, 2).text()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "text_ends"),
        ("schedule x", "text_ends"),
        ("hello", "unknown_line"),
        (GOOD.replace("ranks 2", "ranks two"), "unknown_line"),
        (GOOD.replace("ranks 2", "ranks 1"), "layout"),
        (GOOD.replace("through ranks 0 1", "through ranks 0"), "unknown_line"),
        (GOOD.replace("through ranks 0 1", "through ranks 0 7"), "layout"),
        (GOOD.replace("2 micro-batches", "0 micro-batches"), "layout"),
        (GOOD.replace("copy 0", "copy 1"), "unknown_line"),
        (GOOD.replace("0F0", "0X0"), "unknown_word"),
        (GOOD.replace("0F0", "0F9"), "unknown_place"),
        (GOOD.replace("0F0", "(0F0"), "torn_pair"),
        (GOOD.replace("0F0", "5F0"), "unknown_place"),
        (GOOD.replace("rank 1", "rank 2"), "unknown_line"),
        (GOOD + "rank 2:", "unknown_line"),
        (GOOD.replace("rank 0: 0F0 0f0>", "rank 0: 0f0> 0F0"), "order"),
        (GOOD.replace("1F0", "0F0"), "placement"),
    ],
)
def test_parse_refuses(text: str, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    assert caught.value.code == code


def test_comments_and_empty_lines() -> None:
    assert Schedule.parse("# mine\n\n" + GOOD.replace("\n", "  # why\n")).text() == GOOD


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"format": "dualpipe schedule", "version": 2}',
        '{"format": "dualpipe schedule", "version": 1}',
        Schedule.parse(GOOD).to_json().replace('"placement": [[0, 1]]', '"placement": 3'),
        Schedule.parse(GOOD).to_json().replace('"ranks": [', '"ranks": [3, '),
    ],
)
def test_from_json_refuses(document: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.from_json(document)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv"])
def test_files(tmp_path, suffix: str) -> None:
    path = tmp_path / f"zbv{suffix}"
    schedule = Schedule.generate("zbv", 4, 6)
    schedule.save(path)
    back = Schedule.load(path)
    assert back.compute_only() == schedule.compute_only()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ScheduleError, match="UTF-8"):
        Schedule.load(tmp_path / "binary.txt")


def test_deadlocks_pickle() -> None:
    # Both ranks wait for what the other one sends only after that.
    text = GOOD.replace("rank 0: 0F0 0f0>", "rank 0: <0b0 0F0 0f0>").replace(
        "0F1 0f1> <0b0", "0F1 0f1>"
    )
    with pytest.raises(DeadlockError) as caught:
        Schedule.parse(text)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, DeadlockError)
    assert (copy.waits, copy.transport, str(copy)) == (
        caught.value.waits,
        caught.value.transport,
        str(caught.value),
    )


def test_grid() -> None:
    schedule = Schedule.generate("dualpipe", 2, 4)
    assert grid(schedule.simulate()).splitlines() == [
        "rank 0 F0   F'0  F1   B'0  -    [F'1 B0]  -    B'1  -    I1   W1",
        "rank 1 F'0  F0   F'1  B0   -    [F1  B'0] -    B1   -    I'1  W'1",
    ]


def test_grid_marks_the_second_stage_of_a_rank() -> None:
    schedule = Schedule.generate("zbv", 2, 2)
    assert grid(schedule.simulate()).splitlines() == [
        "rank 0 F0  F1  .   F'0 I'0 W'0 F'1 I'1 W'1 I0  W0  .   I1  W1",
        "rank 1 .   F0  F'0 F1  F'1 I'0 W'0 I0  W0  I'1 W'1 I1  W1  .",
    ]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures(tmp_path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"dualpipe.{suffix}"
    figure = Schedule.generate("dualpipe", 4, 8).plot(path)
    assert path.stat().st_size > 5_000
    axes = figure.axes[0]
    # 16 computations of a kind a rank at most; one number for each of all of them.
    assert len(axes.texts) == sum(
        len(collection.get_paths()) for collection in axes.collections[:4]
    )
    with pytest.raises(ScheduleError):
        Schedule.generate("1f1b", 2, 2).plot(tmp_path / "picture.doc")


def test_pairs_are_cut_where_their_halves_meet() -> None:
    schedule = Schedule.generate("dualpipe", 2, 4)
    costs = Costs(forward=[3.0, 6.0], backward_input=1.0, backward_weight=2.0, overlap_factor=0.5)
    timeline = schedule.simulate(costs)
    assert timeline == schedule.simulate(costs)
    assert timeline != schedule.simulate()
    events = check_trace(timeline.to_perfetto())
    slices = [event for event in events if event["ph"] == "X"]
    pairs = [index for index, event in enumerate(slices) if event["cat"] == "pair"]
    assert pairs
    for index in pairs:
        whole, forward, backward = slices[index : index + 3]
        alone = [3.0, 6.0][forward["args"]["stage"]]
        assert forward["dur"] == pytest.approx(whole["dur"] * alone / (alone + 3.0), abs=0.2)
        assert forward["dur"] + backward["dur"] == whole["dur"]


def test_perfetto(tmp_path) -> None:
    schedule = Schedule.generate("dualpipev", 4, 8)
    timeline = schedule.simulate()
    trace = json.loads(timeline.to_perfetto(tmp_path / "trace.json", unit_us=10))
    assert json.loads((tmp_path / "trace.json").read_text()) == trace
    events = check_trace(json.dumps(trace))
    slices = [e for e in events if e["ph"] == "X"]
    pairs = [e for e in slices if e["cat"] == "pair"]
    assert len(slices) == len(timeline.op) + 2 * len(pairs)
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(timeline.makespan * 10)
    assert {e["tid"] for e in slices} == set(range(4))
    arrows = [e for e in events if e["ph"] == "s"]
    assert len(arrows) == schedule.verify().num_messages
    counts = [e["args"]["held"] for e in events if e["ph"] == "C"]
    assert max(counts) == timeline.peaks.activations.max()


@pytest.mark.parametrize("seed", range(4))
def test_traces_of_pairs_whose_second_half_waits(seed: int) -> None:
    random = np.random.default_rng(seed)
    forward, whole = random.uniform(0.8, 1.2, 4), random.uniform(1.6, 2.4, 4)
    costs = Costs(
        forward=forward, backward=whole, backward_input=1.0, backward_weight=1.0, latency=0.1
    )
    timeline = Schedule.generate("dualpipev", 2, 8).simulate(costs, pairs="early_forward")
    check_trace(timeline.to_perfetto())


@pytest.mark.parametrize("method", METHODS)
def test_traces_show_all_of_odd_times(method: str) -> None:
    schedule = Schedule.generate(method, 4, 8)
    costs = Costs(forward=1 / 3, backward_input=math.pi / 7, backward_weight=0.1, latency=0.01)
    for unit_us in (1000.0, 77.7):
        events = check_trace(schedule.simulate(costs).to_perfetto(unit_us=unit_us))
        assert sum(event["ph"] == "s" for event in events) == schedule.verify().num_messages


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["show", "dualpipe", "-p", "4", "-m", "8"], 0, "makespan 26"),
        (["show", "zbv", "-p", "2", "-m", "3", "--text"], 0, "rank 1: <1f0"),
        (["simulate", "dualpipev", "-p", "8", "-m", "16"], 0, "makespan 110"),
        (
            ["simulate", "zb_h1", "-p", "2", "-m", "3", "--forward", "1,2", "--json"],
            0,
            "bubble_ratio",
        ),
        (["verify", "1f1b", "-p", "4", "-m", "8"], 0, "right"),
        (["verify", "1f1b", "-p", "4", "-m", "8", "--max-activations", "3"], 1, "memory"),
        (["export", "zbv", "-p", "2", "-m", "3", "--format", "csv"], 0, "0F0,0F1,0F2,3F0"),
        (["export", "dualpipe", "-p", "2", "-m", "3", "--format", "csv"], 1, "which copy"),
        (["search", "--forward", "1x8", "-p", "4", "-m", "8", "--top", "2"], 0, "1. "),
        (["search", "--forward", "1x8", "-p", "4", "-m", "8", "--json"], 0, "wins_below_overlap"),
        (["search", "--forward", "1x2", "-p", "4", "-m", "8"], 1, "can be run"),
        (["show", "dualpipe", "-p", "3", "-m", "8"], 1, "`--ranks` (3) must be even"),
        (["show", "dualpipe", "-p", "4", "-m", "-8"], 1, "`--micro-batches` (-8)"),
        (["verify", "x.csv", "-p", "4"], 1, "the file says it"),
        (["show", "dualpipe"], 1, "--ranks"),
        (["show", "nothing.csv"], 1, "nothing.csv"),
        (["search", "-p", "4"], 1, "--layers"),
        (["simulate", "1f1b", "-p", "4", "-m", "2", "--forward", "1,2"], 1, "one for every stage"),
    ],
)
def test_command_line(arguments: list[str], status: int, says: str, capsys) -> None:
    assert main(arguments) == status
    out = capsys.readouterr()
    assert says in (out.err if status else out.out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "zbv", "-p", "2", "-m", "2", "--forward", "fast"], "'fast' must be a time"),
        (["simulate", "zbv", "-p", "2", "-m", "2", "--forward", "1x0"], "'1x0' must be a time"),
        (["search", "--forward", "1x99999999999", "-p", "2"], "must be a time"),
        (["search", "--forward", "1x8", "-p", "2", "--memory-gb", "nan"], "gigabytes"),
        (["search", "--forward", "1x8", "-p", "2", "--memory-gb", "inf"], "gigabytes"),
        (["search", "--forward", "1x8", "-p", "2", "--top", "-3"], "whole number"),
        (["search", "--forward", "1x8", "-p", "2", "-m", "four"], "whole number"),
    ],
)
def test_command_line_usage(arguments: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_a_folder_may_have_the_name_of_a_method(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "dualpipe").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["show", "dualpipe", "-p", "2", "-m", "4"]) == 0
    assert "makespan 12" in capsys.readouterr().out


def test_a_reader_may_leave_early() -> None:
    run = [sys.executable, "-m", "dualpipe", "show", "1f1b", "-p", "8", "-m", "400", "--text"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(8) == b"schedule"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_it_may_be_interrupted_and_have_no_output(monkeypatch) -> None:
    run = ["show", "1f1b", "-p", "2", "-m", "2"]
    monkeypatch.setattr(sys, "stdout", None)
    assert main(run) == 0

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Schedule, "generate", interrupted)
    assert main(run) == 130


def test_command_line_files(tmp_path, capsys) -> None:
    file = tmp_path / "zbv.csv"
    assert main(["export", "zbv", "-p", "4", "-m", "8", "-o", str(file)]) == 0
    assert main(["verify", str(file)]) == 0
    assert "right" in capsys.readouterr().out
    layers = tmp_path / "layers.json"
    layers.write_text('{"forward": [1, 1, 2, 1], "activation_bytes": 1000}')
    run = ["search", "--layers", str(layers), "-p", "2", "-m", "4", "--memory-gb", "1"]
    assert main(run) == 0
    assert "of the memory" in capsys.readouterr().out
    layers.write_text('{"forwards": [1]}')
    assert main(run) == 1
    file.write_bytes(b"0F0,0B0\r\n1F0\r\n")
    assert main(["verify", str(file)]) == 1


@pytest.mark.parametrize("command", ["show", "simulate", "verify", "export", "search"])
def test_help_has_examples(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"  dualpipe {command} " in capsys.readouterr().out.partition("examples:")[2]


def test_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "dualpipe", "verify", "1f1b", "-p", "2", "-m", "2"]
    assert "right" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
