"""What happens to one batch: forward, loss, counts and the gradient. `loop` calls it; nothing here
loops.

Only the model's forward (and with it its backward) is compiled; loss and metrics are
`esper_kernels` ops on its output, outside the compiled region. There is one step object a task
type, made by the run, so nothing about compilation is decided at import or shared between runs. A
model that changes its program says so by another value of `structure`; each structure is compiled
once for training and once for each way of measuring.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import get_gradient_edge

from esper_kernels import Meter, cross_entropy, cross_entropy_step, record_loss, select_backend
from esper_train.base.names import require_known, unknown_name
from esper_train.train.amp import LossScaler
from esper_train.train.capture import Capture
from esper_train.train.config import TrainConfig
from esper_train.train.learner import Learner
from esper_train.train.memory import GradientMemory

Criterion = Callable[[Tensor, Tensor], Tensor]
Span = Callable[[str], AbstractContextManager[Any]]
Scope = Callable[[], AbstractContextManager[None]]
Divisor = Callable[[int], float | Tensor]
"""From the number of classes to what the loss of each batch of an optimizer step is divided by."""
LOGITS_DIMS: Mapping[str, tuple[int, str]] = {
    "classification": (2, "[N, V]"),
    "lm": (3, "[N, T, V]"),
}
"""Task type to the rank and shape of its logits."""
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
IGNORED = -100
"""The `ignore_index` of the fused op, unless its options say another."""


def criterion_options(criterion: Criterion | None) -> dict[str, Any] | None:
    """The options of the fused op that do what the criterion does; None where it cannot.

    Only an `nn.CrossEntropyLoss` itself is read: a subclass, hooks or a replaced `forward` may
    compute something else.
    """
    if criterion is None:
        return {}
    if type(criterion) is not nn.CrossEntropyLoss or _is_customised(criterion):
        return None
    if criterion.reduction == "none":
        raise ValueError(
            "expected a criterion with reduction 'mean' or 'sum', got 'none': a step needs one loss"
        )
    return {
        name: getattr(criterion, name)
        for name in ("weight", "ignore_index", "label_smoothing", "reduction")
    }


def _is_customised(module: nn.Module) -> bool:
    """Whether calling the module does more than the `forward` of its class."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" in vars(module) or any(hooks)


class TrainStep:
    """Forward and loss of a batch, with or without backward. Made by `build_train_step`, owned by
    one run.

    Without a `criterion`, loss, counts and the logits' gradient are one fused op and no loss tensor
    exists.
    """

    def __init__(
        self,
        task_type: str,
        config: TrainConfig,
        criterion: Criterion | None,
        options: Mapping[str, Any],
        asked_criterion: Criterion | None = None,
    ) -> None:
        self._task_type = task_type
        self._config = config
        self._criterion = criterion
        self._asked_criterion = asked_criterion
        self._options = options
        self._autocast = getattr(torch, config.amp.dtype) if config.amp.dtype else None
        self._memory = GradientMemory()
        # compiled, by use, of one structure of the model
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._proven: set[Hashable] = set()  # uses whose forward and backward were compiled
        self._structure: Hashable = None
        self._logits_dtype: torch.dtype | None = None
        self.scaler = LossScaler(config.amp) if config.amp.dtype == "float16" else None
        self.span: Span = _no_span
        """Entered around each part of the work, by its name; a profiler puts its own here."""
        self.capture: Capture | None = None
        """The graphs of whole steps, where the config asks for them; the loop makes it for a run
        that did not."""
        self.compile_failure: str | None = None
        """Why the step runs uncompiled although the config asked for it."""
        if config.compile.enabled:
            _require_compiler(config.compile.backend)
            self._compile()  # a mode that torch does not know raises here

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meter: Meter,
        divisor: Divisor | None = None,
        learners: Sequence[Learner] = (),
    ) -> None:
        """Forward and backward: the parameters receive their gradients, the meter the batch.

        `divisor` is what `divisor` gave for the batches of this optimizer step. Each of the
        `learners` then makes a pass of its own over the batch.
        """
        batch = model, inputs, targets, meter, divisor, learners
        structure = getattr(model, "structure", None)
        use = (id(model), structure, inputs.shape)
        on_trial = self.compiled and self._config.compile.on_failure == "eager"
        if not on_trial or use in self._proven:
            self._forward_and_backward(*batch)
            return
        # The backward pass has a compiler of its own, which may fail after the batch was counted.
        before = _Before(model, meter)
        try:
            self._forward_and_backward(*batch)
            self._proven.add(use)
        except Exception as error:  # compilers fail in many ways; what eager fails at is raised
            if not self.compiled:
                raise  # it was the eager forward that failed
            before.restore()
            self._give_up_compiling(error)
            try:
                self._forward_and_backward(*batch)
            except Exception:
                self.compile_failure = None
                raise

    def _forward_and_backward(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meter: Meter,
        divisor: Divisor | None,
        learners: Sequence[Learner],
    ) -> None:
        forward: Callable[..., Any] = model.forward_feeding if learners else model  # type: ignore[assignment]
        network = partial(self._run, model, forward, inputs, {})
        entered = self._learn(network, targets, meter, divisor, self.scaler, None, bool(learners))
        for learner in learners:
            start = learner.start
            arguments = {"alpha": {start: 1.0}, "start": start}
            own = partial(self._run, model, model, entered[start], arguments)
            with self.span("learners"), learner.scope():
                self._learn(own, targets, None, divisor, learner.scaler, learner.parameters)

    def _learn(
        self,
        forward: Callable[[], Any],
        targets: Tensor,
        meter: Meter | None,
        divisor: Divisor | None,
        scaler: LossScaler | None,
        parameters: Sequence[Tensor] | None,
        feeds: bool = False,
    ) -> Mapping[str, Tensor]:
        """Forward, loss and backward; only `parameters` receive gradients, where given. Where
        `forward` is `forward_feeding`, `feeds`, returns what that kept for learners."""
        entered: Mapping[str, Tensor] = {}
        with self.span("forward"):
            logits = forward()
            if feeds:
                logits, entered = logits
            self._check(logits)
        if not logits.requires_grad:
            raise ValueError(
                "expected logits that depend on parameters with requires_grad=True, got logits "
                "that need no gradient; unfreeze a parameter, or leave torch.no_grad()"
            )
        targets = self._within(targets, logits.shape[-1], meter)
        divide_by = None if divisor is None else divisor(logits.shape[-1])
        scale = None if scaler is None else scaler.scale
        if self._criterion is None:
            with self.span("loss"):
                root = get_gradient_edge(logits)
                values = logits.detach()
                del logits  # whoever still holds this memory now is not this step
                destination = self._memory.destination(values)
                grad = cross_entropy_step(
                    values,
                    targets,
                    meter,
                    normalizer=divide_by,
                    grad_scale=scale,
                    out=destination.out,
                    inplace=destination.inplace,
                    config=self._config.kernel,
                    **self._options,
                )
            with self.span("backward"):
                torch.autograd.backward(root, grad, inputs=parameters)
        else:
            with self.span("loss"):
                loss = self._criterion(logits, targets)
                if meter is not None:
                    record_loss(loss.detach(), logits.detach(), targets, meter)
                for factor in (scale, None if divide_by is None else 1 / divide_by):
                    loss = loss if factor is None else loss * factor
            with self.span("backward"):
                loss.backward(inputs=parameters)
        return entered

    def divisor(self, targets: Sequence[Tensor]) -> Divisor | None:
        """A common divisor of the losses of these batches, so that their gradients add up to the
        gradient of one large batch.

        Called with the number of classes, it gives the weight of all valid rows, on their device:
        rows that are not ignored and whose target is a class. For a criterion other than cross
        entropy it gives the number of batches. None for a single batch, and for sums.
        """
        if len(targets) == 1 or self._options.get("reduction") == "sum":
            return None
        if self._criterion is not None:
            return lambda classes: float(len(targets))
        weight: Tensor | None = self._options.get("weight")
        ignored: int = self._options.get("ignore_index", IGNORED)

        def weight_of_rows(t: Tensor, classes: int) -> Tensor:
            t = t.long()  # -100 is another number in uint8
            valid = (t != ignored) & (t >= 0) & (t < classes)
            if weight is None:
                return valid.sum()
            return torch.where(valid, weight[t.clamp(0, classes - 1)], 0).sum()

        @cache
        def total(classes: int) -> Tensor:
            return torch.stack([weight_of_rows(t, classes) for t in targets]).sum()

        return total

    def measure(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meters: Sequence[Meter],
        alphas: Sequence[Mapping[str, float]] = (),
        scopes: Sequence[Scope] = (),
    ) -> Tensor:
        """Forward alone, under the caller's `no_grad`: into the first meter as the model is, then
        under each alpha, within its scope. Returns which targets were predicted by the model as it
        is: bool, of the targets' shape.

        What a model keeps of the first pass (`forward_keeping`) is not computed again for the
        others: each begins at the first slot that its alpha names.
        """
        keeping: Callable[..., Any] | None = (
            getattr(model, "forward_keeping", None) if alphas else None
        )
        # A forward may write over its input, which a later variant needs as it was.
        first = inputs.clone() if alphas else inputs
        entered: Mapping[str, Tensor] = {}
        if keeping is None:
            logits = self._run(model, model, first, {})
        else:
            logits, entered = self._run(model, keeping, first, {})
        self._record(logits, targets, meters[0])
        best = logits.max(-1)
        right = (best.indices == targets) & best.values.isfinite()
        del logits, best  # the next ones can have their memory
        for alpha, scope, meter in zip(
            alphas, scopes or [nullcontext] * len(alphas), meters[1:], strict=True
        ):
            start = next((slot for slot in entered if slot in alpha), None)
            begin = {} if start is None else {"start": start}
            features = inputs.clone() if start is None else entered[start]
            with scope():
                self._record(
                    self._run(model, model, features, {"alpha": alpha, **begin}), targets, meter
                )
        return right

    def _record(self, logits: Tensor, targets: Tensor, meter: Meter) -> None:
        targets = self._within(targets, self._check(logits).shape[-1], meter)
        if self._criterion is None:
            cross_entropy(logits, targets, meter=meter, config=self._config.kernel, **self._options)
        else:
            record_loss(self._criterion(logits, targets), logits, targets, meter)

    def _within(self, targets: Tensor, classes: int, meter: Meter | None) -> Tensor:
        """The targets, those outside the classes ignored and counted: the op does so itself on
        other devices, but raises on the CPU."""
        unmasked = self._config.on_bad_numbers == "stop" or self._criterion is not None
        if unmasked or targets.device.type != "cpu" or targets.dtype not in TARGET_DTYPES:
            return targets  # the op raises for targets of another dtype
        ignored = self._options.get("ignore_index", IGNORED)
        bad = ((targets < 0) | (targets >= classes)) & (targets != ignored)
        if meter is not None:
            counts = meter.on_device()
            counts["bad_targets"] += bad.sum()
            counts["ignored"] -= bad.sum()  # the op is about to add them
        return targets.long().masked_fill(bad, ignored)

    def require_match(
        self, task_type: str, config: TrainConfig, criterion: Criterion | None
    ) -> None:
        """Raise `ValueError` where a caller asks for something that this was not built for.

        Of the config, only the settings that a step itself obeys have to be the same.
        """
        pairs: list[tuple[str, object, object]] = [("task_type", task_type, self._task_type)]
        for name in ("kernel", "compile", "amp", "on_bad_numbers"):
            pairs.append((f"config.{name}", getattr(config, name), getattr(self._config, name)))
        if criterion is not None:
            pairs.append(("criterion", criterion, self._asked_criterion))
        for name, asked, built in pairs:
            if asked is not built and asked != built:
                raise ValueError(
                    f"step was built with {name}={built!r}, got {name}={asked!r}; pass the same "
                    "one, or leave step out to have one built"
                )

    def backend(self, device: torch.device) -> str:
        """Name of the kernel backend that serves the logits on `device`; `ValueError` where none
        can.

        Before the first batch, the logits are taken to be of the dtype of autocast, or float32.
        """
        if self._criterion is not None:
            return "eager criterion"
        dtype = self._logits_dtype or self._autocast or torch.float32
        return select_backend("cross_entropy", device.type, dtype, self._config.kernel).name

    def state_dict(self) -> dict[str, Any]:
        """What it carries from step to step: the loss scaler's state, if it has one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        if self.scaler is not None and state_dict:  # a resumed run may change its precision
            self.scaler.load_state_dict(state_dict)

    @property
    def compiled(self) -> bool:
        """Whether the forward runs compiled."""
        return self._config.compile.enabled and self.compile_failure is None

    def _check(self, logits: Tensor) -> Tensor:
        dims, shape = LOGITS_DIMS[self._task_type]
        if logits.dim() != dims:
            got = tuple(logits.shape)
            raise ValueError(
                f"task type {self._task_type!r} expects logits {shape}, got {got} from the model"
            )
        self._logits_dtype = logits.dtype
        return logits

    def _run(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: Tensor,
        arguments: dict[str, Any],
    ) -> Any:
        """`forward` (the model, or a method of it), in the precision and by the compiler that the
        config names."""
        run = partial(self._run_compiled, model) if self.compiled else _call
        if self._autocast is None:
            return run(forward, inputs, arguments)
        with torch.autocast(inputs.device.type, self._autocast):
            return run(forward, inputs, arguments)

    def _run_compiled(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        inputs: Tensor,
        arguments: dict[str, Any],
    ) -> Any:
        structure = id(model), getattr(model, "structure", None)
        if structure != self._structure:
            self._structure = structure
            self._programs.clear()
        use = (forward is model, torch.is_grad_enabled(), *arguments.get("alpha", ()))
        if use not in self._programs:
            self._programs[use] = self._compile()
        if self._config.compile.dynamic is None:
            torch._dynamo.maybe_mark_dynamic(inputs, 0)
        try:
            return self._programs[use](forward, inputs, arguments)
        except TorchDynamoException as error:  # compilation is lazy: this is where a failure shows
            if self._config.compile.on_failure == "raise":
                raise
            self._give_up_compiling(error)
            return forward(inputs, **arguments)

    def _give_up_compiling(self, error: Exception) -> None:
        """From here on nothing is compiled, and the reason can be read."""
        self._programs.clear()
        self.compile_failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _compile(self) -> Callable[..., Any]:
        """A compiled call of a forward that shares nothing with another: torch keeps what it
        compiled by code object, limits how often, and goes on eagerly beyond."""
        c = self._config.compile
        call = _call_unbroken if c.error_on_graph_break else _call
        own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
        return torch.compile(
            own, mode=c.mode, fullgraph=c.fullgraph, dynamic=c.dynamic, backend=c.backend
        )


class _Before:
    """What a batch changes, as it was: gradients, running statistics and counts."""

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        gradients = [(p, p.grad) for p in model.parameters()]
        self._gradients = [(p, None if g is None else g.clone()) for p, g in gradients]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._meter = meter
        self._counts = meter.state_dict()

    def restore(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for buffer, value in self._buffers:
            buffer.copy_(value)
        self._meter.load_state_dict(self._counts)


def build_train_step(
    task_type: str, config: TrainConfig, criterion: Criterion | None = None
) -> TrainStep:
    """The step of a task type.

    Args:
        task_type: "classification" (logits [N, V], targets [N]) or "lm" (logits [N, T, V], targets
        [N, T]).
        config: kernel and compile settings.
        criterion: None or an `nn.CrossEntropyLoss` runs the fused op with that criterion's options;
            any other callable (logits, targets) -> mean loss runs as it is, and `backend` says so.

    Raises:
        ValueError: unknown task type, an `nn.CrossEntropyLoss` that does not reduce to one number,
            or another criterion where `config.capture` asks for CUDA graphs.
    """
    if task_type not in LOGITS_DIMS:
        raise unknown_name("task type", task_type, LOGITS_DIMS)
    options = criterion_options(criterion)
    if config.capture and options is None:
        raise ValueError(
            "train.capture takes no criterion but nn.CrossEntropyLoss, since the Python code of "
            f"another would run at the capture only, got {criterion!r}; leave train.capture out"
        )
    own = criterion if options is None else None
    return TrainStep(task_type, config, own, options or {}, asked_criterion=criterion)


def _require_compiler(backend: str | Callable[..., Any]) -> None:
    """Raise `ValueError` for the name of a compiler that torch does not know."""
    if isinstance(backend, str):
        require_known(
            "compiler (train.compile.backend)",
            backend,
            torch._dynamo.list_backends(exclude_tags=()),
        )


_NOTHING = nullcontext()


def _no_span(name: str) -> AbstractContextManager[Any]:
    return _NOTHING


def _call(forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]) -> Any:
    return forward(inputs, **arguments)


def _call_unbroken(forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]) -> Any:
    with torch._dynamo.error_on_graph_break(True):
        return forward(inputs, **arguments)
