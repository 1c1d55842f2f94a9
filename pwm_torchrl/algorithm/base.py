"""Base class of the algorithms: lookup by name, data sources, the model update, and the state of an unfinished epoch.

``algorithm.name`` is a key of :data:`~pwm_torchrl.config.ALGORITHMS`, or the dotted path of a user's own class. The
class methods tell the rest of the program which updates an epoch makes, with which networks and losses. Memory plan,
run length, checkpoints and recovery are derived from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.algorithm.build import (
    EnvFacts,
    Losses,
    NetworkOptimizer,
    Networks,
    build_losses,
    build_networks,
    build_optimizers,
)
from pwm_torchrl.algorithm.declarations import check_least
from pwm_torchrl.algorithm.updates import Updates
from pwm_torchrl.config import ALGORITHMS, AlgorithmConfig, Config, micro_batch_key
from pwm_torchrl.devices import to_device
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import RewardScale
from pwm_torchrl.user_code import locate

__all__ = [
    "Algorithm",
    "EpochWork",
    "MetricRow",
    "Number",
    "Parts",
    "Samples",
    "Update",
    "build_parts",
    "find_algorithm",
    "updates_of",
]

# The metrics of an epoch: detached numbers ----------------------------------------------------------------------------

Number = int | float


class MetricRow:
    """Accumulates the metrics of one epoch.

    :meth:`set` keeps the last value, :meth:`mean` averages over the calls. Tensors stay on their device until
    :meth:`numbers`, so that an update does not wait for the accelerator.

    Nothing that outlives a step may hold an autograd graph: a logged loss that kept its graph once cost a run 128 GB of
    host memory. A tensor that requires grad therefore raises an error instead of being detached silently.

    Examples:
        >>> from pwm_torchrl.algorithm.base import MetricRow
        >>> row = MetricRow()
        >>> row.set({"epoch": 3})
        >>> for loss in (1.0, 3.0):
        ...     row.mean({"model": loss}, prefix="loss/")
        >>> row.numbers()
        {'epoch': 3, 'loss/model': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def set(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Stores values, replacing earlier ones of the same name.

        Args:
            values: numbers, or one-element tensors that do not require grad; a TensorDict of these works too.
            prefix: prepended to each name. Defaults to ``""``.

        Raises:
            ValueError: if a tensor requires grad or has more than one element.
            TypeError: if a value is not a number.
        """
        for name, value in values.items():
            key = prefix + name
            self._sums[key] = _check(key, value)
            self._counts[key] = 1

    def mean(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds values to the running mean of each name; same arguments and errors as :meth:`set`."""
        for name, value in values.items():
            key = prefix + name
            checked = _check(key, value)
            self._sums[key] = self._sums[key] + checked if key in self._sums else checked
            self._counts[key] = self._counts.get(key, 0) + 1

    def numbers(self) -> dict[str, Number]:
        """The row as plain Python numbers, in the order in which the names were added."""
        totals = _on_host(self._sums)
        return {key: total if self._counts[key] == 1 else total / self._counts[key] for key, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums and counts so far, exact to the bit."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    @classmethod
    def restored(cls, state_dict: Mapping[str, Any], device: Any = None) -> MetricRow:
        """A row from :meth:`state_dict`, its tensors on ``device``."""
        row = cls()
        row._sums = {
            k: v.to(device) if isinstance(v, Tensor) and device is not None else v
            for k, v in state_dict["sums"].items()
        }
        row._counts = dict(state_dict["counts"])
        return row


def _check(name: str, value: Any) -> Any:
    """The value as a Python number or a scalar copy; raises for anything that a row must not keep."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"metric {name!r} requires grad and would keep its autograd graph alive; detach it where it is made"
            )
        if value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a metric is one number")
        # A copy: the caller may overwrite its tensor in place before the row is read.
        return value.reshape(()).clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}; a metric is one number")
    return int(value) if isinstance(value, Integral) else float(value)


def _on_host(values: Mapping[str, Any]) -> dict[str, Number]:
    """Values as Python numbers; one copy per device and dtype, since each copy waits for the device."""
    together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            together.setdefault((value.device, value.dtype), []).append(key)
    numbers = dict(values)
    for keys in together.values():
        numbers.update(zip(keys, torch.stack([values[key] for key in keys]).cpu().tolist(), strict=True))
    return numbers


# The algorithms: their data, an epoch's remaining work, and the base class --------------------------------------------

Work = TypeVar("Work", bound="EpochWork")


class Samples(Protocol):
    """Source of training data for the updates: a replay buffer or stored episodes."""

    @property
    def device(self) -> torch.device:
        """Device of the sampled tensors."""

    @property
    def collected(self) -> int:
        """Transitions stored so far, including those overwritten since."""

    @property
    def can_sample(self) -> bool:
        """Whether at least one whole slice is stored."""

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, T]``."""

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``."""


Phase = Callable[[str, int, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Update:
    """One kind of update in an epoch, named after the network that it trains.

    The same name is used everywhere: in the keys ``algorithm.{name}_lr`` and ``memory.{name}_micro_batch``, and for
    losses, optimizers, metrics ``loss/{name}``, checkpoints and messages.

    Attributes:
        name (str): one of :data:`~pwm_torchrl.config.NETWORKS`.
        rows (str): what a row of the batch is, for example ``"slices"``.
        batch (int): rows per batch.
        per_epoch (int): updates per epoch; the maximum, if the number varies.
        steps (int): steps that a row is rolled out and differentiated through.
    """

    name: str
    rows: str
    batch: int
    per_epoch: int
    steps: int = 1

    @property
    def micro_batch_key(self) -> str:
        """The field of :class:`~pwm_torchrl.config.MemoryConfig` that sets its micro-batch."""
        return micro_batch_key(self.name)


@contextmanager
def _no_phase(name: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass
class EpochWork:
    """The remaining updates of an epoch and its metrics so far, so that an interrupted epoch can continue.

    Attributes:
        model_updates (int): model updates left before the others begin.
        row (MetricRow): metrics so far.
    """

    model_updates: int
    row: MetricRow = field(default_factory=MetricRow, kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Counters and tensors."""
        return {**vars(self), "row": self.row.state_dict()}

    @classmethod
    def restored(cls: type[Work], state_dict: Mapping[str, Any], device: torch.device) -> Work:
        """Work from :meth:`state_dict`, its tensors on ``device``."""
        return cls(**{**state_dict, "row": MetricRow.restored(state_dict["row"], device)})


class Algorithm:
    """Base class; a subclass defines in :meth:`epoch` which updates an epoch makes, and in which order.

    Args:
        cfg (AlgorithmConfig): numbers of updates and batch sizes.
        networks (Networks): the networks to train.
        losses (Losses): the objectives of ``networks``.
        optimizers (dict of NetworkOptimizer): one per trained network; a network without one gets no updates.
        samples (Samples): source of slices and start states; an algorithm with ``simulates`` takes another type.
        updates (Updates): carries out single updates.

    Keyword Args:
        reward_scale (RewardScale, optional): scales rewards before the model sees them. Defaults to ``None``.
        first_model_updates (int, optional): model updates of the first epoch that has any. Defaults to ``None``:
            ``cfg.model_updates``.
        stored (bool): whether all data exist from the start; else epochs make no updates until ``cfg.random_steps``
            transitions and a whole slice are collected. Defaults to ``False``.
        between (callable, optional): called before each update; if it raises, the next call of :meth:`epoch` continues
            from there. Defaults to ``None``.
        phase (callable, optional): ``phase(name, total, done)`` returns a context manager around the updates of one
            kind, for a progress display; it yields a function to call after each update. Defaults to ``None``.

    Attributes:
        work (EpochWork, optional): remaining work of the epoch in progress.
        started (bool): whether the first updates have been made.
    """

    work_type: ClassVar[type[EpochWork]] = EpochWork

    # Declarations. Packaged classes write them as literals: pwm_torchrl/algorithm/declarations.py reads their source.

    #: Whether the updates step a differentiable environment; then there is no collection and no world model.
    simulates: ClassVar[bool] = False
    #: Keys of :class:`~pwm_torchrl.config.AlgorithmConfig` that it does not use; one on a command line is refused.
    ignored: ClassVar[tuple[str, ...]] = ()
    #: Further ones that it does not use with ``mode=online``.
    ignored_online: ClassVar[tuple[str, ...]] = ()
    #: Smallest values that it accepts, by key, if they are larger than those of ``AlgorithmConfig``.
    least: ClassVar[Mapping[str, float]] = {}

    # Class methods that describe the algorithm ------------------------------------------------------------------------

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """The updates of an epoch in order, for a run of any mode; they name the networks that the run trains."""
        raise NotImplementedError

    @classmethod
    def build_networks(cls, cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
        """The networks, trained or not, on ``device``."""
        return build_networks(cfg, facts, device)

    @classmethod
    def build_losses(cls, cfg: Config, facts: EnvFacts, networks: Networks) -> Losses:
        """The losses of the networks that exist; they share the networks' parameters."""
        return build_losses(cfg, networks)

    @classmethod
    @torch.no_grad()
    def starts_like(cls, cfg: Config, facts: EnvFacts, networks: Networks, count: int) -> Tensor:
        """Placeholder start latents ``[count, D]`` of an actor update, to predict its memory."""
        return networks.model.encode(torch.zeros(count, facts.observation_dim))

    @classmethod
    def critic_input(cls, cfg: Config, facts: EnvFacts, latent: Tensor) -> Tensor:
        """Input of the critics for latents ``[S, D]``."""
        return latent

    # An instance ------------------------------------------------------------------------------------------------------

    def __init__(
        self,
        cfg: AlgorithmConfig,
        networks: Networks,
        losses: Losses,
        optimizers: Mapping[str, NetworkOptimizer],
        samples: Any,
        updates: Updates,
        *,
        reward_scale: RewardScale | None = None,
        first_model_updates: int | None = None,
        stored: bool = False,
        between: Callable[[], None] | None = None,
        phase: Phase | None = None,
    ) -> None:
        self.cfg, self.networks, self.losses, self.optimizers = cfg, networks, losses, optimizers
        self.samples, self.updates, self.reward_scale = samples, updates, reward_scale
        self.first_model_updates = cfg.model_updates if first_model_updates is None else first_model_updates
        self.stored = stored
        self.between = between or (lambda: None)
        self.phase = phase or _no_phase
        self.work: Any = None
        self.started = False

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """One epoch's updates.

        Args:
            batch (TensorDictBase): the transitions just collected, ``[N, T]``; ``samples`` already holds them.
            progress (float): fraction of the training that is done, from 0 to 1, for the learning rates.

        Returns:
            MetricRow: means over the epoch; without update metrics until enough data are collected.
        """
        raise NotImplementedError

    def set_rates(self, progress: float, row: MetricRow) -> None:
        """Set the learning rates for ``progress``, and log them in ``row``."""
        for name, optimizer in self.optimizers.items():
            row.set({f"lr/{name}": optimizer.set_progress(progress)})

    def update_model(self, row: MetricRow) -> None:
        """One model update on replayed slices: L = (L_dyn + L_rew) / H over z_{t+1} = d(z_t, a_t), z_0 = h(o_0)."""
        count = self.cfg.model_batch
        losses, valid, norm = self.updates.model(lambda: self.sample_slices(count), count)
        row.mean({"loss/model": torch.stack(list(losses.values())).sum()})
        row.mean({key.replace("loss_", "loss/model_"): value for key, value in losses.items()})
        row.mean({"grad_norm/model": norm, "data/valid_fraction": valid})

    # Inputs of the updates --------------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether enough data are collected for updates."""
        enough = self.samples.collected >= self.cfg.random_steps and self.samples.can_sample
        return self.stored or enough

    def sample_slices(self, count: int) -> TensorDictBase:
        """Replayed slices ``[count, T]``, rewards scaled."""
        return self.scaled(self.samples.sample_slices(count))

    def scaled(self, slices: TensorDictBase) -> TensorDictBase:
        """Scale the rewards of ``slices`` in place, and return them."""
        if self.reward_scale is not None:
            slices["next", "reward"] = self.reward_scale(slices["next", "reward"])
        return slices

    @torch.no_grad()
    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """Observations ``[actor_batch, O]`` to imagine from, sampled from the replay or from this epoch's batch."""
        count = self.cfg.actor_batch
        if self.cfg.actor_starts == "replay":
            return self.samples.sample_observations(count)
        current = batch.get("observation").flatten(0, 1)
        rows = torch.randperm(len(current), device=current.device)[:count]
        return to_device(current[rows], self.samples.device)

    def sample_starts(self, count: int) -> Tensor:
        """Observations ``[count, O]`` to imagine from, for gradient diagnostics."""
        return self.samples.sample_observations(count)

    def encode(self, observation: Tensor) -> TensorDictBase:
        """Start latents ``[B]``, without gradient."""
        with torch.no_grad():
            latent = self.networks.model.encode(observation)
        return TensorDict(latent=latent, batch_size=latent.shape[:1])

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Reduced micro-batches and unfinished work; checkpoints save networks and optimizers separately."""
        return {
            "started": self.started,
            "updates": self.updates.state_dict(),
            "work": None if self.work is None else self.work.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.started = bool(state_dict["started"])
        self.updates.load_state_dict(state_dict["updates"])
        work = state_dict["work"]
        self.work = None if work is None else self.work_type.restored(work, self.samples.device)


# Finding and building a run's algorithm -------------------------------------------------------------------------------


def find_algorithm(name: str) -> type[Algorithm]:
    """The algorithm class of a name.

    Args:
        name (str): ``algorithm.name``: one of :data:`~pwm_torchrl.config.ALGORITHMS`, or the dotted path of a subclass
            of :class:`Algorithm`.

    Raises:
        ConfigurationError: if it is neither.
    """
    path = ALGORITHMS.get(name, name)
    found = locate("algorithm.name", path)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigurationError(
            f"algorithm.name={name} is a {type(found).__name__} and not a subclass of "
            "pwm_torchrl.algorithm.base.Algorithm"
        )
    return found


def updates_of(cfg: Config) -> dict[str, Update]:
    """The updates of an epoch, by the names of the networks that they train.

    Raises:
        ConfigurationError: for settings that the algorithm does not accept.
    """
    algorithm = find_algorithm(cfg.algorithm.name)
    check_least(cfg.algorithm, algorithm.least)
    return {update.name: update for update in algorithm.updates_of(cfg)}


@dataclass
class Parts:
    """Networks, losses and optimizers of a run."""

    networks: Networks
    losses: Losses
    optimizers: dict[str, NetworkOptimizer]


def build_parts(cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Parts:
    """Networks, losses and optimizers of a run of any algorithm and mode."""
    algorithm = find_algorithm(cfg.algorithm.name)
    networks = algorithm.build_networks(cfg, facts, device)
    return Parts(networks, algorithm.build_losses(cfg, facts, networks), build_optimizers(cfg, networks))
