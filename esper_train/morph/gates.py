"""Quality gates: what a seed must show before it enters a stage. Pure functions of a slot's state.

A measurement that was not made fails its check by name; it is never read as 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from esper_kernels import GradHealth
from esper_train.morph.config import GrowthConfig
from esper_train.morph.lifecycle import SeedStage, SlotState


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Verdict of a gate; `failures` says in words what was missing."""

    gate: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


GATES: Mapping[SeedStage, str] = {
    SeedStage.BLENDING: "G2",
    SeedStage.PROBATIONARY: "G3",
    SeedStage.FOSSILIZED: "G5",
}
"""The gate in front of each stage; other stages are entered freely."""


def judge(stage: SeedStage, state: SlotState, growth: GrowthConfig) -> GateResult:
    """The verdict on a slot of the gate before `stage`, which is one of `GATES`."""
    match stage:
        case SeedStage.BLENDING:
            checks = _blending(state, growth)
        case SeedStage.PROBATIONARY:
            checks = [
                _at_least("epochs in BLENDING", state.epochs_in_stage, growth.probation_min_epochs),
                _at_least("alpha", state.alpha, growth.probation_alpha),
            ]
        case SeedStage.FOSSILIZED:
            checks = _fossilizing(state, growth)
        case _:
            raise ValueError(f"there is no gate in front of {stage.name}")
    failures = tuple(message for passed, message in checks if not passed)
    return GateResult(gate=GATES[stage], failures=failures)


def _blending(state: SlotState, growth: GrowthConfig) -> list[tuple[bool, str]]:
    """Would the seed clearly harm a network that has not adapted to it?

    The gate asks no more, because no threshold separated seeds that help from others on held-out
    rows (`python -m benchmarks gate`). Whether a seed helps is G5's question.
    """
    checks = [_at_least("epochs in TRAINING", state.epochs_in_stage, growth.training_min_epochs)]
    if growth.incubation == "straight_through":
        return checks  # a seed that has no effect yet has no potential, so only G5 judges it
    if len(state.potentials) < growth.window:
        measured = len(state.potentials)
        window = growth.window
        return [*checks, (False, f"potential was measured in {measured} of {window} epochs")]
    gain, loss = (fmean(values) for values in zip(*state.potentials, strict=True))
    most = growth.blending_loss_change
    checks.append(_at_least("potential", gain, growth.blending_potential))
    # not the reverse comparison: NaN passes neither
    checks.append((loss < most, f"potential loss {loss:+.4g} is not below {most:.4g}"))
    return checks


def _fossilizing(state: SlotState, growth: GrowthConfig) -> list[tuple[bool, str]]:
    """The checks that the network is no worse than before blending, and that the seed has a part
    in that."""
    if len(state.accuracies) < growth.window:
        epochs = len(state.accuracies)
        window = growth.window
        return [(False, f"{epochs} of {window} epochs on probation are over")]
    contribution = fmean(state.contributions) if state.contributions else None
    checks = [_at_least("mean contribution", contribution, growth.fossilize_contribution)]
    if state.accuracy_before is None or state.tolerance is None:
        return [*checks, (False, "the accuracy before blending was not measured")]
    least = state.accuracy_before - growth.fossilize_errors * state.tolerance
    checks.append(_at_least("mean accuracy", fmean(state.accuracies), least))
    return checks


def paired_error(gained: int, lost: int, rows: int) -> float:
    """Standard error in percentage points of the difference between two accuracies on the same
    rows: `gained` are right in the second alone and `lost` in the first alone, of `rows`.

    The square root of the discordant pairs, as in McNemar's test.
    """
    return 100.0 * math.sqrt(gained + lost) / rows


def gradient_ratio(grad: GradHealth | None, seed: GradHealth | None) -> float | None:
    """Gradient norm of a seed over that of the host, as if both had as many parameters; at most 10.

    None where either was not measured or is not finite, or where the host has no gradient to
    compare with.
    """
    if grad is None or seed is None or "host" not in grad.groups:
        return None
    host = grad.groups["host"]
    if seed.elements == 0 or not (
        math.isfinite(seed.gradient_norm) and 1e-8 <= host.gradient_norm < math.inf
    ):
        return None
    return min(
        10.0, seed.gradient_norm / host.gradient_norm * math.sqrt(host.elements / seed.elements)
    )


def _at_least(what: str, value: float | None, least: float) -> tuple[bool, str]:
    if value is None:
        return False, f"{what} was not measured"
    return value >= least, f"{what} {value:.4g} is below {least:.4g}"
