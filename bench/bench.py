"""`make bench`: speed and memory of the service beside the floors of the same machine, in one run.

Prints a table and writes bench/results/bench.json. Absolute times depend on the machine and on
what else it does; read the ratios. Three rounds; every figure is the median of the rounds.
"""

import argparse
import asyncio
import statistics
import sys

import docker
from client import Client
from crowd import measure_load, measure_memory
from floors import measure_floors
from measured import PORT, Figures, service
from report import report
from transfer import measure_files
from waits import measure_sessions, measure_stream, measure_warm

ROUNDS = 3


async def run(seconds: float, rounds: int) -> Figures:
    """Measure everything in every round; return the medians."""
    api = docker.APIClient(version="auto")
    collected: dict[str, list[float]] = {}
    with service() as pid:
        async with Client(PORT) as client:
            for number in range(rounds):
                print(f"bench: round {number + 1} of {rounds}", file=sys.stderr)
                figures = await measure_floors(api, client)
                figures |= await measure_warm(client)
                figures |= await measure_stream(client)
                figures |= await measure_sessions(client)
                figures |= await measure_load(pid, seconds)
                figures |= await measure_memory(api, client, pid)
                figures |= await measure_files(PORT, pid)
                for name, value in figures.items():
                    collected.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in collected.items()}


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="length of the load of 16 clients")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    report(asyncio.run(run(options.seconds, options.rounds)))


if __name__ == "__main__":
    main()
