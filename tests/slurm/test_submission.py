"""Runs on a real Slurm: submitted, queued as arrays, refused."""

from __future__ import annotations

import pytest
from run_cases import Place, events, summary


@pytest.fixture
def place(on_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, on_cluster)


def test_submit_and_result(place):
    run_dir, job = place.submit()
    place.wait_for(run_dir, "finished")
    place.cluster.wait_state(job, {"COMPLETED"})
    assert summary(run_dir)["epochs_done"] == 12
    assert [event["job_id"] for event in events(run_dir, "submit")] == [job]
