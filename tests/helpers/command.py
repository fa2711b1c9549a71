"""Helpers for tests of the command: options for a quick run, and a call that must be refused."""

import pytest

from esper_train import cli

QUICK = ["--task", "synthetic", "--max-epochs", "3", "--max-batches", "2"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed, for a call that cannot work."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:  # the option parser's way to leave
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return code, " ".join((printed.err + printed.out).replace("│", " ").split())
