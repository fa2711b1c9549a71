"""Learning-rate schedules in a run, its optimizers and its memory layout: torch's own values, each
group its own."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from esper_train import (
    Decision,
    HostConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    Signals,
    TrainConfig,
)
from esper_train.run.build import build_episode
from tests.helpers.scripted import EASY, Script, germinate, run_under

SHORT = RunConfig(task="synthetic", max_epochs=4, max_batches=3, growth=EASY)


def rates(config: RunConfig, **by_epoch: Decision) -> dict[str, list[float]]:
    """Group to its learning rate after each epoch."""
    episode = build_episode(config, slots=("early",))
    seen: dict[str, list[float]] = {}

    class Watch(Script):
        def decide(self, signals: Signals) -> Decision:
            for group, state in episode.optimizers.state_dict().items():
                seen.setdefault(group, []).append(state["param_groups"][0]["lr"])
            return super().decide(signals)

    run_under(episode, Watch(**by_epoch), mode="test")
    return seen


def config_of(kind: str, each: str = "step", accumulate: int = 1, **options: float) -> RunConfig:
    schedule = ScheduleConfig(kind=kind, each=each, **options)  # type: ignore[arg-type]
    optim = OptimConfig(host_lr=0.1, seed_lr=0.2, schedule=schedule)
    return replace(SHORT, optim=optim, train=TrainConfig(accumulate=accumulate))


def cosine(progress: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize("each", ["step", "epoch"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_host_follows_the_formula_over_the_whole_run(each: str, accumulate: int) -> None:
    after = [1 / 4, 2 / 4, 3 / 4, 1.0]  # share of the run that is over
    assert rates(config_of("constant", each, accumulate))["host"] == [0.1] * 4
    assert rates(config_of("cosine", each, accumulate, final=0.1))["host"] == pytest.approx(
        [0.1 * cosine(t, 0.1) for t in after]
    )
    onecycle = rates(config_of("onecycle", each, accumulate, warmup=0.5))["host"]
    assert onecycle[0] < onecycle[1] > onecycle[2] > onecycle[3]  # up to the middle, then down
    assert 0.08 < onecycle[1] <= 0.1
    assert onecycle[3] == pytest.approx(0.1 / 25 / 1e4)


def test_a_seed_has_a_schedule_of_its_own_over_what_is_left() -> None:
    seen = rates(config_of("cosine"), e1=germinate())
    assert seen["host"] == pytest.approx([0.1 * cosine(t / 4, 0) for t in (1, 2, 3, 4)])
    # from epoch 2 on
    assert seen["early"] == pytest.approx([0.2 * cosine(t / 3, 0) for t in (1, 2, 3)])


def test_a_schedule_that_is_over_keeps_its_last_rate() -> None:
    """A run may be prolonged when it is resumed: torch's own would rise again, or raise."""
    for kind in ("cosine", "onecycle"):
        registry = build_episode(config_of(kind, final=0.1), slots=()).optimizers
        lrs = []
        for _ in range(16):
            registry.step()
            registry.advance("step")
            lrs.append(registry.present()[0].param_groups[0]["lr"])
        assert lrs[11:] == [lrs[11]] * 5
        assert lrs[11] < lrs[10]


def test_state_of_the_schedule_is_saved_with_its_optimizer() -> None:
    config = config_of("cosine")
    first, second = (build_episode(config, slots=()).optimizers for _ in range(2))
    for _ in range(5):
        first.step()
        first.advance("step")
    second.load_state_dict(first.state_dict())
    for registry in (first, second):
        registry.step()
        registry.advance("step")
    lrs = [o.param_groups[0]["lr"] for registry in (first, second) for o in registry.present()]
    assert lrs[0] == lrs[1] < 0.1


# torch does not see through the copy
@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")
@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
def test_a_kept_copy_goes_on_as_the_original_did(kind: str) -> None:
    """A rollback makes such a copy: the copy's schedules change the copy's optimizers."""
    registry = build_episode(config_of(kind), slots=()).optimizers
    copied = copy.deepcopy(registry)
    rates = []
    for one in (registry, copied):
        for _ in range(3):
            one.step()
            one.advance("step")
        rates.append(one.present()[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] != 0.1


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizers_of_a_run_on_a_cpu_are_fused(kind: str) -> None:
    episode = build_episode(replace(SHORT, optim=OptimConfig(kind=kind)), slots=())  # type: ignore[arg-type]
    assert [o.defaults["fused"] for o in episode.optimizers.present()] == [True]


def test_float16_run_trains() -> None:
    """The optimizers that a run makes can skip a step; seeds and their gates too."""
    config = config_of("cosine")
    amp = replace(config.train, amp=replace(config.train.amp, dtype="float16", init_scale=2.0**24))
    script = Script(e1=germinate(blend="gated"))
    episode = build_episode(replace(config, train=amp), slots=("early",))
    run_under(episode, script, mode="test")
    assert episode.step.scaler is not None
    assert 0 < episode.step.scaler.scale.item() < 2.0**24
    assert all(bool(torch.isfinite(p).all()) for p in episode.model.parameters())


@pytest.mark.parametrize(
    ("width", "asked", "used"),
    [(3, None, False), (16, None, True), (16, False, False), (3, True, True)],
)
def test_channels_last_where_it_pays_or_where_asked_for(
    width: int, asked: bool | None, used: bool
) -> None:
    config = replace(SHORT, host=HostConfig(width=width), channels_last=asked)
    weight = build_episode(config, slots=()).model.host.segments["mid"].state_dict()["0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) is used


def test_channels_last_grows_the_same_network() -> None:
    config = replace(SHORT, host=HostConfig(width=16), max_epochs=4)
    ends = []
    for asked in (False, True):
        episode = build_episode(replace(config, channels_last=asked), slots=("early",))
        run_under(episode, Script(e1=germinate()), mode="test")
        ends.append(torch.cat([p.detach().flatten() for p in episode.model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
