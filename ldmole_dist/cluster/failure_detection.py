"""Detection of failures that no rank reports itself: ranks that start wrongly or not at all, are lost, or stall."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ldmole_dist.cluster.connections import Connections, RankStatus
from ldmole_dist.cluster.job_result import Failure
from ldmole_dist.cluster.messages import KEEPALIVE_SECONDS, LOST_SECONDS

FIRST_CONNECTION_SECONDS = 300.0  # time for the first supervisor to connect
NEXT_CONNECTION_SECONDS = 120.0  # maximum time between two connections; even slow hosts differ by less
LOADING_SECONDS = 3600.0  # time for a rank to load the model and send its first heartbeat


def find_wrong_rank(connections: Connections, world_size: int) -> Failure | None:
    """Return a failure if a process was started with a wrong world size, or with a rank that another process already has."""
    for status in [*connections.by_rank.values(), *connections.duplicates]:
        description = ""
        if status.world_size != world_size:
            description = (
                f"was started as rank {status.rank} of {status.world_size}, but the job has {world_size} ranks; "
                f"start {world_size} ranks"
            )
        elif status in connections.duplicates:
            description = f"was started as rank {status.rank}, which another process already has; start each rank once"
        if description:
            return Failure(f"a process on {status.host}", description, permanent=True)
    return None


def find_missing_ranks(
    connections: Connections, missing: Sequence[int], seconds: float, launcher_exit_code: int | None, address: str
) -> Failure | None:
    """Return a failure if the launcher exited before all ranks had connected, or if the next rank did not connect in time.

    Args:
        connections: connections of the job.
        missing: ranks that have not connected.
        seconds: seconds since the coordinator started.
        launcher_exit_code: exit code of the launcher; None while it runs.
        address: IPv4 address or name of the coordinator's host.
    """
    ranks = ", ".join(map(str, missing))
    if launcher_exit_code is not None:
        description = f"exited with code {launcher_exit_code} before rank(s) {ranks} started; see its messages above"
        return Failure("the launcher", description)
    connected = connections.by_rank.values()
    waited = min([seconds, *(time.monotonic() - status.connected_at for status in connected)])
    timeout = NEXT_CONNECTION_SECONDS if connected else FIRST_CONNECTION_SECONDS
    if waited <= timeout:
        return None
    since = "of the previous one" if connected else "of the launch"
    description = f"did not start: no supervisor connected within {timeout:.0f} s {since}; "
    description += f"check that all hosts are up and can reach {address}"
    return Failure(f"rank(s) {ranks}", description)


def find_lost_ranks(running: Sequence[RankStatus], now: float) -> Failure | None:
    """Return a failure if a supervisor has disconnected or sent no message for LOST_SECONDS, and close its connection.

    The failure is that of the host whose lost supervisor has been silent for longest, and names the lost ranks on this host. If
    that supervisor has not disconnected, the connections to lost supervisors on other hosts stay open.

    Args:
        running: status of the ranks that have not exited.
        now: reading of `time.monotonic`.
    """
    lost = [s for s in running if s.channel.closed or now - s.last_message_at > LOST_SECONDS]
    if not lost:
        return None
    first = min(lost, key=lambda status: status.last_message_at)
    description = "lost the supervisor (it was killed, or the host went down)"
    if not first.channel.closed:
        description = f"sent no message for {LOST_SECONDS:.0f} s: the host is unreachable or hangs"
        # Report all ranks of the host: their last messages are at most two keepalive intervals apart.
        silence = LOST_SECONDS - 2 * KEEPALIVE_SECONDS
        lost = [s for s in running if s.host == first.host and now - s.last_message_at > silence]
    for status in lost:
        status.channel.close()  # a supervisor that is still alive then kills its rank
    ranks = ", ".join(str(status.rank) for status in lost if status.host == first.host)
    return Failure(f"rank(s) {ranks} on {first.host}", description + first.last_activity, abrupt=True)


def find_stalled_rank(
    running: Sequence[RankStatus], started_at: float, stall_seconds: float, now: float
) -> Failure | None:
    """Return a failure if a rank has stalled.

    A rank has stalled if it sent no heartbeat within LOADING_SECONDS of its start, or if its last heartbeat is older than
    `stall_seconds`. If the last heartbeats of several ranks are too old, the rank with the oldest one is reported.

    Args:
        running: status of the ranks that have not exited.
        started_at: time at which the ranks were started, a reading of `time.monotonic`.
        stall_seconds: maximum number of seconds between two heartbeats.
        now: reading of `time.monotonic`.
    """
    for status in running:
        if status.heartbeat_at is None and now - started_at > LOADING_SECONDS:
            description = f"sent no heartbeat within {LOADING_SECONDS:.0f} s of its start; see the stacks above"
            return Failure(str(status), description, stalled=True)
    heartbeats = [(s.heartbeat_at, s.rank, s) for s in running if s.heartbeat_at is not None]
    if not heartbeats:
        return None
    oldest, _, status = min(heartbeats, key=lambda heartbeat: heartbeat[:2])
    if now - oldest <= stall_seconds:
        return None
    description = (
        f"made no progress for {stall_seconds:.0f} s, longer than any other rank; its last heartbeat was "
        f"{status.activity!r}; see the stacks above"
    )
    return Failure(str(status), description, stalled=True)
