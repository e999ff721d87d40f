"""docs/errors.md names every code that an exception can carry, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFUSALS = re.compile(r"refus|not_a_|invalid_input|InvalidInputError|InfeasibleError")


def calls_in(package: str) -> list[ast.Call]:
    return [
        call
        for path in (ROOT / "python" / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
    ]


def codes_in_python() -> set[str]:
    """The constants that are passed as `code=`, or first, to what makes an exception."""
    calls = calls_in("eplb_rs")
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


def codes_of_pipelines() -> set[tuple[str, str]]:
    """Codes of schedules and steps, with the argument at fault where it is known."""
    rust = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "rust/pipeline/src").rglob("*.rs")
    )
    found = set(re.findall(r'\binput\(\s*"(\w+)",\s*"?(\w+)"?', rust))
    found |= {(code, "") for code in re.findall(r'\btext\(\s*"(\w+)"', rust)}
    rules = (ROOT / "rust/pipeline/src/verify/violation.rs").read_text(encoding="utf-8")
    found |= {(code, "") for code in re.findall(r'Self::\w+ => "(\w+)",', rules)}
    for call in calls_in("dualpipe"):
        given = {word.arg: word.value for word in call.keywords if word.arg}
        codes = constants(given["code"]) if "code" in given else []
        arguments = constants(given["argument"]) if "argument" in given else []
        found |= {(code, "".join(arguments)) for code in codes}
    return found


def test_every_code_of_pipelines_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Pipelines")[2]
    lost = (
        (ROOT / "docs" / "executor.md").read_text(encoding="utf-8").partition("`error.code` |")[2]
    )
    cells = re.findall(r"^\| (`[^|]*`) \|", page + lost.partition("\n\n")[0], re.MULTILINE)
    explained = set(re.findall(r"`(\w+)`", " ".join(cells)))
    raised = codes_of_pipelines()
    assert {"odd_ranks", "twice", "stuck", "reduced_twice", "limit"} <= {code for code, _ in raised}
    assert {code for code, argument in raised if code != argument} <= explained
    # What a rank makes of the notes of others has no call of its own.
    assert explained - {"expelled", "failed", "lost"} <= {code for code, _ in raised}


def test_every_code_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").partition("## Pipelines")[0]
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert len(explained) == len(set(explained))
    raised = codes_in_python() | codes_in_rust()
    assert {"not_multiple", "not_integer", "in_use", "ragged", "missing_file"} <= raised
    assert set(explained) == raised
