"""Arguments of a wrong type are refused by name, with what was expected, by every public name."""

import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

import esper_kernels
from esper_kernels import ClassShard, CrossEntropyLoss, KernelConfig, LinearCrossEntropyLoss, Meter
from esper_kernels.testing import (
    assert_no_worse_than_eager,
    cross_entropy_samples,
    plain_torch_cross_entropy,
    relative_error,
)

LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(4)
ARRAY = np.zeros(3)
# a stand-in for the package, because every argument here has a wrong type
kernels = cast(Any, esper_kernels)

CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "ClassShard.of": (
        lambda: ClassShard.of(cast(Any, LOGITS)),
        "logits must be a DTensor, got Tensor (4, 5) torch.float32 on cpu; for plain tensors use "
        "ClassShard.across(logits.shape[-1], group)",
    ),
    "ClassShard.of None": (
        lambda: ClassShard.of(cast(Any, None)),
        "logits must be a DTensor, got NoneType",
    ),
    "first": (lambda: kernels.ClassShard("0", 5), "first must be an int, got str '0'"),
    "num_classes": (lambda: kernels.ClassShard(0, 5.0), "num_classes must be an int, got float"),
    "group": (lambda: kernels.ClassShard(0, 5, [0, 1]), "group must be a torch.distributed.Proc"),
    "own_classes": (lambda: ClassShard.across(cast(Any, LOGITS)), "own_classes must be an int"),
    "group of across": (lambda: ClassShard.across(5, cast(Any, "all")), "group must be a torch.d"),
    "group of a meter": (lambda: Meter("cpu").all_reduce(cast(Any, -100)), "group must be a tor"),
    "device": (lambda: Meter(cast(Any, None)), "device must be a torch.device or its name"),
    "device name": (lambda: Meter("gpu"), 'must be the name of a device, such as "cpu" or'),
    "state": (
        lambda: Meter("cpu").load_state_dict(cast(Any, None)),
        "expected what Meter.state_dict returned, got None",
    ),
    "k": (lambda: Meter("cpu").compute().accuracy_at(cast(Any, [1])), "k must be one of [1], whi"),
    "strict": (
        lambda: Meter("cpu").compute(cast(Any, "no")),
        "strict must be True or False, got 'no'",
    ),
    "inplace": (
        lambda: kernels.cross_entropy_step(LOGITS, TARGETS, None, inplace="no"),
        "inplace must be True or False, got str 'no'",
    ),
    "entropy": (
        lambda: kernels.token_logprobs(LOGITS, TARGETS, entropy=LOGITS),
        "entropy must be True or False, got Tensor",
    ),
    "entropy of hidden": (
        lambda: kernels.linear_token_logprobs(LOGITS, LOGITS, TARGETS, entropy=1),
        "entropy must be True or False, got int 1",
    ),
    "error_if_nonfinite": (
        lambda: kernels.clip_grad_norm_([], 1.0, error_if_nonfinite=ARRAY),
        "error_if_nonfinite must be True or False, got ndarray",
    ),
    "stats": (
        lambda: kernels.clip_grad_norm_([], 1.0, stats=kernels.grad_stats([LOGITS]).compute()),
        "stats must be a GradStats or None, got GradHealth",
    ),
    "grads": (
        lambda: kernels.grad_stats({"head": 3}),
        "grads['head'] must be a tensor, None, or a sequence of them, got int 3",
    ),
    "reduction": (
        lambda: kernels.cross_entropy(LOGITS, TARGETS, reduction=ARRAY),
        "reduction must be 'mean', 'sum' or 'none', got array",
    ),
    "reduction of a step": (
        lambda: kernels.cross_entropy_step(LOGITS, TARGETS, None, reduction=ARRAY),
        "reduction must be 'mean', 'sum' or 'none', got array",
    ),
    "bias_grad": (
        lambda: kernels.linear_cross_entropy_step(LOGITS, LOGITS, TARGETS, None, bias_grad=TARGETS),
        "expected no bias_grad without bias, got one; pass bias too",
    ),
    "op": (lambda: kernels.select_backend([], "cpu", torch.float32), "op must be one of"),
    "dtype": (
        lambda: kernels.select_backend("cross_entropy", "cpu", []),
        "and a dtype such as torch.float32, got 'cpu' and []",
    ),
    "backend": (lambda: KernelConfig(backend=cast(Any, ARRAY)), "backend must be one of ('auto'"),
    "input": (
        lambda: CrossEntropyLoss()(None, TARGETS),
        "input must be a tensor, got NoneType None",
    ),
    "target": (
        lambda: CrossEntropyLoss()(LOGITS, [0, 1, 2, 3]),
        "target must be a tensor, got list [0, 1, 2, 3]; make it a tensor with torch.as_tensor",
    ),
    "in_features": (
        lambda: LinearCrossEntropyLoss(cast(Any, "8"), 5),
        "in_features must be an int, got str '8'",
    ),
    "bias": (
        lambda: LinearCrossEntropyLoss(8, 5, bias=cast(Any, LOGITS)),
        "bias must be True or False, got Tensor",
    ),
    "dtype of samples": (
        lambda: cross_entropy_samples(cast(Any, "float32")),
        "dtype must be a torch.dtype, such as torch.float32, got 'float32'",
    ),
    "plain targets": (
        lambda: plain_torch_cross_entropy(LOGITS, cast(Any, [0, 1, 2, 3])),
        "targets must be a tensor, got list; make it one with torch.as_tensor",
    ),
    "truth": (
        lambda: relative_error(LOGITS, cast(Any, ARRAY)),
        "truth must be a tensor, got ndarray",
    ),
    "eager": (
        lambda: assert_no_worse_than_eager(LOGITS, cast(Any, None), LOGITS),
        "eager must be a tensor, got NoneType",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_type_is_named(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_a_refused_flag_changes_nothing() -> None:
    logits = LOGITS.clone()
    meter = Meter("cpu")
    with pytest.raises(TypeError, match="inplace"):
        kernels.cross_entropy_step(logits, TARGETS, meter, inplace=1)
    assert torch.equal(logits, LOGITS)
    assert meter.compute().batches == 0


def test_a_group_without_this_process_is_refused() -> None:
    """`dist.new_group` gives such a process a number in place of a group."""
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(TypeError, match=r"group must be .* to which this process"):
        kernels.ClassShard(0, 5, outside)
