"""Fused layers against PyTorch's own, in every mode in which they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from pwm_torchrl.modules import numerics
from pwm_torchrl.modules.layers import NormedLinear, policy_mlp

V = 4


def softmax_by_torch(x: Tensor) -> Tensor:
    return F.softmax(x.unflatten(-1, (-1, V)), -1).flatten(-2)


def endpoint_by_torch(z: Tensor, logits: Tensor) -> Tensor:
    return softmax_by_torch(z.clamp_min(numerics.EPSILON).log() + logits)


def normed_by_torch(x: Tensor, w: Tensor, b: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return F.mish(F.layer_norm(F.linear(x, w, b), g.shape, g, s))


def mish_norm_by_torch(x: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return F.layer_norm(F.mish(x), x.shape[-1:]) * g + s


def batched_by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("kni,koi->kno", x, w) + b.unsqueeze(1)


class Layer:
    """A fused function, what it should equal, and inputs that all need gradients."""

    def __init__(self, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        self.ours, self.theirs, self.shapes = ours, theirs, shapes

    def inputs(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(*shape, dtype=dtype) * scale for shape in self.shapes]
        if self.theirs is endpoint_by_torch:
            tensors[0] = softmax_by_torch(tensors[0]) if scale == 1 else tensors[0].abs()
        return [tensor.requires_grad_() for tensor in tensors]


LAYERS = {
    "mish": Layer(numerics.mish, F.mish, (5, 7)),
    "softmax": Layer(lambda x: numerics.group_softmax(x, V), softmax_by_torch, (5, 3, 8)),
    "endpoint": Layer(lambda z, g: numerics.residual_endpoint(z, g, V), endpoint_by_torch, (5, 3, 8), (5, 3, 8)),
    "linear_norm_mish": Layer(numerics.linear_norm_mish, normed_by_torch, (2, 5, 7), (6, 7), (6,), (6,), (6,)),
    "mish_norm": Layer(numerics.mish_norm, mish_norm_by_torch, (5, 7), (7,), (7,)),
    "mish_norm_of_members": Layer(numerics.mish_norm, mish_norm_by_torch, (3, 5, 7), (3, 1, 7), (3, 1, 7)),
    "linear": Layer(numerics.linear, F.linear, (2, 5, 7), (6, 7), (6,)),
    "batched_linear": Layer(numerics.batched_linear, batched_by_torch, (3, 5, 7), (3, 6, 7), (3, 6)),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_same(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, b.detach().abs().max().item()))


class TestEager:
    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_equals_torch(self, layer: Layer, scale: float) -> None:
        assert_same(results(layer.ours, layer.inputs(scale=scale)), results(layer.theirs, layer.inputs(scale=scale)))

    def test_gradients_in_float64(self, layer: Layer) -> None:
        assert torch.autograd.gradcheck(layer.ours, layer.inputs(torch.float64))

    def test_without_gradients(self, layer: Layer) -> None:
        with torch.no_grad():
            out = layer.ours(*layer.inputs())
        assert not out.requires_grad
        torch.testing.assert_close(out, layer.theirs(*layer.inputs()).detach())

    def test_gradients_of_some_inputs(self, layer: Layer) -> None:
        """Frozen parameters, as in imagination, get none and disturb nobody's."""
        inputs = [tensor.detach() for tensor in layer.inputs()]
        inputs[0].requires_grad_()
        for function in (layer.ours, layer.theirs):
            out = function(*inputs)
            assert_same(list(torch.autograd.grad(out.square().sum(), inputs[0])), [results_of_first(layer, inputs)])

    def test_inputs_stay_as_they_are(self, layer: Layer) -> None:
        inputs = layer.inputs()
        before = [tensor.detach().clone() for tensor in inputs]
        results(layer.ours, inputs)
        for tensor, copy in zip(inputs, before, strict=True):
            assert torch.equal(tensor, copy)

    def test_no_rows(self, layer: Layer) -> None:
        inputs = layer.inputs()
        rows = -2  # the dimension in front of the features
        empty = [t.detach().narrow(rows, 0, 0) if k == 0 or layer.ours is LAYERS["endpoint"].ours else t
                 for k, t in enumerate(inputs)]  # fmt: skip
        assert layer.ours(*empty).numel() == 0

    def test_extreme_inputs_are_finite(self) -> None:
        x = torch.tensor([-200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0, 1e4], requires_grad=True)
        assert_same(results(numerics.mish, [x]), results(F.mish, [x]))
        for function in (lambda t: numerics.group_softmax(t, V), numerics.mish):
            assert all(value.isfinite().all() for value in results(function, [x]))

    def test_an_underflown_latent_moves_and_gets_no_gradient_below_the_floor(self) -> None:
        z = torch.tensor([[1.0, 0.0, 0.0, 1e-9]], requires_grad=True)
        logits = torch.tensor([[-100.0, 5.0, -120.0, 0.0]], requires_grad=True)
        assert_same(
            results(lambda a, b: numerics.residual_endpoint(a, b, V), [z, logits]),
            results(endpoint_by_torch, [z, logits]),
        )


def results_of_first(layer: Layer, inputs: list[Tensor]) -> Tensor:
    return torch.autograd.grad(layer.theirs(*inputs).square().sum(), inputs[0])[0]


class TestTransforms:
    def test_vmap_and_grad_of_torch_func(self, layer: Layer) -> None:
        inputs = [tensor.detach() for tensor in layer.inputs()]
        stacked = torch.stack([inputs[0], 0.5 * inputs[0]])

        def loss(function: Callable[..., Tensor], first: Tensor) -> Tensor:
            return function(first, *inputs[1:]).square().sum()

        actual = vmap(grad(lambda first: loss(layer.ours, first)))(stacked)
        expected = torch.stack([grad(lambda first: loss(layer.theirs, first))(x) for x in stacked])
        assert_same([actual], [expected])

    def test_compiles_as_one_graph(self, layer: Layer) -> None:
        compiled = torch.compile(layer.ours, fullgraph=True, backend="aot_eager")
        assert_same(results(compiled, layer.inputs()), results(layer.theirs, layer.inputs()))

    def test_second_derivatives_are_refused_rather_than_wrong(self) -> None:
        x = torch.randn(3, requires_grad=True)
        (first,) = torch.autograd.grad(numerics.mish(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            first.sum().backward()

    def test_on_tensors_without_data(self, layer: Layer) -> None:
        """As the memory plan traces it."""
        with FakeTensorMode():
            inputs = [torch.empty(shape).requires_grad_() for shape in layer.shapes]
            out = layer.ours(*inputs)
            gradients = torch.autograd.grad(out.sum(), inputs)
        assert out.shape == layer.theirs(*layer.inputs()).shape
        assert [g.shape for g in gradients] == list(layer.shapes)

    @pytest.mark.parametrize("net", [NormedLinear(4, 8), policy_mlp(4, [8], 2)])
    def test_functional_calls_and_copies(self, net: nn.Module) -> None:
        x = torch.randn(3, 4)
        doubled = {name: 2 * p.detach() for name, p in net.named_parameters()}
        copy = deepcopy(net)
        copy.load_state_dict(doubled)
        torch.testing.assert_close(functional_call(net, doubled, (x,)), copy(x))


class TestPrecision:
    @pytest.fixture(autouse=True)
    def low(self) -> Iterator[None]:
        with numerics.products_in(torch.bfloat16):
            yield

    @pytest.mark.parametrize("name", ["linear", "batched_linear", "linear_norm_mish"])
    def test_products_are_rounded_and_the_rest_is_not(self, name: str) -> None:
        layer = LAYERS[name]
        actual, expected = results(layer.ours, layer.inputs()), results(layer.theirs, layer.inputs())
        assert {value.dtype for value in actual} == {torch.float32}
        errors = [(a - b).norm() / b.norm() for a, b in zip(actual, expected, strict=True)]
        assert max(errors) < 0.02
        assert errors[0] > 1e-4  # it was rounded

    @pytest.mark.parametrize("name", ["mish", "softmax", "endpoint", "mish_norm"])
    def test_what_is_no_product_is_exact(self, name: str) -> None:
        layer = LAYERS[name]
        assert_same(results(layer.ours, layer.inputs()), results(layer.theirs, layer.inputs()))

    @pytest.mark.parametrize("name", ["linear", "batched_linear", "linear_norm_mish"])
    def test_the_backward_pass_remembers_the_dtype(self, name: str) -> None:
        layer = LAYERS[name]
        inside = results(layer.ours, layer.inputs())
        inputs = layer.inputs()
        out = layer.ours(*inputs)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        with numerics.products_in(None):
            outside = torch.autograd.grad((out * weight).sum(), inputs)
        for a, b in zip(inside[1:], outside, strict=True):
            assert torch.equal(a, b)

    def test_the_plain_form_rounds_alike(self) -> None:
        layer = LAYERS["linear_norm_mish"]
        assert_same(
            results(layer.ours, layer.inputs()), results(numerics.plain_linear_norm_mish, layer.inputs()), 1e-2, 1e-2
        )


@pytest.mark.parametrize("dims", [(0, 1), (1, 2)])
def test_inputs_need_not_be_contiguous(dims):
    """Flow matching interpolates time-major latents that are transposed."""
    torch.manual_seed(0)
    latent, logits = (torch.randn(4, 8, 8).softmax(-1).transpose(*dims).requires_grad_() for _ in range(2))
    for ours, plain in (
        (numerics.residual_endpoint(latent, logits, 8), numerics.plain_residual_endpoint(latent, logits, 8)),
        (numerics.group_softmax(logits, 8), numerics.plain_group_softmax(logits, 8)),
        (numerics.mish(logits), numerics.plain_mish(logits)),
    ):
        torch.testing.assert_close(ours, plain)
        weight = torch.randn_like(ours)
        found, expected = (torch.autograd.grad((y * weight).sum(), logits) for y in (ours, plain))
        torch.testing.assert_close(found, expected)
