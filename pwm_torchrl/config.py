"""Typed configuration of a run: what Hydra composes and every part of the program reads.

One field, one meaning: the comment beside it is its documentation. Defaults are the algorithm's; the YAML files in
``configs/`` hold only what deviates from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value, written out so that this file needs no OmegaConf


@dataclass
class DynamicsConfig:
    """Latent dynamics d(z, a, e) -> z' (see :mod:`pwm_torchrl.modules.dynamics`)."""

    kind: str = "flow"  # mlp | residual | flow, or the dotted path of a Dynamics of one's own
    parameterization: str = "residual_endpoint"  # residual_endpoint | tangent | simnorm_velocity (flow only)
    solver: str = "heun"  # euler | heun (flow only)
    substeps: int = 4  # K >= 1 solver substeps per transition (flow only)
    condition_on_start: bool = False  # feed z_t to the velocity field beside z_tau
    time_features: int = 0  # number of sine/cosine pairs added to tau
    condition_on_step_size: bool = False  # feed the step size (needed by self-consistency)
    checkpoint_substeps: Optional[bool] = None  # recompute substeps in the backward pass: less memory, same gradients;
    # None: the memory plan decides


@dataclass
class ModelLossConfig:
    """World-model objective (see :class:`pwm_torchrl.objectives.PWMModelLoss`)."""

    form: str = "pwm"  # pwm | tdmpc2: weights gamma^t, coefficients 1 | weights rho^t, coefficients 20 and 0.1
    dynamics_coef: Optional[float] = None  # None: the form's own
    reward_coef: Optional[float] = None  # None: the form's own
    termination_coef: float = 1.0
    rho: Optional[float] = None  # per-step weight; None: gamma for pwm, 0.5 for tdmpc2
    rollout_weight: float = 1.0  # lambda_roll: weight of the rollout loss of the dynamics
    flow_matching_weight: float = 0.0  # lambda_fm
    flow_matching_source: str = "teacher"  # teacher | detached | attached: where z_s comes from
    self_consistency_weight: float = 0.0  # lambda_sc


@dataclass
class ModelConfig:
    """World model: dynamics, heads and their loss."""

    name: str = MISSING
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    loss: ModelLossConfig = field(default_factory=ModelLossConfig)
    reward_head: str = "scalar"  # scalar | two_hot
    num_bins: int = 101  # two-hot bins
    vmin: float = -10.0  # lowest two-hot bin, symlog space
    vmax: float = 10.0  # highest two-hot bin, symlog space
    reward_space: str = "raw"  # raw | symlog: the space in which the policy maximises a two-hot reward
    termination_head: Optional[bool] = None  # None: where the environment terminates


@dataclass
class SizeConfig:
    """Widths of every network."""

    name: str = MISSING
    latent_dim: int = MISSING  # D, a multiple of simnorm_dim
    units: list[int] = MISSING  # hidden widths of dynamics and reward head
    encoder_units: list[int] = MISSING  # hidden widths of the encoder
    simnorm_dim: int = 8  # V, size of a SimNorm group
    task_dim: int = 96  # E, multi-task only
    actor_units: list[int] = field(default_factory=lambda: [400, 200, 100])
    critic_units: list[int] = field(default_factory=lambda: [400, 200])
    num_critics: int = 3


@dataclass
class AlgorithmConfig:
    """PWM: what one epoch does (see :mod:`pwm_torchrl.algorithm.pwm`).

    An epoch collects ``collect_steps`` agent steps in every environment, then updates model, actor and critic
    as often as is said here. In a pre-training or an extraction it consists of its updates alone.
    """

    horizon: int = 16  # H of imagination and of the model's training slices, agent steps
    collect_steps: Optional[int] = None  # agent steps per environment and epoch; None: horizon
    random_steps: int = 0  # first agent steps (all environments together) with uniform actions
    gamma: float = 0.99
    lmbda: float = 0.95  # lambda of the TD(lambda) critic targets
    detach: bool = True  # stop the gradient at the actor's input in imagination
    entropy_weight: float = 0.0  # of the policy's entropy beside the scaled return; keeps actions from saturating
    normalize_returns: bool = True  # divide the actor loss by the running std of the imagined returns
    normalize_observations: bool = False  # running mean and std in front of the encoder
    normalize_rewards: bool = False  # divide rewards by a running scale; never shifts them
    actor_starts: str = "replay"  # replay | current: where imagination starts
    actor_batch: int = 128  # imagined rollouts per actor update
    actor_updates: int = 1  # per epoch
    model_batch: int = 256  # slices per model update
    model_updates: int = 8  # per epoch
    first_model_updates: Optional[int] = None  # in the first training epoch; None: an episode's length
    critic_passes: int = 8  # passes over the rollouts of each actor update
    critic_minibatches: int = 4  # minibatches per pass
    model_lr: float = 3e-4
    actor_lr: float = 5e-4
    critic_lr: float = 5e-4
    final_lr: float = 1e-5  # every learning rate falls linearly to this one
    model_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of Adam
    actor_betas: list[float] = field(default_factory=lambda: [0.7, 0.95])  # of Adam
    critic_betas: list[float] = field(default_factory=lambda: [0.7, 0.95])  # of Adam
    model_grad_norm: float = 20.0  # gradient-norm clip
    actor_grad_norm: float = 1.0
    critic_grad_norm: float = 100.0
    log_std_init: float = -1.0  # actor's state-independent log standard deviation
    log_std_min: float = -1.427
    compile: Any = "auto"  # auto | true | false: compile the evaluation of the dynamics; auto: where a run is
    # long enough to pay for it, as measured on a CPU (:func:`pwm_torchrl.algorithm.build.pays_to_compile`)


@dataclass
class TrainingConfig:
    """Length of a run and what happens on the way.

    An epoch: ``algorithm.collect_steps`` agent steps in each of ``env.num_envs`` environments, then the updates.
    """

    epochs: int = 15_000  # of the whole run
    steps: Optional[int] = None  # the length in environment steps instead (agent steps times action repeat), as it was
    # asked for: epochs then holds the whole epochs in which at least so many are collected
    eval_every: int = 50  # epochs between evaluations; 0: only at the end
    eval_episodes: int = 10  # deterministic episodes per evaluation, on environments of their own
    checkpoint_every: int = 50  # epochs between checkpoints; 0: only at the end
    checkpoint_minutes: float = 30.0  # minutes after which the end of an epoch saves one in any case; 0: never
    keep_checkpoints: int = 2  # newest ones kept, beside the best
    replay_capacity: int = 1_000_000  # transitions
    replay_storage: str = "auto"  # auto | memory | device | disk: files in the run directory
    gradient_profile_every: int = 50  # epochs between logs of the gradient norm per horizon step; 0: never
    video: bool = True  # film one deterministic episode at the end
    threads: Optional[int] = None  # torch threads; None: the CPUs of the allocation
    precision: str = "fp32"  # fp32 | tf32 | bf16: of matrix products in updates; all else is float32; tf32 is for GPUs
    progress: bool = True  # progress bar
    check_graphs: bool = False  # debug: fail an epoch that leaves more live autograd nodes than it found


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.csv, which is always written."""

    kind: str = "csv"  # csv | tensorboard | wandb
    also: list[str] = field(default_factory=list)  # further ones; logger=[tensorboard,wandb] sets both keys
    project: str = "pwm_torchrl"  # wandb
    entity: Optional[str] = None  # wandb
    group: Optional[str] = None  # wandb; None: one group for runs that differ in the seed only
    job_type: Optional[str] = None  # wandb; None: the run's mode
    tags: list[str] = field(default_factory=list)  # wandb
    notes: Optional[str] = None  # wandb
    artifacts: bool = True  # wandb: upload the best policy and the world model of a finished run
    mode: str = "auto"  # wandb: auto (online with key and network, else offline) | online | offline | disabled


@dataclass
class ClusterConfig:
    """Where a submitted job runs, what its nodes have and what it asks SLURM for."""

    kind: str = "auto"  # auto: slurm where it is found, else local | local: a process of its own here | debug: in this
    # process | slurm: a job of SLURM
    name: str = "auto"  # label
    host_gib: Optional[float] = (
        None  # host memory a job may have on a node, at most, GiB; None: what this machine offers
    )
    gpu: Optional[str] = None  # type of the GPU, such as l40s, for the memory plan; None: none, or this machine's
    gpus: int = 0  # GPUs per node; each has a task of its own, and without any there is one task
    nodes: int = 1
    partition: Optional[str] = None  # None: SLURM's default, as for every key down to gres
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None  # features that a node must have, such as l40s or "a100&nvlink"
    gres: Optional[str] = None  # what --gres asks for in place of gpus, such as gpu:l40s:1
    cpus: Optional[int] = None  # CPUs per task; None: training.threads, or 2
    mem_gib: Optional[float] = None  # host memory per node, GiB; None: what the memory plan needs
    time: Optional[str] = None  # time limit in SLURM's writing, "24:00:00"; read into time_min
    time_min: Optional[int] = None  # time limit, minutes; None: estimated from the run's length
    max_time_min: Optional[int] = (
        None  # the longest limit asked for, minutes; longer runs come back until they are done
    )
    signal_delay_s: int = 120  # seconds before the limit at which the run is told to save; SLURM may be 60 s early
    setup: list[str] = field(default_factory=list)  # lines of shell that run before the job, such as "module load cuda"
    array_parallelism: Optional[int] = None  # jobs of one submission that may run at a time; None: all
    max_memory_restarts: int = 3  # how often a job that ran out of memory comes back with more, or with smaller batches
    comment: Optional[str] = None  # shown by SLURM beside the job


@dataclass
class MemoryConfig:
    """How a run fits into memory (see :mod:`pwm_torchrl.memory`)."""

    kind: str = "auto"  # auto: what is null here, and more, is planned | fixed: only what is written
    model_micro_batch: Optional[int] = None  # slices per backward pass of a model update; None: planned, or all
    actor_micro_batch: Optional[int] = None  # rollouts per backward pass of an actor update; None: likewise
    critic_micro_batch: Optional[int] = None  # states per backward pass of a critic update; None: likewise
    host_gib: Optional[float] = None  # budget of host memory, GiB; None: what the machine, its cgroup or SLURM gives
    device_gib: Optional[float] = None  # budget of GPU memory, GiB; None: what is free on the GPU
    margin: float = 0.1  # share that a plan leaves free: of what lies below stop_at on the host, of the GPU's memory
    stop_at: float = 0.85  # share of the host limit, reclaimable memory apart, at which the run saves and stops
    disk_above_gib: float = 8.0  # GiB; a replay larger than this goes to disk (training.replay_storage=auto)


@dataclass
class DataConfig:
    """Stored episodes (see :class:`pwm_torchrl.data.episodes.EpisodeStore`)."""

    path: Optional[str] = None  # a store that launch/data.py import wrote
    stage: str = "none"  # none | scratch: read from a copy on the node's own disk, made once per node
    scratch_dir: Optional[str] = None  # where that copy goes; None: SLURM_TMPDIR or TMPDIR
    balanced: bool = False  # draw tasks with equal probability; else every slice
    validation_fraction: float = 0.02  # share of each task's episodes that training never sees
    validation_slices: int = 256  # slices per task in a validation


@dataclass
class Config:
    """A whole run."""

    mode: str = "online"  # online: collect, learn a world model and a policy | pretrain: a world model from stored
    # episodes of many tasks | extract: a policy for one task in a pre-trained world model
    tasks: Optional[str] = None  # pretrain: mt30 | mt80 | names with commas between | a YAML list of names
    task: Optional[str] = None  # extract: a task of the world model
    world_model: Optional[str] = None  # extract: directory of a pre-training run, or one with world_model.json
    world_model_sha256: Optional[str] = None  # extract: its weights' hash, filled in when the run is composed
    pretraining: Optional[str] = None  # extract: experiment that task=all begins with where no world_model is given
    finetune: bool = False  # extract: go on training the world model on the task's stored episodes
    model: ModelConfig = field(default_factory=ModelConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    env: dict[str, Any] = field(default_factory=dict)  # _target_: maker; the rest are its arguments
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0  # one seed determines a run on the CPU
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    runs_dir: str = "runs"  # where new run directories are created
    run_dir: Optional[str] = None  # this run's directory; None: a new one under runs_dir


#: Keys of earlier versions and those that took their place; command lines and the files of earlier runs may have them.
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
#: Keys of earlier versions that had another unit, and by what their values are multiplied.
RENAMED_UNITS: dict[str, float] = dict.fromkeys(
    ("memory.host_gb", "memory.device_gb", "memory.disk_above_gb", "cluster.host_gb"), _GB
)


def in_present_unit(key: str, value: Any) -> Any:
    """A value of an earlier key in the unit of the present one; what is no number stays."""
    factor = RENAMED_UNITS.get(key)
    return value if factor is None or not isinstance(value, (int, float)) else round(value * factor, 6)


#: Metrics of earlier versions and their present names.
RENAMED_METRICS = {
    "loss/value": "loss/critic",
    "grad_norm/value": "grad_norm/critic",
    "lr/world_model": "lr/model",
    "lr/critics": "lr/critic",
    "memory/imagination_micro_batch": "memory/actor_micro_batch",
}


@dataclass(frozen=True)
class Update:
    """One of an epoch's updates, under the name of the network that it trains.

    That name is the one word for it everywhere: keys ``algorithm.{name}_lr`` and ``memory.{name}_micro_batch``, losses,
    optimizers, metrics ``loss/{name}``, checkpoints and messages.
    """

    name: str
    rows: str  # what a batch consists of
    batch: Callable[[AlgorithmConfig], int]  # rows of a batch
    per_epoch: Callable[[AlgorithmConfig], int]  # updates in an epoch

    @property
    def micro_batch_key(self) -> str:
        """The field of :class:`MemoryConfig` that sets its micro-batch."""
        return f"{self.name}_micro_batch"


#: The updates in the order in which an epoch makes them.
UPDATES = {
    update.name: update
    for update in (
        Update("model", "slices", lambda a: a.model_batch, lambda a: a.model_updates),
        Update("actor", "rollouts", lambda a: a.actor_batch, lambda a: a.actor_updates),
        Update(
            "critic",
            "states",
            lambda a: -(-a.actor_batch * a.horizon // a.critic_minibatches),
            lambda a: a.actor_updates * a.critic_passes * a.critic_minibatches,
        ),
    )
}


def trained_networks(cfg: Config) -> tuple[str, ...]:
    """Names of the networks that a run trains, which are those of its updates."""
    if cfg.mode == "pretrain":
        return ("model",)
    if cfg.mode == "extract" and not cfg.finetune:
        return ("actor", "critic")
    return tuple(UPDATES)
