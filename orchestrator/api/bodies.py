"""Request bodies: decoded into the handler's type in one step, and strictly, so that `"5"` is no number."""

from typing import Any

import msgspec
from litestar import Request

from orchestrator.errors import InvalidRequest


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON is what its handler takes, or is refused. Litestar alone would convert text to numbers."""

    async def json(self) -> Any:
        """Return the body as the handler's type. InvalidRequest for any other."""
        field = self.route_handler.parsed_data_field
        try:
            return msgspec.json.decode(await self.body(), type=Any if field is None else field.annotation)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"The body does not fit: {error}") from None
