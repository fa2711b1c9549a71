"""Default dtype and device of the process change nothing."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from esper_train import RunConfig, TrainConfig, get_task, run_fit
from esper_train.base.device import plain_defaults
from esper_train.base.settings import from_dict
from esper_train.tasks import load_splits


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
