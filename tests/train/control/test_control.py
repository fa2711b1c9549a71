"""The signals that the heuristic controller gets, and its decisions, rule by rule.

Long file: one rule after the other, on shared signals.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from esper_train.control.config import HeuristicConfig
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Idle, Op
from esper_train.control.signals import Observation, Signals, SignalTracker
from esper_train.morph.config import GrowthConfig
from esper_train.morph.gates import judge
from esper_train.morph.lifecycle import SeedStage, SlotState

# the tracker


def track(
    tracker: SignalTracker, losses: Sequence[float], accuracies: Sequence[float] | None = None
) -> list[Signals]:
    """Epochs 1, 2, ... with these validation measures."""
    accuracies = accuracies or [50.0] * len(losses)
    return [
        tracker.update(
            Observation(
                epoch=i,
                max_epochs=75,
                train_loss=9.0,
                train_accuracy=8.0,
                val_loss=loss,
                val_accuracy=accuracy,
                guess_loss=2.25,
            )
        )
        for i, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1)
    ]


def restless(count: int) -> list[float]:
    """Losses that halve each epoch."""
    return [2.0**-i for i in range(count)]


def test_update_passes_the_epochs_measures_on() -> None:
    slots = [SlotState(slot="early"), SlotState(slot="mid", seed_id="s0")]
    signals = SignalTracker().update(
        Observation(
            epoch=3,
            max_epochs=40,
            train_loss=1.5,
            train_accuracy=61.0,
            val_loss=1.75,
            val_accuracy=58.0,
            guess_loss=2.25,
            slots=tuple(slots),
        )
    )
    assert signals == Signals(
        epoch=3,
        max_epochs=40,
        train_loss=1.5,
        train_accuracy=61.0,
        val_loss=1.75,
        val_accuracy=58.0,
        guess_loss=2.25,
        loss_delta=None,
        accuracy_delta=None,
        best_val_loss=1.75,
        best_val_accuracy=58.0,
        plateau_epochs=0,
        slots=tuple(slots),
    )


def test_update_gives_deltas_from_the_second_epoch_on_positive_for_better() -> None:
    signals = track(SignalTracker(), [2.0, 1.5, 1.75], [40.0, 45.0, 43.5])
    assert [s.loss_delta for s in signals] == [None, 0.5, -0.25]
    assert [s.accuracy_delta for s in signals] == [None, 5.0, -1.5]


def test_update_keeps_the_best_of_the_whole_run() -> None:
    """The best epoch is the second of twenty, which is before any window."""
    losses = [2.0, 0.5, *[1.0] * 18]
    accuracies = [40.0, 80.0, *[60.0] * 18]
    last = track(SignalTracker(), losses, accuracies)[-1]
    assert (last.best_val_loss, last.best_val_accuracy) == (0.5, 80.0)
    assert last.plateau_epochs == 18


@pytest.mark.parametrize(
    ("accuracies", "plateau"),
    [
        # up and down by more than the threshold, but never above the best: noise does not end a
        # plateau
        ([50.0, 48.0, 50.25, 47.0, 50.0, 49.0], [0, 1, 2, 3, 4, 5]),
        # a slow rise adds up against the best that was reached: 0.25 an epoch ends it every second
        # epoch
        ([50.0, 50.25, 50.5, 50.75, 51.0], [0, 1, 0, 1, 0]),
        # exactly the threshold ends it
        ([50.0, 50.0, 50.5, 50.5], [0, 1, 0, 1]),
        # recovering from a fall is no rise
        ([50.0, 30.0, 40.0, 49.75], [0, 1, 2, 3]),
    ],
)
def test_update_measures_a_plateau_against_the_best(
    accuracies: list[float], plateau: list[int]
) -> None:
    signals = track(SignalTracker(), restless(len(accuracies)), accuracies)
    assert [s.plateau_epochs for s in signals] == plateau


def test_update_obeys_the_plateau_threshold() -> None:
    signals = track(SignalTracker(plateau_threshold=2.0), restless(4), [50.0, 51.5, 52.0, 53.5])
    assert [s.plateau_epochs for s in signals] == [0, 1, 0, 1]


def test_a_plateau_is_counted_anew_after_the_network_went_back() -> None:
    tracker = SignalTracker()
    assert track(tracker, restless(3), [50.0] * 3)[-1].plateau_epochs == 2
    tracker.restart_plateau()
    assert track(tracker, restless(2), [40.0, 50.0])[-1].plateau_epochs == 2


def test_update_refuses_two_seeds_of_one_id_and_takes_nothing_in() -> None:
    tracker = SignalTracker()
    track(tracker, [2.0], [40.0])
    twins = [SlotState(slot="early", seed_id="s0"), SlotState(slot="late", seed_id="s0")]
    with pytest.raises(RuntimeError, match=r"seed ids must differ, got \['s0', 's0'\]"):
        tracker.update(
            Observation(
                epoch=2,
                max_epochs=75,
                train_loss=0.5,
                train_accuracy=99.0,
                val_loss=0.5,
                val_accuracy=99.0,
                guess_loss=2.25,
                slots=tuple(twins),
            )
        )
    after = track(tracker, [1.0], [41.0])[0]
    assert (after.loss_delta, after.best_val_loss, after.best_val_accuracy) == (1.0, 1.0, 41.0)


def test_reset_forgets_the_run_before() -> None:
    used = SignalTracker()
    track(used, [1.0] * 6, [90.0] * 6)
    used.reset()
    measured = [2.0, 1.9, 1.0], [50.0, 50.1, 50.2]
    assert track(used, *measured) == track(SignalTracker(), *measured)


# the controller

NAMES = ("a", "b", "c")


def policy(
    names: Sequence[str] = NAMES, growth: GrowthConfig | None = None, **config: Any
) -> HeuristicTamiyo:
    return HeuristicTamiyo(HeuristicConfig(**config), growth or GrowthConfig(), names)


DORMANT = SlotState(slot="early")
EMBARGOED = SlotState(slot="early", stage=SeedStage.EMBARGOED)


def seated(stage: SeedStage, **changes: Any) -> SlotState:
    state = SlotState(
        slot="early",
        stage=stage,
        seed_id="s0",
        blueprint="a",
        alpha=0.0 if stage <= SeedStage.TRAINING else 0.5,
        epochs_in_stage=5,
        accuracy=60.0,
        accuracy_at_stage_start=60.0,
        accuracies=(60.0,) * 5,
        accuracy_before=60.0,
        tolerance=0.0,
    )
    return replace(state, **changes)


def signals(*slots: SlotState, **changes: Any) -> Signals:
    """An epoch on a plateau in the middle of a run: everything speaks for germination."""
    quiet = Signals(
        epoch=20,
        max_epochs=75,
        train_loss=1.0,
        train_accuracy=60.0,
        val_loss=1.0,
        val_accuracy=60.0,
        guess_loss=2.25,
        loss_delta=0.0,
        accuracy_delta=0.0,
        best_val_loss=1.0,
        best_val_accuracy=60.0,
        plateau_epochs=3,
        slots=slots or (DORMANT,),
    )
    return replace(quiet, **changes)


def test_a_run_in_which_no_seed_can_germinate_says_so() -> None:
    """Not before epoch 4; a life is 5 + 3 + 2 epochs, and the margin 1: 15 epochs, and no fewer."""
    growth = GrowthConfig(training_min_epochs=5, blending_epochs=3, window=2)
    controller = policy(growth=growth, min_epochs=4, plateau_epochs=2, life_margin=1)
    epochs = range(1, 16)
    for most, can in [(14, False), (15, True)]:
        decided = [controller.decide(signals(DORMANT, epoch=e, max_epochs=most)).op for e in epochs]
        assert (Op.GERMINATE in decided) is can
        reason = controller.too_short(most)
        assert reason is None if can else reason and "train for at least 15" in reason


def test_op_numbers_are_the_audited_ones() -> None:
    assert {op.name: op.value for op in Op} == {
        "WAIT": 0,
        "GERMINATE": 1,
        "CULL": 2,
        "FOSSILIZE": 3,
    }


def test_idle_waits_whatever_it_is_told() -> None:
    idle = Idle()
    idle.reset()
    assert [idle.decide(s).op for s in (signals(), signals(seated(SeedStage.BLENDING)))] == [
        Op.WAIT,
        Op.WAIT,
    ]


def test_decide_germinates_on_a_plateau() -> None:
    decision = policy(blend="linear").decide(signals())
    assert decision == Decision(
        op=Op.GERMINATE,
        slot="early",
        blueprint="a",
        blend="linear",
        reason="accuracy has not risen for 3 epochs",
        confidence=0.6,
    )


@pytest.mark.parametrize(("plateau", "confidence"), [(3, 0.6), (4, 0.8), (5, 1.0), (9, 1.0)])
def test_decide_is_more_confident_the_longer_the_plateau(plateau: int, confidence: float) -> None:
    assert policy().decide(signals(plateau_epochs=plateau)).confidence == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots": (EMBARGOED,)}, "no slot is open"),
        ({"slots": (seated(SeedStage.FOSSILIZED),)}, "no slot is open"),
        ({"slots": ()}, "no slot is open"),
        ({"epoch": 4}, "before epoch 5"),
        ({"epoch": 54}, "21 epochs left, a seed's life needs 22"),
        ({"epoch": 75}, "0 epochs left, a seed's life needs 22"),
        ({"plateau_epochs": 2}, "the host is still learning"),
        ({"germination_wait": 3}, "3 epochs to wait after an undoing"),
    ],
)
def test_decide_waits_and_says_why_it_does_not_germinate(
    changes: dict[str, Any], reason: str
) -> None:
    decision = policy().decide(replace(signals(), **changes))
    assert (decision.op, decision.reason) == (Op.WAIT, reason)
    assert decision.blueprint is None


@pytest.mark.parametrize("changes", [{"epoch": 5}, {"epoch": 53}, {"plateau_epochs": 3}])
def test_decide_germinates_at_exactly_the_limits(changes: dict[str, Any]) -> None:
    """A life of 15 epochs and the margin of 7 fit into the 22 that are left after epoch 53 of
    75."""
    assert policy().decide(signals(**changes)).op is Op.GERMINATE


@pytest.mark.parametrize(("epoch", "op"), [(22, Op.GERMINATE), (23, Op.WAIT)])
def test_decide_takes_the_needed_epochs_from_its_config(epoch: int, op: Op) -> None:
    """5 in TRAINING, 6 in BLENDING, 5 on probation, and a margin of 2 make 18."""
    chosen = policy(growth=GrowthConfig(blending_epochs=6), life_margin=2)
    assert chosen.decide(signals(epoch=epoch, max_epochs=40)).op is op


def test_decide_germinates_in_the_first_open_slot() -> None:
    fossil = seated(SeedStage.FOSSILIZED)
    slots = (fossil, replace(EMBARGOED, slot="mid"), replace(DORMANT, slot="late"))
    assert policy().decide(signals(*slots)).slot == "late"


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY])
def test_decide_keeps_one_open_seed_at_a_time(stage: SeedStage) -> None:
    decision = policy().decide(signals(replace(DORMANT, slot="early"), seated(stage, slot="mid")))
    assert (decision.op, decision.slot) == (Op.WAIT, "mid")


def on_probation(*contributions: float, **changes: Any) -> SlotState:
    return seated(SeedStage.PROBATIONARY, contributions=contributions, **changes)


@pytest.mark.parametrize(
    ("contribution", "op", "reason"),
    [
        (-2.0, Op.WAIT, "mean contribution -2 is below 0.5"),
        (0.46875, Op.WAIT, "mean contribution 0.4688 is below 0.5"),
        (0.5, Op.FOSSILIZE, "contributes 0.50 points"),
        (7.5, Op.FOSSILIZE, "contributes 7.50 points"),
    ],
)
def test_decide_fossilizes_at_the_gates_threshold(contribution: float, op: Op, reason: str) -> None:
    decision = policy().decide(signals(on_probation(contribution)))
    assert (decision.op, decision.slot, decision.reason) == (op, "early", reason)


@pytest.mark.parametrize("before", [59.5, 60.0, 60.5])
@pytest.mark.parametrize("contribution", [2.25, 2.5, 2.75])
def test_decide_fossilizes_exactly_when_the_gate_would_pass(
    contribution: float, before: float
) -> None:
    growth = GrowthConfig(fossilize_contribution=2.5)
    state = on_probation(contribution, accuracy_before=before)
    passed = judge(SeedStage.FOSSILIZED, state, growth).passed
    assert passed is (contribution >= 2.5 and before <= 60.0)
    assert (policy(growth=growth).decide(signals(state)).op is Op.FOSSILIZE) is passed


@pytest.mark.parametrize(("contribution", "confidence"), [(1.0, 0.2), (5.0, 1.0), (12.0, 1.0)])
def test_decide_is_more_confident_the_more_a_seed_contributes(
    contribution: float, confidence: float
) -> None:
    decision = policy().decide(signals(on_probation(contribution)))
    assert decision.confidence == pytest.approx(confidence)


def test_decide_says_for_how_long_it_waited() -> None:
    waiting = policy().decide(signals(seated(SeedStage.TRAINING, epochs_in_stage=2)))
    assert (waiting.slot, waiting.reason) == ("early", "seed is in TRAINING for 2 epochs")


def test_decide_goes_round_the_blueprints_in_order() -> None:
    chosen = policy()
    assert [chosen.decide(signals()).blueprint for _ in range(7)] == [
        "a",
        "b",
        "c",
        "a",
        "b",
        "c",
        "a",
    ]


def test_decide_goes_round_the_configs_blueprints_where_it_names_some() -> None:
    chosen = policy(blueprints=("c", "a"))
    assert [chosen.decide(signals()).blueprint for _ in range(3)] == ["c", "a", "c"]


def after_cull(chosen: HeuristicTamiyo, closed: int, last: SlotState) -> Decision:
    """The seed is seen as in `last`, then its slot is closed for `closed` decisions, then open."""
    chosen.decide(signals(last))
    for _ in range(closed):
        assert chosen.decide(signals(EMBARGOED)).reason == "no slot is open"
    return chosen.decide(signals(DORMANT))


LAST_SEEN = on_probation(0.25)


@pytest.mark.parametrize(
    ("closed", "blueprint"),
    [
        # 2.0 at the decision that sees the cull, times 0.9 at each later one
        (0, "b"),
        (1, "b"),
        (6, "b"),  # 2 * 0.9^6 = 1.063
        (7, "a"),  # 2 * 0.9^7 = 0.957 is below the limit of 1
    ],
)
def test_decide_passes_over_the_blueprint_of_a_culled_seed(closed: int, blueprint: str) -> None:
    assert after_cull(policy(), closed, LAST_SEEN).blueprint == blueprint


def test_decide_penalises_for_longer_than_the_embargo() -> None:
    assert after_cull(policy(), GrowthConfig().embargo_epochs, LAST_SEEN).blueprint == "b"


def test_decide_does_not_penalise_a_fossilized_seed() -> None:
    chosen = policy()
    chosen.decide(signals(on_probation(3.0)))
    decision = chosen.decide(signals(seated(SeedStage.FOSSILIZED), replace(DORMANT, slot="mid")))
    assert (decision.blueprint, decision.slot) == ("a", "mid")


def test_decide_takes_the_least_penalised_when_all_are() -> None:
    """b was culled first, so its penalty has decayed the most; a and c stand at the same one."""
    chosen = policy(("a", "b", "c"))
    for lost in (("b",), ("a", "c")):
        slots = [seated(SeedStage.TRAINING, slot=name, blueprint=name) for name in lost]
        chosen.decide(signals(*slots))
        chosen.decide(signals(*(SlotState(slot=name, stage=SeedStage.EMBARGOED) for name in lost)))
    assert chosen.decide(signals()).blueprint == "b"


def test_decide_adds_up_the_penalties_of_one_blueprint() -> None:
    """a is culled twice, b once and later: 2 * 0.9^4 + 2 * 0.9^2 = 2.9 is still more than 2.0."""
    chosen = policy(("a", "b"))
    for lost in ("a", "a", "b"):
        chosen.decide(signals(seated(SeedStage.TRAINING, blueprint=lost)))
        chosen.decide(signals(EMBARGOED))
    assert chosen.decide(signals()).blueprint == "b"


def test_reset_forgets_penalties_rotation_and_seats() -> None:
    chosen = policy()
    chosen.decide(signals())
    chosen.decide(signals(seated(SeedStage.TRAINING, blueprint="a")))
    chosen.decide(signals(EMBARGOED))
    chosen.decide(signals(seated(SeedStage.TRAINING, blueprint="b")))
    chosen.reset()
    assert [chosen.decide(signals()).blueprint for _ in range(4)] == ["a", "b", "c", "a"]


def test_heuristic_tamiyo_refuses_blueprints_the_topology_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"in policy\.blueprints.* 'x'\. Known: a, b, c$"):
        policy(blueprints=("a", "x", "y"))
    with pytest.raises(
        ValueError, match=r"in policy\.blueprints, for this host's topology\) 'a'\. Known: none$"
    ):
        policy((), blueprints=("a",))


def test_heuristic_tamiyo_refuses_a_topology_without_blueprints() -> None:
    with pytest.raises(ValueError, match="there is no blueprint for this host's topology"):
        policy(())


def test_heuristic_tamiyo_refuses_an_unknown_blend() -> None:
    with pytest.raises(ValueError, match=r"unknown blend 'gatd'.* Known: linear, sigmoid, gated"):
        policy(blend="gatd")
