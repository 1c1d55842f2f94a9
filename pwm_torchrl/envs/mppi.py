"""Planning at decision time: MPPI with a policy's proposals and a terminal value, with TorchRL's planner interface."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Unbounded
from torchrl.envs import EnvBase, ExplorationType, TensorDictPrimer, set_exploration_type
from torchrl.envs.utils import exploration_type
from torchrl.modules import MPCPlannerBase

from pwm_torchrl.errors import ConfigurationError, DivergenceError

__all__ = ["PolicySeededMPPI"]


class PolicySeededMPPI(MPCPlannerBase):
    """Model-predictive path integral control as TD-MPC2 plans (https://arxiv.org/abs/2310.16828).

    A Gaussian over the actions of the next H steps is refined in a few rounds. Of N candidate plans, P follow the
    policy and the others are drawn from the Gaussian; each is rolled out in the model and scored with
    J = Σ_{t<H} γ^t r_t + γ^H V(z_H), and the K best, weighted by exp(temperature · (J − max J)), give the next
    Gaussian. The first of the P follows the policy's mode, so that in the model the best candidate is never worse than
    the policy. The sum stops where a candidate is done; V counts 0 after a termination and is taken at the last state
    after a truncation.

    Unlike TorchRL's :class:`~torchrl.modules.MPPIPlanner`, it uses a policy, starts from the previous step's plan, and
    its weights do not overflow for large returns. With ``ExplorationType.RANDOM`` it acts as TD-MPC2 does in training:
    one of the K best plans is drawn by weight, and the Gaussian's noise is added. Otherwise, the action is the
    Gaussian's mean.

    Args:
        env (EnvBase): the model, with continuous actions and not batch-locked, such as
            :class:`~torchrl.envs.ModelBasedEnvBase` or a stateless environment; it is stepped, never reset.
        policy (TensorDictModuleBase): sets the action from the model's observations according to TorchRL's exploration
            type, such as :func:`~pwm_torchrl.modules.actor_module`.
        value_network (TensorDictModuleBase): sets the value of the model's observations, such as
            :func:`~pwm_torchrl.modules.value_module`. For a Q-function, a sequence of the policy and the Q-function.

    Keyword Args:
        planning_horizon (int): ``H``. Defaults to ``3``.
        optim_steps (int): number of rounds. Defaults to ``6``.
        num_candidates (int): N, including the policy's candidates. Defaults to ``512``.
        num_policy_candidates (int): ``P``. Defaults to ``24``.
        top_k (int): ``K``. Defaults to ``64``.
        temperature (float): factor of the returns in the weights; 0 weights the K best equally. Defaults to ``0.5``.
        min_std (float): smallest standard deviation, in units of half the action range. Defaults to ``0.05``.
        max_std (float): largest and initial standard deviation, in the same units. Defaults to ``2.0``.
        gamma (float): discount. Defaults to ``0.99``.
        warm_start (bool): start with the previous step's plan, shifted by one step. Defaults to ``True``.
        reward_key (NestedKey): reward of a step of the model. Defaults to ``("next", "reward")``.
        action_key (NestedKey): action of the model, the policy and the planner. Defaults to ``"action"``.
        value_key (NestedKey): output of the value network. Defaults to ``"state_value"``.
        plan_key (NestedKey): the previous step's plan. Defaults to ``"plan"``.

    Raises:
        ConfigurationError: for an argument out of range, or an unsuitable ``env``.

    .. note:: The previous step's plan is part of the data, not of the module, like TorchRL's recurrent states. With a
        warm start, the environment needs :meth:`make_tensordict_primer`, which also resets the plan at the start of
        each episode. TorchRL's collectors append it with ``auto_register_policy_transforms=True``.

    Examples:
        >>> from torchrl.envs import PendulumEnv
        >>> from tensordict.nn import TensorDictModule
        >>> from pwm_torchrl.envs import PolicySeededMPPI
        >>> env = PendulumEnv()  # its own model
        >>> policy = TensorDictModule(lambda speed: -speed.unsqueeze(-1), ["thdot"], ["action"])
        >>> value = TensorDictModule(lambda angle: -angle.square().unsqueeze(-1), ["th"], ["state_value"])
        >>> planner = PolicySeededMPPI(env, policy, value, num_candidates=32, num_policy_candidates=4, top_k=8)
        >>> env.append_transform(planner.make_tensordict_primer()).rollout(5, planner)["action"].shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        value_network: TensorDictModuleBase,
        *,
        planning_horizon: int = 3,
        optim_steps: int = 6,
        num_candidates: int = 512,
        num_policy_candidates: int = 24,
        top_k: int = 64,
        temperature: float = 0.5,
        min_std: float = 0.05,
        max_std: float = 2.0,
        gamma: float = 0.99,
        warm_start: bool = True,
        reward_key: NestedKey = ("next", "reward"),
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_value",
        plan_key: NestedKey = "plan",
    ) -> None:
        _check_env(env)
        for name, value in (("planning_horizon", planning_horizon), ("optim_steps", optim_steps)):
            if value < 1:
                raise ConfigurationError(f"{name}={value} must be at least 1.")
        if not 0 <= num_policy_candidates <= num_candidates:
            raise ConfigurationError(
                f"num_policy_candidates={num_policy_candidates} must be between 0 and num_candidates={num_candidates}."
            )
        if not 1 <= top_k <= num_candidates:
            raise ConfigurationError(f"top_k={top_k} must be between 1 and num_candidates={num_candidates}.")
        if temperature < 0:
            raise ConfigurationError(f"temperature={temperature} must not be negative.")
        if not 0 < min_std <= max_std:
            raise ConfigurationError(f"min_std={min_std} must be positive and at most max_std={max_std}.")
        if not 0 < gamma <= 1:
            raise ConfigurationError(f"gamma={gamma} must be above 0 and at most 1.")
        super().__init__(env, action_key=action_key)
        self.policy = policy
        self.value_network = value_network
        self.planning_horizon = planning_horizon
        self.optim_steps = optim_steps
        self.num_candidates = num_candidates
        self.num_policy_candidates = num_policy_candidates
        self.top_k = top_k
        self.temperature = temperature
        self.min_std = min_std
        self.max_std = max_std
        self.gamma = gamma
        self.warm_start = warm_start
        self.reward_key = reward_key
        self.action_key = action_key
        self.value_key = value_key
        self.plan_key = plan_key
        if warm_start:
            self.in_keys = [*env.observation_spec.keys(True, True), plan_key]
            self.out_keys = [action_key, _under_next(plan_key)]
        spec = env.action_spec_unbatched
        bounded = isinstance(spec, Bounded)
        low, high = (spec.space.low, spec.space.high) if bounded else (-torch.ones(spec.shape), torch.ones(spec.shape))
        self.action_spec = spec
        self.register_buffer("centre", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)
        self.to(env.device)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """A transform that adds the plan to an environment's data and resets it at the start of each episode."""
        shape = (self.planning_horizon, *self.action_spec.shape)
        return TensorDictPrimer({self.plan_key: Unbounded(shape, device=self.env.device)}, expand_specs=True)

    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **kwargs: object
    ) -> TensorDictBase:
        """Set the action of states ``[*batch]`` and, with a warm start, the plan for the next step.

        Raises:
            ConfigurationError: with a warm start, if there is no plan in ``tensordict``.
            DivergenceError: if no candidate has a finite return.
        """
        action, plan = self.plan(tensordict)
        outputs = (action, torch.cat([plan[..., 1:, :], torch.zeros_like(plan[..., :1, :])], -2))
        return self._write_to_tensordict(tensordict, list(outputs[: len(self.out_keys)]), tensordict_out)

    def planning(self, tensordict: TensorDictBase) -> Tensor:
        """Action ``[*batch, A]``; see :meth:`forward`."""
        return self.plan(tensordict)[0]

    @torch.no_grad()
    def plan(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Action ``[*batch, A]`` and the Gaussian's mean ``[*batch, H, A]`` in units of half the action range."""
        batch = tensordict.batch_size
        mean = self._first_mean(tensordict)
        state = self._model_state(tensordict)
        std = torch.full_like(mean, self.max_std)
        proposed = self.policy_candidates(state)
        drawn = (len(state), self.num_candidates - self.num_policy_candidates, *mean.shape[-2:])
        for _ in range(self.optim_steps):
            noise = torch.randn(drawn, dtype=mean.dtype, device=mean.device)
            candidates = torch.cat([proposed, self._clamped(mean.unsqueeze(1) + std.unsqueeze(1) * noise)], 1)
            elites, weight = self._elites(candidates, self.candidate_returns(state, candidates))
            mean = (weight * elites).sum(1)
            std = (weight * (elites - mean.unsqueeze(1)).square()).sum(1).sqrt().clamp(self.min_std, self.max_std)
        first = mean[:, 0]
        if exploration_type() == ExplorationType.RANDOM:
            chosen = torch.multinomial(weight.flatten(1), 1).squeeze(1)
            first = elites[torch.arange(len(elites), device=chosen.device), chosen, 0]
            first = first + std[:, 0] * torch.randn_like(first)
        action = self.centre + self.half_range * self._clamped(first)
        return action.unflatten(0, batch) if batch else action[0], mean.unflatten(0, batch) if batch else mean[0]

    @torch.no_grad()
    def policy_candidates(self, state: TensorDictBase) -> Tensor:
        """Plans ``[B, P, H, A]`` of the policy in the model from states ``[B]``: first its mode, then samples."""
        kinds = [(ExplorationType.DETERMINISTIC, 1), (ExplorationType.RANDOM, self.num_policy_candidates - 1)]
        plans = [torch.empty(len(state), 0, self.planning_horizon, *self.action_spec.shape, device=state.device)]
        for kind, count in kinds if self.num_policy_candidates else ():
            if count:
                plans.append(self._policy_rollout(_repeated(state, count), kind).unflatten(0, (len(state), count)))
        return torch.cat(plans, 1)

    @torch.no_grad()
    def candidate_returns(self, state: TensorDictBase, candidates: Tensor) -> Tensor:
        """J ``[B, N]`` of plans ``[B, N, H, A]``, in units of half the action range, from states ``[B]``."""
        count = candidates.shape[1]
        actions = self.centre + self.half_range * candidates.flatten(0, 1)
        data = _repeated(state, count)
        last = data.select(*self.value_network.in_keys, strict=False)
        total: Tensor | float = 0.0
        alive = weight = torch.ones(len(data), 1, device=actions.device, dtype=actions.dtype)
        for t in range(self.planning_horizon):
            data = self.env.step(data.set(self.action_key, actions[:, t]))
            total = total + weight * alive * data.get(self.reward_key)
            terminated, done = (data.get(("next", key)).to(weight.dtype) for key in ("terminated", "done"))
            data = self.env.step_mdp(data)
            # Candidates that are done keep their last state and the weight of its value.
            last = data.select(*self.value_network.in_keys).where(alive.squeeze(-1) > 0, last)
            weight = torch.where(alive > 0, weight * self.gamma * (1 - terminated), weight)
            alive = alive * (1 - done)
        total = total + weight * self.value_network(last).get(self.value_key)
        return total.unflatten(0, (-1, count)).squeeze(-1)

    def _elites(self, candidates: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        """The K best ``[B, K, H, A]`` and their weights ``[B, K, 1, 1]``; non-finite returns come last."""
        finite = returns.isfinite()
        if not finite.any(1).all():
            raise DivergenceError("None of the planner's candidates has a finite return in the model.")
        best, index = returns.masked_fill(~finite, -torch.inf).topk(self.top_k, 1)
        weight = (self.temperature * (best - best[:, :1])).exp().masked_fill(best == -torch.inf, 0.0)
        weight = weight / weight.sum(1, keepdim=True)
        return candidates[torch.arange(len(index), device=index.device).unsqueeze(1), index], weight[..., None, None]

    def _policy_rollout(self, data: TensorDictBase, kind: ExplorationType) -> Tensor:
        """Actions ``[B, H, A]`` of the policy in the model, in units of half the action range."""
        actions = []
        for _ in range(self.planning_horizon):
            with set_exploration_type(kind):
                data = self.policy(data)
            actions.append(self._clamped((data.get(self.action_key) - self.centre) / self.half_range))
            data = self.env.step_mdp(self.env.step(data))
        return torch.stack(actions, 1)

    def _clamped(self, actions: Tensor) -> Tensor:
        return actions.clamp(-1, 1) if isinstance(self.action_spec, Bounded) else actions

    def _first_mean(self, tensordict: TensorDictBase) -> Tensor:
        """Initial mean of the search, ``[B, H, A]``."""
        shape = (tensordict.numel(), self.planning_horizon, *self.action_spec.shape)
        if not self.warm_start:
            return torch.zeros(shape, dtype=self.centre.dtype, device=self.centre.device)
        plan = tensordict.get(self.plan_key, None)
        if plan is None:
            raise ConfigurationError(
                f"warm_start=True needs the previous step's plan in the entry {self.plan_key!r}: append "
                "make_tensordict_primer() to the environment that the planner acts in, or set warm_start=False."
            )
        return plan.reshape(shape)

    def _model_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The entries that the model, the policy and the value network read, ``[B]``."""
        keys = [*self.env.observation_spec.keys(True, True), *self.env.state_spec.keys(True, True)]
        keys += [key for key in [*self.policy.in_keys, *self.value_network.in_keys] if key != self.action_key]
        return tensordict.select(*keys, strict=False).reshape(-1)


def _check_env(env: EnvBase) -> None:
    spec = env.action_spec_unbatched
    if not isinstance(spec, (Bounded, Unbounded)) or len(spec.shape) != 1 or not spec.dtype.is_floating_point:
        raise ConfigurationError(
            f"env has actions {type(spec).__name__} of shape {list(spec.shape)}; "
            "the planner needs a vector of real numbers."
        )
    if env.batch_locked:
        raise ConfigurationError("env.batch_locked=True; the planner needs an environment for any number of states.")


def _repeated(state: TensorDictBase, count: int) -> TensorDictBase:
    """Repeat each of the states ``[B]`` ``count`` times: ``[B · count]``."""
    return state.unsqueeze(1).expand(len(state), count).reshape(-1)


def _under_next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
