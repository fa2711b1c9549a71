"""A run's directory: what is written, and that the trained network comes back as it was."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper_train import RunConfig, SeedStage, load_run
from esper_train.run import directory as run_directory
from esper_train.run.build import build_episode
from tests.helpers.slots import epoch

CONFIG = RunConfig(task="synthetic", max_epochs=12, max_batches=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = run_directory.create(tmp_path_factory.mktemp("runs") / "run", CONFIG)
    episode = build_episode(CONFIG, slots=CONFIG.slots)
    model = episode.model
    model.germinate_seed("conv_expand", "seed_0", slot="early")
    slot = model.slot("early")
    for number in range(15):
        epoch(slot, float(number), contribution=5.0)
    model.fossilize_seed(slot="early")
    model.germinate_seed("norm", "seed_1", slot="mid")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    run_directory.save_network(path, episode.model)
    return path, episode.model.eval()


def test_load_run_gives_the_trained_network(run: tuple[Path, torch.nn.Module]) -> None:
    path, trained = run
    loaded = load_run(path)
    x = torch.randn(5, 1, 8, 8)
    assert not loaded.training
    assert torch.equal(loaded(x), trained(x))
    assert [s.state for s in loaded.slots] == [s.state for s in trained.slots]  # type: ignore[union-attr]
    assert loaded.slots[0].state.stage is SeedStage.FOSSILIZED  # type: ignore[union-attr,index]
    assert loaded.slots[1].state.blueprint == "norm"  # type: ignore[union-attr,index]


def test_the_fossil_has_a_part_in_the_loaded_network(run: tuple[Path, torch.nn.Module]) -> None:
    loaded = load_run(run[0])
    x = torch.randn(5, 1, 8, 8)
    assert not torch.equal(loaded(x), loaded(x, alpha={"early": 0.0}))


def test_network_file_holds_no_objects_of_ours(run: tuple[Path, torch.nn.Module]) -> None:
    saved = torch.load(run[0] / "network.pt", weights_only=True)
    assert set(saved) == {"format", "slots", "weights"}


def test_config_comes_back(run: tuple[Path, torch.nn.Module]) -> None:
    assert run_directory.load_config(run[0]) == CONFIG
    environment = json.loads((run[0] / "environment.json").read_text())
    assert environment["torch"] == torch.__version__


def test_create_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        run_directory.create(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(FileExistsError):
        run_directory.create(tmp_path / "precious.txt", CONFIG)


def test_load_run_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [({"format": 99}, "expected format 2, got 99"), ({"weights": {}}, "does not fit")]
)
def test_load_run_refuses_another_format_or_network(
    run: tuple[Path, torch.nn.Module], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    run_directory.create(tmp_path / "copy", CONFIG)
    saved = torch.load(run[0] / "network.pt", weights_only=True)
    torch.save({**saved, **change}, tmp_path / "copy" / "network.pt")
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "copy")


def test_load_run_refuses_another_host(run: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    wider = replace(CONFIG, host=replace(CONFIG.host, width=5))
    path = run_directory.create(tmp_path / "copy", wider)
    (path / "network.pt").write_bytes((run[0] / "network.pt").read_bytes())
    with pytest.raises(ValueError, match="does not fit"):
        load_run(path)


def test_load_run_runs_no_code_from_the_file(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    path = run_directory.create(tmp_path / "run", CONFIG)
    torch.save({"format": 2, "slots": [], "weights": Trap()}, path / "network.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_run(path)
    assert not (tmp_path / "sprung").exists()


def test_read_metrics_forgives_a_last_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "a"}\n{"event": "b"}\n{"eve')
    assert [e["event"] for e in run_directory.read_metrics(tmp_path)] == ["a", "b"]
    (tmp_path / "metrics.jsonl").write_text('{"event": "a"}\n{"eve\n{"event": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        run_directory.read_metrics(tmp_path)
