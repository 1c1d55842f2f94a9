"""PWM written straight from its equations in plain eager PyTorch: what the speed suite compares the package with.

Nothing here is shared with the package, nothing is fused, hoisted, batched over the horizon or compiled: modules of
``torch.nn`` called in a loop over time, one optimizer step after each loss. Tests hold it against the golden vectors.
Shapes are time-major: H horizon, B batch, O observation, A action, D latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 8  # features of a SimNorm group


class SimNorm(nn.Module):
    """Softmax within groups of features."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x.view(*x.shape[:-1], -1, GROUP), -1).view(*x.shape)


def mlp(sizes: Sequence[int], end: nn.Module | None = None) -> nn.Sequential:
    """Linear -> LayerNorm -> Mish, the last layer a plain Linear or Linear -> LayerNorm -> ``end``."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(i, o), nn.LayerNorm(o), nn.Mish()]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    return nn.Sequential(*layers, *([] if end is None else [nn.LayerNorm(sizes[-1]), end]))


def policy_mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear -> Mish -> LayerNorm blocks, then a plain Linear."""
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(i, o), nn.Mish(), nn.LayerNorm(o)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class PlainPWM(nn.Module):
    """World model, actor and three critics, and the three losses of PWM.

    Args:
        observation (int): ``O``.
        action (int): ``A``.
        latent (int): ``D``.
        units (sequence of int): hidden widths of dynamics and reward head.
        encoder_units (sequence of int): hidden widths of the encoder.
        actor_units (sequence of int): hidden widths of the actor.
        critic_units (sequence of int): hidden widths of a critic.
        solver (str): ``mlp``, ``euler`` or ``heun``; the last two integrate a flow in the endpoint parameterisation.
        substeps (int): K of the flow; 1 is the residual dynamics, which knows no flow time.
    """

    def __init__(
        self,
        observation: int,
        action: int,
        latent: int,
        units: Sequence[int],
        encoder_units: Sequence[int],
        actor_units: Sequence[int],
        critic_units: Sequence[int],
        solver: str = "mlp",
        substeps: int = 1,
    ) -> None:
        super().__init__()
        self.solver, self.substeps = solver, substeps
        self.timed = solver != "mlp" and substeps > 1
        step = latent + action
        self.encoder = mlp([observation, *encoder_units, latent], SimNorm())
        self.dynamics = mlp([step + self.timed, *units, latent], SimNorm() if solver == "mlp" else None)
        self.reward = mlp([step, *units, 1])
        self.actor = policy_mlp([latent, *actor_units, action])
        self.log_std = nn.Parameter(torch.full((action,), -1.0))
        self.critics = nn.ModuleList(policy_mlp([latent, *critic_units, 1]) for _ in range(3))

    # Dynamics ---------------------------------------------------------------------------------------------------------

    def endpoint(self, z: Tensor, a: Tensor, tau: float) -> Tensor:
        """x̂ = softmax_groups(log(max(z, 1e-6)) + g(z, a, τ))."""
        inputs = [z, a, torch.full_like(z[..., :1], tau)] if self.timed else [z, a]
        logits = torch.log(torch.clamp(z, min=1e-6)) + self.dynamics(torch.cat(inputs, -1))
        return SimNorm()(logits)

    def step(self, z: Tensor, a: Tensor) -> Tensor:
        """z_{t+1} ``[B, D]``."""
        if self.solver == "mlp":
            return self.dynamics(torch.cat([z, a], -1))
        for k in range(self.substeps):
            m = self.substeps - k
            x = self.endpoint(z, a, k / self.substeps)
            if m == 1:
                z = x
            elif self.solver == "euler":
                z = (1 - 1 / m) * z + 1 / m * x
            else:
                predictor = (1 - 1 / m) * z + 1 / m * x
                y = self.endpoint(predictor, a, (k + 1) / self.substeps)
                z = (m - 1) / m * z + (m - 2) / (2 * m * (m - 1)) * x + 1 / (2 * (m - 1)) * y
        return z

    # Losses -----------------------------------------------------------------------------------------------------------

    def model_loss(self, observation: Tensor, action: Tensor, reward: Tensor, gamma: float = 0.99) -> Tensor:
        """L = Σ_t γ^t (MSE(z_{t+1}, z̄_{t+1}) + (r̂_t − r_t)² / H) / H of o ``[H + 1, B, O]``, a, r ``[H, B, .]``."""
        horizon = len(action)
        z = self.encoder(observation[0])
        loss = torch.zeros(())
        for t in range(horizon):
            with torch.no_grad():
                target = self.encoder(observation[t + 1])
            predicted = self.reward(torch.cat([z, action[t]], -1))
            z = self.step(z, action[t])
            loss = loss + gamma**t * (F.mse_loss(z, target) + F.mse_loss(predicted, reward[t]) / horizon)
        return loss / horizon

    def rollout(self, z: Tensor, horizon: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents ``[H + 1, B, D]`` and rewards ``[H, B, 1]`` of the policy in the model."""
        latents, rewards = [z], []
        for t in range(horizon):
            u = self.actor(z.detach())
            if noise is not None:
                u = u + torch.exp(torch.clamp(self.log_std, min=-1.427)) * noise[t]
            a = torch.tanh(u)
            rewards.append(self.reward(torch.cat([z, a], -1)))
            z = self.step(z, a)
            latents.append(z)
        return torch.stack(latents), torch.stack(rewards)

    def values(self, z: Tensor) -> Tensor:
        """V_k(z) ``[3, ..., 1]``."""
        return torch.stack([critic(z) for critic in self.critics])

    def actor_loss(self, z: Tensor, horizon: int, noise: Tensor | None, gamma: float = 0.99) -> tuple[Tensor, ...]:
        """−mean(J) / H, J = Σ_{t<H} γ^t r_t + γ^H min_k V_k(z_H); and the rollout's latents and rewards."""
        latents, rewards = self.rollout(z, horizon, noise)
        total = gamma**horizon * self.values(latents[-1]).min(0).values
        for t in range(horizon):
            total = total + gamma**t * rewards[t]
        return -total.mean() / horizon, latents.detach(), rewards.detach()

    @torch.no_grad()
    def targets(self, latents: Tensor, rewards: Tensor, gamma: float = 0.99, lmbda: float = 0.95) -> Tensor:
        """TD(λ) targets ``[H, B, 1]``."""
        values = self.values(latents[1:]).min(0).values
        following, out = values[-1], []
        for t in reversed(range(len(rewards))):
            following = rewards[t] + gamma * ((1 - lmbda) * values[t] + lmbda * following)
            out.append(following)
        return torch.stack(out[::-1])

    def critic_loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Mean over critics and states of (V_k(z) − target)²."""
        return F.mse_loss(self.values(z), target.expand(3, *target.shape))


class PlainUpdates:
    """The three updates of :class:`PlainPWM`, each with its own Adam and gradient clipping.

    Args:
        pwm (PlainPWM): what is trained.
        horizon (int): ``H``.
    """

    def __init__(self, pwm: PlainPWM, horizon: int = 16) -> None:
        self.pwm, self.horizon = pwm, horizon
        model = [*pwm.encoder.parameters(), *pwm.dynamics.parameters(), *pwm.reward.parameters()]
        self.parameters = {
            "model": model,
            "actor": [*pwm.actor.parameters(), pwm.log_std],
            "critic": list(pwm.critics.parameters()),
        }
        self.adam = {
            "model": torch.optim.Adam(model, 3e-4),
            "actor": torch.optim.Adam(self.parameters["actor"], 5e-4, (0.7, 0.95)),
            "critic": torch.optim.Adam(self.parameters["critic"], 5e-4, (0.7, 0.95)),
        }
        self.norms = {"model": 20.0, "actor": 1.0, "critic": 100.0}

    def _step(self, name: str, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters[name])
        for parameter, gradient in zip(self.parameters[name], gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters[name], self.norms[name])
        self.adam[name].step()

    def model(self, observation: Tensor, action: Tensor, reward: Tensor) -> None:
        """One model update."""
        self._step("model", self.pwm.model_loss(observation, action, reward))

    def actor(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """One actor update; states and targets ``[H · B, .]`` for the critics."""
        with torch.no_grad():
            start = self.pwm.encoder(observation)
        noise = torch.randn(self.horizon, len(start), self.pwm.log_std.shape[0])
        loss, latents, rewards = self.pwm.actor_loss(start, self.horizon, noise)
        self._step("actor", loss)
        return latents[:-1].flatten(0, 1), self.pwm.targets(latents, rewards).flatten(0, 1)

    def critics(self, states: Tensor, targets: Tensor, passes: int, minibatches: int) -> None:
        """Shuffled passes over imagined states."""
        for rows in self.shuffled(len(states), passes, minibatches):
            self._step("critic", self.pwm.critic_loss(states[rows], targets[rows]))

    @staticmethod
    def shuffled(count: int, passes: int, minibatches: int) -> Iterable[Tensor]:
        """Rows of each minibatch."""
        for _ in range(passes):
            yield from torch.randperm(count).split(-(-count // minibatches))
