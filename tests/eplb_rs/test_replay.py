"""Recorded choices through the layer: what comes to each rank is what was predicted, to the token."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import world

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUTINGS = ("uniform", "nearest", "shares")


def example():
    sys.path.insert(0, str(EXAMPLES))
    return __import__("replay_choices")


def settings(ranks, layers, **others):
    usual = {"tokens": 64, "windows": 1, "routing": "uniform", "max_moves": 1.0}
    usual |= {"slots": 72 // ranks, "steps_per_pass": 1, "plot": None}
    return example().Settings(ranks=ranks, layers=layers, **(usual | others))


def replayed(rank, ranks, layers, routings, texts):
    """For each way of routing, a window of each of so many texts."""
    import eplb_rs.moe.layer as module

    computed = []
    forward = module.experts_forward

    def counting(rows, *others):
        computed.append(len(rows))
        return forward(rows, *others)

    module.experts_forward = counting
    replays = []
    for routing in routings:
        chosen = settings(ranks, layers, routing=routing, max_moves=0.3)
        replay = example().Replay(chosen)
        for text, window in enumerate(list(example().read_windows(chosen))[:texts]):
            computed.clear()
            row = replay.window(window)
            assert computed[:layers] == row.before_LD[:, rank].tolist()
            assert computed[-layers:] == row.after_LD[:, rank].tolist()
            assert len(computed) == layers * row.passes
            sent = window.counts.sum(axis=(1, 2))
            for tokens_LD in (row.before_LD, row.after_LD):
                np.testing.assert_array_equal(tokens_LD.sum(axis=1), sent)
            check(row)
            replays.append((text, routing))
    return replays


def check(row):
    """It gains, and gets what the plan promised, but for whole tokens."""
    balance = example().balance
    assert row.moved > 0
    assert row.passes >= 4, "passes with some layers old and some new"
    assert balance(row.after_LD) > balance(row.before_LD) + 0.02
    assert balance(row.after_LD) == pytest.approx(row.promised, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_all_texts_through_all_layers(ranks):
    world.run(replayed, ranks, 26, ROUTINGS, 4, limit_s=1800)


def wrongly_predicted(rank, ranks):
    chosen = settings(ranks, 2)
    replay = example().Replay(chosen)
    window = next(example().read_windows(chosen))
    other = example().Window(window.text, window.expert_LDTK.flip(1))
    vars(window)["counts"] = other.counts  # as if ranks had each other's tokens
    try:
        replay.window(window)
    except RuntimeError as error:
        return str(error)
    return None


LAYERS = {4: 6, 8: 3}


def replay(rank, ranks):
    if ranks == 2:
        return wrongly_predicted(rank, ranks)
    return replayed(rank, ranks, LAYERS[ranks], ROUTINGS, 2)


@pytest.fixture(scope="module")
def told():
    """What each rank has to say, in each world."""
    return world.run_each(replay, [2, *LAYERS])


@pytest.mark.parametrize("ranks", LAYERS)
def test_every_rank_gets_what_was_predicted(told, ranks):
    """The program itself compares slot by slot in every pass, also while experts move."""
    for rank, replays in enumerate(told[ranks]):
        assert replays == [(text, routing) for routing in ROUTINGS for text in range(2)], rank


def test_another_number_of_tokens_stops_it(told):
    for message in told[2]:
        assert re.fullmatch(r"slot \d+ of layer \d+ got \d+ tokens, \d+ were predicted", message)


def test_the_program(tmp_path):
    picture = tmp_path / "replay.svg"
    options = [
        "--ranks",
        "2",
        "--slots",
        "36",
        "--layers",
        "2",
        "--windows",
        "1",
        "--plot",
        picture,
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "replay_choices.py", *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(
        r"^ +\d+ +[a-z]+ +0\.\d+ +[01]\.\d+ +[01]\.\d+ +\d+ +(\d+) of (\d+)$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(rows) == 4
    assert all(good == passes for good, passes in rows)
    assert "as predicted, in all" in done.stdout
    assert "translation" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "27"], "--layers must be 1 to 26"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--slots", "7"], "at least 64"),
        (["--max-moves", "2"], "--max-moves must be 0 to 1"),
        (["--plot", "replay.pdf"], "a .svg or .png file"),
        (["--routing", "best"], "invalid choice"),
    ],
)
def test_options_are_checked(capsys, options, message):
    with pytest.raises(SystemExit):
        example().parse(options)
    assert message in capsys.readouterr().err
