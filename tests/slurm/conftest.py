"""A real Slurm cluster for the tests of this folder: started once per worker, empty for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # sub-folders of tests import the helpers here too
from run_cases import Place
from throwaway import Cluster, reason_to_skip, running_cluster

_FOLDER = Path(__file__).parent
_RUNNING: list[Cluster] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a cluster, and there is one per worker: keep it busy instead of starting another."""
    for item in items:
        if item.path.is_relative_to(_FOLDER):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))
            # Real daemons keep deadlines of their own, which a machine that does other things may miss: a test that
            # fails has a second try, which the summary shows.
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows what the daemons said when a test failed."""
    report = yield
    if report.failed and _RUNNING and "cluster" in getattr(item, "fixturenames", ()):
        report.sections.append(("Slurm", _RUNNING[0].logs()))
    return report


@pytest.fixture(scope="session")
def _one_cluster() -> Iterator[Cluster]:
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    # Before any test points this process at the cluster: whatever carries its address is killed with it at the end.
    resource_tracker.ensure_running()
    with running_cluster() as cluster:
        _RUNNING.append(cluster)
        yield cluster
        _RUNNING.clear()


@pytest.fixture
def cluster(_one_cluster: Cluster) -> Iterator[Cluster]:
    """An empty cluster whose nodes are up; :attr:`Cluster.env` leads to it."""
    yield _one_cluster
    _one_cluster.cancel_all()


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, which this process then talks to as well, as on a login node."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH_")):
            monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    return cluster


@pytest.fixture
def place(on_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A folder of a user's own with code and runs, from which this process submits; their module is forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("pole", None)
    yield Place(tmp_path, on_cluster)
    sys.modules.pop("pole", None)
