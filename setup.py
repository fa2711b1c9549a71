"""Build entry point. Metadata is in pyproject.toml; compiled kernels will be declared here."""

from setuptools import setup

setup()
