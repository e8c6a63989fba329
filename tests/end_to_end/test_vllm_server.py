"""Servers started for a run, with the real vLLM."""

import json
import urllib.request

import pytest
from vllm_server import LONGEST_SEQUENCE, RunningServer


def post(server: RunningServer, path: str, body: object) -> dict:
    request = urllib.request.Request(
        server.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.vllm
def test_a_server_is_ready_for_weights_and_for_the_longest_sequence(vllm_server: RunningServer):
    (worker,) = post(vllm_server, "/collective_rpc", {"method": "klear_describe"})["results"]
    assert worker == {"backend": "klear_file", "dtype": "float32", "device": "cpu"}
    asked = {
        "model": "policy",
        "token_ids": [7] * (LONGEST_SEQUENCE - 8),
        "sampling_params": {"max_tokens": 8, "temperature": 0.7, "logprobs": 0, "ignore_eos": True},
    }
    (choice,) = post(vllm_server, "/inference/v1/generate", asked)["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 8
