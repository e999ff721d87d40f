"""Schedules as JSON documents."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dualpipe.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dualpipe.schedule import Schedule

__all__ = ["json_of", "text_of"]

_FORMAT = "dualpipe schedule"
_VERSION = 1


def json_of(schedule: Schedule) -> str:
    """The document of a schedule."""
    lines = schedule.text().splitlines()[-schedule.num_ranks :]
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "micro_batches": list(schedule.micro_batches),
        "placement": schedule.placement.tolist(),
        "ranks": [line.partition(":")[2].split() for line in lines],
    }
    return json.dumps(document)


def text_of(json_text: str) -> str:
    """A JSON document as the text that the core parses, and so checks.

    Raises:
        ScheduleError: ``json``.
    """
    try:
        document = json.loads(json_text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _not_json(str(error)) from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _not_json("not a document of that format")
    if document.get("version") != _VERSION:
        raise _not_json(f"version {document.get('version')!r}, not {_VERSION}")
    try:
        return _lines_of(document)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_json(f"{type(error).__name__}: {error}") from error


def _lines_of(document: Mapping[str, Any]) -> str:
    copies = zip(document["micro_batches"], document["placement"], strict=True)
    words = [
        f"schedule {document['name']}",
        f"ranks {document['num_ranks']}, stages {document['num_stages']}",
        *(
            f"copy {copy}: {count} micro-batches through ranks {' '.join(map(str, ranks))}"
            for copy, (count, ranks) in enumerate(copies)
        ),
        *(f"rank {rank}: {' '.join(stream)}" for rank, stream in enumerate(document["ranks"])),
    ]
    return "\n".join(words)


def _not_json(what: str) -> ScheduleError:
    return ScheduleError(
        code="json",
        argument="json",
        got=what,
        expected=f"JSON with the format {_FORMAT!r}",
        hint="Schedule.to_json writes it",
    )
