"""A task: its data, its type, and the host network that learns it.

Write one for your own data and pass it to `run_heuristic_episode` or `run_fit`, or name it on the
command line with `--task MODULE:NAME`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from esper_train.base.names import require_function, require_type
from esper_train.morph.blueprints import Blueprint, BlueprintRegistry, default_registry
from esper_train.morph.config import HostConfig
from esper_train.morph.host import Host
from esper_train.train.data import Data, is_pair_of_tensors

IGNORED = -100
"""A target that is left out of loss and counts."""
SPLITS = ("train", "validation", "test")
CHECKED_ROWS = 65536
"""Rows whose targets are checked at a time, because int64 takes eight times the memory of uint8."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The data of a task. Each split is one of

    - a pair of tensors in memory: inputs [N, ...] and targets [N] or [N, T];
    - a torch `Dataset` of samples (input, target), which the run batches and shuffles;
    - a loader that gives its batches anew in each epoch, such as a `DataLoader`; it is used as it
      is, so its own batch size, order and workers count.
    """

    train: Data
    validation: Data
    """The data by which gates and controllers decide."""
    test: Data
    """Only for reports: no decision sees it."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that identify the data, such as a digest; the run reports them, and a resumed
    run must have the same."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The data and type of a problem, and the host network that learns it."""

    name: str
    """The name in `config.json` and in reports; without a colon or slash."""
    task_type: str
    """"classification", "lm", "dense" or "regression": the shape of logits and targets, as
    `build_train_step` says. Seeds are judged by accuracy, so a regression trains its host alone."""
    num_classes: int | None
    """Number of classes, or size of the vocabulary; None where there are none."""
    load: Callable[[], Splits]
    """Returns the data, or raises if they are missing or damaged; it never substitutes other
    data. Python's, NumPy's and torch's global random numbers start from the run's seed in it, so
    that a resumed run is given the same."""
    build_host: Callable[[HostConfig], Host]
    """Makes a new host, initialized from torch's global random state."""
    criterion: Callable[[Any, Any], Tensor] | None = None
    """(logits, targets) to the mean loss; None is cross entropy. An `nn.CrossEntropyLoss` or
    `esper_kernels.CrossEntropyLoss` runs as the fused op with its options, any other callable as it
    is."""
    make_optimizer: Callable[[Sequence[nn.Parameter], float, str], Optimizer] | None = None
    """(parameters, learning rate, group) to an optimizer; the group is "host", a slot's name for
    its seed, or "SLOT.gate". None takes what `optim` in the config says."""
    batch: Callable[[Any], tuple[Any, Any]] | None = None
    """A function from a batch of the loader to (inputs, targets). None takes pairs, and dicts with
    targets under "labels", "targets", "label" or "target". Inputs go to the host's first segment: a
    dict as keyword arguments, a tuple or list as one argument after another."""
    forward: Callable[[nn.Module, Any], Any] | None = None
    """(model, inputs) to its output, in place of model(inputs), where the host is trained alone.
    Seeds learn by the host's own forward."""
    augment: Callable[[Any, Any], tuple[Any, Any]] | None = None
    """A function from (inputs, targets) of a training batch, on the run's device, to the batch that
    is trained on. Its random numbers should come from torch's, Python's or NumPy's global
    generators, which the run seeds and restores."""
    blueprints: tuple[Blueprint, ...] = ()
    """Blueprints of one's own, beside those of the package."""

    def __post_init__(self) -> None:
        require_type(self.name, str, "name of a task")
        require_type(self.num_classes, int, "num_classes", or_none=True)
        for name in ("load", "build_host"):
            require_function(getattr(self, name), name)
        for name in ("criterion", "make_optimizer", "batch", "forward", "augment"):
            require_function(getattr(self, name), name, or_none=True)
        if not self.name or ":" in self.name or "/" in self.name:
            raise ValueError(f"a task's name has no colon and no slash, got {self.name!r}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"num_classes is at least 1, or None where there are none, got {self.num_classes}"
            )


def new_host(task: Task, config: HostConfig) -> Host:
    """The host that a task builds; `TypeError` if it is no `Host`."""
    host = task.build_host(config)
    if not isinstance(host, Host):
        raise TypeError(
            f"task {task.name!r}: expected build_host to return a Host, got a "
            f"{type(host).__name__}; wrap its segments and head in esper_train.Host"
        )
    return host


def registry_of(task: Task, registry: BlueprintRegistry | None = None) -> BlueprintRegistry:
    """The blueprints that a run or a trained network of a task may use: those of `registry`, or
    the package's and the task's own."""
    if registry is not None:
        return registry
    registry = default_registry()
    for blueprint in task.blueprints:
        registry.register(blueprint)
    return registry


def load_splits(task: Task, ignored: int = IGNORED) -> Splits:
    """Load a task's data and check what can be checked before they are read.

    Raises `ValueError` for an empty split, and in tensors for sizes that differ, inputs that are
    not finite, and targets that are neither a class nor `ignored`; `TypeError` for what is no data.
    """
    splits = task.load()
    if not isinstance(splits, Splits):
        raise TypeError(f"task {task.name!r}: expected load to return Splits, got {splits!r:.60}")
    for name in SPLITS:
        where = f"task {task.name!r}, {name} data"
        data = getattr(splits, name)
        if is_pair_of_tensors(data):
            _check_tensors(*data, task.num_classes, ignored, where)
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            _check_dataset(data, where)
        elif not isinstance(data, IterableDataset):
            _check_loader(data, where)
    return splits


def _check_tensors(
    inputs: Tensor, targets: Tensor, classes: int | None, ignored: int, where: str
) -> None:
    if inputs.dim() == 0 or targets.dim() == 0:
        shapes = f"shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"{where}: expected inputs [N, ...] and targets [N, ...], got {shapes}")
    if len(inputs) == 0 or len(inputs) != len(targets):
        sizes = f"{len(inputs)} and {len(targets)}"
        raise ValueError(f"{where}: expected as many inputs as targets, at least one, got {sizes}")
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise ValueError(f"{where}: the inputs have NaN or infinite values")
    if classes is None or targets.is_floating_point():
        return
    bad = torch.cat([_outside(part, classes, ignored) for part in targets.split(CHECKED_ROWS)])
    if len(bad):
        expected = f"targets in [0, {classes}), or {ignored} to be ignored"
        raise ValueError(
            f"{where}: expected {expected}, got {len(bad)} others, the first {int(bad[0])}"
        )
    if not any(bool((part.long() != ignored).any()) for part in targets.split(CHECKED_ROWS)):
        raise ValueError(
            f"{where}: expected targets in [0, {classes}), got {ignored} alone, which is ignored, "
            "so there is nothing to learn or to measure"
        )


def _outside(targets: Tensor, classes: int, ignored: int) -> Tensor:
    """The targets that are neither a class nor ignored."""
    targets = targets.long()  # uint8 would read -100 as 156, and 300 classes as 44
    return targets[((targets < 0) | (targets >= classes)) & (targets != ignored)]


def _check_dataset(data: Any, where: str) -> None:
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"{where}: expected a data set with a length, got {type(data).__name__}; give it "
            "__len__, make it an IterableDataset, or return a loader"
        )
    if len(data) == 0:
        raise ValueError(f"{where}: the data set is empty; expected at least one sample")


def _check_loader(data: Any, where: str) -> None:
    if not hasattr(data, "__iter__") or hasattr(data, "__next__"):
        raise TypeError(
            f"{where}: expected a pair of tensors, a torch Dataset, or a loader that gives its "
            f"batches anew in each epoch, got {type(data).__name__}"
        )
    if isinstance(data, (tuple, list, str, Mapping)) and not _looks_like_batches(data):
        raise TypeError(
            f"{where}: expected a pair of tensors (inputs, targets) or a list of batches, got "
            f"{type(data).__name__}"
        )


def _looks_like_batches(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and not isinstance(data[0], Tensor)
