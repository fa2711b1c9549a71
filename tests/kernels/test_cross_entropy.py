"""The loss and its gradient: against hand-computed numbers, and against torch's own op in
float64.

Long file: one op against one truth, with shared cases.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper_kernels import KernelConfig, Meter, cross_entropy
from esper_kernels.testing import (
    CrossEntropySample,
    assert_no_worse_than_eager,
    cross_entropy_samples,
    plain_torch_cross_entropy,
    relative_error,
)

LN2 = 0.6931471805599453
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAMPLE_NAMES = [sample.name for sample in cross_entropy_samples()]

# exp of these is 1, 2, 5, so softmax is 1/8, 2/8, 5/8, lse is ln 8, and the losses are ln 8, ln 4,
# ln 1.6.
GOLDEN_LOGITS = [0.0, LN2, 1.6094379124341003]


def golden(rows: int = 1) -> Tensor:
    return torch.tensor([GOLDEN_LOGITS] * rows, requires_grad=True)


def samples(dtype: torch.dtype, device: str) -> list[CrossEntropySample]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    found = cross_entropy_samples(dtype, device)
    return [s._replace(options={k: move(v) for k, v in s.options.items()}) for s in found]


def loss_and_grad(
    function: Any, logits: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, targets, **options)
    loss.backward(torch.ones_like(loss))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 * LN2),  # target 1: ln 4
        # 0.7 ln 4 + 0.1 (ln 8 + ln 4 + ln 1.6)
        ({"label_smoothing": 0.3}, 1.3639800059884697),
        ({"label_smoothing": 1.0}, 1.3119131773484874),  # (ln 8 + ln 4 + ln 1.6) / 3
        ({"z_loss": 0.5}, 2 * LN2 + 2.1620385626319063),  # ln 4 + 0.5 (ln 8)^2
        ({"weight": torch.tensor([1.0, 2.0, 4.0]), "reduction": "sum"}, 4 * LN2),  # 2 ln 4
        ({"weight": torch.tensor([1.0, 2.0, 4.0])}, 2 * LN2),  # 2 ln 4 / 2
        # 2 * 0.7 ln 4 + 0.1 (1 ln 8 + 2 ln 4 + 4 ln 1.6) + 0.5 (ln 8)^2, the z term unweighted
        (
            {
                "weight": torch.tensor([1.0, 2.0, 4.0]),
                "label_smoothing": 0.3,
                "z_loss": 0.5,
                "reduction": "sum",
            },
            4.776055146290009,
        ),
        ({"normalizer": 4}, LN2 / 2),
        ({"normalizer": torch.tensor(4)}, LN2 / 2),
    ],
)
def test_loss_equals_hand_computed_numbers(
    config: KernelConfig, options: dict[str, Any], expected: float
) -> None:
    loss = cross_entropy(golden(), torch.tensor([1]), **options, config=config)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_equals_hand_computed_numbers(config: KernelConfig) -> None:
    logits = golden(2)
    cross_entropy(logits, torch.tensor([1, 2]), config=config).backward()
    expected = torch.tensor([[1 / 8, -6 / 8, 5 / 8], [1 / 8, 2 / 8, -3 / 8]]) / 2
    torch.testing.assert_close(logits.grad, expected)


def test_softcap_equals_hand_computed_numbers(config: KernelConfig) -> None:
    """2 tanh(x/2) of these logits is 0 and ln 2: softmax 1/3, 2/3; its slope at ln 2 is 1 - (ln 2 /
    2)^2."""
    logits = torch.tensor([[0.0, 2 * math.atanh(LN2 / 2)]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]), softcap=2.0, config=config)
    loss.backward()
    assert loss.item() == pytest.approx(1.0986122886681098, rel=1e-6)  # ln 3
    expected = torch.tensor([[-2 / 3, 2 / 3 * (1 - LN2**2 / 4)]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.in_turn
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)
def test_samples_agree_with_torch_in_float64(
    config: KernelConfig, device: str, logits_dtype: torch.dtype, reduction: str
) -> None:
    for name, logits, targets, options in samples(logits_dtype, device):
        if (reduction != "mean" and "normalizer" in options) or (
            logits.numel() == 0 and reduction == "mean"
        ):
            continue
        options = {**options, "reduction": reduction}
        loss, grad = loss_and_grad(cross_entropy, logits, targets, **options, config=config)
        true_loss, true_grad = loss_and_grad(
            plain_torch_cross_entropy, logits.double(), targets, **options
        )
        _, eager_grad = loss_and_grad(plain_torch_cross_entropy, logits, targets, **options)
        assert grad.dtype == logits.dtype, name
        assert loss.dtype == (torch.float64 if logits_dtype == torch.float64 else torch.float32), (
            name
        )
        assert loss.shape == true_loss.shape, name
        assert relative_error(loss, true_loss) <= 2e-6, name
        assert_no_worse_than_eager(grad, eager_grad, true_grad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_dtypes_give_the_same(config: KernelConfig, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 156, 199, 3, 156])  # 156 is what -100 becomes in uint8
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets.to(dtype), config=config), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"normalizer": 3.5},
        {
            "weight": torch.linspace(0.5, 2.0, 6),
            "label_smoothing": 0.2,
            "z_loss": 0.1,
            "softcap": 3.0,
        },
        {"label_smoothing": 1.0, "reduction": "sum"},
    ],
    ids=str,
)
@pytest.mark.parametrize("logits_dtype", [torch.float64], ids=str, indirect=True)
def test_gradcheck_in_float64(
    config: KernelConfig, logits_dtype: torch.dtype, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator, dtype=logits_dtype, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, targets, **options, config=config), logits
    )


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 65536.0])
def test_grad_output_multiplies_the_gradient(config: KernelConfig, value: float) -> None:
    logits = golden()
    cross_entropy(logits, torch.tensor([1]), config=config).backward(torch.tensor(value))
    torch.testing.assert_close(logits.grad, value * torch.tensor([[1 / 8, -6 / 8, 5 / 8]]))


def test_grad_output_may_differ_by_row_or_be_expanded(config: KernelConfig) -> None:
    rows = torch.tensor([[1 / 8, -6 / 8, 5 / 8]]).expand(3, 3)
    logits = golden(3)
    targets = torch.tensor([1, 1, 1])
    losses = cross_entropy(logits, targets, reduction="none", config=config)
    factor = torch.tensor([0.0, -1.0, 3.0])
    (grad,) = torch.autograd.grad(losses, logits, factor, retain_graph=True)
    torch.testing.assert_close(grad, factor[:, None] * rows)
    (grad,) = torch.autograd.grad(losses, logits, torch.tensor(2.0).expand(3))
    torch.testing.assert_close(grad, 2 * rows)


def test_grad_output_is_applied_before_rounding_to_float16(config: KernelConfig) -> None:
    """The loss scaler of mixed precision: 65536 times a gradient that float16 alone would round to
    0."""
    generator = torch.Generator().manual_seed(0)
    leaf = (torch.randn(8, 1000, generator=generator) * 3).half().requires_grad_()
    targets = torch.randint(1000, (8,), generator=generator)

    def scaled(scale: float) -> Tensor:
        loss = cross_entropy(leaf, targets, normalizer=512, config=config)
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(scale))
        return grad

    _, truth = loss_and_grad(plain_torch_cross_entropy, leaf.double(), targets, normalizer=512)
    assert relative_error(scaled(65536.0), truth * 65536) < 1e-3  # float16 rounds by up to 5e-4
    assert (scaled(65536.0) != 0).double().mean() > 0.99
    assert (scaled(1.0) != 0).double().mean() < 0.5


def test_retain_graph_gives_the_same_gradient_twice(config: KernelConfig) -> None:
    logits = golden(2)
    loss = cross_entropy(logits, torch.tensor([0, 1]), config=config)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_double_backward_raises(config: KernelConfig) -> None:
    """A gradient penalty must not be left out silently."""
    logits = golden()
    loss = cross_entropy(logits, torch.tensor([0]), config=config)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (loss + grad.square().sum()).backward()


def test_changing_the_logits_before_backward_raises(config: KernelConfig) -> None:
    logits = golden()
    x = logits * 1
    loss = cross_entropy(x, torch.tensor([0]), config=config)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_are_untouched_and_loss_is_fresh(config: KernelConfig) -> None:
    logits = golden(2)
    meter = Meter("cpu")
    before = logits.detach().clone()
    loss = cross_entropy(logits, torch.tensor([0, 1]), meter=meter, config=config)
    loss *= 3  # a trainer may scale the loss in place
    loss.backward()
    assert torch.equal(logits.detach(), before)
    assert meter.compute().loss == pytest.approx(2.5 * LN2)  # (ln 8 + ln 4) / 2


def test_none_reduction_gives_zero_to_ignored_rows(config: KernelConfig) -> None:
    targets = torch.tensor([1, -100, 2])
    losses = cross_entropy(golden(3), targets, reduction="none", config=config)
    torch.testing.assert_close(losses, torch.tensor([2 * LN2, 0.0, 0.47000362924573563]))


def test_sample_weight_and_normalizer_dtypes(config: KernelConfig) -> None:
    for normalizer in (
        torch.tensor(2),
        torch.tensor(2, dtype=torch.int32),
        torch.tensor(2.0).half(),
    ):
        loss = cross_entropy(golden(), torch.tensor([1]), normalizer=normalizer, config=config)
        assert loss.item() == pytest.approx(LN2)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ([-100, -100], {}),
        ([0, 1], {"weight": torch.tensor([0.0, 0.0, 1.0])}),
        ([0, 1], {"weight": torch.tensor([0.0, 0.0, 1.0]), "label_smoothing": 0.1, "z_loss": 0.1}),
        ([0, 1], {"normalizer": 0}),
        ([0, 1], {"normalizer": torch.tensor(0)}),
    ],
)
def test_mean_over_nothing_is_nan_with_zero_gradient(
    config: KernelConfig, targets: list[int], options: dict[str, Any]
) -> None:
    logits = golden(2)
    loss = cross_entropy(logits, torch.tensor(targets), **options, config=config)
    assert loss.isnan()
    assert loss.requires_grad
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 0, 0, 3), (2, 0, 2, 1)])
def test_empty_batch_is_a_mean_over_nothing(config: KernelConfig, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    meter = Meter("cpu")
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    loss = cross_entropy(logits, targets, meter=meter, config=config)
    assert loss.isnan()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape
    assert cross_entropy(logits, targets, reduction="sum", config=config).item() == 0
    assert meter.compute().batches == 1


@pytest.mark.parametrize("classes", [9, 9000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_offset_of_1e7_changes_no_bit(config: KernelConfig, classes: int, smoothing: float) -> None:
    """Integers up to 2^24 are exact in float32, so both batches have the same differences."""
    small = torch.arange(5.0 * classes).view(5, classes).remainder(7)
    small[:, -1] = 9.0  # a maximum that comes late
    targets = torch.tensor([0, 1, 2, 3, 4])
    weight = torch.linspace(0.5, 2.0, classes)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "config": config}
    results = [loss_and_grad(cross_entropy, x, targets, **options) for x in (small, small + 1e7)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("smoothing", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_no_smoothing_keeps_inf_logits_ordinary(config: KernelConfig, smoothing: Any) -> None:
    logits = torch.tensor([[0.0, -torch.inf, LN2]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]), label_smoothing=smoothing, config=config)
    loss.backward()
    assert loss.item() == pytest.approx(1.0986122886681098)  # ln 3
    torch.testing.assert_close(logits.grad, torch.tensor([[-2 / 3, 0.0, 2 / 3]]))


def test_options_as_tensors_equal_numbers(config: KernelConfig) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 5, 1, 2])
    numbers = {"label_smoothing": 0.25, "z_loss": 0.5, "normalizer": 8.0}  # exact in float32
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    expected = loss_and_grad(cross_entropy, logits, targets, **numbers, config=config)
    actual = loss_and_grad(cross_entropy, logits, targets, **tensors, config=config)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_options_as_tensors_may_have_any_float_dtype(
    config: KernelConfig, dtype: torch.dtype
) -> None:
    """A factor e / V of 0.125 / 50257 is below float16's precision; the arithmetic has to be
    float32."""
    for logits, target in (
        (torch.zeros(1, 50257), torch.tensor([7])),
        (torch.zeros(50257), torch.tensor(7)),
    ):
        logits[..., 7] = 20.0
        leaf = logits.requires_grad_()
        options = {
            "label_smoothing": torch.tensor(0.125, dtype=dtype),
            "z_loss": torch.tensor(0.5, dtype=dtype),
        }
        loss, grad = loss_and_grad(cross_entropy, leaf, target, **options, config=config)
        truth = loss_and_grad(
            plain_torch_cross_entropy, leaf.double(), target, label_smoothing=0.125, z_loss=0.5
        )
        assert relative_error(loss, truth[0]) < 2e-6
        assert relative_error(grad, truth[1]) < 2e-6


def test_same_bits_on_every_run_and_thread_count(config: KernelConfig) -> None:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    # has no threads, and an interpreter is slow
    rows, classes = (600, 20000) if config.backend == "triton" else (70000, 50257)
    batches = [
        torch.randn(1, classes, generator=generator),
        torch.randn(rows, 3, generator=generator),
    ]
    runs = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            meter = Meter("cpu")
            found = []
            for logits in batches:
                targets = torch.arange(len(logits)) % logits.shape[1]
                loss, grad = loss_and_grad(
                    cross_entropy, logits, targets, meter=meter, label_smoothing=0.1, config=config
                )
                found += [loss, grad]
            runs.append([*found, meter.sums, meter.counts])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_sample_names_are_unique() -> None:
    assert len(set(SAMPLE_NAMES)) == len(SAMPLE_NAMES)
