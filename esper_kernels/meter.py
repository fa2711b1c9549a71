"""`Meter`: loss and counts of many batches, kept on the device until `compute` reads them.

The cross-entropy backends add to `sums` and `counts` batch by batch, compiled or not; otherwise
only `reset`, `load_state_dict` and `all_reduce` write them. Use a meter on one stream.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper_kernels.backends import DEVICES_WITHOUT_FLOAT64
from esper_kernels.readback import compute_all, words_to_floats

# The layout every backend writes. Correct@k follows the last count, for each k of `Meter.topk` in
# order.
SUMS = ("loss_sum", "weight_sum", "batch_mean_sum")
COUNTS = ("valid", "ignored", "nonfinite", "bad_targets", "batches", "batches_with_valid")
_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class MeterResult:
    """What a `Meter` saw. A mean over nothing is NaN. Rows are targets; losses are in nats.

    loss: loss_sum / (class weights of the valid rows summed; without class weights the valid rows;
        with MixUp the weights of both targets times their shares).
    loss_sum: row losses of valid rows as `cross_entropy` defines them, whatever the reduction or
    normalizer.
    mean_batch_loss: the mean of loss over batches that had a valid row.
    accuracy: fraction (0..1) of valid rows whose target is the first largest logit.
    correct: for each k, the valid rows whose target is among the k largest logits.
    valid, ignored, nonfinite, bad_targets: rows of each class; nonfinite rows are valid too.
    batches: calls, empty ones included.
    """

    loss: float
    loss_sum: float
    mean_batch_loss: float
    accuracy: float
    correct: dict[int, int]
    valid: int
    ignored: int
    nonfinite: int
    bad_targets: int
    batches: int

    @property
    def perplexity(self) -> float:
        """e^loss: infinite where that exceeds a float."""
        return math.exp(self.loss) if not self.loss > _LARGEST_EXPONENT else math.inf

    def accuracy_at(self, k: int) -> float:
        """Fraction (0..1) of valid rows whose target is among the k largest logits. ValueError for
        a k that the meter did not count."""
        if k not in self.correct:
            raise ValueError(
                f"k must be one of {list(self.correct)}, which the meter counted, got {k}; make it "
                f"Meter(device, topk=(1, {k}))"
            )
        return _ratio(self.correct[k], self.valid)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


class Meter:
    """Device accumulators for an epoch.

    device: where the logits are. A device without float64 raises ValueError.
    topk: the k of correct@k, positive integers, 1 always among them; a k may exceed the number of
    classes.

    A meter counts calls: inside `torch.utils.checkpoint`, which runs its function again in
    backward, a batch is counted twice. Compute the loss outside of the checkpointed function.

    Attributes: device, topk (sorted), sums (float64, see SUMS), counts (int64, see COUNTS).
    """

    def __init__(self, device: torch.device | str, *, topk: Sequence[int] = (1,)) -> None:
        device = torch.device(device)
        if device.type in DEVICES_WITHOUT_FLOAT64:
            raise ValueError(
                f"a Meter sums in float64, which {device.type!r} lacks; keep the metrics on the "
                "CPU there"
            )
        if not isinstance(topk, Sequence) or not all(type(k) is int for k in topk):
            raise TypeError(f"topk must be a sequence of integers, got {topk!r}")
        if not all(0 < k < 2**63 for k in topk):
            raise ValueError(f"topk must hold positive integers, got {tuple(topk)}")
        self._topk = tuple(sorted({1, *topk}))
        # a meter made inside inference mode must work outside of it
        with torch.inference_mode(False):
            self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
            self.counts = torch.zeros(
                len(COUNTS) + len(self._topk), dtype=torch.int64, device=device
            )
            self.ticket = torch.zeros(1, dtype=torch.int32, device=device)  # 0 between launches
        self.device = self.sums.device  # "cuda" has become "cuda:0"

    @property
    def topk(self) -> tuple[int, ...]:
        """The k of correct@k, sorted; fixed, because `counts` has a place for each."""
        return self._topk

    def reset(self) -> None:
        """Forget every batch."""
        self.sums.zero_()
        self.counts.zero_()

    def compute(self, strict: bool = True) -> MeterResult:
        """Read everything: the only host sync. strict: IndexError where targets were outside [0,
        V)."""
        result: MeterResult = compute_all(self, strict=strict)[0]
        return result

    def on_device(self) -> dict[str, Tensor]:
        """Each count as an int64 [] view on the device, without a sync: "valid", "ignored", ...,
        "correct@1", ..."""
        names = (*COUNTS, *(f"correct@{k}" for k in self.topk))
        return dict(zip(names, self.counts.unbind(), strict=True))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the meters of all ranks, in place on each: once, before `compute`. One collective,
        in which counts travel as float64, exact up to 2^53."""
        both = torch.cat([self.sums, self.counts.double()])
        dist.all_reduce(both, group=group)
        self.sums.copy_(both[: len(SUMS)])
        self.counts.copy_(both[len(SUMS) :])

    def state_dict(self) -> dict[str, Any]:
        """Copies of the accumulators and the list of k; `torch.load(weights_only=True)` reads it
        back."""
        return {"topk": list(self.topk), "sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, from any device. ValueError for another topk or for
        tensors of another shape or dtype."""
        if tuple(state["topk"]) != self.topk:
            raise ValueError(
                f"expected the state of a Meter with topk {self.topk}, got topk "
                f"{tuple(state['topk'])}"
            )
        names = ("sums", "counts")
        for name in names:
            own = getattr(self, name)
            x = state[name]
            if not isinstance(x, Tensor) or (x.shape, x.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"expected {name} to be a {own.dtype} tensor of shape {tuple(own.shape)}, got "
                    f"{x!r:.80}"
                )
        for name in names:
            getattr(self, name).copy_(state[name])

    def pack(self) -> Tensor:
        return torch.cat([self.sums.view(torch.int64), self.counts])

    def unpack(self, words: list[int], strict: bool) -> MeterResult:
        loss_sum, weight_sum, batch_mean_sum = words_to_floats(words[: len(SUMS)])
        counts = dict(zip(COUNTS, words[len(SUMS) :], strict=False))
        batches_with_valid = counts.pop("batches_with_valid")  # the others are fields of the result
        if strict and counts["bad_targets"]:
            raise IndexError(
                f"{counts['bad_targets']} targets were neither in [0, number of classes) nor "
                "ignore_index; correct the data, or read the other rows with compute(strict=False)"
            )
        correct = dict(zip(self.topk, words[len(SUMS) + len(COUNTS) :], strict=True))
        return MeterResult(
            loss=_ratio(loss_sum, weight_sum),
            loss_sum=loss_sum,
            mean_batch_loss=_ratio(batch_mean_sum, batches_with_valid),
            accuracy=_ratio(correct[1], counts["valid"]),
            correct=correct,
            **counts,
        )
