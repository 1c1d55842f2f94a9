"""Our values of what golden cases hold, through the public modules and LossModules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from golden_cases import Case
from tensordict import TensorDict
from torch import Tensor, nn

from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    actor_module,
    value_module,
    world_model_module,
)
from pwm_torchrl.modules.model_files import load_pwm_world_model, load_tdmpc2_world_model
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss, imagine, td_lambda_targets

DEFAULTS = {"simnorm_dim": 8, "vmin": -10.0, "vmax": 10.0}
FLOW_VARIANTS = {"v1": ("heun", 2), "v2": ("heun", 4), "v3": ("euler", 8)}


def options(config: Mapping[str, object]) -> dict[str, object]:
    """What shapes do not tell of an architecture."""
    return {k: default if config.get(k) is None else config[k] for k, default in DEFAULTS.items()}


def load_world_model(case: Case) -> WorldModel:
    model, report = load_pwm_world_model(
        case.of("world_model."),
        **options(case.config),
        reward_space="symlog",
        action_dims=case.config.get("action_dims"),
    )
    assert not report.skipped
    return model


def tdmpc2_outputs(case: Case) -> dict[str, Tensor]:
    assert case.checkpoint is not None
    model, _ = load_tdmpc2_world_model(case.checkpoint, **options(case.config))
    task = case.arrays.get("task")
    latent = model.encode(case.arrays["obs"], task)
    next_latent, logits, _ = model.predict(latent, case.arrays["action"], task)
    return {
        "latent": latent,
        "next_latent": next_latent,
        "reward_logits": logits,
        "predicted_reward": model.reward.decode(logits),
    }


def flow_outputs(case: Case) -> dict[str, Tensor]:
    model = load_world_model(case)
    flow, task = model.dynamics, case.arrays.get("in.task")
    action = model.mask_action(case.arrays["in.action"], task)
    latent, embedding = model.encode(case.arrays["in.observation"], task), model.embed(task)
    out = {
        "out.latent": latent,
        "out.reward_logits": model.reward(latent, action, embedding),
    }
    for name, (flow.solver, flow.substeps) in FLOW_VARIANTS.items():
        out[f"out.flow_{name}.next_latent"] = flow(latent, action, embedding)
    for key in case.arrays:
        if match := re.fullmatch(r"out\.velocity_at_tau_([\d.]+)", key):
            out[key] = flow.velocity(latent, latent, action, float(match[1]), embedding)
    if "in.next_observation" in case.arrays:
        target = model.encode(case.arrays["in.next_observation"], task).detach()
        tau = torch.full((*latent.shape[:-1], 1), 0.5)
        error = flow.flow_matching_error(latent, target, action, tau, embedding)
        out["out.flow_matching_loss_midpoint"] = error.mean()
    return out


def world_model_outputs(case: Case) -> dict[str, Tensor]:
    model = load_world_model(case)
    out = {**open_loop(case, model), **model_losses(case, model)}
    if case.of("actor."):
        out |= policy_outputs(case, model)
    if case.of("tdlambda."):
        out["tdlambda.target"] = given_targets(case)
    return out


def open_loop(case: Case, model: WorldModel) -> dict[str, Tensor]:
    """Latents, rewards and reward losses of the model rolled out with the case's actions."""
    task = case.arrays.get("in.task")
    latents, logits = [model.encode(case.arrays["in.observation"][0], task)], []
    for action in case.arrays["in.action"]:
        latent, logit, _ = model.predict(latents[-1], action, task)
        latents.append(latent)
        logits.append(logit)
    stacked = torch.stack(logits)
    out = {
        "out.latents": torch.stack(latents),
        "out.reward_logits": stacked,
        "out.predicted_reward": model.reward.decode(stacked),
    }
    if codec := getattr(model.reward, "codec", None):
        reward = case.arrays["in.reward"]
        out["out.predicted_reward_raw"] = codec.decode(stacked, "raw")
        out["out.two_hot_target"] = codec.encode(reward)
        out["out.reward_cross_entropy"] = codec.cross_entropy(stacked, reward)
    else:
        out["out.predicted_reward_raw"] = stacked
    return out


def slices(case: Case) -> TensorDict:
    """The case's trajectories as PWMModelLoss reads them, batch-major."""
    observation = case.arrays["in.observation"].transpose(0, 1)
    action, reward = (case.arrays[k].transpose(0, 1) for k in ("in.action", "in.reward"))
    size = action.shape[:2]
    going = torch.zeros(*size, 1, dtype=torch.bool)
    data = TensorDict(
        observation=observation[:, :-1],
        action=action,
        next=TensorDict(observation=observation[:, 1:], reward=reward, done=going, terminated=going, batch_size=size),
        batch_size=size,
    )
    if "in.task" in case.arrays:
        data["task"] = case.arrays["in.task"].unsqueeze(1).expand(size)
    return data


def model_losses(case: Case, model: WorldModel) -> dict[str, Tensor]:
    """Both forms of the world-model loss, and the gradient of every parameter of PWM's."""
    gamma, data = case.config.get("gamma", 0.99), slices(case)
    losses = PWMModelLoss(model, gamma=gamma)(data)
    total = losses["loss_dynamics"] + losses["loss_reward"]
    names, parameters = zip(*model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(total, parameters)))
    # their names, with the tensors of the model that carries our gradients in place of its parameters
    theirs = load_pwm_world_model(
        case.of("world_model."), **options(case.config), action_dims=case.config.get("action_dims")
    )[1].mapped
    out = {
        "out.wm_loss_dynamics": losses["loss_dynamics"],
        "out.wm_loss_reward": losses["loss_reward"],
        "out.wm_loss_total": total,
        **{f"grad.world_model.{k}": gradients[ours] for k, ours in theirs.items() if ours in gradients},
    }
    for key in case.arrays:
        if match := re.fullmatch(r"out\.tdmpc2_loss_rho_([\d.]+)", key):
            losses = PWMModelLoss(model, form="tdmpc2", rho=float(match[1]))(data)
            out[key] = losses["loss_dynamics"] + losses["loss_reward"]
    return out


def load_actor(case: Case, latent_dim: int) -> Actor:
    weights = case.of("actor.actor.")
    linears = [w for _, w in sorted((int(k.split(".")[0]), w) for k, w in weights.items() if w.ndim == 2)]
    actor = Actor(latent_dim, linears[-1].shape[0], [w.shape[0] for w in linears[:-1]])
    actor.net.load_state_dict(weights)
    return actor


def load_critics(case: Case, latent_dim: int) -> CriticEnsemble:
    params = [p for _, p in sorted((int(k), p) for k, p in case.of("critic_ensemble.params.").items())]
    linears = params[0::4]
    critics = CriticEnsemble(latent_dim, [w.shape[1] for w in linears[:-1]], linears[0].shape[0])
    with torch.no_grad():
        for ours, theirs in zip(critics.params, params, strict=True):
            assert ours.shape == theirs.shape
            ours.copy_(theirs)
    return critics


def policy_outputs(case: Case, model: WorldModel) -> dict[str, Tensor]:
    """Imagined rollouts, values, targets, actor and critic losses, and the actor's gradients."""
    task, horizon = case.arrays.get("in.task"), len(case.arrays["in.action"])
    gamma, lmbda = case.config.get("gamma", 0.99), case.config.get("lmbda", 0.95)
    start = model.encode(case.arrays["in.observation"][0], task).detach()
    actor = load_actor(case, start.shape[-1])
    critics = load_critics(case, start.shape[-1])
    networks = (
        actor_module(actor),
        world_model_module(model, task=None if task is None else "task"),
        value_module(critics),
    )
    data = TensorDict(latent=start, batch_size=[len(start)])
    mask = None
    if task is not None:
        data["task"], mask = task, model.task.action_mask

    def loss_of(**kwargs: bool) -> PWMActorLoss:
        return PWMActorLoss(
            *networks, horizon=horizon, gamma=gamma, lmbda=lmbda, deterministic=True, action_mask=mask, **kwargs
        )

    out, rollout = {}, data
    for name, detach in (("attached_actor_input", False), ("detached_actor_input", True)):
        losses, rollout = loss_of(detach=detach).rollout_and_loss(data)
        out[f"out.{name}.actor_loss"] = losses["loss_actor"]
        for key, gradient in gradients_of(losses["loss_actor"], actor.net).items():
            out[f"grad.{name}.actor.actor.{key}"] = gradient
    normalized = loss_of(normalize_returns=True)
    out["out.actor_loss_with_return_rms"] = normalized(data)["loss_actor"]
    out["out.return_rms_var"] = normalized.return_statistics.var
    out["out.return_rms_mean"] = normalized.return_statistics.mean

    major = rollout.transpose(0, 1)
    out["out.rollout_latents"] = major["latent"]
    out["out.rollout_actions"] = major["action"]
    out["out.rollout_rewards"] = major["next", "reward"]
    out["out.rollout_next_values"] = major["next", "state_value"]
    out["out.td_lambda_targets"] = major["value_target"]
    out["out.ensemble_values"] = critics(major["latent"]).flatten(1)
    critic_loss = PWMValueLoss(critics)(rollout)["loss_value"]
    out["out.critic_loss_elementwise"] = critic_loss
    for key, gradient in gradients_of(critic_loss, critics).items():
        out[f"grad.critic_ensemble.{key}"] = gradient

    # the compiled core, which the losses wrap, agrees with them
    def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return model(z, a, task)

    def act(z: Tensor, noise: Tensor | None) -> Tensor:
        return model.mask_action(actor.act(z, noise), task)

    core = imagine(step, act, start, horizon)
    torch.testing.assert_close(core.reward, major["next", "reward"])
    torch.testing.assert_close(core.latent[:-1], major["latent"])
    return out


def gradients_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def given_targets(case: Case) -> Tensor:
    """TD(λ) targets of given rewards and values, ``done`` being a truncation: it bootstraps and stops the λ-return."""
    given = case.of("tdlambda.")
    reward, next_value, done = (given[k].reshape(*given[k].shape[:2], 1) for k in ("reward", "next_value", "done"))
    return td_lambda_targets(
        reward,
        next_value,
        torch.zeros_like(done, dtype=torch.bool),
        case.config.get("gamma", 0.99),
        case.config.get("lmbda", 0.95),
        done=done.bool(),
    )


COMPUTE = {"world_model": world_model_outputs, "flow": flow_outputs, "tdmpc2": tdmpc2_outputs}
