"""Cross entropy with metrics: `cross_entropy`, `cross_entropy_step`, `record_loss`.

Each checks its arguments, asks `select_backend`, and calls that backend's module; `reference` is the
definition. `cross_entropy` goes through an `autograd.Function`, eagerly and under `torch.compile` alike; the
other two make no autograd node. Bad targets on the CPU raise before anything is written: IndexError, or
RuntimeError in a compiled graph.
"""

from typing import Any

import torch
from torch import Tensor

from esper_kernels.backends import DTYPES, direct, select_backend
from esper_kernels.config import KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.native import Road
from esper_kernels.ops.cross_entropy import cpp, reference, triton
from esper_kernels.ops.cross_entropy.reference import Options

_MODULES = {"eager": reference, "cpp": cpp, "triton": triton, "cuda": cpp}
_NO_GRADS = (None,) * (3 + len(Options._fields))  # for what _CrossEntropy takes besides the logits
_TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)


def cross_entropy(
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
    meter: Meter | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """Cross entropy over the last dimension, as `F.cross_entropy`, with its metrics added to `meter`.

    With x = softcap * tanh(logits / softcap), e = label_smoothing and lse = logsumexp(x), a row's loss is
    weight[t] (1-e) (lse - x[t]) + (e/V) sum_c weight[c] (lse - x[c]) + z_loss lse^2.

    logits: [..., V] float32, bfloat16, float16 (arithmetic in float32) or float64 (in float64, for checks).
    targets: [...] int64, int32 or uint8: ignore_index (no loss, zero gradient) or in [0, V). Others raise
        IndexError on the CPU; elsewhere they get zero gradient, and `meter` counts them or the loss is NaN.
    weight: [V] floating, the class weights. label_smoothing in [0, 1] and z_loss >= 0: numbers, or 0-d
        tensors so that a schedule does not recompile. None of these gets a gradient.
    reduction: "mean" divides the sum over valid rows by `normalizer`, by default the sum of their weights;
        where that is 0 the loss is NaN and the gradient 0. "sum", or "none": a loss a row, 0 where ignored.
    normalizer: a number >= 0 or a 0-d tensor, on the logits' device or the CPU; with "mean" only.

    Returns a fresh tensor, [] or for "none" [...], float32 (float64 for float64 logits), differentiable once.
    Raises TypeError or ValueError, naming the argument, before anything is written.
    """
    instruction_set = "auto" if config is None else config.instruction_set
    options = Options(weight, ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer, instruction_set)
    loss: Tensor | None
    if type(logits) is Tensor and logits.is_cpu and (road := direct(config)) is not None:
        loss = _loss(road, logits, targets, options, meter)
        if loss is not None:
            return loss
    _check(logits, targets, meter, options)
    loss = _loss(_choose(logits, targets, options, config), logits, targets, options, meter)
    return loss


def cross_entropy_step(
    logits: Tensor,
    targets: Tensor,
    meter: Meter | None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    inplace: bool = False,
    config: KernelConfig | None = None,
) -> Tensor:
    """The gradient of `cross_entropy` for `logits.backward(grad)`, without a loss tensor or autograd node.

    Arguments as for `cross_entropy`, with reduction "mean" or "sum", and
    grad_scale: a number or a 0-d tensor (a loss scaler's), multiplied in before the gradient is rounded.
    out: [..., V] of the logits' dtype and device, class stride 1, no overlap with the logits; is returned.
    inplace: write over the logits. Autograd then raises where another op needs their values.

    Returns the gradient [..., V] in the logits' dtype.
    """
    instruction_set = "auto" if config is None else config.instruction_set
    options = Options(weight, ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer, instruction_set)
    if type(logits) is Tensor and logits.is_cpu and (road := direct(config)) is not None:
        grad = cpp.direct_step(road, logits, targets, options, meter, grad_scale, out, inplace)
        if grad is not None:
            return grad
    _check(logits, targets, meter, options)
    if reduction == "none":
        raise ValueError("cross_entropy_step takes reduction 'mean' or 'sum'; for 'none' use cross_entropy")
    _check_number("grad_scale", grad_scale, logits, low=-torch.inf)
    if inplace:
        if out is not None:
            raise ValueError("expected out or inplace=True, got both")
        if logits.requires_grad and logits.is_leaf:
            raise ValueError("inplace=True would overwrite a leaf that requires grad; pass out, or neither")
        _check_writable("logits with inplace=True", logits)
    elif out is not None:
        _check_out(out, logits)
    backend = _choose(logits, targets, options, config)
    written = logits.detach() if inplace else out
    scale = 1.0 if grad_scale is None else grad_scale
    grad = _MODULES[backend].step(logits.detach(), targets, options, meter, scale, written)
    if written is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(written)
    return grad


def record_loss(loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, *, ignore_index: int = -100) -> None:
    """Add to `meter` a batch whose loss was computed by other code.

    loss: [] floating, the mean over the valid rows; loss * valid rows enters the sums, with weight 1 a row.
    logits [..., V] and targets [...] as for `cross_entropy`; they give the counts, by the same rules.
    """
    options = Options(None, ignore_index, 0.0, 0.0, None, "mean", None)
    _check(logits, targets, meter, options)
    if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.dim() != 0:
        raise TypeError(f"loss must be a 0-d floating tensor, the mean over the batch, got {_describe(loss)}")
    if loss.device != logits.device:
        raise ValueError(f"loss must be on the logits' device {logits.device}, got {loss.device}")
    backend = _choose(logits, targets, options, None)
    _MODULES[backend].record(loss.detach(), logits.detach(), targets, meter, options)


def _loss(backend: str | Road, logits: Tensor, targets: Tensor, options: Options, meter: Meter | None) -> Any:
    """None where the backend is the direct road and does not serve, as for `_forward` and `_CrossEntropy`."""
    if logits.requires_grad and torch.is_grad_enabled():
        return _CrossEntropy.apply(logits, targets, meter, backend, *options)
    result = _forward(backend, logits, targets, options, meter, keep=False)
    return result and result[0]


def _forward(
    backend: str | Road, logits: Tensor, targets: Tensor, options: Options, meter: Meter | None, keep: bool
) -> tuple[Tensor, ...] | None:
    if isinstance(backend, str):
        return _MODULES[backend].forward(logits, targets, options, meter, keep)
    return cpp.direct_forward(backend, logits, targets, options, meter, keep)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, meter: Meter | None, backend: str | Road, *options: Any
    ) -> Tensor | None:
        result = _forward(backend, logits, targets, Options(*options), meter, keep=True)
        if result is None:
            return None
        loss, *state = result
        # Tensors go through save_for_backward, which notices a later change of their values.
        ctx.places = [i for i, x in enumerate(options) if isinstance(x, Tensor)]
        ctx.options = [None if isinstance(x, Tensor) else x for x in options] if ctx.places else options
        ctx.save_for_backward(logits, targets, *state, *[options[i] for i in ctx.places])
        ctx.backend = backend if isinstance(backend, str) else "cpp"
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        of_options = len(saved) - len(ctx.places)  # where they begin
        logits, targets, *state = saved[:of_options]
        options = list(ctx.options)
        for place, value in zip(ctx.places, saved[of_options:], strict=True):
            options[place] = value  # no `state.pop()`: torch.compile of 2.11 has a tuple there
        backward = _MODULES[ctx.backend].backward
        if not torch.is_grad_enabled():
            grad = backward(grad_output, logits, targets, *state, Options(*options))
        else:  # create_graph=True, or traced
            with torch.no_grad():
                grad = backward(grad_output, logits, targets, *state, Options(*options))
            if not torch.compiler.is_compiling():
                grad = _DifferentiableOnce.apply(grad, logits, grad_output)
        return grad, *_NO_GRADS


class _DifferentiableOnce(torch.autograd.Function):
    """Ties the gradient to what it depends on, so that a second derivative raises instead of being left out.

    torch's own `once_differentiable` does this only where grad_output requires grad.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError("cross_entropy is differentiable once; for second derivatives use torch's own op")


def _choose(logits: Tensor, targets: Tensor, options: Options, config: KernelConfig | None) -> str:
    """The backend, once the targets are known to be good."""
    backend = select_backend("cross_entropy", logits.device.type, logits.dtype, config).name
    if backend != "cpp":  # which looks at the targets itself, before anything is written
        reference.refuse_bad_targets(targets, logits.shape[-1], options.ignore_index)
    return backend


def _check(logits: Tensor, targets: Tensor, meter: Meter | None, options: Options) -> None:
    for name, x in (("logits", logits), ("targets", targets)):
        if not isinstance(x, Tensor) or x.layout != torch.strided or type(x).__name__ == "DTensor":
            raise TypeError(f"{name} must be a dense tensor (of a DTensor to_local()), got {_describe(x)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be one of {DTYPES}, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V of at least 1, got shape {tuple(logits.shape)}")
    if targets.is_floating_point() and targets.shape == logits.shape:
        raise TypeError(
            f"soft (probability) targets are not served, got {targets.dtype} targets of the logits' shape; "
            "pass class indices, or use torch.nn.functional.cross_entropy"
        )
    if targets.dtype not in _TARGET_DTYPES:
        raise TypeError(f"targets must be class indices, one of {_TARGET_DTYPES}, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {tuple(logits.shape[:-1])} for logits of shape {tuple(logits.shape)} "
            f"(classes last), got {tuple(targets.shape)}"
        )
    meter_device = logits.device if meter is None else meter.device
    if not logits.device == targets.device == meter_device:
        raise ValueError(
            "logits, targets and meter must be on one device, got "
            f"logits on {logits.device}, targets on {targets.device}, meter on {meter_device}"
        )
    weight = options.weight
    if weight is not None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != logits.shape[-1:]:
            raise ValueError(f"weight must be a floating tensor of shape [{logits.shape[-1]}], got {_describe(weight)}")
        if weight.device != logits.device:
            raise ValueError(f"weight must be on the logits' device {logits.device}, got {weight.device}")
    if options.reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {options.reduction!r}")
    if options.normalizer is not None and options.reduction != "mean":
        raise ValueError(f"normalizer goes with reduction='mean' only, got reduction={options.reduction!r}")
    if not isinstance(options.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {options.ignore_index!r}")
    _check_number("normalizer", options.normalizer, logits)
    _check_number("label_smoothing", options.label_smoothing, logits, high=1.0)
    _check_number("z_loss", options.z_loss, logits)
    if isinstance(options.softcap, Tensor) or options.softcap == 0:
        raise ValueError(f"softcap must be None or a number above 0, got {options.softcap!r}")
    _check_number("softcap", options.softcap, logits, high=torch.finfo(torch.float32).max)


def _check_number(
    name: str, value: float | Tensor | None, logits: Tensor, low: float = 0.0, high: float = torch.inf
) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.device not in (logits.device, torch.device("cpu")):
            raise ValueError(
                f"{name} as a tensor must be 0-d and on {logits.device} or the CPU, got {_describe(value)}"
            )
    elif value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {_describe(value)}")
    elif value is not None and not low <= value <= high:  # NaN too
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _check_out(out: Tensor, logits: Tensor) -> None:
    expected = (logits.shape, logits.dtype, logits.device)
    if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != expected or out.requires_grad:
        raise ValueError(
            f"out must be like the logits ({_describe(logits)}) and not require grad, got {_describe(out)}"
        )
    _check_writable("out", out)
    if not torch.compiler.is_compiling() and out.device.type != "meta":  # there tensors have no address
        (start, end), (logits_start, logits_end) = _address_range(out), _address_range(logits)
        if start < logits_end and logits_start < end:
            raise ValueError("out overlaps the logits in memory; pass separate memory, or inplace=True")


def _check_writable(name: str, x: Tensor) -> None:
    if x.is_contiguous():
        return
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: the class dimension must have stride 1, got strides {x.stride()}")
    if torch.compiler.is_compiling():  # sizes may be symbols there, which do not sort
        return
    reach = 0  # from the first to the last element, over the dimensions so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach and x.numel() > 0:
            raise ValueError(f"{name}: elements share memory (expanded or overlapping), got strides {x.stride()}")
        reach += stride * (size - 1)


def _address_range(x: Tensor) -> tuple[int, int]:
    if x.is_contiguous():
        return x.data_ptr(), x.data_ptr() + x.nbytes
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1 if x.numel() else 0) * x.element_size()


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r:.60}"
    return f"{type(x).__name__} {tuple(x.shape)} {x.dtype} {x.layout} on {x.device}"
