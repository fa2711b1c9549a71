"""The arguments of cross entropy: their types, what is refused, and how a backend takes them."""

from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import reference
from esper_kernels.ops.cross_entropy.reference import Number, Options

_MaybeNumber = TypeVar("_MaybeNumber", Number, Number | None)


class CommonOptions(TypedDict, total=False):
    """The options that the loss and the step share."""

    targets2: Tensor | None
    share: float | Tensor | None
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float | Tensor
    z_loss: float | Tensor
    softcap: float | None
    reduction: str
    normalizer: float | Tensor | None
    class_dim: int
    config: KernelConfig | None


class LossOptions(CommonOptions, total=False):
    """The options of `cross_entropy`."""

    meter: Meter | None


class StepOptions(CommonOptions, total=False):
    """The options of `cross_entropy_step`."""

    grad_scale: float | Tensor | None
    out: Tensor | None
    inplace: bool


def classes_last(x: Tensor, class_dim: int) -> Tensor:
    """A view of x with dimension class_dim as the last."""
    checks.check_integer("class_dim", class_dim)
    if class_dim == -1:
        return x
    checks.check_dense("logits", x)
    if not -x.dim() <= class_dim < x.dim():
        raise ValueError(
            f"class_dim must be in [{-x.dim()}, {x.dim()}) for shape {tuple(x.shape)}, got "
            f"{class_dim}"
        )
    return x.movedim(class_dim, -1)


def choose(
    logits: Tensor, targets: Tensor, meter: Meter | None, config: KernelConfig | None
) -> str:
    try:
        return checks.choose_backend("cross_entropy", logits, config, "logits")
    except ValueError:
        checks.check_batch(logits, targets, meter)  # it may be the device of one of them
        raise


def check_arguments(
    backend: str, logits: Tensor, targets: Tensor, meter: Meter | None, options: Options
) -> None:
    """Raise the error that names what is wrong with the arguments, if anything is."""
    checks.check_batch(logits, targets, meter)
    checks.check_options(logits, options._asdict())
    if backend in checks.NATIVE and torch.compiler.is_compiling():
        return  # the op looks at the targets itself when the graph runs
    reference.refuse_bad_targets(targets, logits.shape[-1], options.ignore_index)


def refuse_per_row(reduction: str) -> None:
    """A step has one gradient, of one loss."""
    checks.check_reduction(reduction)
    if reduction == "none":
        raise ValueError(
            "cross_entropy_step takes reduction 'mean' or 'sum'; for 'none' use cross_entropy"
        )


def mixture(
    logits: Tensor,
    targets: Tensor,
    targets2: Tensor | None,
    share: float | Tensor | None,
    options: Options,
    num_classes: int | None = None,
) -> tuple[Tensor, Options]:
    """Targets and options of a batch with two targets per row, after checks of those two.

    num_classes: None for those of the logits.
    """
    targets2, share = checks.check_mixture(targets, targets2, share)
    num_classes = logits.shape[-1] if num_classes is None else num_classes
    reference.refuse_bad_targets(targets2, num_classes, options.ignore_index, "targets2: ")
    if torch.compiler.is_compiling():
        share = as_tensor(share, logits)
    return reference.mixed(targets, targets2, share, options, logits, num_classes)


def as_tensor(number: _MaybeNumber, logits: Tensor) -> _MaybeNumber:
    """Inside a compiled graph a number as a tensor, so that another value does not recompile.

    A product, because that is what compilers keep a changing number in.
    """
    if number is None or isinstance(number, Tensor) or number == 0:
        return number
    return torch.ones((), dtype=torch.float64, device=logits.device) * number


def destination(logits: Tensor, out: Tensor | None, inplace: bool) -> Tensor | None:
    """The memory that a step writes its gradient to; None for new memory."""
    checks.check_flag("inplace", inplace)
    if inplace:
        if out is not None:
            raise ValueError("expected out or inplace=True, got both")
        checks.refuse_inplace("inplace=True", logits)
        return logits.detach()
    if isinstance(out, Tensor):
        checks.refuse_unwritable("out", out)
    return out


def is_separate(out: Tensor, logits: Tensor) -> bool:
    """False for an `out` that the op would take for logits to be written in place, or that requires
    grad."""
    return not out.requires_grad and (out.data_ptr() != logits.data_ptr() or out.numel() == 0)


def traceable(options: Options, logits: Tensor) -> Options:
    """The options as a compiled graph takes them, without another compilation for other numbers."""
    if not torch.compiler.is_compiling():
        if isinstance(options.softcap, Tensor):
            raise ValueError("softcap must be a number")
        return options
    return options._replace(
        label_smoothing=as_tensor(options.label_smoothing, logits),
        z_loss=as_tensor(options.z_loss, logits),
        softcap=as_tensor(options.softcap, logits),
        normalizer=as_tensor(options.normalizer, logits),
    )
