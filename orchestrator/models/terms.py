"""The terms that several requests share, with their bounds."""

from datetime import datetime
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z"
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z"
Id = Annotated[str, Meta(pattern=ID_PATTERN, description="1 to 63 letters, digits, `_` or `-`")]
EnvName = Annotated[str, Meta(pattern=NAME_PATTERN)]
EnvText = Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=32768)]  # a null byte fits no environment
Env = Annotated[dict[EnvName, EnvText], Meta(max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=32)
]
Time = Annotated[datetime, Meta(tz=True, description="in UTC, as ISO 8601")]
Seconds = Annotated[float, Meta(gt=0, description="seconds")]
Requirements = Annotated[
    list[Annotated[str, Meta(max_length=200, description="a package's name with versions, such as `requests==2.*`")]],
    Meta(max_length=64),
]
Language = Literal["python", "javascript", "shell"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sends: an unknown field is refused."""
