"""The work on one batch: forward, loss, counts and the gradient. `loop` calls it; nothing here
loops.

Only the model's forward (and with it its backward) is compiled; loss and metrics are
`esper_kernels` ops on its output, outside the compiled region. There is one step object per task
type, made by the run and owned by it.

Long file: each way to learn from a batch has the spans, precision and compiler of one object.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from esper_kernels import Meter, cross_entropy_step, select_backend
from esper_train.base.names import require_function, require_type
from esper_train.train import linear
from esper_train.train.amp import LossScaler
from esper_train.train.batches import ReadBatch, cloned
from esper_train.train.capture import Capture
from esper_train.train.compiled import Compiler
from esper_train.train.config import TrainConfig
from esper_train.train.forward import Forward, ForwardOf, call, device_of, logits_of
from esper_train.train.learner import Learner
from esper_train.train.loss import Criterion, Divisor, Loss
from esper_train.train.memory import GradientMemory
from esper_train.train.spans import no_spans

Scope = Callable[[], AbstractContextManager[None]]


class TrainStep:
    """Forward and loss of a batch, with or without backward. Made by `build_train_step`, owned by
    one run.

    Where the fused op serves the batch, loss, counts and the logits' gradient are one op and no
    loss tensor exists.
    """

    def __init__(
        self,
        loss: Loss,
        config: TrainConfig,
        forward: ForwardOf | None = None,
        batch: ReadBatch | None = None,
    ) -> None:
        require_function(forward, "forward", or_none=True)
        require_function(batch, "batch", or_none=True)
        if config.linear_loss:
            linear.require_linear_loss(loss, forward is not None)
        self.loss = loss
        self.forward = forward
        self.batch = batch
        self.config = config
        self._autocast = getattr(torch, config.amp.dtype) if config.amp.dtype else None
        self._memory = GradientMemory()
        self._compiler = Compiler(config.compile) if config.compile.enabled else None
        self._logits_dtype: torch.dtype | None = None
        self.scaler = LossScaler(config.amp) if config.amp.dtype == "float16" else None
        self.spans = no_spans()
        """Entered around each part of the work; a profiler puts its own here."""
        self.capture: Capture | None = None
        """The graphs of whole steps, where the config asks for them; the loop makes it for a run
        that did not."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
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
        inputs: Any,
        targets: Any,
        meter: Meter,
        divisor: Divisor | None,
        learners: Sequence[Learner],
    ) -> None:
        """The batch's own pass, then that of each learner."""
        forward: Forward = model
        if learners:
            forward = model.forward_feeding  # type: ignore[assignment]
        entered = self._learn(model, forward, inputs, {}, targets, meter, divisor)
        for learner in learners:
            start = learner.start
            at_one = {"alpha": {start: 1.0}, "start": start}
            with self.spans.learners, learner.scope():
                self._learn(model, model, entered[start], at_one, targets, None, divisor, learner)

    def _learn(
        self,
        model: nn.Module,
        forward: Forward,
        inputs: Any,
        arguments: Mapping[str, Any],
        targets: Any,
        meter: Meter | None,
        divisor: Divisor | None,
        learner: Learner | None = None,
    ) -> Mapping[str, Tensor]:
        """Forward, loss and backward; a learner's parameters alone receive gradients, where one is
        given.

        Returns what a `forward` other than the model itself, `forward_feeding`, kept for learners.
        """
        entered: Mapping[str, Tensor] = {}
        loss = self.loss
        scaler = self.scaler if learner is None else learner.scaler
        scale = None if scaler is None else scaler.scale
        parameters = None if learner is None else learner.parameters
        if self._does_without_logits(targets) and forward is model and learner is None:
            self._learn_linear(model, inputs, targets, meter, divisor, scale)
            return entered
        with self.spans.forward:
            logits = self._run(model, forward, inputs, arguments)
            if forward is not model:
                logits, entered = logits
            if not isinstance(logits, Tensor):
                logits = logits_of(logits)
            loss.check(logits, targets)
            self._logits_dtype = logits.dtype
        if not logits.requires_grad:
            raise _without_gradient()
        # a fused batch needs nothing more
        fused = loss.own is None and not targets.is_floating_point()
        if not fused and not loss.is_fused(logits, targets):
            self._learn_by_criterion(logits, targets, meter, divisor, scale, parameters)
            return entered
        with self.spans.loss:
            root = get_gradient_edge(logits)
            values = logits.detach()
            if loss.is_dense:
                values = loss.classes_last(values)
            del logits  # this step no longer holds the memory, so any holder is somebody else
            classes = values.shape[-1]
            destination = self._memory.destination(values)
            grad = cross_entropy_step(
                values,
                loss.within(targets, classes, meter) if loss.masks else targets,
                meter,
                normalizer=None if divisor is None else divisor(classes),
                grad_scale=scale,
                out=destination.out,
                inplace=destination.inplace,
                config=self.config.kernel,
                **loss.options,
            )
        with self.spans.backward:
            if loss.is_dense:
                grad = grad.movedim(-1, 1)
            torch.autograd.backward(root, grad, inputs=parameters)
        return entered

    def _does_without_logits(self, targets: object) -> bool:
        is_hard = isinstance(targets, Tensor) and not targets.is_floating_point()
        return self.config.linear_loss and is_hard

    def _learn_linear(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Tensor,
        meter: Meter | None,
        divisor: Divisor | None,
        scale: Tensor | None,
    ) -> None:
        """Forward, loss and backward without the logits."""
        layer = linear.output_layer(model)
        with self.spans.forward:
            features: Forward = model.features  # type: ignore[assignment]
            hidden = self._run(model, features, inputs, {})
            self.loss.check(hidden, targets)
            self._logits_dtype = self._autocast or hidden.dtype
        if not hidden.requires_grad and not layer.weight.requires_grad:
            raise _without_gradient()
        with self.spans.loss, self._precision(hidden.device):
            edges, gradients = linear.learn(
                hidden, layer, self.loss, targets, meter, divisor, scale, self.config.kernel
            )
        del hidden
        with self.spans.backward:
            torch.autograd.backward(edges, gradients)

    def _learn_by_criterion(
        self,
        logits: Tensor,
        targets: Any,
        meter: Meter | None,
        divisor: Divisor | None,
        scale: Tensor | None,
        parameters: Sequence[Tensor] | None,
    ) -> None:
        """Loss and backward where the fused op does not serve the batch."""
        with self.spans.loss:
            with self._precision(logits.device):
                loss = self.loss.compute(logits, targets)
            if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
                raise TypeError(
                    "expected a criterion that returns the mean loss over the batch, a 0-d tensor "
                    f"that depends on the logits, got {loss!r:.80}"
                )
            if meter is not None:
                self.loss.record(loss, logits, targets, meter)
            if scale is not None:
                loss = loss * scale
            if divisor is not None:
                loss = loss * (self.loss.share(logits) / divisor(self.loss.classes(logits)))
        with self.spans.backward:
            loss.backward(inputs=parameters)

    def measure(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        meters: Sequence[Meter],
        alphas: Sequence[Mapping[str, float]] = (),
        scopes: Sequence[Scope] = (),
    ) -> Tensor:
        """Forward alone, under the caller's `no_grad`: the model as it is, into the first meter,
        then the model under each alpha, within its scope. Returns for each target whether the model
        as it is predicts it: bool, of the shape of the targets' classes; [0] for a task without
        classes.

        Later passes begin at the first slot that their alpha names, from what the model kept of the
        first pass (`forward_keeping`).
        """
        keeping: Forward | None = None
        if alphas and self.forward is None:
            keeping = getattr(model, "forward_keeping", None)
        # A forward may write over its input, which a later variant needs as it was.
        first = cloned(inputs) if alphas else inputs
        entered: Mapping[str, Tensor] = {}
        if keeping is None:
            logits = logits_of(self._run(model, model, first, {}))
        else:
            output, entered = self._run(model, keeping, first, {})
            logits = logits_of(output)
            del output
        self._measure(logits, targets, meters[0])
        right = self.loss.right(logits, targets)
        del logits  # its memory is free for the next ones
        for alpha, scope, meter in zip(
            alphas, scopes or [nullcontext] * len(alphas), meters[1:], strict=True
        ):
            start = next((slot for slot in entered if slot in alpha), None)
            arguments = {"alpha": alpha} if start is None else {"alpha": alpha, "start": start}
            features = cloned(inputs) if start is None else entered[start]
            with scope():
                logits = logits_of(self._run(model, model, features, arguments))
                self._measure(logits, targets, meter)
                del logits
        return right

    def _measure(self, logits: Tensor, targets: Any, meter: Meter) -> None:
        """Loss and counts of a batch into the meter."""
        self._logits_dtype = logits.dtype
        loss = self.loss
        loss.check(logits, targets)
        if loss.is_fused(logits, targets):
            loss.measure(logits, targets, meter)
            return
        with self._precision(logits.device):
            value = loss.compute(logits, targets)
        loss.record(value, logits, targets, meter)

    def _run(
        self, model: nn.Module, forward: Forward, inputs: Any, arguments: Mapping[str, Any]
    ) -> Any:
        """`forward` (the model, or a method of it), in the precision and by the compiler that the
        config names."""
        if self.forward is not None:
            forward = partial(self.forward, model)
            inputs = (inputs,)  # as one argument, whatever it is
        if self._autocast is None and self._compiler is None:
            return call(forward, inputs, arguments)
        with self._precision(device_of(model, inputs)):
            if self._compiler is None:
                return call(forward, inputs, arguments)
            return self._compiler.call(model, forward, inputs, arguments)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast where the config asks for it."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self._autocast)

    def backend(self, device: torch.device) -> str:
        """Name of the kernel backend that serves the logits on `device`, with "(without logits)"
        under `train.linear_loss`; `ValueError` where none can. "eager criterion" for a criterion of
        the caller's own, "eager (soft targets)" where torch's own op computed the loss of a batch
        since the loop began.

        Before the first batch, the logits are taken to be of the dtype of autocast, or float32.
        """
        if self.loss.own is not None:
            return "eager criterion"
        if self.loss.saw_soft_targets:
            return "eager (soft targets)"
        dtype = self._logits_dtype or self._autocast or torch.float32
        name = select_backend("cross_entropy", device.type, dtype, self.config.kernel).name
        return f"{name} (without logits)" if self.config.linear_loss else name

    @property
    def compile_failure(self) -> str | None:
        """The reason why the step runs uncompiled although the config asked for it."""
        return None if self._compiler is None else self._compiler.failure

    @property
    def compiled(self) -> bool:
        """Whether the forward runs compiled."""
        return self._compiler is not None and self._compiler.failure is None

    def state_dict(self) -> dict[str, Any]:
        """The state that lasts over steps: that of the loss scaler, if there is one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Restore a state from `state_dict`."""
        if self.scaler is not None and state_dict:  # a resumed run may change its precision
            self.scaler.load_state_dict(state_dict)


def _without_gradient() -> ValueError:
    return ValueError(
        "expected logits that depend on parameters with requires_grad=True, got logits that need "
        "no gradient; unfreeze a parameter, and let the model not detach its output"
    )


def build_train_step(
    task_type: str,
    config: TrainConfig,
    criterion: Criterion | None = None,
    *,
    forward: ForwardOf | None = None,
    batch: ReadBatch | None = None,
) -> TrainStep:
    """The step of a task type.

    Args:
        task_type: "classification" (logits [N, V], targets [N]), "lm" (logits [N, T, V], targets
            [N, T]), "dense" (logits [N, V, d, ...] in torch's layout, targets [N, d, ...]) or
            "regression" (outputs [N, ...], targets that the criterion takes; nothing is counted,
            and the accuracy is None).
        config: kernel and compile settings.
        criterion: None, an `nn.CrossEntropyLoss` or an `esper_kernels.CrossEntropyLoss` runs the
            fused op with that criterion's options, or torch's own op for soft targets, which are
            floating and of the logits' shape; any other callable (logits, targets) -> mean loss
            runs as it is. `backend` says which. In "lm", logits are [N, T, V] for every criterion.
        forward: a function (model, inputs) -> output, where the model is not simply called with
            the inputs. It gets `alpha=` too where variants are measured.
        batch: a function from what the loader gives to (inputs, targets), where that is neither a
            pair nor a dict.

    Raises:
        TypeError: a config or criterion of another type.
        ValueError: unknown task type, a regression without a criterion, a cross entropy that does
            not reduce to one number or has a meter or config of its own, a
            `LinearCrossEntropyLoss`, or a criterion of one's own where `config.capture` asks for
            CUDA graphs.
    """
    require_type(config, TrainConfig, "config")
    return TrainStep(Loss(task_type, config, criterion), config, forward, batch)
