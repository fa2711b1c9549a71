"""Training on top of `esper_kernels`: one epoch loop, and networks that grow while they train."""

from esper_train.base.settings import from_dict
from esper_train.config import RunConfig, load_toml
from esper_train.control.config import GovernorConfig, HeuristicConfig
from esper_train.control.heuristic import HeuristicTamiyo
from esper_train.control.policy import Decision, Idle, Op, Policy
from esper_train.control.signals import Observation, Signals, SignalTracker
from esper_train.morph.blueprints import Blueprint, BlueprintRegistry, default_registry
from esper_train.morph.config import GrowthConfig, HostConfig
from esper_train.morph.export import export, fold
from esper_train.morph.host import Host, cnn_host
from esper_train.morph.lifecycle import SeedStage, SlotState
from esper_train.morph.model import MorphModel
from esper_train.morph.transformer import transformer_host
from esper_train.run.directory import load_run
from esper_train.run.run import EpisodeResult
from esper_train.run.start import run_fit, run_heuristic_episode, train_heuristic
from esper_train.tasks import Splits, Task, get_task
from esper_train.telemetry.config import TelemetryConfig
from esper_train.telemetry.event import Event, EventType
from esper_train.telemetry.hub import TelemetryHub
from esper_train.telemetry.sinks import ConsoleSink, JsonlSink, Sink
from esper_train.train.config import (
    AmpConfig,
    CompileConfig,
    DistributedConfig,
    GradConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from esper_train.train.errors import BadNumbersError, NonFiniteLossError
from esper_train.train.fit import EpochEnd, fit
from esper_train.train.loop import evaluate, train_one_epoch
from esper_train.train.optimizers import OptimizerRegistry
from esper_train.train.results import EpochResult, EvalResult, Measures, StepEnd
from esper_train.train.step import TrainStep, build_train_step

__all__ = [
    "AmpConfig",
    "BadNumbersError",
    "Blueprint",
    "BlueprintRegistry",
    "CompileConfig",
    "ConsoleSink",
    "Decision",
    "DistributedConfig",
    "EpisodeResult",
    "EpochEnd",
    "EpochResult",
    "EvalResult",
    "Event",
    "EventType",
    "GovernorConfig",
    "GradConfig",
    "GrowthConfig",
    "HeuristicConfig",
    "HeuristicTamiyo",
    "Host",
    "HostConfig",
    "Idle",
    "JsonlSink",
    "Measures",
    "MorphModel",
    "NonFiniteLossError",
    "Observation",
    "Op",
    "OptimConfig",
    "OptimizerRegistry",
    "Policy",
    "RunConfig",
    "ScheduleConfig",
    "SeedStage",
    "SignalTracker",
    "Signals",
    "Sink",
    "SlotState",
    "Splits",
    "StepEnd",
    "Task",
    "TelemetryConfig",
    "TelemetryHub",
    "TrainConfig",
    "TrainStep",
    "build_train_step",
    "cnn_host",
    "default_registry",
    "evaluate",
    "export",
    "fit",
    "fold",
    "from_dict",
    "get_task",
    "load_run",
    "load_toml",
    "run_fit",
    "run_heuristic_episode",
    "train_heuristic",
    "train_one_epoch",
    "transformer_host",
]
