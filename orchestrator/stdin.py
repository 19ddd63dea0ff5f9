"""Text for the stdin of an execution that runs."""

from orchestrator.admission import Admission
from orchestrator.errors import InvalidRequest, StdinClosed
from orchestrator.executions import Record
from orchestrator.models import StdinRequest
from orchestrator.session import Session

LIMIT = 1 << 20  # bytes that the agent lets wait until the code reads them


async def send_stdin(session: Session, record: Record, request: StdinRequest, admission: Admission) -> None:
    """Send text to an execution's stdin. StdinClosed when it takes none, TooManyRequests when it is full of unread text.

    In both cases nothing of the text was sent.
    """
    data = request.text.encode()
    if len(data) > LIMIT:
        raise InvalidRequest(f"`text` is at most {LIMIT} bytes: send it in parts")
    if record.facts.outcome is not None:
        raise StdinClosed(f"The execution {record.id} has ended ({record.facts.outcome}): nothing reads its stdin")
    if not record.note.stdin_open:
        raise StdinClosed(f"The execution {record.id} was begun without `stdin_open`: begin it with that")
    if not record.sent:
        raise admission.refuse("stdin", "The execution waits for its turn: try again later")
    match await session.container.feed(record.id, data, close=request.close):
        case "full":
            raise admission.refuse("stdin", "The execution has not read what it was sent before: try again later")
        case "closed":
            raise StdinClosed(f"The stdin of the execution {record.id} is closed")
