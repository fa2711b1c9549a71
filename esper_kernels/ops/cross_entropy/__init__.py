"""Cross entropy with metrics: `cross_entropy`, `cross_entropy_step`, `record_loss`.

Each asks `select_backend` for a backend and calls its module; `reference` is the definition,
`checks` has the checks. `cross_entropy` goes through an `autograd.Function`, eagerly and under
`torch.compile` alike; the other two make no autograd node. On the CPU, bad targets raise IndexError
before anything is written (inside a compiled graph it may be a RuntimeError).

Long functions: each public function hands on every option by name.
"""

from typing import Any, Unpack, overload

import torch
from torch import Tensor

from esper_kernels import checks
from esper_kernels.config import DTYPES, KernelConfig, instruction_set_of
from esper_kernels.meter import Meter
from esper_kernels.ops.cross_entropy import cpp, reference, triton
from esper_kernels.ops.cross_entropy.arguments import (
    LossOptions,
    StepOptions,
    as_tensor,
    check_arguments,
    choose,
    classes_last,
    destination,
    is_separate,
    mixture,
    refuse_per_row,
    traceable,
)
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.derivatives import DifferentiableOnce
from esper_kernels.values import has_memory

_MODULES = {"eager": reference, "cpp": cpp, "triton": triton, "cuda": cpp}
_NO_GRADS = (None,) * (3 + len(Options._fields))  # for what _CrossEntropy takes besides the logits


@overload
def cross_entropy(logits: Tensor, targets: Tensor, **options: Unpack[LossOptions]) -> Tensor: ...
@overload
def cross_entropy(*, input: Tensor, target: Tensor, **options: Unpack[LossOptions]) -> Tensor: ...
@overload
def cross_entropy(logits: Tensor, *, target: Tensor, **options: Unpack[LossOptions]) -> Tensor: ...
def cross_entropy(
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    input: Tensor | None = None,
    target: Tensor | None = None,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
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
    input, target: torch's names for logits and targets; each may be passed by either name.
    targets2, share: MixUp. A second target for each row, as `targets`, and the share of the first:
        a number in [0, 1], or a floating tensor [] or [...]. The loss is share * that of targets +
        (1 - share) * that of targets2, where an ignored target has a share of 0, and a row is
        ignored if both are. "mean" divides by the sum of share * weight[target] over both. `meter`
        counts a row by the target with the larger share, by the first of equals. Shares outside of
        [0, 1] raise ValueError on the CPU; elsewhere the loss is NaN.
    weight: [V] floating, the class weights. label_smoothing in [0, 1] and z_loss >= 0: numbers or
        0-d tensors. None of these gets a gradient. A number is an int or a float, not a bool.
    softcap: None, or a number in [2**-100, 2**100].
    reduction: "mean" divides the sum over valid rows by `normalizer`, by default the sum of their
        weights; if that is 0, the loss is NaN and the gradient 0. "sum", or "none": one loss per
        row, 0 if ignored.
    normalizer: a number >= 0 or a 0-d tensor, on the logits' device or the CPU; with "mean" only.
    class_dim: where V is. torch has it second: for logits [N, V, ...] and targets [N, ...] pass 1.
        `cpp` reads and writes any strides; other backends copy the logits unless their classes are
        next to each other in memory.
    meter: a `Meter` on the logits' device, or None. config: a `KernelConfig`; None chooses.

    Returns a fresh tensor, [] or for "none" [...], float32 (float64 for float64 logits),
    differentiable once. Raises TypeError or ValueError, naming the argument, before anything is
    written; NotImplementedError inside torch.func transforms, torch.jit.trace and forward-mode
    differentiation.
    """
    if logits is None or targets is None or input is not None or target is not None:
        logits = checks.by_either_name("logits", logits, "input", input)
        targets = checks.by_either_name("targets", targets, "target", target)
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set_of(config),
    )
    checks.refuse_transforms("cross_entropy", logits)
    logits = classes_last(logits, class_dim)
    backend = choose(logits, targets, meter, config)
    if targets2 is not None or share is not None:
        check_arguments(backend, logits, targets, meter, options)
        targets, options = mixture(logits, targets, targets2, share, options)

    def run() -> Tensor:
        run_options = traceable(options, logits)
        if logits.requires_grad and torch.is_grad_enabled():
            loss: Tensor = _CrossEntropy.apply(logits, targets, meter, backend, *run_options)
            return loss
        return _MODULES[backend].forward(logits, targets, run_options, meter, False)[0]

    def find_fault() -> None:
        check_arguments(backend, logits, targets, meter, options)

    return checks.serve(backend, (logits, targets, *options), run, find_fault)


@overload
def cross_entropy_step(
    logits: Tensor, targets: Tensor, meter: Meter | None = None, **options: Unpack[StepOptions]
) -> Tensor: ...
@overload
def cross_entropy_step(
    *, input: Tensor, target: Tensor, meter: Meter | None = None, **options: Unpack[StepOptions]
) -> Tensor: ...
@overload
def cross_entropy_step(
    logits: Tensor, *, target: Tensor, meter: Meter | None = None, **options: Unpack[StepOptions]
) -> Tensor: ...
def cross_entropy_step(
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    meter: Meter | None = None,
    *,
    input: Tensor | None = None,
    target: Tensor | None = None,
    targets2: Tensor | None = None,
    share: float | Tensor | None = None,
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
    logits' dtype and device, any strides, no overlap with the logits; is returned. inplace: write
    over the logits. Autograd then raises if another op needs their values.

    Returns the gradient [..., V] in the logits' dtype.
    """
    if logits is None or targets is None or input is not None or target is not None:
        logits = checks.by_either_name("logits", logits, "input", input)
        targets = checks.by_either_name("targets", targets, "target", target)
    options = Options(
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        reduction,
        normalizer,
        instruction_set_of(config),
    )
    checks.refuse_transforms("cross_entropy_step", logits)
    compiling = torch.compiler.is_compiling()
    given_out = out
    logits = classes_last(logits, class_dim)
    if class_dim != -1 and out is not None:
        out = classes_last(out, class_dim)
    backend = choose(logits, targets, meter, config)
    refuse_per_row(reduction)
    if targets2 is not None or share is not None:
        check_arguments(backend, logits, targets, meter, options)
        targets, options = mixture(logits, targets, targets2, share, options)
    written = destination(logits, out, inplace)

    def run() -> Tensor:
        if out is not None and has_memory(logits) and not is_separate(out, logits):
            raise ValueError("out must be separate memory that does not require grad")
        run_options = traceable(options, logits)
        scale = as_tensor(grad_scale, logits) if compiling else grad_scale
        values = logits.detach() if logits.requires_grad else logits
        return _MODULES[backend].step(values, targets, run_options, meter, scale, written)

    def find_fault() -> None:
        check_arguments(backend, logits, targets, meter, options)
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
    options = Options(ignore_index=ignore_index)
    checks.refuse_transforms("record_loss", logits)
    if meter is None:
        raise TypeError("meter must be a Meter, got None")
    backend = choose(logits, targets, meter, None)
    check_arguments(backend, logits, targets, meter, options)
    if not checks.is_dense(loss) or loss.dtype not in DTYPES or loss.dim() != 0:
        raise TypeError(
            "loss must be a 0-d floating tensor, the mean over the batch, got "
            f"{checks.describe(loss)}"
        )
    checks.check_storage("loss", loss)
    if loss.device != logits.device:
        raise ValueError(f"loss must be on the logits' device {logits.device}, got {loss.device}")
    _MODULES[backend].record(loss.detach(), logits.detach(), targets, meter, options)


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
            grad = DifferentiableOnce.apply("cross_entropy", grad, logits, grad_output)
        return grad, *_NO_GRADS
