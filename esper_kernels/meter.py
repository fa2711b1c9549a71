"""`Meter`: loss and counts of many batches, kept on the device until `compute` reads them.

The cross-entropy backends add to `sums` and `counts` batch by batch, compiled or not; otherwise
only `reset`, `load_state_dict` and `all_reduce` write them. Use a meter on one stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper_kernels.backends import DEVICES_WITHOUT_FLOAT64
from esper_kernels.measures import (
    Measured,
    MeasurePlan,
    exponential,
    measured_of,
    plan_measures,
    ratio,
)
from esper_kernels.places import check_group, device_of
from esper_kernels.readback import compute_all, words_to_floats

# The layout every backend writes. Correct@k follows the last count, for each k of `Meter.topk` in
# order; then come the sums and counts of `esper_kernels.measures`.
SUMS = ("loss_sum", "weight_sum", "batch_mean_sum")
COUNTS = ("valid", "ignored", "nonfinite", "bad_targets", "batches", "batches_with_valid")


@dataclass(frozen=True, kw_only=True)
class MeterResult(Measured):
    """The totals that a `Meter` counted. A mean over nothing is NaN. Rows are targets; losses are
    in nats. The fields of `Measured` are None unless the meter takes those measures.

    loss: loss_sum / (class weights of the valid rows summed; without class weights the valid rows;
        with MixUp the weights of both targets times their shares).
    loss_sum: row losses of valid rows as `cross_entropy` defines them, whatever the reduction or
    normalizer.
    mean_batch_loss: the mean of loss over batches that had a valid row.
    accuracy: fraction (0..1) of valid rows whose target is the first largest logit.
    correct: for each k, the valid rows whose target is among the k largest logits.
    valid, ignored, nonfinite, bad_targets: rows of each kind; nonfinite rows are valid too.
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
        """e^nll where that is measured, else e^loss, which is the same without class weights, label
        smoothing, z-loss and MixUp. Infinite where it exceeds a float."""
        return exponential(self.loss if self.nll is None else self.nll)

    def accuracy_at(self, k: int) -> float:
        """Fraction (0..1) of valid rows whose target is among the k largest logits. ValueError for
        a k that the meter did not count."""
        if type(k) is not int or k not in self.correct:
            raise ValueError(
                f"k must be one of {list(self.correct)}, which the meter counted, got {k}; make it "
                f"Meter(device, topk=(1, {k}))"
            )
        return ratio(self.correct[k], self.valid)


class Meter:
    """Device accumulators for an epoch.

    device: where the logits are. A device without float64 raises ValueError.
    topk: the k of correct@k, positive integers, 1 always among them; a k may exceed the number of
    classes.
    per_class: the number of classes, to count rows by class; logits must have as many. confusion:
    count them in a confusion matrix, for at most 1,024 classes.
    calibration_bins: the number of bins of the largest probability, for calibration errors, the
    Brier score and the negative log-likelihood.
    entropy: measure the entropy of predictions, the negative log-likelihood and the margin of the
    largest logit.
    `esper_kernels.measures` defines these; 0 or False leaves them out, and then they cost nothing.

    A meter counts calls: inside `torch.utils.checkpoint`, which runs its function again in
    backward, a batch is counted twice. Compute the loss outside of the checkpointed function.

    Attributes: device, topk (sorted), measures (None, or the plan of what it measures besides),
    sums (float64, see SUMS), counts (int64, see COUNTS).
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        topk: Sequence[int] = (1,),
        per_class: int = 0,
        calibration_bins: int = 0,
        entropy: bool = False,
        confusion: bool = False,
    ) -> None:
        device = device_of(device)
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
        self._measures = plan_measures(per_class, calibration_bins, entropy, confusion)
        # a meter made inside inference mode must work outside of it
        with torch.inference_mode(False):
            self.sums = torch.zeros(self.num_sums, dtype=torch.float64, device=device)
            self.counts = torch.zeros(self.num_counts, dtype=torch.int64, device=device)
            self.ticket = torch.zeros(1, dtype=torch.int32, device=device)  # 0 between launches
        self._shared: tuple[Tensor, Tensor] | None = None  # sums, counts that all ranks have
        self._ranks: tuple[int, ...] | None = None  # those that all_reduce added up, where known
        self.device = self.sums.device  # "cuda" has become "cuda:0"

    @property
    def topk(self) -> tuple[int, ...]:
        """The k of correct@k, sorted; fixed, because `counts` has a place for each."""
        return self._topk

    @property
    def measures(self) -> MeasurePlan | None:
        """The measures besides loss and correct predictions, or None. They are fixed, as `topk`
        is."""
        return self._measures

    @property
    def num_sums(self) -> int:
        """The length of `sums`."""
        return len(SUMS) + (self._measures.num_sums if self._measures else 0)

    @property
    def num_counts(self) -> int:
        """The length of `counts`."""
        return self._first_measure + (self._measures.num_counts if self._measures else 0)

    @property
    def _first_measure(self) -> int:
        return len(COUNTS) + len(self._topk)

    def measure_accumulators(self) -> tuple[Tensor, Tensor]:
        """The parts of `sums` and of `counts` in which the measures are accumulated."""
        return self.sums[len(SUMS) :], self.counts[self._first_measure :]

    def empty_copy(self) -> "Meter":
        """A meter of the same arguments that has seen nothing."""
        return meter_of(self.device, self._topk, self._measures)

    def reset(self) -> None:
        """Forget every batch."""
        self.sums.zero_()
        self.counts.zero_()
        self._shared = self._ranks = None

    def to(self, device: torch.device | str) -> "Meter":
        """Move what was counted to another device, in place, and return the meter, as
        `nn.Module.to` does. ValueError for a device without float64."""
        device = Meter(device).device
        with torch.inference_mode(False):
            self.sums = self.sums.to(device)
            self.counts = self.counts.to(device)
            self.ticket = self.ticket.to(device)
            if self._shared is not None:
                self._shared = (self._shared[0].to(device), self._shared[1].to(device))
        self.device = device
        return self

    def __repr__(self) -> str:
        """The device and the arguments. Counts are left out, because reading them would be a host
        sync."""
        plan = {} if self._measures is None else self._measures._asdict()
        plan |= {name: bool(plan[name]) for name in ("entropy", "confusion") if name in plan}
        options = "".join(f", {name}={value}" for name, value in plan.items() if value)
        return f"Meter(device={str(self.device)!r}, topk={self.topk}{options})"

    def compute(self, strict: bool = True) -> MeterResult:
        """Read everything: the only host sync. strict: IndexError where targets were outside [0,
        V)."""
        result: MeterResult = compute_all(self, strict=strict)[0]
        return result

    def on_device(self) -> dict[str, Tensor]:
        """Each count as an int64 [] view on the device, without a sync: "valid", "ignored", ...,
        "correct@1", ..."""
        names = (*COUNTS, *(f"correct@{k}" for k in self.topk))
        return dict(zip(names, self.counts[: len(names)].unbind(), strict=True))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the meters of all ranks of a group (None: of all ranks), in place on each, before
        `compute`. One collective, in which counts travel as float64, exact up to 2^53.

        Called again, it adds what each rank has counted since, and nothing twice. ValueError for
        another group before `reset`: it is unknown which of its ranks share what they hold.
        """
        check_group(group)
        ranks = tuple(dist.get_process_group_ranks(group))
        if self._ranks not in (None, ranks):
            raise ValueError(
                f"expected the group of ranks {self._ranks}, which this meter has added up, got "
                f"ranks {ranks}; reset it first, or add up once, over one group of all ranks"
            )
        with torch.inference_mode(False):
            own_sums, own_counts = self.sums, self.counts
            if self._shared is not None:
                sums, counts = self._shared
                own_sums = torch.where(own_sums == sums, 0.0, own_sums - sums)  # inf - inf is NaN
                own_counts = own_counts - counts
            both = torch.cat([own_sums, own_counts.double()])
            dist.all_reduce(both, group=group)
            sums, counts = both[: self.num_sums], both[self.num_sums :].long()
            if self._shared is not None:
                sums, counts = self._shared[0] + sums, self._shared[1] + counts
            self.sums.copy_(sums)
            self.counts.copy_(counts)
            self._shared = (sums, counts)
        self._ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """Copies of the accumulators, the part of them that `all_reduce` added up, the list of k
        and the measures; `torch.load(weights_only=True)` reads it back."""
        sums, counts = self._shared or (self.sums.new_zeros(()), self.counts.new_zeros(()))
        return {
            "topk": list(self.topk),
            "measures": list(self._measures or ()),
            "sums": self.sums.clone(),
            "counts": self.counts.clone(),
            "shared_sums": sums.expand_as(self.sums).clone(),
            "shared_counts": counts.expand_as(self.counts).clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, from any device. ValueError for another topk, other
        measures, tensors of another shape or dtype, or a state of something else.

        The state of one rank, saved after `all_reduce`, may be loaded on all: what it added up then
        counts once.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"expected what Meter.state_dict returned, got {state!r:.80}")
        if missing := {"topk", "sums", "counts"} - set(state):
            raise ValueError(
                f"expected what Meter.state_dict returned, got a dict without {sorted(missing)}"
            )
        if tuple(state["topk"]) != self.topk:
            raise ValueError(
                f"expected the state of a Meter with topk {self.topk}, got topk "
                f"{tuple(state['topk'])}"
            )
        measures = state.get("measures", [])  # older states have none
        if tuple(measures) != tuple(self._measures or ()):
            raise ValueError(
                "expected the state of a Meter with the same measures (per_class, "
                f"calibration_bins, entropy, confusion): {list(self._measures or ())}, got "
                f"{list(measures)}"
            )
        names = ["sums", "counts"]
        shared = ["shared_sums", "shared_counts"] if "shared_sums" in state else []  # older ones
        for name in names + shared:
            own = getattr(self, name.removeprefix("shared_"))
            x = state[name]
            if not isinstance(x, Tensor) or (x.shape, x.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"expected {name} to be a {own.dtype} tensor of shape {tuple(own.shape)}, got "
                    f"{x!r:.80}"
                )
        for name in names:
            getattr(self, name).copy_(state[name])
        self._shared = self._ranks = None
        if shared:
            sums, counts = (state[name].to(self.device, copy=True) for name in shared)
            self._shared = (sums, counts)

    def pack(self) -> Tensor:
        """Sums and counts as the words that `compute_all` reads: int64 [num_sums + num_counts]."""
        return torch.cat([self.sums.view(torch.int64), self.counts])

    def unpack(self, words: list[int], strict: bool) -> MeterResult:
        """The result, from the words of `pack` on the host; `strict` as for `compute`."""
        sums = words_to_floats(words[: self.num_sums])
        loss_sum, weight_sum, batch_mean_sum = sums[: len(SUMS)]
        all_counts = words[self.num_sums :]
        counts = dict(zip(COUNTS, all_counts, strict=False))
        batches_with_valid = counts.pop("batches_with_valid")  # the others are fields of the result
        if strict and counts["bad_targets"]:
            raise IndexError(
                f"{counts['bad_targets']} targets were neither in [0, number of classes) nor "
                "ignore_index; correct the data, or read the other rows with compute(strict=False)"
            )
        correct = dict(zip(self.topk, all_counts[len(COUNTS) :], strict=False))
        measured = measured_of(
            self._measures,
            sums[len(SUMS) :],
            all_counts[self._first_measure :],
            counts["valid"] - counts["nonfinite"],
        )
        return MeterResult(
            loss=ratio(loss_sum, weight_sum),
            loss_sum=loss_sum,
            mean_batch_loss=ratio(batch_mean_sum, batches_with_valid),
            accuracy=ratio(correct[1], counts["valid"]),
            correct=correct,
            **counts,
            per_class=measured.per_class,
            confusion=measured.confusion,
            calibration=measured.calibration,
            nll=measured.nll,
            entropy=measured.entropy,
            margin=measured.margin,
        )


def meter_of(device: torch.device, topk: Sequence[int], measures: Sequence[int] | None) -> Meter:
    """An empty meter. measures: the numbers of a `MeasurePlan`; None or empty for no measures."""
    if not measures:
        return Meter(device, topk=topk)
    per_class, calibration_bins, entropy, confusion = measures
    return Meter(
        device,
        topk=topk,
        per_class=per_class,
        calibration_bins=calibration_bins,
        entropy=bool(entropy),
        confusion=bool(confusion),
    )
