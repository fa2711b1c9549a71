"""Does growing pay? Test accuracy of three networks over several seeds, as the README's tables.

    python -m benchmarks growth                             # digits, 10 seeds, about three minutes on two cores
    python -m benchmarks growth --task pysource --seeds 2   # a quarter of an hour

grown: `esper-train heuristic`; fit: the same host, epochs and data without slots; static: a host of the width whose
parameter count is nearest to the grown network's, trained like fit.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks import record
from esper_train import HostConfig, get_task, run_fit, run_heuristic_episode
from esper_train.config import preset


def parameters(task: str, width: int) -> int:
    """Parameters of the task's host of this width."""
    host = get_task(task).build_host(HostConfig(width=width))
    return sum(p.numel() for p in host.parameters())


def measure(task: str, seed: int) -> dict[str, Any]:
    """One seed's row: accuracies on the test split in percent, parameters, fossils."""
    config = replace(preset(task), seed=seed)
    grown = run_heuristic_episode(config)
    fit = run_fit(config)
    width = min(range(1, 65), key=lambda w: abs(parameters(task, w) - grown.parameters))
    static = run_fit(replace(config, host=HostConfig(width=width)))
    return {
        "seed": seed,
        "grown": grown.test.accuracy,
        "fit": fit.test.accuracy,
        "static": static.test.accuracy,
        "grown_parameters": grown.parameters,
        "fit_parameters": fit.parameters,
        "static_parameters": static.parameters,
        "fossils": grown.fossils,
        "contributions": grown.contributions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a network, a column a seed, mean last."""
    seeds = [str(row["seed"]) for row in rows]
    lines = ["| | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |", "|---" * (len(rows) + 2) + "|"]

    def line(label: str, values: list[float], digits: int) -> None:
        cells = [f"{value:.{digits}f}" for value in values]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | **{mean(values):.{max(digits, 1)}f}** |")

    for name in ("grown", "fit", "static"):
        line(f"{name}: test accuracy, %", [row[name] for row in rows], 2)
        line(f"{name}: parameters", [row[f"{name}_parameters"] for row in rows], 0)
    line("grown: fossilized seeds", [row["fossils"] for row in rows], 0)
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        rows.append(measure(options.task, seed))
        print(
            f"seed {seed}: " + ", ".join(f"{k} {rows[-1][k]:.2f}" for k in ("grown", "fit", "static")),
            flush=True,
        )
    print(f"\n{table(rows)}\n\n{record.write(f'growth-{options.task}', rows)}")


if __name__ == "__main__":
    main()
