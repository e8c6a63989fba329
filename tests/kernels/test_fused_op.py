"""The fused policy loss against the plain-torch reference, and what only the fused one must hold."""

import logging

import pytest
import torch
from fused_cases import FAMILY, OWN, PER_TOKEN, differentiate, double, errors, problem, relative, same_bits

from megatron_klear.kernels import (
    PolicyLossInputs,
    available,
    fused_logprobs,
    fused_policy_loss,
    fused_policy_loss_ref,
    gemm,
    ops,
)
from megatron_klear.kernels import policy_loss as face
from megatron_klear.kernels.chunks import Terms
from megatron_klear.rl.losses import GPPO, GSPO, NLL, PPO, REINFORCE

if not available().built:
    pytest.skip(f"the extension is not built: {available().reason}", allow_module_level=True)

ALL_TERMS = {"entropy_coefficient": 0.1, "kl_coefficient": 0.2, "temperature": 0.7}


@pytest.mark.parametrize("terms", [{}, ALL_TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("valid", [None, 487], ids=["whole", "padded"])
@pytest.mark.parametrize("name", FAMILY | OWN)
def test_equals_the_reference(name, valid, terms):
    arguments = problem(valid=valid) | {"loss": (FAMILY | OWN)[name]} | terms
    if not name.startswith("nll") and valid:
        arguments["temperature"] = torch.linspace(0.5, 1.5, 96)
    got = differentiate(fused_policy_loss, arguments, scale=2.0)
    expected = differentiate(fused_policy_loss_ref, arguments, scale=2.0)
    found = errors(got, expected)
    assert found.pop("region") == 0
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", ["gppo", "ppo", "nll"])
def test_errors_against_float64_are_within_twice_those_of_torch(name):
    arguments = problem(tokens=24, hidden=32, vocab=151_936) | {"loss": FAMILY[name]}
    exact = differentiate(fused_policy_loss_ref, double(arguments))
    ours = errors(differentiate(fused_policy_loss, arguments), exact)
    theirs = errors(differentiate(fused_policy_loss_ref, arguments), exact)
    assert ours["region"] == 0
    for key in ("loss", "logprobs", "entropy", "lse", "hidden", "weight"):
        assert ours[key] <= 2 * theirs[key] + 1e-7, (key, ours, theirs)
    got, wanted = fused_policy_loss(PolicyLossInputs(**arguments)).logprobs, exact[0].logprobs
    assert (got - wanted).abs().max() < 1e-5


def test_bfloat16_head_with_float32_logits_rounds_like_torch():
    arguments = problem(tokens=64, hidden=64, vocab=2000, dtype=torch.bfloat16) | {"loss": GPPO()}
    exact = differentiate(fused_policy_loss_ref, double(arguments))
    ours, theirs = (errors(differentiate(f, arguments), exact) for f in (fused_policy_loss, fused_policy_loss_ref))
    assert ours["logprobs"] < 1e-6
    for key in ("hidden", "weight"):
        assert ours[key] <= 2 * theirs[key], (ours, theirs)
    rounded = errors(differentiate(fused_policy_loss, arguments, logits_dtype=torch.bfloat16), exact)
    assert 1e-6 < rounded["logprobs"] < 1e-2
    assert rounded["hidden"] < 0.05


@pytest.mark.parametrize("name", FAMILY)
def test_chunks_change_nothing_but_rounding(name):
    arguments = problem() | {"loss": FAMILY[name]}
    whole = differentiate(fused_policy_loss, arguments, chunk_tokens=96)
    for chunk in (1, 7, 32):
        found = errors(differentiate(fused_policy_loss, arguments, chunk_tokens=chunk), whole)
        assert max(found.values()) < 1e-6, (chunk, found)


def test_same_bits_in_every_run():
    arguments = problem(tokens=200, hidden=64, vocab=3000) | {"loss": GPPO()} | ALL_TERMS
    first = differentiate(fused_policy_loss, arguments)
    assert all(same_bits(differentiate(fused_policy_loss, arguments), first) for _ in range(3))


def test_tokens_without_weight_take_no_part(monkeypatch):
    arguments = problem(weighted=0.5) | {"loss": GPPO()}
    idle = (arguments["policy_weights"] == 0) & (arguments["nll_weights"] == 0)
    assert idle.sum() > 10
    clean = differentiate(fused_policy_loss, arguments)
    spoilt = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    spoilt["targets"][idle] = -100
    for name in ("hidden", "old_logprobs", "advantages", "ref_logprobs"):
        spoilt[name][idle] = torch.nan
    rows = count_rows(monkeypatch)
    dirty = differentiate(fused_policy_loss, spoilt)
    assert same_bits(dirty, clean)
    assert rows["logits"] == int((~idle).sum())
    assert all((getattr(clean[0], name)[idle] == 0).all() for name in PER_TOKEN)
    assert (clean[1][idle] == 0).all()


def count_rows(monkeypatch):
    """Tokens that pass through the first and through the last matrix product."""
    rows = {"logits": 0, "weight": 0}
    logits_into, add_weight_gradient = gemm.logits_into, gemm.add_weight_gradient

    def first(logits, hidden, weight):
        rows["logits"] += len(hidden)
        logits_into(logits, hidden, weight)

    def last(total, gradient, hidden):
        rows["weight"] += len(hidden)
        add_weight_gradient(total, gradient, hidden)

    monkeypatch.setattr(gemm, "logits_into", first)
    monkeypatch.setattr(gemm, "add_weight_gradient", last)
    return rows


def test_tokens_of_advantage_zero_stay_out_of_the_gradient_products(monkeypatch):
    arguments = problem() | {"loss": GPPO(), "nll_weights": None}
    weighted = arguments["policy_weights"] != 0
    active = weighted & (arguments["advantages"] != 0)
    assert 0 < int(active.sum()) < int(weighted.sum())
    rows = count_rows(monkeypatch)
    found = errors(
        differentiate(fused_policy_loss, arguments, chunk_tokens=16), differentiate(fused_policy_loss_ref, arguments)
    )
    assert max(found.values()) < 1e-5, found
    assert rows == {"logits": int(weighted.sum()), "weight": int(active.sum())}
    rows.update(logits=0, weight=0)
    differentiate(fused_policy_loss, arguments, entropy_coefficient=0.1)
    assert rows["weight"] == int(weighted.sum())


@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_receives_the_heads_gradient(tied):
    arguments = problem() | {"loss": GPPO()}
    expected = differentiate(fused_policy_loss, arguments)
    mode = "main_grad_tied" if tied else "main_grad"
    for function in (fused_policy_loss, fused_policy_loss_ref):
        main_grad = expected[2].clone()
        head = torch.nn.Parameter(arguments["weight"].clone())
        head.grad_added_to_main_grad = False
        states = arguments["hidden"].clone().requires_grad_()
        output = function(
            PolicyLossInputs(**arguments | {"hidden": states, "weight": head}, main_grad=main_grad, weight_grad=mode)
        )
        output.loss.backward()
        assert relative(main_grad, 2 * expected[2]) < 1e-5
        assert relative(states.grad, expected[1]) < 1e-5
        assert head.grad_added_to_main_grad is not tied
        assert (head.grad is None) is tied, "hooks of an untied head must run"


def test_a_bfloat16_head_accumulates_in_float32():
    arguments = problem(tokens=64, dtype=torch.bfloat16) | {"loss": NLL()}
    total = torch.zeros(arguments["weight"].shape)
    for _ in range(3):
        differentiate(fused_policy_loss, arguments, main_grad=total, weight_grad="main_grad_tied")
    once = differentiate(fused_policy_loss_ref, double(arguments))[2]
    assert relative(total, 3 * once) < 4e-3


def test_a_known_loss_scale_reaches_main_grad_and_a_wrong_one_is_an_error():
    arguments = problem() | {"loss": GPPO(), "weight_grad": "main_grad_tied"}
    plain, scaled = (torch.zeros_like(arguments["weight"]) for _ in range(2))
    one = differentiate(fused_policy_loss, arguments, main_grad=plain)
    four = differentiate(fused_policy_loss, arguments, scale=4.0, main_grad=scaled, loss_scale=4.0)
    assert torch.equal(one[0].loss, four[0].loss)
    assert relative(four[1], 4 * one[1]) < 1e-6
    assert relative(scaled, 4 * plain) < 1e-6
    with pytest.raises(RuntimeError, match="loss_scale"):
        differentiate(fused_policy_loss, arguments, scale=3.0, main_grad=scaled, loss_scale=4.0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_gradient_is_made_that_nobody_wants(frozen, monkeypatch):
    arguments = problem() | {"loss": GPPO()}
    expected = dict(zip(("hidden", "weight"), differentiate(fused_policy_loss, arguments)[1:], strict=True))
    rows = count_rows(monkeypatch)
    wanted = ({"hidden", "weight"} - {frozen}).pop()
    leaf = arguments[wanted].clone().requires_grad_()
    fused_policy_loss(PolicyLossInputs(**arguments | {wanted: leaf})).loss.backward()
    assert relative(leaf.grad, expected[wanted]) < 1e-6
    assert (rows["weight"] == 0) is (frozen == "weight")
    with torch.no_grad():
        output = fused_policy_loss(PolicyLossInputs(**arguments | {wanted: leaf}))
    assert not output.loss.requires_grad


def test_two_phases_give_what_one_gives():
    class Unknown(GPPO):
        def coefficients(self):
            return None

    arguments = problem() | ALL_TERMS
    found = errors(
        differentiate(fused_policy_loss, arguments, loss=Unknown()),
        differentiate(fused_policy_loss, arguments, loss=GPPO()),
    )
    assert found.pop("region") > 0, "regions are the family's"
    assert max(found.values()) < 2e-6, found


def test_sequence_ratio_runs_as_shifted_old_logprobs():
    arguments, loss = problem(), GSPO(0.1, 0.1)
    bounds = torch.tensor([0, 40, 41, 96])
    trained = (arguments["policy_weights"] != 0) | (arguments["nll_weights"] != 0)
    first = fused_logprobs(*(arguments[name] for name in ("hidden", "weight", "targets"))).logprobs
    old = loss.sequence_old_logprobs(first, arguments["old_logprobs"], trained, bounds)
    output = fused_policy_loss(PolicyLossInputs(**arguments | {"loss": loss.token_loss(), "old_logprobs": old}))
    for a, b in ((0, 40), (40, 41), (41, 96)):
        ratio = output.ratio[a:b][trained[a:b]]
        assert len(ratio) == 0 or relative(ratio, ratio[:1].expand_as(ratio)) < 1e-5
    with pytest.raises(TypeError, match="token_loss"):
        fused_policy_loss(PolicyLossInputs(**arguments | {"loss": loss}))


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.linspace(0.5, 1.5, 96)], ids=["1", "0.6", "per_token"])
def test_forward_only_logprobs_are_those_of_the_loss(temperature):
    arguments = problem(valid=487) | {"temperature": temperature}
    trained = (arguments["policy_weights"] != 0) | (arguments["nll_weights"] != 0)
    names = ("hidden", "weight", "targets", "vocab_size", "temperature")
    alone = fused_logprobs(**{name: arguments[name] for name in names}, chunk_tokens=13)
    some = fused_logprobs(**{name: arguments[name] for name in names}, trained=trained)
    output = fused_policy_loss(PolicyLossInputs(loss=GPPO(), **arguments))
    for name in ("logprobs", "entropy", "lse"):
        assert relative(getattr(some, name), getattr(output, name)) < 1e-6
        assert relative(getattr(alone, name)[trained], getattr(some, name)[trained]) < 1e-6
        assert (getattr(some, name)[~trained] == 0).all()
    again = fused_policy_loss(PolicyLossInputs(**arguments | {"loss": GPPO(), "old_logprobs": alone.logprobs}))
    assert (again.ratio[trained] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 100.0, -100.0])
@pytest.mark.parametrize("name", FAMILY)
def test_extreme_ratios_are_finite(name, log_ratio):
    arguments = problem() | {"loss": FAMILY[name]}
    arguments["old_logprobs"] = arguments["old_logprobs"] - log_ratio
    output, states, head = differentiate(fused_policy_loss, arguments)
    assert all(torch.isfinite(value).all() for value in (output.loss, states, head, output.ratio))
    expected = differentiate(fused_policy_loss_ref, arguments)
    assert relative(states, expected[1]) < 1e-5


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_empty_and_fully_masked_rows(tokens):
    arguments = problem(tokens=tokens) | {"loss": GPPO()}
    for name in ("policy_weights", "nll_weights"):
        arguments[name] = torch.zeros(tokens)
    for function in (fused_policy_loss, fused_policy_loss_ref):
        output, states, head = differentiate(function, arguments)
        assert output.loss == 0
        assert output.logprobs.shape == (tokens,)
        assert (states == 0).all()
        assert (head == 0).all()
    assert fused_logprobs(*(arguments[name] for name in ("hidden", "weight", "targets"))).lse.shape == (tokens,)


def test_not_finite_logits_show_in_the_loss():
    arguments = problem() | {"loss": GPPO()}
    token = int((arguments["policy_weights"] != 0).nonzero()[0])
    arguments["hidden"][token] = torch.nan
    assert torch.isnan(fused_policy_loss(PolicyLossInputs(**arguments)).loss)


def bad(**changes):
    return {name: change(problem()[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad(targets=lambda t: t + 500), "outside the vocabulary of 500"),
        (bad(targets=lambda t: t[:-1]), r"targets must be int64 \[96\]"),
        (bad(targets=lambda t: t.int()), "targets must be int64"),
        (bad(policy_weights=lambda t: t[:3]), r"policy_weights must be \[96\]"),
        (bad(advantages=None), "advantages"),
        (bad(old_logprobs=None), "old_logprobs"),
        (bad(ref_logprobs=None, kl_coefficient=0.1), "ref_logprobs"),
        (bad(hidden=lambda t: t.double()), "float32 or bfloat16"),
        (bad(hidden=lambda t: t[:, :5]), r"hidden must be \[T, H\]"),
        (bad(vocab_size=501), "vocab_size 501"),
        (bad(logits_dtype=torch.float16), "logits_dtype"),
        (bad(weight_grad="main_grad"), "main_grad"),
        (bad(weight_grad="main_grad", main_grad=torch.zeros(3, 3)), "main_grad"),
        (bad(loss_scale=0.0), "loss_scale"),
        (bad(temperature=torch.ones(4)), "temperature"),
        (bad(temperature=0.0), "temperature"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_policy_loss(PolicyLossInputs(**problem() | {"loss": PPO(0.2, 0.2)} | changes))


def test_without_the_kernels_the_reference_runs_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(face.extension, "usable", lambda device: False)
    face._kernels_usable.cache_clear()
    arguments = problem() | {"loss": GPPO()}
    with caplog.at_level(logging.WARNING):
        got = [differentiate(fused_policy_loss, arguments) for _ in range(2)]
        alone = fused_logprobs(*(arguments[name] for name in ("hidden", "weight", "targets")))
    face._kernels_usable.cache_clear()
    assert same_bits(got[0], differentiate(fused_policy_loss_ref, arguments))
    trained = got[0][0].lse != 0
    assert relative(alone.lse[trained], got[0][0].lse[trained]) < 1e-6
    assert len(caplog.records) == 1
    assert "plain torch" in caplog.text


def op_arguments(requires_grad, chosen=False):
    arguments = problem(tokens=20, vocab=64)
    leaves = [arguments[name].requires_grad_(requires_grad) for name in ("hidden", "weight")]
    names = ("policy_weights", "nll_weights", "old_logprobs", "advantages")
    terms = ops.pack_terms(Terms(coefficients=GPPO().coefficients()))
    groups = [torch.arange(12), torch.tensor([13, 17]), [0, -1]] if chosen else [None, None, []]
    return [
        *leaves,
        arguments["targets"],
        *groups,
        *(arguments[name] for name in names),
        None,
        None,
        1.0,
        terms,
        "",
        64,
        False,
        torch.float32,
        8,
    ]


def test_operators_pass_opcheck():
    for requires_grad in (True, False):
        torch.library.opcheck(ops.policy_loss, (*op_arguments(requires_grad), True, True))
        torch.library.opcheck(ops.policy_loss, (*op_arguments(requires_grad, chosen=True), True, True))
    plain = op_arguments(False)
    torch.library.opcheck(ops.policy_loss, (*plain, False, False))
    torch.library.opcheck(ops.policy_loss_into, (torch.zeros(64, 24), *plain, True))
    for index, first in ((None, -1), (torch.arange(3, 9), 3)):
        inputs = (*plain[:3], None, index, first, None, 1.0, "", 64, False, torch.float32, 8)
        torch.library.opcheck(ops.logprobs, inputs)


@pytest.mark.parametrize("mode", ["autograd", "main_grad", "main_grad_tied"])
def test_compiled_whole_equals_eager(mode):
    arguments = problem(tokens=20, vocab=64)

    def step(hidden, weight, main_grad):
        inputs = arguments | {"hidden": hidden * 1.5, "weight": weight}
        return fused_policy_loss(PolicyLossInputs(loss=GPPO(), main_grad=main_grad, weight_grad=mode, **inputs))

    def run(function):
        main_grad = None if mode == "autograd" else torch.zeros_like(arguments["weight"])
        leaves = [arguments[name].detach().clone().requires_grad_() for name in ("hidden", "weight")]
        output = function(*leaves, main_grad)
        output.loss.backward()
        return output.loss, output.logprobs, leaves[0].grad, leaves[1].grad if main_grad is None else main_grad

    torch._dynamo.reset()
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(step), strict=True))


def peak_bytes(call):
    """Most memory that torch held at a time during `call`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("compacted", [False, True])
def test_memory_is_one_chunk_and_32_bytes_a_token(compacted):
    tokens, hidden, vocab, chunk = 4096, 64, 2048, 256
    arguments = problem(tokens, hidden, vocab, weighted=0.5 if compacted else 2.0) | {"nll_weights": None}
    arguments |= {"loss": REINFORCE() if compacted else NLL(), "chunk_tokens": chunk, "weight_grad": "main_grad_tied"}
    leaves = {name: arguments[name].requires_grad_() for name in ("hidden", "weight")}
    main_grad = torch.zeros(vocab, hidden)

    def step():
        output = fused_policy_loss(PolicyLossInputs(**arguments, main_grad=main_grad))
        output.loss.backward()
        return output

    gradients = leaves["hidden"].numel() * 4
    bound = gradients + chunk * vocab * 4 + 32 * tokens
    if compacted:  # the chunk's tokens are copied out of the row, and its gradient back into it
        bound += 2 * chunk * hidden * 4 + chunk * 64
    peak = peak_bytes(step)
    assert peak <= bound, f"{peak:,} bytes, of {bound:,} allowed"
    assert peak > gradients + chunk * vocab * 4, "the measurement must see the chunk"
