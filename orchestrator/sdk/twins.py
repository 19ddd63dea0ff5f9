"""Methods that two kinds of clients have, listed once: those of one kind are awaited, those of the other block."""

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, get_args, overload

from orchestrator.calls.call import Call
from orchestrator.models import Event

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class Awaiting:
    """A client for asyncio, or what is had of one: its methods are awaited."""


class Blocking:
    """A client for code without asyncio, or what is had of one: its methods block."""


class Twin(Generic[P, A, B]):
    """A method that takes the same in both kinds; it gives A where it is awaited, B where it blocks."""

    def __init__(self, find: Callable[[Any, type], Any]) -> None:
        self._find = find

    @overload
    def __get__(self, owner: Awaiting, kind: type) -> Callable[P, A]: ...
    @overload
    def __get__(self, owner: Blocking, kind: type) -> Callable[P, B]: ...
    @overload
    def __get__(self, owner: None, kind: type[Awaiting]) -> Callable[Concatenate[Any, P], A]: ...
    @overload
    def __get__(self, owner: None, kind: type[Blocking]) -> Callable[Concatenate[Any, P], B]: ...
    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    def __get__(self, owner: Awaiting | Blocking | None, kind: type) -> Any:
        """Return the method of a client or, without one, of its kind; the twin itself where it is listed."""
        return self._find(owner, kind) if issubclass(kind, (Awaiting, Blocking)) else self


def sent(build: Callable[P, Call[T]]) -> Twin[P, Coroutine[Any, Any, T], T]:
    """Return a method that sends the call which a function builds, with its parameters."""

    async def awaited(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return await self._send(build(*args, **kwargs))

    def blocking(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self._send(build(*args, **kwargs))

    as_method(awaited, build)
    as_method(blocking, build)
    return Twin(lambda owner, kind: (awaited if issubclass(kind, Awaiting) else blocking).__get__(owner, kind))


def followed(build: Callable[P, Call[Event]]) -> Twin[P, AsyncIterator[Event], Iterator[Event]]:
    """Return a method that yields the events of the call which a function builds, with its parameters."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self._follow(build(*args, **kwargs))

    as_method(method, build)
    return Twin(method.__get__)


def of_session(twin: Twin[Concatenate[str, P], A, B]) -> Twin[P, A, B]:
    """Return a client's method as that of a session, which gives its id."""
    return Twin(partial(_with_ids, twin))


def of_context(twin: Twin[Concatenate[str, str, P], A, B]) -> Twin[P, A, B]:
    """Return a client's method as that of a context, which gives its session's id and its own."""
    return Twin(partial(_with_ids, twin))


def _with_ids(twin: Twin[..., Any, Any], owner: Any, kind: type) -> Any:  # noqa: ARG001 - a twin asks with both
    if owner is None:
        return twin
    return partial(twin.__get__(owner._client, type(owner._client)), *owner._ids)


def as_method(method: Callable[..., Any], build: Callable[..., Call[Any]], name: str | None = None) -> None:
    """Give a method the name, help, parameters and answer of the function that builds its call."""
    method.__name__ = name or build.__name__
    method.__doc__ = build.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(build)
    (answer,) = get_args(signature.return_annotation)
    parameters = [own, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=answer)  # type: ignore[attr-defined]
