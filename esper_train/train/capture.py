"""Whole steps as CUDA graphs: for each step the loop asks a `Capture`, owned by the run, which
replays it or runs it.

A graph repeats kernels on the addresses and with the numbers they were captured with. So batches
are copied to where the captured one was, gradients are zeroed where they are, learning rates are
tensors, and alpha is a buffer of its slot. Whatever else a step depends on ends the graphs when it
changes, see `Capture.begin`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from esper_train.train.batches import Batch, cloned, moved, tensors
from esper_train.train.config import TrainConfig
from esper_train.train.optimizers import OptimizerRegistry

S = TypeVar("S")
Work = Callable[[], None]
WARM_UP = 3
"""Steps before a capture, as in torch's own example: kernels compile, libraries and optimizers get
their memory."""
WARMING_UP = "warming up for the capture"
OTHER_SHAPE = "another shape than the first batch"


class CudaGraphs:
    """Everything that depends on CUDA. One stream serves warm-up and capture, because libraries
    keep memory by stream."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"train.capture needs the model on a CUDA device, got {device}; leave "
                "train.capture out"
            )
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Work) -> None:
        """Do the work now."""
        callers = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(callers)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:  # whoever saves the state afterwards reads it on the caller's stream
            callers.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Capture the work without doing it, and return what does it.

        After a failed capture the process can go on, or the error has a note that it cannot.
        """
        try:
            return self._capture(work)
        except Exception as error:
            self._end_failed_capture(error)
            raise

    def _capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # torch's own context does not leave the stream when a capture fails; a loader's thread may
        # be pinning memory
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay

    def _end_failed_capture(self, error: Exception) -> None:
        """Capture something that succeeds, because torch's generator stays in the failed capture
        otherwise."""
        device = self._stream.device

        def fill() -> None:
            torch.zeros((), device=device)

        try:
            self._capture(fill)
            state = torch.cuda.get_rng_state(device)
            torch.rand((), device=device)
            torch.cuda.set_rng_state(state, device)
            torch.cuda.synchronize(device)
        except Exception as remaining:  # torch raises various exceptions here
            error.add_note(
                f"CUDA is not usable after the failed capture ({remaining}): restart the process"
            )


class Capture:
    """The graphs of a run: one for steps that measure gradients and one for those that do not."""

    def __init__(self, graphs: CudaGraphs) -> None:
        self._graphs = graphs
        self._device: torch.device | None = None
        # the conditions under which the graphs are valid, once an epoch ended well
        self._kept: tuple[object, ...] | None = None

    def begin(
        self,
        model: nn.Module,
        optimizers: OptimizerRegistry,
        config: TrainConfig,
        make: Callable[[], S],
    ) -> S:
        """The steps of an epoch: those of the epoch before, with their graphs, or new ones from
        `make`.

        New ones are made after an epoch that failed, and where one of these has changed: the
        config, the structure of the model, an optimizer or its settings, the address of a
        parameter, buffer, gradient or optimizer state.
        """
        device = next(model.parameters()).device
        if self._device not in (None, device):
            raise ValueError(
                f"this step captured its graphs on {self._device}, the model is on {device}; build "
                "another"
            )
        self._model = model
        self._optimizers = optimizers
        self._device = device
        self._groups = [
            group for optimizer in optimizers.present() for group in optimizer.param_groups
        ]
        self._settings = _settings(self._groups)
        members = optimizers.parameters()
        ids = {name: [id(p) for p in parameters] for name, parameters in members.items()}
        self._what = (
            config,
            model,
            getattr(model, "structure", None),
            optimizers.present(),
            ids,
            self._settings,
        )
        if self._kept != (*self._what, *self._places()):
            _require_capturable(optimizers)
            for p in (p for parameters in members.values() for p in parameters):
                # a gradient of 0 would decay the weights of what has no part in the step
                p.grad = None
            self._steps: Any = make()
            self._replays: dict[bool, Work] = {}  # keyed by whether the step measures
            self._warm: Counter[bool] = Counter()
            self._held: list[Batch] = []  # of a step, at the addresses in its graphs
            self._form: object = None  # of these batches
            self._memory: list[Tensor] = []  # memory that the graphs use, so it is not reused
            self._lrs = [group["lr"] for group in self._groups]
            self._rates = [
                torch.full((), lr, dtype=torch.float32, device=self._device) for lr in self._lrs
            ]
        self._kept = None
        self.replayed = 0
        self.eager: Counter[str] = Counter()
        """Steps that were not replayed, by the reason."""
        return self._steps

    def end(self) -> None:
        """Keep the graphs for the next epoch, and the memory they use."""
        self._kept = *self._what, *self._places()
        self._memory = [x.detach() for x in self._tensors()]

    def run(self, group: Sequence[Batch], measure: bool) -> None:
        """One step on these batches, wherever they are."""
        self._update_rates()
        form = form_of(group)
        if not self._held:
            self._form = form
            self._held = [moved(cloned(batch), self._device) for batch in group]
        if form != self._form:
            self._run_eagerly(moved(group, self._device), measure, OTHER_SHAPE)
            return
        for static, part in zip(tensors(self._held), tensors(group), strict=True):
            static.copy_(part, non_blocking=True)
        if self._warm[measure] < WARM_UP:
            self._warm[measure] += 1
            self._run_eagerly(self._held, measure, WARMING_UP)
            return
        if measure not in self._replays:
            with self._rates_on_device(capturable=True):
                work = partial(self._steps, self._held, measure)
                self._replays[measure] = self._graphs.record(work)
        self._replays[measure]()
        self.replayed += 1

    def _run_eagerly(self, group: Sequence[Batch], measure: bool, reason: str) -> None:
        with self._rates_on_device():
            self._graphs.run(partial(self._steps, group, measure))
        self.eager[reason] += 1

    def _update_rates(self) -> None:
        if _settings(self._groups) != self._settings:
            raise ValueError(
                "within an epoch, a captured step takes a new learning rate from a schedule and no "
                "other setting; make the schedule with cycle_momentum=False, or leave "
                "train.capture out"
            )
        for place, group in enumerate(self._groups):
            if group["lr"] != self._lrs[place]:
                self._lrs[place] = group["lr"]
                self._rates[place].fill_(group["lr"])

    @contextmanager
    def _rates_on_device(self, **more: bool) -> Iterator[None]:
        """Optimizers take their learning rates from the device; schedules and checkpoints see plain
        numbers."""
        before = [dict(group) for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            # "capturable": state is on the device, which it is where it is fused
            group.update(lr=rate, **more)
        try:
            yield
        finally:
            for group, values in zip(self._groups, before, strict=True):
                group.clear()
                group.update(values)

    def _tensors(self) -> list[Tensor]:
        """The memory of the run that a step uses."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        states = [
            state for optimizer in self._optimizers.present() for state in optimizer.state.values()
        ]
        numbers = [x for state in states for x in state.values() if isinstance(x, Tensor)]
        return [*self._model.parameters(), *self._model.buffers(), *gradients, *numbers]

    def _places(self) -> list[tuple[object, ...]]:
        return [
            (x.data_ptr(), x.dtype, x.shape, x.stride(), x.requires_grad) for x in self._tensors()
        ]


def form_of(nest: Any) -> object:
    """The form of a batch. Two batches of equal form can take each other's place in a graph: it
    holds the shapes of the tensors, their names and places, and everything that is not a tensor."""
    if isinstance(nest, Tensor):
        return nest.shape, nest.dtype
    if isinstance(nest, dict):
        return [(key, form_of(value)) for key, value in nest.items()]
    if isinstance(nest, (tuple, list)):
        return [type(nest), *map(form_of, nest)]
    return nest


def _require_capturable(optimizers: OptimizerRegistry) -> None:
    for optimizer in optimizers.present():
        plain = all(
            group.get("fused") and not isinstance(group["lr"], Tensor)
            for group in optimizer.param_groups
        )
        if not plain or type(optimizer) not in (SGD, Adam, AdamW):
            raise ValueError(
                "train.capture needs torch's SGD, Adam or AdamW, made with fused=True, which keeps "
                "their state on the device, and with a number as learning rate, got "
                f"{type(optimizer).__name__} with {optimizer.defaults}; make it so, or leave "
                "train.capture out"
            )


def _settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of the optimizers that a captured step holds as plain numbers."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in groups
    ]
