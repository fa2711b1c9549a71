"""Faults that the governor finds in the losses, and its settings."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from esper_train import GovernorConfig, GradConfig, TrainConfig
from esper_train.control.governor import Governor
from esper_train.run.build import build_episode
from tests.helpers.bad_numbers import SHORT


def judged(*losses: float, guess: float = math.log(10), **changes: Any) -> list[str | None]:
    """Kinds of finding, epoch by epoch."""
    governor = Governor(replace(GovernorConfig(patience=1), **changes), guess)
    found = [governor.check(training=0.5, validation=loss) for loss in losses]
    return [None if finding is None else finding.kind for finding in found]


def test_a_loss_far_above_its_own_history_and_above_a_guess_diverged() -> None:
    """Mean 1.2, deviation 0: more than 3 times that, and than the guess's 2.303, is needed."""
    calm = (1.2,) * 5
    assert judged(*calm, 3.7) == [None] * 5 + ["divergence"]
    assert judged(*calm, 3.5) == [None] * 6
    assert judged(*(0.1,) * 5, 2.0) == [None] * 6  # 20 times the mean, but better than guessing
    assert judged(*(0.1,) * 5, 2.5) == [None] * 5 + ["divergence"]


def test_a_loss_that_always_varied_needs_more_to_diverge() -> None:
    """Mean 2, population deviation sqrt(2): 2 + 6 sqrt(2) = 10.49."""
    varied = (0.0, 1.0, 2.0, 3.0, 4.0)
    assert judged(*varied, 10.4) == [None] * 6
    assert judged(*varied, 10.6) == [None] * 5 + ["divergence"]


def test_a_loss_that_falls_back_to_a_guess_collapsed() -> None:
    learned = (1.0,) * 5
    assert judged(*learned, 2.303) == [None] * 5 + ["collapse"]
    assert judged(*learned, 2.45) == [None] * 5 + ["collapse"]  # within 6.5 % of ln 10
    assert judged(*learned, 2.46) == [None] * 6
    assert judged(*learned, 4.605, guess=math.log(100), multiplier=10.0)[-1] == "collapse"
    assert judged(*(1.5,) * 5, 2.303) == [None] * 6  # had not learned: 1.5 is above .6 ln 10


@pytest.mark.parametrize(
    "losses", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)]
)
def test_a_loss_that_is_not_finite_is_found_at_once(losses: tuple[float, float]) -> None:
    finding = Governor(GovernorConfig(), math.log(10)).check(
        training=losses[0], validation=losses[1]
    )
    assert finding is not None
    assert finding.kind == "nonfinite"
    assert f"training {losses[0]}, validation {losses[1]}" in finding.message


def test_no_comparison_before_there_is_a_history() -> None:
    assert judged(*(0.1,) * 4, 100.0) == [None] * 5
    assert judged(0.1, 0.1, 100.0, min_history=2)[-1] == "divergence"


def test_patience_counts_suspicious_epochs_in_a_row() -> None:
    calm = (0.1,) * 5
    assert judged(*calm, 9.0, 9.0, 0.1, 9.0, 9.0, 9.0, patience=3) == [None] * 10 + ["divergence"]


def test_suspicious_epochs_do_not_spoil_the_history() -> None:
    """If 9.0 entered the history, the mean would rise above 3, and 9.0 would be no divergence."""
    assert judged(*(0.1,) * 5, *(9.0,) * 20) == [None] * 5 + ["divergence"] * 20


def test_the_history_is_a_window() -> None:
    """The old losses of 100 leave the window; 7 then diverges from the last ten, which are 1."""
    losses = (100.0,) * 5 + (1.0,) * 10 + (7.0,)
    assert judged(*losses, window=10)[-1] == "divergence"
    assert judged(*losses, window=20)[-1] is None


def test_a_governor_goes_on_from_its_state() -> None:
    """The restored state holds three suspicious epochs and the history, so that the fourth of four
    is a finding."""
    config = GovernorConfig(patience=4)
    first, second = (Governor(config, math.log(10)) for _ in range(2))
    for loss in (*(0.1,) * 5, *(9.0,) * 3):
        assert first.check(training=0.5, validation=loss) is None
    first.rollbacks = 2
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = second.check(training=0.5, validation=9.0)
    assert found is not None
    assert (found.kind, second.rollbacks) == ("divergence", 2)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of warn, skip, stop, rollback, got 'ignore'"):
        TrainConfig(on_bad_numbers="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'skip' needs train.grad.every = 1, got 2"):
        TrainConfig(on_bad_numbers="skip", grad=GradConfig(every=2))
    with pytest.raises(ValueError, match=r"governor\.patience must be at least 1, got 0"):
        GovernorConfig(patience=0)
    with pytest.raises(ValueError, match="min_history must not exceed window, got 30"):
        GovernorConfig(min_history=30)
    with pytest.raises(ValueError, match="'cuda:99' does not exist here"):
        build_episode(replace(SHORT, governor=GovernorConfig(snapshot_device="cuda:99")), slots=())
