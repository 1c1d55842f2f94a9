"""Diagnoses runs that do not learn: measures the networks at each evaluation, and warns of problems.

The measures are pure functions of networks and data, also for evaluations and benchmarks: they change no network and do
not draw from the process-wide random generators. Tensors are time-major, ``[H, B, ...]`` or, for whole episodes,
``[T, N, ...]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.base import Algorithm, MetricRow
from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.config import Config
from pwm_torchrl.devices import to_device
from pwm_torchrl.modules import WorldModel
from pwm_torchrl.modules.heads import symlog
from pwm_torchrl.objectives import SoftActorLoss
from pwm_torchrl.objectives.model_loss import Slices
from pwm_torchrl.objectives.soft_actor_loss import SATURATED, squashed_log_prob
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.terminal import warn

__all__ = [
    "Quality",
    "StartDependence",
    "ValueQuality",
    "effective_rank",
    "latent_variance",
    "rollout_errors",
    "saturated_share",
    "start_dependence",
    "termination_shares",
    "value_quality",
    "within_tasks",
]

#: Maximum number of slices per measurement.
SLICES = 256
#: Networks with fewer updates cause no warning, because they have not had time to learn.
MIN_UPDATES = 100
#: Latents count as collapsed below this fraction of the largest variance that SimNorm's groups can have.
MIN_LATENT_VARIANCE = 1e-3
#: The model counts as not predicting rewards from this error on, as a fraction of their variance; predicting the mean
#: has an error of 1.
MAX_REWARD_ERROR = 0.9
#: The policy counts as saturated from this fraction of saturated deterministic actions on.
MAX_SATURATED_FRACTION = 0.95
#: Values that are too high count as wrong from this error on, relative to the size of the returns. Values of 0, which
#: critics start with, have an error of 1.
MAX_OVERESTIMATION = 2.0
#: The same for values that are too low. This limit is higher because values lag behind a policy that learns fast: the
#: error is 2.3 in a good run of Pendulum-v1.
MAX_UNDERESTIMATION = 10.0
#: Predicted terminations count as wrong if their fraction and the real one differ by this factor ...
MAX_TERMINATION_RATIO = 4.0
#: ... and the larger of the two is at least this.
MIN_TERMINATION_FRACTION = 0.1


class Quality:
    """Measures the networks at evaluations. Warns of each problem once per run, if two measurements in a row show it.

    After a crash, a run repeats the epochs since its last checkpoint, and may repeat their warnings.

    Args:
        cfg (Config): the run's configuration.
        algorithm (Algorithm): has the networks.
        run_dir (Path): the run's directory.

    Attributes:
        shown (list of str): problems that the last measurement showed.
        told (list of str): problems that were reported.
    """

    def __init__(self, cfg: Config, algorithm: Algorithm, run_dir: Path) -> None:
        self.cfg, self.algorithm, self.run_dir = cfg, algorithm, run_dir
        self.shown: list[str] = []
        self.told: list[str] = []

    # Measurements -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_model(self, batch: TensorDictBase, row: MetricRow) -> None:
        """Measure the model on a collected batch before it is trained on it; no-op if the model was not trained yet.

        With several tasks, latents are compared within each task. Errors of rollouts along the batch are divided by
        variances over all stored data, because a policy that has learned to stand still collects rewards that hardly
        vary. Uses a forked random generator, so that measuring does not change training.

        Args:
            batch (TensorDictBase): ``[N, T]``, just collected and stored; empty if nothing is collected.
            row (MetricRow): receives ``model/latent_variance``, ``model/latent_rank``; ``model/terminations_predicted``
                and ``model/terminations_real`` if episodes may terminate; ``model/latent_nmse`` and
                ``model/reward_nmse``, means over steps, if a batch was collected.
        """
        algorithm = self.algorithm
        if not algorithm.started or "model" not in algorithm.optimizers:
            return
        model, device = algorithm.networks.model, algorithm.samples.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            stored = algorithm.losses.model.read(algorithm.sample_slices(SLICES))
        latent = model.encode(stored.observation, stored.task)
        if not latent.isfinite().all():  # the epoch's losses are not finite either, and reported
            return
        if stored.task is not None:
            latent = within_tasks(latent, stored.task)
        found = {"latent_variance": latent_variance(latent), "latent_rank": effective_rank(latent)}
        if model.termination is not None or (stored.terminated & stored.valid).any():
            soft = isinstance(algorithm.losses.actor, SoftActorLoss)
            predicted, real = termination_shares(model, stored, soft)
            found |= {"terminations_predicted": predicted, "terminations_real": real}
        fresh = self._slices(batch)
        if fresh is not None:
            errors = rollout_errors(
                model, fresh.observation, fresh.action, fresh.next_observation, fresh.reward, fresh.task, fresh.valid
            )
            variances = found["latent_variance"], stored.reward[stored.valid].var(unbiased=False)
            for name, error, variance in zip(("latent", "reward"), errors, variances, strict=True):
                if variance > 0:
                    found[f"{name}_nmse"] = error.nanmean() / variance
        row.set(found, prefix="model/")

    def _slices(self, batch: TensorDictBase) -> Slices | None:
        """Consecutive slices of a batch ``[N, T]``, rewards scaled."""
        algorithm = self.algorithm
        if batch.is_empty():
            return None
        length = min(self.cfg.algorithm.slice_length, batch.shape[1])
        slices = torch.cat(list(batch.split(length, 1))[: batch.shape[1] // length])[:SLICES]
        slices = to_device(slices.select(*algorithm.losses.model.in_keys), algorithm.samples.device)
        return algorithm.losses.model.read(algorithm.scaled(slices))

    # Warnings ---------------------------------------------------------------------------------------------------------

    def judge(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Warn of problems that an evaluation's metrics show, if those of the previous evaluation showed them too."""
        causes = dict(self._causes(numbers)) if self._updates() >= MIN_UPDATES else {}
        for cause, sentence in causes.items():
            if cause in self.shown and cause not in self.told:
                self.told.append(cause)
                write_event(self.run_dir, "quality", epoch=epoch, cause=cause, warning=sentence)
                warn(f"{sentence} (docs/howto/it_does_not_learn.md)")
        self.shown = list(causes)

    def _updates(self) -> int:
        """Updates of the model, or of the actor where no model is trained, in all attempts."""
        optimizers = self.algorithm.optimizers
        states = list(optimizers["model" if "model" in optimizers else "actor"].optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def _causes(self, numbers: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """The name of each problem, with a sentence that describes it."""
        actor = self.algorithm.networks.actor
        soft = actor is not None and actor.temperature is not None
        yield from self._predictions(numbers, soft)
        yield from self._terminations(numbers)
        yield from self._policy(numbers, soft)

    def _predictions(self, numbers: Mapping[str, float], soft: bool) -> Iterator[tuple[str, str]]:
        a, group = self.cfg.algorithm, self.cfg.size.simnorm_dim
        pretrained = self.cfg.mode == "extract"  # the model's units and heads were fixed in pre-training
        variance = numbers.get("model/latent_variance")
        possible = (group - 1) / group**2  # variance of one-hot groups with equally frequent entries
        if variance is not None and variance <= MIN_LATENT_VARIANCE * possible:
            weights = self.algorithm.losses.model.weights
            yield (
                "latents",
                f"the latents have collapsed: their variance is {variance:.2g} of at most {possible:.2g}; "
                f"raise model.loss.reward_coef ({weights.reward:g}) or lower model.loss.dynamics_coef "
                f"({weights.dynamics:g})"
                + ("" if a.scale_rewards or pretrained else ", or set algorithm.scale_rewards=true"),
            )
        error = numbers.get("model/reward_nmse")
        if error is not None and error >= MAX_REWARD_ERROR:
            updates = "updates_per_step" if soft else "model_updates"
            yield (
                "rewards",
                f"the model does not predict rewards: its error is {error:.2f} of their variance; raise "
                f"algorithm.{updates} ({getattr(a, updates):g}) or model.loss.reward_coef"
                + ("" if a.normalize_observations or pretrained else ", or set algorithm.normalize_observations=true"),
            )

    def _terminations(self, numbers: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        predicted, real = (numbers.get(f"model/terminations_{which}") for which in ("predicted", "real"))
        if predicted is None or real is None or max(predicted, real) < MIN_TERMINATION_FRACTION:
            return
        counted = f"it ends {predicted:.0%} of the replayed slices, of which {real:.0%} end"
        coef = f"raise model.loss.termination_coef ({self.cfg.model.loss.termination_coef:g})"
        if real > MAX_TERMINATION_RATIO * predicted:
            if self.algorithm.networks.model.termination is None and self.cfg.mode != "extract":
                coef = "set model.termination_head=true"
            elif not isinstance(self.algorithm.losses.actor, SoftActorLoss):
                coef += ", or choose algorithm=pwm, which uses probabilities instead of a threshold"
            yield "endless", f"the model misses the ends of episodes: {counted}; {coef}"
        elif predicted > MAX_TERMINATION_RATIO * real:
            yield (
                "too_early",
                f"the model ends episodes too early: {counted}; {coef}, or set model.termination_head=false where "
                "episodes are only truncated",
            )

    def _policy(self, numbers: Mapping[str, float], soft: bool) -> Iterator[tuple[str, str]]:
        a = self.cfg.algorithm
        saturated = numbers.get("policy/mean_saturated")
        if saturated is not None and saturated >= MAX_SATURATED_FRACTION:
            key = "target_entropy" if soft else "entropy_weight"
            yield (
                "actions",
                f"the policy is saturated: {saturated:.0%} of its actions are at a limit in evaluations, where it can "
                f"hardly learn; raise algorithm.{key} ({getattr(a, key):g})",
            )
        error = numbers.get("eval/value_error")
        if error is None:
            return
        value, followed = numbers["eval/value"], numbers["eval/value_return"]
        if error >= (MAX_OVERESTIMATION if value > followed else MAX_UNDERESTIMATION):
            yield (
                "values",
                f"the critics' values are far from the real returns: they predict {value:.3g} on average, the return "
                f"was {followed:.3g}, an error of {error:.1f} times the returns; lower algorithm.critic_lr "
                f"({a.critic_lr:g})" + (f" or algorithm.target_rate ({a.target_rate:g})" if soft else ""),
            )

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``shown`` and ``told``."""
        return {"shown": list(self.shown), "told": list(self.told)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore ``shown`` and ``told``, which are missing in checkpoints of earlier versions."""
        self.shown, self.told = list(state_dict.get("shown", [])), list(state_dict.get("told", []))


# Latents --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_variance(latent: Tensor) -> Tensor:
    """Variance over the batch of latents ``[B, D]``, mean over features; a scalar."""
    return latent.var(0, unbiased=False).mean()


@torch.no_grad()
def effective_rank(latent: Tensor) -> Tensor:
    """Effective rank of centred latents ``[B, D]``: exp of the entropy of their normalised singular values; a scalar.

    From Roy and Vetterli, "The effective rank" (EUSIPCO 2007). It is at most min(B − 1, D), and 0 if all latents are
    equal.
    """
    singular = torch.linalg.svdvals((latent - latent.mean(0)).double())
    total = singular.sum()
    if total <= 1e-6 * latent.double().norm():  # only rounding errors are left if all latents are equal
        return torch.zeros((), dtype=latent.dtype, device=latent.device)
    return torch.special.entr(singular / total).sum().exp().to(latent.dtype)


@torch.no_grad()
def within_tasks(latent: Tensor, task: Tensor) -> Tensor:
    """Latents ``[B, D]`` minus the mean of their task, which leaves only the differences within tasks.

    Args:
        latent (Tensor): ``[B, D]``.
        task (Tensor): index ``[B]``.
    """
    centred = latent.clone()
    for index in task.unique():
        rows = task == index
        centred[rows] -= latent[rows].mean(0)
    return centred


# Predictions of the model ---------------------------------------------------------------------------------------------


@contextmanager
def not_compiled(model: Any) -> Iterator[None]:
    """Evaluate the dynamics network uncompiled: each new batch size would compile it again."""
    dynamics = getattr(model, "dynamics", None)
    piece = getattr(dynamics, "piece", None)
    if piece is None:
        yield
        return
    dynamics.piece = None
    try:
        yield
    finally:
        dynamics.piece = piece


@torch.no_grad()
def rollout_errors(
    model: WorldModel,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor,
    task: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Open-loop errors of the model at every step of a rollout, averaged over the batch.

    Args:
        model (WorldModel): the model.
        observation (Tensor): first observations ``[B, O]``.
        action (Tensor): ``[H, B, A]``.
        next_observation (Tensor): ``[H, B, O]``.
        reward (Tensor): ``[H, B, 1]``, scaled as in the model's training.
        task (Tensor, optional): index ``[B]``, for multi-task models.
        valid (Tensor, optional): bool ``[H, B, 1]``, false after an episode's end. Defaults to ``None``, all valid.

    Returns:
        tuple: squared errors of latent and reward, each ``[H]``; NaN at a step that no slice reaches.
    """
    target, z = model.encode(next_observation, task), model.encode(observation, task)
    latent_error, reward_error = [], []
    codec = getattr(model.reward, "codec", None)  # a two-hot head may decode to symlog rewards, only for the policy
    with not_compiled(model):
        for t in range(len(action)):
            rows = slice(None) if valid is None else valid[t].squeeze(-1)
            z, logits, _ = model.predict(z, action[t], task)
            latent_error.append((z - target[t])[rows].square().mean())
            predicted = model.reward.decode(logits) if codec is None else codec.decode(logits)
            reward_error.append((predicted - reward[t])[rows].square().mean())
    return torch.stack(latent_error), torch.stack(reward_error)


@torch.no_grad()
def termination_shares(model: WorldModel, slices: Slices, soft: bool = True) -> tuple[Tensor, Tensor]:
    """Fractions of slices that terminate: as the model predicts, and in the data.

    The model is rolled out from the first observation with the slice's actions, up to the episode's real end.

    Args:
        model (WorldModel): the model; without a termination head it predicts no terminations.
        slices (Slices): H steps of B slices.
        soft (bool): a rollout terminates with probability 1 − ∏(1 − p_t); if false, where p_t reaches the head's
            threshold, as in the published algorithm. Defaults to ``True``.

    Returns:
        tuple: two scalars between 0 and 1.
    """
    z = model.encode(slices.observation, slices.task)
    going = torch.ones_like(slices.reward[0])
    with not_compiled(model):
        for action, valid in zip(slices.action, slices.valid, strict=True):
            z, _, ended = (model.soft_step if soft else model)(z, action, slices.task)
            going = torch.where(valid, going * (1 - ended.to(going.dtype)), going)
    return (1 - going).mean(), (slices.terminated & slices.valid).any(0).to(going.dtype).mean()


class StartDependence(NamedTuple):
    """How much latents still depend on the start after 1..H imagined steps."""

    variance: Tensor  # [H], variance over the starts, relative to that of z_0; NaN if that is 0
    gradient: Tensor  # [H], norm of d z_h / d z_0, relative to that of the identity


def start_dependence(model: WorldModel, observation: Tensor, action: Tensor, probes: int = 4) -> StartDependence:
    """Measures how much imagined latents still depend on their start.

    All rollouts take the same actions, so that their latents differ only because of the starts. The gradient is the
    Frobenius norm of the Jacobian over sqrt(D), root mean square over the starts, estimated with random signs
    (Hutchinson) from a separate generator.

    Args:
        model (WorldModel): single-task.
        observation (Tensor): starts ``[B, O]``.
        action (Tensor): one sequence of actions ``[H, A]``.
        probes (int): random vectors per start and step. Defaults to ``4``.
    """
    with torch.no_grad():
        start = model.encode(observation)
    generator = torch.Generator().manual_seed(0)
    variances, gradients = [], []
    with torch.enable_grad(), not_compiled(model):
        leaf = start.requires_grad_()
        z = leaf
        for a in action:
            z = model.predict(z, a.expand(len(z), -1))[0]
            variances.append(latent_variance(z.detach()))
            squares = []
            for _ in range(probes):
                signs = (torch.randint(0, 2, z.shape, generator=generator) * 2 - 1).to(z)
                (gradient,) = torch.autograd.grad(z, leaf, signs, retain_graph=True)
                squares.append(gradient.square().sum(-1).mean())
            gradients.append((torch.stack(squares).mean() / z.shape[-1]).sqrt())
    return StartDependence(torch.stack(variances) / latent_variance(start.detach()), torch.stack(gradients))


# Actions and values ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def saturated_share(action: Tensor, valid: Tensor) -> Tensor:
    """Fraction of actions ``[T, N, A]`` in which tanh has almost no gradient left, over valid steps; a scalar."""
    return (action[valid.squeeze(-1)].abs() > SATURATED).float().mean()


class ValueQuality(NamedTuple):
    """Predicted values of visited states and actions, and their realised returns; scalars."""

    predicted: Tensor  # mean value
    realised: Tensor  # mean discounted return
    error: Tensor  # root mean squared difference, divided by the root mean square of the returns or by one unit of the
    # critics, whichever is larger


@torch.no_grad()
def value_quality(
    networks: Networks,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor,
    valid: Tensor,
    terminated: Tensor,
    gamma: float,
) -> ValueQuality:
    """Compares values with realised discounted returns, over the first half of each episode.

    A truncated episode's return ends in the critics' own value of its last state, so short episodes hide errors. If the
    actor has a temperature, the returns include the entropies that are in the critics' targets, estimated with one
    sample per state from a separate generator.

    Args:
        networks (Networks): actor, critic and, unless those take observations, the model.
        observation (Tensor): ``[T, N, O]``.
        action (Tensor): ``[T, N, A]``.
        next_observation (Tensor): ``[T, N, O]``.
        reward (Tensor): ``[T, N, 1]``, scaled as in the critics' training.
        valid (Tensor): bool ``[T, N, 1]``, false after an episode's end.
        terminated (Tensor): bool ``[T, N, 1]``.
        gamma (float): discount.
    """
    actor, critic, model = networks.actor, networks.critic, networks.model
    if model is None:
        latent, following = observation, next_observation
    else:
        latent, following = model.encode(observation), model.encode(next_observation)
        reward = symlog(reward) if getattr(model.reward, "space", "raw") == "symlog" else reward
    of_actions = critic.action_dim > 0
    value = critic.value(latent, action if of_actions else None)
    last_value = critic.value(following, actor.act(following) if of_actions else None)
    unit = torch.ones_like(reward[0, 0]) if critic.scale is None else critic.scale
    bonus = torch.zeros_like(reward)
    if actor.temperature is not None:
        mean, std = actor(following)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        bonus = -actor.temperature * unit * squashed_log_prob(mean + std * noise, std, noise)
    last = valid & ~torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    returns = torch.empty_like(reward)
    running = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        after = torch.where(last[t], last_value[t], running)
        running = reward[t] + gamma * ~terminated[t] * (bonus[t] + after)
        returns[t] = running
    steps = torch.arange(len(valid), device=valid.device).view(-1, 1, 1)
    first_half = steps < (valid.sum(0) + 1) // 2
    value, returns = value[first_half], returns[first_half]
    size = torch.maximum(returns.square().mean().sqrt(), unit.squeeze())
    return ValueQuality(value.mean(), returns.mean(), (value - returns).square().mean().sqrt() / size)
