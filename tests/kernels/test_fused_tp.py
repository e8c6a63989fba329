"""The fused policy loss over vocabulary shards: any number of ranks gives what one process gives."""

import pytest
import torch
import torch.distributed as dist
from fused_cases import PER_TOKEN, Sigmoid, differentiate, errors, problem, relative

from megatron_klear.kernels import PolicyLossInputs, available, fused_logprobs, fused_policy_loss, fused_policy_loss_ref
from megatron_klear.rl.losses import GPPO, NLL

if not available().built:
    pytest.skip(f"the extension is not built: {available().reason}", allow_module_level=True)

TERMS = {"entropy_coefficient": 0.1, "kl_coefficient": 0.2, "temperature": 0.8}
CASES = {
    "gppo": {"loss": GPPO()},
    "gppo_terms": {"loss": GPPO(dual_clip=2.0), "chunk_tokens": 16} | TERMS,
    "nll": {"loss": NLL(), "chunk_tokens": 11},
    "own": {"loss": Sigmoid(), "entropy_coefficient": 0.1},
}
VALID = {"whole": None, "padded": 497, "idle_shard": 240}


def shard_of(arguments, group, sequence_parallel):
    """This rank's part of a problem."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    arguments = dict(arguments)
    arguments["weight"] = arguments["weight"].chunk(size)[rank]
    if sequence_parallel:
        arguments["hidden"] = arguments["hidden"].chunk(size)[rank]
    return arguments | {"group": group, "sequence_parallel": sequence_parallel}


def run_shards(arguments, sequence_parallel, fused, main_grad, group_size=None):
    """On every rank: two runs of the loss on this rank's shard, and the forward-only log-probs."""
    group = dist.group.WORLD
    if group_size is not None:
        groups = [dist.new_group(range(a, a + group_size)) for a in range(0, dist.get_world_size(), group_size)]
        group = groups[dist.get_rank() // group_size]
    mine = shard_of(arguments, group, sequence_parallel)
    runs = []
    for _ in range(2):
        extra = {"main_grad": torch.zeros_like(mine["weight"]), "weight_grad": "main_grad_tied"} if main_grad else {}
        output, hidden, weight = differentiate(fused_policy_loss if fused else fused_policy_loss_ref, mine, **extra)
        per_token = {name: getattr(output, name) for name in PER_TOKEN}
        runs.append((output.loss.detach(), per_token, hidden, extra.get("main_grad", weight)))
    names = ("hidden", "weight", "targets", "vocab_size", "group", "sequence_parallel")
    alone = fused_logprobs(**{name: mine[name] for name in names}, temperature=mine.get("temperature", 1.0))
    return runs, alone.logprobs


class Whole:
    """Results of all ranks put together, in the form of one process's."""

    def __init__(self, loss, per_token):
        self.loss = loss
        self.__dict__.update(per_token)


def assemble(results, run, sequence_parallel):
    parts = [runs[run] for runs, _ in results]
    hidden = torch.cat([part[2] for part in parts]) if sequence_parallel else parts[0][2]
    return Whole(parts[0][0], parts[0][1]), hidden, torch.cat([part[3] for part in parts])


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])
def test_any_number_of_shards_equals_one_process(ranks, size, sequence_parallel, name, valid):
    arguments = problem(valid=VALID[valid]) | CASES[name]
    expected = differentiate(fused_policy_loss, arguments)
    results = ranks(size, run_shards, arguments, sequence_parallel, True, name == "gppo")
    first, second = (assemble(results, run, sequence_parallel) for run in range(2))
    found = errors(first, expected)
    assert found.pop("region") == 0
    assert max(found.values()) < 1e-5, found
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True)), "the same bits in every run"
    for runs, logprobs in results:
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][0], results[0][0][0][0]), "the same loss on every rank"
        for token_name in PER_TOKEN:
            assert torch.equal(runs[0][1][token_name], results[0][0][0][1][token_name])
        trained = first[0].lse != 0
        assert relative(logprobs[trained], first[0].logprobs[trained]) < 1e-6


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_over_shards_equals_one_process(ranks, name, sequence_parallel):
    arguments = problem(valid=497) | CASES[name]
    expected = differentiate(fused_policy_loss_ref, arguments)
    results = ranks(2, run_shards, arguments, sequence_parallel, False, False)
    found = errors(assemble(results, 0, sequence_parallel), expected)
    assert found.pop("region") == 0
    assert max(found.values()) < 1e-5, found


def test_shards_of_a_subgroup(ranks):
    arguments = problem() | CASES["gppo"]
    expected = differentiate(fused_policy_loss, arguments)
    results = ranks(4, run_shards, arguments, True, True, False, 2)
    for pair in (results[:2], results[2:]):
        found = errors(assemble(pair, 0, True), expected)
        assert max(found.values()) < 1e-5, found


def compiled_step(arguments):
    """One compiled step on this rank's shard, with its gradient."""
    mine = shard_of(arguments, dist.group.WORLD, True)

    def step(hidden):
        return fused_policy_loss(PolicyLossInputs(**mine | {"hidden": hidden})).loss

    hidden = mine["hidden"].clone().requires_grad_()
    loss = torch.compile(step, backend="aot_eager")(hidden)
    loss.backward()
    return loss.detach(), hidden.grad


def test_compiled_over_shards(ranks):
    arguments = problem() | {"loss": GPPO()}
    output, hidden, _ = differentiate(fused_policy_loss, arguments)
    results = ranks(2, compiled_step, arguments)
    assert relative(results[0][0], output.loss) < 1e-6
    assert relative(torch.cat([gradient for _, gradient in results]), hidden) < 1e-5
