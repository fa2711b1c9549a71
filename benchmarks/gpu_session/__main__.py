"""The first half hour on a GPU, in three parts of at most ten minutes.

    make gpu-prepare    # before, where a compiler and a package index are
    python -m benchmarks gpu_session correct    # or speed, or why; several run one after another

No environment is needed but torch's: packages that `make gpu-prepare` left in build/gpu are found
there. Writes PART.json after every step and PART.log while it runs, into $OUT where that is set,
otherwise into benchmarks/results/gpu. Exits with 1 where a step failed or ran out of time; a
skipped step names its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks import record
from benchmarks.gpu_session.steps import ROOT, Step, missing, parts

CARRIED = ROOT / "build" / "gpu"  # pure-Python packages


def run(step: Step, log: TextIO) -> dict[str, Any]:
    """Run one step, with its output in the log. The result includes the JSON files that it
    wrote."""
    reasons = [reason for reason in map(missing, step.needs) if reason is not None]
    if reasons:
        return {"step": step.name, "result": "skipped", "reason": "; ".join(reasons)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [word.replace("{folder}", folder) for word in step.command]
        environment = {**os.environ, **dict(step.environment), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(CARRIED), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        result = within(command, step.limit, environment, log)
        figures = {
            path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))
        }
    answer = {"step": step.name, "result": result, "seconds": round(time.monotonic() - started, 1)}
    return answer | ({"figures": figures} if figures else {})


def within(command: list[str], limit: int, environment: dict[str, str], log: TextIO) -> str:
    """ "passed", "failed (exit code N)" or "out of time", after at most `limit` seconds and some
    for the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # and the processes that it started
        process.wait()
        return "out of time"
    return "passed" if code == 0 else f"failed (exit code {code})"


def run_part(name: str, folder: Path) -> bool:
    """Run the steps of a part. Returns whether none failed."""
    folder.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    with (folder / f"{name}.log").open("w") as log:
        for step in parts()[name]:
            log.write(f"\n===== {step.name}, at most {step.limit} s\n")
            log.flush()
            done.append(run(step, log))
            record.write(name, done, folder)
            line = {key: value for key, value in done[-1].items() if key != "figures"}
            print(f"{name}: {', '.join(map(str, line.values()))}", flush=True)
    return all(step["result"] in ("passed", "skipped") for step in done)


def main(names: list[str]) -> None:
    """Run the named parts, in the order given."""
    if not names or not set(names) <= set(parts()):
        sys.exit(
            f"usage: python -m benchmarks gpu_session {{{','.join(parts())}}}..., got "
            f"{' '.join(names) or 'nothing'}"
        )
    folder = Path(os.environ.get("OUT") or record.RESULTS / "gpu")
    passed = [run_part(name, folder) for name in names]
    print(f"results are in {folder}")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
