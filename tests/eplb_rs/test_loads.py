"""Reading recorded loads, from sound files and from every kind of bad one."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import eplb_rs
import numpy as np
import pytest
from eplb_rs.loads import read_loads
from eplb_rs.loads.file import LoadFile
from recordings import DEEPSEEK_R1, ESFT

LOAD = np.arange(1, 25).reshape(2, 3, 4)  # 2 windows, 3 layers, 4 experts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, **options):
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        read_loads(path, **options)
    error = caught.value
    assert error.got
    assert error.expected
    assert "\n" not in str(error).replace(str(path), "")
    return error


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
    array = np.asfortranarray((LOAD if windows else LOAD[0]).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "one.npz", array)
    np.savez_compressed(tmp_path / "two.npz", prefill=array, decode=array[..., :2])
    want = LOAD if windows else LOAD[:1]
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
        ({"load_history": [{"logical_expert_load": w} for w in LOAD.tolist()]}, None),
        ({"rank": 0, "logical_count": LOAD.tolist()}, None),
        ({"prefill": LOAD.tolist(), "decode": 1}, "prefill"),
        (LOAD.tolist(), None),
        (LOAD.astype(float).tolist(), None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json(tmp_path, content, key, encoding):
    path = write(tmp_path / "A.JSON", json.dumps(content).encode(encoding))
    np.testing.assert_array_equal(read_loads(path, key=key).loads, LOAD)


def test_path_may_be_text_or_bytes(tmp_path):
    np.save(tmp_path / "a.npy", LOAD)
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
            (torch.tensor(LOAD), None, LOAD),
            (torch.tensor(LOAD[0]).to(torch.bfloat16), None, LOAD[:1]),
            (torch.tensor(LOAD, dtype=torch.float16).requires_grad_(), None, LOAD),
            (torch.tensor(LOAD).permute(2, 1, 0).contiguous().permute(2, 1, 0), None, LOAD),
            ({"rank": 0, "logical_count": torch.tensor(LOAD)}, None, LOAD),
            ({"decode": torch.tensor(LOAD[0])}, "decode", LOAD[:1]),
            ({"logical_count": LOAD.tolist()}, None, LOAD),
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        np.testing.assert_array_equal(read_loads(path, key=key).loads, want)


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


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
    torch.save(torch.tensor(LOAD), whole)
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
    array = LOAD.copy()
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
    array = LOAD.copy()
    array[1] = 0
    np.save(tmp_path / "a.npy", array)
    error = refusal(tmp_path / "a.npy", windows="last")
    assert (error.code, "windows last" in error.got) == ("all_zero", True)
    assert read_loads(tmp_path / "a.npy", windows="last", allow_zero=True).total.sum() == 0


# Files that are not what they should be


def test_paths(tmp_path):
    assert refusal(tmp_path / "none.json").code == "missing_file"
    assert refusal(DEEPSEEK_R1 / "inside.json").code in ("missing_file", "unreadable_file")
    assert refusal(tmp_path).code == "not_a_file"
    assert refusal("a\0.json").code == "unreadable_file"
    assert refusal("x" * 5000 + ".json").code == "unreadable_file"
    assert refusal(7).code == "wrong_type"
    assert refusal(None).code == "wrong_type"
    for name in ("loads", "loads.csv", ".json", "loads.npy.gz", "loads.pkl"):
        assert refusal(write(tmp_path / name, b"[[1]]")).code == "unknown_format"
    for suffix in (".npy", ".npz", ".json", ".pt", ".pth"):
        assert refusal(write(tmp_path / f"a{suffix}", b"")).code == "empty"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    assert refusal(tmp_path / "a.json").code == "not_a_file"


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.json"])
def test_file_without_permission(tmp_path, monkeypatch, name):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", name)

    path = write(tmp_path / name, b"[[1]]")
    # Not by the file's mode, which does not bind the superuser.
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    monkeypatch.setattr("zipfile.ZipFile.__init__", denied)
    error = refusal(path)
    assert error.code == "unreadable_file"
    assert "Permission denied" in error.got


def test_file_that_is_too_large(tmp_path, monkeypatch):
    for limit in ("MAX_JSON_BYTES", "MAX_ARRAY_BYTES"):
        monkeypatch.setattr(LoadFile, limit, 100)
    np.save(tmp_path / "a.npy", LOAD)
    np.savez_compressed(tmp_path / "b.npz", np.ones((100, 100)))
    write(tmp_path / "c.json", json.dumps(LOAD.tolist()) + " " * 100)
    for name in ("a.npy", "b.npz", "c.json"):
        assert refusal(tmp_path / name).code == "too_large"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("hello", "not_json"),
        ("[[1, 2], [3, 4]] and more", "not_json"),
        ("[[1, 2], [3, 4", "truncated"),
        ('{"logical_count": [[1, 2],', "truncated"),
        ("   ", "truncated"),
        ("\ufeff", "truncated"),
        (b"\xff\xfe\x00", "not_json"),
        (b"[[1, 2\xff]]", "not_json"),
        ("[" * 100_000, "not_json"),
        ("[" * 500 + "]" * 500, "wrong_shape"),
        ("[" * 50 + "1" + "]" * 50, "wrong_shape"),
        ("3", "wrong_format"),
        ("null", "wrong_format"),
        ('"text"', "wrong_format"),
        ("{}", "wrong_format"),
        ('{"format": "eplb-rs plan"}', "wrong_format"),
        ('{"records": []}', "wrong_format"),
        ('{"logical_count": 3}', "wrong_format"),
        ('{"logical_count": {"0": [1]}}', "wrong_format"),
        ('{"load_history": 3}', "wrong_format"),
        ('{"load_history": [3]}', "wrong_format"),
        ('{"load_history": [{"load": [[1]]}]}', "wrong_format"),
        ('{"load_history": [{"logical_expert_load": [[1]]}, {}]}', "wrong_format"),
        ('{"load_history": []}', "empty"),
        ("[]", "empty"),
        ("[[]]", "empty"),
        ("[[], []]", "empty"),
        ("[1, 2]", "wrong_shape"),
        ("[[[[1]]]]", "wrong_shape"),
        ('{"load_history": [{"logical_expert_load": [1, 2]}]}', "wrong_shape"),
        ("[[1, 2], [3]]", "ragged"),
        ("[[1, 2], 3]", "ragged"),
        ("[[1, 2], null]", "ragged"),
        ("[[[1]], [[1], [2]]]", "ragged"),
        ("[[1, [2]], [3, 4]]", "wrong_dtype"),
        ('[["1", "2"]]', "wrong_dtype"),
        ('[[1, "2"]]', "wrong_dtype"),
        ("[[1, null]]", "wrong_dtype"),
        ("[[1, true]]", "wrong_dtype"),
        ("[[true, false]]", "wrong_dtype"),
        ("[[1, {}]]", "wrong_dtype"),
        ("[[NaN, 1]]", "not_finite"),
        ("[[1, Infinity]]", "not_finite"),
        ("[[1e999]]", "not_finite"),
        (f"[[1, {10**400}]]", "not_finite"),
        (f"[[1{'0' * 5000}]]", "not_json"),
        ("[[1, -1]]", "negative"),
        ("[[-0.5]]", "negative"),
        (
            '{"load_history": [{"logical_expert_load": [[1]]}], "labels": ["a", "b"]}',
            "inconsistent",
        ),
    ],
)
def test_bad_json(tmp_path, text, code):
    content = text if isinstance(text, bytes) else text.encode()
    error = refusal(write(tmp_path / "a.json", content))
    assert error.argument == "path"
    assert error.code == code
    assert len(str(error)) < 600


def test_bad_values_are_pointed_at(tmp_path):
    array = LOAD.astype(float)
    array[1, 2, 3] = np.nan
    array[1, 2, 2] = np.inf
    np.save(tmp_path / "a.npy", array)
    assert "inf at window 1, layer 2, expert 2 and 1 more" in refusal(tmp_path / "a.npy").got
    np.save(tmp_path / "b.npy", -LOAD[0])
    assert "-1 at layer 0, expert 0 and 11 more" in refusal(tmp_path / "b.npy").got
    ragged = refusal(write(tmp_path / "c.json", "[[[1, 2], [3, 4]], [[5, 6], [7]]]"))
    assert "row [1, 1] has 1 entries, the first 2" in ragged.got


def test_fields_are_listed(tmp_path):
    fields = {f"field {number}": 1 for number in range(100)}
    error = refusal(write(tmp_path / "a.json", json.dumps(fields)))
    assert "field 0, field 1" in error.got
    assert "92 more" in error.got
    assert refusal(tmp_path / "a.json", key="nothing").code == "missing_key"
    assert refusal(write(tmp_path / "b.json", "[[1]]"), key="a").code == "missing_key"


def npy(header, body=b"", version=(1, 0)):
    text = header.encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + body


WHOLE = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }", bytes(32))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"hello", "truncated"),
        (b"hello" * 100, "wrong_format"),
        (pickle.dumps([1, 2] * 100), "wrong_format"),
        (WHOLE[:9], "truncated"),
        (WHOLE[:30], "truncated"),
        (WHOLE[:-1], "truncated"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }" + " " * 99),
            "truncated",
        ),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"),
            "too_large",
        ),
        (npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**62}, 8), }}"), "too_large"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -32), }", bytes(256)), None),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-2, 2), }", bytes(256)), None),
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }", bytes(32)),
            "wrong_dtype",
        ),
        (
            npy("{'descr': '<U9', 'fortran_order': False, 'shape': (1, 1), }", bytes(36)),
            "wrong_dtype",
        ),
        (
            npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1, 1), }", bytes(8)),
            "wrong_dtype",
        ),
        (
            npy("{'descr': '|b1', 'fortran_order': False, 'shape': (1, 1), }", bytes(1)),
            "wrong_dtype",
        ),
        (
            npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1, 1)}", bytes(8)),
            "wrong_dtype",
        ),
        (npy("__import__('os').abort()" + " " * 200), "wrong_format"),
        (npy("(" * 5000 + ")" * 5000), "wrong_format"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1), }", bytes(8), (9, 0)),
            None,
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (), }", bytes(8)), "wrong_shape"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 3), }" + " " * 99), "empty"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", bytes(24)),
            "wrong_shape",
        ),
    ],
)
def test_bad_arrays(tmp_path, content, code):
    error = refusal(write(tmp_path / "a.npy", content))
    assert error.code == code if code else error.code in ("wrong_format", "truncated")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    assert refusal(tmp_path / "a.npz").code == error.code


def test_array_of_objects_is_never_unpickled(tmp_path):
    mark = tmp_path / "ran"
    array = np.array([[Attack(mark)]], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "b.npz", array)
    for name in ("a.npy", "b.npz"):
        error = refusal(tmp_path / name)
        assert (error.code, "never unpickled" in error.hint) == ("wrong_dtype", True)
    assert not mark.exists()


def test_archives(tmp_path):
    np.savez(tmp_path / "a.npz", prefill=LOAD, decode=LOAD)
    for key in (None, "nothing"):
        error = refusal(tmp_path / "a.npz", key=key)
        assert (error.argument, error.code) == ("key", "missing_key")
        assert error.hint == "there are: prefill, decode"
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"hello", whole[:100], whole[:-30], bytes(100)):
        assert refusal(write(tmp_path / "b.npz", content)).code == "truncated"
    np.savez_compressed(tmp_path / "c.npz", LOAD)
    whole = bytearray((tmp_path / "c.npz").read_bytes())
    whole[60] ^= 0xFF
    assert refusal(write(tmp_path / "c.npz", bytes(whole))).code in (
        "truncated",
        "unreadable_file",
        "wrong_format",
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w"):
        pass
    assert refusal(tmp_path / "d.npz").code == "missing_key"
    np.save(tmp_path / "e.npy", LOAD)
    assert refusal(tmp_path / "e.npy", key="a").code == "missing_key"


def test_archive_with_a_wrong_checksum(tmp_path):
    np.savez(tmp_path / "a.npz", LOAD)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.index(LOAD.astype("<i8").tobytes())
    content[at] ^= 1
    assert refusal(write(tmp_path / "a.npz", bytes(content))).code == "truncated"


def test_garbage_is_always_a_typed_error(tmp_path):
    """Sound files with bytes changed, cut out or cut off: read or refused, nothing else."""
    np.save(tmp_path / "a.npy", LOAD)
    np.savez_compressed(tmp_path / "a.npz", LOAD)
    write(tmp_path / "a.json", json.dumps({"logical_count": LOAD.tolist()}))
    rng = np.random.default_rng(0)
    refused = 0
    for suffix in (".npy", ".npz", ".json"):
        whole = (tmp_path / f"a{suffix}").read_bytes()
        for _ in range(400):
            content = bytearray(whole)
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(len(content))] = rng.integers(256)
            if rng.random() < 0.3:
                del content[rng.integers(len(content)) :]
            path = write(tmp_path / f"b{suffix}", bytes(content))
            try:
                read_loads(path)
            except eplb_rs.InvalidInputError:
                refused += 1
    assert refused > 300
