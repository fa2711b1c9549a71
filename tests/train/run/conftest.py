"""Fixtures of the tests that stop, resume and damage runs: a whole run with a checkpoint of every
epoch."""

from pathlib import Path

import pytest

from esper_train.run import job
from tests.helpers.growing_run import start


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a checkpoint of every epoch."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert start(directory, "--checkpoint.every", "1", "--checkpoint.keep", "99") == 0
    return directory


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report would take longer than the runs."""
    monkeypatch.setattr(job, "write_report", lambda directory: directory)
