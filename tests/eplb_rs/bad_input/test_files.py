"""Files that are no recorded loads, of every kind, are refused before they do harm."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import eplb_rs
import numpy as np
import pytest
from eplb_rs.loads import read_loads
from eplb_rs.loads.file import LoadFile
from recordings import COUNTS, DEEPSEEK_R1, refusal, write
from refusals import Attack


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
    np.save(tmp_path / "a.npy", COUNTS)
    np.savez_compressed(tmp_path / "b.npz", np.ones((100, 100)))
    write(tmp_path / "c.json", json.dumps(COUNTS.tolist()) + " " * 100)
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
    array = COUNTS.astype(float)
    array[1, 2, 3] = np.nan
    array[1, 2, 2] = np.inf
    np.save(tmp_path / "a.npy", array)
    assert "inf at window 1, layer 2, expert 2 and 1 more" in refusal(tmp_path / "a.npy").got
    np.save(tmp_path / "b.npy", -COUNTS[0])
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
    np.savez(tmp_path / "a.npz", prefill=COUNTS, decode=COUNTS)
    for key in (None, "nothing"):
        error = refusal(tmp_path / "a.npz", key=key)
        assert (error.argument, error.code) == ("key", "missing_key")
        assert error.hint == "there are: prefill, decode"
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"hello", whole[:100], whole[:-30], bytes(100)):
        assert refusal(write(tmp_path / "b.npz", content)).code == "truncated"
    np.savez_compressed(tmp_path / "c.npz", COUNTS)
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
    np.save(tmp_path / "e.npy", COUNTS)
    assert refusal(tmp_path / "e.npy", key="a").code == "missing_key"


def test_archive_with_a_wrong_checksum(tmp_path):
    np.savez(tmp_path / "a.npz", COUNTS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.index(COUNTS.astype("<i8").tobytes())
    content[at] ^= 1
    assert refusal(write(tmp_path / "a.npz", bytes(content))).code == "truncated"


def test_garbage_is_always_a_typed_error(tmp_path):
    """Sound files with bytes changed, cut out or cut off: read or refused, nothing else."""
    np.save(tmp_path / "a.npy", COUNTS)
    np.savez_compressed(tmp_path / "a.npz", COUNTS)
    write(tmp_path / "a.json", json.dumps({"logical_count": COUNTS.tolist()}))
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
