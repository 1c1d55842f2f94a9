"""Sizes of stored transitions in RAM and on disk, computed from shapes and file sizes."""

from __future__ import annotations

from pathlib import Path

from pwm_torchrl.errors import ConfigurationError

# Replay buffer

#: Number of segments that the capacity is divided into, if each stays below LARGE_SEGMENT.
SEGMENTS = 16
#: Segments larger than this many bytes are divided further, ...
LARGE_SEGMENT = 64 << 20
#: ... up to this number of segments, because each one is an open file.
MOST_SEGMENTS = 64

_FLOAT, _BOOL = 4, 1

#: Transitions of the data that TD-MPC2 publishes.
PUBLISHED_TRANSITIONS = {"mt30": 345_000_000, "mt80": 545_000_000}


def record_bytes(observation_dim: int, action_dim: int) -> int:
    """Bytes of one transition: two observations, an action and a reward in float32, and two flags."""
    return _FLOAT * (2 * observation_dim + action_dim + 1) + _BOOL * 2


def segment_steps(capacity_steps: int, step_bytes: int) -> int:
    """Time steps per segment.

    Args:
        capacity_steps (int): capacity in time steps.
        step_bytes (int): bytes of one time step of all environments.
    """
    small = min(-(-capacity_steps // SEGMENTS), max(1, LARGE_SEGMENT // step_bytes))
    return max(small, -(-capacity_steps // MOST_SEGMENTS))


def replay_bytes(
    observation_dim: int, action_dim: int, capacity: int, num_envs: int, since_checkpoint_steps: int = 0
) -> int:
    """Bytes of the transitions in a replay buffer; in RAM or on the device, this is exactly what it allocates.

    Args:
        observation_dim (int): ``O``.
        action_dim (int): ``A``.
        capacity (int): transitions.
        num_envs (int): ``N``.
        since_checkpoint_steps (int): time steps kept in addition to the capacity, only on disk. Defaults to ``0``.
    """
    steps = capacity // num_envs + since_checkpoint_steps
    return steps * num_envs * record_bytes(observation_dim, action_dim)


def replay_disk_bytes(
    observation_dim: int, action_dim: int, capacity: int, num_envs: int, since_checkpoint_steps: int
) -> int:
    """Maximum bytes of a replay buffer's files on disk: :func:`replay_bytes` rounded up to whole segments.

    Args:
        observation_dim (int): ``O``.
        action_dim (int): ``A``.
        capacity (int): transitions.
        num_envs (int): ``N``.
        since_checkpoint_steps (int): maximum number of time steps written since the oldest checkpoint that can be
            resumed, see :func:`steps_since_checkpoint`; at least one batch.
    """
    step_bytes = num_envs * record_bytes(observation_dim, action_dim)
    return disk_bytes(capacity // num_envs, step_bytes, since_checkpoint_steps)


def disk_bytes(capacity_steps: int, step_bytes: int, since_checkpoint_steps: int, segment: int | None = None) -> int:
    """Maximum bytes of the segments that ``capacity_steps + since_checkpoint_steps`` consecutive steps lie in."""
    segment = segment or segment_steps(capacity_steps, step_bytes)
    steps = capacity_steps + since_checkpoint_steps
    # The worst case begins at the last step of a segment.
    return (1 + -(-(steps - 1) // segment)) * segment * step_bytes


def steps_since_checkpoint(epochs: int, steps_per_epoch: int, checkpoint_every: int, keep_checkpoints: int) -> int:
    """Maximum number of time steps written while the oldest checkpoint that can be resumed is kept.

    Args:
        epochs (int): epochs of the run.
        steps_per_epoch (int): agent steps per environment and epoch.
        checkpoint_every (int): epochs between checkpoints. 0 saves only at the end and after the best evaluation, so
            the whole run may lie between two checkpoints.
        keep_checkpoints (int): number of newest checkpoints kept.
    """
    kept = checkpoint_every * max(1, keep_checkpoints) or epochs
    return max(1, min(epochs, kept)) * steps_per_epoch


# Episode store

EPISODES_FILE = "episodes.npy"
#: Copies of the episode table in RAM: the table, its columns, and the cumulative sums for drawing start steps.
TABLE_COPIES = 4


def published_store_bytes(tasks: str | None, observation_dim: int, action_dim: int) -> int:
    """Bytes that TD-MPC2's data of a published set of tasks take as a store; 0 for other sets."""
    return PUBLISHED_TRANSITIONS.get(str(tasks), 0) * _FLOAT * (observation_dim + action_dim + 1)


def store_bytes(path: str | Path) -> tuple[int, int]:
    """Bytes of an episode store's files (which may be in the page cache) and of its index in RAM.

    Raises:
        ConfigurationError: if the path contains no store.
    """
    folder = Path(path).expanduser()
    table = folder / EPISODES_FILE
    if not table.is_file():
        raise ConfigurationError(f"data.path={path} contains no episodes: {EPISODES_FILE} is missing")
    files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return files, TABLE_COPIES * table.stat().st_size
