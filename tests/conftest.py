"""Fixtures of every test: repeatable examples, default signal handlers, Triton's interpreter
without a GPU, and long tests first."""

import os
import signal

import pytest
import torch
from hypothesis import settings

from tests.helpers.order import longest_first

# The same examples in each run, so that a failing test is due to a change.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Triton reads this once, when it is first imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# nohup and background jobs ignore these signals, and processes of tests would inherit that.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # the tests that are left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    longest_first(items, float(config.getini("timeout")), processes)
