"""Lifecycle and cross-session cases: which function plays which case."""

from collections.abc import Callable

from tests.attack import beyond, chaos, engine_away, neighbours, process, soak, trouble, untrue
from tests.attack.cases import Case, NotApplicable
from tests.attack.live import Live

Play = Callable[[Live, bool], str | None]  # what it returns is a figure, to be shown
PLAYS: dict[str, Play] = {
    "life-01": process.killed,
    "life-02": trouble.container_killed,
    "life-03": trouble.agent_killed,
    "life-04": trouble.agent_stopped,
    "life-07": engine_away.hanging,
    "life-08": engine_away.image_removed,
    "life-09": engine_away.disk_full,
    "life-10": trouble.pool_removed,
    "life-12": engine_away.answer_lost,
    "life-13": process.twice,
    "life-14": trouble.foreign_containers,
    "life-15": process.terminated,
    "life-16": trouble.oom_flood,
    "life-17": untrue.lying_agents,
    "life-18": untrue.torn_frame,
    "life-19": soak.cycles,
    "life-20": trouble.idle_moment,
    "life-21": soak.many_executions,
    "life-22": untrue.unsafe_hosts,
    "shr-03": neighbours.inotify,
    "shr-04": neighbours.secrets_kept,
    "shr-05": neighbours.fresh_scratch,
    "shr-06": neighbours.noise,
    **beyond.PLAYS,
    **chaos.PLAYS,
}


def run(live: Live, case: Case, *, short: bool) -> str | None:
    """Play the case against the service, or against one of its own; return its figure, where it has one."""
    if live.engine != "docker":
        raise NotApplicable("needs a container")
    return PLAYS[case.id](live, short)
