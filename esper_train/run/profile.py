"""Show where the time of an epoch goes: a few batches under torch's profiler, as a trace and a
table. `cli` calls it."""

from dataclasses import replace
from pathlib import Path

from torch.profiler import profile, record_function

from esper_train.base.state import RandomState
from esper_train.config import RunConfig
from esper_train.run.build import build_episode
from esper_train.run.directory import write_file
from esper_train.tasks import Task
from esper_train.train.loop import evaluate, train_one_epoch
from esper_train.train.spans import Spans

PARTS = ("data", "forward", "loss", "backward", "statistics", "optimizer", "evaluation")
BATCHES = 8
TABLE = "profile.md"
TRACE = "profile.json"


def write_profile(
    config: RunConfig, slots: tuple[str, ...], directory: Path, *, task: Task | None = None
) -> str:
    """Profile a few batches of a run like this, of which the run itself sees nothing, and return
    the table.

    Writes it to `profile.md`, and a trace for `chrome://tracing` or Perfetto to `profile.json`.
    Steps are not captured as CUDA graphs, which would have no parts.
    """
    config = replace(config, train=replace(config.train, capture=False))
    episode = build_episode(config, task=task, slots=slots)

    def epoch() -> None:
        train_one_epoch(
            episode.model,
            episode.train,
            episode.optimizers,
            config.train,
            task_type=episode.task.task_type,
            max_batches=BATCHES,
            step=episode.step,
        )
        evaluate(
            episode.model,
            episode.validation,
            config.train,
            task_type=episode.task.task_type,
            max_batches=BATCHES,
            step=episode.step,
        )

    with RandomState(config.seed, episode.device).active():
        epoch()  # work that is done once, such as compiling
        episode.step.spans = Spans.made(record_function)
        with profile() as profiler:
            epoch()
    profiler.export_chrome_trace(str(directory / TRACE))
    spent = {
        event.key: event.cpu_time_total / 1e3
        for event in profiler.key_averages()
        if event.key in PARTS
    }
    lines = ["| part | ms | share |", "|---|---|---|"]
    lines += [
        f"| {part} | {spent[part]:.3f} | {spent[part] / sum(spent.values()):.0%} |"
        for part in PARTS
    ]
    table = "\n".join(lines)
    write_file(directory / TABLE, (table + "\n").encode())
    return table
