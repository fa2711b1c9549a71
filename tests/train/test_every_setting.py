"""Each field of each config class refuses wrong values by its name."""

import math
from dataclasses import fields
from typing import Any

import pytest

from esper_kernels import KernelConfig
from esper_train.base.settings import Settings, from_dict
from esper_train.cli import main  # noqa: F401  # imports every module that has settings

ODD: dict[str, object] = {
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "1": 1,
    "2**64": 2**64,
    "10**400": 10**400,  # more than a float holds
    "True": True,
    "None": None,
    "text": "no such value",
    "object": object(),
    "list": [math.nan],
    "tuple of -1": (-1,),
    "tuple of inf": (math.inf,),
}

NAMES = {"text"}  # looked up where a run is built: tasks, blends, devices, paths, modes of torch
SWITCH = {"True"}
OPTIONAL = {"None"}
NUMBER = {"-1", "1"}
ALLOWED: dict[tuple[str, str], set[str]] = {
    ("CompileConfig", "enabled"): SWITCH,
    ("CompileConfig", "mode"): NAMES,
    ("CompileConfig", "fullgraph"): SWITCH,
    ("CompileConfig", "dynamic"): SWITCH | OPTIONAL,
    ("CompileConfig", "backend"): NAMES,
    ("CompileConfig", "error_on_graph_break"): SWITCH,
    ("AmpConfig", "dtype"): OPTIONAL,
    ("AmpConfig", "init_scale"): {"1"},
    ("AmpConfig", "growth_interval"): {"1"},
    ("GradConfig", "every"): {"1"},
    ("MeasuresConfig", "per_class"): {"1"},
    ("MeasuresConfig", "calibration_bins"): {"1"},
    ("MeasuresConfig", "entropy"): SWITCH,
    ("GradConfig", "clip_norm"): {"1"} | OPTIONAL,
    ("GradConfig", "vanishing"): {"1"},
    ("GradConfig", "exploding"): {"1"},
    ("TrainConfig", "accumulate"): {"1"},
    ("TrainConfig", "capture"): SWITCH,
    ("TrainConfig", "linear_loss"): SWITCH,
    ("DistributedConfig", "check_every"): {"1"},
    ("DistributedConfig", "timeout"): {"1"},
    ("ScheduleConfig", "final"): {"1"},
    ("ScheduleConfig", "warmup"): {"1"},
    ("OptimConfig", "host_lr"): {"1"},
    ("OptimConfig", "seed_lr"): {"1"},
    ("OptimConfig", "weight_decay"): {"1"},
    ("HostConfig", "width"): {"1"} | OPTIONAL,
    ("HostConfig", "depth"): {"1"} | OPTIONAL,
    ("GrowthConfig", "window"): {"1"},
    ("GrowthConfig", "blending_potential"): NUMBER,
    ("GrowthConfig", "blending_loss_change"): NUMBER,
    ("GrowthConfig", "training_min_epochs"): {"1"},
    ("GrowthConfig", "blending_epochs"): {"1"},
    ("GrowthConfig", "blending_cost"): {"1"},
    ("GrowthConfig", "blending_timeout"): {"1"},
    ("GrowthConfig", "probation_min_epochs"): {"1"},
    ("GrowthConfig", "probation_alpha"): {"1"},
    ("GrowthConfig", "fossilize_contribution"): NUMBER,
    ("GrowthConfig", "fossilize_errors"): {"1"},
    ("GrowthConfig", "harm"): {"1"},
    ("GrowthConfig", "embargo_epochs"): {"1"},
    ("GrowthConfig", "undo_wait"): {"1"},
    ("GrowthConfig", "undo_wait_ceiling"): {"1"},
    ("GrowthConfig", "max_seeds"): {"1"} | OPTIONAL,
    ("GrowthConfig", "fossil_check_epochs"): {"1"},
    ("GrowthConfig", "shrink_host"): {"1"},
    ("GrowthConfig", "isolate_training"): SWITCH,
    ("HeuristicConfig", "plateau_threshold"): NUMBER,
    ("HeuristicConfig", "plateau_epochs"): {"1"},
    ("HeuristicConfig", "max_live_seeds"): {"1"},
    ("HeuristicConfig", "min_epochs"): {"1"},
    ("HeuristicConfig", "life_margin"): NUMBER,
    ("HeuristicConfig", "blend"): NAMES,
    ("HeuristicConfig", "cull_penalty"): {"1"},
    ("HeuristicConfig", "penalty_limit"): {"1"},
    ("GovernorConfig", "min_history"): {"1"},
    ("GovernorConfig", "sensitivity"): {"1"},
    ("GovernorConfig", "multiplier"): {"1"},
    ("GovernorConfig", "patience"): {"1"},
    ("GovernorConfig", "snapshot_epochs"): {"1"},
    ("GovernorConfig", "snapshot_device"): NAMES,
    ("GovernorConfig", "max_rollbacks"): {"1"},
    ("GovernorConfig", "rollback_penalty"): {"1"},
    ("TelemetryConfig", "lifecycle_only"): SWITCH,
    ("TelemetryConfig", "escalation_epochs"): {"1"},
    ("TelemetryConfig", "tensorboard"): SWITCH,
    ("TelemetryConfig", "wandb"): SWITCH,
    ("CheckpointConfig", "every"): {"1"},
    ("CheckpointConfig", "keep"): {"1"},
    ("RLConfig", "hosts"): {"1"},
    ("RLConfig", "steps"): {"1"},
    ("RLConfig", "rollout"): {"1"},
    ("RLConfig", "batch"): {"1"},
    ("RLConfig", "passes"): {"1"},
    ("RLConfig", "learning_rate"): {"1"},
    ("RLConfig", "gamma"): {"1"},
    ("RLConfig", "gae_lambda"): {"1"},
    ("RLConfig", "clip_range"): {"1"},
    ("RLConfig", "entropy"): {"1"},
    ("RLConfig", "width"): {"1"},
    ("RLConfig", "evaluate_every"): {"1"},
    ("RLConfig", "evaluations"): {"1"},
    ("RLConfig", "tensorboard"): SWITCH,
    ("TaskConfig", "data"): NAMES | OPTIONAL,
    ("TaskConfig", "vocab"): {"1"},
    ("RunConfig", "task"): NAMES,
    ("RunConfig", "data"): NAMES | OPTIONAL,
    ("RunConfig", "vocab"): {"1"},
    ("RunConfig", "device"): NAMES,
    ("RunConfig", "episodes"): {"1"},
    ("RunConfig", "max_epochs"): {"1"},
    ("RunConfig", "max_batches"): {"1"} | OPTIONAL,
    ("RunConfig", "batch_size"): {"1"},
    ("RunConfig", "evaluation_batch"): {"1"},
    ("RunConfig", "workers"): {"1"},
    ("RunConfig", "channels_last"): SWITCH | OPTIONAL,
    ("RunConfig", "seed"): NUMBER,
}
WEIGHTS_OF_ANY_SIGN = {"ContributionReward"}


def config_classes(base: type = Settings) -> list[type]:
    """Every public config class of both packages."""
    found = [KernelConfig] if base is Settings else []
    for cls in base.__subclasses__():
        # the command's own class has the fields of RunConfig, and others that tyro checks
        if cls.__module__.startswith("esper_train") and cls.__module__ != "esper_train.cli":
            found += [cls, *config_classes(cls)]
    return found


CASES = [
    pytest.param(cls, field.name, id=f"{cls.__name__}.{field.name}")
    for cls in config_classes()
    for field in fields(cls)
]


@pytest.mark.parametrize(("cls", "name"), CASES)
def test_a_setting_refuses_what_it_cannot_be(cls: type, name: str) -> None:
    any_sign = NUMBER if cls.__name__ in WEIGHTS_OF_ANY_SIGN else set()
    allowed = ALLOWED.get((cls.__name__, name), any_sign)
    for what, value in ODD.items():
        makers: list[Any] = [lambda v=value: cls(**{name: v})]
        if cls is not KernelConfig:
            makers.append(lambda v=value: from_dict(cls, {name: v}))
        for make in makers:
            if what in allowed:
                made = getattr(make(), name)
                assert made == value, what
                continue
            with pytest.raises((ValueError, TypeError), match=name):
                pytest.fail(f"{name} takes {what}: {make()}")


def test_the_list_of_what_is_allowed_names_only_settings_that_there_are() -> None:
    known = {(cls.__name__, field.name) for cls in config_classes() for field in fields(cls)}
    assert ALLOWED.keys() <= known
    assert len(known) > 90
