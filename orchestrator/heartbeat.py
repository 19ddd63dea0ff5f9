"""The heartbeat of one agent: pings, and whether they were answered."""

import time

from orchestrator import frames
from orchestrator.channel import NOT_ASKED, Channel
from orchestrator.errors import ContainerLost


class Heartbeat:
    """One ping at a time: the next is sent when the one before was answered. `missed` counts looks without an answer."""

    def __init__(self, channel: Channel) -> None:
        self.missed = 0
        self.silent_since = 0.0
        self._channel = channel
        self._pings = 0
        self._pongs = 0

    @property
    def answered(self) -> bool:
        """Whether the last ping was answered."""
        return self._pongs == self._pings

    def look(self) -> bool:
        """Return whether the last ping was answered; count it as missed if not."""
        if not (self.answered or self.missed):
            self.silent_since = time.monotonic()
        self.missed = 0 if self.answered else self.missed + 1
        return self.answered

    def ping(self, acks: list[str]) -> None:
        """Ping the agent, with the results that it may forget."""
        self._pings += 1
        self._channel.send(frames.encode("ping", number=self._pings, acks=acks))

    def take(self, frame: frames.Pong) -> None:
        """Take an answer. ContainerLost when it is to another ping."""
        if frame.number != self._pings:
            raise ContainerLost(NOT_ASKED)
        self._pongs = self._pings

    def restart(self) -> None:
        """Expect no answer to what was asked before."""
        self.missed = 0
        self._pongs = self._pings
