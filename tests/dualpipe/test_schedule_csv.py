"""PyTorch's CSV: both forms, both dialects, strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpipe import METHODS, DeadlockError, Schedule, ScheduleError

EXPRESSIBLE = [method for method in METHODS if method not in {"chimera", "dualpipe"}]
COMMS = Path(__file__).parents[1] / "data/dualpipe/torch_csv/DualPipeV_4r8m_compute_comms.csv"


@pytest.mark.parametrize("dialect", ["current", "older"])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("method", EXPRESSIBLE)
def test_round_trip(method: str, form: str, dialect: str) -> None:
    schedule = Schedule.generate(method, 4, 6)
    text = schedule.to_csv(form, dialect=dialect)
    back = Schedule.from_csv(text, name=method, num_ranks=4)
    assert back.to_csv(form) == schedule.to_csv(form)
    assert back.compute_only() == schedule.compute_only()
    assert text.endswith("\r\n")
    assert text.count("\r\n") == 4


def test_dialects_are_told_apart() -> None:
    older = "0F0,0F1,0B0,0W0,0BW1\r\n"
    current = "0F0,0F1,0I0,0W0,0B1\r\n"
    assert Schedule.from_csv(older) == Schedule.from_csv(current)
    # B and W without I or BW: only the older dialect has a W for that B.
    assert Schedule.from_csv("0F0,0B0,0W0\n") == Schedule.from_csv("0F0,0I0,0W0\n")
    # B alone is whole in both.
    assert Schedule.from_csv("0F0,0B0\n").to_csv() == "0F0,0B0\r\n"


@pytest.mark.parametrize("method", ["chimera", "dualpipe"])
def test_stages_on_two_ranks_are_refused_with_the_reason(method: str) -> None:
    with pytest.raises(ScheduleError, match="which copy of a stage") as caught:
        Schedule.generate(method, 4, 8).to_csv()
    assert caught.value.code == "bidirectional"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "missing_row"),
        ("0F0,0B0\r\n\r\n1F0,1B0\r\n", "missing_row"),
        ("0F0,0B0\n2F0,2B0\n", "missing_row"),
        ("0F0,0F1,0B0,0B1\n0F0,0B0\n", "two_ranks"),
        ("0F0,0B0,0I0,0BW1\n", "mixed_dialects"),
        ("0F0,0Q0\n", "unknown_word"),
        ("0F0;0B0\n", "unknown_word"),
        ("0F0 ,0B0\n", "unknown_word"),
        ("0f0,0B0\n", "unknown_word"),
        ("0F,0B0\n", "unknown_word"),
        ("0F0,0B-1\n", "unknown_word"),
        ("0F00,0B0\n", "unknown_word"),
        ("0F0,0UNSHARD1\n", "unknown_word"),
        ("(0F0,0B0)OVERLAP_F_B\n", "unknown_word"),
        ("(0F1;0B0\n", "unknown_word"),
        ("0F0,(0B0;0F1)OVERLAP_F_B,0B1\n", "torn_pair"),
        ("0F0,(0F1;0I0)OVERLAP_F_B,0W0,0B1\n", "torn_pair"),
        ("0UNSHARD,0F0,,0B0\n", "idle_cells"),
        ("0UNSHARD,0F0,0B0\n1UNSHARD,1F0,1B0\n", "no_transfers"),
        ("0F0,0B0,70000F0\n", "unknown_word"),
        ("0F4000000000,0B0\n", "layout"),
        ("\x00\n", "unknown_word"),
        ("0F0,0B0\n1F0\n", "missing"),
        ("0F0,0F0,0B0\n", "twice"),
        ("0B0,0F0\n", "order"),
    ],
)
def test_what_is_not_a_schedule_is_refused(text: str, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(text)
    assert caught.value.code == code


def test_cells_are_pointed_at() -> None:
    with pytest.raises(ScheduleError, match='line 2, word 3: "1X0"'):
        Schedule.from_csv("0F0,0B0\n1F0,1B0,1X0\n")


def test_the_number_of_rows_can_be_asked_for() -> None:
    whole = Schedule.generate("1f1b", 4, 4).to_csv()
    cut = "".join(whole.splitlines(keepends=True)[:3])
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(cut, num_ranks=4)
    assert caught.value.code == "missing_row"


@pytest.mark.parametrize("word", ["RECV", "SEND", "RECV_B", "SEND_F"])
def test_a_file_that_pytorch_takes_and_cannot_run_is_refused(word: str) -> None:
    rows = COMMS.read_text().splitlines()
    cut = [",".join(cell for cell in row.split(",") if word not in cell) for row in rows]
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv("\n".join(cut))
    assert caught.value.code == "pairing"
    assert caught.value.rank is not None


def test_a_deadlock_names_the_circle() -> None:
    text = (
        "0F0,0F1,0SEND_F0,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
        "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1\n"
    )
    Schedule.from_csv(text, check=False).verify(transports=["eager"])
    with pytest.raises(DeadlockError) as caught:
        Schedule.from_csv(text)
    error = caught.value
    assert error.transport == "queue"
    with pytest.raises(DeadlockError) as caught:
        Schedule.from_csv(text, check=False).verify(transports=["rendezvous"])
    error = caught.value
    assert [(wait[0], wait[2], wait[3]) for wait in error.waits] == [
        (0, "0f1>", 1),
        (1, "1b0>", 0),
    ]
    assert "[0f1>]" in str(error)
    assert "[1b0>]" in str(error)


@pytest.mark.parametrize("name", ["", " x", "a\nb", "a#b", "\x00"])
def test_names_stand_in_a_line(name: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv("0F0,0B0\n", name=name)
    assert caught.value.code == "name"


def test_any_file_name_will_do(tmp_path: Path) -> None:
    path = tmp_path / "zbv #2.csv"
    path.write_text("0F0,0B0\n")
    schedule = Schedule.load(path)
    assert Schedule.parse(schedule.text()) == schedule
