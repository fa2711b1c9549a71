"""Requests to a slot: which are refused, and that no sequence of them corrupts it."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from esper_train.morph.blueprints import Blueprint
from esper_train.morph.lifecycle import LIVE, SeedStage, StageChange
from tests.helpers.slots import (
    AFFINE,
    NOTHING,
    SEATED,
    empty_slot,
    features,
    observe,
    slot_in,
    snapshot,
)

REQUESTS = {
    "germinate": lambda slot: slot.germinate(AFFINE, "s1"),
    "fossilize": lambda slot: slot.fossilize(),
    "cull": lambda slot: slot.cull("requested"),
}
TARGET = {"germinate": "GERMINATED", "fossilize": "FOSSILIZED", "cull": "CULLED"}
LEGAL = {
    ("germinate", "DORMANT"),
    ("fossilize", "PROBATIONARY"),
    ("cull", "GERMINATED"),
    ("cull", "TRAINING"),
    ("cull", "BLENDING"),
    ("cull", "PROBATIONARY"),
}


@pytest.mark.parametrize(
    ("request_name", "stage"),
    [(name, stage) for name in REQUESTS for stage in SeedStage if (name, stage.name) not in LEGAL],
)
def test_requests_out_of_their_stage_are_refused_and_change_nothing(
    request_name: str, stage: SeedStage
) -> None:
    slot = slot_in(stage, alpha=0.75, contribution=9.0)
    before = snapshot(slot)
    message = rf"slot 'mid' cannot go from {stage.name} to {TARGET[request_name]}; legal: "
    with pytest.raises(ValueError, match=message):
        REQUESTS[request_name](slot)
    assert snapshot(slot) == before


@pytest.mark.parametrize(
    ("contribution", "reason"),
    [
        (None, "mean contribution was not measured"),
        (0.25, r"mean contribution 0\.25 is below 0\.5"),
    ],
)
def test_fossilize_is_refused_by_its_gate_and_changes_nothing(
    contribution: float | None, reason: str
) -> None:
    slot = slot_in(SeedStage.PROBATIONARY, contribution=contribution, on_fossilize="freeze")
    before = snapshot(slot)
    with pytest.raises(ValueError, match=rf"slot 'mid': G5 refuses: {reason}"):
        slot.fossilize()
    assert snapshot(slot) == before


def test_germinate_refuses_an_unknown_blend_and_changes_nothing() -> None:
    slot = slot_in(SeedStage.DORMANT)
    before = snapshot(slot)
    with pytest.raises(ValueError, match=r"unknown blend 'liner'; perhaps 'linear'"):
        slot.germinate(AFFINE, "s0", "liner")
    assert snapshot(slot) == before


def test_germinate_refuses_an_empty_id_and_changes_nothing() -> None:
    slot = slot_in(SeedStage.DORMANT)
    before = snapshot(slot)
    with pytest.raises(
        ValueError, match="slot 'mid': a seed needs an id that is not empty, got ''"
    ):
        slot.germinate(AFFINE, "")
    assert snapshot(slot) == before


def test_germinate_changes_nothing_when_the_blueprint_cannot_be_built() -> None:
    def broken(channels: int) -> nn.Module:
        raise ValueError(f"no seed for {channels} channels")

    slot = slot_in(SeedStage.DORMANT)
    before = snapshot(slot)
    with pytest.raises(ValueError, match="no seed for 3 channels"):
        slot.germinate(Blueprint("broken", "cnn", broken), "s0")
    assert snapshot(slot) == before


# any order of requests

EDGES = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("TRAINING", "BLENDING"),
    ("BLENDING", "PROBATIONARY"),
    ("PROBATIONARY", "FOSSILIZED"),
    ("GERMINATED", "CULLED"),
    ("TRAINING", "CULLED"),
    ("BLENDING", "CULLED"),
    ("PROBATIONARY", "CULLED"),
    ("CULLED", "EMBARGOED"),
    ("EMBARGOED", "DORMANT"),
}


class SlotMachine(RuleBasedStateMachine):
    """Random requests, legal and not, on one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.slot = empty_slot(
            window=1,
            training_timeout=4,
            training_min_epochs=1,
            blending_potential=-100.0,
            blending_epochs=2,
            blending_cost=1000.0,
            harm=1000.0,
            probation_min_epochs=1,
            fossilize_errors=1000.0,
            embargo_epochs=2,
        )
        self.accuracy = 40.0
        self.seeds = 0

    def request(self, name: str, make: Any) -> None:
        """Ask for something; it is granted along legal edges, or refused and changes nothing."""
        before = snapshot(self.slot)
        stage = self.slot.state.stage.name
        try:
            changes = make()
        except ValueError:
            granted = (name, stage) in LEGAL and name != "fossilize"
            assert not granted, f"{name} was refused in {stage}"
            assert snapshot(self.slot) == before
            return
        assert (name, stage) in LEGAL
        self.follow(changes, stage)

    def follow(self, changes: list[StageChange], stage: str) -> None:
        for change in changes:
            assert change.before.stage.name == stage
            assert (stage, change.stage.name) in EDGES
            assert change.reason
            stage = change.stage.name
        assert self.slot.state.stage.name == stage

    @rule(
        blueprint=st.sampled_from([AFFINE, NOTHING]),
        blend=st.sampled_from(["linear", "sigmoid", "cubic"]),
    )
    def germinate(self, blueprint: Blueprint, blend: str) -> None:
        self.seeds += 1
        if blend == "cubic":
            before = snapshot(self.slot)
            with pytest.raises(ValueError, match=r"unknown blend|cannot go from"):
                self.slot.germinate(blueprint, f"s{self.seeds}", blend)
            assert snapshot(self.slot) == before
        else:
            self.request(
                "germinate", lambda: self.slot.germinate(blueprint, f"s{self.seeds}", blend)
            )

    @rule()
    def cull(self) -> None:
        self.request("cull", lambda: self.slot.cull("requested"))

    @rule()
    def fossilize(self) -> None:
        self.request("fossilize", self.slot.fossilize)

    @rule(
        rise=st.sampled_from([-3.0, 0.0, 1.0]),
        contribution=st.sampled_from([None, -1.0, 0.0, 0.5, 1.0, 5.0]),
        ratio=st.sampled_from([None, 0.01, 1.0]),
    )
    def epoch(self, rise: float, contribution: float | None, ratio: float | None) -> None:
        self.accuracy += rise
        observe(self.slot, self.accuracy, contribution, ratio, (rise, -1.0))
        assert self.slot.state.accuracy == self.accuracy
        stage = self.slot.state.stage.name
        changes = self.slot.step_epoch(patience=3)
        assert "FOSSILIZED" not in [c.stage.name for c in changes], "only a controller fossilizes"
        self.follow(changes, stage)

    @rule(epochs=st.integers(1, 4))
    def good_epochs(self, epochs: int) -> None:
        for _ in range(epochs):
            self.epoch(1.0, 5.0, 1.0)

    @precondition(lambda self: self.slot.state.stage in LIVE)
    @rule()
    def good_life(self) -> None:
        """A whole life: at most 2 epochs each in TRAINING and in BLENDING, then a contribution."""
        for _ in range(4):
            if self.slot.state.stage is not SeedStage.PROBATIONARY:
                self.epoch(10.0, 5.0, 1.0)
        assert self.slot.state.stage is SeedStage.PROBATIONARY
        self.epoch(10.0, 5.0, 1.0)
        if self.slot.state.stage is SeedStage.PROBATIONARY:  # else its time was over
            self.request("fossilize", self.slot.fossilize)
            assert self.slot.state.stage is SeedStage.FOSSILIZED

    @precondition(lambda self: self.slot.seed is not None)
    @rule(alpha=st.sampled_from([None, 0.0, 0.5, 1.0]))
    def forward(self, alpha: float | None) -> None:
        before = snapshot(self.slot)
        y = self.slot(features(), alpha)
        assert y.shape == features().shape
        assert bool(y.isfinite().all())
        assert snapshot(self.slot) == before

    @invariant()
    def a_seed_is_seated_exactly_where_a_blueprint_is_recorded(self) -> None:
        state = self.slot.state
        assert (
            (self.slot.seed is not None)
            == (state.blueprint is not None)
            == (state.seed_id is not None)
        )
        assert (self.slot.seed is not None) == (state.stage in SEATED)

    @invariant()
    def alpha_is_the_states_and_0_without_a_working_seed(self) -> None:
        state = self.slot.state
        assert float(self.slot.alpha) == pytest.approx(state.alpha, abs=1e-7)
        assert 0.0 <= state.alpha <= 1.0
        if state.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
            assert state.alpha == 1.0
        elif state.stage is not SeedStage.BLENDING:
            assert state.alpha == 0.0


SlotMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestSlotMachine = SlotMachine.TestCase
