"""Live progress on a terminal, with rich: epochs, a bar, the time left, losses and slots."""

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
from rich.table import Column

from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import describe, describe_measures, describe_slots


class ProgressSink:
    """Shows epochs in one line that changes, and other events as lines above it.

    On a narrow terminal the bar is short, and what does not fit is cut from the end of the line:
    first the training loss, then the slots.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TimeRemainingColumn(),
            TextColumn(
                "{task.description}",
                table_column=Column(ratio=7, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None

    def write(self, event: Event) -> None:
        if event.type is EventType.EPOCH and self._task is not None:
            words = [  # what is last in the line is cut off first
                describe_measures("validation", event.data),
                describe_slots(event.data),
                describe_measures("train", event.data),
            ]
            description = escape("  ".join(filter(None, words)))
            self._progress.update(self._task, completed=event.epoch, description=description)
            return
        if event.type is EventType.RUN_STARTED:
            self._task = self._progress.add_task("", total=event.data["max_epochs"])
            self._progress.start()
        self._progress.console.print(escape(describe(event)), highlight=False)

    def close(self) -> None:
        """Stop the display and restore the terminal."""
        self._progress.stop()
