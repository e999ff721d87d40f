"""NOTICE names every file of data that is not ours, with its source and licence."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("examples/data", "tests/data")


def entries() -> dict[str, str]:
    """The paragraphs of NOTICE by the file they are about."""
    paragraphs = (ROOT / "NOTICE").read_text(encoding="utf-8").split("\n\n")
    heading = re.compile(rf"^((?:{'|'.join(FOLDERS)})/\S+)$", re.MULTILINE)
    return {name: text for text in paragraphs for name in heading.findall(text)}


def test_every_file_of_data_is_named_and_every_name_is_a_file() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.name != ".gitignore"
    }
    assert files
    assert set(entries()) == files


@pytest.mark.parametrize("name", entries())
def test_each_has_a_source_and_a_licence(name: str) -> None:
    text = entries()[name]
    assert re.search(r"^  Source: +\S", text, re.MULTILINE)
    assert re.search(r"^  Licence: +\S", text, re.MULTILINE)
