"""The version, and the releases that it works with, in a file alone so that every module may import
it."""

__version__ = "0.1.0"

CHECKED = {"torch": ("2.10", "2.15"), "triton": ("3.5", "3.9")}
"""The oldest and newest minor releases that the kernels were built against and compiled with (`make
compat`)."""
