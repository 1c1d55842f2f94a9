"""Typed configuration of a run. Hydra composes it, and every part of the program reads it.

Each field is declared once, with its type, default, choices and range; the comment beside it is its documentation.
Values are checked when a section is created, and again by :meth:`Section.check` when the configuration is complete.
Defaults are those of the algorithm; the YAML files in ``configs/`` contain only deviations from them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

from pwm_torchrl.errors import ConfigurationError, nearest

# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.

#: The networks that a run trains. An update, its loss, optimizer, keys and metrics are named after their network.
NETWORKS = ("model", "actor", "critic")

#: Short names of the packaged algorithms and their classes; any other class is named by its dotted path.
ALGORITHMS = {
    "pwm_paper": "pwm_torchrl.algorithm.pwm_paper.PaperPWM",
    "pwm": "pwm_torchrl.algorithm.pwm.PWM",
    "shac": "pwm_torchrl.algorithm.shac.SHAC",
}

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value, written out so that this file needs no OmegaConf


def missing_keys(tree: Any, key: str = "") -> list[str]:
    """The dotted keys whose value is :data:`MISSING`, or a list that contains it.

    OmegaConf's own search fails at an interpolation of a missing value, and its merge drops missing values.
    """
    if isinstance(tree, dict):
        below = (missing_keys(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items())
        return [each for found in below for each in found]
    return [key] if tree == MISSING or (isinstance(tree, list) and MISSING in tree) else []


def one_of(default: str, *others: str, path: bool = False) -> Any:
    """A field that accepts only certain strings.

    Args:
        default: its default, which is one of the choices.
        *others: the other choices.
        path: whether a dotted path is also accepted. The code that imports it checks it.
    """
    return field(default=default, metadata={"rule": Rule((default, *others), path)})


def several_of(*choices: str, default: Sequence[str] = ()) -> Any:
    """A field for a list of strings, each of which is one of ``choices``; empty by default."""
    return field(default_factory=lambda: list(default), metadata={"rule": Rule(choices)})


def setting(
    default: Any,
    *,
    pattern: str | None = None,
    words: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    count: int | None = None,
) -> Any:
    """A field with a restriction on its values; the bounds of a list apply to each number in it.

    ``None`` is accepted if the field's type allows it.

    Args:
        default: its default; a list is copied.
        pattern: regular expression that strings must match.
        words: description of ``pattern`` for messages.
        least: smallest number accepted.
        above: numbers must be greater than this.
        most: largest number accepted.
        below: numbers must be less than this.
        infinite: whether infinity is accepted, which means no limit.
        count: length of a list; if not given, at least 1.
    """
    rule = Rule((), False, pattern, words, least, above, most, below, infinite, count)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Rule:
    """The values that a field accepts; see :func:`one_of` and :func:`setting`."""

    choices: tuple[str, ...] = ()
    path: bool = False
    pattern: str | None = None
    words: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    infinite: bool = False
    count: int | None = None

    def check(self, key: str, value: Any) -> None:
        """Raise ConfigurationError if the value of a dotted key is not accepted."""
        if value is None or value == MISSING:
            return
        for each in value if isinstance(value, list) else [value]:
            written = str(each).lower() if isinstance(each, bool) else each
            if not self.choices or written in self.choices or (self.path and "." in str(each)):
                continue
            near = nearest(str(each), self.choices)
            raise ConfigurationError(
                f"{key}={each} is not accepted{near and f'; nearest: {near}'}; choose one of {', '.join(self.choices)}"
                + (", or the dotted path of your own" if self.path else "")
            )
        if self.pattern is not None and re.fullmatch(self.pattern, str(value)) is None:
            raise ConfigurationError(f"{key}={value} must be {self.words}")
        if isinstance(value, list) and (self.choices or self == FINITE):
            return
        if isinstance(value, (list, tuple)):
            if len(value) != (self.count or max(1, len(value))):
                raise ConfigurationError(f"{key}={list(value)} must be a list of {self.count or 'one or more'} numbers")
            for number in value:
                self._check_number(f"{key}={list(value)}", number)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self._check_number(f"{key}={value}", value)

    def _check_number(self, said: str, number: Any) -> None:
        if math.isnan(number):
            raise ConfigurationError(f"{said} is not a number; give one")
        if math.isinf(number) and not self.infinite:
            raise ConfigurationError(f"{said} must be finite")
        if self.least is not None and self.most is None and self.below is None and not number >= self.least:
            raise ConfigurationError(f"{said} is too small; it must be at least {self.least:g}")
        if self.above is not None and self.most is None and self.below is None and not number > self.above:
            raise ConfigurationError(f"{said} must be above {self.above:g}")
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if low is None or high is None:
            return
        inside = (number > low if self.above is not None else number >= low) and (
            number < high if self.below is not None else number <= high
        )
        if not inside:
            brackets = "(" if self.above is not None else "[", ")" if self.below is not None else "]"
            raise ConfigurationError(f"{said} must lie in {brackets[0]}{low:g}, {high:g}{brackets[1]}")


def _has_type(value: Any, hint: str) -> bool:
    """Whether a value is a list exactly if its field is one, and contains integers if the field is ``list[int]``."""
    if not hint.startswith("list["):
        return not isinstance(value, list)
    return isinstance(value, list) and (hint != "list[int]" or all(isinstance(number, int) for number in value))


class Section:
    """Base class of a group of fields; checks their values."""

    key: ClassVar[str]  # the dotted key with a trailing dot

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check each value by the rule of its field, and check that the values fit each other.

        Raises:
            ConfigurationError: for the first invalid value; it names the key, the value and the accepted values.
        """
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, Section):
                value.check()
            elif _has_type(value, str(each.type)):  # values of a wrong type are reported at composition
                each.metadata.get("rule", FINITE).check(self.key + each.name, value)


#: The rule of a field without one: any value is accepted, but numbers must be finite.
FINITE = Rule()


@dataclass
class DynamicsConfig(Section):
    """Latent dynamics d(z, a, e) -> z' (see :mod:`pwm_torchrl.modules.dynamics`)."""

    key: ClassVar[str] = "model.dynamics."

    kind: str = one_of("flow", "mlp", "residual", path=True)  # or the dotted path of your own Dynamics
    parameterization: str = one_of("residual_endpoint", "tangent", "simnorm_velocity")  # flow only
    solver: str = one_of("heun", "euler")  # flow only
    substeps: int = setting(4, least=1)  # K, solver substeps per transition (flow only)
    condition_on_start: bool = False  # feed z_t to the velocity field beside z_tau
    time_features: int = setting(0, least=0)  # number of sine/cosine pairs added to tau
    condition_on_step_size: bool = False  # feed the step size (needed by self-consistency)
    checkpoint_substeps: Optional[bool] = None  # recompute substeps in the backward pass: less memory, same gradients;
    # None: the memory plan decides
    imagination_substeps: Optional[int] = setting(None, least=1)  # Euler substeps of the few-step map that imagination
    # and acting use (flow only); None: the solver's


@dataclass
class ModelLossConfig(Section):
    """World-model objective (see :class:`pwm_torchrl.objectives.PWMModelLoss`)."""

    key: ClassVar[str] = "model.loss."

    form: str = one_of("pwm", "tdmpc2")  # weights gamma^t, coefficients 1; tdmpc2: weights rho^t, coefficients 20 and
    # 0.1
    dynamics_coef: Optional[float] = setting(None, least=0)  # None: the form's own
    reward_coef: Optional[float] = setting(None, least=0)  # None: the form's own
    termination_coef: float = setting(1.0, least=0)
    rho: Optional[float] = setting(None, least=0)  # per-step weight; None: gamma for pwm, 0.5 for tdmpc2
    one_step_weight: float = setting(0.0, least=0)  # weight of one-step terms from every encoded observation, in
    # addition to the rollout from the first
    rollout_weight: float = setting(1.0, least=0)  # lambda_roll: weight of the rollout loss of the dynamics
    flow_matching_weight: float = setting(0.0, least=0)  # lambda_fm
    flow_matching_source: str = one_of("teacher", "detached", "attached")  # where z_s comes from
    self_consistency_weight: float = setting(0.0, least=0)  # lambda_sc
    few_step_weight: float = setting(1.0, least=0)  # weight of the few-step map's rollout, in addition to the solver's
    few_step_rollout: bool = False  # roll out the few-step map alone; flow matching trains the solver's field


def check_few_step_rollout(asked: bool, few_step: bool, flow_matching_weight: float) -> None:
    """Check that ``model.loss.few_step_rollout`` has a few-step map, and a loss that trains the solver's field.

    Args:
        asked: whether the key is set.
        few_step: whether the dynamics have a few-step map.
        flow_matching_weight: weight of flow matching.

    Raises:
        ConfigurationError: if the key is set and one of the two is missing.
    """
    if asked and not (few_step and flow_matching_weight):
        raise ConfigurationError(
            "model.loss.few_step_rollout=true needs model.dynamics.imagination_substeps, the map that is rolled out, "
            "and model.loss.flow_matching_weight above 0, which trains the solver's field"
        )


@dataclass
class ModelConfig(Section):
    """World model: dynamics, heads and their loss."""

    key: ClassVar[str] = "model."

    name: str = MISSING
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    loss: ModelLossConfig = field(default_factory=ModelLossConfig)
    reward_head: str = one_of("scalar", "two_hot")  # scalar or two_hot: squared error of the reward, or cross-entropy
    # over bins
    num_bins: int = setting(101, least=2)  # two-hot bins
    vmin: float = -10.0  # lowest two-hot bin, symlog space
    vmax: float = 10.0  # highest two-hot bin, symlog space
    reward_space: str = one_of("raw", "symlog")  # the space in which the policy maximises a two-hot reward
    termination_head: Optional[bool] = None  # None: where the environment terminates

    def check(self) -> None:
        super().check()
        if not self.vmin < self.vmax:
            raise ConfigurationError(f"model.vmin={self.vmin} must be below model.vmax={self.vmax}")


@dataclass
class SizeConfig(Section):
    """Widths of every network."""

    key: ClassVar[str] = "size."

    name: str = MISSING
    latent_dim: int = setting(MISSING, least=1)  # D, a multiple of simnorm_dim
    units: list[int] = setting(MISSING, least=1)  # hidden widths of dynamics and reward head
    encoder_units: list[int] = setting(MISSING, least=1)  # hidden widths of the encoder
    simnorm_dim: int = setting(8, least=1)  # V, size of a SimNorm group
    task_dim: int = setting(96, least=1)  # E, multi-task only
    actor_units: list[int] = setting([400, 200, 100], least=1)
    critic_units: list[int] = setting([400, 200], least=1)
    num_critics: int = setting(3, least=1)

    def check(self) -> None:
        super().check()
        if MISSING not in (self.latent_dim, self.simnorm_dim) and self.latent_dim % self.simnorm_dim:
            raise ConfigurationError(
                f"size.latent_dim={self.latent_dim} is not a multiple of size.simnorm_dim={self.simnorm_dim}; SimNorm "
                "needs groups of equal size"
            )


@dataclass
class AlgorithmConfig(Section):
    """The algorithm and its settings (see :mod:`pwm_torchrl.algorithm`).

    An epoch collects ``collect_steps`` agent steps in every environment and then updates model, actor and critic. In
    pre-training and extraction, an epoch consists of updates only. Defaults are those of the published algorithm,
    ``pwm_paper``; the files in ``configs/algorithm`` set those of the others.
    """

    key: ClassVar[str] = "algorithm."

    name: str = one_of(*ALGORITHMS, path=True)  # pwm_paper: as published; or the dotted path of your own algorithm
    horizon: int = setting(16, least=0)  # H of imagination, agent steps; pwm also accepts 0: no imagined steps
    slice_steps: Optional[int] = setting(None, least=1)  # length of the model's training slices, agent steps; None:
    # horizon
    collect_steps: Optional[int] = setting(None, least=1)  # agent steps per environment and epoch; None: horizon
    random_steps: int = setting(0, least=0)  # first agent steps (all environments together) with uniform actions
    exploration_noise: str = one_of("white", "pink")  # noise of collected actions: independent from step to step, or
    # correlated in time; either way, each action has the policy's distribution
    gamma: float = setting(0.99, above=0, most=1)
    lmbda: float = setting(0.95, least=0, most=1)  # lambda of the TD(lambda) critic targets
    detach: bool = True  # stop the gradient at the actor's input in imagination
    updates_per_step: float = setting(0.5, above=0)  # pwm: sets of model, critic and actor updates per agent step
    max_updates: int = setting(64, least=1)  # pwm: maximum number of sets per epoch
    critic_batch: int = setting(256, least=1)  # pwm: replayed transitions per critic update
    critic_steps: int = setting(3, least=1)  # pwm: n of the n-step targets, at most slice_steps
    target_rate: float = setting(0.01, above=0, most=1)  # pwm: fraction by which the slow critics move towards the
    # critics after each update
    temperature: float = setting(0.1, above=0)  # pwm: initial weight of the entropy, which is learned
    target_entropy: float = -1.0  # pwm: target entropy per action dimension, by which the weight is adjusted
    state_std: bool = False  # the policy's standard deviation depends on the state
    scale_rewards: bool = False  # reward head and critics compute in units of the rewards' running deviation
    entropy_weight: float = setting(0.0, least=0)  # pwm_paper, shac: weight of the policy's entropy beside the scaled
    # return; keeps actions from saturating
    normalize_returns: bool = True  # divide the actor loss by the running std of the imagined returns
    normalize_observations: bool = False  # running mean and std in front of the encoder
    normalize_rewards: bool = False  # divide rewards by a running scale; never shifts them
    actor_starts: str = one_of("replay", "current")  # where imagination starts: at any replayed state, or in the batch
    # just collected
    actor_batch: int = setting(128, least=1)  # imagined rollouts per actor update
    actor_updates: int = setting(1, least=1)  # per epoch
    model_batch: int = setting(256, least=1)  # slices per model update
    model_updates: int = setting(8, least=0)  # per epoch
    first_model_updates: Optional[int] = setting(None, least=0)  # model updates in the first training epoch; None: an
    # episode's length
    critic_passes: int = setting(8, least=1)  # passes over the rollouts of each actor update
    critic_minibatches: int = setting(4, least=1)  # minibatches per pass
    model_lr: float = setting(3e-4, above=0)
    actor_lr: float = setting(5e-4, above=0)
    critic_lr: float = setting(5e-4, above=0)
    temperature_lr: Optional[float] = setting(None, above=0)  # pwm: learning rate of the entropy's weight; None:
    # actor_lr
    final_lr: Optional[float] = setting(1e-5, least=0)  # every learning rate falls linearly to this one; None: they are
    # constant
    model_betas: list[float] = setting([0.9, 0.999], least=0, below=1, count=2)  # of Adam
    actor_betas: list[float] = setting([0.7, 0.95], least=0, below=1, count=2)  # of Adam
    critic_betas: list[float] = setting([0.7, 0.95], least=0, below=1, count=2)  # of Adam
    model_grad_norm: float = setting(20.0, above=0, infinite=True)  # gradient-norm clip
    actor_grad_norm: float = setting(1.0, above=0, infinite=True)
    critic_grad_norm: float = setting(100.0, above=0, infinite=True)
    log_std_init: float = -1.0  # actor's state-independent log standard deviation
    log_std_min: float = -1.427
    compile: Any = one_of("auto", "true", "false")  # compile the evaluation of the dynamics; auto: where a run is long
    # enough to pay for it, as measured on a CPU (:func:`pwm_torchrl.algorithm.cost.pays_to_compile`)

    @property
    def steps_per_env(self) -> int:
        """Number of agent steps that an epoch collects in each environment."""
        return self.horizon if self.collect_steps is None else self.collect_steps

    def wanted_sets(self, agent_steps: int) -> int:
        """Update sets that ``updates_per_step`` asks for after ``agent_steps``, whatever ``max_updates`` allows."""
        return max(1, round(self.updates_per_step * agent_steps))

    @property
    def slice_key(self) -> str:
        """The key that sets :attr:`slice_length`."""
        return "algorithm.horizon" if self.slice_steps is None else "algorithm.slice_steps"

    @property
    def slice_length(self) -> int:
        """Number of steps in the slices from which model and critics learn."""
        return self.horizon if self.slice_steps is None else self.slice_steps


@dataclass
class TrainingConfig(Section):
    """Length of a run, evaluation, checkpoints and replay.

    In an epoch, each of ``env.num_envs`` environments makes ``algorithm.collect_steps`` agent steps; then the networks
    are updated.
    """

    key: ClassVar[str] = "training."

    epochs: int = setting(15_000, least=1)  # length of the run
    steps: Optional[int] = setting(None, least=1)  # the length in environment steps instead, such as 1e6; epochs is
    # then set to the smallest number that collects at least this many
    eval_every: int = setting(50, least=0)  # epochs between evaluations; 0: only at the end
    eval_episodes: int = setting(10, least=0)  # deterministic episodes per evaluation, in separate environments
    checkpoint_every: int = setting(50, least=0)  # epochs between checkpoints; 0: only at the end
    checkpoint_minutes: float = setting(30.0, least=0, infinite=True)  # a checkpoint is also saved at the end of an
    # epoch if the last one is older than this, minutes; 0: never
    keep_checkpoints: int = setting(2, least=1)  # newest checkpoints to keep, in addition to the best
    replay_capacity: int = setting(1_000_000, least=1)  # transitions
    replay_storage: str = one_of("auto", "memory", "device", "disk")  # disk: files in the run directory; auto: the
    # memory plan decides
    gradient_profile_every: int = setting(50, least=0)  # epochs between logs of the gradient norm per horizon step; 0:
    # never
    video: bool = True  # film one deterministic episode at the end
    threads: Optional[int] = setting(None, least=1)  # torch threads; None: the CPUs of the allocation
    precision: str = one_of(
        "fp32", "tf32", "bf16"
    )  # of matrix products in updates; all else is float32; tf32 is for GPUs
    progress: bool = True  # progress bar
    check_graphs: bool = False  # debug: fail an epoch that leaves more live autograd nodes than it found
    profile: int = setting(0, least=0, most=1000)  # updates in steady state that the profiler records, in
    # trace.json.gz of the run directory; 0: none


@dataclass
class LoggerConfig(Section):
    """Loggers of metrics in addition to metrics.csv, which is always written."""

    key: ClassVar[str] = "logger."

    kind: str = one_of("csv", "tensorboard", "wandb")  # csv: nowhere else
    also: list[str] = several_of("csv", "tensorboard", "wandb")
    # additional loggers; logger=[tensorboard,wandb] sets both keys
    project: Optional[str] = None  # wandb; None: WANDB_PROJECT, else pwm_torchrl
    entity: Optional[str] = None  # wandb; None: WANDB_ENTITY
    group: Optional[str] = None  # wandb; None: WANDB_RUN_GROUP, else one group for runs that differ in the seed only
    job_type: Optional[str] = None  # wandb; None: WANDB_JOB_TYPE, else the run's mode
    tags: list[str] = field(default_factory=list)  # wandb; empty: WANDB_TAGS
    notes: Optional[str] = None  # wandb; None: WANDB_NOTES
    artifacts: bool = True  # wandb: upload the best policy and the world model of a finished run
    mode: str = one_of("auto", "online", "offline", "disabled")
    # wandb: auto is WANDB_MODE, else online with key and network, else offline


@dataclass
class ClusterConfig(Section):
    """Where a submitted job runs, the resources of its nodes, and its SLURM options."""

    key: ClassVar[str] = "cluster."

    kind: str = one_of("auto", "local", "debug", "slurm")  # auto: slurm if it is found, else local; local: a separate
    # process on this machine; debug: in this process; slurm: a SLURM job
    name: str = "auto"  # label
    host_gib: Optional[float] = setting(None, above=0)  # maximum host memory of a job on a node, GiB; None: that of the
    # nodes, from SLURM
    gpu: Optional[str] = None  # type of the nodes' GPU, such as l40s, for the memory plan; None: none
    gpus: int = setting(0, least=0)  # GPUs per node, one task each; without GPUs, one task
    nodes: int = setting(1, least=1)
    partition: Optional[str] = None  # None: SLURM's default, as for every key down to gres
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None  # features that a node must have, such as l40s or "a100&nvlink"
    gres: Optional[str] = None  # value of --gres in place of gpus, such as gpu:l40s:1
    cpus: Optional[int] = setting(None, least=1)  # CPUs per task; None: training.threads, or 2
    mem_gib: Optional[float] = setting(None, above=0)  # host memory per node, GiB; None: what the memory plan needs
    time: Optional[str] = None  # time limit in SLURM's format, "24:00:00"; read into time_min
    time_min: Optional[int] = setting(None, least=1)  # time limit, minutes; None: estimated from the run's length
    max_time_min: Optional[int] = setting(None, least=1)
    signal_delay_s: int = setting(120, least=1)  # seconds before the limit at which the run is told to save; SLURM may
    # be 60 s early
    setup: list[str] = field(default_factory=list)  # lines of shell that run before the job, such as "module load cuda"
    array_parallelism: Optional[int] = setting(None, least=1)  # jobs of one submission that may run at a time; None:
    # all
    max_memory_restarts: int = setting(3, least=0)  # how often a job that ran out of memory is restarted with
    # more memory or smaller batches
    comment: Optional[str] = None  # shown by SLURM with the job
    sbatch: dict[str, Any] = field(default_factory=dict)  # more options of sbatch by their long names, such as
    # {reservation: course, exclude: "node[1-3]", mem-per-cpu: 4G, exclusive: true}


@dataclass
class MemoryConfig(Section):
    """Memory budgets and micro-batches of a run (see :mod:`pwm_torchrl.memory`)."""

    key: ClassVar[str] = "memory."

    kind: str = one_of("auto", "fixed")  # auto: plan the keys that are null here and other settings; fixed: use the
    # settings as written
    model_micro_batch: Optional[int] = setting(None, least=1)  # slices per backward pass of a model update; None:
    # planned, or all
    actor_micro_batch: Optional[int] = setting(None, least=1)  # rollouts per backward pass of an actor update; None:
    # likewise
    critic_micro_batch: Optional[int] = setting(None, least=1)  # states per backward pass of a critic update; None:
    # likewise
    host_gib: Optional[float] = setting(None, above=0)  # budget of host memory, GiB; None: the limit of the machine,
    # its cgroup or SLURM
    device_gib: Optional[float] = setting(None, above=0)  # budget of GPU memory, GiB; None: the GPU's free memory
    margin: float = setting(0.1, least=0, below=1)  # share that a plan leaves free, of the host memory below stop_at
    # and of the GPU memory
    stop_at: float = setting(0.85, above=0, most=1)  # share of the host limit, not counting reclaimable memory, at
    # which the run saves and stops
    disk_above_gib: float = setting(8.0, least=0, infinite=True)  # GiB; a replay larger than this goes to disk
    # (training.replay_storage=auto)


def micro_batch_key(network: str) -> str:
    """Name of the field of :class:`MemoryConfig` that sets the micro-batch of a network's update."""
    return f"{network}_micro_batch"


@dataclass
class DataConfig(Section):
    """Stored episodes (see :class:`pwm_torchrl.data.episodes.EpisodeStore`)."""

    key: ClassVar[str] = "data."

    path: Optional[str] = None  # a store that launch/data.py import wrote
    stage: str = one_of("none", "scratch")  # scratch: read from a copy on the node's own disk, made once per node
    scratch_dir: Optional[str] = None  # where that copy goes; None: SLURM_TMPDIR or TMPDIR
    balanced: bool = False  # draw tasks with equal probability; else all slices
    validation_fraction: float = setting(0.02, least=0, below=1)  # share of each task's episodes that training never
    # sees
    validation_slices: int = setting(256, least=1)  # slices per task in a validation


@dataclass
class Config(Section):
    """The configuration of a run."""

    key: ClassVar[str] = ""

    mode: str = one_of("online", "pretrain", "extract")  # online: collect, learn a world model and a policy; pretrain:
    # a world model from stored episodes of many tasks; extract: a policy for one task in a pre-trained world model
    tasks: Optional[str] = None  # pretrain: mt30 | mt80 | names separated by commas | a YAML list of names
    task: Optional[str] = None  # extract: a task of the world model
    world_model: Optional[str] = None  # extract: directory of a pre-training run, or one with world_model.json
    world_model_sha256: Optional[str] = None  # extract: its weights' hash, filled in when the run is composed
    pretraining: Optional[str] = None  # extract: experiment that task=all starts with if no world_model is given
    finetune: bool = False  # extract: continue training the world model on the task's stored episodes
    model: ModelConfig = field(default_factory=ModelConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    env: dict[str, Any] = field(default_factory=dict)  # _target_: maker; the rest are its arguments
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init_from: Optional[str] = None  # directory of a run whose best networks this one starts from; its environment may
    # be another one of the same dimensions; optimizers, replay and return statistics start anew
    init_from_parts: list[str] = several_of(*NETWORKS, default=NETWORKS)  # which of them
    seed: int = setting(0, least=0)  # one seed determines a run on the CPU
    device: str = setting("auto", pattern=r"auto|cpu|cuda(:\d+)?", words="auto, cpu, cuda or cuda:N")
    # auto, cpu, cuda or cuda:N
    runs_dir: str = "runs"  # where new run directories are created
    run_dir: Optional[str] = None  # this run's directory; an unfinished run in it, of the same settings, is
    # resumed; None: a new one under runs_dir


#: Keys of earlier versions and their replacements. Command lines and the files of earlier runs may contain them.
RENAMED_KEYS: dict[str, tuple[str, ...]] = {
    "algorithm.imagination_batch": ("algorithm.actor_batch",),
    "algorithm.policy_updates": ("algorithm.actor_updates",),
    "algorithm.policy_starts": ("algorithm.actor_starts",),
    "algorithm.policy_betas": ("algorithm.actor_betas", "algorithm.critic_betas"),
    "memory.imagination_micro_batch": ("memory.actor_micro_batch",),
    "memory.host_gb": ("memory.host_gib",),
    "memory.device_gb": ("memory.device_gib",),
    "memory.disk_above_gb": ("memory.disk_above_gib",),
    "cluster.host_gb": ("cluster.host_gib",),
    "cluster.mem_gb": ("cluster.mem_gib",),
}
_GB = 1e9 / 2**30  # GiB
#: Keys of earlier versions that had another unit, and the factors that convert their values.
RENAMED_UNITS: dict[str, float] = dict.fromkeys(
    ("memory.host_gb", "memory.device_gb", "memory.disk_above_gb", "cluster.host_gb"), _GB
)


def in_present_unit(key: str, value: Any) -> Any:
    """Convert the value of an earlier key to the unit of the current key. Other types than numbers are unchanged."""
    factor = RENAMED_UNITS.get(key)
    return value if factor is None or not isinstance(value, (int, float)) else round(value * factor, 6)
