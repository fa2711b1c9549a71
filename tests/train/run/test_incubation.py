"""A seed in TRAINING learns, and the rest of the run is the same as without it, bit for bit.

Long file: pairs of runs, with and without a seed, share their helpers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from esper_train import (
    AmpConfig,
    BlueprintRegistry,
    CompileConfig,
    Decision,
    GradConfig,
    Host,
    HostConfig,
    OptimConfig,
    RunConfig,
    Splits,
    Task,
    TrainConfig,
    TrainStep,
    build_train_step,
    cnn_host,
    default_registry,
    get_task,
    transformer_host,
)
from esper_train.morph.blueprints import Blueprint, Residual
from esper_train.morph.config import GrowthConfig
from esper_train.run.build import build_episode
from esper_train.run.cost import seed_cost
from esper_train.run.episode import Episode
from esper_train.run.epoch import Epoch
from esper_train.train.capture import Capture
from esper_train.train.loop import train_one_epoch
from esper_train.train.optimizers import OptimizerRegistry
from tests.helpers.scripted import Script, germinate
from tests.helpers.taped import Tape, assert_same

LONG = GrowthConfig(training_timeout=1000, blending_potential=1000.0)
"""Seeds stay in TRAINING."""


class Counting(nn.Module):
    """A later module with state of every kind: running numbers, random numbers, and spectral
    norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mix = parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.mix(x))
        return nn.functional.dropout(nn.functional.relu_(x), 0.25, self.training)


def stateful_host(config: HostConfig) -> Host:
    """The slots see 4 channels; what lies behind each changes its state in every pass."""
    segments = {
        "early": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)),
        "mid": Counting(4),
        "late": Counting(4),
    }
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 10))
    return Host("cnn", segments, head, dict.fromkeys(segments, 4))


def plain_host(config: HostConfig) -> Host:
    return cnn_host(image_size=8, in_channels=1, num_classes=10, width=4)


def sequence_host(config: HostConfig) -> Host:
    return transformer_host(vocab_size=16, context=8, width=8, depth=3, dropout=0.1)


def sequences() -> Splits:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(16, (96, 9), generator=generator) for _ in range(3)]
    train, validation, test = ((tokens[:, :-1], tokens[:, 1:]) for tokens in parts)
    return Splits(train=train, validation=validation, test=test)


IMAGES = get_task("synthetic")
TASKS = {
    "batch norm": replace(IMAGES, build_host=plain_host),
    "every kind of state": replace(IMAGES, build_host=stateful_host),
    "transformer": Task(
        name="sequences", task_type="lm", num_classes=16, load=sequences, build_host=sequence_host
    ),
}


def noisy(channels: int) -> nn.Module:
    """A seed that draws random numbers, at its birth and in training, and has running
    statistics."""
    last = nn.Conv2d(channels, channels, 1)
    return Residual(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.Conv2d(8, channels, 1),
        last,
    )


def noisy_mlp(channels: int) -> nn.Module:
    return Residual(nn.LayerNorm(channels), nn.Dropout(0.5), nn.Linear(channels, channels))


def registry() -> BlueprintRegistry:
    found = default_registry()
    found.register(Blueprint("noisy", "cnn", noisy))
    found.register(Blueprint("noisy", "transformer", noisy_mlp))
    return found


def config(**train: Any) -> RunConfig:
    policy = train.pop("optim", OptimConfig())
    return RunConfig(
        task="synthetic",
        max_epochs=20,
        max_batches=3,
        batch_size=16,
        growth=LONG,
        optim=policy,
        train=TrainConfig(**train),
    )


def prepared(task: str, run: RunConfig) -> Episode:
    return build_episode(run, task=TASKS[task], slots=("early", "mid", "late"), registry=registry())


def epochs(episode: Episode, number: int, **by_epoch: Decision) -> list[Any]:
    """Run some epochs; what each measured of the host."""
    script = Script(**by_epoch)
    measured = []
    for i in range(episode.epoch + 1, episode.epoch + 1 + number):
        epoch = Epoch(episode, i)
        signals = epoch.observe(epoch.launch().read())
        assert signals is not None
        epoch.apply(script.decide(signals))
        episode.epoch = i
        train = epoch._train
        health = None if train.grad is None else train.grad.groups["host"]
        losses = train.loss, train.points, signals.val_loss, signals.val_accuracy
        measured.append((losses, health, train.skipped))
    return measured


def host_state(episode: Episode) -> dict[str, Any]:
    """Everything in the run except its seeds."""
    return {
        "host": episode.model.host.state_dict(),
        "optimizer": episode.optimizers.state_dict()["host"],
        "step": episode.step.state_dict(),
        "random": torch.get_rng_state(),
        "training": [module.training for module in episode.model.host.modules()],
    }


def run(
    task: str, run_config: RunConfig, **by_epoch: Decision
) -> tuple[Episode, list[Any], dict[str, Any]]:
    episode = prepared(task, run_config)
    with episode.random.active():
        measured = epochs(episode, 3, **by_epoch)
        return episode, measured, host_state(episode)


TWO_SEEDS = {"e1": germinate("early", "noisy", "gated"), "e2": germinate("mid", "noisy")}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"amp": AmpConfig(dtype="bfloat16")},
    "float16": {"amp": AmpConfig(dtype="float16", init_scale=2.0**10)},
    "clipped": {"grad": GradConfig(clip_norm=0.05)},
    "accumulated": {"accumulate": 2},
    "skipping": {"on_bad_numbers": "skip"},
    "adamw": {"optim": OptimConfig(kind="adamw", host_lr=1e-3, seed_lr=1e-2)},
}


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("task", list(TASKS))
def test_a_run_with_seeds_in_training_is_the_run_without(task: str, setting: str) -> None:
    """Both runs have the same numbers, weights, running statistics, momentum, loss scale, random
    numbers and modes."""
    _, bare, without = run(task, config(**SETTINGS[setting]))
    episode, grown, with_seeds = run(task, config(**SETTINGS[setting]), **TWO_SEEDS)
    assert [slot.state.stage.name for slot in episode.model.slots] == [
        "TRAINING",
        "TRAINING",
        "DORMANT",
    ]
    assert_same(with_seeds, without)
    assert grown == bare
    for slot in ("early", "mid"):
        seed = episode.model.slot(slot)
        assert len(seed.state.potentials) >= 1
        moved = [
            p
            for p in episode.model.get_seed_parameters(slot)
            if p.grad is not None and p.grad.any()
        ]
        assert moved, "the seed did not learn"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("task", ["batch norm", "transformer"])
def test_compiled_too(task: str) -> None:
    compiled = config(compile=CompileConfig(enabled=True, backend="aot_eager"))
    _, bare, without = run(task, compiled)
    episode, grown, with_seeds = run(task, compiled, **TWO_SEEDS)
    assert episode.step.compile_failure is None
    assert_same(with_seeds, without)
    assert grown == bare


def test_a_seed_learns_from_its_own_effect() -> None:
    """The gradient is that of the loss at alpha 1, batch statistics and all, computed by hand in
    float64."""
    episode = prepared(
        "batch norm", config(optim=OptimConfig(seed_lr=0.5, momentum=0.0, weight_decay=0.0))
    )
    with episode.random.active():
        epochs(episode, 3, e1=germinate("early", "conv_light"))
        model = episode.model.double()
        for p in model.get_seed_parameters():
            nn.init.normal_(p, std=0.1)
        inputs, targets = next(iter(episode.train))
        inputs = inputs.double()
        (learner,) = episode.learners()
        meter_config = episode.config.train
        train_one_epoch(
            model,
            [(inputs, targets)],
            NoSteps(episode),
            replace(meter_config, kernel=replace(meter_config.kernel, backend="eager")),
            task_type="classification",
            learners=[learner],
        )
        got = [p.grad for p in model.get_seed_parameters()]
        slot = model.slot("early")
        early, mid, late = model.host.segments.values()
        assert slot.seed is not None
        model.train()
        logits = model.host.head(late(mid(slot.seed(early(inputs).detach()))))
        loss = nn.functional.cross_entropy(logits, targets)
        expected = torch.autograd.grad(loss, list(model.get_seed_parameters()))
    for ours, by_hand in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


class NoSteps(OptimizerRegistry):
    """Optimizers that leave everything as it is."""

    def __init__(self, episode: Episode) -> None:
        super().__init__()
        self._groups = episode.optimizers.parameters()

    def parameters(self) -> dict[str, list[Tensor]]:
        return dict(self._groups)

    def present(self, groups: Any = None) -> list[Any]:
        return []

    def step(self, groups: Any = None) -> None: ...

    def advance(self, each: str) -> None: ...


def test_its_own_step_falls_in_loss_as_gradient_descent_does() -> None:
    """A seed that is trained for long enough on the batches it sees lowers the training loss it
    would have."""
    episode = prepared("batch norm", config(optim=OptimConfig(host_lr=1e-4, seed_lr=0.03)))
    with episode.random.active():
        epochs(episode, 12, e1=germinate("mid", "conv_light"))
    losses = [loss for _, loss in episode.model.slot("mid").state.potentials]
    assert max(losses) < 0


def test_an_overflow_of_the_seed_skips_its_own_step_alone() -> None:
    """The seed's float16 scale falls and its weights stay; the host's scale and steps are
    unchanged."""
    run_config = config(amp=AmpConfig(dtype="float16", init_scale=2.0**10))
    _, bare, without = run("batch norm", run_config)
    episode = prepared("batch norm", run_config)
    with episode.random.active():
        first = epochs(episode, 1, e1=germinate("early", "conv_light"))
        episode.learners()
        episode.scalers["early"].scale.fill_(torch.finfo(torch.float32).max)
        before = [p.detach().clone() for p in episode.model.get_seed_parameters()]
        rest = epochs(episode, 2)
        assert_same(host_state(episode), without)
    assert first + rest == bare
    assert float(episode.scalers["early"].scale) < torch.finfo(torch.float32).max
    assert_same([p.detach() for p in episode.model.get_seed_parameters()], before)


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_seed_that_is_not_a_number_harms_nobody(policy: str) -> None:
    run_config = config(on_bad_numbers=policy, grad=GradConfig(clip_norm=0.1))
    _, bare, without = run("every kind of state", run_config)
    episode = prepared("every kind of state", run_config)
    with episode.random.active():
        first = epochs(episode, 1, e1=germinate("early", "noisy"))
        with torch.no_grad():
            next(episode.model.get_seed_parameters()).fill_(torch.nan)
        rest = epochs(episode, 2)
        assert_same(host_state(episode), without)
    assert first + rest == bare
    assert not any(loss < 0 for _, loss in episode.model.slot("early").state.potentials)


@pytest.mark.parametrize("task", ["batch norm", "transformer"])
def test_a_captured_step_with_a_seed_does_what_an_eager_one_does(task: str) -> None:
    """The tape replaces the graph: host and seed agree bit for bit, with rates that are exact in
    float32."""
    rates = OptimConfig(host_lr=2.0**-7, seed_lr=2.0**-6)
    script = {"e1": germinate("early", "conv_light" if task == "batch norm" else "mlp")}
    states = []
    for capture in (False, True):
        run_config = config(optim=rates)
        episode = prepared(task, run_config)
        if capture:
            train = replace(run_config.train, capture=True)
            episode.config = replace(run_config, train=train)
            episode.step = replace_capture(episode)
        with episode.random.active():
            epochs(episode, 4, **script)
            states.append((host_state(episode)["host"], episode.model.state_dict()))
    assert_same(states[1], states[0])


def replace_capture(episode: Episode) -> TrainStep:
    step = build_train_step(episode.task.task_type, episode.config.train)
    step.capture = Capture(Tape())
    return step


def test_a_captured_seed_that_draws_random_numbers_is_refused() -> None:
    run_config = config()
    episode = prepared("batch norm", run_config)
    episode.config = replace(run_config, train=replace(run_config.train, capture=True))
    episode.step = replace_capture(episode)
    with episode.random.active():
        epochs(episode, 1, e1=germinate("early", "noisy"))
        with pytest.raises(ValueError, match=r"no random numbers.*leave train\.capture out"):
            epochs(episode, 1)


@pytest.mark.parametrize("fails", [True, False])
def test_surroundings_are_left_as_they_were_whatever_happens(fails: bool) -> None:
    episode = prepared("every kind of state", config())
    with episode.random.active():
        epochs(episode, 2, e1=germinate("early", "noisy"))
        model = episode.model.train()
        model.host.segments["late"].eval()
        before = host_state(episode)
        buffers = [id(buffer) for buffer in model.buffers()]
        with ending(fails), episode.learners()[0].scope():
            torch.rand(3)
            model(torch.zeros(4, 4, 6, 6), alpha={"early": 1.0}, start="early")
            if fails:
                raise RuntimeError("in the pass")
        assert_same(host_state(episode), before)
        assert [id(buffer) for buffer in model.buffers()] == buffers


@contextmanager
def ending(fails: bool) -> Iterator[None]:
    if not fails:
        yield
        return
    with pytest.raises(RuntimeError, match="in the pass"):
        yield


def test_straight_through_is_still_there_for_who_wants_it() -> None:
    run_config = replace(
        config(), growth=replace(LONG, incubation="straight_through", training_min_epochs=100)
    )
    episode, _, _ = run("batch norm", run_config, e1=germinate("early", "conv_light"))
    assert episode.learners() == ()
    assert episode.model.slot("early").state.potentials == ()
    assert any(
        p.grad is not None and p.grad.any() for p in episode.model.get_seed_parameters("early")
    )


def multiply_adds(work: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() // 2


def train_epoch(episode: Episode) -> None:
    train_one_epoch(
        episode.model,
        episode.train,
        episode.optimizers,
        episode.config.train,
        task_type="classification",
        max_batches=episode.config.max_batches,
        step=episode.step,
        learners=episode.learners(),
    )


@pytest.mark.parametrize("slot", ["early", "mid", "late"])
def test_a_pass_costs_the_seed_and_what_lies_behind_its_slot(slot: str) -> None:
    """The whole epoch by torch's counter, against the layers counted by hand: a 3x3 convolution
    from C to D channels at S positions is 9 C D S multiply-adds, forward and for each of its two
    gradients."""
    rows = 16
    convolutions = [(1, 4, 64), (4, 8, 16), (8, 16, 4)]
    layers = [9 * c * d * s * rows for c, d, s in convolutions]
    head = 16 * 10 * rows
    host = sum(3 * n for n in layers) + 3 * head - layers[0]  # no gradient of the images
    place = ["early", "mid", "late"].index(slot)
    channels, positions = [(4, 16), (8, 4), (16, 1)][place]
    seed = 9 * channels * channels * positions * rows + channels * channels * positions * rows
    behind = 2 * (sum(layers[place + 1 :]) + head)
    # nor of what enters the slot
    learning = 3 * seed - 9 * channels * channels * positions * rows + behind

    counted = []
    for seated in (False, True):
        episode = prepared("batch norm", replace(config(), max_batches=1))
        with episode.random.active():
            if seated:
                epochs(episode, 1, e1=germinate(slot, "conv_light"))
            counted.append(multiply_adds(partial(train_epoch, episode)))
    cost = seed_cost(episode.model, slot, episode.example)
    assert counted[0] == cost.host == host
    assert counted[1] - counted[0] == cost.learning == learning
    assert cost.seed == learning - behind
