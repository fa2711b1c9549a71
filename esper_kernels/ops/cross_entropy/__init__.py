"""Cross entropy with metrics: `cross_entropy`, `cross_entropy_step`, `record_loss`.

Each asks `select_backend` for a backend and calls its module; `reference` is the definition,
`checks` has the checks. `cross_entropy` goes through an `autograd.Function`, eagerly and under
`torch.compile` alike; the other two make no autograd node. On the CPU, bad targets raise IndexError
before anything is written (inside a compiled graph it may be a RuntimeError).

Long functions: each public function hands on every option by name.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import DTYPES, KernelConfig
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import cpp, reference, triton
from esper_kernels.ops.cross_entropy.reference import Number, Options
from esper_kernels.values import has_memory

_MODULES = {"eager": reference, "cpp": cpp, "triton": triton, "cuda": cpp}
_MaybeNumber = TypeVar("_MaybeNumber", Number, Number | None)
_NO_GRADS = (None,) * (3 + len(Options._fields))  # for what _CrossEntropy takes besides the logits


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
    class_dim: int = -1,
    meter: Meter | None = None,
    config: KernelConfig | None = None,
) -> Tensor:
    """`F.cross_entropy` for classes in the last dimension, with its metrics added to `meter`.

    With x = softcap * tanh(logits / softcap), e = label_smoothing and lse = logsumexp(x), a row's
    loss is weight[t] (1-e) (lse - x[t]) + (e/V) sum_c weight[c] (lse - x[c]) + z_loss lse^2.

    logits: [..., V] float32, bfloat16, float16 (arithmetic in float32) or float64 (in float64, for
    checks).
    targets: [...] int64, int32 or uint8: ignore_index (no loss, zero gradient) or in [0, V). Others
        raise IndexError on the CPU; elsewhere they get zero gradient, and `meter` counts them or
        the loss is NaN.
    weight: [V] floating, the class weights. label_smoothing in [0, 1] and z_loss >= 0: numbers or
        0-d tensors. None of these gets a gradient. A number is an int or a float, not a bool.
    softcap: None, or a number in [2**-100, 2**100].
    reduction: "mean" divides the sum over valid rows by `normalizer`, by default the sum of their
        weights; if that is 0, the loss is NaN and the gradient 0. "sum", or "none": one loss per
        row, 0 if ignored.
    normalizer: a number >= 0 or a 0-d tensor, on the logits' device or the CPU; with "mean" only.
    class_dim: where V is. torch has it second: for logits [N, V, ...] and targets [N, ...] pass 1.
        Any other than the last dimension costs a copy of the logits.

    Returns a fresh tensor, [] or for "none" [...], float32 (float64 for float64 logits),
    differentiable once. Raises TypeError or ValueError, naming the argument, before anything is
    written; NotImplementedError inside torch.func transforms, torch.jit.trace and forward-mode
    differentiation.
    """
    instruction_set = getattr(config, "instruction_set", "auto")  # of None too
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set,
    )
    checks.refuse_transforms("cross_entropy", logits)
    logits = _classes_last(logits, class_dim)
    backend = _choose(logits, targets, meter, config)

    def run() -> Tensor:
        run_options = _traceable(options, logits)
        if logits.requires_grad and torch.is_grad_enabled():
            loss: Tensor = _CrossEntropy.apply(logits, targets, meter, backend, *run_options)
            return loss
        return _MODULES[backend].forward(logits, targets, run_options, meter, False)[0]

    def find_fault() -> None:
        _find_fault(backend, logits, targets, meter, options)

    return checks.serve(backend, (logits, targets, *options), run, find_fault)


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
    class_dim: int = -1,
    grad_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    inplace: bool = False,
    config: KernelConfig | None = None,
) -> Tensor:
    """The gradient of `cross_entropy` for `logits.backward(grad)`, without a loss tensor or
    autograd node.

    Arguments as for `cross_entropy`, with reduction "mean" or "sum", and grad_scale: a number or a
    0-d tensor (a loss scaler's), multiplied in before the gradient is rounded. out: [..., V] of the
    logits' dtype and device, class stride 1, no overlap with the logits; is returned. inplace:
    write over the logits. Autograd then raises if another op needs their values.

    Returns the gradient [..., V] in the logits' dtype.
    """
    instruction_set = getattr(config, "instruction_set", "auto")  # of None too
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set,
    )
    checks.refuse_transforms("cross_entropy_step", logits)
    compiling = torch.compiler.is_compiling()
    given_out = out
    logits = _classes_last(logits, class_dim)
    if class_dim != -1 and out is not None:
        out = _classes_last(out, class_dim)
    backend = _choose(logits, targets, meter, config)
    if reduction == "none":
        raise ValueError(
            "cross_entropy_step takes reduction 'mean' or 'sum'; for 'none' use cross_entropy"
        )
    written = _destination(logits, out, inplace)

    def run() -> Tensor:
        if out is not None and has_memory(logits) and not _is_separate(out, logits):
            raise ValueError("out must be separate memory that does not require grad")
        run_options = _traceable(options, logits)
        scale = _as_tensor(grad_scale, logits) if compiling else grad_scale
        values = logits.detach() if logits.requires_grad else logits
        return _MODULES[backend].step(values, targets, run_options, meter, scale, written)

    def find_fault() -> None:
        _find_fault(backend, logits, targets, meter, options)
        checks.check_number("grad_scale", grad_scale, logits, low=-torch.inf)
        if inplace:
            checks.check_writable("logits with inplace=True", logits)
        elif out is not None:
            checks.check_out(out, logits)
        if written is not None:
            read = {**options._asdict(), "targets": targets, "grad_scale": grad_scale}
            checks.check_apart(written, read)

    arguments = (logits, targets, *options, grad_scale, out)
    grad = checks.serve(backend, arguments, run, find_fault)
    if written is not None and not compiling:
        torch.autograd.graph.increment_version(written)
    if class_dim == -1:
        return grad
    return grad.movedim(-1, class_dim) if given_out is None else given_out


def record_loss(
    loss: Tensor, logits: Tensor, targets: Tensor, meter: Meter, *, ignore_index: int = -100
) -> None:
    """Add to `meter` a batch whose loss was computed by other code.

    loss: [] floating, the mean over the valid rows; loss * valid rows enters the sums, with weight
    1 a row. logits [..., V] and targets [...] as for `cross_entropy`; they give the counts, by the
    same rules.
    """
    options = Options(None, ignore_index, 0.0, 0.0, None, "mean", None)
    checks.refuse_transforms("record_loss", logits)
    if meter is None:
        raise TypeError("meter must be a Meter, got None")
    backend = _choose(logits, targets, meter, None)
    _find_fault(backend, logits, targets, meter, options)
    if not checks.is_dense(loss) or loss.dtype not in DTYPES or loss.dim() != 0:
        raise TypeError(
            "loss must be a 0-d floating tensor, the mean over the batch, got "
            f"{checks.describe(loss)}"
        )
    checks.check_storage("loss", loss)
    if loss.device != logits.device:
        raise ValueError(f"loss must be on the logits' device {logits.device}, got {loss.device}")
    _MODULES[backend].record(loss.detach(), logits.detach(), targets, meter, options)


def _classes_last(x: Tensor, class_dim: int) -> Tensor:
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


def _choose(
    logits: Tensor, targets: Tensor, meter: Meter | None, config: KernelConfig | None
) -> str:
    try:
        return checks.choose_backend("cross_entropy", logits, config, "logits")
    except ValueError:
        checks.check_batch(logits, targets, meter)  # it may be the device of one of them
        raise


def _find_fault(
    backend: str, logits: Tensor, targets: Tensor, meter: Meter | None, options: Options
) -> None:
    """Raise the error that names what is wrong with the arguments, if anything is."""
    checks.check_batch(logits, targets, meter)
    checks.check_options(logits, options._asdict())
    if backend in checks.NATIVE and torch.compiler.is_compiling():
        return  # the op looks at the targets itself when the graph runs
    reference.refuse_bad_targets(targets, logits.shape[-1], options.ignore_index)


def _as_tensor(number: _MaybeNumber, logits: Tensor) -> _MaybeNumber:
    """Inside a compiled graph a number as a tensor, so that another value does not recompile.

    A product, because that is what compilers keep a changing number in.
    """
    if number is None or isinstance(number, Tensor) or number == 0:
        return number
    return torch.ones((), dtype=torch.float64, device=logits.device) * number


def _destination(logits: Tensor, out: Tensor | None, inplace: bool) -> Tensor | None:
    """What a step writes its gradient to; None for fresh memory."""
    if inplace:
        if out is not None:
            raise ValueError("expected out or inplace=True, got both")
        checks.refuse_inplace("inplace=True", logits)
        return logits.detach()
    if isinstance(out, Tensor):
        checks.refuse_inference("out", out)
    return out


def _is_separate(out: Tensor, logits: Tensor) -> bool:
    """False for an `out` that the op would take for logits to be written in place, or that requires
    grad."""
    return not out.requires_grad and (out.data_ptr() != logits.data_ptr() or out.numel() == 0)


def _traceable(options: Options, logits: Tensor) -> Options:
    if not torch.compiler.is_compiling():
        if isinstance(options.softcap, Tensor):
            raise ValueError("softcap must be a number")
        return options
    return options._replace(
        label_smoothing=_as_tensor(options.label_smoothing, logits),
        z_loss=_as_tensor(options.z_loss, logits),
        softcap=_as_tensor(options.softcap, logits),
        normalizer=_as_tensor(options.normalizer, logits),
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, meter: Meter | None, backend: str, *options: Any
    ) -> Tensor:
        loss, *saved = _MODULES[backend].forward(logits, targets, Options(*options), meter, True)
        # Tensors go through save_for_backward, which notices a later change of their values.
        ctx.places = [i for i, x in enumerate(options) if isinstance(x, Tensor)]
        ctx.options = (
            [None if isinstance(x, Tensor) else x for x in options] if ctx.places else options
        )
        ctx.save_for_backward(logits, targets, *saved, *[options[i] for i in ctx.places])
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_transforms("the gradient of cross_entropy", grad_output)
        tensors = ctx.saved_tensors
        first_option = len(tensors) - len(ctx.places)
        logits, targets, *saved = tensors[:first_option]
        options = list(ctx.options)
        for place, value in zip(ctx.places, tensors[first_option:], strict=True):
            options[place] = value

        def run() -> Tensor:
            backward = _MODULES[ctx.backend].backward
            with torch.no_grad():
                return backward(grad_output, logits, targets, *saved, Options(*options))

        def find_fault() -> None:
            if torch.compiler.is_compiling():
                return
            given = {"grad_output": grad_output, "logits": logits, "targets": targets}
            for name, x in {**given, **Options(*options)._asdict()}.items():
                if isinstance(x, Tensor):
                    checks.check_dense(name, x)

        grad = checks.serve(ctx.backend, (grad_output,), run, find_fault)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grad = _DifferentiableOnce.apply(grad, logits, grad_output)
        return grad, *_NO_GRADS


class _DifferentiableOnce(torch.autograd.Function):
    """Ties the gradient to what it depends on, so that a second derivative raises instead of being
    left out.

    torch's own `once_differentiable` does this only where grad_output requires grad.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            "cross_entropy is differentiable once; for second derivatives use torch's own op"
        )
