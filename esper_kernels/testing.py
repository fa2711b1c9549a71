"""Helpers for tests and benchmarks of backends: sample inputs, a truth, an error bound, a counter
of host syncs.

Long functions: `cross_entropy_samples` is a table of cases.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class CrossEntropySample(NamedTuple):
    name: str
    logits: Tensor  # [..., V]
    targets: Tensor  # int64 [...]
    options: dict[str, Any]  # keyword arguments of `cross_entropy`


def cross_entropy_samples(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[CrossEntropySample]:
    """Named inputs, the same on every call; none requires grad."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.float32, got {dtype!r}")
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, scale: float = 3.0) -> Tensor:
        return (_normal(generator, *shape) * scale).to(dtype).to(device)

    def classes(*shape: int, v: int) -> Tensor:
        return torch.randint(v, shape, generator=generator, device="cpu").to(device)

    samples: list[CrossEntropySample] = []

    def add(name: str, logits: Tensor, targets: Tensor | None = None, **options: Any) -> None:
        targets = classes(*logits.shape[:-1], v=logits.shape[-1]) if targets is None else targets
        samples.append(CrossEntropySample(name, logits, targets, options))

    for shape in (
        (0, 5),
        (1, 1),
        (4, 1),
        (5, 2),
        (7,),
        (7, 3),
        (64, 10),
        (5, 4, 11),
        (2, 0, 3),
        (3, 32001),
    ):
        add("x".join(map(str, shape)), normal(*shape))
    add("class stride 9", normal(6, 9).t())
    add("rows 16 apart", normal(6, 16)[:, :9])
    add("shifted sequence", normal(3, 5, 8)[:, :-1])
    add("odd offset", normal(6 * 9 + 1)[1:].view(6, 9))
    add("expanded", normal(1, 9).expand(6, 9))
    # exact in these, so the truth sees the same differences
    if dtype in (torch.float32, torch.float64):
        add(
            "offset 1e7",
            torch.arange(45, dtype=dtype, device=device).view(5, 9).remainder(7).add(1e7),
        )
    add("ties", torch.zeros(6, 9, dtype=dtype, device=device))
    add("large", normal(6, 9, scale=300.0))
    add(
        "-inf beside finite",
        normal(6, 9).index_fill(-1, torch.tensor([4], device=device), -torch.inf),
    )
    nonfinite = normal(6, 9)
    nonfinite[0, 3], nonfinite[1, 3], nonfinite[2] = torch.nan, torch.inf, -torch.inf
    add("NaN, +inf and all -inf rows", nonfinite)

    logits = normal(9, 11)
    targets = classes(9, v=11)
    weight = normal(11).abs().float()
    targets[[2, 5]] = -100
    add("ignored", logits, targets)
    add("ignored class 3", logits, targets.clamp(min=0), ignore_index=3)
    add("weight", logits, targets, weight=weight)
    add("smoothing", logits, targets, label_smoothing=0.1)
    add("smoothing 1", logits, targets, label_smoothing=1.0)
    add("z-loss", logits, targets, z_loss=1e-2)
    add("softcap", logits, targets, softcap=5.0)
    add("softcap of inf", torch.where(logits > 2, torch.inf, logits), targets, softcap=5.0)
    add("normalizer", logits, targets, normalizer=4.5)
    add(
        "smoothing, z-loss as tensors",
        logits,
        targets,
        label_smoothing=torch.tensor(0.2, dtype=torch.float32, device="cpu"),
        z_loss=torch.tensor(0.1, dtype=torch.float32, device="cpu"),
    )
    everything = {"weight": weight, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    add("everything", logits, targets, **everything)
    add("everything, normalizer", logits, targets, **everything, normalizer=4.5)
    return samples


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Drawn in float32 on the CPU, so that every dtype and device has the same numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def grad_samples(device: torch.device | str = "cpu") -> dict[str, list[Tensor | None]]:
    """Named lists of gradients, the same on every call."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _normal(generator, *shape).to(dtype).to(device)

    def value(number: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, number, dtype=dtype, device=device)

    def values(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    inf = torch.inf
    nan = torch.nan
    return {
        "none at all": [],
        "only None and empty": [None, normal(0), normal(3, 0)],
        "one": [normal(1)],
        "many shapes": [normal(7, 3), None, normal(), normal(5, 4, 11), normal(0), normal(20001)],
        "mixed dtypes": [
            normal(33, dtype=d)
            for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ],
        "strided": [
            normal(6, 9).t(),
            normal(6, 16)[:, ::2],
            normal(55)[1:],
            normal(1, 9).expand(6, 9),
        ],
        "float16 beyond its range": [value(1000.0, 400, dtype=torch.float16) for _ in range(20)],
        "1e20 and 1e-30": [value(1e20, 10), value(1e-30, 10)],
        "zeros": [values(0.0, -0.0, 1e-45, 1.0), value(0.0, 5)],
        "NaN": [values(nan, 1.0), normal(3)],
        "Inf": [values(inf, -inf, 1.0), normal(3)],
        "NaN and Inf": [values(nan, inf, 0.0), value(inf, 2)],
    }


def plain_torch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The loss from torch's own F.cross_entropy, in the logits' dtype: the truth in float64, else a
    rival."""
    _require_tensors(logits=logits, targets=targets)
    if weight is not None:
        _require_tensors(weight=weight)
    targets = targets.long()
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    x = x.reshape(-1, logits.shape[-1])
    flat = targets.reshape(-1)
    weight = None if weight is None else weight.to(x.dtype)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": float(label_smoothing),
    }
    losses = F.cross_entropy(x, flat, weight, reduction="none", **options)
    if float(z_loss):
        penalty = z_loss * x.logsumexp(-1).square()
        losses = losses + torch.where(flat != ignore_index, penalty, 0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    if reduction == "sum":
        return losses.sum()
    if normalizer is None:
        kept = flat[flat != ignore_index]
        normalizer = len(kept) if weight is None else weight[kept].sum()
    return losses.sum() / normalizer


def _require_tensors(**arguments: object) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(x).__name__}; make it one with torch.as_tensor"
            )


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in L2 over the finite entries of truth; the others must be
    equal."""
    _require_tensors(actual=actual, truth=truth)
    actual = actual.detach().double()
    truth = truth.detach().double()
    torch.testing.assert_close(actual.isnan(), truth.isnan())
    finite = truth.isfinite()
    torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True)
    actual = actual[finite]
    truth = truth[finite]
    return float((actual - truth).norm() / truth.norm().clamp(min=1e-300))


def assert_no_worse_than_eager(actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The relative L2 error of `actual` is at most twice that of plain torch in the same dtype,
    plus 1e-6."""
    _require_tensors(actual=actual, eager=eager, truth=truth)
    error = relative_error(actual, truth)
    eager_error = relative_error(eager, truth)
    assert error <= 2 * eager_error + 1e-6, (
        f"relative error {error:.3g}, plain torch's is {eager_error:.3g}"
    )


_READS = ("tolist", "numpy", "__array__")
_SYNCS_OFF_CPU = (
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)


class SyncCounter(TorchDispatchMode):
    """Counts in `.count` the operations of a block that make the host wait for a device.

    item(), bool(), tolist(), numpy() count on CPU tensors too, because they would wait on another
    device. On other devices also operations whose output size depends on values, and copies to the
    CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._reads = _CountReads(self)

    def __enter__(self) -> "SyncCounter":
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        off_cpu = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in args)
        to_cpu = isinstance(result, Tensor) and result.device.type == "cpu"
        sizes_or_copies = name in _SYNCS_OFF_CPU or (name in ("_to_copy", "copy_") and to_cpu)
        if name == "_local_scalar_dense" or (off_cpu and sizes_or_copies):
            self.count += 1
        return result


class _CountReads(TorchFunctionMode):
    """Counts a read of a CPU tensor once, whether or not it dispatches an operation."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.count
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _READS:
            self.counter.count = before + 1  # one read, however it is dispatched
        return result
