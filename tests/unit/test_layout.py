"""The rules of the house that a parser can check: sizes, forbidden calls, and what importing does."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
FILES = sorted((SRC / "deltaprompt").rglob("*.py"))
METHODS = [f for f in FILES if f.parent.name == "deltas" and not f.name.startswith("_")]

FILE_LINES = 400
METHOD_LINES = 99
FUNCTION_LINES = 60

FORBIDDEN_CALLS = {"eval", "exec", "hasattr"}
FORBIDDEN_NAMES = {"torch.load", *(f"builtins.{call}" for call in FORBIDDEN_CALLS)}
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill"}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every function longer than `FUNCTION_LINES`, its decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines"


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every forbidden call or import; `model.eval()` is a method and allowed."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if name in FORBIDDEN_CALLS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if f"{owner}.{name}" in FORBIDDEN_NAMES:
                yield node.lineno, f"{owner}.{name}"
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                dotted = [f"{module}.{a.name}" for a in names]
                yield from ((node.lineno, name) for name in dotted if name in FORBIDDEN_NAMES)
                if module.split(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, module


def breaches(rule: Callable[[ast.AST], Iterator[tuple[int, str]]]) -> list[str]:
    return [
        f"{path.relative_to(SRC)}:{line}: {what}"
        for path in FILES
        for line, what in rule(ast.parse(path.read_text(encoding="utf-8")))
    ]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter that sees the sources and turns warnings into errors."""
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_there_are_files_to_check():
    assert FILES


@pytest.mark.parametrize(("files", "limit"), [(FILES, FILE_LINES), (METHODS, METHOD_LINES)], ids=["any", "method"])
def test_a_file_is_short(files, limit):
    long = [f"{path.relative_to(SRC)}: {lines(path)} lines, at most {limit}" for path in files if lines(path) > limit]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("rule", [long_functions, forbidden])
def test_no_file_breaks_the_rule(rule):
    found = breaches(rule)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec('1')",
        "f = hasattr",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import torch\ntorch.load('x')",
        "from torch import load",
    ],
)
def test_a_planted_call_is_seen(code):
    assert list(forbidden(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "x = 'eval('", "# pickle", "safetensors.torch.load_file('x')"])
def test_an_allowed_call_is_not(code):
    assert not list(forbidden(ast.parse(code)))


@pytest.mark.parametrize("length", [FUNCTION_LINES, FUNCTION_LINES + 1])
def test_a_planted_long_function_is_seen(length):
    tree = ast.parse("@cached\ndef f():\n" + "    x = 1\n" * (length - 1))
    assert bool(list(long_functions(tree))) == (length > FUNCTION_LINES)


def test_importing_the_package_leaves_transformers_out():
    done = python("import sys, deltaprompt\nprint('transformers' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_every_module_imports_in_silence():
    names = [".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for p in FILES]
    code = "import importlib\nfor name in {!r}:\n    importlib.import_module(name)"
    done = python(code.format([n for n in names if not n.endswith(".__main__")]))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
