"""A run's own Ray over all of its nodes: the head beside rank 0's orchestrator, and one rank of each other node joins.

The head is known once the orchestrator has started it; its graders are shared out once all nodes have joined.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from megatron_klear.config.rl import RewardConfig
from megatron_klear.distributed import exchange
from megatron_klear.rewards.pool import usable_cores
from megatron_klear.rewards.ray_node import Head, RayNode


def nodes_of_job() -> int:
    """Nodes that the job's ranks run on: one for every rank that is the first of its node. Collective."""
    return sum(exchange.gather_all(_is_first_of_node()))


@dataclass(slots=True)
class GradingNodes:
    """This rank's part of it."""

    _node: RayNode | None = field(default=None, init=False)

    def join(self, head: Head | None, config: RewardConfig) -> None:
        """Where there is a head, have the first rank of each node but rank 0's join it. Collective.

        Raises RewardError on every rank where Ray is not installed on some node, or does not come up there.
        """
        head = exchange.tell_all(head)
        if head is None:
            return

        def start() -> None:
            if _is_first_of_node() and not exchange.is_first():
                os.environ["RAY_AUTH_TOKEN"] = head.token
                self._node = RayNode.start(config.workers or usable_cores(), address=head.address)

        exchange.patiently(start)

    def close(self) -> None:
        """End Ray on this rank's node, where this rank has started it. May be called twice."""
        node, self._node = self._node, None
        if node is not None:
            node.close()


def _is_first_of_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", exchange.rank())) == 0
