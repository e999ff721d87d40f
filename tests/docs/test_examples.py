"""The examples that users copy: in the docstrings, in the documentation and in README.md."""

import doctest
import importlib
import re
import shutil
from pathlib import Path

import dualpipe
import eplb_rs
import pytest
from eplb_rs.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(autouse=True)
def _beside_the_sample_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples run in a folder of their own, with the sample data where they expect it."""
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    monkeypatch.chdir(tmp_path)


def modules() -> list[str]:
    """Those with examples in their docstrings."""
    names = []
    for package in (dualpipe, eplb_rs):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(root.parent).with_suffix("").parts
                names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules())
def test_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert tried
    assert failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    """The blocks of a page are one session."""
    text = (ROOT / page).read_text(encoding="utf-8")
    session = "\n".join(BLOCK.findall(text))
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(doctest.DocTestParser().get_doctest(session, {}, page, page, 0))
    assert runner.failures == 0


def test_the_output_shown_is_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    """What README.md shows of the command line is what it prints, but for `...`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n\$ eplb (.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    assert shown
    for arguments, output in shown:
        assert main(arguments.split()) == 0
        printed = capsys.readouterr().out
        pattern = ".*".join(map(re.escape, re.split(r"^\.\.\.$", output, flags=re.MULTILINE)))
        assert re.fullmatch(pattern, printed, re.DOTALL), printed


def test_some_pages_have_examples() -> None:
    assert BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
