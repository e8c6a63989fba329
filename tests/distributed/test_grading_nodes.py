"""A run's own Ray over its nodes: two ranks that are each the first of a node, and responses graded on both."""

import os

import numpy as np
import psutil
from pool import Pool

from megatron_klear.config.rl import RewardConfig
from megatron_klear.distributed import exchange
from megatron_klear.orchestrator.grading import Grader
from megatron_klear.rewards.ray_node import RayNode
from megatron_klear.train.grading_nodes import GradingNodes, nodes_of_job
from megatron_klear.types import Group, Prompt, Sample

TOKENS = np.arange(4, dtype=np.int32)
PROMPT = Prompt(id="p", data_source="math", tokens=TOKENS[:2], text="", ground_truth="18")
SAMPLE = Sample(tokens=TOKENS, trained=TOKENS >= 2)


def graders_of(node: RayNode) -> int:
    below = psutil.Process(node.supervisor).children(recursive=True)
    return sum("GradingActor" in " ".join(process.cmdline()) for process in below)


def graded_over_nodes() -> dict[str, object]:
    """What this rank sees of a run of two nodes of one rank each."""
    os.environ["LOCAL_RANK"] = "0"
    config = RewardConfig(backend="ray", workers=1, require_thinking=False, timeout_seconds=60)
    nodes, found = GradingNodes(), {}
    count = nodes_of_job()
    grader = Grader(config, [PROMPT], count) if exchange.is_first() else None
    try:
        nodes.join(grader.head() if grader else None, config)
        verdicts: list[str] = []
        if grader:
            grader.wait_until_ready()
            texts = [f"\\boxed{{{number}}}" for number in range(16, 20)]
            group = Group(prompt=PROMPT, samples=[SAMPLE] * len(texts), texts=texts)
            graded = grader.begin([group]).result().groups[0]
            verdicts = [score.verdict.value for score in graded.scores or ()]
        found = {"nodes": count, "verdicts": exchange.tell_all(verdicts)}
        own = nodes._node or (grader._pool._node if grader else None)
        found["graders"] = graders_of(own)
        supervisor = psutil.Process(own.supervisor)
        exchange.gather_all(0)
    finally:
        if grader:
            grader.__exit__(None, None, None)
        nodes.close()
    found["left"] = supervisor.is_running()
    return found


def test_a_run_grades_on_all_of_its_nodes(ranks: Pool) -> None:
    verdicts = ["wrong", "wrong", "right", "wrong"]
    assert ranks(2, graded_over_nodes) == [{"nodes": 2, "verdicts": verdicts, "graders": 1, "left": False}] * 2
