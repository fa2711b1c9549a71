"""More kinds of tensors, on every backend: served as torch does, or refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100, 1, 2])


class Tagged(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.as_subclass(Tagged),
        nn.Parameter,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.as_strided(torch.cat([x.flatten(), x.flatten()]), (8, 5), (5, 1), 40),
        lambda x: torch.complex(x, -x).real,
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: x[:, None].expand(8, 3, 5)[:, 1],
    ],
    ids=[
        "subclass",
        "parameter",
        "rows apart",
        "transposed",
        "offset",
        "real",
        "negated",
        "expanded",
    ],
)
def test_the_same_values_in_other_tensors_give_torchs_loss(
    config: KernelConfig, change: Callable[[Tensor], Tensor]
) -> None:
    meter = Meter("cpu")
    loss = cross_entropy(change(X), T, meter=meter, config=config)
    torch.testing.assert_close(Tensor(loss.detach()), F.cross_entropy(X, T))
    step = cross_entropy_step(change(X), T, meter, config=config)
    torch.testing.assert_close(step, cross_entropy_step(X, T, None, config=config))
    assert (meter.compute().valid, meter.compute().batches) == (14, 2)
    # a parameter in place of its gradient is refused
    (norm,) = grad_stats([change(X).detach()], config=config).norms.tolist()
    assert norm == pytest.approx(X.double().norm().item())


@pytest.mark.parametrize(
    "view",
    [
        lambda p: p.view(40).view(8, 5),
        lambda p: p.unsqueeze(0)[0],
        lambda p: p.narrow(0, 2, 4),
        lambda p: p.unflatten(0, (2, 4))[1],
    ],
)
def test_no_view_of_a_parameter_is_written_over(
    config: KernelConfig, view: Callable[[Tensor], Tensor]
) -> None:
    parameter = nn.Parameter(X.clone())
    logits = view(parameter)
    with pytest.raises(ValueError, match="a view of a leaf that requires grad"):
        cross_entropy_step(logits, T[: len(logits)].clamp(0), None, inplace=True, config=config)
    assert torch.equal(parameter, X)


@pytest.mark.parametrize(
    "value", [-1.0, 0.0, -0.0, float("inf"), float("nan"), 2.0**-149, torch.finfo().max]
)
def test_no_value_of_a_tensor_means_none(config: KernelConfig, value: float) -> None:
    """The values are 0-d tensors, which no backend reads."""
    number = torch.tensor(value)
    reference = KernelConfig(backend="eager")
    for name in ("normalizer", "z_loss"):
        found, expected = (
            cross_entropy(X, T, **{name: number}, config=each) for each in (config, reference)
        )
        torch.testing.assert_close(found, expected, equal_nan=True)
    found, expected = (
        cross_entropy_step(X, T, None, grad_scale=number, config=each)
        for each in (config, reference)
    )
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert cross_entropy(X, T, normalizer=number, config=config) != cross_entropy(X, T)


@pytest.mark.parametrize(
    ("grads", "tensors", "groups"),
    [
        ({"a": X, "b": None}, 1, 2),
        ({"a": X[0], "b": [X, X]}, 3, 2),
        ({"a": X.as_subclass(Tagged)}, 1, 1),
        ({"a": [], "b": torch.tensor(2.0)}, 1, 2),
    ],
)
def test_mappings_of_tensors_lists_and_nothing(
    config: KernelConfig, grads: dict[str, list[Tensor] | Tensor | None], tensors: int, groups: int
) -> None:
    health = grad_stats(grads, config=config).compute()
    assert (health.tensors, len(health.groups)) == (tensors, groups)
