"""The emulated functions against what transformer-engine says they compute, by torch's own formulas and autograd."""

import pytest
import te_functions as te
import torch

FP32, BF16 = te.DType.kFloat32, te.DType.kBFloat16


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def gemm(a, transa, b, transb, **options):
    arguments = {"D": None, "quantizer": None, "output_dtype": None, "bias": None, "bias_type": BF16, "gelu": False}
    arguments |= {"gelu_in": None, "grad": False, "workspace": torch.empty(0), "workspace_size": 0}
    arguments |= {"accumulate": False, "use_split_accumulator": False}
    return te.generic_gemm(a, transa, b, transb, **(arguments | options))


def test_the_three_products_of_a_linear_layer():
    """`general_gemm`: TN is x @ w.T, NN is dy @ w, NT is dy.T @ x; A is the weight or the input, B the rest."""
    weight, x = random(6, 4).requires_grad_(), random(3, 5, 4).requires_grad_()
    bias = random(6)
    y = torch.nn.functional.linear(x, weight, bias)
    dy = random(3, 5, 6, seed=1)
    y.backward(dy)
    torch.testing.assert_close(gemm(weight.detach(), True, x.detach(), False, bias=bias)[0], y.detach())
    torch.testing.assert_close(gemm(weight.detach(), False, dy, False)[0], x.grad)
    dw, db, *_ = gemm(x.detach(), False, dy, True, bias=bias, grad=True)
    torch.testing.assert_close(dw, weight.grad)
    torch.testing.assert_close(db, dy.flatten(0, 1).sum(0))


def test_products_accumulate_in_fp32_and_round_once():
    a, b = random(8, 64, dtype=torch.bfloat16), random(5, 64, dtype=torch.bfloat16, seed=1)
    exact = b.double() @ a.double().t()
    assert gemm(a, True, b, False, output_dtype=BF16)[0].equal(exact.float().bfloat16())
    main_grad = random(5, 8, seed=2)
    expected = main_grad.double() + exact
    out, *_ = gemm(a, True, b, False, D=main_grad, accumulate=True, output_dtype=FP32)
    assert out is main_grad
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("refused", [{"D": torch.empty(5, 7)}, {"quantizer": object()}, {"gelu": True}, {"beta": 1.0}])
def test_products_that_are_not_emulated_are_refused(refused):
    with pytest.raises(AssertionError):
        gemm(random(8, 4), True, random(5, 4), False, **refused)


@pytest.mark.parametrize("single", [True, False])
def test_grouped_products_are_one_for_each_expert(single):
    """An expert without tokens leaves its gradient as it is."""
    splits = [3, 0, 4]
    weights, x = [random(6, 5, seed=i) for i in range(3)], random(7, 5)
    inputs = list(torch.split(x, splits))
    expected = [one @ weight.t() for one, weight in zip(inputs, weights, strict=True)]
    out = [torch.full((7, 6), torch.nan)] if single else [torch.full((n, 6), torch.nan) for n in splits]
    empty = [torch.empty(0)] * 3
    te.te_general_grouped_gemm(
        weights, True, inputs, False, out, FP32, splits, empty, BF16, single, empty, False, [], 0, False, False, 0
    )
    torch.testing.assert_close(torch.cat(out), torch.cat(expected))
    gradients = [torch.ones(6, 5) for _ in range(3)]
    te.te_general_grouped_gemm(
        inputs, False, expected, True, gradients, FP32, splits, empty, BF16, False, empty, True, [], 0, True, False, 0
    )
    assert gradients[1].eq(1).all()
    torch.testing.assert_close(gradients[2], 1 + expected[2].t() @ inputs[2])


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm_and_its_gradient(zero_centered):
    x, gamma = random(7, 16).requires_grad_(), random(16, seed=1).requires_grad_()
    y = torch.nn.functional.rms_norm(x, (16,), gamma + zero_centered, eps=1e-3)
    dz = random(7, 16, seed=2)
    y.backward(dz)
    out, mean, inverse = te.rmsnorm_fwd(x.detach(), gamma.detach(), 1e-3, None, None, FP32, 0, zero_centered)
    assert mean is None
    torch.testing.assert_close(out, y.detach())
    dx, dgamma = te.rmsnorm_bwd(dz, x.detach(), inverse, gamma.detach(), 0, zero_centered)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dgamma, gamma.grad)


def test_norm_and_scale_of_many_tensors():
    tensors = [random(3, 4), random(5)]
    flag = torch.zeros(1, dtype=torch.int32)
    norm, each = te.multi_tensor_l2norm(65536, flag, [tensors], True)
    torch.testing.assert_close(norm, torch.cat([t.flatten() for t in tensors]).norm().view(1))
    torch.testing.assert_close(each, torch.stack([t.norm() for t in tensors]))
    halves = [t.clone() for t in tensors]
    te.multi_tensor_scale(65536, flag, [halves, halves], 0.5)
    assert all(half.equal(t / 2) for half, t in zip(halves, tensors, strict=True))
    assert not flag.any()
    te.multi_tensor_scale(65536, flag, [[torch.tensor([torch.inf])], [torch.zeros(1)]], 0.5)
    assert flag.all()


@pytest.mark.parametrize("mode", [0, 1])
def test_adam_is_torchs(mode):
    """`FusedAdam`: a drop-in replacement for AdamW, or for Adam with `adam_w_mode=False`."""
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    parameter = torch.nn.Parameter(random(9))
    theirs = (torch.optim.AdamW if mode else torch.optim.Adam)([parameter], **options)
    master = parameter.detach().clone()
    rounded, m, v = master.bfloat16(), torch.zeros(9), torch.zeros(9)
    for step in (1, 2, 3):
        gradient = random(9, seed=step)
        parameter.grad = gradient.clone()
        theirs.step()
        lists = [[gradient], [rounded], [m], [v], [master]]
        te.multi_tensor_adam(65536, torch.zeros(1), lists, 0.01, 0.8, 0.9, 1e-6, step, mode, 1, 0.1)
        torch.testing.assert_close(master, parameter.detach())
        assert rounded.equal(master.bfloat16())
