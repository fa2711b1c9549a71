"""Events of a run made by hand, and a page taken apart, for the tests of reports."""

from __future__ import annotations

import dataclasses
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.run import directory as run_directory
from esper_train.run.report import write_report
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.sinks import JsonlSink

HOSTILE = "<script>alert(1)</script>\"'&$x$"
EPOCHS = 8
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Parses a page and keeps what the tests ask about; an unbalanced tag fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        """Words outside of pictures and styles."""
        self.pictures: dict[str, str] = {}
        """Label of a picture to the text in it."""
        self.picture = ""
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg":
            given = dict(attrs)
            assert given["role"] == "img"
            self.picture = given["aria-label"] or ""
            self.pictures[self.picture] = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if "svg" in self.open:
            self.pictures[self.picture] += data
        else:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row[0] == first]
        return found


def measures(loss: float, accuracy: float) -> dict[str, object]:
    return {"loss": loss, "accuracy": accuracy, "correct": {1: 5}, "valid": 10}


def health(norm: float, tensors: int = 2, groups: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "gradient_norm": norm,
        "gradient_health": 1.0,
        "has_vanishing": False,
        "has_exploding": False,
        "min_layer_norm": norm,
        "max_layer_norm": norm,
        "norm_ratio": 1.0,
        "zero_grad_fraction": 0.0,
        "nan_count": 0,
        "inf_count": 0,
        "tensors": tensors,
        "elements": 100,
        "groups": groups or {},
    }


def started(
    task: str = "digits", *, mode: str = "heuristic", slots: tuple[str, ...] = ("early", "mid")
) -> Event:
    data = {
        "mode": mode,
        "task": task,
        "seed": 7,
        "max_epochs": EPOCHS,
        "device": "cpu",
        "backend": "eager",
        "slots": list(slots),
        "host_parameters": 1009,
    }
    return Event(EventType.RUN_STARTED, 0, data)


def epoch_event(
    epoch: int,
    slots: tuple[SlotState, ...] = (),
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    train_accuracy: float | None = None,
    grad: bool = True,
) -> Event:
    groups = {"host": health(1.0)} | {s.slot: health(0.5) for s in slots if s.seed_id is not None}
    validation = measures(
        2.5 / epoch if loss is None else loss, 50.0 + 4 * epoch if accuracy is None else accuracy
    )
    data = {
        "max_epochs": EPOCHS,
        "train": measures(
            2.0 / epoch, 60.0 + 4 * epoch if train_accuracy is None else train_accuracy
        )
        | {"compiled": False, "compile_failure": None},
        "validation": validation,
        "grad": health(1.2, groups=groups) if grad else None,
        "slots": [dataclasses.asdict(state) | {"stage": state.stage.name} for state in slots],
        "decision": {
            "op": "WAIT",
            "slot": None,
            "blueprint": None,
            "blend": None,
            "reason": "",
            "confidence": 1.0,
            "refused": None,
        },
        "seconds": 0.5,
    }
    return Event(EventType.EPOCH, epoch, data)


def move(epoch: int, before: SlotState, stage: SeedStage, reason: str) -> Event:
    data = dataclasses.asdict(before) | {
        "from": before.stage.name,
        "stage": stage.name,
        "reason": reason,
        "improvement": before.improvement,
        "total_improvement": before.total_improvement,
    }
    return Event(EventType.SEED_STAGE, epoch, data)


def seated(epoch: int, slot: str, seed: str, blueprint: str, parameters: int) -> list[Event]:
    empty = SlotState(slot=slot, seed_id=seed, blueprint=blueprint, seed_parameters=parameters)
    germinated = dataclasses.replace(empty, stage=SeedStage.GERMINATED)
    return [
        move(epoch, empty, SeedStage.GERMINATED, f"{blueprint} seated"),
        move(epoch, germinated, SeedStage.TRAINING, "training begins"),
    ]


def finished(
    epoch: int = EPOCHS,
    *,
    status: str = "completed",
    test: float | None = 93.25,
    error: str | None = None,
) -> Event:
    data = {
        "status": status,
        "error": error,
        "accuracy": 82.0,
        "test": None if test is None else measures(0.3, test),
        "parameters": 12345,
        "fossils": 1,
        "action_counts": {"WAIT": epoch, "GERMINATE": 0, "CULL": 0, "FOSSILIZE": 0},
        "seconds": 4.25,
    }
    return Event(EventType.RUN_FINISHED, epoch, data)


def write(directory: Path, *events: Event) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    sink = JsonlSink(directory / run_directory.METRICS)
    for event in events:
        sink.write(event)
    sink.close()
    return directory


def grown(
    *, task: str = "digits", reason: str = "training_timeout", blueprint: str = "norm", gap: int = 0
) -> list[Event]:
    """seed_0 lives in early from 1 to its fossilization at 5, seed_1 in mid from 2 to its cull at
    6."""
    stage = SeedStage
    life = {2: stage.TRAINING, 3: stage.BLENDING, 4: stage.PROBATIONARY, 5: stage.PROBATIONARY}
    events = [started(task)]
    for epoch in range(1, EPOCHS + 1):
        early = SlotState(slot="early")
        mid = SlotState(slot="mid")
        if epoch > 1:
            early = SlotState(
                slot="early",
                stage=life.get(epoch, stage.FOSSILIZED),
                seed_id="seed_0",
                blueprint="conv_expand",
                alpha=0.0 if epoch < 4 else 1.0,
                seed_parameters=1387,
                contribution=2.5 if epoch > 3 else None,
                gradient_ratio=0.5,
            )
        if 2 < epoch <= 6:
            mid = SlotState(
                slot="mid",
                stage=stage.TRAINING,
                seed_id="seed_1",
                blueprint=blueprint,
                seed_parameters=13,
            )
        elif epoch > 6:
            mid = SlotState(slot="mid", stage=stage.EMBARGOED)
        events.append(epoch_event(epoch, (early, mid), grad=epoch != gap))
        if epoch == 1:
            events += seated(1, "early", "seed_0", "conv_expand", 1387)
        if epoch == 2:
            events += seated(2, "mid", "seed_1", blueprint, 13)
        if epoch == 5:
            events.append(move(5, early, stage.FOSSILIZED, "G5 passed"))
        if epoch == 6:
            events.append(move(6, mid, stage.CULLED, reason))
            events.append(
                move(
                    6,
                    dataclasses.replace(mid, stage=stage.CULLED),
                    stage.EMBARGOED,
                    "closed for 5 epochs",
                )
            )
    return events


def fit(test: float = 91.75) -> list[Event]:
    epochs = [epoch_event(i, accuracy=70.0 + i) for i in range(1, EPOCHS + 1)]
    return [started(mode="fit", slots=()), *epochs, finished(test=test)]


def page(directory: Path) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))
