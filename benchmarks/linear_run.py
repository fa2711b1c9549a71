"""Training a language model of 32,768 classes with and without the logits of its batches.

    python -m benchmarks linear_run          # a few minutes; the tokenizer is trained at the first

What `esper-train fit --task pysource --vocab 32768` trains, for a few batches, with and without
`--train.linear-loss`: tokens per second, and the memory of training besides that in use before it.
Each case is a process of its own.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from benchmarks import record
from benchmarks.timing import in_new_process, peak_kib, start_of_peak
from esper_train import train_one_epoch
from esper_train.config import preset
from esper_train.run.run import prepare

VOCAB = 32768
WIDTHS = (24, 192)
"""Widths of the host: the task's own, and a larger one."""
BATCHES = 16


def measure(width: int, linear_loss: bool) -> dict[str, Any]:
    """Tokens per second and MiB of one case, after an epoch that warms it up."""
    config = preset("pysource")
    config = replace(
        config,
        vocab=VOCAB,
        max_batches=BATCHES,
        host=replace(config.host, width=width),
        train=replace(config.train, linear_loss=linear_loss),
    )
    episode = prepare(config, "fit")

    def train(batches: int) -> int:
        result = train_one_epoch(
            episode.model,
            episode.train,
            episode.optimizers,
            config.train,
            task_type=episode.task.task_type,
            max_batches=batches,
            step=episode.step,
        )
        return result.valid

    before = start_of_peak()
    train(2)
    started = time.perf_counter()
    tokens = train(BATCHES)
    seconds = time.perf_counter() - started
    return {
        "width": width,
        "linear_loss": linear_loss,
        "tokens_per_second": tokens / seconds,
        "MiB": (peak_kib() - before) / 2**10,
        "logits_MiB": tokens / BATCHES * VOCAB * 4 / 2**20,
    }


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: one row per case."""
    lines = [["width", "`train.linear_loss`", "tokens/s", "memory, MiB", "logits of a batch, MiB"]]
    lines += [
        [
            str(row["width"]),
            "on" if row["linear_loss"] else "off",
            f"{row['tokens_per_second']:.0f}",
            f"{row['MiB']:.0f}",
            f"{row['logits_MiB']:.0f}",
        ]
        for row in figures
    ]
    return record.markdown(lines)


def main() -> None:
    """Measure every case, print the table, write the figures."""
    parser = record.parser("linear_run", __doc__)
    parser.add_argument("--measure", type=int, metavar="WIDTH", help="one case, as JSON")
    parser.add_argument("--linear-loss", action="store_true", help="of that case")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.linear_loss)))
        return
    figures = [
        in_new_process("linear_run", "--measure", str(width), *on)
        for width in WIDTHS
        for on in ((), ("--linear-loss",))
    ]
    print(f"{table(figures)}\n\n{record.write('linear-run', figures)}")


if __name__ == "__main__":
    main()
