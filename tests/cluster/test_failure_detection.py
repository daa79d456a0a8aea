"""Detection of lost and stalled ranks from the times of their messages and heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldmole_dist.cluster.connections import RankStatus
from ldmole_dist.cluster.failure_detection import LOADING_SECONDS, find_lost_ranks, find_stalled_rank
from ldmole_dist.cluster.messages import LOST_SECONDS

NOW = 10_000.0


@dataclass
class Connection:
    """Stand-in for a channel."""

    closed: bool = False

    def close(self) -> None:
        self.closed = True


def rank_status(rank: int, host: str, silence: float = 0.0, heartbeat_age: float | None = None) -> RankStatus:
    """Return the status of a rank whose last message and heartbeat are some seconds old."""
    channel: Any = Connection()
    return RankStatus(
        rank=rank,
        world_size=4,
        host=host,
        address="127.0.0.1",
        port=1,
        interface="lo",
        channel=channel,
        last_message_at=NOW - silence,
        activity=f"step {rank}",
        heartbeat_at=None if heartbeat_age is None else NOW - heartbeat_age,
    )


def test_no_rank_is_lost_before_the_timeout() -> None:
    assert find_lost_ranks([rank_status(0, "a", silence=LOST_SECONDS - 1)], NOW) is None


def test_silence_loses_all_ranks_of_the_host() -> None:
    # Rank 1 was heard a little later than rank 0, but its host is silent too.
    ranks = [rank_status(0, "a", LOST_SECONDS + 1), rank_status(1, "a", LOST_SECONDS - 1), rank_status(2, "b")]
    failure = find_lost_ranks(ranks, NOW)
    assert failure is not None and failure.source == "rank(s) 0, 1 on a" and failure.abrupt
    assert "sent no message" in failure.description
    assert [status.channel.closed for status in ranks] == [True, True, False]


def test_closed_connection_loses_only_its_rank() -> None:
    ranks = [rank_status(0, "a"), rank_status(1, "a")]
    ranks[1].channel.close()
    failure = find_lost_ranks(ranks, NOW)
    assert failure is not None and failure.source == "rank(s) 1 on a" and "lost the supervisor" in failure.description


def test_stall_names_the_rank_with_the_oldest_heartbeat() -> None:
    ranks = [rank_status(0, "a", heartbeat_age=61.0), rank_status(1, "a", heartbeat_age=70.0), rank_status(2, "b")]
    failure = find_stalled_rank(ranks, NOW - 100, 60.0, NOW)
    assert (
        failure is not None
        and failure.source == "rank 1 on a"
        and failure.stalled
        and "'step 1'" in failure.description
    )
    assert find_stalled_rank(ranks, NOW - 100, 71.0, NOW) is None


def test_stall_before_the_first_heartbeat_has_its_own_timeout() -> None:
    ranks = [rank_status(0, "a")]
    assert find_stalled_rank(ranks, NOW - LOADING_SECONDS + 1, 60.0, NOW) is None
    failure = find_stalled_rank(ranks, NOW - LOADING_SECONDS - 1, 60.0, NOW)
    assert failure is not None and failure.source == "rank 0 on a" and "no heartbeat" in failure.description
