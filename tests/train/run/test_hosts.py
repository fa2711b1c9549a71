"""Three hosts, one of which loses its network for a while."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper_train import DistributedConfig, run_fit
from tests.helpers.hosts import CONFIG, hosts
from tests.helpers.ranks import SECONDS, tables


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_later(tmp_path: Path) -> None:
    with hosts(3) as three:
        # much less than torch's own timeout takes
        assert three.run(str(tmp_path), "cut", seconds=SECONDS) == [0, 0, 0]
        found = [json.loads((tmp_path / f"cut-{rank}.json").read_text()) for rank in range(3)]
        for survivor in found[:2]:
            assert survivor["message"].startswith("no answer from rank 2 on ")
        assert found[2]["message"].startswith("rank 2 on ")
        assert "reaches neither the other ranks nor their store" in found[2]["message"]
        three.connect(2)
        assert three.run(str(tmp_path), "resume", seconds=SECONDS) == [0, 0, 0]
    alone = run_fit(replace(CONFIG, distributed=DistributedConfig()), task=tables(33))
    for rank in range(3):
        weights = torch.load(tmp_path / f"resume-{rank}.pt")
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9, msg=name)
