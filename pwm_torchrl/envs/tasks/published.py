"""The tasks of MT30 and MT80, in the order in which TD-MPC2's data and checkpoints number them."""

from __future__ import annotations

from types import MappingProxyType

from pwm_torchrl.envs.tasks.info import TaskInfo, register_task

__all__ = ["MT30", "MT80"]

_STOCK = "pwm_torchrl.envs.make_dm_control_env"
_CUSTOM = "pwm_torchrl.envs.tasks.make_custom_dm_control_env"
_METAWORLD = "pwm_torchrl.envs.tasks.make_metaworld_env"

#: Agent steps per episode: 1000 and 200 environment steps with an action repeat of 2.
_DM_CONTROL_STEPS = 500
_METAWORLD_STEPS = 100
_ACTION_REPEAT = 2

#: (name, domain, task, observation and action dimension, maker)
_DM_CONTROL = (
    ("walker-stand", "walker", "stand", 24, 6, _STOCK),
    ("walker-walk", "walker", "walk", 24, 6, _STOCK),
    ("walker-run", "walker", "run", 24, 6, _STOCK),
    ("cheetah-run", "cheetah", "run", 17, 6, _STOCK),
    ("reacher-easy", "reacher", "easy", 6, 2, _STOCK),
    ("reacher-hard", "reacher", "hard", 6, 2, _STOCK),
    ("acrobot-swingup", "acrobot", "swingup", 6, 1, _STOCK),
    ("pendulum-swingup", "pendulum", "swingup", 3, 1, _STOCK),
    ("cartpole-balance", "cartpole", "balance", 5, 1, _STOCK),
    ("cartpole-balance-sparse", "cartpole", "balance_sparse", 5, 1, _STOCK),
    ("cartpole-swingup", "cartpole", "swingup", 5, 1, _STOCK),
    ("cartpole-swingup-sparse", "cartpole", "swingup_sparse", 5, 1, _STOCK),
    ("cup-catch", "ball_in_cup", "catch", 8, 2, _STOCK),
    ("finger-spin", "finger", "spin", 9, 2, _STOCK),
    ("finger-turn-easy", "finger", "turn_easy", 12, 2, _STOCK),
    ("finger-turn-hard", "finger", "turn_hard", 12, 2, _STOCK),
    ("fish-swim", "fish", "swim", 24, 5, _STOCK),
    ("hopper-stand", "hopper", "stand", 15, 4, _STOCK),
    ("hopper-hop", "hopper", "hop", 15, 4, _STOCK),
    ("walker-walk-backwards", "walker", "walk_backwards", 24, 6, _CUSTOM),
    ("walker-run-backwards", "walker", "run_backwards", 24, 6, _CUSTOM),
    ("cheetah-run-backwards", "cheetah", "run_backwards", 17, 6, _CUSTOM),
    ("cheetah-run-front", "cheetah", "run_front", 17, 6, _CUSTOM),
    ("cheetah-run-back", "cheetah", "run_back", 17, 6, _CUSTOM),
    ("cheetah-jump", "cheetah", "jump", 17, 6, _CUSTOM),
    ("hopper-hop-backwards", "hopper", "hop_backwards", 15, 4, _CUSTOM),
    ("reacher-three-easy", "reacher", "three_easy", 8, 3, _CUSTOM),
    ("reacher-three-hard", "reacher", "three_hard", 8, 3, _CUSTOM),
    ("cup-spin", "ball_in_cup", "spin", 8, 2, _CUSTOM),
    ("pendulum-spin", "pendulum", "spin", 3, 1, _CUSTOM),
)

_METAWORLD_NAMES = (
    "assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button "
    "coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open "
    "faucet-close hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side "
    "peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull "
    "sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert"
)

for _name, _domain, _task, _observation, _action, _maker in _DM_CONTROL:
    _arguments = MappingProxyType({"domain": _domain, "task": _task})
    register_task(
        TaskInfo(
            _name,
            _observation,
            _action,
            _DM_CONTROL_STEPS,
            _maker,
            _arguments,
            action_repeat=_ACTION_REPEAT,
            extra="dm-control",
        )
    )

for _task in _METAWORLD_NAMES.split():
    register_task(
        TaskInfo(
            f"mw-{_task}",
            39,
            4,
            _METAWORLD_STEPS,
            _METAWORLD,
            MappingProxyType({"task": _task}),
            action_repeat=_ACTION_REPEAT,
            score="success",
            score_range=(0.0, 1.0),
            extra="metaworld",
        )
    )

MT30: tuple[str, ...] = tuple(row[0] for row in _DM_CONTROL)
MT80: tuple[str, ...] = (*MT30, *(f"mw-{_task}" for _task in _METAWORLD_NAMES.split()))
