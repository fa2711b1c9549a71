"""The command's help, and the packages that each part of it needs."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import esper_kernels
from esper_train import RunConfig, cli
from tests.helpers.command import fails


@pytest.mark.parametrize(
    ("command", "packages"),
    [("grow", ["tyro", "rich", "matplotlib"]), ("fit", ["tyro"]), ("report", ["matplotlib"])],
)
def test_missing_packages_name_the_extra(
    command: str,
    packages: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    code, text = fails(capsys, command, ".")
    assert code == 2
    needed = ", ".join(packages)
    assert f"{command} needs {needed}: pip install 'esper-kernels[train]'" in text
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_no_extra_to_say_what_it_is() -> None:
    """The packages are those after `pip install .`, beside torch alone."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('tyro', 'rich', 'matplotlib', 'sklearn'));"
        "from esper_train.cli import main;"
        "sys.exit(main(['--help']) + main(['--version']) + main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"esper-train {esper_kernels.__version__}" in done.stdout
    assert "pip install 'esper-kernels[train]'" in done.stdout
    assert torch.__version__ in done.stdout


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "esper_train", "grwo"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "unknown command 'grwo'" in refused.stderr


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"esper-train {esper_kernels.__version__}\n", "")


def test_info_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "cross_entropy" in printed
    assert "eager" in printed


def test_info_as_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    choices = {(c["op"], c["device_type"], c["dtype"]): c["backend"] for c in found["choices"]}
    for choice in esper_kernels.info().choices:
        assert choices[choice.op, choice.device_type, choice.dtype] == choice.backend


def test_the_documents_name_the_options_that_are_no_settings() -> None:
    """Every other option is a key of the TOML file."""
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"Each is also a key[^.]*, except ([^:]*):", text)
    own = {f.name for f in fields(cli.Options)} - {f.name for f in fields(RunConfig)}
    named = {name.replace("-", "_") for name in re.findall("`--([a-z-]+)`", sentence)}
    assert named == own


def test_help_says_what_a_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("heuristic", "Grow a network"),
        ("fit", "without slots"),
        ("ppo", "by PPO"),
    ):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert words in capsys.readouterr().out.splitlines()[2]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("grow", "heuristic", "fit", "ppo", "info"))


def test_the_first_page_of_help_is_short_and_the_other_has_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["grow", option])
        pages.append(capsys.readouterr().out)
    first, whole = pages
    for name in ("--task", "--max-epochs", "--seed", "--out", "--resume", "--help-all"):
        assert name in first
    assert "--optim.host-lr" not in first
    assert len(first.splitlines()) < len(whole.splitlines()) / 3
    settings = re.findall(r"--([a-z.-]+)", whole)
    for f in fields(RunConfig):
        assert any(name.split(".")[0] == f.name.replace("_", "-") for name in settings), f.name


def test_what_follows_help_is_still_read(capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults on the page are those of the task."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["grow", "--task", "pysource", "--help"])
    assert re.search(r"--max-epochs INT\s.*\(default: 60\)", capsys.readouterr().out, re.DOTALL)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--completion", "bash"])
    assert not ended.value.code
    script = capsys.readouterr().out
    for typed, expected in (
        ("esper-train gr", "grow"),
        ("esper-train fit --max-b", "--max-batches"),
    ):
        place = len(typed.split()) - 1
        code = (
            f"COMP_WORDS=({typed}); COMP_CWORD={place}; _tyro_esper_train; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", f"{script}\n{code}"], capture_output=True, text=True)
        assert expected in done.stdout, done.stderr


def test_completion_names_the_shells_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = fails(capsys, "--completion", "fish")
    assert code == 2
    assert all(shell in text for shell in ("bash", "zsh", "tcsh"))
