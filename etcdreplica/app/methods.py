"""`@update` and `@query`, and what a protected class offers to its clients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from attrs import frozen

from etcdreplica.errors import UsageError

MARK = "__etcdreplica_kind__"
UPDATE, QUERY = "update", "query"

F = TypeVar("F", bound=Callable[..., Any])


def update(method: F) -> F:
    """Mark a method that changes the object. Every copy runs it, in the same order, on the same state.

    So it must depend on nothing but the state and its arguments; `etcdreplica.replica` has a clock, random numbers and ids that
    are the same everywhere. It may raise: that is an answer too, but what it has changed before stays changed.
    """
    return _mark(method, UPDATE)


def query(method: F) -> F:
    """Mark a method that only reads. It runs on one copy."""
    return _mark(method, QUERY)


def _mark(method: F, kind: str) -> F:
    if not inspect.isfunction(method):
        raise UsageError(f"@{kind} takes a method, not {method!r}")
    if any(test(method) for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise UsageError(f"@{kind} takes an ordinary method; {method.__name__} is asynchronous or a generator")
    setattr(method, MARK, kind)
    return method


@frozen
class Method:
    """One method that clients may call. `least` to `most` positional arguments are right without a look at the signature."""

    name: str
    kind: str
    function: Callable[..., Any]
    signature: inspect.Signature
    least: int
    most: int

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> Method:
        """Look at a marked function."""
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1:]  # without self
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = sum(p.default is p.empty for p in plain)
        more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
            required = len(plain) + 1  # then always by the signature
        return cls(name, getattr(function, MARK), function, signature, required, 1 << 30 if more else len(plain))

    def fits(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
        """Whether it can be called with these."""
        if not kwargs and self.least <= len(args) <= self.most:
            return True
        try:
            self.signature.bind(None, *args, **(kwargs or {}))
        except TypeError:
            return False
        return True


def methods_of(cls: type[Any]) -> dict[str, Method]:
    """Return the marked methods of a class by name. Raises UsageError when there are none, or a name begins with "_"."""
    found = {}
    for name in dir(cls):
        function = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(function) and hasattr(function, MARK):
            if name.startswith("_"):
                raise UsageError(f"{cls.__name__}.{name}: clients call it, so its name must not begin with an underscore")
            found[name] = Method.of(name, function)
    if not found:
        raise UsageError(f"{cls.__name__} has no method marked with @update or @query, so clients could do nothing with it")
    return found
