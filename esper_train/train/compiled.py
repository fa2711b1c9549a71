"""Everything about `torch.compile`: compiled calls of a model, owned by one step.

Nothing about compilation is decided at import or shared between runs. A model that changes its
program says so by another value of `structure`; each structure is compiled once for training and
once for each way of measuring.
"""

from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from esper_kernels import Meter
from esper_train.base.names import require_known
from esper_train.train.batches import tensors
from esper_train.train.config import CompileConfig
from esper_train.train.forward import Forward, call


class Compiler:
    """Calls models through compiled programs, until compiling fails and the config allows eager
    calls.

    Raises `ValueError` for a backend or a mode that torch does not know.
    """

    def __init__(self, config: CompileConfig) -> None:
        self._config = config
        self._structure: Hashable = None
        # compiled calls of one structure of the model, by use
        self._programs: dict[Hashable, Forward] = {}
        self._proven: set[Hashable] = set()  # uses whose forward and backward were compiled
        self.failure: str | None = None
        """Why models are called uncompiled from here on."""
        if isinstance(config.backend, str):
            known = torch._dynamo.list_backends(exclude_tags=())
            require_known("compiler (train.compile.backend)", config.backend, known)
        self.program()  # a mode that torch does not know raises here

    def call(
        self, model: nn.Module, forward: Forward, inputs: Any, arguments: Mapping[str, Any]
    ) -> Any:
        """The result of the function `call`, from a compiled program."""
        if self.failure is not None:
            return call(forward, inputs, arguments)
        structure = id(model), getattr(model, "structure", None)
        if structure != self._structure:
            self._structure = structure
            self._programs.clear()
        use = (forward is model, torch.is_grad_enabled(), *arguments.get("alpha", ()))
        if use not in self._programs:
            self._programs[use] = self.program()
        if self._config.dynamic is None:
            for tensor in tensors(inputs):
                if tensor.dim() > 0:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self._programs[use](forward, inputs, arguments)
        except TorchDynamoException as error:  # compilation is lazy: this is where a failure shows
            if self._config.on_failure == "raise":
                raise
            self._give_up(error)
            return call(forward, inputs, arguments)

    def attempt(
        self, work: Callable[[], None], model: nn.Module, inputs: Any, meter: Meter
    ) -> None:
        """Do the work of a training batch, which calls the model by `call`.

        The backward pass has a compiler of its own, which may fail after the batch was counted.
        Where the config allows to go on uncompiled, everything is then put back and done again.
        """
        if self.failure is not None or self._config.on_failure == "raise":
            work()
            return
        shapes = tuple(tensor.shape for tensor in tensors(inputs))
        use = (id(model), getattr(model, "structure", None), shapes)
        if use in self._proven:
            work()
            return
        before = _Before(model, meter)
        try:
            work()
            self._proven.add(use)
        # compilers fail in many ways; what fails in eager mode too is raised
        except Exception as error:
            if self.failure is not None:
                raise  # the eager forward failed
            before.restore()
            self._give_up(error)
            try:
                work()
            except Exception:
                self.failure = None
                raise

    def _give_up(self, error: Exception) -> None:
        self._programs.clear()
        self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def program(self) -> Forward:
        """A compiled call of a forward with a code object of its own: torch keeps compiled programs
        by code object, limits their number, and runs eagerly beyond it."""
        c = self._config
        function = _call_unbroken if c.error_on_graph_break else call
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(
            own, mode=c.mode, fullgraph=c.fullgraph, dynamic=c.dynamic, backend=c.backend
        )


class _Before:
    """A copy of what a batch changes: gradients, running statistics and counts."""

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


def _call_unbroken(forward: Forward, inputs: Any, arguments: Mapping[str, Any]) -> Any:
    with torch._dynamo.error_on_graph_break(True):
        return call(forward, inputs, arguments)
