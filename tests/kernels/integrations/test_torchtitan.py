"""torchtitan's loss component with our loss, against its own."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

pytestmark = pytest.mark.slow  # torchtitan takes seconds to import


@pytest.fixture(autouse=True)
def needs_torchtitan() -> None:
    reason = "needs torchtitan 0.3, which asks for another huggingface_hub than transformers 5"
    pytest.importorskip("torchtitan.components.loss", reason=reason)


def batches() -> list[tuple[Tensor, Tensor]]:
    """20 batches [B, T] of tokens; many labels are ignored, in the third all of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, (20, 4, 9), generator=generator)
    labels = tokens.roll(-1, dims=-1)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[2] = -100
    return list(zip(tokens, labels, strict=True))


def trained(ours: bool, whole: bool) -> tuple[list[float], float]:
    """The losses of a training, and the fraction of right tokens as it is counted."""
    from torchtitan.components.loss import CrossEntropyLoss

    from esper_kernels.integrations.torchtitan import MeteredLoss

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_of = (
        MeteredLoss(MeteredLoss.Config()) if ours else CrossEntropyLoss(CrossEntropyLoss.Config())
    )
    losses = []
    right = []
    for tokens, labels in batches():
        logits = model(tokens)
        valid = (labels != -100).sum().clamp_min(1) if whole else None
        loss, metrics = loss_of(logits, labels, valid)
        assert metrics == {}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right.append((logits.argmax(-1) == labels)[labels != -100])
    if ours:
        assert loss_of.meter is not None
        return losses, loss_of.meter.compute().accuracy
    return losses, torch.cat(right).double().mean().item()


@pytest.mark.parametrize("whole", [True, False])
def test_losses_and_accuracy_are_those_of_torchtitan(whole: bool) -> None:
    (losses, accuracy), (expected, right) = (trained(ours, whole) for ours in (True, False))
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert accuracy == right


def test_divided_logits_are_refused_by_name() -> None:
    from esper_kernels.integrations.torchtitan import MeteredLoss

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        divided = distribute_tensor(torch.zeros(1, 2, 3), init_device_mesh("cpu", (1,)), [Shard(2)])
        with pytest.raises(TypeError, match="loss parallelism off"):
            MeteredLoss(MeteredLoss.Config())(divided, torch.zeros(1, 2, dtype=torch.long))
    finally:
        dist.destroy_process_group()
