"""A compiled run that grows: one program per structure and use, no recompilation for a changed
number."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_kernels import KernelConfig, Meter
from esper_train import (
    AmpConfig,
    CompileConfig,
    Host,
    MorphModel,
    RunConfig,
    SeedStage,
    TrainConfig,
    build_train_step,
    evaluate,
    run_fit,
    run_heuristic_episode,
    train_one_epoch,
)
from esper_train.morph.lifecycle import Measurement
from tests.helpers.compilers import Counting, compiled_config
from tests.helpers.scripted import Script, germinate


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Features [N, 3, 4] and targets [N, 3]; the last batch is shorter."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 3, 4, generator=generator), torch.randint(5, (n, 3), generator=generator))
        for n in (8, 8, 5)
    ]


class Life:
    """A model and its compiled step; an epoch tells how many programs it took."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.counting = Counting()
        self.config = compiled_config(self.counting, fullgraph=True)
        self.step = build_train_step("lm", self.config)
        segments = {name: nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for name in ("early", "mid")}
        self.model = MorphModel(
            Host("transformer", segments, nn.Linear(4, 5), dict.fromkeys(segments, 4)), segments
        )
        self.variants: dict[str, dict[str, float]] = {}

    def epoch(self) -> int:
        before = self.counting.graphs
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        shared: dict[str, Any] = {"task_type": "lm", "step": self.step}
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_one_epoch(self.model, sequences(), optimizer, self.config, **shared)
            measured = evaluate(
                self.model, sequences(), self.config, variants=self.variants, **shared
            )
        plain = evaluate(
            self.model, sequences(), TrainConfig(), task_type="lm", variants=self.variants
        )
        assert measured.loss == pytest.approx(plain.loss, rel=1e-5)
        for name, variant in plain.variants.items():
            assert measured.variants[name].loss == pytest.approx(variant.loss, rel=1e-5)
        for slot in self.model.slots:
            slot.observe(Measurement(accuracy=50.0, contribution=1.0, gradient_ratio=1.0))
        return self.counting.graphs - before


def test_a_growing_host_compiles_once_a_structure_and_never_for_a_number() -> None:
    """One program to train, one to measure, one for each variant; dynamo's own recompilations are
    made an error."""
    life = Life()
    slot = life.model.slot("early")
    assert [life.epoch(), life.epoch()] == [2, 0]
    life.model.germinate_seed("lora", "first", slot="early", blend="linear")
    assert [life.epoch(), life.epoch()] == [2, 0]
    slot._enter(SeedStage.BLENDING, "test")
    life.variants = {"early": {"early": 0.0}, "more": {"early": 0.0, "mid": 0.0}}
    programs = []
    for alpha in (0.1, 0.6, 1.0):
        slot._set_alpha(alpha)
        programs.append(life.epoch())
    assert programs == [4, 0, 0]
    slot._enter(SeedStage.PROBATIONARY, "test")
    assert life.epoch() == 4
    slot._enter(SeedStage.FOSSILIZED, "test")
    assert life.epoch() == 0
    life.model.germinate_seed("norm", "second", slot="mid")
    assert [life.epoch(), life.epoch()] == [4, 0]
    life.model.cull_seed(slot="mid")
    assert life.epoch() == 4
    life.model.slot("mid")._enter(SeedStage.DORMANT, "test")
    assert life.epoch() == 0


def test_more_structures_than_torch_compiles_a_function_for() -> None:
    """torch goes on eagerly, and says nothing in the result, after 8 programs of a function; here
    after 2."""
    life = Life()
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(4):
            life.model.germinate_seed("norm", f"seed_{i}", slot="early")
            assert life.epoch() == 2
            life.model.cull_seed(slot="early")
            life.model.slot("early")._enter(SeedStage.DORMANT, "test")


def test_two_steps_share_no_program() -> None:
    countings = [Counting(), Counting()]
    model = nn.Linear(4, 5)
    for counting in countings:
        step = build_train_step("lm", compiled_config(counting))
        step(model, *sequences()[0], Meter("cpu"))
    assert [counting.graphs for counting in countings] == [1, 1]


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return self.inner(x)


@pytest.mark.parametrize("on_failure", ["raise", "eager"])
def test_error_on_graph_break_says_where(on_failure: str) -> None:
    batch = sequences()[0]
    build_train_step("lm", compiled_config(Counting()))(Breaks(), *batch, Meter("cpu"))  # passes
    step = build_train_step(
        "lm", compiled_config(Counting(), error_on_graph_break=True, on_failure=on_failure)
    )
    if on_failure == "raise":
        with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
            step(Breaks(), *batch, Meter("cpu"))
        return
    step(Breaks(), *batch, Meter("cpu"))
    assert not step.compiled
    assert "graph_break" in (step.compile_failure or "")


SHORT = RunConfig(task="synthetic", max_epochs=1, max_batches=3, batch_size=16)
CONFIGS = {
    "plain": TrainConfig(),
    "compiled": TrainConfig(compile=CompileConfig(enabled=True, backend="eager")),
    "amp": TrainConfig(amp=AmpConfig(dtype="bfloat16")),
    "eager kernels": TrainConfig(kernel=KernelConfig(backend="eager")),
}


def weights(config: TrainConfig) -> Tensor:
    model = run_fit(replace(SHORT, train=config)).model
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", ["compiled", "amp", "eager kernels"])
def test_two_configs_in_one_process_do_not_influence_each_other(other: str, first: bool) -> None:
    """In either order, the first run and its repetition after the other end with the same weights,
    bit for bit."""
    order = (other, "plain", other) if first else ("plain", other, "plain")
    ends = [weights(CONFIGS[name]) for name in order]
    assert torch.equal(ends[0], ends[2])
    if other == "amp":
        assert not torch.equal(ends[0], ends[1])
    else:
        torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_inductor_grows_the_same_network() -> None:
    config = replace(SHORT, max_epochs=3, slots=("early",))
    plain, compiled = (
        run_heuristic_episode(replace(config, train=train), policy=Script(e1=germinate("early")))
        for train in (TrainConfig(), TrainConfig(compile=CompileConfig(enabled=True)))
    )
    assert compiled.model.slot("early").seed is not None
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
