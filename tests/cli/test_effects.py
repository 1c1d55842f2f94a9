"""Every key of the schema has a test that sees its effect: those that change what is learned have it here.

:data:`EFFECTS` names that test for each other key.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch
from reading import LEAVES
from training_cases import Bench, config, rows_of, run_with

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cluster.resources import Resources, sbatch_parameters

TESTS = Path(__file__).parents[1]
COMMON = (
    "size=tiny", "size.units=[16]", "size.encoder_units=[16]", "size.latent_dim=16", "size.actor_units=[16]",
    "size.critic_units=[16]", "env=pendulum", "env.num_envs=2", "training.epochs=4", "algorithm.model_batch=8",
    "algorithm.actor_batch=8",
)  # fmt: skip
_PAPER = ("algorithm=pwm_paper", "algorithm.model_updates=2", "algorithm.horizon=4", "algorithm.critic_passes=1")
PLAIN = (*_PAPER, "model=mlp")
PAPER = (*_PAPER, "model=flow_v2")
PWM = ("algorithm=pwm", "model=mlp", "algorithm.critic_batch=8", "algorithm.max_updates=4", "algorithm.random_steps=0")
FLOW_MATCHING = (*PAPER, "model.loss.flow_matching_weight=1")
FEW_STEPS = (*_PAPER, "model=few_step")
TWO_HOT = (*PLAIN, "model.reward_head=two_hot")
TERMINATION = (*PLAIN, "model.termination_head=true")
#: Keys, each with what it is set beside and a value that is not the one that it has there.
CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "model.dynamics.kind": (PAPER, "mlp"),
    "model.dynamics.parameterization": (PAPER, "tangent"),
    "model.dynamics.solver": (PAPER, "euler"),
    "model.dynamics.substeps": (PAPER, "2"),
    "model.dynamics.condition_on_start": (PAPER, "true"),
    "model.dynamics.time_features": (PAPER, "2"),
    "model.dynamics.condition_on_step_size": (PAPER, "true"),
    "model.dynamics.imagination_substeps": (FEW_STEPS, "2"),
    "model.loss.form": (PLAIN, "tdmpc2"),
    "model.loss.dynamics_coef": (PLAIN, "3"),
    "model.loss.reward_coef": (PLAIN, "3"),
    "model.loss.termination_coef": (TERMINATION, "3"),
    "model.loss.rho": (PLAIN, "0.3"),
    "model.loss.one_step_weight": (PLAIN, "1"),
    "model.loss.rollout_weight": (PLAIN, "0.3"),
    "model.loss.flow_matching_weight": (PAPER, "0.5"),
    "model.loss.flow_matching_source": (FLOW_MATCHING, "attached"),
    "model.loss.self_consistency_weight": ((*PAPER, "model.dynamics.condition_on_step_size=true"), "0.5"),
    "model.loss.few_step_weight": (FEW_STEPS, "0.2"),
    "model.loss.few_step_rollout": ((*PAPER, "model=few_step", "model.loss.flow_matching_weight=1"), "true"),
    "model.reward_head": (PLAIN, "two_hot"),
    "model.num_bins": (TWO_HOT, "21"),
    "model.vmin": (TWO_HOT, "-3"),
    "model.vmax": (TWO_HOT, "3"),
    "model.reward_space": (TWO_HOT, "symlog"),
    "model.termination_head": (PLAIN, "true"),
    "size.latent_dim": (PLAIN, "24"),
    "size.units": (PLAIN, "[8]"),
    "size.encoder_units": (PLAIN, "[8]"),
    "size.simnorm_dim": (PLAIN, "4"),
    "size.actor_units": (PLAIN, "[8]"),
    "size.critic_units": (PLAIN, "[8]"),
    "size.num_critics": (PLAIN, "2"),
    "algorithm.horizon": ((*PLAIN, "algorithm.slice_steps=4"), "3"),
    "algorithm.slice_steps": (PLAIN, "3"),
    "algorithm.gamma": (PLAIN, "0.9"),
    "algorithm.lmbda": (PLAIN, "0.5"),
    "algorithm.detach": (PLAIN, "false"),
    "algorithm.updates_per_step": (PWM, "0.02"),
    "algorithm.max_updates": (PWM, "2"),
    "algorithm.critic_batch": (PWM, "4"),
    "algorithm.critic_steps": (PWM, "1"),
    "algorithm.target_rate": (PWM, "0.5"),
    "algorithm.temperature": (PWM, "0.5"),
    "algorithm.temperature_lr": (PWM, "1e-3"),
    "algorithm.target_entropy": (PWM, "-3"),
    "algorithm.state_std": (PLAIN, "true"),
    "algorithm.scale_rewards": (PLAIN, "true"),
    "algorithm.entropy_weight": (PLAIN, "0.5"),
    "algorithm.normalize_returns": (PLAIN, "false"),
    "algorithm.normalize_observations": (PLAIN, "true"),
    "algorithm.actor_starts": (PLAIN, "current"),
    "algorithm.actor_batch": (PLAIN, "4"),
    "algorithm.actor_updates": (PLAIN, "2"),
    "algorithm.model_batch": (PLAIN, "4"),
    "algorithm.model_updates": (PLAIN, "3"),
    "algorithm.critic_passes": (PLAIN, "2"),
    "algorithm.critic_minibatches": (PLAIN, "2"),
    "algorithm.model_lr": (PLAIN, "1e-2"),
    "algorithm.actor_lr": (PLAIN, "1e-2"),
    "algorithm.critic_lr": (PLAIN, "1e-2"),
    "algorithm.final_lr": (PLAIN, "1e-4"),
    "algorithm.model_betas": (PLAIN, "[0.5,0.9]"),
    "algorithm.actor_betas": (PLAIN, "[0.5,0.9]"),
    "algorithm.critic_betas": (PLAIN, "[0.5,0.9]"),
    "algorithm.model_grad_norm": (PLAIN, "0.01"),
    "algorithm.actor_grad_norm": (PLAIN, "0.01"),
    "algorithm.critic_grad_norm": (PLAIN, "0.001"),
    "algorithm.log_std_init": (PLAIN, "-0.5"),
    "algorithm.log_std_min": ((*PLAIN, "algorithm.log_std_init=-1.2"), "-1.0"),
    "seed": (PLAIN, "5"),
}


@functools.lru_cache
def learned(*words: str) -> dict[str, torch.Tensor]:
    """What two epochs of updates on the same data leave in the networks."""
    bench = Bench(compose([*COMMON, *words]))
    for _ in range(2):
        bench.step()
    networks = bench.networks.items()
    return {f"{name}.{key}": value for name, network in networks for key, value in network.state_dict().items()}


@pytest.mark.parametrize("key", CHANGES)
def test_changes_what_is_learned(key):
    beside, value = CHANGES[key]
    before, after = learned(*beside), learned(*beside, f"{key}={value}")
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not same


def test_precision_changes_what_is_learned(monkeypatch, tmp_path):
    for precision in ("fp32", "bf16"):
        changes = {"training.precision": precision, "training.epochs": 1, "training.eval_every": 0}
        run_with(monkeypatch, config(changes), tmp_path / precision)
    assert rows_of(tmp_path / "fp32") != rows_of(tmp_path / "bf16")


#: Keys that sbatch is given as they are, with a value.
GIVEN_TO_SBATCH = {
    "partition": "gpu", "account": "mine", "qos": "fast", "constraint": "avx512", "gres": "'gpu:l40s:1'",
    "comment": "hello", "setup": "['module load cuda']", "array_parallelism": "3", "signal_delay_s": "77",
    "sbatch": "{reservation: course}",
}  # fmt: skip


@pytest.mark.parametrize("key", GIVEN_TO_SBATCH)
def test_is_given_to_sbatch(key):
    resources = Resources(2000, 2, 1, 1, 60)
    word = f"cluster.{key}={GIVEN_TO_SBATCH[key]}"
    before, after = (sbatch_parameters(compose(["cluster=l40s", *words]), resources, "x") for words in ([], [word]))
    assert before != after
    assert str(GIVEN_TO_SBATCH[key]).strip("'[]{}").rpartition(" ")[2] in str(after)


HERE = "cli/test_effects.py"
#: A test that sees the effect of each key, below tests/.
EFFECTS: dict[str, str] = {
    **dict.fromkeys(CHANGES, f"{HERE}::test_changes_what_is_learned"),
    **{f"cluster.{key}": f"{HERE}::test_is_given_to_sbatch" for key in GIVEN_TO_SBATCH},
    "mode": "run/test_extraction.py::test_what_is_trained",
    "tasks": "cli/test_modes.py::TestPretrain::test_preset",
    "task": "modules/test_world_model.py::test_the_other_task_is_another_model",
    "world_model": "modules/test_model_files.py::test_is_found_in_a_run_directory",
    "world_model_sha256": "run/test_extraction.py::test_another_world_model_than_at_the_beginning",
    "pretraining": "cli/test_chain.py::test_when_a_pretraining_comes_first",
    "finetune": "run/test_extraction.py::TestFineTuning::test_trains_the_world_model_on_the_task",
    "model.name": "cli/test_compose.py::test_a_flow_with_other_substeps_is_not_called_v2",
    "model.dynamics.checkpoint_substeps": (
        "objectives/test_checkpoint_substeps.py::test_the_inputs_of_a_checkpointed_transition_are_guarded"
    ),
    "algorithm.name": "run/test_shac.py::TestRun::test_it_trains_records_and_can_be_used",
    "algorithm.collect_steps": "cli/test_compose.py::test_steps_count_every_environment_and_the_action_repeat",
    "algorithm.random_steps": "run/test_train.py::TestCounting::test_random_steps",
    "algorithm.exploration_noise": f"{HERE}::test_exploration_noise_changes_what_is_collected",
    "algorithm.normalize_rewards": "run/test_train.py::TestOptions::test_normalized_rewards",
    "algorithm.first_model_updates": "cli/test_effects.py::test_first_model_updates_are_so_many",
    "algorithm.compile": "run/test_memory_plan.py::TestCompile::test_without_a_compiler_a_sentence_and_eager",
    "env": "cli/test_compose.py::test_steps_of_an_environment_of_ones_own",
    "training.epochs": "cli/test_status_and_resume.py::TestSettings::test_a_finished_run_may_become_longer",
    "training.steps": "cli/test_compose.py::test_a_length_in_environment_steps",
    "training.eval_every": "run/test_train.py::TestOptions::test_runs_to_the_end",
    "training.eval_episodes": "cli/test_modes.py::TestExtract::test_without_the_simulator",
    "training.checkpoint_every": "run/test_resume.py::TestCheckpoints::test_keep",
    "training.checkpoint_minutes": "run/test_resume.py::TestCheckpoints::test_by_minutes",
    "training.keep_checkpoints": "run/test_resume.py::TestCheckpoints::test_keep",
    "training.replay_capacity": "data/test_full_disk.py::TestRun::test_no_room_from_the_beginning",
    "training.replay_storage": "run/test_train.py::TestSeeding::test_replay_on_disk_is_the_same_run",
    "training.gradient_profile_every": "run/test_train.py::TestOptions::test_runs_to_the_end",
    "training.video": "run/test_train.py::test_a_machine_that_cannot_draw_finishes_all_the_same",
    "training.threads": "cluster/test_resources.py::test_as_many_cpus_as_threads",
    "training.precision": f"{HERE}::test_precision_changes_what_is_learned",
    "training.progress": "cli/test_follow.py::test_nothing_is_drawn_where_that_is_not_wanted",
    "training.check_graphs": "run/test_debugging.py::TestRun::test_without_the_check_nothing_is_said",
    "training.profile": "run/test_profiling.py::TestRun::test_the_trace_holds_as_many_updates_as_were_asked_for",
    "logger.kind": "run/test_loggers.py::TestWandb::test_several_loggers_get_the_same",
    "logger.also": "run/test_loggers.py::TestWandb::test_several_loggers_get_the_same",
    "logger.project": "run/test_loggers.py::TestVariablesOfWandb::test_names",
    "logger.mode": "run/test_loggers.py::TestVariablesOfWandb::test_mode",
    "logger.tags": "run/test_loggers.py::TestWandb::test_what_an_offline_run_holds",
    "logger.job_type": "run/test_loggers.py::TestWandb::test_what_an_offline_run_holds",
    "cluster.kind": "cli/test_sweeps.py::TestPlace::test_where_a_run_goes",
    "cluster.name": "memory/test_limits.py::TestElsewhere::test_profile_without_memory",
    "cluster.host_gib": "cli/test_plan.py::test_of_a_cluster_too_small",
    "cluster.gpu": "cli/test_slurm_check.py::test_a_profile_of_other_nodes",
    "cluster.gpus": "cluster/test_resources.py::test_the_demand_of_a_profile",
    "cluster.nodes": "cluster/test_resources.py::test_what_could_never_run",
    "cluster.cpus": "cluster/test_resources.py::test_as_many_cpus_as_threads",
    "cluster.mem_gib": "cluster/test_resources.py::test_as_many_cpus_as_threads",
    "cluster.time": "cli/test_validate_cluster.py::test_a_time_limit_becomes_minutes",
    "cluster.time_min": "cluster/test_resources.py::test_as_many_cpus_as_threads",
    "cluster.max_time_min": "cluster/test_resources.py::test_what_could_never_run",
    "cluster.max_memory_restarts": "cluster/test_restarts.py::test_answered",
    "memory.kind": "memory/test_planner.py::TestConfiguredSettings::test_fixed_changes_nothing_but_the_replay_location",
    "memory.model_micro_batch": "algorithm/test_updates.py::test_model_update",
    "memory.actor_micro_batch": "algorithm/test_updates.py::test_actor_update",
    "memory.critic_micro_batch": "algorithm/test_updates.py::test_critic_update",
    "memory.host_gib": "cli/test_plan.py::test_an_impossible_request_names_a_budget_that_works",
    "memory.device_gib": "memory/test_limits.py::TestHere::test_on_a_gpu_both_count",
    "memory.margin": "memory/test_planner.py::TestConfiguredSettings::test_margin_and_guard_reduce_the_usable_budget",
    "memory.stop_at": "memory/test_planner.py::TestConfiguredSettings::test_margin_and_guard_reduce_the_usable_budget",
    "memory.disk_above_gib": "memory/test_planner.py::TestReplay::test_goes_to_disk_above_a_size",
    "data.path": "cli/test_preflight.py::test_of_a_pretraining",
    "data.stage": "run/test_pretraining.py::TestBadInput::test_no_scratch_directory",
    "data.scratch_dir": "run/test_pretraining.py::TestBadInput::test_no_scratch_directory",
    "data.balanced": "data/episodes/test_index.py::test_balanced_draws_each_task_equally_often",
    "data.validation_fraction": "cli/test_chain.py::TestAnnounced::test_without_validation_too",
    "init_from": "run/test_warm_start.py::test_the_parts_are_taken_and_the_others_are_new",
    "init_from_parts": "run/test_warm_start.py::test_the_parts_are_taken_and_the_others_are_new",
    "device": "cli/test_doctor.py::TestGpu::test_unless_one_is_asked_for",
    "runs_dir": "cli/test_chain.py::test_both_stages_here",
    "run_dir": "cli/test_run_dir.py::test_keys_that_change_no_result_may_differ",
}
#: Keys whose effect no test sees, and why.
UNSEEN = {
    "size.name": "a label, which tables and directory names show",
    "size.task_dim": "the library's own argument is tested; a run passes it on",
    "logger.entity": "whose account it is, W&B knows online only",
    "logger.group": "likewise passed on to W&B; its variable is tested",
    "logger.notes": "likewise",
    "logger.artifacts": "uploads happen online; what is given to W&B is tested, not that false leaves it out",
    "data.validation_slices": "how many slices a validation averages over",
}


def test_exploration_noise_changes_what_is_collected(monkeypatch, tmp_path):
    for noise in ("white", "pink"):
        changes = {"algorithm.exploration_noise": noise, "training.epochs": 1, "training.eval_every": 0}
        run_with(monkeypatch, config(changes), tmp_path / noise)
    assert rows_of(tmp_path / "white") != rows_of(tmp_path / "pink")


def test_first_model_updates_are_so_many(monkeypatch, tmp_path):
    """So many more in the first epoch that has any."""
    for count in (1, 6):
        changes = {"algorithm.first_model_updates": count, "training.epochs": 1, "training.eval_every": 0}
        run_with(monkeypatch, config(changes), tmp_path / str(count))
    assert rows_of(tmp_path / "1") != rows_of(tmp_path / "6")


def defined(file: Path) -> set[str]:
    """The tests of a file, by their classes and names."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        above = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {f"{above}{each.name}" for each in inside if isinstance(each, ast.FunctionDef)}
    return found


def test_every_key_has_a_test_that_is_there():
    assert EFFECTS.keys() | UNSEEN.keys() == set(LEAVES)
    assert not EFFECTS.keys() & UNSEEN.keys()
    missing = {
        key: test
        for key, test in EFFECTS.items()
        if test.partition("::")[2] not in defined(TESTS / test.partition("::")[0])
    }
    assert not missing
