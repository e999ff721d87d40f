"""docs/errors.md names every code that an exception can carry, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFUSALS = re.compile(r"refus|not_a_|invalid_input|InvalidInputError|InfeasibleError")


def codes_in_python() -> set[str]:
    """The constants that are passed as `code=`, or first, to what makes an exception."""
    calls = [
        call
        for path in (ROOT / "python" / "eplb_rs").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
    ]
    values = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "code"]
    values += [
        call.args[0] for call in calls if call.args and REFUSALS.search(ast.unparse(call.func))
    ]
    return {code for value in values for code in constants(value)}


def constants(value: ast.expr) -> list[str]:
    """What an expression may be, if it is a code or one of two."""
    if isinstance(value, ast.IfExp):
        return constants(value.body) + constants(value.orelse)
    if isinstance(value, ast.Constant) and re.fullmatch(r"[a-z]+(_[a-z]+)*", str(value.value)):
        return [str(value.value)]
    return []


def codes_in_rust() -> set[str]:
    planner = (ROOT / "rust/eplb/src/error.rs").read_text(encoding="utf-8")
    binding = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "rust/python/src").glob("*.rs")
    )
    return set(re.findall(r'Self::\w+ => "(\w+)"', planner)) | set(
        re.findall(r'(?:refuse|invalid_input)\(\s*(?:\w+(?:\.py\(\))?,\s*)?"(\w+)"', binding)
    )


def test_every_code_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert len(explained) == len(set(explained))
    raised = codes_in_python() | codes_in_rust()
    assert {"not_multiple", "not_integer", "in_use", "ragged", "missing_file"} <= raised
    assert set(explained) == raised
