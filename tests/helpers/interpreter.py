"""Triton's interpreter, in half of its time."""

from importlib import import_module
from typing import Any


def patch_the_language_once() -> None:
    """Call this before the first launch; twice is as once.

    The interpreter replaces the functions of `triton.language` by its own at every launch and again
    at every call of a jitted helper, and restores them after the launch. That took half of the time
    of these tests. From now on it does so once for each module of kernels and restores nothing,
    because no kernel is compiled in a process of the tests that interprets kernels. Versions of
    Triton that never restore them are left as they are.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(patch, "patched"):
        return
    patched: set[str] = set()

    def once(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()  # there is nothing in it to restore

    once.patched = patched  # type: ignore[attr-defined]
    interpreter._patch_lang = once
