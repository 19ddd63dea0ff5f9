"""The parameters that paths share."""

from typing import Annotated

from litestar.params import Parameter

from orchestrator.models import ID_PATTERN

Sid = Annotated[str, Parameter(pattern=ID_PATTERN, description="id of the session")]
Cid = Annotated[str, Parameter(pattern=ID_PATTERN, description="id of the context")]
Eid = Annotated[str, Parameter(pattern=ID_PATTERN, description="id of the execution")]
