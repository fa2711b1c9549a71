"""Tensors that hold other tensors, or no values at all: served by every backend, or refused by
name before anything is written."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map

from esper_kernels import (
    KernelConfig,
    Meter,
    clip_grad_norm_,
    cross_entropy,
    cross_entropy_step,
    grad_stats,
    record_loss,
)

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 3, 4, -100, 1, 2])
WEIGHT = torch.linspace(0.5, 2.0, 5)
NUMBER = torch.tensor(0.25)


class Wrapper(Tensor):
    """Holds another tensor and has no memory: every op runs on the held one."""

    held: Tensor

    @staticmethod
    def __new__(cls, x: Tensor) -> "Wrapper":
        wrapper: Wrapper = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)
        wrapper.held = x
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrapped(x: Any) -> Any:
            return x.held if isinstance(x, Wrapper) else x

        return function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))


def with_mask(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Wrapper,
    "masked": with_mask,
    "functional": torch._to_functional_tensor,
    "quantized": quantized,
    "sparse": Tensor.to_sparse,
    "float8": lambda x: x.to(torch.float8_e5m2),
    "complex": lambda x: torch.complex(x.float(), x.float()),
}
LOSS_ARGUMENTS = {
    "logits": X,
    "targets": T,
    "weight": WEIGHT,
    "label_smoothing": NUMBER,
    "z_loss": NUMBER,
    "normalizer": NUMBER,
    "grad_scale": NUMBER,
    "out": X.clone(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSS_ARGUMENTS)
def test_every_argument_of_cross_entropy_is_a_plain_tensor(
    config: KernelConfig, name: str, kind: str
) -> None:
    meter = Meter("cpu")
    out = torch.full((8, 5), 7.0)
    arguments: dict[str, Any] = {"logits": X, "targets": T, "meter": meter, "out": out}
    arguments[name] = KINDS[kind](LOSS_ARGUMENTS[name])
    words = f"{name}|cross_entropy_step does not work inside functionalization"
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=words):
        cross_entropy_step(**arguments, config=config)
    assert not meter.counts.any()
    assert out.eq(7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_grad_stats_is_a_plain_tensor(config: KernelConfig, kind: str) -> None:
    odd = KINDS[kind]
    for grads, place in (([X, odd(X)], 1), ([odd(X), X], 0)):
        words = rf"grads\[{place}\]|grad_stats does not work inside functionalization"
        with pytest.raises((TypeError, NotImplementedError), match=words):
            grad_stats(grads, config=config)
    with pytest.raises(TypeError, match="inv_scale"):
        grad_stats([X], inv_scale=odd(NUMBER), config=config)


@pytest.mark.parametrize("kind", ["wrapper", "masked", "quantized", "sparse", "float8"])
def test_a_recorded_loss_is_a_plain_tensor(kind: str) -> None:
    meter = Meter("cpu")
    with pytest.raises(TypeError, match="loss must be a 0-d floating tensor"):
        record_loss(KINDS[kind](NUMBER), X, T, meter)
    assert not meter.counts.any()


@pytest.mark.parametrize("kind", ["wrapper", "masked", "sparse"])
def test_a_gradient_of_the_loss_is_a_plain_tensor(config: KernelConfig, kind: str) -> None:
    leaf = X.clone().requires_grad_()
    losses = cross_entropy(leaf, T, reduction="none", config=config)
    with pytest.raises(TypeError, match="grad_output must be a dense tensor"):
        losses.backward(KINDS[kind](torch.ones(8)))


@pytest.fixture
def distributed() -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes DTensors, in a group of this process alone.

    torch keeps the group for as long as the process lives. One of gloo has threads, for which a
    process forked in a thread would wait for ever at its end; the fake one has none.
    """
    module = pytest.importorskip("torch.distributed.tensor")
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")  # registers "fake"
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        yield lambda x: module.distribute_tensor(x, mesh)
    finally:
        dist.destroy_process_group()


def test_distributed_tensors_are_refused_with_a_way_out(
    config: KernelConfig, distributed: Callable[[Tensor], Tensor]
) -> None:
    logits = distributed(X)
    parameter = nn.Parameter(distributed(X))
    parameter.grad = distributed(X)
    for call in (
        lambda: cross_entropy(logits, T, config=config),
        lambda: cross_entropy(X, distributed(T), config=config),
        lambda: cross_entropy_step(logits, T, None, inplace=True, config=config),
        lambda: grad_stats([logits], config=config),
        lambda: clip_grad_norm_(parameter, 1.0, config=config),
    ):
        with pytest.raises(TypeError, match=r"got DTensor.*; pass its to_local\(\)"):
            call()


# --- fake tensors: shapes without values ---


def test_fake_tensors_get_fake_results(config: KernelConfig) -> None:
    with FakeTensorMode():
        logits = torch.randn(8, 5, requires_grad=True)
        targets = torch.randint(5, (8,))
        meter = Meter("cpu")
        cross_entropy(logits, targets, meter=meter, config=config).backward()
        assert logits.grad is not None
        assert logits.grad.shape == (8, 5)
        out = torch.empty(8, 5)
        values = logits.detach()
        assert cross_entropy_step(values, targets, meter, out=out, config=config) is out
        assert cross_entropy_step(values, targets, None, inplace=True, config=config).shape == (
            8,
            5,
        )
        assert grad_stats([values, None], config=config).norms.shape == (2,)


@pytest.mark.parametrize("place", ["logits", "targets", "weight", "z_loss", "grads"])
def test_fake_tensors_beside_real_ones_are_refused(config: KernelConfig, place: str) -> None:
    def fake(x: Tensor) -> Tensor:
        return FakeTensorMode().from_tensor(x)

    def call() -> object:
        if place == "grads":
            return grad_stats([X, fake(X)], config=config)
        arguments: dict[str, Any] = {"logits": X, "targets": T}
        arguments[place] = fake(LOSS_ARGUMENTS[place])
        return cross_entropy(**arguments, config=config)

    with pytest.raises((TypeError, AssertionError), match=r"[Ff]ake"):
        call()


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_graph_by_make_fx_computes_with_new_values(backend: str) -> None:
    config = KernelConfig(backend=backend)

    def gradient(logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(leaf, T, config=config), leaf)
        return grad

    traced = make_fx(gradient)(X)
    torch.testing.assert_close(traced(3 * X), gradient(3 * X))


# --- transforms of the statistics ---


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.vmap(f)(X[None]),
        lambda f: torch.func.grad(lambda x: f(x).sum())(X),
        lambda f: torch.func.functionalize(f)(X),
        lambda f: torch.func.jvp(f, (X,), (X,)),
        lambda f: torch.jit.trace(f, X),
    ],
    ids=["vmap", "grad", "functionalize", "jvp", "trace"],
)
def test_transforms_of_statistics_are_refused_by_name(
    config: KernelConfig, transform: Callable[[Callable[[Tensor], Tensor]], object]
) -> None:
    with pytest.raises(NotImplementedError, match="grad_stats does not work inside"):
        transform(lambda x: grad_stats([x], config=config).norms)


def test_statistics_of_dual_tensors_are_refused(config: KernelConfig) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            grad_stats([dual], config=config)


# --- memory ---


def test_statistics_are_not_written_over_inference_tensors(config: KernelConfig) -> None:
    with torch.inference_mode():
        made = grad_stats([X], config=config)
        grad_stats([X], out=made, config=config)
    before = made.magnitudes.clone()
    with pytest.raises(ValueError, match="made in inference mode"):
        grad_stats([2 * X], out=made, config=config)
    assert torch.equal(made.magnitudes, before)


@pytest.mark.parametrize("name", ["targets", "weight", "label_smoothing"])
def test_memory_freed_before_backward_is_refused_by_name(config: KernelConfig, name: str) -> None:
    values = {"targets": T.clone(), "weight": WEIGHT.clone(), "label_smoothing": NUMBER.clone()}
    leaf = X.clone().requires_grad_()
    loss = cross_entropy(leaf, **values, config=config)
    values[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"the storage of {name}"):
        loss.backward()
    assert leaf.grad is None


@pytest.mark.parametrize("use", ["inplace", "out"])
def test_a_lazy_clone_is_copied_before_it_is_written_over(config: KernelConfig, use: str) -> None:
    original = X.clone()
    clone = torch._lazy_clone(original)
    options: dict[str, Any] = {"inplace": True} if use == "inplace" else {"out": clone}
    logits = clone if use == "inplace" else X
    grad = cross_entropy_step(logits, T, None, **options, config=config)
    assert torch.equal(original, X)
    torch.testing.assert_close(grad, cross_entropy_step(X, T, None, config=config))


@pytest.mark.parametrize(
    "strides", [(0, 0), (0, 1), (1, 0), (2**62, 1)], ids=["one element", "rows", "classes", "huge"]
)
def test_extreme_strides_are_read(config: KernelConfig, strides: tuple[int, int]) -> None:
    rows = 1 if strides[0] == 2**62 else 8
    x = torch.linspace(-1, 1, 8).as_strided((rows, 5), strides)
    grad = cross_entropy_step(x, T[:rows], None, config=config)
    torch.testing.assert_close(grad, cross_entropy_step(x.clone(), T[:rows], None, config=config))
    torch.testing.assert_close(
        grad_stats([x], config=config).norms, grad_stats([x.clone()], config=config).norms
    )
