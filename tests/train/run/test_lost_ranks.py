"""A rank that fails, is killed or stops answering: the others end with its name, and the run goes
on from its newest checkpoint."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from esper_train import DistributedConfig, run_fit
from tests.helpers.lost_ranks import (
    CONFIG,
    fail_and_be_killed,
    fail_growing,
    resume_and_be_stopped,
    survivors,
)
from tests.helpers.ranks import tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The findings of rank 0 in each case. It is waited for much less than torch's own timeout
    takes."""
    directory = tmp_path_factory.mktemp("lost")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    works = (fail_growing, fail_and_be_killed, resume_and_be_stopped)
    return {
        name: each for work in works for name, each in survivors(store, work, directory).items()
    }


@pytest.mark.parametrize("name", ["failed", "failed growing"])
def test_an_error_of_one_rank_is_told_to_the_others(name: str, found: dict[str, Any]) -> None:
    assert found[name]["error"] == "RankLostError"
    message = found[name]["message"]
    assert message.startswith("rank 1 on ")
    assert "failed: ValueError: a file of this rank is damaged; resume from" in message


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_a_rank_that_does_not_answer_is_named(found: dict[str, Any], name: str) -> None:
    assert found[name]["error"] == "RankLostError"
    assert found[name]["message"].startswith("no answer from rank 1 on ")


def test_the_run_goes_on_from_its_newest_checkpoint(found: dict[str, Any]) -> None:
    alone = run_fit(replace(CONFIG, distributed=DistributedConfig()), task=tables(33))
    weights = alone.model.state_dict()
    assert found["resumed"]["weights"].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            found["resumed"]["weights"][name], value, rtol=1e-9, atol=1e-9, msg=name
        )
