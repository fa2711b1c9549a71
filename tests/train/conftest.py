"""The events of three whole runs, for the tests of what is reported."""

from dataclasses import replace

import pytest

from esper_train.config import RunConfig
from esper_train.control.config import GovernorConfig
from esper_train.run.build import build_episode
from esper_train.run.run import NonFiniteLossError
from esper_train.run.start import run_heuristic_episode
from esper_train.telemetry.config import TelemetryConfig
from esper_train.telemetry.event import Event
from esper_train.telemetry.hub import TelemetryHub
from esper_train.train.config import OptimConfig, TrainConfig
from tests.helpers.scripted import (
    EASY,
    Planted,
    Recorder,
    a_life_and_a_cull,
    mislabelled,
    not_a_number,
    run_under,
)


@pytest.fixture(scope="session")
def run_events() -> list[Event]:
    """Events of a run of 12 epochs, in which a seed reaches blending and another is culled."""
    recorder = Recorder()
    config = RunConfig(
        task="synthetic",
        max_epochs=12,
        growth=replace(EASY, training_min_epochs=1, blending_epochs=2, embargo_epochs=2),
    )
    run_heuristic_episode(config, policy=a_life_and_a_cull(), hub=TelemetryHub([recorder]))
    return recorder.events


@pytest.fixture(scope="session")
def broken_events() -> list[Event]:
    """Events of a run that ends because its loss is not a number."""
    recorder = Recorder()
    config = RunConfig(
        task="synthetic", max_epochs=2, max_batches=4, optim=OptimConfig(host_lr=1e30)
    )
    with pytest.raises(NonFiniteLossError):
        run_heuristic_episode(config, hub=TelemetryHub([recorder]))
    return recorder.events


@pytest.fixture(scope="session")
def troubled_events() -> list[Event]:
    """Events, at the level debug, of a run that meets a bad label in epoch 2 and is rolled back
    once, in epoch 3."""
    recorder = Recorder()
    base = RunConfig(task="synthetic", max_epochs=4, max_batches=4)
    train = TrainConfig(on_bad_numbers="rollback")
    telemetry = TelemetryConfig(level="debug")
    config = replace(base, train=train, governor=GovernorConfig(snapshot_epochs=2))
    episode = build_episode(config, slots=("early", "mid", "late"))
    loader = Planted(episode.train, mislabelled, (2, 1))
    episode.train = Planted(loader, not_a_number, (3, 1))  # type: ignore[assignment]
    run_under(episode, a_life_and_a_cull(), TelemetryHub([recorder], telemetry))
    return recorder.events


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose pictures are blank, for tests of their words: drawing takes most of the
    time."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, file, **_: file.write("<svg></svg>"))
