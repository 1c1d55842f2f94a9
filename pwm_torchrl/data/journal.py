"""What a folder of segments holds, and whose data: the small JSON file beside them."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pwm_torchrl.data.files import storage_faults, write_durably
from pwm_torchrl.data.layout import RecordLayout
from pwm_torchrl.errors import StorageFault

#: Raised when the files' layout changes.
SCHEMA_VERSION = 1
_NAME = "replay.json"


@dataclass(frozen=True)
class Journal:
    """The description of a folder of segments.

    Nothing is overwritten while a run goes on; only one that is resumed from an earlier checkpoint writes again what
    came after it, and one that starts anew writes everything again. Each of these is a *writer* with a name of its own
    and the step that it began at, so that a checkpoint is never combined with the data of another.

    Attributes:
        layout: of a record.
        num_envs: N.
        segment_steps: time steps of a file; the records in it lie as ``[env, step]``.
        writers: (name, first step), oldest first.
    """

    layout: RecordLayout
    num_envs: int
    segment_steps: int
    writers: tuple[tuple[str, int], ...] = ()

    @property
    def step_bytes(self) -> int:
        """Bytes of one time step of all environments."""
        return self.num_envs * self.layout.record_bytes

    @property
    def segment_bytes(self) -> int:
        """Bytes of a file."""
        return self.segment_steps * self.step_bytes

    def begun(self, step: int) -> tuple[Journal, str]:
        """This journal with one more writer, and the writer's name."""
        name = uuid.uuid4().hex
        return replace(self, writers=(*self.writers, (name, step))), name

    def written_over(self, name: str, steps: int) -> str | None:
        """How the first ``steps`` of a writer were lost, if they were; the end of a sentence."""
        names = [writer for writer, _ in self.writers]
        if name not in names:
            return "they are another run's"
        later = [first for _, first in self.writers[names.index(name) + 1 :]]
        if later and min(later) < steps:
            return f"they were written again from step {min(later)} on"
        return None

    def save(self, folder: Path) -> None:
        """Write it into a folder.

        Raises:
            StorageFault: if it cannot be written.
        """
        content = {
            "schema_version": SCHEMA_VERSION,
            "num_envs": self.num_envs,
            "segment_steps": self.segment_steps,
            "record_bytes": self.layout.record_bytes,
            "record": self.layout.describe(),
            "segment": "[env, step, record]",
            "writers": [{"name": name, "first_step": step} for name, step in self.writers],
        }
        path = folder / _NAME
        with storage_faults(path, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """Read it; ``None`` if there is none.

        Raises:
            StorageFault: if it cannot be read or is of another version.
        """
        path = folder / _NAME
        if not path.exists():
            return None
        with storage_faults(path, "read"):
            text = path.read_text(encoding="utf-8")
        try:
            content: dict[str, Any] = json.loads(text)
            if content["schema_version"] == SCHEMA_VERSION:
                writers = tuple((entry["name"], int(entry["first_step"])) for entry in content["writers"])
                layout = RecordLayout.described(content["record"])
                return cls(layout, int(content["num_envs"]), int(content["segment_steps"]), writers)
        except (ValueError, KeyError, TypeError) as error:
            raise StorageFault(f"{path} is damaged ({type(error).__name__}: {error}); {_REMEDY}.") from error
        version = content["schema_version"]
        raise StorageFault(
            f"{path} has schema version {version} and this release of pwm_torchrl reads version {SCHEMA_VERSION}; "
            f"{_REMEDY}."
        )


_REMEDY = "put it back, or delete the folder and start the run again without resume"
