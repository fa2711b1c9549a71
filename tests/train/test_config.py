"""Configuration from TOML and JSON: what is read, what is refused and with which words.

Long file: one table of values after the other.
"""

import json
import math
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest

from esper_kernels import KernelConfig
from esper_train.base.names import unknown_name
from esper_train.base.settings import differing, from_dict
from esper_train.config import RunConfig, load_toml
from esper_train.control.config import HeuristicConfig
from esper_train.morph.config import GrowthConfig, HostConfig
from esper_train.telemetry.config import TelemetryConfig
from esper_train.train.config import CompileConfig, GradConfig, OptimConfig, TrainConfig


def written(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_toml_reads_nested_keys_and_keeps_the_other_defaults(tmp_path: Path) -> None:
    config = load_toml(
        written(
            tmp_path,
            """
            task = "synthetic"
            slots = ["late", "early"]
            max_batches = 7
            [train]
            topk = [1, 5]
            [train.kernel]
            backend = "eager"
            [train.compile]
            dynamic = true
            [train.grad]
            clip_norm = 0.25
            [policy]
            blueprints = ["norm"]
            [growth]
            on_fossilize = "freeze"
            """,
        )
    )
    assert config == RunConfig(
        task="synthetic",
        slots=("late", "early"),
        max_batches=7,
        train=TrainConfig(
            kernel=KernelConfig(backend="eager"),
            compile=CompileConfig(dynamic=True),
            grad=GradConfig(clip_norm=0.25),
            topk=(1, 5),
        ),
        policy=HeuristicConfig(blueprints=("norm",)),
        growth=GrowthConfig(on_fossilize="freeze"),
    )
    assert isinstance(config.slots, tuple)
    assert isinstance(config.train.topk, tuple)


def test_load_toml_of_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_toml(written(tmp_path, "")) == RunConfig()


def test_load_toml_turns_whole_numbers_into_floats(tmp_path: Path) -> None:
    config = load_toml(written(tmp_path, "optim.host_lr = 1\ntrain.grad.clip_norm = 2\n"))
    assert type(config.optim.host_lr) is float
    assert config.optim.host_lr == 1.0
    assert type(config.train.grad.clip_norm) is float
    assert config.train.grad.clip_norm == 2.0


def test_load_toml_names_the_file_that_is_not_toml(tmp_path: Path) -> None:
    path = written(tmp_path, "task = digits\n")
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML: .*line 1"):
        load_toml(path)


def test_load_toml_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"episodes": "3"}, r"config key 'episodes' takes int, got '3'"),
        ({"episodes": 3.0}, r"config key 'episodes' takes int, got 3\.0"),
        ({"episodes": True}, r"config key 'episodes' takes int, got True"),
        ({"task": 5}, r"config key 'task' takes str, got 5"),
        ({"max_batches": "all"}, r"config key 'max_batches' takes int or NoneType, got 'all'"),
        ({"slots": "early"}, r"config key 'slots' takes a list, got 'early'"),
        ({"slots": ["early", 2]}, r"config key 'slots' takes str, got 2"),
        ({"optim": 0.1}, r"config key 'optim' is a table of settings, got 0\.1"),
        ({"optim": {"momentum": True}}, r"config key 'optim\.momentum' takes float, got True"),
        (
            {"growth": {"isolate_training": 1}},
            r"config key 'growth\.isolate_training' takes bool, got 1",
        ),
        ({"train": {"topk": [1, 2.5]}}, r"config key 'train\.topk' takes int, got 2\.5"),
        (
            {"train": {"kernel": "eager"}},
            r"config key 'train\.kernel' is a table of settings, got 'eager'",
        ),
        (
            {"train": {"kernel": {"backend": 1}}},
            r"config key 'train\.kernel\.backend' takes str, got 1",
        ),
        (
            {"train": {"grad": {"every": "1"}}},
            r"config key 'train\.grad\.every' takes int, got '1'",
        ),
    ],
)
def test_from_dict_refuses_a_value_of_another_type(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"max_epoch": 3}, "max_epoch", "max_epochs"),
        ({"optim": {"hostlr": 0.1}}, "optim.hostlr", "optim.host_lr"),
        ({"train": {"grad": {"evry": 2}}}, "train.grad.evry", "train.grad.every"),
        (
            {"train": {"kernel": {"back_end": "eager"}}},
            "train.kernel.back_end",
            "train.kernel.backend",
        ),
        ({"growth": {"blend_epochs": 2}}, "growth.blend_epochs", "growth.blending_epochs"),
        ({"policy": {"penalty-limit": 2.0}}, "policy.penalty-limit", "policy.penalty_limit"),
        ({"telemetry": {"levels": "off"}}, "telemetry.levels", "telemetry.level"),
    ],
)
def test_from_dict_refuses_an_unknown_key_and_names_the_nearest(
    values: dict[str, Any], key: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match="unknown config key") as caught:
        from_dict(RunConfig, values)
    assert str(caught.value).startswith(f"unknown config key '{key}'; perhaps '{nearest}'? Known: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"episodes": 0}, r"episodes must be at least 1, got 0"),
        ({"max_epochs": -2}, r"max_epochs must be at least 1, got -2"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"max_batches": 0}, r"max_batches must be at least 1 or left out, got 0"),
        ({"train": {"grad": {"every": -1}}}, r"train\.grad\.every must be at least 0, got -1"),
        (
            {"train": {"grad": {"clip_norm": 0.0}}},
            r"grad\.clip_norm must be positive and finite, or left out, got 0\.0",
        ),
        (
            {"train": {"grad": {"clip_norm": math.nan}}},
            r"grad\.clip_norm must be positive .* got nan",
        ),
        (
            {"train": {"compile": {"on_failure": "warn"}}},
            r"train\.compile\.on_failure must be one of raise, eager, got 'warn'",
        ),
        (
            {"train": {"compile": {"on_failure": 3}}},
            r"compile\.on_failure must be one of raise, eager, got 3",
        ),
        (
            {"train": {"kernel": {"backend": "fast"}}},
            r"backend must be one of .*'eager'.* got 'fast'",
        ),
        ({"train": {"accumulate": 0}}, r"train\.accumulate must be at least 1, got 0"),
        (
            {"train": {"amp": {"dtype": "fp16"}}},
            r"train\.amp\.dtype must be one of bfloat16, float16, left out, got 'fp16'",
        ),
        (
            {"train": {"amp": {"init_scale": 0}}},
            r"amp\.init_scale must be positive and finite, got 0\.0",
        ),
        (
            {"train": {"amp": {"growth_interval": 0}}},
            r"amp\.growth_interval must be at least 1, got 0",
        ),
        ({"workers": -1}, r"workers must be between 0 and 512, got -1"),
        (
            {"optim": {"schedule": {"kind": "cos"}}},
            r"schedule\.kind must be one of constant, .*, got 'cos'",
        ),
        (
            {"optim": {"schedule": {"each": "batch"}}},
            r"schedule\.each must be one of step, epoch, got 'batch'",
        ),
        ({"optim": {"schedule": {"final": 1.5}}}, r"schedule\.final must be in \[0, 1\], got 1\.5"),
        (
            {"optim": {"schedule": {"warmup": -0.1}}},
            r"schedule\.warmup must be in \[0, 1\], got -0\.1",
        ),
        ({"optim": {"host_lr": 0}}, r"optim\.host_lr must be positive and finite, got 0\.0"),
        ({"optim": {"seed_lr": -0.1}}, r"optim\.seed_lr must be positive and finite, got -0\.1"),
        ({"optim": {"momentum": 1.0}}, r"optim\.momentum must be in \[0, 1\), got 1\.0"),
        ({"optim": {"momentum": -0.5}}, r"optim\.momentum must be in \[0, 1\), got -0\.5"),
        ({"host": {"width": 0}}, r"host\.width must be at least 1 or left out, got 0"),
        ({"host": {"depth": -1}}, r"host\.depth must be at least 1 or left out, got -1"),
        (
            {"growth": {"on_fossilize": "drop"}},
            r"growth\.on_fossilize must be one of keep, freeze, got 'drop'",
        ),
        ({"growth": {"blending_epochs": 0}}, r"growth\.blending_epochs must be at least 1, got 0"),
        (
            {"policy": {"penalty_decay": 1.0}},
            r"policy\.penalty_decay must be in \[0, 1\), got 1\.0",
        ),
        (
            {"policy": {"penalty_decay": -0.1}},
            r"policy\.penalty_decay must be in \[0, 1\), got -0\.1",
        ),
        (
            {"telemetry": {"level": "loud"}},
            r"telemetry\.level must be one of off, minimal, normal, debug, got 'loud'",
        ),
    ],
)
def test_from_dict_refuses_a_value_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, values)


def test_from_dict_accepts_the_values_at_the_edge_of_a_range() -> None:
    config = from_dict(
        RunConfig,
        {
            "max_batches": 1,
            "max_epochs": 1,
            "train": {"grad": {"every": 0, "clip_norm": 1e-6}},
            "optim": {"momentum": 0.0},
            "host": {"width": 1, "depth": 1},
            "policy": {"penalty_decay": 0.0},
        },
    )
    assert (config.max_batches, config.max_epochs, config.train.grad.every) == (1, 1, 0)
    assert (config.host.width, config.host.depth) == (1, 1)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(
            task="synthetic-lm",
            slots=("mid",),
            max_batches=3,
            train=TrainConfig(
                compile=CompileConfig(enabled=True, dynamic=False, on_failure="eager"),
                grad=GradConfig(clip_norm=1.5, every=4),
                topk=(1, 3, 5),
            ),
            optim=OptimConfig(host_lr=0.5, weight_decay=0.0),
            host=HostConfig(width=5, depth=None),
            growth=GrowthConfig(isolate_training=False, embargo_epochs=0),
            policy=HeuristicConfig(blueprints=("norm", "attention"), blend="linear"),
            telemetry=TelemetryConfig(level="off"),
        ),
    ],
    ids=["defaults", "everything changed"],
)
def test_from_dict_restores_a_config_that_went_through_json(config: RunConfig) -> None:
    assert from_dict(RunConfig, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        TrainConfig(),
        CompileConfig(),
        GradConfig(),
        OptimConfig(),
        HostConfig(),
        GrowthConfig(),
        HeuristicConfig(),
        TelemetryConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configs_are_frozen(config: Any) -> None:
    name = next(iter(asdict(config)))
    before = getattr(config, name)
    with pytest.raises(FrozenInstanceError):
        setattr(config, name, "changed")
    assert getattr(config, name) == before


def test_from_dict_leaves_other_configs_and_the_given_values_alone() -> None:
    values = {"train": {"grad": {"every": 9}}, "slots": ["mid"]}
    first = from_dict(RunConfig, values)
    second = from_dict(RunConfig, {"train": {"grad": {"clip_norm": 3.0}}})
    assert (first.train.grad.every, first.train.grad.clip_norm) == (9, None)
    assert (second.train.grad.every, second.train.grad.clip_norm) == (1, 3.0)
    assert RunConfig().train.grad == GradConfig()
    assert values == {"train": {"grad": {"every": 9}}, "slots": ["mid"]}


def test_stage_lengths_are_epochs_whatever_the_length_of_the_run() -> None:
    growth = GrowthConfig()
    assert (growth.window, growth.training_min_epochs, growth.training_timeout) == (5, 5, 15)
    assert (growth.probation_min_epochs, growth.probation_alpha) == (3, 0.95)
    assert (growth.blending_epochs, growth.embargo_epochs) == (5, 5)
    assert not [name for name in vars(growth) if name.endswith("fraction")]


def test_growth_config_life_is_training_blending_and_probation() -> None:
    assert GrowthConfig().seed_life() == 5 + 5 + 5
    assert GrowthConfig(training_min_epochs=9).seed_life() == 9 + 5 + 5
    assert GrowthConfig(window=3, training_min_epochs=2).seed_life() == 3 + 5 + 3
    assert GrowthConfig(blending_epochs=1, probation_min_epochs=4).seed_life() == 5 + 4 + 5
    assert GrowthConfig(blending_epochs=9, probation_min_epochs=4).seed_life() == 5 + 9 + 5


@pytest.mark.parametrize("name", ["training_timeout", "probation_timeout"])
def test_growth_config_refuses_a_timeout_before_the_window_is_full(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"growth\.{name} must not be below growth\.window, 6.*got 5"
    ):
        GrowthConfig(window=6, **{"training_timeout": 9, "probation_timeout": 9, name: 5})  # type: ignore[arg-type]


def test_unknown_name_lists_what_is_known_and_the_nearest() -> None:
    error = unknown_name("colour", "gren", ["red", "green"])
    assert isinstance(error, ValueError)
    assert str(error) == "unknown colour 'gren'; perhaps 'green'? Known: red, green"


def test_unknown_name_says_so_when_nothing_is_known() -> None:
    assert str(unknown_name("colour", "red", [])) == "unknown colour 'red'. Known: none"


def test_policy_refuses_a_blueprint_named_twice() -> None:
    with pytest.raises(ValueError, match="more than once: a, a, b"):
        HeuristicConfig(blueprints=("a", "a", "b"))


def test_differing_names_each_setting_by_its_path() -> None:
    one = {"seed": 1, "slots": ("early",), "optim": {"lr": 0.1, "schedule": {"kind": "cosine"}}}
    other = {"seed": 1, "slots": ["early"], "optim": {"lr": 0.2, "schedule": {"kind": "constant"}}}
    more = one | {"task": None, "device": "cpu"}
    assert differing([one, other, more]) == {
        "optim.lr": (0.1, 0.2, 0.1),
        "optim.schedule.kind": ("cosine", "constant", "cosine"),
        "device": (None, None, "cpu"),
    }
    assert differing([one, one]) == differing([one]) == differing([]) == {}
