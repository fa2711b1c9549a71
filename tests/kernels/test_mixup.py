"""MixUp: two targets per row, against two calls of torch's own op in float64.

Long file: every form of one option, against one truth.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from esper_kernels import (
    KernelConfig,
    Meter,
    cross_entropy,
    cross_entropy_step,
    linear_cross_entropy,
    linear_cross_entropy_step,
)
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.testing import (
    assert_no_worse_than_eager,
    cross_entropy_samples,
    plain_torch_cross_entropy,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING: dict[str, Any] = {
    "weight": torch.linspace(0.5, 2.0, 6),
    "label_smoothing": 0.2,
    "z_loss": 0.1,
    "softcap": 3.0,
}


def mixed_truth(
    logits: Tensor, targets: Tensor, targets2: Tensor, share: Tensor, **options: Any
) -> Tensor:
    """share * loss(targets) + (1 - share) * loss(targets2), from torch's own op, in the logits'
    dtype; an ignored target has a share of 0."""
    reduction = options.pop("reduction", "mean")
    normalizer = options.pop("normalizer", None)
    ignored = options.get("ignore_index", -100)
    weight = options.get("weight")
    finite = logits.isfinite().any(-1) & ~(logits.isnan() | (logits == torch.inf)).any(-1)
    losses = torch.zeros(targets.shape, dtype=logits.dtype)
    divisor = torch.zeros((), dtype=torch.float64)
    for t, part in ((targets, share.double()), (targets2, 1 - share.double())):
        part = torch.where(t != ignored, part.expand(t.shape), 0.0)
        loss = plain_torch_cross_entropy(logits, t, reduction="none", **options)
        losses = losses + torch.where((part == 0) & finite, 0.0, part.to(logits.dtype) * loss)
        of_class = part if weight is None else part * weight.double()[t.clamp(0)]
        divisor = divisor + of_class.sum()
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (divisor if normalizer is None else normalizer)


def with_gradient(function: Any, logits: Tensor, *targets: Tensor, **options: Any) -> Any:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *targets, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), grad


def second_targets(targets: Tensor, classes: int, ignored: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    second = torch.randint(classes, targets.shape, generator=generator)
    return torch.where(torch.rand(targets.shape, generator=generator) < 0.2, ignored, second)


def shares_of(targets: Tensor) -> Tensor:
    """One per row, with 0, 1 and 1/2 among them."""
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(targets.shape, generator=generator)
    pick = torch.randint(6, targets.shape, generator=generator)
    return torch.where(pick < 3, pick / 2, share)


def ours(config: KernelConfig) -> Any:
    def loss(logits: Tensor, targets: Tensor, targets2: Tensor, share: Tensor, **o: Any) -> Tensor:
        return cross_entropy(logits, targets, targets2=targets2, share=share, config=config, **o)

    return loss


@pytest.mark.in_turn
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str, indirect=True)
def test_samples_agree_with_two_calls_of_torch_in_float64(
    config: KernelConfig, logits_dtype: torch.dtype, reduction: str
) -> None:
    for name, logits, targets, options in cross_entropy_samples(logits_dtype):
        if (reduction != "mean" and "normalizer" in options) or (
            logits.numel() == 0 and reduction == "mean"
        ):
            continue
        options = {**options, "reduction": reduction}
        targets2 = second_targets(targets, logits.shape[-1], options.get("ignore_index", -100))
        for share in (shares_of(targets), torch.tensor(0.3)):
            given = (targets, targets2, share)
            loss, grad = with_gradient(ours(config), logits, *given, **options)
            true_loss, true_grad = with_gradient(mixed_truth, logits.double(), *given, **options)
            _, eager_grad = with_gradient(mixed_truth, logits, *given, **options)
            assert loss.shape == true_loss.shape, name
            assert relative_error(loss, true_loss) <= 2e-6, name
            assert grad.dtype == logits.dtype, name
            assert_no_worse_than_eager(grad, eager_grad, true_grad)


@pytest.mark.parametrize("classes", [1, 6, 33, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_step_gives_the_gradient_and_counts_by_the_larger_share(
    config: KernelConfig, classes: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, classes, generator=generator).to(dtype)
    targets = torch.randint(classes, (7, 3), generator=generator)
    targets[0, :2] = -100
    targets2 = second_targets(targets, classes, -100)
    targets2[0, 0] = -100
    share = shares_of(targets)
    meter = Meter("cpu", topk=(1, 2))
    grad = cross_entropy_step(
        logits, targets, meter, targets2=targets2, share=share, grad_scale=3.0, config=config
    )
    loss, truth = with_gradient(mixed_truth, logits.double(), targets, targets2, share)
    assert relative_error(grad, 3 * truth) < (2e-6 if dtype == torch.float32 else 1e-3)

    of_second = torch.where(targets2 != -100, 1 - share, -1.0)
    of_first = torch.where(targets != -100, share, -1.0)
    major = torch.where(of_second > of_first, targets2, targets)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    hit = order == major[..., None]
    result = meter.compute()
    assert result.valid == int((major != -100).sum())
    assert result.ignored == int((major == -100).sum()) == 1
    assert result.correct == {k: int(hit[..., :k].any(-1).sum()) for k in (1, 2)}
    assert result.loss == pytest.approx(float(loss), rel=2e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0, 1, torch.tensor(0.25).double()])
def test_one_share_for_all_rows_equals_the_usual_two_losses(
    config: KernelConfig, share: Any
) -> None:
    """If no target is ignored, a mean is the mean of both."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 6, generator=generator)
    targets = torch.randint(6, (8,), generator=generator)
    other = targets.roll(1)
    meter = Meter("cpu")
    loss = cross_entropy(logits, targets, targets2=other, share=share, meter=meter, config=config)
    expected = share * F.cross_entropy(logits, targets) + (1 - share) * F.cross_entropy(
        logits, other
    )
    torch.testing.assert_close(loss, expected.float())
    major = targets if share >= 0.5 else other
    assert meter.compute().correct[1] == int((logits.argmax(-1) == major).sum())


def test_permuted_targets_and_class_weights_equal_the_usual_two_losses(
    config: KernelConfig,
) -> None:
    """The other targets have the same weights in sum."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 6, generator=generator)
    targets = torch.randint(6, (8,), generator=generator)
    weight = torch.linspace(0.5, 2.0, 6)
    loss = cross_entropy(
        logits, targets, targets2=targets.flip(0), share=0.7, weight=weight, config=config
    )
    parts = [F.cross_entropy(logits, t, weight) for t in (targets, targets.flip(0))]
    torch.testing.assert_close(loss, 0.7 * parts[0] + 0.3 * parts[1])


@pytest.mark.parametrize("classes", [6, 40, 20000])
def test_the_same_target_twice_is_no_mixture(config: KernelConfig, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, classes, generator=generator)
    targets = torch.randint(classes, (9,), generator=generator)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "config": config}
    grad = cross_entropy_step(logits, targets, None, targets2=targets, share=0.3, **options)
    torch.testing.assert_close(grad, cross_entropy_step(logits, targets, None, **options))


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_target_without_a_share_is_not_looked_at(
    config: KernelConfig, classes: int, options: dict[str, Any]
) -> None:
    """The loss of that target alone would be infinite, because it has a logit of -inf."""
    logits = torch.zeros(3, classes)
    logits[:, 1] = -torch.inf
    given = {**options, "softcap": None, "label_smoothing": 0.0}
    if "weight" in options:
        given["weight"] = torch.linspace(0.5, 2.0, classes)
    first = torch.tensor([0, 0, 1])
    second = torch.tensor([1, -100, 2])
    share = torch.tensor([1.0, 1.0, 0.0])
    loss, grad = with_gradient(ours(config), logits, first, second, share, **given)
    expected = with_gradient(plain_torch_cross_entropy, logits, torch.tensor([0, 0, 2]), **given)
    torch.testing.assert_close((loss, grad), expected)


def test_rows_count_what_is_not_ignored(config: KernelConfig) -> None:
    """A row is ignored if both targets are; if one is, the other one counts alone, with its own
    share."""
    logits = torch.tensor([[2.0, 0.0, 1.0]] * 4)
    first = torch.tensor([-100, -100, 0, 2])
    second = torch.tensor([-100, 0, -100, -100])
    meter = Meter("cpu")
    loss = cross_entropy(logits, first, targets2=second, share=0.75, meter=meter, config=config)
    losses = F.cross_entropy(logits[1:], torch.tensor([0, 0, 2]), reduction="none")
    shares = torch.tensor([0.25, 0.75, 0.75])
    torch.testing.assert_close(loss, (losses * shares).sum() / shares.sum())
    result = meter.compute()
    assert (result.valid, result.ignored, result.correct[1]) == (3, 1, 2)
    assert result.loss == pytest.approx(float(loss))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logits_dtype", [torch.float64], ids=str, indirect=True)
def test_gradcheck_in_float64(
    config: KernelConfig, logits_dtype: torch.dtype, reduction: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator, dtype=logits_dtype, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    share = torch.tensor([0.3, 0.5, 0.2, 0.9])
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(
            x,
            targets,
            targets2=targets.flip(0),
            share=share,
            reduction=reduction,
            **EVERYTHING,
            config=config,
        ),
        logits,
    )


def test_grad_output_multiplies_the_gradient(config: KernelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 40, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    loss = cross_entropy(
        logits, targets, targets2=targets.flip(0), share=0.3, reduction="none", config=config
    )
    factor = torch.tensor([0.0, -1.0, 3.0, 0.5])
    (grad,) = torch.autograd.grad(loss, logits, factor)
    wide = logits.detach().double().requires_grad_()
    true = mixed_truth(wide, targets, targets.flip(0), torch.tensor(0.3), reduction="none")
    (truth,) = torch.autograd.grad(true, wide, factor.double())
    assert relative_error(grad, truth) < 2e-6


def test_targets_of_any_dtype_and_options_as_tensors(config: KernelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 200, generator=generator)
    first = torch.tensor([0, 156, 199, 3, 156])
    second = torch.tensor([1, 0, 156, 3, 2])
    plain = {"targets2": second, "share": 0.25, "label_smoothing": 0.25, "config": config}
    expected = cross_entropy(logits, first, **plain)
    for one, other in ((torch.uint8, torch.int32), (torch.int32, torch.uint8)):
        found = cross_entropy(
            logits,
            first.to(one),
            targets2=second.to(other),
            share=torch.tensor(0.25).half(),
            label_smoothing=torch.tensor(0.25),
            config=config,
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.in_turn
@pytest.mark.best_instructions
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("form", ["loss", "step"])
def test_compiled_and_a_share_that_changes_does_not_recompile(
    config: KernelConfig, compiler: str, form: str
) -> None:
    torch._dynamo.reset()
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 4, -100, 2, 3, 1])

    def run(x: Tensor, share: float) -> Tensor:
        options: Any = {"targets2": targets.flip(0), "share": share, "config": config}
        if form == "loss":
            return cross_entropy(x, targets, **options)
        return cross_entropy_step(x, targets, None, **options)

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for i in range(4):
        results = []
        for function in (compiled, run):
            leaf = logits.clone().requires_grad_(form == "loss")
            found = function(leaf, 0.1 * i + 0.05)
            if form == "loss":
                found.backward()
            results.append((found, leaf.grad))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 2
    torch._dynamo.reset()


T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"targets2": T}, TypeError, "targets2 goes with share, which is missing"),
        ({"share": 0.5}, TypeError, "share goes with targets2, which is missing"),
        ({"targets2": [0, 1], "share": 0.5}, TypeError, "targets2 must be a dense tensor.*list"),
        ({"targets2": T.float(), "share": 0.5}, TypeError, "targets2 must be class indices"),
        ({"targets2": T[:1], "share": 0.5}, ValueError, r"targets2 must be as targets.*\(1,\)"),
        ({"targets2": T.to("meta"), "share": 0.5}, ValueError, "targets2 must be as.*meta"),
        ({"targets2": T + 2, "share": 0.5}, IndexError, r"targets2: target 3 of row \(1,\)"),
        ({"targets2": T, "share": 1.1}, ValueError, r"share must be in \[0.0, 1.0\], got 1.1"),
        ({"targets2": T, "share": -0.1}, ValueError, r"share must be in .*got -0.1"),
        ({"targets2": T, "share": torch.nan}, ValueError, "share must be in .*got nan"),
        ({"targets2": T, "share": True}, TypeError, "share must be an int or a float"),
        ({"targets2": T, "share": "1"}, TypeError, "share must be an int or a float"),
        ({"targets2": T, "share": torch.ones(3)}, ValueError, r"one number per row.*\(3,\)"),
        ({"targets2": T, "share": T}, TypeError, "share as a tensor must be one of.*int64"),
        ({"targets2": T, "share": torch.ones(2, device="meta")}, ValueError, "share .*meta"),
        (
            {"targets2": T, "share": torch.tensor([torch.nan, 2.0])},
            ValueError,
            r"share must be in \[0, 1\], got nan; 2 such",
        ),
    ],
    ids=str,
)
def test_wrong_mixtures_are_named_and_nothing_is_written(
    config: KernelConfig, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    logits = torch.zeros(2, 3)
    head = torch.zeros(3, 3)
    meter = Meter("cpu")
    calls: list[Any] = [
        lambda: cross_entropy(logits, T, meter=meter, config=config, **options),
        lambda: cross_entropy_step(logits, T, meter, inplace=True, config=config, **options),
        lambda: linear_cross_entropy(logits, head, T, meter=meter, config=config, **options),
        lambda: linear_cross_entropy_step(logits, head, T, meter, config=config, **options),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
    assert meter.counts.eq(0).all()
    assert logits.eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "weight": None}], ids=["plain", "all"])
def test_linear_form_is_that_of_the_logits(
    config: KernelConfig, reduction: str, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 4, generator=generator, requires_grad=True)
    weight = torch.randn(6, 4, generator=generator, requires_grad=True)
    targets = torch.randint(6, (3, 5), generator=generator)
    targets[1, :3] = -100
    given = {
        "targets2": second_targets(targets, 6, -100),
        "share": shares_of(targets),
        "reduction": reduction,
        **{name: value for name, value in options.items() if value is not None},
    }
    meters = Meter("cpu"), Meter("cpu")
    loss = linear_cross_entropy(hidden, weight, targets, meter=meters[0], config=config, **given)
    logits = F.linear(hidden.double(), weight.double())
    truth = cross_entropy(logits, targets, meter=meters[1], **given)
    assert relative_error(loss, truth) < 3e-6
    assert torch.equal(meters[0].counts, meters[1].counts)
    found = torch.autograd.grad(loss, (hidden, weight), torch.ones_like(loss))
    expected = torch.autograd.grad(truth, (hidden, weight), torch.ones_like(truth))
    for ours_, theirs in zip(found, expected, strict=True):
        assert relative_error(ours_, theirs) < 3e-6
    if reduction != "none":
        step = linear_cross_entropy_step(hidden, weight, targets, None, config=config, **given)
        assert step.hidden is not None
        assert relative_error(step.hidden, expected[0]) < 3e-6


def test_a_share_outside_0_and_1_on_other_devices_makes_the_loss_nan() -> None:
    """The reference knows no device, so what it does with it on a GPU shows on the CPU."""
    options = reference.Options(None, -100, 0.0, 0.0, None, "mean", None)
    logits = torch.zeros(2, 3)
    for share in (1.5, -0.5, torch.nan):
        targets, mixed = reference.mixed(T, T.flip(0), torch.tensor(share), options, logits)
        assert reference.forward(logits, targets, mixed, None).loss.isnan()
