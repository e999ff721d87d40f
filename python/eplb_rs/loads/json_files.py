"""Recorded loads in JSON: of SGLang's recorder, of the EPLB benchmark, and bare lists."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from eplb_rs.loads.file import Content, first_line, no_such_key
from eplb_rs.loads.nested import EXPECTED_JSON, array_of_lists, chosen_field

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from eplb_rs.loads.file import LoadFile

__all__ = ["read_json"]


def read_json(file: LoadFile, key: str | None) -> Content:
    """Reads a bare list, a recording or a field of a dictionary."""
    file.check_size(file.size, file.MAX_JSON_BYTES)
    try:
        text = file.path.read_bytes()
    except OSError as error:
        raise file.refusal("unreadable_file", first_line(error), "readable") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and not error.doc[error.pos :].strip()
        raise file.refusal(
            "truncated" if cut else "not_json",
            first_line(error),
            "JSON that is whole",
            "it ends too early" if cut else "",
        ) from None
    del text
    if isinstance(content, list):
        if key is not None:
            raise no_such_key(key, (), "a field; this file holds a bare list")
        return Content(array_of_lists(file, content), None, "JSON list")
    if not isinstance(content, dict):
        raise file.refusal("wrong_format", f"JSON of one {type(content).__name__}", EXPECTED_JSON)
    if key is None and "load_history" in content:
        counts = _load_history(file, content["load_history"])
        return Content(counts, _labels(content), "load history")
    value, kind = chosen_field(file, content, key)
    if not isinstance(value, list):
        raise file.refusal(
            "wrong_format", f"{kind} is no list, but {type(value).__name__}", EXPECTED_JSON
        )
    return Content(array_of_lists(file, value), _labels(content), kind)


def _load_history(file: LoadFile, history: Any) -> npt.NDArray[np.float64]:
    """The counts of each window, in the public benchmark's format."""
    if not isinstance(history, list):
        got = f"load_history is no list, but {type(history).__name__}"
        raise file.refusal("wrong_format", got, "a list of windows")
    for number, window in enumerate(history):
        if not isinstance(window, dict) or not isinstance(window.get("logical_expert_load"), list):
            raise file.refusal(
                "wrong_format",
                f"window {number} of load_history has no list `logical_expert_load`",
                'a list of windows, each {"logical_expert_load": [layers][experts]}',
            )
    counts = array_of_lists(file, [window["logical_expert_load"] for window in history])
    if counts.size and counts.ndim != 3:
        raise file.refusal(
            "wrong_shape",
            f"load_history of shape {counts.shape}",
            "a list of windows, each [layers][experts]",
        )
    return counts


def _labels(content: dict[str, Any]) -> list[str] | None:
    labels = content.get("labels")
    if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
        return labels
    return None
