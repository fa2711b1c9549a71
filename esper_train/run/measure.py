"""Trains and evaluates the network for an epoch, and passes the results to slots and controller;
`epoch` calls it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from esper_train.control.signals import Observation
from esper_train.morph.gates import gradient_ratio
from esper_train.morph.lifecycle import TRIAL, Measurement, SeedStage, SlotState
from esper_train.morph.model import MorphModel
from esper_train.run.episode import Episode
from esper_train.train.launched import Launched
from esper_train.train.loop import launch_evaluation, launch_training
from esper_train.train.results import EpochResult, EvalResult

Measured = tuple[EpochResult, EvalResult]
"""Training and validation of an epoch."""
JOINT = "+"
"""The variant without any of the seeds measured in an epoch; no slot has this name."""


def launch_epoch(episode: Episode, epoch: int) -> Launched[Measured]:
    """Train on the epoch's batches, then validate the network as it is, without each seed that
    contributes to it, and with each seed that learns beside it. Nothing is read yet."""
    config = episode.config
    model = episode.model
    train = launch_training(
        model,
        episode.stoppable(episode.train),
        episode.optimizers,
        config.train,
        step=episode.step,
        learners=episode.learners(),
        max_batches=config.max_batches,
        ranks=episode.ranks,
    )
    episode.cost.add_epoch(*episode.counted())
    check_fossils = epoch % config.growth.fossil_check_epochs == 0 or epoch == config.max_epochs
    ablated = [
        state.slot
        for state in slot_states(model)
        if state.alpha > 0 and (state.stage is not SeedStage.FOSSILIZED or check_fossils)
    ]
    variants = {slot: {slot: 0.0} for slot in ablated}
    if len(ablated) > 1:
        variants[JOINT] = dict.fromkeys(ablated, 0.0)
    scopes: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    for name in model.learning:
        variants[name] = {name: 1.0}
        scopes[name] = model.incubation(name).entered
    validation = launch_evaluation(
        model,
        episode.stoppable(episode.validation),
        config.train,
        step=episode.step,
        variants=variants,
        scopes=scopes,
    )
    return train.beside(validation)


def observe_slots(
    episode: Episode, train: EpochResult, validation: EvalResult
) -> tuple[SlotState, ...]:
    """Record the measurements in every slot, and return the states from before the slots move."""
    for slot in episode.model.slots:
        name = slot.state.slot
        stage = slot.state.stage
        learner = train.learners.get(name)
        groups = {} if train.grad is None else train.grad.groups
        seed = learner.grad if learner is not None else groups.get(name)
        other = validation.variants.get(name)
        learns = slot.statistics is not None
        measured = Measurement(
            accuracy=validation.points,
            contribution=None if learns else validation.contribution(name),
            gradient_ratio=gradient_ratio(train.grad, seed),
            tolerance=episode.trial.tolerance(validation.right, validation.valid)
            if stage in TRIAL
            else None,
        )
        if learns and other is not None:
            measured = replace(
                measured,
                potential=other.points - validation.points,
                potential_loss=other.loss - validation.loss,
            )
        slot.observe(measured)
    return slot_states(episode.model)


def observation(
    episode: Episode, number: int, train: EpochResult, validation: EvalResult
) -> Observation:
    return Observation(
        epoch=number,
        max_epochs=episode.config.max_epochs,
        train_loss=train.loss,
        train_accuracy=train.points,
        val_loss=validation.loss,
        val_accuracy=validation.points,
        guess_loss=episode.governor.guess,
        slots=slot_states(episode.model),
        host_parameters=sum(p.numel() for p in episode.model.get_host_parameters()),
        training_cost=episode.cost.epochs,
    )


def joint_contribution(validation: EvalResult) -> dict[str, Any] | None:
    """The joint contribution of the seeds measured in this epoch, where there were several."""
    if JOINT not in validation.variants:
        return None
    slots = [name for name in validation.variants if name != JOINT]
    return {"slots": slots, "contribution": validation.contribution(JOINT)}


def slot_states(model: MorphModel) -> tuple[SlotState, ...]:
    return tuple(slot.state for slot in model.slots)
