"""World-model losses on slices of trajectories, as pure functions; time-major, H steps of B slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import FlowDynamics, ResidualEndpointFlow, WorldModel
from pwm_torchrl.objectives.returns import discounts

FORMS = ("pwm", "tdmpc2")
FLOW_MATCHING_SOURCES = ("teacher", "detached", "attached")


class Slices(NamedTuple):
    """A batch of trajectory slices. ``valid`` is False after an episode's end; weights are means over valid steps."""

    observation: Tensor  # [B, O], the first of each slice
    next_observation: Tensor  # [H, B, O]
    action: Tensor  # [H, B, A]
    reward: Tensor  # [H, B, 1]
    terminated: Tensor  # bool [H, B, 1]
    valid: Tensor  # bool [H, B, 1]
    task: Tensor | None = None  # int64 [B]

    def rows(self, rows: slice) -> Slices:
        """A part of the batch."""
        return Slices(
            self.observation[rows],
            self.next_observation[:, rows],
            self.action[:, rows],
            self.reward[:, rows],
            self.terminated[:, rows],
            self.valid[:, rows],
            None if self.task is None else self.task[rows],
        )

    def valid_counts(self) -> tuple[Tensor, Tensor]:
        """Valid entries per step ``[H, 1, 1]`` and in all, by which a loss divides."""
        valid = self.valid.to(self.reward.dtype)
        return valid.sum(1, keepdim=True), valid.sum()


@dataclass(frozen=True)
class SliceLossWeights:
    """Coefficients of the terms; see :class:`pwm_torchrl.objectives.PWMModelLoss`."""

    form: str  # pwm: rewards averaged over steps | tdmpc2: summed over steps; both then divided by H
    step: float  # weight of step t is step ** t
    dynamics: float = 1.0
    reward: float = 1.0
    termination: float = 1.0
    rollout: float = 1.0
    flow_matching: float = 0.0
    flow_matching_source: str = "teacher"
    self_consistency: float = 0.0


class SliceLosses(NamedTuple):
    """Weighted terms, already multiplied by their coefficients and divided by H; their sum is the loss."""

    dynamics: Tensor
    reward: Tensor
    termination: Tensor
    flow_matching: Tensor
    self_consistency: Tensor


class FlowNoise(NamedTuple):
    """Random numbers of the flow terms, drawn for a whole batch beforehand."""

    tau: Tensor  # [H, B, 1], uniform in [0, 1)
    half_step: Tensor  # [H, B, 1], of the self-consistency grid
    half_step_tau: Tensor  # [H, B, 1], a multiple of twice the half step

    def rows(self, rows: slice) -> FlowNoise:
        """A part of the batch."""
        return FlowNoise(*(x[:, rows] for x in self))


def draw_flow_noise(horizon: int, batch: int, like: Tensor, generator: torch.Generator | None = None) -> FlowNoise:
    """τ ~ U(0, 1); half steps d from {1/2, 1/4, 1/8} and τ from {0, 2d, ..., 1 − 2d}."""
    shape = (horizon, batch, 1)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)

    d = 0.5 ** (1 + (uniform() * 3).floor().clamp(max=2))
    steps = 1 / (2 * d)
    return FlowNoise(uniform(), d, (uniform() * steps).floor().clamp(max=steps - 1) * 2 * d)


def loss_weights(
    form: str,
    gamma: float,
    rho: float | None = None,
    dynamics: float | None = None,
    reward: float | None = None,
    **rest: float | str,
) -> SliceLossWeights:
    """Coefficients of PWM's form (γ^t, 1, 1) or TD-MPC2's (ρ^t with ρ = 0.5, 20, 0.1), each overridable.

    Raises:
        ConfigurationError: for an unknown form or flow-matching source.
    """
    if form not in FORMS:
        raise ConfigurationError(f"model.loss.form={form!r} is not one of {', '.join(FORMS)}.")
    source = rest.get("flow_matching_source", "teacher")
    if source not in FLOW_MATCHING_SOURCES:
        raise ConfigurationError(
            f"model.loss.flow_matching_source={source!r} is not one of {', '.join(FLOW_MATCHING_SOURCES)}."
        )
    defaults = (gamma, 1.0, 1.0) if form == "pwm" else (0.5, 20.0, 0.1)
    step, dyn, rew = (d if v is None else v for d, v in zip(defaults, (rho, dynamics, reward), strict=True))
    return SliceLossWeights(form, step, dyn, rew, **rest)  # type: ignore[arg-type]


def slice_losses(
    model: WorldModel,
    slices: Slices,
    weights: SliceLossWeights,
    noise: FlowNoise | None = None,
    valid_counts: tuple[Tensor, Tensor] | None = None,
    target: Tensor | None = None,
    reduction: str = "mean",
) -> SliceLosses:
    """World-model loss L = (L_dyn + L_rew) / H, with L_dyn = Σ_t w_t MSE(z_{t+1}, sg h(o_{t+1})).

    PWM's L_rew = mean_{t,b} w_t ℓ(r̂_t, r_t) divides the reward term by H a second time; TD-MPC2's is
    Σ_t w_t mean_b ℓ(r̂_t, r_t).

    Args:
        model (WorldModel): what is trained.
        slices (Slices): data.
        weights (SliceLossWeights): coefficients.
        noise (FlowNoise, optional): needed by the flow terms.
        valid_counts (tuple of Tensor, optional): valid entries per step ``[H, 1, 1]`` and in all, of the *whole* batch
            when ``slices`` is a part of it, so that the parts' losses add up to the batch's.
        target (Tensor, optional): z̄ ``[H, B, D]``. Defaults to ``None``, the model's encodings.
        reduction (str): ``"mean"``: L; ``"sum"``: L times the number of valid steps; ``"none"``: ``[B, H, 1]`` with
            that sum. Defaults to ``"mean"``.

    Returns:
        :class:`SliceLosses`.
    """
    horizon, batch = slices.action.shape[:2]
    valid = slices.valid.to(slices.reward.dtype)
    per_step, overall = slices.valid_counts() if valid_counts is None else valid_counts
    step_weight = discounts(weights.step, horizon, slices.reward)
    # Σ_t w_t mean_b over valid entries, and mean_{t,b} w_t over valid entries; each divided by H
    by_step = valid * step_weight / per_step.clamp_min(1) / horizon
    by_entry = valid * step_weight / overall.clamp_min(1) / horizon

    def reduced(weighted: Tensor) -> Tensor:
        if reduction == "mean":
            return weighted.sum()
        weighted = weighted * overall
        return weighted.sum() if reduction == "sum" else weighted.transpose(0, 1)

    def mse(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(-1, keepdim=True)

    task = slices.task
    if target is None:
        with torch.no_grad():
            target = model.encode(slices.next_observation, task)
    z = start = model.encode(slices.observation, task)
    latents, logits, ends = [], [], []
    for t in range(horizon):
        z, logit, end = model.predict(z, slices.action[t], task)
        latents.append(z)
        logits.append(logit)
        ends.append(end)
    latent = torch.stack(latents)

    zero = latent.new_zeros(())
    dynamics = reduced(by_step * mse(latent, target)) * weights.dynamics * weights.rollout
    by_reward = by_entry if weights.form == "pwm" else by_step
    reward = reduced(by_reward * model.reward.loss(torch.stack(logits), slices.reward))
    termination = zero
    if model.termination is not None:
        error = model.termination.loss(torch.stack([e for e in ends if e is not None]), slices.terminated)
        termination = reduced(by_entry * error) * weights.termination

    matching = consistency = zero
    if weights.flow_matching or weights.self_consistency:
        flow = model.dynamics
        if not isinstance(flow, FlowDynamics):
            raise ConfigurationError(
                "model.loss.flow_matching_weight and self_consistency_weight need model.dynamics.kind=flow."
            )
        if noise is None:
            noise = draw_flow_noise(horizon, batch, latent)
        if weights.flow_matching_source == "teacher":
            source = torch.cat([start.detach().unsqueeze(0), target[:-1]])
        else:
            source = torch.cat([start.unsqueeze(0), latent[:-1]])
            source = source.detach() if weights.flow_matching_source == "detached" else source
        action, embedding = model.mask_action(slices.action, task), model.embed(task)
        if weights.flow_matching:
            error = flow.flow_matching_error(source, target, action, noise.tau, embedding)
            matching = reduced(by_step * error) * weights.flow_matching
        if weights.self_consistency:
            if not isinstance(flow, ResidualEndpointFlow):
                raise ConfigurationError(
                    "model.loss.self_consistency_weight needs model.dynamics.parameterization=residual_endpoint."
                )
            error = flow.self_consistency_error(source, target, action, noise.half_step, noise.half_step_tau, embedding)
            consistency = reduced(by_step * error) * weights.self_consistency
    return SliceLosses(dynamics, reward * weights.reward, termination, matching, consistency)
