"""What happens to one batch: forward, loss, counts and the gradient. `loop` calls it; nothing here
loops.

Only the model's forward (and with it its backward) is compiled; loss and metrics are
`esper_kernels` ops on its output, outside the compiled region. There is one step object per task
type, made by the run and owned by it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from esper_kernels import Meter, cross_entropy_step, record_loss, select_backend
from esper_train.train.amp import LossScaler
from esper_train.train.batches import Span
from esper_train.train.capture import Capture
from esper_train.train.compiled import Compiler, Forward, call
from esper_train.train.config import TrainConfig
from esper_train.train.learner import Learner
from esper_train.train.loss import Criterion, Divisor, Loss
from esper_train.train.memory import GradientMemory

Scope = Callable[[], AbstractContextManager[None]]
_NOTHING = nullcontext()


def _no_span(name: str) -> AbstractContextManager[Any]:
    return _NOTHING


class TrainStep:
    """Forward and loss of a batch, with or without backward. Made by `build_train_step`, owned by
    one run.

    Without a criterion of the caller's own, loss, counts and the logits' gradient are one fused op
    and no loss tensor exists.
    """

    def __init__(self, loss: Loss, config: TrainConfig) -> None:
        self.loss = loss
        self._config = config
        self._autocast = getattr(torch, config.amp.dtype) if config.amp.dtype else None
        self._memory = GradientMemory()
        self._compiler = Compiler(config.compile) if config.compile.enabled else None
        self._call = call if self._compiler is None else self._compiler.call
        self._logits_dtype: torch.dtype | None = None
        self.scaler = LossScaler(config.amp) if config.amp.dtype == "float16" else None
        self.span: Span = _no_span
        """Entered around each part of the work, by its name; a profiler puts its own here."""
        self.capture: Capture | None = None
        """The graphs of whole steps, where the config asks for them; the loop makes it for a run
        that did not."""

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

        `divisor` is what `Loss.divisor` gave for the batches of this optimizer step. Each of the
        `learners` then makes a pass of its own over the batch.
        """
        if self._compiler is None:
            self._train(model, inputs, targets, meter, divisor, learners)
            return
        work = partial(self._train, model, inputs, targets, meter, divisor, learners)
        self._compiler.attempt(work, model, inputs, meter)

    def _train(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        meter: Meter,
        divisor: Divisor | None,
        learners: Sequence[Learner],
    ) -> None:
        """The batch's own pass, then that of each learner."""
        forward: Forward = model
        if learners:
            forward = model.forward_feeding  # type: ignore[assignment]
        entered = self._learn(
            model, forward, inputs, {}, targets, meter, divisor, self.scaler, None
        )
        for learner in learners:
            start = learner.start
            arguments = {"alpha": {start: 1.0}, "start": start}
            with self.span("learners"), learner.scope():
                self._learn(
                    model,
                    model,
                    entered[start],
                    arguments,
                    targets,
                    None,
                    divisor,
                    learner.scaler,
                    learner.parameters,
                )

    def _learn(
        self,
        model: nn.Module,
        forward: Forward,
        inputs: Tensor,
        arguments: Mapping[str, Any],
        targets: Tensor,
        meter: Meter | None,
        divisor: Divisor | None,
        scaler: LossScaler | None,
        parameters: Sequence[Tensor] | None,
    ) -> Mapping[str, Tensor]:
        """Forward, loss and backward; only `parameters` receive gradients, where given.

        Returns what a `forward` other than the model itself, `forward_feeding`, kept for learners.
        """
        entered: Mapping[str, Tensor] = {}
        loss = self.loss
        with self.span("forward"):
            logits = self._run(model, forward, inputs, arguments)
            if forward is not model:
                logits, entered = logits
            loss.check(logits)
            self._logits_dtype = logits.dtype
        if not logits.requires_grad:
            raise ValueError(
                "expected logits that depend on parameters with requires_grad=True, got logits "
                "that need no gradient; unfreeze a parameter, or leave torch.no_grad()"
            )
        classes = logits.shape[-1]
        targets = loss.within(targets, classes, meter)
        divide_by = None if divisor is None else divisor(classes)
        scale = None if scaler is None else scaler.scale
        if loss.own is not None:
            self._learn_by_criterion(loss.own, logits, targets, meter, divide_by, scale, parameters)
            return entered
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
                **loss.options,
            )
        with self.span("backward"):
            torch.autograd.backward(root, grad, inputs=parameters)
        return entered

    def _learn_by_criterion(
        self,
        criterion: Criterion,
        logits: Tensor,
        targets: Tensor,
        meter: Meter | None,
        divide_by: float | Tensor | None,
        scale: Tensor | None,
        parameters: Sequence[Tensor] | None,
    ) -> None:
        """Loss and backward of a criterion of the caller's own."""
        with self.span("loss"):
            loss = criterion(logits, targets)
            if meter is not None:
                record_loss(loss.detach(), logits.detach(), targets, meter)
            for factor in (scale, None if divide_by is None else 1 / divide_by):
                loss = loss if factor is None else loss * factor
        with self.span("backward"):
            loss.backward(inputs=parameters)

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
        keeping: Forward | None = getattr(model, "forward_keeping", None) if alphas else None
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
        self.loss.check(logits)
        self._logits_dtype = logits.dtype
        self.loss.record(logits, targets, meter)

    def _run(
        self, model: nn.Module, forward: Forward, inputs: Tensor, arguments: Mapping[str, Any]
    ) -> Any:
        """`forward` (the model, or a method of it), in the precision and by the compiler that the
        config names."""
        if self._autocast is None:
            return self._call(model, forward, inputs, arguments)
        with torch.autocast(inputs.device.type, self._autocast):
            return self._call(model, forward, inputs, arguments)

    def require_match(
        self, task_type: str, config: TrainConfig, criterion: Criterion | None
    ) -> None:
        """Raise `ValueError` where a caller asks for something that this was not built for.

        Of the config, only the settings that a step itself obeys have to be the same.
        """
        pairs: list[tuple[str, object, object]] = [("task_type", task_type, self.loss.task_type)]
        for name in ("kernel", "compile", "amp", "on_bad_numbers"):
            pairs.append((f"config.{name}", getattr(config, name), getattr(self._config, name)))
        if criterion is not None:
            pairs.append(("criterion", criterion, self.loss.criterion))
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
        if self.loss.own is not None:
            return "eager criterion"
        dtype = self._logits_dtype or self._autocast or torch.float32
        return select_backend("cross_entropy", device.type, dtype, self._config.kernel).name

    @property
    def compile_failure(self) -> str | None:
        """Why the step runs uncompiled although the config asked for it."""
        return None if self._compiler is None else self._compiler.failure

    @property
    def compiled(self) -> bool:
        """Whether the forward runs compiled."""
        return self._compiler is not None and self._compiler.failure is None

    def state_dict(self) -> dict[str, Any]:
        """What it carries from step to step: the loss scaler's state, if it has one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` gave."""
        if self.scaler is not None and state_dict:  # a resumed run may change its precision
            self.scaler.load_state_dict(state_dict)


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
    return TrainStep(Loss(task_type, config, criterion), config)
