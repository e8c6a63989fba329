"""The fused policy loss on a CUDA device: the gates of the CPU twin, and memory as the allocator counts it."""

import pytest
import torch
from fused_cases import FAMILY, differentiate, double, errors, problem, relative, same_bits

from megatron_klear.kernels import PolicyLossInputs, available, fused_logprobs, fused_policy_loss, fused_policy_loss_ref
from megatron_klear.rl.losses import GPPO, NLL

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not available().cuda_archs:
    pytest.skip(f"the extension has no CUDA part: {available().reason}", allow_module_level=True)

TERMS = {"entropy_coefficient": 0.1, "kl_coefficient": 0.2, "temperature": 0.7}


def on_gpu(arguments):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def on_cpu(result):
    output, hidden, weight = result
    for name in ("loss", "logprobs", "entropy", "lse", "ratio", "region"):
        object.__setattr__(output, name, getattr(output, name).detach().cpu())
    return output, hidden.cpu(), weight.cpu()


@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("vocab", [500, 4096, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILY)
def test_errors_against_float64_are_within_twice_those_of_torch(name, dtype, vocab, terms):
    arguments = on_gpu(problem(tokens=128, hidden=64, vocab=vocab, valid=vocab - 13, dtype=dtype))
    arguments |= {"loss": FAMILY[name]} | terms
    exact = differentiate(fused_policy_loss_ref, double(arguments))
    ours = errors(differentiate(fused_policy_loss, arguments), exact)
    theirs = errors(differentiate(fused_policy_loss_ref, arguments), exact)
    for key in ("loss", "logprobs", "entropy", "lse", "ratio", "hidden", "weight"):
        assert ours[key] <= 2 * theirs[key] + 1e-6, (key, ours, theirs)


def test_equals_the_cpu_twin():
    arguments = problem(tokens=200, hidden=64, vocab=3001) | {"loss": GPPO(dual_clip=3.0)} | TERMS
    found = errors(
        on_cpu(differentiate(fused_policy_loss, on_gpu(arguments))), differentiate(fused_policy_loss, arguments)
    )
    assert found.pop("region") < 0.05, "a ratio on the edge of the clip may fall on either side"
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_and_runs(logits_dtype):
    arguments = on_gpu(problem(tokens=1000, hidden=128, vocab=32_000, dtype=torch.bfloat16))
    arguments |= {"loss": GPPO(), "logits_dtype": logits_dtype}
    first = differentiate(fused_policy_loss, arguments, chunk_tokens=256)
    assert all(same_bits(differentiate(fused_policy_loss, arguments, chunk_tokens=256), first) for _ in range(3))
    found = errors(differentiate(fused_policy_loss, arguments), first)
    assert max(found.values()) < 1e-2, found


def test_main_grad_accumulates_in_float32():
    arguments = on_gpu(problem(tokens=512, hidden=128, vocab=8192, dtype=torch.bfloat16)) | {"loss": NLL()}
    total = torch.zeros(arguments["weight"].shape, device="cuda")
    for _ in range(4):
        differentiate(fused_policy_loss, arguments, main_grad=total, weight_grad="main_grad_tied")
    assert relative(total, 4 * differentiate(fused_policy_loss_ref, double(arguments))[2]) < 5e-3


def test_forward_only_logprobs():
    arguments = on_gpu(problem(tokens=300, hidden=64, vocab=151_936, valid=151_669))
    names = ("hidden", "weight", "targets", "vocab_size")
    alone = fused_logprobs(**{name: arguments[name] for name in names})
    output = fused_policy_loss(PolicyLossInputs(loss=GPPO(), **arguments))
    trained = output.lse != 0
    assert relative(alone.logprobs[trained], output.logprobs[trained]) < 1e-6


@pytest.mark.parametrize("mode", ["autograd", "main_grad_tied"])
def test_compiled_whole_equals_eager(mode):
    arguments = on_gpu(problem(tokens=64, vocab=1024))

    def step(hidden, main_grad):
        inputs = arguments | {"hidden": hidden * 1.5}
        return fused_policy_loss(PolicyLossInputs(loss=GPPO(), main_grad=main_grad, weight_grad=mode, **inputs)).loss

    def run(function):
        hidden = arguments["hidden"].clone().requires_grad_()
        loss = function(hidden, None if mode == "autograd" else torch.zeros_like(arguments["weight"]))
        loss.backward()
        return loss.detach(), hidden.grad

    compiled = run(torch.compile(step, fullgraph=True))
    assert all(relative(a, b) < 1e-5 for a, b in zip(compiled, run(step), strict=True))


def test_memory_is_one_chunk_and_32_bytes_a_token():
    tokens, hidden, vocab, chunk = 16_384, 512, 32_768, 2048
    arguments = on_gpu(problem(tokens, hidden, vocab, dtype=torch.bfloat16, weighted=2.0))
    arguments |= {"loss": GPPO(), "nll_weights": arguments["policy_weights"], "chunk_tokens": chunk}
    arguments["hidden"].requires_grad_()
    arguments["weight"].requires_grad_()
    main_grad = torch.zeros(vocab, hidden, device="cuda")
    gradients = tokens * hidden * 2
    fused_policy_loss(PolicyLossInputs(**arguments, main_grad=main_grad, weight_grad="main_grad_tied")).loss.backward()
    arguments["hidden"].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_policy_loss(PolicyLossInputs(**arguments, main_grad=main_grad, weight_grad="main_grad_tied")).loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    workspace = 64 << 20  # of the matrix products, whatever the size
    assert peak <= gradients + chunk * vocab * 4 + 32 * tokens + workspace, f"{peak:,} bytes"
