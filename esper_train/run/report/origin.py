"""The section of a report on how its run was made: the command, the versions, and the settings."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from esper_train.base.settings import differing
from esper_train.config import preset
from esper_train.run.directory import CONFIG, ENVIRONMENT, read_config
from esper_train.run.report.page import table, tag


def origin_part(directory: Path) -> list[str]:
    """The contents of environment.json, and the settings that differ from the task's presets."""
    parts = [tag("h2", "How it was made")]
    with suppress(OSError, ValueError):  # missing or damaged
        environment = json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))
        if isinstance(environment, dict):
            versions = [[name, str(value)] for name, value in environment.items()]
            parts.append(table([["made with", ""], *versions]))
    rows = list(_changed(directory))
    parts.append(tag("p", f"Settings that are not the defaults of the task; {CONFIG} has all."))
    parts.append(table([["setting", "default", "here"], *rows]) if rows else tag("p", "None."))
    return parts


def _changed(directory: Path) -> Iterator[list[str]]:
    with suppress(OSError, ValueError, TypeError, KeyError):  # missing, or of another version
        values = read_config(directory)
        for path, (usual, here) in differing([asdict(preset(values["task"])), values]).items():
            yield [path, str(usual), str(here)]
