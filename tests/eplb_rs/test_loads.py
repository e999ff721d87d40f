"""Reading recorded loads: every format, torch's files, windows, layers without load."""

import io
import json
import os
import pickle
import subprocess
import sys

import eplb_rs
import numpy as np
import pytest
from eplb_rs.loads import read_loads
from recordings import COUNTS, DEEPSEEK_R1, ESFT, refusal, write
from refusals import Attack

# What the samples hold


def test_sglang_recording_of_deepseek_r1():
    trace = read_loads(DEEPSEEK_R1)
    counts = np.array(json.loads(DEEPSEEK_R1.read_text())["logical_count"])
    assert trace.loads.shape == (1, 58, 256)
    assert trace.layer_ids == tuple(range(3, 61))
    assert trace.empty_layers == (0, 1, 2)
    assert trace.format == "SGLang recorder"
    assert trace.labels is None
    np.testing.assert_array_equal(trace.total, counts[3:])


def test_load_history_of_esft():
    trace = read_loads(ESFT)
    assert trace.loads.shape == (129, 26, 64)
    assert trace.windows == tuple(range(129))
    assert (trace.loads.sum(axis=2) == 256 * 6).all()
    assert set(trace.labels) == {"law", "translation", "intent", "summary"}
    assert trace.empty_layers == ()
    assert repr(trace).startswith("<LoadTrace of 129 windows x 26 layers x 64 experts")


# Every format gives the same


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(
    "dtype", ["u1", "<i4", ">i4", "<i8", "u8", "<f2", "<f4", ">f8", np.longdouble]
)
def test_npy_and_npz_of_any_number_type(tmp_path, dtype, windows):
    array = np.asfortranarray((COUNTS if windows else COUNTS[0]).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "one.npz", array)
    np.savez_compressed(tmp_path / "two.npz", prefill=array, decode=array[..., :2])
    want = COUNTS if windows else COUNTS[:1]
    for trace in (
        read_loads(tmp_path / "a.npy"),
        read_loads(tmp_path / "one.npz"),
        read_loads(tmp_path / "two.npz", key="prefill"),
    ):
        assert trace.loads.dtype == np.float64
        assert not trace.loads.flags.writeable
        np.testing.assert_array_equal(trace.loads, want)
    np.testing.assert_array_equal(
        read_loads(tmp_path / "two.npz", key="decode").loads, want[..., :2]
    )


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"load_history": [{"logical_expert_load": w} for w in COUNTS.tolist()]}, None),
        ({"rank": 0, "logical_count": COUNTS.tolist()}, None),
        ({"prefill": COUNTS.tolist(), "decode": 1}, "prefill"),
        (COUNTS.tolist(), None),
        (COUNTS.astype(float).tolist(), None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json(tmp_path, content, key, encoding):
    path = write(tmp_path / "A.JSON", json.dumps(content).encode(encoding))
    np.testing.assert_array_equal(read_loads(path, key=key).loads, COUNTS)


def test_path_may_be_text_or_bytes(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS)
    assert read_loads(str(tmp_path / "a.npy")).path == tmp_path / "a.npy"
    assert read_loads(os.fsencode(tmp_path / "a.npy")).path == tmp_path / "a.npy"


def test_large_counts_are_exact(tmp_path):
    path = write(tmp_path / "a.json", "[[16777217, 9007199254740991]]")
    assert read_loads(path).total.tolist() == [[16777217.0, 9007199254740991.0]]


# torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="reads what torch.save wrote")


def test_torch(tmp_path, torch):
    for number, (content, key, want) in enumerate(
        [
            (torch.tensor(COUNTS), None, COUNTS),
            (torch.tensor(COUNTS[0]).to(torch.bfloat16), None, COUNTS[:1]),
            (torch.tensor(COUNTS, dtype=torch.float16).requires_grad_(), None, COUNTS),
            (torch.tensor(COUNTS).permute(2, 1, 0).contiguous().permute(2, 1, 0), None, COUNTS),
            ({"rank": 0, "logical_count": torch.tensor(COUNTS)}, None, COUNTS),
            ({"decode": torch.tensor(COUNTS[0])}, "decode", COUNTS[:1]),
            ({"logical_count": COUNTS.tolist()}, None, COUNTS),
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        np.testing.assert_array_equal(read_loads(path, key=key).loads, want)


def test_torch_file_that_would_run_code(tmp_path, torch):
    mark = tmp_path / "ran"
    torch.save({"logical_count": Attack(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack(mark), protocol=2))
    for name in ("a.pt", "b.pt"):
        error = refusal(tmp_path / name)
        assert error.code == "unsafe_pickle"
        assert "touch" in error.got or "getattr" in error.got
        assert "weights_only" not in str(error)
    assert not mark.exists()


def test_torch_file_of_something_else(tmp_path, torch):
    whole = io.BytesIO()
    torch.save(torch.tensor(COUNTS), whole)
    cases = {
        "cut.pt": (whole.getvalue()[:200], "unreadable_file"),
        "text.pt": (b"hello", None),
        "zip.pt": (b"PK\x03\x04" + bytes(40), "unreadable_file"),
    }
    for name, (content, code) in cases.items():
        error = refusal(write(tmp_path / name, content))
        assert error.code == code if code else error.code in ("unsafe_pickle", "unreadable_file")
    objects = {
        "number": (3, "wrong_format"),
        "text": ("hello", "wrong_format"),
        "no counts": ({"a": torch.ones(2)}, "wrong_format"),
        "records": ({"records": []}, "wrong_format"),
        "complex": (torch.ones(2, 2, dtype=torch.complex64), "wrong_dtype"),
        "bool": (torch.ones(2, 2, dtype=torch.bool), "wrong_dtype"),
        "meta": (torch.ones(2, 2, device="meta"), "wrong_dtype"),
        "scalar": (torch.tensor(1.0), "wrong_shape"),
        "empty": (torch.ones(0, 4), "empty"),
        "nan": (torch.tensor([[1.0, float("nan")]]), "not_finite"),
        "negative": (torch.tensor([[1, -2]]), "negative"),
        "vast view": (torch.ones(1, 1).expand(1 << 20, 1 << 20), "too_large"),
    }
    for name, (content, code) in objects.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert refusal(tmp_path / f"{name}.pt").code == code, name
    assert "mode stat" in refusal(tmp_path / "records.pt").hint
    assert "a" in refusal(tmp_path / "no counts.pt", key="b").hint
    torch.save(torch.ones(2, 2), tmp_path / "tensor.pt")
    assert refusal(tmp_path / "tensor.pt", key="b").code == "missing_key"


def test_torch_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    error = refusal(write(tmp_path / "a.pt", b"whatever"))
    assert error.code == "missing_dependency"
    assert error.hint == "pip install 'eplb-rs[torch]'"


def test_torch_is_not_imported_for_other_files():
    code = (
        "import sys; from eplb_rs.loads import read_loads; "
        f"read_loads({str(DEEPSEEK_R1)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_stays_light():
    code = (
        "import sys, eplb_rs; "
        "heavy = {'torch', 'matplotlib', 'argparse', 'eplb_rs.loads', 'eplb_rs.report'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Windows


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        (None, range(129)),
        ("all", range(129)),
        ("last", [128]),
        (" last ", [128]),
        ("0:4", range(4)),
        (":2", range(2)),
        ("-2:", [127, 128]),
        ("120:400", range(120, 129)),
        (slice(0, 10, 3), [0, 3, 6, 9]),
        ("3", [3]),
        ("-1", [128]),
        (np.int64(3), [3]),
        (-129, [0]),
        ("law", range(32)),
    ],
)
def test_windows(choice, want):
    everything, trace = read_loads(ESFT), read_loads(ESFT, windows=choice)
    assert trace.windows == tuple(want)
    assert trace.num_windows_in_file == 129
    assert trace.labels == tuple(everything.labels[window] for window in want)
    np.testing.assert_array_equal(trace.loads, everything.loads[list(want)])
    np.testing.assert_array_equal(trace.total, trace.loads.sum(axis=0))


@pytest.mark.parametrize("choice", ["129", 129, -130, "5:5", "9:3", slice(200, 300), 10**30])
def test_windows_that_do_not_exist(choice):
    error = refusal(ESFT, windows=choice)
    assert (error.argument, error.code) == ("windows", "out_of_range")
    assert "0 to 128" in error.hint


@pytest.mark.parametrize(
    "choice", ["x", "1e3", "1:2:3", "", 2.5, [1], b"3", slice("a", "b"), slice(0, 4, 0), "9" * 5000]
)
def test_windows_that_make_no_sense(choice):
    error = refusal(ESFT, windows=choice)
    assert (error.argument, error.code) == ("windows", "wrong_type")
    assert "law, translation" in error.hint
    assert len(str(error)) < 400


def test_last_window_of_a_file_without_windows():
    assert read_loads(DEEPSEEK_R1, windows="last").windows == (0,)


# Layers without load


def test_empty_layers(tmp_path):
    array = COUNTS.copy()
    array[:, 1] = 0
    array[0, 2] = 0
    np.save(tmp_path / "a.npy", array)
    trace = read_loads(tmp_path / "a.npy")
    assert (trace.layer_ids, trace.empty_layers) == ((0, 2), (1,))
    np.testing.assert_array_equal(trace.loads, array[:, [0, 2]])
    # The layers are those of the file, whichever window is chosen.
    assert read_loads(tmp_path / "a.npy", windows=0).layer_ids == (0, 2)
    kept = read_loads(tmp_path / "a.npy", keep_empty_layers=True)
    assert (kept.layer_ids, kept.empty_layers) == ((0, 1, 2), ())


def test_all_zero(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    error = refusal(tmp_path / "a.npy")
    assert error.code == "all_zero"
    assert "allow_zero" in error.hint
    assert refusal(tmp_path / "a.npy", keep_empty_layers=True).code == "all_zero"
    trace = read_loads(tmp_path / "a.npy", allow_zero=True)
    assert trace.layer_ids == (0, 1, 2)
    topology = eplb_rs.Topology(1, 2, 3)
    assert eplb_rs.Planner(topology).plan(trace.total).balance == 1.0


def test_all_zero_in_the_chosen_window(tmp_path):
    array = COUNTS.copy()
    array[1] = 0
    np.save(tmp_path / "a.npy", array)
    error = refusal(tmp_path / "a.npy", windows="last")
    assert (error.code, "windows last" in error.got) == ("all_zero", True)
    assert read_loads(tmp_path / "a.npy", windows="last", allow_zero=True).total.sum() == 0
