"""Default dtype and device of the process change nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esper_train import RunConfig, TrainConfig, get_task, run_fit, run_heuristic_episode
from esper_train.base.device import plain_defaults
from esper_train.base.settings import from_dict
from esper_train.rl import ppo
from esper_train.rl.config import RLConfig
from esper_train.tasks import load_splits
from tests.helpers.episodes import SHORT
from tests.helpers.scripted import EASY, Script, germinate


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("amp", [None, "float16", "bfloat16"])
def test_defaults_of_the_process_change_nothing(amp: str | None) -> None:
    config = from_dict(RunConfig, {"task": "synthetic", "max_epochs": 1, "max_batches": 2})
    config = replace(config, train=from_dict(TrainConfig, {"amp": {"dtype": amp}}))
    result = run_fit(config)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert result.test.valid > 0


@pytest.mark.parametrize("name", ["digits", "synthetic", "synthetic-lm"])
def test_tasks_give_the_same_data_under_other_defaults(
    name: str, request: pytest.FixtureRequest
) -> None:
    expected = load_splits(get_task(name)).train
    request.getfixturevalue("other_defaults")
    with plain_defaults():
        found = load_splits(get_task(name)).train
    assert torch.get_default_dtype() is torch.float64
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert np.array_equal(mine.numpy(), theirs.numpy())


def test_a_network_grows_the_same_under_other_defaults(request: pytest.FixtureRequest) -> None:
    """The run has a seed with a gated blend, whose modules are made while the run goes on."""
    config = replace(SHORT, growth=EASY)

    def script() -> Script:
        return Script(e1=germinate("early", blend="gated"), e2=germinate("mid", "norm"))

    expected = run_heuristic_episode(config, policy=script())
    request.getfixturevalue("other_defaults")
    found = run_heuristic_episode(config, policy=script())
    assert found.action_counts["GERMINATE"] == 2
    for name, theirs in expected.model.state_dict().items():
        mine = found.model.state_dict()[name]
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert np.array_equal(mine.numpy(), theirs.numpy()), name


def test_ppo_trains_the_same_policy_under_other_defaults(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rl = RLConfig(hosts=2, steps=16, rollout=8, batch=8, passes=1, width=8, evaluations=1)
    config = replace(SHORT, growth=EASY, max_epochs=5, max_batches=1, rl=rl)
    expected = ppo.train_ppo(config, tmp_path / "plain").weights
    request.getfixturevalue("other_defaults")
    found = ppo.train_ppo(config, tmp_path / "other").weights
    for name, theirs in expected.items():
        assert found[name].dtype == torch.float32
        assert np.array_equal(found[name].numpy(), theirs.numpy()), name
