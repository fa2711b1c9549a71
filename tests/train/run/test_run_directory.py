"""A run's directory: what is written, and that the trained network is loaded as it was."""

import json
import os
import pickle
import random
import shutil
from contextlib import suppress
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
    run_directory.save_network(path, episode.model, episode.model.state_dict())
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


def test_a_claim_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    for path in (tmp_path, tmp_path / "precious.txt"):
        with (
            pytest.raises(FileExistsError, match="choose another --out"),
            run_directory.claimed(path),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_load_run_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 99}, "expected format 2, got 99"), ({"weights": {}}, "does not fit")],
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
    first, second = (json.dumps({"event": name, "epoch": 1}) for name in "ab")
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{second}\n{{"eve')
    assert [e["event"] for e in run_directory.read_metrics(tmp_path)] == ["a", "b"]
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{{"eve\n{second}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        run_directory.read_metrics(tmp_path)


@pytest.mark.parametrize("line", [b"3", b"[]", b'{"event": "epoch"}', b'"\xff"'])
def test_read_metrics_refuses_what_is_no_event(line: bytes, tmp_path: Path) -> None:
    good = b'{"event": "epoch", "epoch": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match="line 2 is no"):
        run_directory.read_metrics(tmp_path)


# without a digest, 110 of 300 such flips loaded silently
@pytest.mark.parametrize("name", ["network.pt", "config.json"])
def test_no_flipped_bit_is_read(
    name: str, run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    draw = random.Random(0)
    shutil.copytree(run[0], path)
    data = (path / name).read_bytes()
    for place in draw.sample(range(len(data)), 60):
        (path / name).write_bytes(
            data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        )
        with pytest.raises(
            ValueError,
            match=rf"{name} cannot be used: .*damaged or changed; .*remove {name}.sha256",
        ):
            load_run(path)
    (path / name).write_bytes(data)
    load_run(path)


def test_files_of_versions_without_digests_are_read(
    run: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    for digest in (tmp_path / "copy").glob("*.sha256"):
        digest.unlink()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(load_run(tmp_path / "copy")(x), load_run(run[0])(x))


@pytest.mark.parametrize("call", range(1, 20))
def test_a_file_that_is_written_anew_is_never_left_with_the_digest_of_another(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed before each system call that replaces the file: the old or the new one
    can be read."""
    path = tmp_path / "network.pt"
    calls = 0
    run_directory.write_with_digest(path, b"old")

    class Stop(Exception):
        pass

    def stopping(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Stop
            return inner(*arguments, **keywords)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in ((Path, "open"), (Path, "replace"), (os, "fsync"), (os, "open")):
        stopping(owner, name)
    with suppress(Stop):
        run_directory.write_with_digest(path, b"new")
    monkeypatch.undo()
    assert run_directory.read_checked(path) in ((b"new",) if calls < call else (b"old", b"new"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
def test_a_config_that_is_none_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"config\.json (is not JSON|holds no settings).*bring it back"
    ):
        run_directory.load_config(tmp_path)
