"""Parts that need the extra `rl` say how to get it where it is missing."""

import sys

import pytest

import esper_train.rl


@pytest.mark.parametrize("name", esper_train.rl.__all__)
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ImportError, match=r"sb3_contrib: pip install 'esper-kernels\[rl\]'"):
        getattr(esper_train.rl, name)


def test_public_names_are_there() -> None:
    for name in esper_train.rl.__all__:
        assert callable(getattr(esper_train.rl, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        esper_train.rl.nothing  # noqa: B018
