"""Logits whose classes are apart in memory: `class_dim`, and strides of any kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step
from esper_kernels.native import INSTRUCTION_SETS
from esper_kernels.testing import plain_torch_cross_entropy, relative_error

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
SHAPES = [
    (1, 1, 1),
    (3, 2, 1),
    (2, 21, 5, 7),
    (3, 33, 17),
    (0, 5, 3),
    (2, 5, 0),
    (4, 1000, 7, 7),
    (2, 5000, 16),
    (2, 3000, 18),
]


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    targets.flatten()[1::5] = -100
    return logits, targets


def options_of(classes: int) -> dict[str, Any]:
    return {
        "weight": torch.linspace(0.5, 2.0, classes),
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 20.0,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("logits_dtype", BOUNDS, ids=str, indirect=True)
def test_every_option_is_as_with_the_classes_last(
    config: KernelConfig, logits_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if config.backend == "triton" and shape[1] > 500:
        pytest.skip("slow in Triton's interpreter, and such logits are copied there")
    logits, targets = batch(shape, logits_dtype)
    for options in ({}, options_of(shape[1])):
        meters = Meter("cpu", topk=(2,)), Meter("cpu", topk=(2,))
        common: dict[str, Any] = {**options, "reduction": "sum"}
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, targets, class_dim=1, meter=meters[0], config=config, **common)
        (grad,) = torch.autograd.grad(loss, leaf)
        last = logits.movedim(1, -1).contiguous().double().requires_grad_()
        true_loss = plain_torch_cross_entropy(last, targets, **common)
        (truth,) = torch.autograd.grad(true_loss, last)
        assert relative_error(loss, true_loss) < 1e-5
        assert relative_error(grad.movedim(1, -1), truth) < BOUNDS[logits_dtype]
        assert grad.shape == logits.shape

        step = cross_entropy_step(logits, targets, meters[1], class_dim=1, config=config, **common)
        assert relative_error(step.movedim(1, -1), truth) < BOUNDS[logits_dtype]
        assert torch.equal(meters[0].counts, meters[1].counts)
        seen = Meter("cpu", topk=(2,))
        cross_entropy(last.detach(), targets, meter=seen, **common)
        assert torch.equal(meters[0].counts, seen.counts)


@pytest.mark.parametrize("use", ["inplace", "out", "out in another layout"])
@pytest.mark.parametrize("shape", [(2, 21, 5, 7), (3, 40, 17)], ids=str)
def test_the_gradient_goes_where_it_is_wanted(
    config: KernelConfig, use: str, shape: tuple[int, ...]
) -> None:
    logits, targets = batch(shape, torch.float32)
    expected = cross_entropy_step(logits, targets, None, class_dim=1, config=config)
    memory: dict[str, Any] = {"inplace": True}
    if use != "inplace":
        out = torch.full(shape, torch.nan)
        if use != "out":
            out = torch.full((*shape[2:], shape[0], shape[1]), torch.nan)
            out = out.movedim(-1, 0).movedim(-1, 0)
        memory = {"out": out}
    values = logits.clone()
    grad = cross_entropy_step(values, targets, None, class_dim=1, config=config, **memory)
    assert grad.shape == shape
    assert (grad if use == "inplace" else memory["out"]) is grad
    assert (grad.data_ptr() == values.data_ptr()) == (use == "inplace")
    torch.testing.assert_close(grad, expected)
    assert use == "inplace" or torch.equal(values, logits)


def test_the_gradient_has_the_layout_of_the_logits(config: KernelConfig) -> None:
    logits, targets = batch((2, 21, 5, 7), torch.float32)
    grad = cross_entropy_step(logits, targets, None, class_dim=1, config=config)
    assert config.backend in ("eager", "triton") or grad.is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1:, 1:],
        lambda x: x[:, ::3],
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: x.transpose(0, 2),
        lambda x: x[..., :1],
    ],
    ids=["every other place", "a part", "every third class", "expanded", "transposed", "one place"],
)
def test_views_are_read_and_not_written(config: KernelConfig, view: Any) -> None:
    base = torch.randn(6, 40, 18, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    logits = view(base)
    targets = torch.randint(4, (logits.shape[0], *logits.shape[2:]))
    grad = cross_entropy_step(logits, targets, None, class_dim=1, config=config)
    leaf = logits.double().contiguous().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, targets).backward()
    assert relative_error(grad, leaf.grad) < 2e-6  # type: ignore[arg-type]
    assert torch.equal(base, before)


def test_a_part_of_a_larger_tensor_alone_is_written(config: KernelConfig) -> None:
    base = torch.randn(6, 40, 18, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    part = base[1:4, ::3, 2:9]
    targets = torch.randint(14, (3, 7))
    expected = cross_entropy_step(part, targets, None, class_dim=1, config=config)
    cross_entropy_step(part, targets, None, class_dim=1, inplace=True, config=config)
    torch.testing.assert_close(part, expected)
    part.copy_(before[1:4, ::3, 2:9])
    assert torch.equal(base, before)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_instruction_set_gives_the_gradient_of_the_classes_last(
    name: str, dtype: torch.dtype
) -> None:
    config = KernelConfig(backend="cpp", instruction_set=name)
    for shape in SHAPES:
        logits, targets = batch(shape, dtype)
        last = logits.movedim(1, -1).contiguous()
        for options in ({}, options_of(shape[1])):
            grad = cross_entropy_step(logits, targets, None, class_dim=1, config=config, **options)
            expected = cross_entropy_step(last, targets, None, config=config, **options)
            assert torch.equal(grad.movedim(1, -1), expected)


def test_mixup_and_bad_targets(config: KernelConfig) -> None:
    logits, targets = batch((2, 40, 5, 7), torch.float32)
    mixture: dict[str, Any] = {"targets2": targets.flip(0), "share": 0.3, "config": config}
    grad = cross_entropy_step(logits, targets, None, class_dim=1, **mixture)
    last = logits.movedim(1, -1).contiguous()
    torch.testing.assert_close(
        grad.movedim(1, -1), cross_entropy_step(last, targets, None, **mixture)
    )
    values = logits.clone()
    with pytest.raises(IndexError, match=r"target \d+ of row .* is outside \[0, 40\)"):
        cross_entropy_step(
            values, targets + 47, None, class_dim=1, inplace=True, ignore_index=-53, config=config
        )
    assert torch.equal(values, logits)
