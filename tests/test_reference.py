"""The reference explains what public names take and hold: a new one without that fails here."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import esper_kernels
import esper_train

PUBLIC: dict[str, Any] = {
    name: getattr(package, name)
    for package in (esper_kernels, esper_train)
    for name in package.__all__
    if name != "__version__"
}
SELF = {"self", "args", "kwargs"}


def text_of(x: Any) -> str:
    """The docstring of a function, or those of a class: its own and those of its fields, its
    `__init__` and its bases."""
    if not inspect.isclass(x):
        return inspect.getdoc(x) or ""
    found = [x.__init__.__doc__ or ""]
    for base in x.__mro__[:-1]:
        found.append(base.__doc__ or "")
        if base.__module__.startswith("esper_"):
            found += fields_of(base)
    return "\n".join(found)


def fields_of(x: type) -> Iterator[str]:
    """Each field that a string explains, and that string."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(x))).body
    assert isinstance(tree, ast.ClassDef)
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            yield f"{ast.unparse(field.target)}: {ast.unparse(after.value)}"


def with_referred(text: str) -> str:
    """The text and those of the public names in it, as in "as for `cross_entropy`", and so on."""
    names: set[str] = set()
    found = text
    while new := set(re.findall(r"`(\w+)", found)) & set(PUBLIC) - names:
        names |= new
        found = "\n".join([text, *(text_of(PUBLIC[name]) for name in names)])
    return found


def unexplained(x: Any, text: str) -> set[str]:
    words = set(re.findall(r"\w+", with_referred(text)))
    return {name for name in inspect.signature(x).parameters if name not in SELF | words}


def methods(x: type) -> Iterator[tuple[str, Any]]:
    for name, f in vars(x).items():
        function = f.__func__ if isinstance(f, classmethod | staticmethod) else f
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, getattr(x, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_and_its_methods_are_explained(name: str) -> None:
    x = PUBLIC[name]
    assert inspect.getdoc(x)
    if inspect.isclass(x):
        assert not [method for method, f in methods(x) if not inspect.getdoc(f)]


@pytest.mark.parametrize("name", [name for name, x in PUBLIC.items() if not inspect.isclass(x)])
def test_every_parameter_of_a_function_is_explained(name: str) -> None:
    assert not unexplained(PUBLIC[name], text_of(PUBLIC[name]))


@pytest.mark.parametrize("name", esper_kernels.__all__)
def test_every_parameter_and_field_of_the_kernels_classes_is_explained(name: str) -> None:
    """The parameters of methods are explained by the method or by its class."""
    x = getattr(esper_kernels, name)
    if not inspect.isclass(x):
        return
    assert not unexplained(x, text_of(x))
    for method, f in methods(x):
        found = unexplained(f, f"{inspect.getdoc(f)}\n{text_of(x)}")
        assert not found, method


def test_a_missing_explanation_is_found() -> None:
    """The test itself, on a made-up function."""

    def f(a: int, b: int, targets: int) -> None:
        """a: a number. The rest as for `cross_entropy`."""

    assert unexplained(f, text_of(f)) == {"b"}
    assert unexplained(f, "a and b alone") == {"targets"}
