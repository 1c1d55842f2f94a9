"""Products in bfloat16: how far losses and gradients move, and what stays float32."""

from __future__ import annotations

import pytest
import torch
from conformity.conformity_cases import CASES, Case

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss

#: Largest relative deviation of a loss and of its whole gradient. bfloat16 keeps 8 bits, 0.002 per factor, and the
#: cases have large random weights and roll out with them.
LOSS, GRADIENT = 0.06, 0.1


def loss_and_gradient(case: Case, precision: str) -> tuple[torch.Tensor, torch.Tensor, set[torch.dtype]]:
    loss = case.make(precision=precision)
    torch.manual_seed(3)
    values = loss(case.data())
    total = sum(value for key, value in values.items() if key.startswith("loss_"))
    parameters = [p for p in loss.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    present = [g for g in gradients if g is not None]
    dtypes = {g.dtype for g in present} | {value.dtype for value in values.values()}
    return total.detach(), torch.cat([g.flatten() for g in present]), dtypes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_moves_losses_and_gradients_little(case: Case) -> None:
    exact, exact_gradient, _ = loss_and_gradient(case, "fp32")
    low, low_gradient, dtypes = loss_and_gradient(case, "bf16")
    assert dtypes == {torch.float32}
    assert not torch.equal(exact_gradient, low_gradient)
    assert (low - exact).abs() <= LOSS * exact.abs().clamp_min(0.1)
    assert (low_gradient - exact_gradient).norm() <= GRADIENT * exact_gradient.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tf32_is_fp32_on_a_cpu(case: Case) -> None:
    assert torch.equal(loss_and_gradient(case, "tf32")[1], loss_and_gradient(case, "fp32")[1])


@pytest.mark.parametrize("kind", [PWMModelLoss, PWMActorLoss, PWMValueLoss])
def test_an_unknown_precision_is_refused(kind: type) -> None:
    case = next(case for case in CASES if case.loss is kind)
    with pytest.raises(ConfigurationError, match=r"training\.precision='fp8'.*bf16"):
        case.make(precision="fp8")
