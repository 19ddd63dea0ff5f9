"""Environment variables as values of a type: how they are read, what is allowed in words, how a default is shown."""

from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta


def parse(text: str, kind: Any) -> Any:
    """Return the value that a text stands for. ValueError, of which msgspec's is one, when it is not allowed."""
    plain = _plain(kind)
    if _is_choice(plain):
        number, table = get_args(plain)
        return parse(text, table if ":" in text else number)
    if get_origin(plain) is dict:
        pairs = [pair.partition(":") for pair in text.split(",") if pair]
        if any(not separator for _, separator, _ in pairs):
            raise ValueError("expected name:key pairs")
        return msgspec.convert({name.strip(): key.strip() for name, _, key in pairs}, plain, strict=False)
    if plain is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise ValueError("expected true or false")
        return known[text.lower()]
    value = msgspec.convert(text, kind, strict=False)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise ValueError("expected a finite number")
    return value


def _is_choice(plain: Any) -> bool:
    """Tell whether a setting is a number, or a number for each of some names."""
    return get_origin(plain) is Union and type(None) not in get_args(plain)


def _plain(kind: Any) -> Any:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind


def allowed(kind: Any) -> str:
    """Return in words what a setting's type takes."""
    metas = [meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, Meta)]
    bounds = [
        f"{word} {getattr(meta, name)}"
        for meta in metas
        for name, word in (("gt", "above"), ("ge", "at least"), ("le", "at most"))
        if getattr(meta, name) is not None
    ]
    plain = _plain(kind)
    if _is_choice(plain):
        return " or ".join(map(allowed, get_args(plain)))
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(get_args(plain))
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    second = "number" if get_origin(plain) is dict and _plain(get_args(plain)[1]) is int else "key"
    word = words.get(plain, f"`name:{second}` pairs separated by commas" if get_origin(plain) is dict else "text")
    return " ".join([word, *bounds])


def shown(default: Any) -> str:
    """Return a default as it would be written into the variable; nothing for none."""
    if default is None or default == {}:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
