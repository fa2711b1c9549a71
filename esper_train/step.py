"""What happens to one batch: forward, loss, counts and the gradient. `loop` calls it; nothing here loops.

Only the model's forward (and with it its backward) is compiled; loss and metrics are `esper_kernels` ops on its
output, outside the compiled region. There is one step object a task type, made by the run, so nothing about
compilation is decided at import or shared between runs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import get_gradient_edge

from esper_kernels import Meter, cross_entropy, cross_entropy_step, record_loss, select_backend
from esper_train.config import TrainConfig
from esper_train.names import unknown_name

Criterion = Callable[[Tensor, Tensor], Tensor]
LOGITS_DIMS: Mapping[str, tuple[int, str]] = {"classification": (2, "[N, V]"), "lm": (3, "[N, T, V]")}
"""Task type to the rank and shape of its logits."""
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
        self._workspace: Tensor | None = None
        self.compile_failure: str | None = None
        """Why the step runs uncompiled although the config asked for it."""
        self._compiled: Callable[..., Tensor] | None = None
        if config.compile.enabled:
            c = config.compile
            self._compiled = torch.compile(
                _call, mode=c.mode, fullgraph=c.fullgraph, dynamic=c.dynamic, backend=c.backend
            )

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, meter: Meter) -> None:
        """Forward and backward: parameters receive their gradients, the meter the batch."""
        logits = self._forward(model, inputs)
        targets = self._within(targets, logits.shape[-1], meter)
        if self._criterion is None:
            memory = self._memory_of_gradient(logits)
            edge = get_gradient_edge(logits)  # now: autograd would copy the gradient of a view written over
            grad = cross_entropy_step(logits, targets, meter, config=self._config.kernel, **memory, **self._options)
            torch.autograd.backward(edge, grad)
        else:
            loss = self._criterion(logits, targets)
            loss.backward()
            record_loss(loss.detach(), logits.detach(), targets, meter)

    def _memory_of_gradient(self, logits: Tensor) -> dict[str, Any]:
        """Where the gradient goes: fresh memory of its size costs more than computing it.

        Over the logits themselves where nothing has saved them: a matrix product keeps its factors, not its
        result, and no other op has seen it (a model that returns it for something else too would make autograd
        raise, not compute with it). Otherwise into memory that the step keeps.
        """
        node = logits.grad_fn
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        if logits.device.type != "cpu" or node is None or self._compiled is not None:
            return {}
        if node.name() in _PRODUCTS and logits.is_contiguous():
            return {"inplace": True}
        kept = self._workspace
        if kept is None or (kept.shape, kept.dtype) != (logits.shape, logits.dtype):
            self._workspace = kept = torch.empty_like(logits, requires_grad=False)
        return {"out": kept} if kept.is_contiguous() else {}

    def measure(self, model: nn.Module, inputs: Tensor, targets: Tensor, meter: Meter, **arguments: Any) -> None:
        """Forward alone, under the caller's `no_grad`; `arguments` go to the model."""
        logits = self._forward(model, inputs, **arguments)
        targets = self._within(targets, logits.shape[-1], meter)
        if self._criterion is None:
            cross_entropy(logits, targets, meter=meter, config=self._config.kernel, **self._options)
        else:
            record_loss(self._criterion(logits, targets), logits, targets, meter)

    def _within(self, targets: Tensor, classes: int, meter: Meter) -> Tensor:
        """The targets, those outside the classes ignored and counted: the op does so itself on other devices, but
        raises on the CPU."""
        if self._config.on_bad_numbers == "stop" or self._criterion is not None or targets.device.type != "cpu":
            return targets
        ignored, counts = self._options.get("ignore_index", -100), meter.on_device()
        bad = ((targets < 0) | (targets >= classes)) & (targets != ignored)
        counts["bad_targets"] += bad.sum()
        counts["ignored"] -= bad.sum()  # the op is about to add them
        return targets.long().masked_fill(bad, ignored)

    def backend(self, device: torch.device) -> str:
        """Name of the kernel backend that serves float32 logits on `device`; `ValueError` where none can."""
        if self._criterion is not None:
            return "eager criterion"
        return select_backend("cross_entropy", device.type, torch.float32, self._config.kernel).name

    @property
    def compiled(self) -> bool:
        """Whether the forward runs compiled."""
        return self._compiled is not None

    def _forward(self, model: nn.Module, inputs: Tensor, **arguments: Any) -> Tensor:
        try:
            logits = (self._compiled or _call)(model, inputs, arguments)
        except TorchDynamoException as error:  # compilation is lazy: this is where a failure shows
            if self._compiled is None or self._config.compile.on_failure == "raise":
                raise
            self._compiled = None
            self.compile_failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            logits = _call(model, inputs, arguments)
        dims, shape = LOGITS_DIMS[self._task_type]
        if logits.dim() != dims:
            got = tuple(logits.shape)
            raise ValueError(f"task type {self._task_type!r} expects logits {shape}, got {got} from the model")
        return logits


def build_train_step(task_type: str, config: TrainConfig, criterion: Criterion | None = None) -> TrainStep:
    """The step of a task type.

    Args:
        task_type: "classification" (logits [N, V], targets [N]) or "lm" (logits [N, T, V], targets [N, T]).
        config: kernel and compile settings.
        criterion: None or an `nn.CrossEntropyLoss` runs the fused op with that criterion's options; any other
            callable (logits, targets) -> mean loss runs as it is, and `backend` says so.

    Raises:
        ValueError: unknown task type, or an `nn.CrossEntropyLoss` that does not reduce to one number.
    """
    if task_type not in LOGITS_DIMS:
        raise unknown_name("task type", task_type, LOGITS_DIMS)
    options = criterion_options(criterion)
    return TrainStep(task_type, config, criterion if options is None else None, options or {})


def _call(model: nn.Module, inputs: Tensor, arguments: dict[str, Any]) -> Tensor:
    return model(inputs, **arguments)
