"""The documentation is true: its Python runs, its links lead somewhere, what it shows of files and tables is theirs."""

import re
from pathlib import Path

import pytest

from deltaprompt.data import few_shot, shipped

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@names
def test_every_link_to_a_file_leads_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@names
def test_every_file_that_is_shown_is_the_file(page):
    shown = SHOWN.findall(page.read_text())
    assert [path for path, code in shown if code != (ROOT / path).read_text()] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SHOWN.sub("", page.read_text())
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names = {"__name__": page.stem}
    exec(compile(code, page.name, "exec"), names)
    assert "dp" in names or not code


def test_the_first_session_of_the_readme_runs(tmp_path, monkeypatch):
    """Where a line is followed by what it gives, it gives that."""
    monkeypatch.chdir(tmp_path)
    session = re.search(r"```python\n(>>> .*?)```", PAGES[0].read_text(), re.DOTALL)[1].splitlines()
    rows = [row for row in shipped.load("train") if row.label in ("billing", "delivery")]
    names = {"train": few_shot(rows, 8, 0)[0]}
    for line, after in zip(session, [*session[1:], ">>> "], strict=True):
        if line.startswith(">>> ") and after.startswith(">>> "):
            exec(line[4:], names)
        elif line.startswith(">>> "):
            assert repr(eval(line[4:], names)) == after


def test_the_walk_through_writes_a_method_in_under_sixty_lines():
    page = (ROOT / "docs/writing-a-delta.md").read_text()
    [(path, code)] = SHOWN.findall(page)
    assert path == "src/deltaprompt/deltas/adapter_bias.py"
    assert len(code.splitlines()) < 60


def test_every_test_that_the_openprompt_page_names_is_there():
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "docs/openprompt.md").read_text())
    assert len(named) > 40
    missing = [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in (ROOT / path).read_text())
    ]
    assert missing == []
