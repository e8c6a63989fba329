"""`tools/verify.py weights` and `mismatch` on a tiny run: whole, and with faults planted in its engines."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_rl_run import start, write_run

from megatron_klear.rollout.local.engine import LocalEngine
from megatron_klear.types import Sample
from megatron_klear.verify import rollouts as verify_rollouts
from megatron_klear.verify.rollouts import RolloutReport

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "verify.py"


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("verify"))


class Planted(LocalEngine):
    """A local engine with a fault."""

    fault = ""

    def load_weights(self, weights, version):
        held = super().load_weights(weights, version)
        if self.fault == "stale":
            self._decoder.weights["model.norm.weight"].mul_(1.5)
            return {"local": {name: verify_rollouts.checksum(t) for name, t in self._decoder.weights.items()}}
        return held

    def draw(self, prompts, sampling, seed):
        if self.fault == "temperature":
            sampling = sampling.model_copy(update={"temperature": 0.7})
        if self.fault == "top_p":
            sampling = sampling.model_copy(update={"top_p": 0.8})
        drawn = super().draw(prompts, sampling, seed)
        if self.fault == "shift":
            drawn = [[shifted(sample) for sample in samples] for samples in drawn]
        return drawn


def shifted(sample: Sample) -> Sample:
    """The log-probs one place to the right."""
    logprobs = np.where(sample.trained, np.roll(sample.logprobs, 1), 0).astype(np.float32)
    return dataclasses.replace(sample, logprobs=logprobs)


def planted(fault: str, which: str, toml: Path, scale: str = "1") -> RolloutReport:
    """The verification of a run whose rollout engine has the fault."""
    from megatron_klear.train import weight_sync

    weight_sync.LocalEngine = Planted
    Planted.fault = fault
    run = start(toml, "--seed", scale)
    return getattr(verify_rollouts, which)(run)


def found(report: RolloutReport) -> list[str]:
    return [finding.cause for finding in report.findings if finding.verdict == "found"]


@pytest.mark.parametrize("which", ["verify_weights", "verify_mismatch"])
def test_a_sound_run_passes(toml, ranks, which: str):
    report = ranks(1, planted, "", which, toml)[0]
    assert report.passed, report
    assert report.tokens > 0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("stale", "stale weights"), ("temperature", "temperature"), ("top_p", "top-p or top-k")],
)
def test_a_planted_fault_is_named(toml, ranks, fault: str, cause: str):
    report = ranks(1, planted, fault, "verify_mismatch", toml)[0]
    assert not report.passed
    assert cause in found(report), report


def test_shifted_log_probs_do_not_pass(toml, ranks):
    report = ranks(1, planted, "shift", "verify_mismatch", toml)[0]
    assert not report.passed


def test_stale_weights_are_named_tensor_by_tensor(toml, ranks):
    report = ranks(1, planted, "stale", "verify_weights", toml)[0]
    assert not report.passed
    assert "model.norm.weight" in report.findings[0].detail


@pytest.mark.parametrize("command", ["weights", "mismatch"])
def test_the_tool_prints_a_verdict_for_every_cause(toml, tmp_path, command: str):
    record = tmp_path / "report.json"
    words = [sys.executable, str(TOOL), command, "--config", str(toml), "--json", str(record)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: mean difference" in done.stdout
    causes = [finding["cause"] for finding in json.loads(record.read_text())["findings"]]
    expected = {
        "weights": ["weights", "echo"],
        "mismatch": ["stale weights", "shift by one", "temperature", "top-p or top-k", "tokenisation", "dtype"],
    }
    assert causes == expected[command]
