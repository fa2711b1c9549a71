"""Live progress on a terminal, with rich: a bar with losses, accuracies, slots and the time
left."""

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import describe, describe_epoch


class ProgressSink:
    """Shows epochs in one line that changes, and other events as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def write(self, event: Event) -> None:
        if event.type is EventType.EPOCH and self._task is not None:
            self._progress.update(
                self._task, completed=event.epoch, description=escape(describe_epoch(event.data))
            )
            return
        if event.type is EventType.RUN_STARTED:
            self._task = self._progress.add_task("", total=event.data["max_epochs"])
            self._progress.start()
        self._progress.console.print(escape(describe(event)), highlight=False)

    def close(self) -> None:
        """Stop the display and restore the terminal."""
        self._progress.stop()
