"""The walls between rooms: what each may import, who may speak SQL or write tensors, and what a command costs to start.

Imports are looked at twice: by what a fresh interpreter holds after a command, and by what the source says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "editctl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SPECS = str(ROOT / "specs")
HEAVY = {"torch", "transformers", "textual", "sqlite_utils", "rich", "pandas"}
PATIENCE = 0.3 * float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
"""Seconds a command that needs no model may take; EDITCTL_TIME_FACTOR stretches it on a busy or slow machine."""


def loaded_by(code: str, cwd: Path) -> set[str]:
    """Top-level modules that the code loads in a fresh interpreter, beside those loaded by starting one."""
    wrapped = (
        "import sys, json\nbefore = set(sys.modules)\n"
        f"try:\n    exec({code!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print()\nprint(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", wrapped], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def running(*arguments: str) -> str:
    """Code that runs a command as the console script does."""
    return f"sys.argv = {['editctl', *arguments]!r}\nfrom editctl.cli import main\nmain()"


def test_importing_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither the engine's libraries nor the screens'."""
    assert loaded_by("import editctl.cli", tmp_path) & HEAVY == set()


def test_the_look_at_loaded_modules_sees_a_heavy_one(tmp_path: Path) -> None:
    """Control: a library loaded on purpose is found."""
    assert "rich" in loaded_by("import editctl.cli, rich.text", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [("validate", SPECS), ("--help",), ("methods",), ("methods", "--json"), ("schema",), ("plan", SPECS), ("log",)],
    ids=lambda arguments: " ".join(Path(a).name for a in arguments),
)
def test_a_command_that_needs_no_model_loads_no_torch(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Plans are made from the model's files and the store alone."""
    assert loaded_by(running(*arguments), tmp_path) & {"torch", "transformers", "textual", "pandas"} == set()


@pytest.mark.parametrize("arguments", [("validate", SPECS), ("--help",)], ids=["validate", "help"])
def test_validating_and_helping_load_nothing_heavy_at_all(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Not even what prints plans or opens the store."""
    assert loaded_by(running(*arguments), tmp_path) & HEAVY == set()


def test_the_terminal_ui_loads_no_torch_and_nothing_of_the_store_before_its_first_paint(tmp_path: Path) -> None:
    """The app and the first place; then, with every place and key it has, still no torch."""
    first = "from editctl.tui.app import EditctlApp, place_class\nfrom editctl.workspace import Workspace\n"
    first += "EditctlApp(Workspace(store=None, config=None))\nplace_class('specs')()\n"
    assert loaded_by(first, tmp_path) & {"torch", "transformers", "sqlite_utils", "pandas"} == set()
    rest = first + "import editctl.tui.keys, editctl.report\nlist(editctl.tui.keys.known())\n"
    assert loaded_by(rest, tmp_path) & {"torch", "transformers", "pandas"} == set()


@pytest.mark.parametrize("room", ["spec", "amend", "plan", "events", "errors"])
def test_the_pure_rooms_load_only_the_standard_library_pydantic_and_toml(room: str, tmp_path: Path) -> None:
    """They are what the terminal screens and every importer share."""
    allowed = {"editctl", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    allowed |= {"tomli", "tomlkit", *sys.stdlib_module_names}
    # Compiled wheels add a module of a random name, and builds of Python one that names the platform.
    stamped = re.compile(r"\w+__mypyc|_sysconfigdata\w*[\w-]*")
    found = {name for name in loaded_by(f"import editctl.{room}", tmp_path) if not stamped.fullmatch(name)}
    assert found - allowed == set()


# ---------------------------------------------------------------------------------------------------------------------
# By the source


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, wherever it stands; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


SQL = re.compile(
    r"\bselect\b.+\bfrom\b|\binsert into\b|\bdelete from\b|\bcreate (table|index)\b|\bpragma \w|\bupdate \w+ set\b"
    r"|\border by\b|\bwhere\b.+\?",
    re.IGNORECASE | re.DOTALL,
)


def speaks_sql(tree: ast.Module) -> bool:
    """Whether a module imports a database or holds a text that reads as SQL; docstrings are talk about it, not it."""
    if any(module.partition(".")[0] in ("sqlite3", "sqlite_utils") for module, _ in imported(tree)):
        return True
    talk = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return any(SQL.search(text.value) for text in texts if id(text) not in talk)


def test_only_the_store_speaks_sql() -> None:
    """And each of its files that does is found speaking it, so the scan is not blind; its values know nothing of it."""
    found = [path.relative_to(PACKAGE).as_posix() for path in SOURCES if speaks_sql(parsed(path))]
    assert found == [f"store/{name}.py" for name in ("care", "connection", "rows", "schema", "store")]


@pytest.mark.parametrize(
    "text", ["x.execute('select a from b')", "q = 'pragma journal_mode'", "def f():\n    import sqlite3"]
)
def test_the_scan_for_sql_finds_it(text: str) -> None:
    """Control, also for the ways the store does not use."""
    assert speaks_sql(ast.parse(text))


def writes_tensors(tree: ast.Module) -> bool:
    """Whether a module can write tensors to a file: with safetensors, torch or pickle."""
    reading = {"safe_open", "SafetensorError"}
    for module, name in imported(tree):
        top = module.partition(".")[0]
        if top == "safetensors" and name not in reading and not name.startswith("load"):
            return True
        if top in ("pickle", "dill", "joblib"):
            return True
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(f, ast.Attribute) and ast.unparse(f) in ("torch.save", "numpy.save") for f in calls)


def test_only_delta_and_export_write_tensors() -> None:
    """The built-in model's training saves with its libraries; the rooms that edit write factors through `delta`."""
    found = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if writes_tensors(parsed(path))}
    assert "delta.py" in found
    assert found <= {"delta.py", "export.py"}


def test_the_source_has_no_unfinished_marks() -> None:
    """What is to be done stands in no file that ships."""
    places = [*PACKAGE.rglob("*"), *(ROOT / "docs").rglob("*"), *(ROOT / "specs").rglob("*")]
    places += [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    texts = {".py", ".md", ".toml", ".txt", ".sh", ".tcss", ""}
    files = [path for path in places if path.is_file() and path.suffix in texts]
    assert len(files) > 30
    marks = re.compile(r"\b(TODO|FIXME)\b")
    assert [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_and_everything_public_in_it_says_what_it_is(path: Path) -> None:
    """Modules, classes and functions at the top of a module; a name with an underscore is the room's own."""
    tree = parsed(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# ---------------------------------------------------------------------------------------------------------------------
# What starting costs


@pytest.mark.timing
@pytest.mark.parametrize("arguments", [("--help",), ("validate", SPECS)], ids=["help", "validate"])
def test_a_command_without_a_model_answers_in_under_a_third_of_a_second(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """Best of five, since other work on the machine only ever adds; the first run compiles the byte code."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "editctl", *arguments]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds[1:]) < PATIENCE, seconds
