"""Look-ups of names, in a bounded pool of threads: once for a connection, which is then made to what was found."""

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from orchestrator.hosts import Address

THREADS = 32


class Resolver(Protocol):
    """Who knows the addresses of a name."""

    async def addresses(self, host: str) -> list[Address]:
        """Return all addresses of a name, the best first. OSError when there is none."""


class SystemResolver:
    """The resolver of this machine."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "resolve")

    async def addresses(self, host: str) -> list[Address]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up, host)
        return list(dict.fromkeys(ipaddress.ip_address(address.partition("%")[0]) for address in found))

    def close(self) -> None:
        """Begin no more look-ups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def look_up(host: str) -> list[str]:
    """Return the addresses of a name as the system tells them."""
    return [str(facts[4][0]) for facts in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
