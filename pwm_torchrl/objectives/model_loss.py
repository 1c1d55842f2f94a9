"""World-model loss on trajectory slices: pure functions for the arithmetic, and the LossModule around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from pwm_torchrl.config import check_few_step_rollout
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import Dynamics, FlowDynamics, ResidualEndpointFlow, WorldModel
from pwm_torchrl.modules.numerics import products_in
from pwm_torchrl.objectives.base import PWMLoss, backward_in_parts, check_shape, swapped
from pwm_torchrl.objectives.imagination import discounts

# World-model losses on slices of trajectories, as pure functions ------------------------------------------------------


FORMS = ("pwm", "tdmpc2")
FLOW_MATCHING_SOURCES = ("teacher", "detached", "attached")


class Slices(NamedTuple):
    """A batch of trajectory slices; ``valid`` is False after an episode's end, and losses average over valid steps."""

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
        """Number of valid entries per step ``[H, 1, 1]`` and in total, the divisors of the losses."""
        valid = self.valid.to(self.reward.dtype)
        return valid.sum(1, keepdim=True), valid.sum()


@dataclass(frozen=True)
class SliceLossWeights:
    """Coefficients of the loss terms; see :class:`pwm_torchrl.objectives.PWMModelLoss`."""

    form: str  # pwm: reward losses averaged over steps | tdmpc2: summed over steps; both are then divided by H
    step: float  # weight of step t is step ** t
    dynamics: float = 1.0
    reward: float = 1.0
    termination: float = 1.0
    rollout: float = 1.0
    one_step: float = 0.0
    flow_matching: float = 0.0
    flow_matching_source: str = "teacher"
    self_consistency: float = 0.0
    few_step: float = 1.0
    few_step_rollout: bool = False

    def roll_out_few_step_beside(self, dynamics: Dynamics) -> bool:
        """Whether the few-step map of ``dynamics`` is rolled out in addition to the solver."""
        return dynamics.few_step and self.few_step > 0 and not self.few_step_rollout


class SliceLosses(NamedTuple):
    """Weighted terms, already multiplied by their coefficients and divided by H; their sum is the loss."""

    dynamics: Tensor
    reward: Tensor
    termination: Tensor
    flow_matching: Tensor
    self_consistency: Tensor
    few_step: Tensor


class FlowNoise(NamedTuple):
    """Random numbers of the flow terms, drawn in advance for the whole batch."""

    tau: Tensor  # [H, B, 1], uniform in [0, 1)
    half_step: Tensor  # [H, B, 1], half a step of the self-consistency grid
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
    **rest: float | str | bool,
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
    Σ_t w_t mean_b ℓ(r̂_t, r_t). With ``weights.one_step``, every later observation is also encoded with gradient, and
    the same terms for one step from it are added, with equal weights for all steps.

    A flow with a few-step map for imagination trains both maps: the few-step map's rollout adds
    Σ_t w_t MSE(z^f_{t+1}, sg h(o_{t+1})), weighted by ``weights.few_step``. With ``weights.few_step_rollout``, only the
    few-step map is rolled out, and flow matching trains the solver's velocity field.

    Args:
        model (WorldModel): the model to train.
        slices (Slices): training data.
        weights (SliceLossWeights): coefficients.
        noise (FlowNoise, optional): random numbers of the flow terms. Defaults to ``None``, drawn here.
        valid_counts (tuple of Tensor, optional): number of valid entries per step ``[H, 1, 1]`` and in total; if
            ``slices`` is a part of a batch, those of the *whole* batch, so that the parts' losses add up to the
            batch's. Defaults to ``None``, counted here.
        target (Tensor, optional): z̄ ``[H, B, D]``. Defaults to ``None``, the model's own encodings.
        reduction (str): ``"mean"``: L; ``"sum"``: L times the number of valid steps; ``"none"``: ``[B, H, 1]``, which
            add up to that sum. Defaults to ``"mean"``.

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
    # One-step predictions start from these encodings; the rollout continues only the first.
    if weights.one_step:
        encoded = model.encode(torch.cat([slices.observation.unsqueeze(0), slices.next_observation]), task)
        starts = encoded[:-1]
        target = encoded[1:].detach() if target is None else target
    else:
        if target is None:
            with torch.no_grad():
                target = model.encode(slices.next_observation, task)
        starts = model.encode(slices.observation, task).unsqueeze(0)
    start = starts[0]
    action, embedding = model.mask_action(slices.action, task), model.embed(task)

    def rolled_out(step: Callable[[Tensor, Tensor, Tensor | None], Tensor], latents: list[Tensor]) -> list[Tensor]:
        for t in range(len(latents) - 1, horizon):
            latents.append(step(latents[-1], action[t], embedding))
        return latents

    step = model.dynamics.imagine if weights.few_step_rollout else model.dynamics
    if len(starts) > 1:
        once = step(starts, action[: len(starts)], embedding)
    else:  # same shape as the later steps, so that a compiler makes only one graph
        once = step(start, action[0], embedding).unsqueeze(0)
    latents = rolled_out(step, [start, once[0]])
    latent = torch.stack(latents[1:])

    zero = latent.new_zeros(())
    few_step = zero
    if weights.roll_out_few_step_beside(model.dynamics):
        imagined = torch.stack(rolled_out(model.dynamics.imagine, [start])[1:])
        few_step = reduced(by_step * mse(imagined, target)) * weights.dynamics * weights.few_step
    dynamics = reduced(by_step * mse(latent, target)) * weights.dynamics * weights.rollout
    # The heads take all steps at once, since no later latent depends on their outputs.
    logits = model.reward(
        torch.cat([torch.stack(latents[:-1]), starts[1:]]), torch.cat([action, action[1 : len(starts)]]), embedding
    )
    by_reward = by_entry if weights.form == "pwm" else by_step
    reward = reduced(by_reward * model.reward.loss(logits[:horizon], slices.reward))
    termination = zero
    if model.termination is not None:
        ends = model.termination(torch.cat([latent, once[1:]]), embedding)
        error = model.termination.loss(ends[:horizon], slices.terminated)
        termination = reduced(by_entry * error) * weights.termination
    if len(starts) > 1:
        by_start = torch.zeros_like(by_step)
        by_start[1:] = valid[1:] / per_step[1:].clamp_min(1) / horizon * weights.one_step

        def later(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:1]), x])

        dynamics = dynamics + reduced(by_start * later(mse(once[1:], target[1:]))) * weights.dynamics
        reward = reward + reduced(by_start * later(model.reward.loss(logits[horizon:], slices.reward[1:])))
        if model.termination is not None:
            error = model.termination.loss(ends[horizon:], slices.terminated[1:])
            termination = termination + reduced(by_start * later(error)) * weights.termination

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
    return SliceLosses(dynamics, reward * weights.reward, termination, matching, consistency, few_step)


# World-model loss over TensorDicts ------------------------------------------------------------------------------------


MASK_KEY = ("collector", "mask")


class PWMModelLoss(PWMLoss):
    r"""Loss of PWM's latent world model on slices of trajectories.

    The latent is rolled out from the first observation with the slice's actions. It is trained to match the encodings
    of the next observations (with stopped gradient, sg), and its reward logits to match the rewards:

    .. math::

        L = \frac{1}{H} \Big( c_d \sum_{t<H} w^t \, \operatorname{mean}_b
        \operatorname{MSE}\big(z_{t+1}, \operatorname{sg} h(o_{t+1})\big) + c_r L_r \Big),
        \qquad z_0 = h(o_0), \quad z_{t+1} = d(z_t, a_t)

    where the reward loss :math:`\ell` is a cross-entropy or squared error, weighted like the latent error and averaged
    or summed over steps:

    .. math::

        L_r = \frac{1}{H} \sum_{t<H} w^t \operatorname{mean}_b \ell(\hat r_t, r_t) \;\;\text{(pwm)}, \qquad
        L_r = \sum_{t<H} w^t \operatorname{mean}_b \ell(\hat r_t, r_t) \;\;\text{(tdmpc2)}

    The step weight w is γ or ρ. Means are over valid steps: steps after the first ``done`` in a slice are masked. The
    weights below add further terms of this kind. References: https://arxiv.org/abs/2407.02466 (PWM) and
    https://arxiv.org/abs/2310.16828 (TD-MPC2).

    Args:
        world_model (WorldModel): the model; the loss trains its parameters.

    Keyword Args:
        form (str): ``"pwm"`` (weights γ^t, coefficients 1, rewards averaged over steps) or ``"tdmpc2"`` (weights ρ^t,
            coefficients 20 and 0.1, rewards summed over steps). Defaults to ``"pwm"``.
        gamma (float): discount, the step weight of ``form="pwm"``. Defaults to ``0.99``.
        rho (float, optional): step weight. Defaults to γ for ``"pwm"`` and ``0.5`` for ``"tdmpc2"``.
        dynamics_coef (float, optional): coefficient of the latent error. Defaults to the form's.
        reward_coef (float, optional): coefficient of the reward loss. Defaults to the form's.
        termination_coef (float): coefficient of the termination loss. Defaults to ``1.0``.
        rollout_weight (float): λ_roll, weight of the latent error of rollouts. Defaults to ``1.0``.
        one_step_weight (float): weight of one-step terms from every later observation of the slice, added to the
            rollout from the first. Defaults to ``0.0``.
        flow_matching_weight (float): λ_fm. Defaults to ``0.0``.
        flow_matching_source (str): where the flow starts: ``"teacher"`` (encodings), or the rollout latent
            ``"detached"`` or ``"attached"``. Defaults to ``"teacher"``.
        self_consistency_weight (float): λ_sc. Defaults to ``0.0``.
        few_step_weight (float): weight of the few-step map's rollout, for dynamics that have such a map. Defaults to
            ``1.0``.
        few_step_rollout (bool): roll out the few-step map instead of the solver, whose velocity field is then trained
            by flow matching only. Defaults to ``False``.
        reduction (str): ``"mean"`` over valid steps; ``"sum"``, the mean times their number; or ``"none"``, which
            returns ``[B, H, 1]`` per term, 0 at masked steps, that add up to that sum. Defaults to ``"mean"``.
        delay_target (bool): encode the next observations with target parameters, moved by a TorchRL target updater
            such as :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``False``, the model's own parameters.
        compile (bool): compile the evaluation of the dynamics network, which is called at every step. Defaults to
            ``False``.
        precision (str): precision of matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``. Defaults to ``"fp32"``.

    The input has batch size ``[B, H]``; the output is a TensorDict of scalars: ``loss_dynamics``, ``loss_reward`` and,
    if enabled, ``loss_termination``, ``loss_flow_matching``, ``loss_self_consistency``, ``loss_few_step``; their sum is
    the loss.

    Raises:
        ConfigurationError: for an unknown form or source, or ``few_step_rollout`` with dynamics that have no few-step
            map or without flow matching.

    .. note:: ``tensordict`` may hold a mask under :attr:`~torchrl.objectives.LossModule.loss_mask_key`, by default
        ``("collector", "mask")``, as :class:`~torchrl.data.SliceSampler` writes it with ``pad_output=True``; masked
        steps are treated as steps after the end.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from pwm_torchrl.modules import WorldModelSpec, make_world_model
        >>> from pwm_torchrl.objectives import PWMModelLoss
        >>> loss = PWMModelLoss(make_world_model(WorldModelSpec(3, 1, 16, [32], [32])))
        >>> data = TensorDict(
        ...     observation=torch.randn(8, 5, 3),
        ...     action=torch.rand(8, 5, 1),
        ...     next=TensorDict(
        ...         observation=torch.randn(8, 5, 3),
        ...         reward=torch.randn(8, 5, 1),
        ...         done=torch.zeros(8, 5, 1, dtype=torch.bool),
        ...         terminated=torch.zeros(8, 5, 1, dtype=torch.bool),
        ...         batch_size=[8, 5],
        ...     ),
        ...     batch_size=[8, 5],
        ... )
        >>> sorted(loss(data).keys())
        ['loss_dynamics', 'loss_reward']
    """

    @dataclass
    class _AcceptedKeys:
        """Configurable keys.

        Attributes:
            observation (NestedKey): observation, also under "next". Defaults to ``"observation"``.
            action (NestedKey): action in [−1, 1]. Defaults to ``"action"``.
            reward (NestedKey): reward, under "next". Defaults to ``"reward"``.
            done (NestedKey): end of an episode, under "next". Defaults to ``"done"``.
            terminated (NestedKey): termination, under "next". Defaults to ``"terminated"``.
            task (NestedKey): task index ``[B, H]``, multi-task models only. Defaults to ``"task"``.
        """

        observation: NestedKey = "observation"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        task: NestedKey = "task"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    world_model: WorldModel
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(
        self,
        world_model: WorldModel,
        *,
        form: str = "pwm",
        gamma: float = 0.99,
        rho: float | None = None,
        dynamics_coef: float | None = None,
        reward_coef: float | None = None,
        termination_coef: float = 1.0,
        rollout_weight: float = 1.0,
        one_step_weight: float = 0.0,
        flow_matching_weight: float = 0.0,
        flow_matching_source: str = "teacher",
        self_consistency_weight: float = 0.0,
        few_step_weight: float = 1.0,
        few_step_rollout: bool = False,
        reduction: str = "mean",
        delay_target: bool = False,
        compile: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__(reduction, precision)
        self.convert_to_functional(world_model, "world_model", create_target_params=delay_target)
        self.delay_target = delay_target
        if compile:
            world_model.compile_pieces()
        self.multi_task = world_model.task is not None
        self.weights = loss_weights(
            form,
            gamma,
            rho,
            dynamics_coef,
            reward_coef,
            termination=termination_coef,
            rollout=rollout_weight,
            one_step=one_step_weight,
            flow_matching=flow_matching_weight,
            flow_matching_source=flow_matching_source,
            self_consistency=self_consistency_weight,
            few_step=few_step_weight,
            few_step_rollout=few_step_rollout,
        )
        check_few_step_rollout(few_step_rollout, world_model.dynamics.few_step, flow_matching_weight)

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [
            keys.observation,
            keys.action,
            *(unravel_key(("next", key)) for key in (keys.observation, keys.reward, keys.done, keys.terminated)),
            *([keys.task] if self.multi_task else []),
        ]

    @property
    def written_keys(self) -> list[NestedKey]:
        names = ["loss_dynamics", "loss_reward"]
        if self.world_model.termination is not None:
            names.append("loss_termination")
        if self.weights.flow_matching:
            names.append("loss_flow_matching")
        if self.weights.self_consistency:
            names.append("loss_self_consistency")
        if self.weights.roll_out_few_step_beside(self.world_model.dynamics):
            names.append("loss_few_step")
        return names

    def read(self, tensordict: TensorDictBase) -> Slices:
        """Check a batch-major ``[B, H]`` TensorDict, and return its tensors time-major.

        Raises:
            ValueError: for shapes that would only work by broadcasting.
        """
        keys = self.tensor_keys
        if tensordict.ndim == 3 and tensordict.shape[-1] == 1:
            # If all tensors passed to `dispatch` have one feature, it takes that dimension for a batch dimension.
            tensordict = tensordict.copy()
            tensordict.batch_size = tensordict.batch_size[:2]
        if tensordict.ndim != 2:
            raise ValueError(
                f"PWMModelLoss needs slices of batch size [B, H]; got batch size {list(tensordict.shape)}."
            )
        batch, horizon = tensordict.shape

        def get(key: NestedKey, *, nested: bool = True) -> Tensor:
            value = tensordict[unravel_key(("next", key)) if nested else key]
            check_shape(str(key), value, (batch, horizon, *(None,) * (value.ndim - 2)))
            return value.transpose(0, 1)

        done = get(keys.done)
        reward, terminated = get(keys.reward).detach(), get(keys.terminated)
        for name, value in (("reward", reward), ("done", done), ("terminated", terminated)):
            check_shape(name, value, (horizon, batch, 1))
        ended_before = done.cumsum(0) - done.long()
        valid = ended_before == 0
        for key in self._loss_mask_keys():
            mask = tensordict.get(key, None)
            if mask is not None:
                valid = valid & mask.reshape(batch, horizon, 1).transpose(0, 1)
        return Slices(
            observation=get(keys.observation, nested=False)[0],
            next_observation=get(keys.observation),
            action=get(keys.action, nested=False),
            reward=reward,
            terminated=terminated,
            valid=valid,
            task=tensordict[keys.task][:, 0] if self.multi_task else None,
        )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses of slices ``[B, H]``."""
        slices = self.read(tensordict)
        return self.evaluate(slices, self.draw_noise(slices))

    def backward(
        self,
        slices: Slices,
        micro_batch: int | None = None,
        *,
        noise: FlowNoise | None = None,
        valid_counts: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch's loss to the parameters, one micro-batch at a time.

        Args:
            slices (Slices): the batch from :meth:`read`, or a share of it.
            micro_batch (int, optional): slices per backward pass. Defaults to ``None``, all at once.

        Keyword Args:
            noise (FlowNoise, optional): random numbers for these slices. Defaults to ``None``, drawn here.
            valid_counts (tuple of Tensor, optional): counts of the whole batch if ``slices`` is a share of it, so that
                the shares' gradients and losses add up to the batch's. Defaults to ``None``, counted here.

        Returns:
            dict of Tensor: the losses, detached.

        Raises:
            ConfigurationError: for ``reduction="none"``.
        """
        self.check_back_propagates()
        noise = self.draw_noise(slices) if noise is None else noise
        counts = slices.valid_counts() if valid_counts is None else valid_counts

        def losses(rows: slice) -> TensorDictBase:
            return self.evaluate(slices.rows(rows), None if noise is None else noise.rows(rows), counts)

        return backward_in_parts(slices.action.shape[1], micro_batch, losses)

    def draw_noise(self, slices: Slices) -> FlowNoise | None:
        """Random numbers of the flow terms for a whole batch; ``None`` if no term needs them."""
        if not (self.weights.flow_matching or self.weights.self_consistency):
            return None
        horizon, batch = slices.action.shape[:2]
        return draw_flow_noise(horizon, batch, slices.reward)

    def evaluate(
        self,
        slices: Slices,
        noise: FlowNoise | None = None,
        valid_counts: tuple[Tensor, Tensor] | None = None,
    ) -> TensorDictBase:
        """Losses of time-major slices; see :func:`~pwm_torchrl.objectives.model_loss.slice_losses`."""
        target = self._delayed_target(slices) if self.delay_target else None
        with products_in(self.products), swapped(self.world_model_params, self.world_model):
            losses = slice_losses(self.world_model, slices, self.weights, noise, valid_counts, target, self.reduction)
        named = {f"loss_{name}": value for name, value in losses._asdict().items()}
        return TensorDict({key: named[key] for key in self.written_keys}, [])

    @torch.no_grad()
    def _delayed_target(self, slices: Slices) -> Tensor:
        """Encodings ``[H, B, D]`` of the next observations by the target parameters."""
        with products_in(self.products), swapped(self.target_world_model_params, self.world_model):
            return self.world_model.encode(slices.next_observation, slices.task)
