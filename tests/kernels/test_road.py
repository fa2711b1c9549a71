"""The direct road to the CPU kernels: the op's bits where it serves, and nothing written where it does not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper_kernels import KernelConfig, Meter, cross_entropy, cross_entropy_step, grad_stats, native
from esper_kernels.backends import direct
from esper_kernels.testing import cross_entropy_samples

pytestmark = pytest.mark.skipif(native.ROAD is None, reason=f"no direct road: {native.NO_ROAD}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS, TARGETS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, -100])


class Onlooker(TorchDispatchMode):
    """Sends calls through the dispatcher by looking on, and notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def both(call: Callable[[], tuple[Tensor, ...]]) -> None:
    """The direct road and the op give the same bits."""
    served = call()
    with Onlooker() as onlooker:
        expected = call()
    assert any(name.startswith("esper.") for name in onlooker.seen)
    for x, y in zip(served, expected, strict=True):
        assert torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_op_bit_for_bit(dtype: torch.dtype) -> None:
    for _, logits, targets, options in cross_entropy_samples(dtype):

        def step(logits: Tensor = logits, targets: Tensor = targets, options: Any = options) -> tuple[Tensor, ...]:
            meter = Meter("cpu", topk=(3, 100))
            grad = cross_entropy_step(logits, targets, meter, grad_scale=torch.tensor(3.0), **options)
            return grad, meter.sums, meter.counts

        def loss(logits: Tensor = logits, targets: Tensor = targets, options: Any = options) -> tuple[Tensor, ...]:
            meter, leaf = Meter("cpu"), logits.clone().requires_grad_()
            found = cross_entropy(leaf, targets, meter=meter, **options)
            found.backward(torch.full(found.shape, 0.3))
            assert leaf.grad is not None
            return found.detach(), leaf.grad, meter.sums, meter.counts, cross_entropy(logits, targets, **options)

        both(step)
        both(loss)
    tensors = [LOGITS.to(dtype), None, torch.zeros(0, dtype=dtype), LOGITS[1].to(dtype)]
    both(lambda: tuple(vars(grad_stats(tensors, inv_scale=torch.tensor(0.5)))[x] for x in ("norms", "zeros", "infs")))


def untouched(**changes: Any) -> bool:
    """Whether the road declines this call, having written nothing."""
    assert native.ROAD is not None
    meter, out = Meter("cpu"), torch.full((6, 5), 7.0)
    given: dict[str, Any] = {
        "logits": LOGITS, "targets": TARGETS, "weight": None, "ignore_index": -100, "label_smoothing": 0.0,
        "z_loss": 0.0, "softcap": None, "reduction": "mean", "normalizer": None, "instruction_set": "auto",
        "grad_scale": None, "sums": meter.sums, "counts": meter.counts, "topk": (1,), "loss": None, "rows": None,
        "out": out,
    }  # fmt: skip
    before = out if changes.get("out") is None else changes["out"].clone()
    served = native.ROAD.cross_entropy(*(given | changes).values())
    unwritten = not meter.counts.any() and torch.equal(changes.get("out", out), before)
    assert served != unwritten
    return not served


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": LOGITS.double()},
        {"logits": LOGITS.to("meta")},
        {"logits": LOGITS.to_sparse()},
        {"logits": torch.nn.Parameter(LOGITS)},
        {"logits": LOGITS[0]},
        {"logits": LOGITS.T.contiguous().T},
        {"logits": None},
        {"logits": LOGITS.tolist()},
        {"targets": TARGETS[:5]},
        {"targets": TARGETS.float()},
        {"targets": TARGETS.repeat_interleave(2)[::2]},
        {"targets": TARGETS + 1},
        {"targets": TARGETS.clamp(min=0).to(torch.int8)},
        {"weight": torch.ones(4)},
        {"weight": torch.ones(5, dtype=torch.float64)},
        {"weight": torch.ones(10)[::2]},
        {"ignore_index": 0.5},
        {"ignore_index": 2**70},
        {"label_smoothing": 1.5},
        {"label_smoothing": float("nan")},
        {"label_smoothing": "0.1"},
        {"label_smoothing": torch.ones(1)},
        {"z_loss": -1},
        {"softcap": 0.0},
        {"softcap": torch.tensor(1.0)},
        {"normalizer": -1.0},
        {"normalizer": 2.0, "reduction": "sum"},
        {"reduction": "average"},
        {"reduction": None},
        {"instruction_set": "neon"},
        {"grad_scale": float("nan")},
        {"out": torch.zeros(5, 6)},
        {"out": torch.zeros(6, 5, dtype=torch.bfloat16)},
        {"out": torch.zeros(6, 6)[:, 1:]},
        {"out": torch.zeros(6, 5, dtype=torch.float64)},
    ],
    ids=lambda changes: "-".join(changes) + repr(changes)[-12:],
)
def test_it_leaves_alone_what_it_does_not_serve(changes: dict[str, Any]) -> None:
    assert untouched(**changes)


def test_it_serves_what_it_should() -> None:
    assert not untouched()
    assert not untouched(weight=torch.ones(5), label_smoothing=1, z_loss=torch.tensor(0.1), softcap=3.0, normalizer=2)
    assert not untouched(logits=LOGITS.expand(2, 6, 5)[1], out=torch.zeros(6, 5))
    assert not untouched(logits=torch.randn(6, 9)[:, 2:7])


def test_overlap_with_the_logits_is_refused_at_both_ends() -> None:
    memory = torch.randn(100)
    logits = memory[30:60].view(6, 5)
    for start, serves in ((0, True), (1, False), (29, False), (30, False), (45, False), (59, False), (60, True)):
        assert untouched(logits=logits, out=memory[start : start + 30].view(6, 5)) != serves, start


def test_onlookers_see_the_op() -> None:
    with torch.profiler.profile() as profile:
        cross_entropy_step(LOGITS, TARGETS, None)
    assert "esper::cross_entropy" in {event.key for event in profile.key_averages()}
    assert direct() is native.ROAD
    assert direct(KernelConfig(backend="eager")) is None
    with Onlooker():
        assert direct() is None


def test_a_subclass_keeps_its_meaning() -> None:
    class Noted(Tensor):
        calls: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cross_entropy_step(LOGITS.as_subclass(Noted), TARGETS, None)
    assert Noted.calls


def test_an_instruction_set_that_is_asked_for_is_taken() -> None:
    shifted = LOGITS * 3 + 0.1
    found = {
        name: cross_entropy_step(shifted, TARGETS, None, config=KernelConfig(instruction_set=name))
        for name in ("auto", *native.INSTRUCTION_SETS)
    }
    assert torch.equal(found["auto"], found[native.INSTRUCTION_SETS[0]])
    assert len({tuple(grad.flatten().tolist()) for grad in found.values()}) > 1 or len(found) == 2
