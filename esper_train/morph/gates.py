"""Quality gates: what a seed that trains must show before it enters a stage. Pure functions of a slot's state.

A measurement that was not made fails its check by name; it is never read as 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

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


def judge(stage: SeedStage, state: SlotState, growth: GrowthConfig, max_epochs: int) -> GateResult:
    """What the gate in front of `stage` says of a slot in a run of `max_epochs`; `stage` is one of `GATES`."""
    checks: list[tuple[bool, str]] = []
    match stage:
        case SeedStage.BLENDING:
            epochs = max(growth.blending_min_epochs, growth.training_dwell(max_epochs))
            # without parameters there is no gradient to measure
            ratio = state.gradient_ratio if state.seed_parameters > 0 else math.inf
            checks = [
                _at_least("epochs in TRAINING", state.epochs_in_stage, epochs),
                _at_least("improvement", state.improvement, growth.blending_improvement),
                _at_least("gradient ratio", ratio, growth.blending_gradient_ratio),
            ]
        case SeedStage.PROBATIONARY:
            checks = [
                _at_least("epochs in BLENDING", state.epochs_in_stage, growth.probation_min_epochs),
                _at_least("alpha", state.alpha, growth.probation_alpha),
            ]
        case SeedStage.FOSSILIZED:
            checks = [_at_least("contribution", state.contribution, growth.fossilize_contribution)]
    return GateResult(gate=GATES[stage], failures=tuple(message for passed, message in checks if not passed))


def gradient_ratio(grad: GradHealth | None, slot: str) -> float | None:
    """Gradient norm of a slot's seed over that of the host, as if both had as many parameters; at most 10.

    None where either was not measured or is not finite, or where the host has no gradient to compare with.
    """
    if grad is None or not {slot, "host"} <= set(grad.groups):
        return None
    seed, host = grad.groups[slot], grad.groups["host"]
    if seed.elements == 0 or not (math.isfinite(seed.gradient_norm) and 1e-8 <= host.gradient_norm < math.inf):
        return None
    return min(10.0, seed.gradient_norm / host.gradient_norm * math.sqrt(host.elements / seed.elements))


def _at_least(what: str, value: float | None, least: float) -> tuple[bool, str]:
    if value is None:
        return False, f"{what} was not measured"
    return value >= least, f"{what} {value:.4g} is below {least:.4g}"
