"""Training cost in epochs of the host, against multiply-adds counted by hand."""

from dataclasses import replace

import pytest

from esper_train import Decision, Op
from esper_train.run.build import build_episode
from esper_train.run.cost import TrainingCost, added_cost
from tests.helpers.episodes import SHORT, scripted
from tests.helpers.scripted import EASY, Script, germinate


def test_a_run_without_a_seed_costs_its_epochs() -> None:
    result, _ = scripted(SHORT, Script())
    assert result.cost == 6.0  # type: ignore[attr-defined]


def test_a_convolution_in_the_late_slot_costs_what_it_multiplies() -> None:
    """Its two convolutions run forward, and backward to weights and inputs: three times the
    multiply-adds of forward. In TRAINING the features before it need no gradient, and the pass
    goes through the head too."""
    episode = build_episode(replace(SHORT, growth=EASY), slots=("late",))
    model = episode.model
    rows = len(episode.example)
    channels = model.slot("late").channels
    assert model.germinate_seed("conv_light", "seed_0", slot="late")
    learning = added_cost(model, "late", episode.example)
    model.slot("late").statistics = None
    acting = added_cost(model, "late", episode.example)
    _, entered = model.forward_keeping(episode.example)
    height, width = entered["late"].shape[2:]
    host = sum(host_multiply_adds(episode))
    first = rows * height * width * channels * channels * 9
    last = rows * height * width * channels * channels
    head = rows * channels * 10
    assert acting == pytest.approx(3 * (first + last) / host)
    # no gradient to the input of the first convolution, nor to the weights of the head
    assert learning == pytest.approx((2 * first + 3 * last + 2 * head) / host)


def host_multiply_adds(episode: object) -> list[int]:
    """Multiply-adds of each convolution and of the head, forward and backward; images need no
    gradient."""
    from torch import nn

    sizes: list[int] = []
    model = episode.model  # type: ignore[attr-defined]

    def count(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        first = not sizes
        if isinstance(module, nn.Conv2d):
            work = output.numel() * module.weight[0].numel()  # type: ignore[attr-defined]
        else:
            work = output.numel() * module.in_features  # type: ignore[attr-defined, operator]
        sizes.append(int(work) * (2 if first else 3))

    hooks = [
        module.register_forward_hook(count)
        for module in model.host.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    model(episode.example, alpha={"late": 0.0})  # type: ignore[attr-defined]
    for hook in hooks:
        hook.remove()
    return sizes


def test_a_seed_costs_while_it_is_there_and_no_longer() -> None:
    policy = Script(e2=germinate("mid"), e4=Decision(op=Op.CULL, slot="mid"))
    config = replace(SHORT, growth=EASY)
    result, _ = scripted(config, policy)
    episode = build_episode(config, slots=config.slots)
    episode.model.germinate_seed("conv_light", "seed_0", slot="mid", blend="linear")
    extra = added_cost(episode.model, "mid", episode.example)
    assert result.cost == pytest.approx(6 + 2 * extra)  # type: ignore[attr-defined]
    assert extra > 0


def test_the_state_is_the_sum() -> None:
    cost = TrainingCost()
    cost.load_state_dict({"epochs": 7.5})
    assert cost.state_dict() == {"epochs": 7.5}
