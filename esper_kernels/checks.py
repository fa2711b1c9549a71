"""Checks of arguments: each refusal names what was expected and what came.

The compiled ops check every call themselves (csrc/call.cpp) and write nothing if they refuse it.
Python then runs these checks to find the argument at fault. It runs them before the call for the
other backends, and for arguments of a type that no op can judge (`serve`). `refuse_transforms` and
`refuse_inplace` look at what no op can see, so they come first everywhere.

Long file: one place for every check.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from esper_kernels.backends import select_backend
from esper_kernels.config import DTYPES, REDUCTIONS, TARGET_DTYPES, KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.values import has_memory

NUMBER_DTYPES = (*DTYPES, *TARGET_DTYPES)  # of options that are tensors
NATIVE = ("cpp", "cuda")  # backends whose ops check their arguments
_Result = TypeVar("_Result")
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
# What an op can check by itself. It would convert other types to numbers where it can, True among
# them, and would run once for each tensor that a wrapper holds.
_PLAIN_TYPES = frozenset({NoneType, int, float, str, Tensor, torch.nn.Parameter})


def serve(
    backend: str,
    arguments: Iterable[object],
    run: Callable[[], _Result],
    find_fault: Callable[[], None],
) -> _Result:
    """Call a backend; find_fault raises the error that names what is wrong with the arguments."""
    if (
        backend not in NATIVE
        or torch.compiler.is_compiling()
        or not _PLAIN_TYPES.issuperset(map(type, arguments))
    ):
        find_fault()
        return run()
    try:
        return run()
    except REFUSALS as error:
        refusal = error
    find_fault()
    raise refusal


def choose_backend(op: str, x: object, config: KernelConfig | None, name: str) -> str:
    """The backend that serves `op` on tensors like x."""
    if not isinstance(x, Tensor):
        raise not_dense(name, x)
    return select_backend(op, x.device.type, x.dtype, config).name


def refuse_transforms(op: str, x: object, instead: str = "F.cross_entropy") -> None:
    """NotImplementedError where derivatives or traces of this call would be silently wrong."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        what = "a torch.func transform (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap, ...)"
    elif torch._C._get_tracing_state() is not None:
        what = "torch.jit.trace"
    elif isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x):
        what = "vmap, as by is_grads_batched=True"
    elif forward_ad._current_level >= 0 and _is_dual(x):
        what = "forward-mode differentiation (dual tensors)"
    elif isinstance(x, Tensor) and torch._is_functional_tensor(x):
        what = "functionalization"
    else:
        return
    raise NotImplementedError(f"{op} does not work inside {what}; use torch's {instead} there")


def _is_dual(x: object) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def refuse_inplace(name: str, x: Tensor) -> None:
    """Raise ValueError where torch refuses to write in place."""
    if x.requires_grad and (
        x.is_leaf or (x._is_view() and x._base is not None and x._base.is_leaf)
    ):
        what = "a leaf" if x.is_leaf else "a view of a leaf"
        raise ValueError(f"{name} would overwrite {what} that requires grad; pass a separate out")
    refuse_unwritable(name, x)


def refuse_unwritable(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor that torch does not write to, or whose memory does not hold its
    values."""
    if torch.compiler.is_compiling():
        return
    if x._is_zerotensor():
        raise ValueError(f"{name} would overwrite a tensor of zeros without memory; pass a clone")
    if x.is_neg():
        raise ValueError(
            f"{name} would overwrite a view whose memory holds the negative of its values, such as "
            "the imaginary part of a conjugate; pass a clone of it"
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} would overwrite a tensor made in inference mode; pass a clone of it"
        )


def check_dense(name: str, x: object) -> None:
    if not is_dense(x):
        raise not_dense(name, x)
    check_storage(name, x)


def is_dense(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor whose own memory holds its values, at strides."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and not x.is_nested
        and not x.is_quantized
        and not _is_wrapper(x)
    )


def _is_wrapper(x: Tensor) -> bool:
    """Whether x holds other tensors, as a DTensor does, and no memory of its own."""
    if torch.compiler.is_compiling():
        return type(x).__name__ == "DTensor"
    if isinstance(x, FakeTensor):
        return False
    dispatches = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return dispatches or torch._is_functional_tensor(x)


def not_dense(name: str, x: object, expected: str = "a dense tensor") -> TypeError:
    """The error for an argument that is no dense tensor."""
    return TypeError(f"{name} must be {expected}, got {describe(x)}{_way_out(x)}")


def _way_out(x: object) -> str:
    """A suggestion of what to pass in place of x, where one can be made."""
    if isinstance(x, Tensor):
        if hasattr(x, "to_local"):
            return "; pass its to_local()"
        return "; pass its to_dense()" if x.layout != torch.strided else ""
    if isinstance(x, torch.nn.Module):
        return "; pass one of its tensors, such as layer.weight"
    if isinstance(x, Mapping) or hasattr(x, "logits"):
        return "; pass one of its tensors, such as output.logits"
    if isinstance(x, tuple) and any(isinstance(part, Tensor) for part in x):
        return "; pass one of its tensors, such as output[0]"
    if isinstance(x, (list, tuple, int, float)) or hasattr(x, "__array__"):
        return "; make it a tensor with torch.as_tensor"
    return ""


def check_storage(name: str, x: Tensor) -> None:
    """ValueError for a tensor whose storage was freed or shrunk since, as by
    `untyped_storage().resize_(0)`."""
    if not has_memory(x) or x.numel() == 0:
        return
    needed = x.storage_offset() * x.element_size() + _extent(x)
    if not x._is_zerotensor() and x.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"the storage of {name} holds {x.untyped_storage().nbytes()} bytes, but its shape "
            f"needs {needed}: it was freed or shrunk; allocate it again before the call"
        )


def check_batch(
    logits: Tensor, targets: Tensor, meter: Meter | None, num_classes: int | None = None
) -> None:
    """logits [..., V], targets [...], and a meter on their device. num_classes: where V is not that
    of all classes."""
    for name, x in (("logits", logits), ("targets", targets)):
        check_dense(name, x)
    if meter is not None and not isinstance(meter, Meter):
        raise TypeError(f"meter must be a Meter, got {describe(meter)}")
    if logits.dtype not in DTYPES:
        swapped = targets.dtype in DTYPES and logits.dtype in TARGET_DTYPES
        hint = "; are logits and targets swapped?" if swapped else ""
        raise TypeError(f"logits must be one of {DTYPES}, got {logits.dtype}{hint}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [..., V] with V of at least 1, got shape {tuple(logits.shape)}"
        )
    if targets.is_floating_point() and targets.shape == logits.shape:
        raise TypeError(
            f"soft (probability) targets are not served, got {targets.dtype} targets of the "
            "logits' shape; pass class indices, or use torch.nn.functional.cross_entropy"
        )
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"targets must be class indices, one of {TARGET_DTYPES}, got {targets.dtype}; if they "
            "are class indices, pass targets.long()"
        )
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {tuple(logits.shape[:-1])} for logits of shape "
            f"{tuple(logits.shape)}, whose last dimension is the classes, got "
            f"{tuple(targets.shape)}{_shape_hint(logits, targets)}"
        )
    meter_device = logits.device if meter is None else meter.device
    if not logits.device == targets.device == meter_device:
        raise ValueError(
            f"logits, targets and meter must be on one device, got logits on {logits.device}, "
            f"targets on {targets.device}, meter on {meter_device}"
        )
    if meter is not None:
        check_meter(meter)
        check_per_class(meter, logits.shape[-1] if num_classes is None else num_classes)


def _shape_hint(logits: Tensor, targets: Tensor) -> str:
    """A suggestion of what was probably meant by targets whose shape does not fit."""
    if targets.shape == logits.shape:
        return "; for one-hot targets pass targets.argmax(-1)"
    if logits.dim() > 2 and targets.shape == (logits.shape[0], *logits.shape[2:]):
        return "; for logits with the classes in dimension 1, as torch has them, pass class_dim=1"
    if targets.dim() == logits.dim() and targets.shape == (*logits.shape[:-1], 1):
        return "; pass targets.squeeze(-1)"
    return ""


def check_per_class(meter: Meter, num_classes: int) -> None:
    """Raise ValueError where a meter counts by class, and not as many classes as the logits
    have."""
    per_class = meter.measures.per_class if meter.measures else 0
    if per_class not in (0, num_classes):
        raise ValueError(
            f"expected logits of {per_class} classes for a Meter with per_class={per_class}, got "
            f"{num_classes}; make the Meter with per_class={num_classes}"
        )


def by_either_name(
    name: str, given: Tensor | None, torch_name: str, given_to_torch_name: Tensor | None
) -> Tensor:
    """An argument that may be passed by our name or by torch's; TypeError for none or both."""
    if given is not None and given_to_torch_name is None:
        return given
    if given is None and given_to_torch_name is not None:
        return given_to_torch_name
    got = "neither" if given is None else "both"
    raise TypeError(f"expected {name}, or {torch_name} as torch names it, got {got}")


def check_mixture(
    targets: Tensor, targets2: Tensor | None, share: float | Tensor | None
) -> tuple[Tensor, float | Tensor]:
    """MixUp's second target of each row [...], and the share of the first, in [0, 1]."""
    if targets2 is None or share is None:
        given, missing = ("share", "targets2") if targets2 is None else ("targets2", "share")
        raise TypeError(f"{given} goes with {missing}, which is missing; pass both or neither")
    check_dense("targets2", targets2)
    if targets2.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"targets2 must be class indices, one of {TARGET_DTYPES}, got {targets2.dtype}"
        )
    if targets2.shape != targets.shape or targets2.device != targets.device:
        raise ValueError(
            f"targets2 must be as targets, of shape {tuple(targets.shape)} on {targets.device}, "
            f"got {describe(targets2)}"
        )
    if not isinstance(share, Tensor):
        check_plain_number("share", share, high=1.0)
    else:
        _check_share_tensor(share, targets)
    return targets2, share


def _check_share_tensor(share: Tensor, targets: Tensor) -> None:
    check_dense("share", share)
    if share.dtype not in DTYPES:
        raise TypeError(f"share as a tensor must be one of {DTYPES}, got {share.dtype}")
    if share.dim() > 0 and share.shape != targets.shape:
        raise ValueError(
            f"share as a tensor must be 0-d or have one number per row, of shape "
            f"{tuple(targets.shape)}, got {describe(share)}"
        )
    places = (targets.device, torch.device("cpu")) if share.dim() == 0 else (targets.device,)
    if share.device not in places:
        raise ValueError(
            f"share must be on the logits' device {targets.device}, got {share.device}"
        )
    if share.device.type != "cpu" or isinstance(share, FakeTensor):
        return  # looking at its values would mean waiting for the device
    good = (share >= 0) & (share <= 1)
    if torch.compiler.is_compiling():
        torch._assert_async(good.all(), "a share is outside [0, 1]")
        return
    bad = share[~good]
    if len(bad):
        raise ValueError(f"share must be in [0, 1], got {float(bad[0])}; {len(bad)} such numbers")


def check_meter(meter: Meter) -> None:
    """Raise ValueError where a meter's accumulators were replaced by something that kernels cannot
    write to."""
    expected = {
        "sums": ((meter.num_sums,), torch.float64),
        "counts": ((meter.num_counts,), torch.int64),
        "ticket": ((1,), torch.int32),
    }
    for name, (shape, dtype) in expected.items():
        x = getattr(meter, name)
        if not is_dense(x) or tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(
                f"meter.{name} must be a contiguous {dtype} tensor of shape {shape}, got "
                f"{describe(x)}; make a new Meter"
            )
        check_storage(f"meter.{name}", x)


def check_options(
    logits: Tensor,
    options: Mapping[str, object],
    class_weight: str = "weight",
    num_classes: int | None = None,
) -> None:
    """options: the fields of `reference.Options` by name. class_weight: what the caller calls
    their `weight`. num_classes: None for those of the logits."""
    weight = options["weight"]
    if weight is not None:
        shape = logits.shape[-1:] if num_classes is None else (num_classes,)
        if not is_dense(weight) or weight.dtype not in DTYPES or weight.shape != shape:
            raise ValueError(
                f"{class_weight} must be a floating tensor of shape [{shape[0]}], got "
                f"{describe(weight)}"
            )
        if weight.device != logits.device:
            raise ValueError(
                f"{class_weight} must be on the logits' device {logits.device}, got {weight.device}"
            )
        check_storage(class_weight, weight)
    reduction = options["reduction"]
    normalizer = options["normalizer"]
    softcap = options["softcap"]
    check_reduction(reduction)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer goes with reduction='mean' only, got reduction={reduction!r}")
    check_integer("ignore_index", options["ignore_index"])
    for name, high in (("label_smoothing", 1.0), ("z_loss", torch.inf)):
        if options[name] is None:
            raise TypeError(f"{name} must be an int or a float, got None; 0.0 turns it off")
        check_number(name, options[name], logits, high=high)
    check_number("normalizer", normalizer, logits)
    if softcap is not None:
        check_divisor("softcap (None for no cap)", softcap)


def check_reduction(reduction: object) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_integer(name: str, value: object) -> None:
    """A Python int of at most 64 bits, not a bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")


def check_flag(name: str, value: object) -> None:
    """True or False: of another value, such as "no", it would be guessed which is meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_plain_number(name: str, value: object, low: float = 0.0, high: float = torch.inf) -> None:
    """A Python number in [low, high]: an int or a float (np.float64 is one), not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be an int or a float, got {describe(value)}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number that a float can hold, got {value}")
    if not low <= value <= high:  # NaN too
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_divisor(name: str, value: object) -> None:
    """A softcap or a temperature: a number by which float32 logits can be divided without leaving
    the normal numbers."""
    check_plain_number(name, value, low=-torch.inf)
    assert isinstance(value, (int, float))
    if not 2.0**-100 <= value <= 2.0**100:
        raise ValueError(f"{name} must be in [2**-100, 2**100], got {value}")


def check_number(
    name: str, value: object, logits: Tensor, low: float = 0.0, high: float = torch.inf
) -> None:
    """A number in [low, high], a 0-d tensor, whose value is not looked at, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        check_plain_number(name, value, low, high)
        return
    check_number_tensor(name, value)
    if value.device not in (logits.device, torch.device("cpu")):
        raise ValueError(
            f"{name} as a tensor must be on {logits.device} or the CPU, got {describe(value)}"
        )


def check_number_tensor(name: str, x: object) -> None:
    """A dense [] tensor of a dtype that the kernels can read."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a 0-d tensor, got {describe(x)}")
    if x.dim() != 0:
        raise ValueError(f"{name} as a tensor must be 0-d, got {describe(x)}")
    if x.dtype not in NUMBER_DTYPES:
        raise TypeError(f"{name} must be one of {NUMBER_DTYPES}, got {x.dtype}")
    check_dense(name, x)


def check_out(out: Tensor, logits: Tensor) -> None:
    expected = (logits.shape, logits.dtype, logits.device)
    if (
        not isinstance(out, Tensor)
        or (out.shape, out.dtype, out.device) != expected
        or out.requires_grad
    ):
        raise ValueError(
            f"out must be like the logits ({describe(logits)}) and not require grad, got "
            f"{describe(out)}"
        )
    check_dense("out", out)
    check_writable("out", out)
    if has_memory(out):
        (start, end), (logits_start, logits_end) = _address_range(out), _address_range(logits)
        if start < logits_end and logits_start < end:
            raise ValueError(
                "out overlaps the logits in memory; pass separate memory, or inplace=True"
            )


def check_writable(name: str, x: Tensor) -> None:
    if x.is_contiguous():
        return
    if torch.compiler.is_compiling():  # sizes may be symbols there, which do not sort
        return
    reach = 0  # from the first to the last element, over the dimensions so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach and x.numel() > 0:
            raise ValueError(
                f"{name}: elements share memory (expanded or overlapping), got strides {x.stride()}"
            )
        reach += stride * (size - 1)


def check_apart(written: Tensor, read: Mapping[str, object]) -> None:
    """Raise ValueError where `written` shares memory with a tensor that the kernel still has to
    read."""
    if not has_memory(written):
        return
    start, end = _address_range(written)
    for name, x in read.items():
        if isinstance(x, Tensor):
            first, last = _address_range(x)
            if first < end and start < last:
                raise ValueError(
                    f"{name} is in the memory that the gradient is written to; pass a clone of it"
                )


def _address_range(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + _extent(x)


def _extent(x: Tensor) -> int:
    """Bytes from the first to the last element, gaps included."""
    if x.is_contiguous() or x.numel() == 0:
        return x.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return (last + 1) * x.element_size()


def describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {' '.join(repr(x).split()):.60}"
    if x.is_nested:
        return f"nested {type(x).__name__}"
    layout = "" if x.layout == torch.strided else f" {x.layout}"
    return f"{type(x).__name__} {tuple(x.shape)} {x.dtype}{layout} on {x.device}"
