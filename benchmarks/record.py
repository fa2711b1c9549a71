"""Shared by all benchmarks: the command line, tables, and results with machine and versions."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import esper_kernels

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "triton", "numpy", "scikit-learn", "tokenizers")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of the benchmark `name`; `description` is its module's docstring."""
    return argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def environment() -> dict[str, Any]:
    """The date, the machine and the versions with which the figures were measured."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M}",  # so that files of one day have an order
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
        "esper": esper_kernels.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        ),
    }


def write(name: str, figures: Any, folder: Path = RESULTS) -> Path:
    """Write `NAME.json` into `benchmarks/results`, or into another folder."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """The committed results `NAME.json`: their `environment` and their `figures`."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def machine_name() -> str:
    """The processor of this machine as part of a file name: "Intel(R) Xeon(R)" is intel-xeon."""
    plain = re.sub(r"\((r|tm)\)", " ", _cpu_model().lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def of_machines(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed results `NAME-PROCESSOR.json`, those of the last measured machine first."""
    paths = sorted(folder.glob(f"{name}-*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found.sort(key=lambda results: str(results["environment"]["date"]), reverse=True)
    return found


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def short(value: float) -> str:
    """Three significant digits, with commas and without an exponent: 21800.4 is "21,800"."""
    return f"{float(f'{value:.3g}'):,.15g}"


@contextmanager
def picture(
    path: Path, width: float, height: float, *, rows: int = 1, columns: int = 1
) -> Iterator[list[Any]]:
    """Axes, one row after the other, `width` by `height` inches in all, written to `path` as an SVG
    with its words as text and without a date."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esper", "font.size": 10}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False
        )
        for each in axes.flat:
            each.spines[["top", "right"]].set_visible(False)
        yield list(axes.flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    lines = (line.rstrip() for line in drawing.getvalue().splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
