"""Steps captured as graphs train as eager ones do, bit for bit, and are captured anew exactly when
they have to be.

CUDA is not needed for most of it: `Tape` takes the place of a CUDA graph on the CPU.
"""

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from esper_kernels.testing import SyncCounter
from esper_train import (
    AmpConfig,
    CompileConfig,
    Decision,
    EpochResult,
    EventType,
    GradConfig,
    Op,
    OptimConfig,
    OptimizerRegistry,
    RunConfig,
    TelemetryHub,
    TrainConfig,
    build_train_step,
    train_one_epoch,
)
from esper_train.run.build import build_episode
from esper_train.run.profile import write_profile
from esper_train.train.capture import OTHER_SHAPE, WARM_UP, WARMING_UP, Capture, CudaGraphs, Work
from esper_train.train.loop import Batches
from tests.helpers.scripted import EASY, Recorder, Script, germinate, not_a_number, run_under
from tests.helpers.taped import (
    MODES,
    RATE,
    Tape,
    adamw,
    assert_same,
    captured,
    data,
    everything,
    measures,
    network,
    registry,
    sgd,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"grad": GradConfig(clip_norm=0.1)},
    "unmeasured": {"grad": GradConfig(every=0)},
    "every second": {"grad": GradConfig(every=2)},
    "accumulated": {"accumulate": 2},
    "skip": {"on_bad_numbers": "skip"},
    "float16": {
        "amp": AmpConfig(dtype="float16", init_scale=1024.0, growth_interval=3),
        "on_bad_numbers": "warn",
    },
    "topk": {"topk": (1, 3)},
}


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("setting", SETTINGS)
def test_replays_train_and_measure_as_eager_steps_do(
    setting: str, make: Callable[..., Optimizer]
) -> None:
    """Two epochs of whole batches and a ragged one; one is full of NaN where the setting leaves
    such a step out."""
    batches = data(*[8] * 16, 3)
    if setting in ("skip", "float16"):
        batches[12] = not_a_number(*batches[12])
    found = {}
    for capture in MODES:
        config = TrainConfig(capture=capture, **SETTINGS[setting])
        model = network()
        optimizers = registry(model, make)
        step = captured(config)[0] if capture else build_train_step("classification", config)
        results = [
            train_one_epoch(
                model, batches, optimizers, config, task_type="classification", step=step
            )
            for _ in range(2)
        ]
        state = everything(model, optimizers) | {"step": step.state_dict()}
        found[capture] = state, [measures(result) for result in results]
        if capture:
            warm = 2 * WARM_UP if setting == "every second" else WARM_UP
            steps = 8 if setting == "accumulated" else 16
            assert [r.replayed for r in results] == [steps - warm, steps]
            assert [r.not_replayed for r in results] == [
                {WARMING_UP: warm, OTHER_SHAPE: 1},
                {OTHER_SHAPE: 1},
            ]
    assert_same(found[True][0], found[False][0])
    assert repr(found[True][1]) == repr(found[False][1])  # NaN is NaN
    assert found[True][1][0]["skipped"] == (setting in ("skip", "float16"))


def test_gradients_at_the_end_are_those_of_the_last_step() -> None:
    """A replayed one after an eager one, and they stay where they are."""
    found = []
    batches = data(*[8] * 5, 3, 8, 8)
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        step = captured(config)[0] if capture else None
        optimizer = sgd(*model.parameters())
        for _ in range(2):
            before = [p.grad for p in model.parameters()]
            train_one_epoch(
                model, batches, optimizer, config, task_type="classification", step=step
            )
        found.append([p.grad for p in model.parameters()])
        assert not capture or all(p is q for p, q in zip(before, found[-1], strict=True))
    assert_same(*found)


def test_rates_between_the_float32_numbers_are_rounded() -> None:
    """A cosine's rates are not exact in float32: the same to its precision, and plain numbers
    outside of the step."""
    found = []
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        optimizer = sgd(*model.parameters())
        optimizers = OptimizerRegistry()
        optimizers.attach("host", optimizer, CosineAnnealingLR(optimizer, 12))
        step = captured(config)[0] if capture else None
        train_one_epoch(
            model, data(*[8] * 9), optimizers, config, task_type="classification", step=step
        )
        found.append(model.state_dict())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            RATE * (1 + math.cos(math.pi * 9 / 12)) / 2
        )
        assert "capturable" not in optimizer.param_groups[0]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found[0]["1.weight"], network().state_dict()["1.weight"])


def test_the_host_waits_once_an_epoch() -> None:
    config = TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0))
    model = network()
    step = captured(config)[0]
    optimizer = sgd(*model.parameters())
    for replayed in (3, 6):
        with SyncCounter() as syncs:
            result = train_one_epoch(
                model, data(*[8] * 6, 3), optimizer, config, task_type="classification", step=step
            )
        assert (result.replayed, syncs.count) == (replayed, 1)


# What ends the graphs. Each case gives what to do between two epochs, and whether the step is
# captured again.


def _reload(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _half_momentum(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


def _new_rate(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = RATE / 8


def _freeze(model: nn.Module, optimizer: Optimizer) -> None:
    next(model.parameters()).requires_grad_(False)


def _move(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def _replace_buffer(model: nn.Module, optimizer: Optimizer) -> None:
    norm = model.get_submodule("2")
    norm.register_buffer("running_mean", torch.ones(8))


CHANGES: dict[str, tuple[Callable[[nn.Module, Optimizer], Any], bool]] = {
    "nothing": (lambda model, optimizer: None, False),
    "learning rate": (_new_rate, False),
    "weights loaded in place": (
        lambda model, optimizer: model.load_state_dict(network().state_dict()),
        False,
    ),
    "measuring mode": (lambda model, optimizer: model.eval(), False),
    "optimizer's state loaded": (_reload, True),
    "momentum": (_half_momentum, True),
    "gradients dropped": (lambda model, optimizer: optimizer.zero_grad(), True),
    "frozen weights": (_freeze, True),
    "moved weights": (_move, True),
    "another buffer": (_replace_buffer, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_captured_again_when_what_it_holds_has_changed(change: str) -> None:
    between, again = CHANGES[change]
    found = []
    for capture in MODES:
        config = TrainConfig(capture=capture)
        model = network()
        optimizer = sgd(*model.parameters())
        step, tape = (
            captured(config) if capture else (build_train_step("classification", config), None)
        )
        for epoch in range(3):
            if epoch == 1:
                between(model, optimizer)
            result = train_one_epoch(
                model,
                data(*[8] * 6, seed=epoch),
                optimizer,
                config,
                task_type="classification",
                step=step,
            )
            assert result.not_replayed == (
                {WARMING_UP: 3} if capture and (epoch == 0 or (epoch, again) == (1, 1)) else {}
            )
        assert tape is None or tape.records == 1 + again
        found.append(everything(model, OptimizerRegistry(host=optimizer)))
    assert_same(*found)


class Addresses(Tape):
    """Like a graph of CUDA, keeps no tensor alive."""

    def record(self, work: Work) -> Work:
        work()
        return lambda: None


def test_memory_that_a_graph_uses_is_not_given_to_others() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step = build_train_step("classification", config)
    optimizer = sgd(*model.parameters())
    step.capture = Capture(Addresses())

    def epoch(batches: Batches) -> None:
        train_one_epoch(model, batches, optimizer, config, task_type="classification", step=step)

    def watching() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(*[8] * 5)
        gc.collect()
        freed.extend(ref.expired() for ref in used)

    freed: list[bool] = []
    epoch(data(*[8] * 5))
    used = [
        StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None
    ]
    optimizer.zero_grad()
    gc.collect()
    assert len(used) == 6
    assert not any(ref.expired() for ref in used)
    epoch(watching())  # captured again
    assert freed == [True] * 6


def test_an_optimizer_is_capturable_while_it_is_captured_and_no_longer() -> None:
    """torch's AdamW asks for it on a GPU, and warns of it in other steps."""
    config = TrainConfig(capture=True)
    model = network()
    seen = []
    step = captured(config)[0]
    optimizer = adamw(*model.parameters())
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(o.param_groups[0]["capturable"])
    )
    train_one_epoch(
        model, data(*[8] * 6, 3), optimizer, config, task_type="classification", step=step
    )
    assert seen == [False] * WARM_UP + [True, False]
    assert optimizer.param_groups[0]["capturable"] is False


def test_another_config_or_model_or_list_of_optimizers_is_another_step() -> None:
    config = TrainConfig(capture=True)
    model = network()
    other = network()
    clipped = replace(config, grad=GradConfig(clip_norm=1.0))
    step, tape = captured(config)
    optimizers = registry(model, sgd)
    others = OptimizerRegistry(host=sgd(*other.parameters()))
    around = nn.Sequential(model, nn.Softmax(1))  # another network with the same weights
    uses = [
        (model, optimizers, config),
        (model, optimizers, clipped),
        (around, optimizers, clipped),
        (other, others, config),
    ]
    for records, (net, opt, how) in enumerate(uses, start=1):
        for _ in range(2):
            train_one_epoch(net, data(*[8] * 5), opt, how, task_type="classification", step=step)
            assert tape.records == records
    last = [
        OptimizerRegistry(whole=others.present()[0]),  # another name in the statistics
        OptimizerRegistry(part=sgd(*list(other.parameters())[2:])),
        OptimizerRegistry(part=SGD(list(other.parameters())[2:], lr=RATE, fused=True)),
        OptimizerRegistry(part=SGD(list(other.parameters())[2:], lr=0.0, fused=True)),
    ]
    for records, opt in enumerate(last, start=5):
        before = copy.deepcopy(list(other.parameters()))
        result = train_one_epoch(
            other, data(*[8] * 5), opt, config, task_type="classification", step=step
        )
        assert tape.records == records
        assert result.grad is not None
        assert set(result.grad.groups) == set(opt.parameters())
    assert_same(list(other.parameters()), before)


GROWING = RunConfig(
    task="synthetic",
    max_epochs=13,
    batch_size=192,  # 1024 rows: five whole batches, and one of 64
    optim=OptimConfig(host_lr=RATE / 4, seed_lr=RATE / 2),
    growth=replace(EASY, on_fossilize="freeze"),
)


Stages = list[tuple[int, str, str]]


def after_moves(stages: Stages, config: RunConfig) -> list[int]:
    """The epochs of which another structure is trained than before."""
    same = ("GERMINATED", "EMBARGOED", "DORMANT")  # no part of their own, or with another move
    return sorted(
        {epoch + 1 for epoch, _, stage in stages if stage not in same} - {config.max_epochs + 1}
    )


def grow(
    config: RunConfig, capture: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], Stages, Tape]:
    """Everything at the end of a run; the line of each epoch; stages; the tape."""
    script = Script(
        e1=germinate("early", blend="gated"),
        e2=germinate("late"),
        e10=Decision(op=Op.FOSSILIZE, slot="early"),
    )
    episode = build_episode(config, slots=("early", "late"))
    recorder = Recorder()
    tape = Tape()
    if capture:  # which the CPU would refuse at once
        episode.config = replace(config, train=replace(config.train, capture=True))
        episode.step.capture = Capture(tape)
    run_under(episode, script, TelemetryHub([recorder]), mode="test")
    lines = [
        {k: v for k, v in e.data.items() if k != "seconds"} for e in recorder.of(EventType.EPOCH)
    ]
    return everything(episode.model, episode.optimizers), lines, recorder.stages(), tape


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_growing_network_is_captured_by_structure_and_not_by_alpha(kind: str) -> None:
    """A gated seed, whose gate has no gradient while the seed is in TRAINING, and a plain one."""
    config = replace(GROWING, optim=replace(GROWING.optim, kind=kind))
    (state, lines, stages, tape), (eager, plain, eager_stages, _) = (
        grow(config, True),
        grow(config, False),
    )
    anew = [
        number
        for number, line in enumerate(lines, start=1)
        if WARMING_UP in line["train"]["not_replayed"]
    ]
    assert anew == [1, *after_moves(stages, config)]
    alphas = [line["slots"][0]["alpha"] for line in lines]
    assert alphas[5] < alphas[6]  # of the epochs 6 and 7
    assert 7 not in anew
    assert tape.records == len(anew)
    for line, other in zip(lines, plain, strict=True):
        done = line["train"].pop("replayed"), line["train"].pop("not_replayed")
        assert done in ((2, {WARMING_UP: 3, OTHER_SHAPE: 1}), (5, {OTHER_SHAPE: 1}))
        for one in (line, other):
            del one["train"]["seconds"]
        assert (other["train"].pop("replayed"), other["train"].pop("not_replayed")) == (0, {})
    assert (repr(lines), stages) == (repr(plain), eager_stages)
    assert_same(state, eager)


def test_a_profile_is_of_steps_that_are_not_captured(tmp_path: Path) -> None:
    assert "| forward |" in write_profile(
        replace(GROWING, train=TrainConfig(capture=True)), (), tmp_path
    )


# Refusals, and what is left behind.


def epoch_of(config: TrainConfig, make: Callable[..., Any], **more: Any) -> EpochResult:
    model = network()
    batches = data(*[8] * 6)
    return train_one_epoch(
        model, batches, make(*model.parameters()), config, task_type="classification", **more
    )


def test_what_cannot_be_captured_is_refused_by_the_config() -> None:
    with pytest.raises(
        ValueError, match=r"train.capture does not go with train.compile.enabled; leave one"
    ):
        TrainConfig(capture=True, compile=CompileConfig(enabled=True))
    for every in (0, 2):
        with pytest.raises(
            ValueError, match=rf"train.capture .*clip_norm needs train.grad.every = 1, got {every}"
        ):
            TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0, every=every))


def test_a_criterion_of_ones_own_is_refused_and_torchs_is_not() -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError,
        match=r"no criterion but nn.CrossEntropyLoss, .*got <function .*leave train.capture",
    ):
        build_train_step("classification", config, nn.functional.cross_entropy)
    build_train_step("classification", config, nn.CrossEntropyLoss(label_smoothing=0.1))


def test_without_cuda_it_is_refused_before_anything_is_trained() -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"train.capture needs the model on a CUDA device, got cpu; leave"
    ):
        epoch_of(config, sgd)
    with pytest.raises(ValueError, match="needs the model on a CUDA device"):
        build_episode(replace(GROWING, train=config), slots=())


@pytest.mark.parametrize(
    "make",
    [
        lambda *p: SGD(p, lr=RATE),
        lambda *p: AdamW(p, lr=RATE),
        lambda *p: SGD(p, lr=torch.tensor(RATE), fused=True),
        lambda *p: torch.optim.Adagrad(p, lr=RATE, fused=True),
    ],
)
def test_optimizers_that_need_the_host_are_refused(make: Callable[..., Optimizer]) -> None:
    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"SGD, Adam or AdamW, made with fused=True.*got .*leave train.capture out"
    ):
        epoch_of(config, make, step=captured(config)[0])


def test_a_schedule_that_changes_more_than_the_rate_is_refused() -> None:
    def cycling(*parameters: Tensor) -> OptimizerRegistry:
        optimizers = OptimizerRegistry()
        optimizer = sgd(*parameters)
        optimizers.attach("host", optimizer, OneCycleLR(optimizer, RATE, 100))
        return optimizers

    config = TrainConfig(capture=True)
    with pytest.raises(
        ValueError, match=r"a new learning rate .*and no other setting; .*cycle_momentum=False"
    ):
        epoch_of(config, cycling, step=captured(config)[0])


def test_an_error_of_the_capture_goes_through_and_leaves_nothing_half_captured() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step, tape = captured(config)
    optimizer = sgd(*model.parameters())

    def epoch() -> EpochResult:
        return train_one_epoch(
            model, data(*[8] * 5), optimizer, config, task_type="classification", step=step
        )

    tape.broken = True
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        epoch()
    assert optimizer.param_groups[0]["lr"] == RATE
    assert "capturable" not in optimizer.param_groups[0]
    tape.broken = False
    assert (epoch().not_replayed, epoch().not_replayed) == ({WARMING_UP: WARM_UP}, {})
    assert tape.records == 1


def test_after_an_epoch_that_failed_the_step_is_captured_again() -> None:
    config = TrainConfig(capture=True)
    model = network()
    step, tape = captured(config)
    optimizer = sgd(*model.parameters())

    def failing() -> Iterator[tuple[Tensor, Tensor]]:
        yield from data(*[8] * 5)
        raise OSError("the disk is gone")

    def epoch(batches: Batches) -> EpochResult:
        return train_one_epoch(
            model, batches, optimizer, config, task_type="classification", step=step
        )

    epoch(data(*[8] * 5))
    with pytest.raises(OSError, match="the disk is gone"):
        epoch(failing())
    assert tape.records == 1
    assert epoch(data(*[8] * 5)).valid == 40
    assert tape.records == 2


def test_a_tape_repeats_operations_alone_and_sees_what_the_host_reads() -> None:
    """The tests above would be worth nothing otherwise."""
    x = torch.zeros(2)
    calls = []

    def work() -> None:
        calls.append(x.add_(1).mul(2))

    replay = Tape().record(work)
    first = calls[0].clone()
    for _ in range(3):
        replay()
    assert (x.tolist(), first.tolist(), calls[0].tolist(), len(calls)) == (
        [3, 3],
        [2, 2],
        [6, 6],
        1,
    )
    with pytest.raises(AssertionError, match="the host reads"):
        Tape().record(lambda: print(x[0].item()))


def test_a_number_held_by_the_step_shows_in_a_tape() -> None:
    """The tests above would be worth nothing otherwise: a rate that is no tensor is that of the
    capture forever."""
    config = TrainConfig(capture=True)
    found = []
    for rates in (Capture._rates_on_device, lambda self, **more: warnings.catch_warnings()):
        model = network()
        optimizers = registry(model, sgd)
        step, _ = captured(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Capture, "_rates_on_device", rates)
            train_one_epoch(
                model, data(*[8] * 8), optimizers, config, task_type="classification", step=step
            )
        found.append(model.state_dict()["1.weight"])
    assert not torch.equal(*found)


def test_the_calls_of_cuda_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that only note the calls. What CUDA makes of them, only a GPU can show."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: torch.device | str) -> None:
            self.name = "side" if isinstance(name, torch.device) else name
            self.device = torch.device("cuda")

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(what: str) -> Iterator[None]:
        calls.append(f"in {what}")
        try:
            yield
        finally:
            calls.append(f"out of {what}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(
        torch.cuda,
        "graph",
        lambda graph, *, stream, capture_error_mode: entered(
            f"{capture_error_mode} capture on {stream.name}"
        ),
    )
    graphs = CudaGraphs(torch.device("cuda"))
    graphs.run(lambda: calls.append("work"))
    assert calls == [
        "side waits for current",
        "in side",
        "work",
        "out of side",
        "current waits for side",
    ]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        graphs.run(lambda: calls.append(str(1 / 0)))
    assert calls == ["side waits for current", "in side", "out of side", "current waits for side"]
    calls.clear()
    replay = graphs.record(lambda: calls.append("work"))
    capture = "thread_local capture on side"
    assert calls == ["in side", f"in {capture}", "work", f"out of {capture}", "out of side"]
    replay()
    assert calls[-1] == "replay"


# What only a GPU can show.


class EagerGraphs(CudaGraphs):
    """The same steps on the same stream, without a graph."""

    def record(self, work: Work) -> Work:
        return lambda: self.run(work)


def on_gpu(
    setting: str, make: Callable[..., Optimizer], graphs: type[CudaGraphs]
) -> tuple[Any, list[EpochResult]]:
    config = TrainConfig(capture=True, **SETTINGS[setting])
    model = network().cuda()
    step = build_train_step("classification", config)
    optimizers = registry(model, make)
    step.capture = Capture(graphs(next(model.parameters()).device))
    batches = data(*[8] * 13, 3)
    torch.cuda.manual_seed(0)
    results = [
        train_one_epoch(model, batches, optimizers, config, task_type="classification", step=step)
        for _ in range(2)
    ]
    return everything(model, optimizers) | {"random": torch.cuda.get_rng_state()}, results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ten_replays_of_a_graph_are_ten_eager_steps(
    setting: str, make: Callable[..., Optimizer]
) -> None:
    (state, results), (eager, expected) = (
        on_gpu(setting, make, graphs) for graphs in (CudaGraphs, EagerGraphs)
    )
    assert results[1].replayed == (6 if setting == "accumulated" else 13)
    assert_same(state, eager)
    assert repr([measures(r) for r in results]) == repr([measures(r) for r in expected])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_epoch_of_replays_syncs_once() -> None:
    config = TrainConfig(capture=True, grad=GradConfig(clip_norm=1.0))
    model = network().cuda()
    step = build_train_step("classification", config)
    optimizer = sgd(*model.parameters())
    batches = [(inputs.cuda(), targets.cuda()) for inputs, targets in data(*[8] * 10, 3)]

    def epoch() -> EpochResult:
        return train_one_epoch(
            model, batches, optimizer, config, task_type="classification", step=step
        )

    epoch()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as syncs:
            warnings.simplefilter("always")
            result = epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.replayed, len([w for w in syncs if "synchroniz" in str(w.message)])) == (10, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_growing_network_on_a_gpu_is_captured_by_structure() -> None:
    config = replace(GROWING, device="cuda", train=TrainConfig(capture=True))
    script = Script(e1=germinate("early", blend="gated"))
    recorder = Recorder()
    run_under(
        build_episode(config, slots=("early",)), script, TelemetryHub([recorder]), mode="test"
    )
    trained = [event.data["train"] for event in recorder.of(EventType.EPOCH)]
    assert {line["replayed"] for line in trained} == {2, 5}
    anew = [number for number, line in enumerate(trained, start=1) if line["replayed"] == 2]
    assert anew == [1, *after_moves(recorder.stages(), config)]
