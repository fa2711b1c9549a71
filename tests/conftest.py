"""For every test: Hypothesis makes the same examples on each run, so that a red test is the fault of a change."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
