"""Grading begins with a response, not with its group: vLLM's engine on fake servers, real grading processes."""

from collections.abc import Iterator

import numpy as np
import pytest
from engine_on_fakes import engine_on, wait_until
from fake_vllm import FakeServer, response_to, sampling

from megatron_klear.config.rl import RewardConfig
from megatron_klear.orchestrator.grading import Grader, Gradings
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Prompt, Verdict

TOKENS = np.array([7, 1, 5], dtype=np.int32)


@pytest.fixture
def prompt() -> Prompt:
    tokens, _, finish = response_to(TOKENS.tolist(), 12)
    length = len(tokens) - (finish == "stop")
    return Prompt(id="p", data_source="math", tokens=TOKENS, text="", ground_truth=str(length))


@pytest.fixture
def grader(prompt: Prompt) -> Iterator[Grader]:
    config = RewardConfig(require_thinking=False, workers=1, timeout_seconds=60)
    with Grader(config, [prompt]) as grader:
        yield grader


def test_a_response_is_graded_while_others_of_its_group_are_drawn(
    prompt: Prompt, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    submit = grader._pool.submit
    monkeypatch.setattr(grader._pool, "submit", lambda request: asked.append(request) or submit(request))
    begun = []
    with FakeServer() as quick, FakeServer() as slow, engine_on([quick, slow]) as engine:
        engine.follow(lambda *response: begun.append(grader.begin_response(*response)) or begun[-1])
        engine._decode = lambda tokens: f"\\boxed{{{len(tokens)}}}"
        slow.draw_on(False)
        gradings = Gradings(grader)
        sampler = Sampler(engine, engine.load_weights)

        def let_go_on_once_one_is_graded() -> None:
            wait_until(lambda: bool(begun) and begun[0].done(), 30)
            assert len(begun) == 1
            assert slow.running == 1, "its fellow is not there yet"
            slow.draw_on(True)

        taken = engine.submit
        monkeypatch.setattr(engine, "submit", lambda requests: (taken(requests), let_go_on_once_one_is_graded()))
        groups = sampler.draw([prompt], sampling(count=2), seed=1, ended=gradings.add)
        (graded,) = gradings.of(groups).groups
    assert [score.verdict for score in graded.scores or ()] == [Verdict.RIGHT] * 2
    assert len(asked) == 2, "no response is graded twice"
