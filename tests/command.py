"""The command line as tests run it: arguments of any type, in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from deltaprompt.cli import app


def run(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def succeeds(*arguments: object, stdin: str | None = None) -> Any:
    done = run(*arguments, stdin=stdin)
    assert done.exit_code == 0, done.output
    return done


def fails(*arguments: object, code: int = 2) -> str:
    """What the command says of the mistake, without a traceback."""
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    said: str = done.stderr.strip()
    return said


def last_json(done: Any) -> dict[str, Any]:
    """The object in the last line of what was printed."""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
