"""What the launcher keeps of a run beside its training: the job it asked for, and the restarts that happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.deaths import Restart
from pwm_torchrl.data.files import write_durably
from pwm_torchrl.training.events import EVENTS_FILE, write_event

JOB_FILE = "job.json"


def read_job(run_dir: Path) -> dict[str, Any]:
    """What was asked for; empty for a run that was never submitted."""
    try:
        content = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_job(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Change what was asked for; returns all of it."""
    content = {**read_job(run_dir), **changes}
    write_durably(run_dir / JOB_FILE, json.dumps(content, indent=2) + "\n")
    return content


def note_submission(run_dir: Path, job_id: str, **request: Any) -> None:
    """A job for this run is queued."""
    jobs = [*read_job(run_dir).get("job_ids", []), job_id]
    write_job(run_dir, job_ids=jobs, **request)
    asked = {key: value for key, value in request.items() if key != "code"}
    write_event(run_dir, "submit", job_id=job_id, **asked)


def note_restart(run_dir: Path, attempt: int, restart: Restart, action: str, detail: str, job_id: str | None) -> None:
    """An attempt died and its run comes back."""
    write_event(
        run_dir,
        "restart",
        reason=restart.reason,
        progressed=restart.progressed,
        attempt=attempt,
        answer=action,
        detail=detail,
        job_id=job_id,
    )


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, oldest first; a line that was torn by a full disk is passed over."""
    try:
        lines = (run_dir / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == kind:
            found.append(event)
    return found


def restarts_of(run_dir: Path) -> list[Restart]:
    """Restarts that happened, oldest first."""
    return [Restart(each["reason"], bool(each.get("progressed"))) for each in events_of(run_dir, "restart")]
