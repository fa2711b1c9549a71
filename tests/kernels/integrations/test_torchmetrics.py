"""The Metric around a Meter against torchmetrics' own, by itself and in two processes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels.testing import SyncCounter
from tests.helpers.metrics import CLASSES, Batches, batches, metric_of_a_rank
from tests.helpers.ranks import together

pytestmark = pytest.mark.slow  # torchmetrics takes seconds to import


@pytest.fixture(autouse=True)
def needs_torchmetrics() -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra lightning")


def expected(seen: Batches) -> dict[str, float]:
    """The results of torch and torchmetrics for all rows at once."""
    from torchmetrics.functional.classification import multiclass_accuracy

    logits = torch.cat([batch[0] for batch in seen])
    targets = torch.cat([batch[1] for batch in seen])
    loss = F.cross_entropy(logits.double(), targets).item()
    found = {"loss": loss, "perplexity": torch.tensor(loss).double().exp().item()}
    for k, name in ((1, "accuracy"), (3, "top3_accuracy")):
        found[name] = multiclass_accuracy(
            logits, targets, CLASSES, top_k=k, average="micro", ignore_index=-100
        ).item()
    return found


def as_floats(measures: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in measures.items()}


def test_measures_are_those_of_torchmetrics() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metric = MeterMetric(topk=(3,))
    seen = batches()
    assert metric.measures()["accuracy"].isnan()
    for logits, targets in seen:
        loss = metric.loss(logits.requires_grad_(), targets)
        torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
        assert loss.requires_grad
    assert as_floats(metric.measures()) == pytest.approx(expected(seen), rel=1e-6)
    assert metric.compute() == metric.measures()["accuracy"]
    metric.reset()
    assert metric.measures()["accuracy"].isnan()
    metric.update(*seen[0])
    assert as_floats(metric.measures()) == pytest.approx(expected(seen[:1]), rel=1e-6)


def test_what_a_meter_measures_besides_is_there_too() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metric = MeterMetric(per_class=CLASSES, calibration_bins=4, entropy=True, confusion=True)
    for batch in batches():
        metric.loss(*batch, label_smoothing=0.3)
    result = metric.meter.compute()
    assert result.calibration is not None
    found = as_floats(metric.measures())
    alone = (found.pop("loss"), found.pop("accuracy"), found.pop("brier"))
    assert alone == pytest.approx((result.loss, result.accuracy, result.calibration.brier))
    assert found == pytest.approx({name: getattr(result, name) for name in found})
    assert set(found) == {"nll", "entropy", "margin", "perplexity"}
    assert result.nll == pytest.approx(expected(batches())["loss"])
    metric.reset()
    assert (
        metric.meter.compute().per_class == MeterMetric(per_class=CLASSES).meter.compute().per_class
    )


def test_forward_gives_the_value_of_a_batch_and_counts_it_once() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metric = MeterMetric(value="loss")
    seen = batches()
    values = [metric(*batch).item() for batch in seen]
    assert values == pytest.approx([expected([batch])["loss"] for batch in seen], rel=1e-6)
    assert metric.compute().item() == pytest.approx(expected(seen)["loss"], rel=1e-6)
    assert metric.meter.compute().batches == len(seen)


def test_an_update_takes_no_host_sync() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metric = MeterMetric()
    with SyncCounter() as syncs:
        for logits, targets in batches():
            metric.loss(logits.requires_grad_(), targets).backward()
        metric.compute()
    assert syncs.count == 0


def test_states_survive_casts_and_copies(tmp_path: Path) -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    metric = MeterMetric(topk=(3,))
    metric.update(*batches()[0])
    found = metric.measures()
    torch.nn.Sequential(metric).half()
    assert metric.measures() == found
    torch.save(metric, tmp_path / "metric.pt")
    loaded = torch.load(tmp_path / "metric.pt", weights_only=False)
    assert loaded.measures() == found
    loaded.update(*batches()[1])
    assert metric.measures() == found


def test_two_processes_compute_the_measures_of_all_rows(tmp_path: Path) -> None:
    found = together(2, metric_of_a_rank, tmp_path)
    assert found[0] == found[1]
    wanted = expected(batches())
    assert found[0] == pytest.approx([wanted["accuracy"], wanted["loss"]], rel=1e-6)


def test_an_unknown_value_is_refused() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    with pytest.raises(ValueError, match="got 'top5_accuracy'"):
        MeterMetric(value="top5_accuracy")


def test_the_ranks_of_a_metric_are_added_up_by_torchmetrics_alone() -> None:
    from esper_kernels.integrations.torchmetrics import MeterMetric

    with pytest.raises(RuntimeError, match="sync_context"):
        MeterMetric().meter.all_reduce()
