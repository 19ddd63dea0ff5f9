"""Where the orchestrator's CPU goes in warm executions: `.venv/bin/python bench/profile.py [COUNT]`.

Prints the functions by their own time. What runs in containers is not in it: for an agent, attach
py-spy or perf to its process.
"""

import asyncio
import pstats
import sys

from client import SMALL, Client
from measured import PORT, RESULTS, service

TOP = 40


async def load(count: int) -> None:
    """Execute one after another in one session."""
    async with Client(PORT) as client, client.session() as sid:
        for _ in range(count):
            await client.execute(sid, SMALL)


def main() -> None:
    """Run the service under cProfile, load it, print."""
    file = RESULTS / "orchestrator.prof"
    with service("-m", "cProfile", "-o", str(file)):
        asyncio.run(load(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
    pstats.Stats(str(file)).sort_stats("tottime").print_stats(TOP)


main()
