"""The command line: what it prints, writes, refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import eplb_rs
import numpy as np
import pytest
import recordings
from eplb_rs import cli

DEEPSEEK_R1, ESFT = str(recordings.DEEPSEEK_R1), str(recordings.ESFT)
SHAPE = (
    "--gpus",
    "32",
    "--nodes",
    "4",
    "--groups",
    "8",
    "--replicas",
    "288",
    "--policy",
    "deepseek",
)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """One line on stderr, nothing on stdout, code 2."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("eplb")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err

    return call


def process(*arguments, **options):
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 60} | options
    return subprocess.run(
        [sys.executable, "-m", "eplb_rs", *map(str, arguments)], check=False, **options
    )


# What it prints and writes


def test_plan(run, tmp_path):
    code, out, err = run("plan", DEEPSEEK_R1, *SHAPE, "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    assert "layers 0-2 carry no load and are left out" in out
    assert "balance (mean / max rank load)         0.2266    0.7947    0.7996" in out
    assert "hierarchical" in out
    assert "assumed" not in out
    assert f"wrote {tmp_path / 'plan.json'}" in out
    counts = np.array(json.loads(Path(DEEPSEEK_R1).read_text())["logical_count"])
    plan = eplb_rs.Plan.load(tmp_path / "plan.json")
    phy2log, _, _ = eplb_rs.rebalance_experts(counts[3:], 288, 8, 4, 32)
    np.testing.assert_array_equal(plan.phy2log, phy2log)
    assert plan.layer_ids == tuple(range(3, 61))


def test_show_prints_what_plan_printed(run, tmp_path):
    _, planned, _ = run("plan", DEEPSEEK_R1, *SHAPE, "-o", tmp_path / "plan.json")
    code, shown, err = run("show", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    table = planned.partition("before ")[2].partition("wrote")[0]
    assert table
    assert table in shown


def test_show_layer(run, tmp_path, refused):
    run("plan", DEEPSEEK_R1, *SHAPE, "-o", tmp_path / "plan.json")
    code, out, _ = run("show", tmp_path / "plan.json", "--layer", "57", "--top", "2")
    assert code == 0
    assert out.startswith("Layer 57:")
    code, out, _ = run("show", tmp_path / "plan.json", "--layer", "57", "--json")
    assert [layer["layer"] for layer in json.loads(out)["layers"]] == [57]
    assert "--layer (2) must be a layer of the plan: 3-60" in refused(
        "show", tmp_path / "plan.json", "--layer", "2"
    )


def test_defaults_are_told(run):
    code, out, _ = run("plan", DEEPSEEK_R1, "--gpus", "32")
    assert code == 0
    assert "assumed     --nodes 1, --groups 1, --replicas 288" in out


@pytest.mark.parametrize(
    ("experts", "gpus", "replicas"), [(256, 32, 288), (250, 32, 288), (4, 8, 16), (1, 1, 2)]
)
def test_default_replicas_leave_a_slot_to_spare_on_each_gpu(run, tmp_path, experts, gpus, replicas):
    np.save(tmp_path / "a.npy", np.ones((2, experts)))
    code, out, _ = run("plan", tmp_path / "a.npy", "--gpus", gpus, "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["num_replicas"] == replicas
    assert figures["assumed"] == {"--nodes": 1, "--groups": 1, "--replicas": replicas}


def test_json(run, tmp_path):
    code, out, err = run("plan", DEEPSEEK_R1, *SHAPE, "--json", "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["format"] == "eplb-rs report"
    assert figures["after"]["balance"] == pytest.approx(0.79471, abs=1e-5)
    assert figures["planning"]["median_us"] > 0
    assert figures["planning"]["num_calls"] >= 1
    _, shown, _ = run("show", tmp_path / "plan.json", "--json")
    shown = json.loads(shown)
    assert shown["after"] == figures["after"]
    assert shown["layers"] == figures["layers"]
    assert (shown["loads"], shown["planning"]) == (None, None)


def test_windows_and_threads_and_policy(run):
    code, out, _ = run(
        "plan", ESFT, "--windows", "law", "--gpus", 8, "--threads", 2, "--policy", "trivial"
    )
    assert code == 0
    assert "windows 0-31 of 129 (law), summed" in out
    assert "trivial" in out
    assert run("plan", ESFT, "--windows", "-1", "--gpus", 8)[0] == 0
    assert run("plan", ESFT, "--windows=-4:", "--gpus", 8)[0] == 0


def test_archive_key(run, tmp_path, refused):
    np.savez(tmp_path / "a.npz", prefill=np.ones((2, 4)), decode=np.ones((3, 4)))
    code, out, _ = run("plan", tmp_path / "a.npz", "--gpus", 2, "--key", "decode")
    assert (code, "3 layers x 4 experts" in out) == (0, True)
    assert "there are: prefill, decode" in refused("plan", tmp_path / "a.npz", "--gpus", 2)


def test_zero_loads(run, tmp_path, refused):
    np.save(tmp_path / "a.npy", np.zeros((2, 4)))
    assert "--allow-zero takes them" in refused("plan", tmp_path / "a.npy", "--gpus", 2)
    code, out, _ = run("plan", tmp_path / "a.npy", "--gpus", 2, "--allow-zero")
    assert (code, "1.0000    1.0000" in out) == (0, True)


@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_plot(run, tmp_path, kind):
    pytest.importorskip("matplotlib", reason="draws")
    picture = tmp_path / f"plan.{kind}"
    code, out, _ = run("plan", DEEPSEEK_R1, *SHAPE, "--plot", picture, "-o", tmp_path / "p.json")
    assert code == 0
    assert out.endswith(f"wrote {tmp_path / 'p.json'}\nwrote {picture}\n")
    assert picture.stat().st_size > 10_000
    picture.unlink()
    code, out, _ = run("show", tmp_path / "p.json", "--plot", picture, "--json")
    assert (code, json.loads(out)["version"], picture.exists()) == (0, 1, True)


def test_help_and_version(run):
    assert run("--version") == (0, f"eplb {eplb_rs.__version__}\n", "")
    for command in ((), ("plan",), ("show",), ("explain",), ("simulate",)):
        code, out, err = run(*command, "--help")
        assert (code, err) == (0, "")
        assert f"eplb {command[0] if command else 'COMMAND'} " in out
        assert max(map(len, out.splitlines())) <= 100
    assert "examples:" in out


# What it refuses


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (("--gpus", 32, "--replicas", 290), "--replicas (290) must be a multiple of --gpus (32)"),
        (("--gpus", 32, "--replicas", 290), "nearest: 288, 320"),
        (("--gpus", 32, "--replicas", 224), "--replicas (224) must be at least the number of"),
        (("--gpus", 32, "--nodes", 5), "--gpus (32) must be a multiple of --nodes (5)"),
        (("--gpus", 32, "--groups", 7), "must be a divisor of the number of experts"),
        (("--gpus", 32, "--replicas", 2**70), "--replicas"),
        (("--gpus", 2**40), "--replicas"),
        (("--gpus", 32, "--threads", 10**9), "--threads"),
        (("--gpus", 32, "--policy", "best"), '--policy ("best") must be one of: balanced'),
        (("--gpus", 32, "--windows", "9"), "--windows ('9') must be one of the file's 1 windows"),
        (("--gpus", 32, "--windows", "x\ny"), "--windows"),
        (("--gpus", 32, "--key", "a"), "--key ('a') must be a field of the file"),
        (("--gpus", 32, "--plot", "a.jpg"), "--plot (a.jpg) must be a file named .png"),
        (("--gpus", 32, "-o", "/no/such/folder/a.json"), "--output (/no/such/folder/a.json: No"),
        (("--gpus", 0), "--gpus: '0' is not a whole number of at least 1"),
        (("--gpus", "-4"), "'-4' is not a whole number"),
        (("--gpus", "4.0"), "'4.0' is not a whole number"),
        (("--gpus", "many\n"), "is not a whole number"),
        (("--gpus", 32, "--top", 0), "--top"),
        (("--gpus", 32, "--gpu", 2), "unrecognized arguments"),
        ((), "--gpus"),
    ],
)
def test_bad_options(refused, options, want):
    assert want in refused("plan", DEEPSEEK_R1, *options)


def test_bad_commands(refused):
    assert "eplb --help" in refused()
    assert "invalid choice" in refused("pan")
    assert "LOADS" in refused("plan", "--gpus", 2)


def test_bad_files(refused, tmp_path):
    assert "none.json: no such file" in refused("plan", tmp_path / "none.json", "--gpus", 2)
    assert "LOADS" in refused("plan", tmp_path, "--gpus", 2)
    (tmp_path / "cut.json").write_text('{"logical_count": [[1, 2')
    assert "ends too early" in refused("plan", tmp_path / "cut.json", "--gpus", 2)
    assert "PLAN" in refused("show", tmp_path / "cut.json")
    assert "PLAN" in refused("show", tmp_path / "none.json")
    assert "PLAN" in refused("show", DEEPSEEK_R1)
    np.save(tmp_path / "huge.npy", np.full((2, 4), 1e300))
    assert "must be finite" in refused("plan", tmp_path / "huge.npy", "--gpus", 2)
    # A name that would clear the screen; it need not exist.
    assert "\x1b" not in refused("plan", tmp_path / "a\x1b[2J\n.json", "--gpus", 2)


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_files_are_not_written_over_each_other(refused, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    before = (tmp_path / "a.npy").read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "a.npy")
    for path in (tmp_path / "a.npy", link):
        error = refused("plan", tmp_path / "a.npy", "--gpus", 2, "-o", path)
        assert "another file than the file that is read" in error
    both = tmp_path / "b.svg"
    error = refused("plan", tmp_path / "a.npy", "--gpus", 2, "-o", both, "--plot", both)
    assert "that of --output" in error
    assert (tmp_path / "a.npy").read_bytes() == before
    assert not both.exists()


def test_matplotlib_is_missing(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = tmp_path / "plan.json"
    error = refused("plan", DEEPSEEK_R1, *SHAPE, "--plot", tmp_path / "a.png", "-o", plan)
    assert "pip install 'eplb-rs[plot]'" in error
    assert not plan.exists()


def test_torch_is_missing(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"x")
    assert "pip install 'eplb-rs[torch]'" in refused("plan", tmp_path / "a.pt", "--gpus", 2)


# How it lives with terminals, pipes and signals


def test_module_is_the_command():
    done = process("plan", DEEPSEEK_R1, *SHAPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.7947" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_encodings_without_blocks(encoding, tmp_path):
    done = process(
        "plan",
        DEEPSEEK_R1,
        *SHAPE,
        "-o",
        tmp_path / "плaн.json",
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "#" in done.stdout
    assert r"\u043f" in done.stdout


def test_error_about_a_name_the_encoding_lacks():
    done = process("show", "план.json", env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 2
    assert r"\u043f" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_broken_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = process(
        "plan", DEEPSEEK_R1, *SHAPE, capture_output=False, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    "arguments", [("plan", DEEPSEEK_R1, *SHAPE), ("plan", "none", "--gpus", 1)]
)
def test_output_that_cannot_be_written(arguments):
    with Path("/dev/full").open("w") as full:
        done = process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    if "none" in arguments:
        assert done.returncode == 2
    else:
        assert done.returncode == 1
        assert done.stderr == "eplb plan: error: output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="no shell")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("plan {} --gpus 32", 0), ("show {}", 2), ("simulate none.json --gpus 2", 2), ("--help", 0)],
)
def test_closed_streams(arguments, code):
    command = f"{sys.executable} -m eplb_rs {arguments.format(DEEPSEEK_R1)}"
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        shell = ["sh", "-c", f"{command} {closed}"]
        done = subprocess.run(shell, check=False, capture_output=True, timeout=60)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr


def test_interrupt(monkeypatch, run):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eplb_rs.cli.plan.read_loads", interrupted)
    assert run("plan", DEEPSEEK_R1, "--gpus", 32) == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_interrupt_by_signal():
    # Where the tests run in the background, the shell has SIGINT ignored.
    code = """
import signal, sys, time
from eplb_rs import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def slow(*_, **__):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(60)
cli.plan.read_loads = slow
sys.exit(cli.main(["plan", "loads.json", "--gpus", "2"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stderr.readline() == b"reading\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, b"", b"")


posix = pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")


def on_terminal(columns, **variables):
    """What the command prints on a terminal so wide."""
    import fcntl
    import pty
    import struct
    import termios

    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "TERM")}
    with subprocess.Popen(
        [sys.executable, "-m", "eplb_rs", "plan", DEEPSEEK_R1, *SHAPE],
        stdout=theirs,
        stdin=subprocess.DEVNULL,
        env=clean | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | variables,
    ) as child:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(mine, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            text += part
    os.close(mine)
    assert child.returncode == 0
    return text.decode().replace("\r\n", "\n")


@posix
def test_terminal_has_colours():
    assert "\x1b[32m" in on_terminal(80)


@posix
@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_terminal_without_colours(variables):
    assert "\x1b" not in on_terminal(80, **variables)


@posix
def test_terminal_that_is_narrow():
    text = on_terminal(48, NO_COLOR="1")
    lines = "".join(text.partition("worst layers")[1:]).splitlines()
    assert max(map(len, lines)) <= 48
