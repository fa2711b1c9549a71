"""The standard library as text: which files, in which part, and how they become windows of
tokens.

Long file: one small library of sources serves all of these tests.
"""

import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from esper_train.config import preset
from esper_train.morph.config import HostConfig
from esper_train.tasks import Splits, load_splits
from esper_train.tasks.config import TaskConfig
from esper_train.tasks.pysource import (
    load_sources,
    load_tokenizer,
    part_of,
    pysource,
    read_sources,
    windows,
)

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs the package tokenizers"
)
PARTS = ("train", "validation", "test")
WORDS = ("import", "return", "self", "value", "None", "for", "in", "range")


def source(number: int) -> bytes:
    """Made-up code of about 2,000 bytes, different for each number."""
    lines = [
        f"    {WORDS[(number + i) % 8]} = {WORDS[(number * i) % 8]}({number}, {i})  # é"
        for i in range(60)
    ]
    return f"def name_{number}():\n".encode() + "\n".join(lines).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty files: by the hash of their names 35 train, 3 validate and 2 test."""
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    for number in range(40):
        (root / "package" / f"m{number}.py").write_bytes(source(number))
    return root


def same(a: Splits, b: Splits) -> bool:
    return all(
        torch.equal(x, y)
        for name in PARTS
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
    )


# which files


def test_read_sources_takes_python_files_in_order_and_leaves_tests_and_foreign_code_out(
    tmp_path: Path,
) -> None:
    kept = [
        "a.py",
        "json/tool.py",
        "json/testing.py",
        "latest/b.py",
        "config.py",
        "test.py",
        "z.py",
    ]
    left_out = [
        "site-packages/numpy/core.py",
        "dist-packages/six.py",
        "test/test_os.py",
        "unittest/test/support.py",
        "ctypes/tests/run.py",
        "idlelib/idle_test/mock.py",
        "lib2to3/pgen2/driver.py",
        "ensurepip/_bundled/pip.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "json/data.txt",
        "json/__pycache__/tool.cpython-311.pyc",
    ]
    for name in reversed(kept + left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() + b"\xff\r\n")
    files = read_sources(tmp_path)
    assert list(files) == sorted(kept)
    assert all(text == name.encode() + b"\xff\r\n" for name, text in files.items())


def test_part_of_a_file_follows_from_its_name_alone_about_90_5_5() -> None:
    """The golden ones hold for every release and machine; the shares within 4 standard
    deviations."""
    golden = {
        "os.py": 1,
        "tarfile.py": 1,
        "ast.py": 2,
        "inspect.py": 2,
        "typing.py": 0,
        "json/encoder.py": 0,
    }
    assert {name: part_of(name) for name in golden} == golden
    parts = [part_of(f"package/module_{i}.py") for i in range(10_000)]
    for part, share in enumerate((0.9, 0.05, 0.05)):
        assert parts.count(part) / 10_000 == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / 10_000)
        )


def test_record_says_what_the_data_were(corpus: Path, tmp_path: Path) -> None:
    files = {p.relative_to(corpus).as_posix(): p.read_bytes() for p in corpus.rglob("*.py")}
    record = load_sources(corpus, 256, tmp_path).record
    framed = b"".join(
        b"%s\0%d\0%s" % (name.encode(), len(files[name]), files[name]) for name in sorted(files)
    )
    assert record == {
        "files": 40,
        "bytes": sum(map(len, files.values())),
        "sha256": hashlib.sha256(framed).hexdigest(),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def test_record_changes_with_a_name_and_with_a_byte(corpus: Path, tmp_path: Path) -> None:
    def total() -> str:
        return load_sources(corpus, 256, tmp_path).record["sha256"]

    seen = {total()}
    (corpus / "package" / "m0.py").rename(corpus / "package" / "m00.py")
    seen.add(total())
    (corpus / "package" / "m1.py").write_bytes(source(1)[:-1] + b"!")
    seen.add(total())
    assert len(seen) == 3


def test_too_few_sources_are_refused_with_the_count_of_each_part(
    corpus: Path, tmp_path: Path
) -> None:
    for path in corpus.rglob("*.py"):
        if part_of(path.relative_to(corpus).as_posix()) == 1:
            path.unlink()
    with pytest.raises(
        ValueError, match=r"expected Python sources under .*lib to train.*got \[35, 0, 2\] files"
    ):
        load_sources(corpus, 256, tmp_path)
    with pytest.raises(ValueError, match=r"got \[0, 0, 0\] files"):
        load_sources(tmp_path / "nowhere", 256, tmp_path)


# windows


def test_windows_are_runs_that_do_not_overlap_and_targets_the_tokens_that_follow() -> None:
    """300 numbers hold 4 whole runs of 65: 0-64, 65-129, 130-194, 195-259."""
    inputs, targets = windows(torch.arange(300), 10)
    assert inputs.dtype is targets.dtype is torch.int64
    assert inputs.shape == targets.shape == (4, 64)
    assert torch.equal(targets, inputs + 1)
    assert sorted(inputs[:, 0].tolist()) == [0, 65, 130, 195]
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(64))


def test_windows_draws_so_many_without_repeats_and_always_the_same() -> None:
    tokens = torch.arange(65 * 100)
    starts = [windows(tokens, 30)[0][:, 0].tolist() for _ in range(2)]
    assert starts[0] == starts[1]
    assert len(set(starts[0])) == 30
    assert max(starts[0]) > 65 * 60, "from all over the text"
    assert windows(tokens[:64], 30)[0].shape == (0, 64)


def test_bytes_are_the_files_own_in_their_part_with_a_zero_after_each(
    corpus: Path, tmp_path: Path
) -> None:
    splits = load_sources(corpus, 256, tmp_path)
    for part, name in enumerate(PARTS):
        files = [p.relative_to(corpus).as_posix() for p in corpus.rglob("*.py")]
        text = b"".join(
            (corpus / f).read_bytes() + b"\0" for f in sorted(files) if part_of(f) == part
        )
        inputs, targets = getattr(splits, name)
        rows = torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
        # every window of these parts is taken, for they have fewer than the limit
        assert sorted(map(bytes, rows)) == sorted(
            text[i : i + 65] for i in range(0, len(text) - 64, 65)
        )
    assert list(tmp_path.iterdir()) == [corpus], "bytes need no cache"


# byte pairs


@needs_tokenizers
def test_byte_pairs_decode_to_the_text_whatever_it_is_and_are_fewer(
    corpus: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(
        [text.decode() for text in read_sources(corpus).values()], 300, tmp_path
    )
    assert tokenizer.get_vocab_size() == 300
    everything = "".join(map(chr, range(256))) + "\n\tété 数\0"
    for text in (source(3).decode(), everything):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(source(3).decode()).ids) < len(source(3)) / 2


@needs_tokenizers
def test_byte_pairs_are_learned_from_the_training_files_only(corpus: Path, tmp_path: Path) -> None:
    before = load_sources(corpus, 280, tmp_path / "a").record
    for path in corpus.rglob("*.py"):
        if part_of(path.relative_to(corpus).as_posix()) > 0:
            path.write_bytes(b"quux " * 400)
    after = load_sources(corpus, 280, tmp_path / "b").record
    assert after["tokenizer_sha256"] == before["tokenizer_sha256"]
    assert after["sha256"] != before["sha256"]


@needs_tokenizers
def test_byte_pair_windows_hold_text_of_their_own_part_in_whole(
    corpus: Path, tmp_path: Path
) -> None:
    splits = load_sources(corpus, 280, tmp_path)
    files = read_sources(corpus).items()
    texts = [
        [text.decode() + "\0" for name, text in files if part_of(name) == part] for part in range(3)
    ]
    tokenizer = load_tokenizer(texts[0], 280, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1, "the same tokenizer"
    for part, name in enumerate(PARTS):
        inputs, targets = getattr(splits, name)
        assert inputs.dtype is targets.dtype is torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        tokens = [token for text in texts[part] for token in tokenizer.encode(text).ids]
        rows = torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
        assert sorted(rows) == sorted(tokens[i : i + 65] for i in range(0, len(tokens) - 64, 65))


@needs_tokenizers
def test_text_that_is_not_utf_8_is_replaced_for_byte_pairs_and_kept_in_bytes(
    corpus: Path, tmp_path: Path
) -> None:
    (corpus / "package" / "m0.py").write_bytes(b"\xff " * 5000)
    assert part_of("package/m0.py") == 0
    assert (load_sources(corpus, 256, tmp_path).train[0] == 0xFF).sum() > 64
    load_sources(corpus, 280, tmp_path)
    (kept,) = tmp_path.glob("*.json")
    learned = json.loads(kept.read_text())["model"]["vocab"]
    # U+FFFD is EF BF BD in UTF-8, which the byte-level alphabet writes ï ¿ ½
    assert any("ï¿½" in token for token in learned)


@needs_tokenizers
def test_a_tokenizer_is_kept_and_taken_up_again(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "made" / "on" / "demand"
    first = load_sources(corpus, 280, cache)
    (kept,) = cache.iterdir()
    assert kept.name.startswith("bpe-280-")
    stamp = kept.stat().st_mtime_ns
    assert same(load_sources(corpus, 280, cache), first)
    assert kept.stat().st_mtime_ns == stamp
    load_sources(corpus, 290, cache)
    (corpus / "package" / "m0.py").write_bytes(source(99))
    load_sources(corpus, 280, cache)
    assert len(list(cache.iterdir())) == 3, "one for each vocab and each training text"


@needs_tokenizers
@pytest.mark.parametrize("damage", [b"", b"{}", b"not json", None])
def test_a_damaged_tokenizer_is_trained_anew(
    damage: bytes | None, corpus: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = load_sources(corpus, 280, cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:1000] if damage is None else damage)
    again = load_sources(corpus, 280, cache)
    assert same(again, first)
    assert again.record == first.record
    assert kept.read_bytes() == whole


@needs_tokenizers
def test_a_directory_that_cannot_be_written_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError, match=r"cannot write a tokenizer to .*file.*give another directory"
    ):
        load_sources(corpus, 280, tmp_path / "file")


def test_byte_pairs_without_the_package_say_what_to_install(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'esper-kernels\[text\]'"):
        load_sources(corpus, 280, tmp_path)
    assert load_sources(corpus, 256, tmp_path).record["files"] == 40


@needs_tokenizers
@pytest.mark.parametrize("way", ["data", "XDG_CACHE_HOME", "HOME"])
def test_the_tokenizer_is_kept_in_data_or_else_in_the_users_cache(
    way: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sysconfig.get_path", lambda name: str(corpus) if name == "stdlib" else None
    )
    monkeypatch.setenv("HOME", str(tmp_path / "HOME"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if way == "XDG_CACHE_HOME":
        monkeypatch.setenv(way, str(tmp_path / way))
    data = str(tmp_path / "data") if way == "data" else None
    pysource(TaskConfig(vocab=280, data=data)).load()
    place = {"data": "data", "XDG_CACHE_HOME": "XDG_CACHE_HOME/esper", "HOME": "HOME/.cache/esper"}[
        way
    ]
    assert [p.parent for p in tmp_path.rglob("bpe-*.json")] == [tmp_path / place]


# the task


@pytest.mark.parametrize("vocab", [255, 2, 1])
def test_a_vocab_below_256_is_refused(vocab: int) -> None:
    with pytest.raises(
        ValueError, match=rf"vocab of 256 \(bytes\) or more \(byte pairs\), got {vocab}"
    ):
        pysource(TaskConfig(vocab=vocab))


def test_the_real_library_fills_its_parts_from_different_files() -> None:
    task = pysource(TaskConfig())
    assert (task.name, task.task_type, task.num_classes) == ("pysource", "lm", 256)
    splits = load_splits(task)
    assert [len(getattr(splits, name)[0]) for name in PARTS] == [16_384, 512, 512]
    assert splits.record["files"] > 400
    # spaces are the most frequent byte of Python code, and half the bytes never occur in ASCII
    counts = splits.train[0].flatten().bincount(minlength=256)
    assert int(counts.argmax()) == ord(" ")
    assert counts[:128].sum() > 0.98 * counts.sum()


@pytest.mark.parametrize("vocab", [256, 300])
def test_build_host_maps_windows_to_logits_at_the_size_of_the_config(vocab: int) -> None:
    build = pysource(TaskConfig(vocab=vocab)).build_host
    host = build(HostConfig(width=8, depth=2))
    assert host.slot_channels == {"early": 8, "mid": 8}
    assert host(torch.zeros(2, 64, dtype=torch.int64)).shape == (2, 64, vocab)
    assert set(build(HostConfig()).slot_channels) == {"early", "mid", "late"}
    with pytest.raises(ValueError, match="at most 64 tokens"):
        host(torch.zeros(2, 65, dtype=torch.int64))


def test_preset_is_for_this_task_in_bytes_and_leaves_time_for_a_seed() -> None:
    config = preset("pysource")
    assert (config.task, config.vocab) == ("pysource", 256)
    life = config.growth.seed_life() + config.policy.life_margin
    assert config.policy.min_epochs + life < config.max_epochs
