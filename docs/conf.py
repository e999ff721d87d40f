"""How the documentation is built: make docs."""

import os
import re
import subprocess
import sys
from importlib.metadata import version as version_of

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

project = "eplb-rs"
author = "The eplb-rs authors"
copyright = f"2026, {author}"
release = version_of("eplb-rs")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"eplb-rs {release}"

# `[L, E]` in a docstring is code.
default_role = "code"

myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autoclass_content = "class"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False


# The command line's programs, and the modules that `python -m` runs for them.
COMMANDS = {"eplb": "eplb_rs", "dualpipe": "dualpipe"}


class CommandHelp(Directive):
    """What a command of the command line says of itself, run when the page is built."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The text of `PROGRAM [COMMAND] --help`."""
        program, *command = [*self.arguments, "--help"]
        done = subprocess.run(
            [sys.executable, "-m", COMMANDS[program], *command],
            env={**os.environ, "COLUMNS": "90", "NO_COLOR": "1"},
            capture_output=True,
            check=True,
            text=True,
        )
        text = f"$ {' '.join([program, *command])}\n{done.stdout}"
        return [nodes.literal_block(text, text, language="text")]


# Docstrings of properties are prose, but napoleon takes what precedes a colon in their first line
# for their type, and reStructuredText a lone letter for the first item of a list.
COLON = "\N{MODIFIER LETTER COLON}"


def hide_colons(
    _app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Before napoleon: a property's colons become something else."""
    if what in {"attribute", "property"} and lines:
        lines[0] = re.sub(r"^([A-Z])\.", r"\\\1.", lines[0]).replace(": ", COLON + " ")


def show_colons(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """After napoleon: they are colons again. A named tuple's fields need no number."""
    lines[:] = [
        line.replace(COLON, ":") for line in lines if not line.startswith("Alias for field")
    ]


def setup(app: Sphinx) -> None:
    """Registers the above."""
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)
    app.connect("autodoc-process-docstring", show_colons, priority=600)
