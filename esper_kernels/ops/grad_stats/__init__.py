"""Gradient statistics: `grad_stats` measures, `GradStats.compute` reads, `clip_grad_norm_` clips.

`grad_stats` asks `select_backend`, and lets that backend's module fill the result; `reference` is
the definition. Call them after backward, outside a compiled region.
"""

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.backends import select_backend
from esper_kernels.config import DTYPES, KernelConfig
from esper_kernels.ops.grad_stats import cpp, reference, triton
from esper_kernels.ops.grad_stats.stats import GradHealth, GradStats
from esper_kernels.values import materialized

__all__ = ["GradHealth", "GradStats", "clip_grad_norm_", "grad_stats"]

_MODULES = {"eager": reference, "cpp": cpp, "triton": triton, "cuda": cpp}
Grads = Sequence[Tensor | None]


def grad_stats(
    grads: Grads | Mapping[str, Grads | Tensor | None],
    *,
    vanishing: float = 1e-7,
    exploding: float = 100.0,
    inv_scale: Tensor | None = None,
    out: GradStats | None = None,
    config: KernelConfig | None = None,
) -> GradStats:
    """Norms, largest magnitudes, and zero, NaN and Inf counts of gradients, on the device; no host
    sync.

    grads: a sequence of tensors or None, or a mapping from group name to such a sequence or to one
        tensor; float16, bfloat16, float32, float64 mixed, any shape and stride, one device. None
        and empty tensors keep their place. An `nn.Parameter` is refused, because its gradient is
        meant: pass `p.grad`, or `p.detach()` to measure the parameter itself.
    vanishing, exploding: numbers >= 0; a tensor whose L2 norm is strictly below / above is counted
        as such.
    inv_scale: [] on the gradients' device (1 / a loss scaler's scale), by which every value is
    multiplied.
    out: an earlier result of as many tensors on the same device, whose memory is overwritten and
    reused.
    config: a `KernelConfig`; None chooses. TypeError or ValueError name the tensor that is refused.

    Sums are float64: float16 does not overflow; 1e20 and 1e-30 count. -0.0 is a zero, a denormal is
    not.
    """
    checks.check_plain_number("vanishing", vanishing)
    checks.check_plain_number("exploding", exploding)
    tensors, groups = _flatten(grads)
    first = next((x for x in tensors if x is not None), None)
    checks.refuse_transforms("grad_stats", first, instead="linalg.vector_norm")
    if isinstance(out, GradStats):
        checks.refuse_unwritable("out", out.found_inf)
    stats = _measure_natively(tensors, inv_scale, out, config)
    if stats is None:
        device, dtype = _check(tensors, inv_scale, out)
        choice = select_backend("grad_stats", device.type, dtype, config)
        stats = _allocate(len(tensors), device) if out is None else out
        ready = [x if x is None else materialized(x) for x in tensors]
        scale = None if inv_scale is None else materialized(inv_scale)
        with torch.no_grad():
            _MODULES[choice.name].fill(ready, scale, stats, choice.instruction_set)
    numels = tuple(0 if x is None else x.numel() for x in tensors)
    return stats.over(numels, groups, vanishing, exploding)


def _flatten(grads: object) -> tuple[list[Tensor | None], tuple[tuple[str, int], ...]]:
    """The tensors in order, and each group's name and size."""
    if isinstance(grads, Tensor):
        raise TypeError(
            "grads must be a sequence of tensors or None, or a mapping of them; pass [tensor]"
        )
    if not isinstance(grads, Mapping):
        if not isinstance(grads, Iterable):
            raise TypeError(
                "grads must be a sequence of tensors or None, or a mapping of them, got "
                f"{checks.describe(grads)}; of a module pass [p.grad for p in module.parameters()]"
            )
        return list(grads), ()
    members = {name: _members(name, group) for name, group in grads.items()}
    groups = tuple((name, len(group)) for name, group in members.items())
    return [tensor for group in members.values() for tensor in group], groups


def _members(name: object, group: object) -> list[Tensor | None]:
    if group is None or isinstance(group, Tensor):
        return [group]
    if not isinstance(group, Iterable):
        raise TypeError(
            f"grads[{name!r}] must be a tensor, None, or a sequence of them, got "
            f"{checks.describe(group)}"
        )
    return list(group)


def _measure_natively(
    tensors: list[Tensor | None],
    inv_scale: Tensor | None,
    out: GradStats | None,
    config: KernelConfig | None,
) -> GradStats | None:
    """The statistics from a compiled op, which checks the tensors itself; None if it refuses
    them."""
    first = next((x for x in tensors if x is not None), None)
    given = (*tensors, inv_scale)
    if not isinstance(first, Tensor) or not all(x is None or type(x) is Tensor for x in given):
        return None  # a subclass may mean something else by its memory, and `_check` refuses some
    choice = select_backend("grad_stats", first.device.type, torch.float32, config)
    if choice.name not in checks.NATIVE:
        return None
    try:
        stats = _allocate(len(tensors), first.device) if out is None else out
        cpp.fill(tensors, inv_scale, stats, choice.instruction_set)
    except checks.REFUSALS:
        return None
    return stats


def clip_grad_norm_(
    params: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    stats: GradStats | None = None,
    error_if_nonfinite: bool = False,
    config: KernelConfig | None = None,
) -> Tensor:
    """Scale the gradients of `params` in place by min(1, max_norm / (norm + 1e-6)).

    params: tensors, or one. A tensor that comes twice, as tied weights may, counts once; torch
        would count its norm twice and scale it twice. As in torch, those without a gradient are
        left out, and an empty generator warns.
    max_norm: a number >= 0; infinity clips nothing.
    stats: what `grad_stats` measured on these gradients, in any order, so that they are not read
        again for the norm; ValueError if the sizes differ. With an inv_scale, it is the norm of the
        unscaled gradients.
    error_if_nonfinite: RuntimeError, before scaling, for a norm that is NaN or Inf (a host sync).
        Otherwise such a norm does what it does in torch: Inf makes finite gradients 0, NaN makes
        all NaN.
    config: a `KernelConfig`, where no stats are given; None chooses.

    Returns the norm before clipping, float64 [].
    """
    checks.check_plain_number("max_norm", max_norm)
    checks.check_flag("error_if_nonfinite", error_if_nonfinite)
    if stats is not None and not isinstance(stats, GradStats):
        raise TypeError(
            f"stats must be a GradStats or None, got {checks.describe(stats)}; pass the result of "
            "grad_stats(...), not of its compute()"
        )
    with_grad = [p for p in _distinct(params) if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    if stats is None:
        stats = grad_stats(grads, config=config)
    measured = [n for n in stats.numels if n]
    given = [grad.numel() for grad in grads if grad.numel()]
    if sorted(measured) != sorted(given):
        raise ValueError(
            f"stats are of {len(measured)} tensors with {sum(measured)} elements, but params have "
            f"{len(given)} gradients with {sum(given)}; measure these gradients, or leave stats out"
        )
    total_norm = stats.total_norm.clone()  # the memory of stats may be used again
    if error_if_nonfinite and not total_norm.isfinite():  # the host sync
        raise RuntimeError(
            "the total norm of the gradients is not finite, so they cannot be clipped; drop this "
            "step"
        )
    for dtype in {grad.dtype for grad in grads}:
        # One launch for all on CUDA needs a factor of their dtype; half precision would round or
        # lose it.
        norm = total_norm.float() if dtype == torch.float32 else total_norm
        members = [p for p in with_grad if p.grad is not None and p.grad.dtype == dtype]
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, norm)
    return total_norm


def _distinct(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in the order in which they come."""
    alone = isinstance(params, Tensor) or not isinstance(params, Iterable)
    members = [params] if alone else list(params)
    distinct: dict[int, Tensor] = {}
    for p in members:
        if not isinstance(p, Tensor):
            raise TypeError(
                "params must be a tensor or an iterable of tensors, such as model.parameters(), "
                f"got {checks.describe(p)}"
            )
        distinct[id(p)] = p
    if not members and isinstance(params, Generator):
        warnings.warn(
            "params is an empty generator, so nothing is clipped; was it used up before?",
            stacklevel=3,
        )
    return list(distinct.values())


def _check(
    tensors: Grads, inv_scale: Tensor | None, out: GradStats | None
) -> tuple[torch.device, torch.dtype]:
    """The tensors' device and widest dtype; without any, that of `out` or the CPU, and float32."""
    device = None
    for place, x in enumerate(tensors):
        if x is None:
            continue
        if isinstance(x, torch.nn.Parameter):
            raise TypeError(
                f"grads must be gradients, got an nn.Parameter at place {place}; pass [p.grad for "
                "p in parameters], or p.detach() to measure the parameters themselves"
            )
        if isinstance(x, tuple):
            raise TypeError(
                f"grads must be tensors or None, got a tuple at place {place}; of named parameters "
                "pass {name: p.grad for name, p in module.named_parameters()}"
            )
        if not checks.is_dense(x):
            raise checks.not_dense(f"grads[{place}]", x, "a dense tensor or None")
        if x.dtype not in DTYPES:
            raise TypeError(f"grads[{place}] must be one of {DTYPES}, got {x.dtype}")
        checks.check_storage(f"grads[{place}]", x)
        device = device or x.device
        if x.device != device:
            raise ValueError(
                f"grads must be on one device, got {device} and, at place {place}, {x.device}"
            )
    if device is None:
        device = torch.device("cpu") if out is None else out.found_inf.device
    if inv_scale is not None:
        checks.check_number_tensor("inv_scale", inv_scale)
        if inv_scale.device != device:
            raise ValueError(
                f"inv_scale must be on the gradients' device {device}, got {inv_scale.device}"
            )
    if out is not None:
        _check_result(out, len(tensors), device)
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return device, torch.float64 if wide else torch.float32


def _check_result(out: GradStats, num_tensors: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `out` is an earlier result of as many tensors on this
    device."""
    if not isinstance(out, GradStats):
        raise TypeError(f"out must be a GradStats, got {checks.describe(out)}")
    if (len(out.numels), out.found_inf.device) != (num_tensors, device):
        raise ValueError(
            f"out must be of {num_tensors} tensors on {device}, got {len(out.numels)} on "
            f"{out.found_inf.device}; leave it out to allocate"
        )
    names = ("magnitudes", "counts", "total_norm", "found_inf")
    expected = _allocate(num_tensors, torch.device("meta"))
    for name in names:
        x = getattr(out, name)
        like = getattr(expected, name)
        if (x.shape, x.dtype, x.device) != (
            like.shape,
            like.dtype,
            device,
        ) or not x.is_contiguous():
            raise ValueError(
                f"out.{name} must be a contiguous {like.dtype} tensor of shape {tuple(like.shape)} "
                f"on {device}, got {checks.describe(x)}"
            )
        checks.check_storage(f"out.{name}", x)


def _allocate(num_tensors: int, device: torch.device) -> GradStats:
    def memory(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return GradStats(
        magnitudes=memory(torch.float64, 2, num_tensors),
        counts=memory(torch.int64, 3, num_tensors),
        total_norm=memory(torch.float64),
        found_inf=memory(torch.float32),
    )
