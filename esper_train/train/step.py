"""What happens to one batch: forward, loss, counts and the gradient. `loop` calls it; nothing here loops.

Only the model's forward (and with it its backward) is compiled; loss and metrics are `esper_kernels` ops on its
output, outside the compiled region. There is one step object a task type, made by the run, so nothing about
compilation is decided at import or shared between runs. A model that changes its program says so by another value of
`structure`; each structure is compiled once for training and once for each way of measuring.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import get_gradient_edge

from esper_kernels import Meter, cross_entropy, cross_entropy_step, record_loss, select_backend
from esper_train.base.names import unknown_name
from esper_train.train.amp import LossScaler
from esper_train.train.capture import Capture
from esper_train.train.config import TrainConfig
from esper_train.train.learner import Learner

Criterion = Callable[[Tensor, Tensor], Tensor]
Span = Callable[[str], AbstractContextManager[Any]]
Scope = Callable[[], AbstractContextManager[None]]
LOGITS_DIMS: Mapping[str, tuple[int, str]] = {"classification": (2, "[N, V]"), "lm": (3, "[N, T, V]")}
"""Task type to the rank and shape of its logits."""
IGNORED = -100
"""The `ignore_index` of the fused op, unless its options say another."""
# Autograd nodes, by the name they give themselves.
_PRODUCTS = ("AddmmBackward0", "MmBackward0", "LinearBackward0", "BmmBackward0", "BaddbmmBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")


def criterion_options(criterion: Criterion | None) -> dict[str, Any] | None:
    """The options of the fused op that do what the criterion does; None where it cannot."""
    if criterion is None:
        return {}
    if not isinstance(criterion, nn.CrossEntropyLoss):
        return None
    if criterion.reduction == "none":
        raise ValueError("expected a criterion with reduction 'mean' or 'sum', got 'none': a step needs one loss")
    return {name: getattr(criterion, name) for name in ("weight", "ignore_index", "label_smoothing", "reduction")}


class TrainStep:
    """Forward and loss of a batch, with or without backward. Made by `build_train_step`, owned by one run.

    Without a `criterion`, loss, counts and the logits' gradient are one fused op and no loss tensor exists.
    """

    def __init__(
        self, task_type: str, config: TrainConfig, criterion: Criterion | None, options: Mapping[str, Any]
    ) -> None:
        self._task_type = task_type
        self._config = config
        self._criterion = criterion
        self._options = options
        self._autocast = getattr(torch, config.amp.dtype) if config.amp.dtype else None
        self._workspace: Tensor | None = None
        self._programs: dict[Hashable, Callable[..., Any]] = {}  # compiled, by use, of one structure of the model
        self._structure: Hashable = None
        self.scaler = LossScaler(config.amp) if config.amp.dtype == "float16" else None
        self.span: Span = _no_span
        """Entered around each part of the work, by its name; a profiler puts its own here."""
        self.capture: Capture | None = None
        """The graphs of whole steps, where the config asks for them; the loop makes it for a run that did not."""
        self.compile_failure: str | None = None
        """Why the step runs uncompiled although the config asked for it."""
        if config.compile.enabled:
            self._compile()  # a mode or backend that torch does not know raises here

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meter: Meter,
        divisor: float | Tensor | None = None,
        learners: Sequence[Learner] = (),
    ) -> None:
        """Forward and backward: parameters receive their gradients, the meter the batch; `divisor` is of its group.

        Each of the `learners` then makes a pass of its own over the batch.
        """
        with self.span("forward"):
            if learners:
                feeding: Callable[..., Any] = model.forward_feeding  # type: ignore[assignment]
                logits, entered = self._run(model, feeding, inputs, {})
            else:
                logits, entered = self._run(model, model, inputs, {}), {}
        self._learn(self._check(logits), targets, meter, divisor, self.scaler, None)
        for learner in learners:
            start = learner.start
            with self.span("learners"), learner.scope():
                arguments = {"alpha": {start: 1.0}, "start": start}
                logits = self._run(model, model, entered[start], arguments)
                self._learn(logits, targets, None, divisor, learner.scaler, learner.parameters)

    def _learn(
        self,
        logits: Tensor,
        targets: Tensor,
        meter: Meter | None,
        divisor: float | Tensor | None,
        scaler: LossScaler | None,
        parameters: Sequence[Tensor] | None,
    ) -> None:
        """Loss and backward; only `parameters` receive gradients, where given."""
        targets = self._within(targets, logits.shape[-1], meter)
        scale = None if scaler is None else scaler.scale
        if self._criterion is None:
            with self.span("loss"):
                how = {"normalizer": divisor, "grad_scale": scale, "config": self._config.kernel, **self._options}
                memory = self._memory_of_gradient(logits)
                # Taken before it is written over: autograd would copy the gradient of a view that was.
                root = logits if logits._base is None else get_gradient_edge(logits)
                grad = cross_entropy_step(logits, targets, meter, **memory, **how)
            with self.span("backward"):
                torch.autograd.backward(root, grad, inputs=parameters)
        else:
            with self.span("loss"):
                loss = self._criterion(logits, targets)
                if meter is not None:
                    record_loss(loss.detach(), logits.detach(), targets, meter)
                for factor in (scale, None if divisor is None else 1 / divisor):
                    loss = loss if factor is None else loss * factor
            with self.span("backward"):
                loss.backward(inputs=parameters)

    def divisor(self, targets: Sequence[Tensor]) -> float | Tensor | None:
        """What the loss of each of these batches is divided by, so that their gradients add up to one of them all.

        The weight of all their valid rows, on their device, those with a target outside the classes included; where
        the criterion is not cross entropy, their number. None for a single batch, and for sums.
        """
        if len(targets) == 1 or self._options.get("reduction") == "sum":
            return None
        if self._criterion is not None:
            return float(len(targets))
        weight, ignored = self._options.get("weight"), self._options.get("ignore_index", IGNORED)

        def total(t: Tensor) -> Tensor:
            t = t.long()  # -100 is another number in uint8
            if weight is None:
                return (t != ignored).sum()
            return torch.where(t != ignored, weight[t.clamp(0, len(weight) - 1)], 0).sum()  # the loss refuses bad ones

        return torch.stack([total(t) for t in targets]).sum()

    def _memory_of_gradient(self, logits: Tensor) -> dict[str, Any]:
        """Where the gradient goes: fresh memory of its size costs more than computing it.

        Over the logits themselves where nothing has saved them: a matrix product keeps its factors, not its
        result, and no other op has seen it (a model that returns it for something else too would make autograd
        raise, not compute with it). Otherwise into memory that the step keeps.
        """
        node = logits.grad_fn
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        if node is None or not logits.is_cpu:
            return {}
        if node.name() in _PRODUCTS and logits.is_contiguous():
            return {"inplace": True}
        kept = self._workspace
        if kept is None or (kept.shape, kept.dtype) != (logits.shape, logits.dtype):
            self._workspace = kept = torch.empty_like(logits, requires_grad=False)
        return {"out": kept} if kept.is_contiguous() else {}

    def measure(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meters: Sequence[Meter],
        alphas: Sequence[Mapping[str, float]] = (),
        scopes: Sequence[Scope] = (),
    ) -> Tensor:
        """Forward alone, under the caller's `no_grad`: into the first meter as the model is, then under each alpha,
        within its scope. Returns which targets were predicted by the model as it is: bool, of the targets' shape.

        What a model keeps of the first pass (`forward_keeping`) is not computed again for the others: each begins
        at the first slot that its alpha names.
        """
        keeping: Callable[..., Any] | None = getattr(model, "forward_keeping", None) if alphas else None
        if keeping is None:
            logits, entered = self._run(model, model, inputs, {}), {}
        else:
            logits, entered = self._run(model, keeping, inputs, {})
        self._record(logits, targets, meters[0])
        best = logits.max(-1)
        right = (best.indices == targets) & best.values.isfinite()
        del logits, best  # the next ones can have their memory
        for alpha, scope, meter in zip(alphas, scopes or [nullcontext] * len(alphas), meters[1:], strict=True):
            start = next((slot for slot in entered if slot in alpha), None)
            begin = {} if start is None else {"start": start}
            features = inputs if start is None else entered[start]
            with scope():
                self._record(self._run(model, model, features, {"alpha": alpha, **begin}), targets, meter)
        return right

    def _record(self, logits: Tensor, targets: Tensor, meter: Meter) -> None:
        targets = self._within(targets, self._check(logits).shape[-1], meter)
        if self._criterion is None:
            cross_entropy(logits, targets, meter=meter, config=self._config.kernel, **self._options)
        else:
            record_loss(self._criterion(logits, targets), logits, targets, meter)

    def _within(self, targets: Tensor, classes: int, meter: Meter | None) -> Tensor:
        """The targets, those outside the classes ignored and counted: the op does so itself on other devices, but
        raises on the CPU."""
        if self._config.on_bad_numbers == "stop" or self._criterion is not None or targets.device.type != "cpu":
            return targets
        ignored = self._options.get("ignore_index", IGNORED)
        bad = ((targets < 0) | (targets >= classes)) & (targets != ignored)
        if meter is not None:
            counts = meter.on_device()
            counts["bad_targets"] += bad.sum()
            counts["ignored"] -= bad.sum()  # the op is about to add them
        return targets.long().masked_fill(bad, ignored)

    def backend(self, device: torch.device) -> str:
        """Name of the kernel backend that serves the logits on `device`; `ValueError` where none can."""
        if self._criterion is not None:
            return "eager criterion"
        dtype = self._autocast or torch.float32
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
            raise ValueError(f"task type {self._task_type!r} expects logits {shape}, got {got} from the model")
        return logits

    def _run(self, model: nn.Module, forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]) -> Any:
        """`forward` (the model, or a method of it), in the precision and by the compiler that the config names."""
        run = partial(self._run_compiled, model) if self.compiled else _call
        if self._autocast is None:
            return run(forward, inputs, arguments)
        with torch.autocast(inputs.device.type, self._autocast):
            return run(forward, inputs, arguments)

    def _run_compiled(
        self, model: nn.Module, forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]
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
            self._programs.clear()
            self.compile_failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return forward(inputs, **arguments)

    def _compile(self) -> Callable[..., Any]:
        """A compiled call of a forward that shares nothing with another: torch keeps what it compiled by code object,
        limits how often, and goes on eagerly beyond."""
        c = self._config.compile
        call = _call_unbroken if c.error_on_graph_break else _call
        own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__)
        return torch.compile(own, mode=c.mode, fullgraph=c.fullgraph, dynamic=c.dynamic, backend=c.backend)


def build_train_step(task_type: str, config: TrainConfig, criterion: Criterion | None = None) -> TrainStep:
    """The step of a task type.

    Args:
        task_type: "classification" (logits [N, V], targets [N]) or "lm" (logits [N, T, V], targets [N, T]).
        config: kernel and compile settings.
        criterion: None or an `nn.CrossEntropyLoss` runs the fused op with that criterion's options; any other
            callable (logits, targets) -> mean loss runs as it is, and `backend` says so.

    Raises:
        ValueError: unknown task type, an `nn.CrossEntropyLoss` that does not reduce to one number, or another
            criterion where `config.capture` asks for CUDA graphs.
    """
    if task_type not in LOGITS_DIMS:
        raise unknown_name("task type", task_type, LOGITS_DIMS)
    options = criterion_options(criterion)
    if config.capture and options is None:
        raise ValueError(
            "train.capture takes no criterion but nn.CrossEntropyLoss, since the Python code of another would run at "
            f"the capture only, got {criterion!r}; leave train.capture out"
        )
    return TrainStep(task_type, config, criterion if options is None else None, options or {})


def _no_span(name: str, nothing: AbstractContextManager[Any] = nullcontext()) -> AbstractContextManager[Any]:  # noqa: B008
    return nothing


def _call(forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]) -> Any:
    return forward(inputs, **arguments)


def _call_unbroken(forward: Callable[..., Any], inputs: Tensor, arguments: dict[str, Any]) -> Any:
    with torch._dynamo.error_on_graph_break(True):
        return forward(inputs, **arguments)
