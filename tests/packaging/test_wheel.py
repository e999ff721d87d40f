"""The built wheel, by its content and in an environment with NumPy alone."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dualpipe", "eplb_rs")
EXTRAS = ("plot", "testing", "torch")


@pytest.fixture(scope="session")
def wheel() -> Path:
    wheels = list((ROOT / "dist").glob("eplb_rs-*.whl"))
    assert len(wheels) == 1, f"one wheel is to be tested, not {wheels}; build it with: make wheel"
    return wheels[0]


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def metadata(wheel: Path, names: set[str]) -> Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


class Environment:
    """A virtual environment into which nothing but the wheel and what it requires was put."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.directory = directory
        venv.create(directory, with_pip=True)
        self.scripts = directory / ("Scripts" if sys.platform == "win32" else "bin")
        self.run([self.scripts / "python", "-m", "pip", "install", "--quiet", wheel])

    def run(self, command: Sequence[str | Path]) -> str:
        """What a command prints; run away from the sources."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            capture_output=True,
            check=False,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, *arguments: str) -> str:
        return self.run([self.scripts / "python", "-I", "-W", "error", *arguments])


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    return Environment(tmp_path_factory.mktemp("clean"), wheel)


def test_the_wheel_holds_both_packages_whole(names: set[str]) -> None:
    sources = {
        path.relative_to(ROOT / "python").as_posix()
        for package in PACKAGES
        for path in (ROOT / "python" / package).rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name == "py.typed"
    }
    assert {"dualpipe/py.typed", "eplb_rs/py.typed", "eplb_rs/_core.pyi"} <= sources
    shipped = {name for name in names if name.split("/")[0] in PACKAGES}
    native = {name for name in shipped if name.startswith("eplb_rs/_core.") and name[-1] != "i"}
    assert shipped - native == sources
    assert len(native) == 1


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    others = {name for name in names if name.split("/")[0] not in PACKAGES}
    assert {name.split("/")[0].rsplit(".", 1)[1] for name in others} == {"dist-info"}
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in others), licence


def test_the_wheel_serves_every_later_interpreter(wheel: Path) -> None:
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    tags = f"-cp{version}-cp{version}t-" if free_threaded else "-cp311-abi3-"
    assert tags in wheel.name


def test_numpy_is_all_it_requires(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist", [])
    plain = [line for line in required if "extra ==" not in line]
    assert len(plain) == 1
    assert plain[0].startswith("numpy")
    assert sorted(metadata.get_all("Provides-Extra", [])) == sorted(EXTRAS)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"


def test_nothing_but_numpy_came_with_it(clean: Environment) -> None:
    program = (
        "import json; from importlib.metadata import distributions\n"
        "print(json.dumps([distribution.name for distribution in distributions()]))"
    )
    installed = set(json.loads(clean.python("-c", program)))
    assert installed - {"pip", "setuptools"} == {"eplb-rs", "numpy"}


def test_both_packages_are_imported_from_it(clean: Environment, metadata: Message) -> None:
    program = (
        "import json, sys, eplb_rs, dualpipe\n"
        "modules = eplb_rs, dualpipe, eplb_rs._core\n"
        "found = [[module.__file__, module.__version__] for module in modules]\n"
        "print(json.dumps([found, sorted(sys.modules)]))"
    )
    found, imported = json.loads(clean.python("-c", program))
    for file, version in found:
        assert "site-packages" in Path(file).parts
        assert Path(file).is_relative_to(clean.directory)
        assert version == metadata["Version"]
    heavy = {"hypothesis", "logging", "matplotlib", "subprocess", "torch"}
    assert not heavy.intersection(imported)


def test_it_plans_without_torch(clean: Environment) -> None:
    program = (
        "import eplb_rs\n"
        "load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]\n"
        "print(eplb_rs.rebalance_experts(load, 16, 4, 2, 8)[0].tolist())"
    )
    answer = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]
    assert json.loads(clean.python("-c", program)) == answer


def test_the_command_works_without_torch(clean: Environment) -> None:
    by_name = clean.run([clean.scripts / "eplb", "--help"])
    by_module = clean.python("-m", "eplb_rs", "--help")
    for text in (by_name, by_module):
        assert "plan" in text
        assert "show" in text


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tests_see_the_installed_package(package: str) -> None:
    module = __import__(package)
    assert module.__file__ is not None
    file = Path(module.__file__)
    assert "site-packages" in file.parts
    assert not file.is_relative_to(ROOT / "python")
