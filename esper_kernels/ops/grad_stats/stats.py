"""The results of `grad_stats`: `GradStats` on the device, `GradHealth` on the host after its
`compute`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from esper_kernels.readback import compute_all, words_to_floats

_SMALLEST_DIVISOR = 1e-10  # of norm_ratio


@dataclass(frozen=True, kw_only=True)
class GradHealth:
    """Gradient statistics on the host, over the tensors that have elements.

    gradient_norm: L2 norm over all elements.
    gradient_health: 1 (good) to 0: 1 - 0.5 vanishing/tensors - 0.8 exploding/tensors; 0 with any
    NaN or Inf.
    has_vanishing, has_exploding: a tensor's norm is below, or above (or not finite), its threshold.
    min_layer_norm, max_layer_norm: over the tensors, NaN if any is. norm_ratio: max / max(min,
    1e-10).
    zero_grad_fraction: zeros / elements.
    nan_count, inf_count: values of all tensors. tensors, elements: how many were measured.
    groups: for a mapping of gradients, the same by group name.

    Where nothing was measured, because every gradient is None or empty, `tensors` is 0, norms and
    fraction are 0, and health and ratio are 1: a frozen group raises no alarm. Whoever expects
    gradients asks for `tensors` first.
    """

    gradient_norm: float
    gradient_health: float
    has_vanishing: bool
    has_exploding: bool
    min_layer_norm: float
    max_layer_norm: float
    norm_ratio: float
    zero_grad_fraction: float
    nan_count: int
    inf_count: int
    tensors: int
    elements: int
    groups: dict[str, "GradHealth"] = field(default_factory=dict)

    def is_healthy(self, max_norm_ratio: float = 1000.0, max_zero_fraction: float = 0.5) -> bool:
        """No NaN, no Inf, nothing exploding, norm_ratio below max_norm_ratio, and
        zero_grad_fraction below max_zero_fraction."""
        return (
            self.nan_count == 0
            and self.inf_count == 0
            and not self.has_exploding
            and self.norm_ratio < max_norm_ratio
            and self.zero_grad_fraction < max_zero_fraction
        )

    def to_dict(self) -> dict[str, Any]:
        """Every number, also those of the groups, as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class GradStats:
    """Gradient statistics of T tensors on the device, in list order, groups one after the other.

    magnitudes: float64 [2, T], the rows of which are norms and max_abs.
    counts: int64 [3, T], the rows of which are zeros, nans and infs.
    total_norm: float64 [], L2.
    found_inf: float32 [], 1 where any value is NaN or Inf: what a loss scaler calls by that name.
    numels: elements of each tensor, 0 for None and empty ones. groups: name and number of tensors
    of each; empty for a plain list. vanishing, exploding: the thresholds of a norm.
    workspace: what a backend keeps for the next call.
    """

    magnitudes: Tensor
    counts: Tensor
    total_norm: Tensor
    found_inf: Tensor
    numels: tuple[int, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()
    vanishing: float = 0.0
    exploding: float = math.inf
    workspace: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def norms(self) -> Tensor:
        """float64 [T], L2."""
        return self.magnitudes[0]

    @property
    def max_abs(self) -> Tensor:
        """float64 [T]."""
        return self.magnitudes[1]

    @property
    def zeros(self) -> Tensor:
        """int64 [T]."""
        return self.counts[0]

    @property
    def nans(self) -> Tensor:
        """int64 [T]."""
        return self.counts[1]

    @property
    def infs(self) -> Tensor:
        """int64 [T]."""
        return self.counts[2]

    def over(
        self,
        numels: tuple[int, ...],
        groups: tuple[tuple[str, int], ...],
        vanishing: float,
        exploding: float,
    ) -> "GradStats":
        """The same memory as the statistics of other tensors."""
        if (numels, groups, vanishing, exploding) == (
            self.numels,
            self.groups,
            self.vanishing,
            self.exploding,
        ):
            return self
        return replace(self, numels=numels, groups=groups, vanishing=vanishing, exploding=exploding)

    def compute(self) -> GradHealth:
        """Read everything: the only host sync."""
        health: GradHealth = compute_all(self)[0]
        return health

    def pack(self) -> Tensor:
        """The result as the words that `compute_all` reads: int64 [4 T]."""
        return torch.cat([self.norms.view(torch.int64), self.counts.flatten()])

    def unpack(self, words: list[int], strict: bool) -> GradHealth:
        """The result, from the words of `pack` on the host. `strict` has no effect here."""
        n = len(self.numels)
        norms = words_to_floats(words[:n])
        rows = list(
            zip(
                norms,
                words[n : 2 * n],
                words[2 * n : 3 * n],
                words[3 * n :],
                self.numels,
                strict=True,
            )
        )
        groups = {}
        start = 0
        for name, size in self.groups:
            groups[name] = self._health(rows[start : start + size], {})
            start += size
        return self._health(rows, groups)

    def _health(
        self, rows: Sequence[tuple[float, int, int, int, int]], groups: dict[str, GradHealth]
    ) -> GradHealth:
        rows = [row for row in rows if row[-1]]  # None and empty tensors were not measured
        norms, zeros, nans, infs, numels = zip(*rows, strict=True) if rows else [()] * 5
        unknown = any(map(math.isnan, norms))  # min, max and hypot would hide a NaN
        smallest = math.nan if unknown else min(norms, default=0.0)
        largest = math.nan if unknown else max(norms, default=0.0)
        vanishing = sum(norm < self.vanishing for norm in norms)
        exploding = sum(norm > self.exploding or not math.isfinite(norm) for norm in norms)
        damage = (0.5 * vanishing + 0.8 * exploding) / max(len(rows), 1)
        return GradHealth(
            gradient_norm=math.nan if unknown else math.hypot(*norms),
            gradient_health=0.0 if any(nans) or any(infs) else max(0.0, 1 - damage),
            has_vanishing=vanishing > 0,
            has_exploding=exploding > 0,
            min_layer_norm=smallest,
            max_layer_norm=largest,
            norm_ratio=largest / max(smallest, _SMALLEST_DIVISOR) if rows else 1.0,
            zero_grad_fraction=sum(zeros) / max(sum(numels), 1),
            nan_count=sum(nans),
            inf_count=sum(infs),
            tensors=len(rows),
            elements=sum(numels),
            groups=groups,
        )
