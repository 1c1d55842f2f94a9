"""Checks of chunk files: their errors, no execution of code, constant memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from episode_cases import NAMES, chunk, tasks

import pwm_torchrl
from pwm_torchrl.data.episodes import import_chunks
from pwm_torchrl.data.episodes.sources import ChunkFile
from pwm_torchrl.data.episodes.store import BadEpisodes

ROOT = Path(pwm_torchrl.__file__).parent.parent


def read(path):
    file = ChunkFile(path)
    file.check(tasks())
    file.digest(lambda count: None)
    return list(file.blocks(tasks()))


def changed(key, index, value):
    def change(content):
        content[key][index] = value

    return change


def converted(key, how):
    def change(content):
        content.set(key, how(content[key]))

    return change


WRONG = {
    "missing": (lambda content: content.pop("reward"), "reward;.* obs, action, task"),
    "dtype": (converted("obs", torch.Tensor.double), "obs is torch.float64 .*torch.float32"),
    "float task": (converted("task", torch.Tensor.float), "task is torch.float32"),
    "wide": (
        converted("obs", lambda x: torch.cat([x, x], -1)),
        "obs has 16 columns.* has 8",
    ),
    "narrow action": (converted("action", lambda x: x[..., :1]), "action has 1 columns"),
    "flat": (converted("obs", lambda x: x[..., 0]), r"obs has shape \[4, 6\]"),
    "task shape": (converted("task", lambda x: x.unsqueeze(-1)), r"task has shape \[4, 6, 1\]"),
    "index": (changed("task", 2, 3), "episode 2: task index 3 .*0 to 2"),
    "negative": (changed("task", 2, -1), "episode 2: task index -1"),
    "two tasks": (changed("task", (1, 3), 0), "episode 1 has more than one task index"),
    "nan": (changed("obs", (1, 0, 2), torch.nan), "episode 1: observation is not finite at index 0"),
    "nan action": (changed("action", (2, 4, 0), torch.nan), "episode 2: action is not finite at index 4"),
    "infinite": (changed("reward", (3, 5), torch.inf), "episode 3: reward is not finite at index 5"),
    "large": (changed("action", (0, 5, 0), -1.01), "episode 0: action of size 1.01 at index 5"),
    "first": (changed("reward", (1, 0), 0.5), "episode 1: reward at index 0.*shifted by one"),
    "first action": (changed("action", (1, 0), 0.5), "episode 1: action at index 0.*shifted by one"),
    "padding": (
        changed("obs", (0, 3, 4), 0.1),
        "episode 0: labelled task 'pendulum-swingup'.*observations use 5 dimensions.* 3:",
    ),
    "action padding": (changed("action", (1, 3, 1), 0.1), "episode 1: .* its actions use 2 dimensions"),
    "label too narrow": (changed("task", 2, 1), "episode 2: labelled task 'cartpole-swingup'.*use 8 .* 5:"),
    "label too wide": (changed("task", 0, 2), "episode 0: labelled task 'cup-catch'.*use 3 .* 8:"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_chunks(tmp_path, name):
    change, message = WRONG[name]
    content = chunk(4, 6, [0, 1, 2, 0])
    change(content)
    torch.save(content.to_dict() if "shape" in name or name == "flat" else content, tmp_path / "chunk.pt")
    with pytest.raises(BadEpisodes, match=message):
        read(tmp_path / "chunk.pt")


def test_a_constant_feature_is_not_a_wrong_label(tmp_path):
    """The last of eight features is always zero, like an untouched touch sensor; and all actions are zero."""
    content = chunk(1, 6, [2])
    content["obs"][..., 7] = 0
    content["action"][:, 1:] = 0
    torch.save(content, tmp_path / "chunk.pt")
    assert len(read(tmp_path / "chunk.pt")) == 1


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_cut_short(tmp_path, kept):
    torch.save(chunk(40, 60, [0] * 40), tmp_path / "chunk.pt")
    content = (tmp_path / "chunk.pt").read_bytes()
    (tmp_path / "chunk.pt").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(BadEpisodes, match=r"\([\d,]+ bytes\)"):
        read(tmp_path / "chunk.pt")


def test_one_changed_bit_in_the_data(tmp_path):
    torch.save(chunk(40, 60, [0] * 40), tmp_path / "chunk.pt")
    content = bytearray((tmp_path / "chunk.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "chunk.pt").write_bytes(content)
    with pytest.raises(BadEpisodes, match=r"corrupt.*data/0"):
        read(tmp_path / "chunk.pt")


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(chunk(4, 6, [0, 1, 2, 0]), tmp_path / "chunk.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(read(tmp_path / "chunk.pt")[0].length) == 4


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("content", [Exploit(), {"obs": Exploit()}, [1, 2], torch.zeros(3)])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "chunk.pt")
    with pytest.raises(BadEpisodes, match="TensorDict"):
        read(tmp_path / "chunk.pt")
    assert not (tmp_path / "exploited").exists()


class OldTensorDict:
    """Pickled as by tensordict versions without a custom reduction."""

    def __init__(self, content):
        self._tensordict = dict(content)
        self._batch_size = torch.Size(content.batch_size)
        self._device = None
        self._is_locked = False


@pytest.mark.parametrize("module", ["tensordict.tensordict", "tensordict._td"])
def test_files_of_older_versions_are_read(tmp_path, monkeypatch, module):
    content = chunk(4, 6, [0, 1, 2, 0])
    kind = type("TensorDict", (OldTensorDict,), {"__module__": module})
    fake = ModuleType(module)
    fake.TensorDict = kind
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, fake)
        torch.save(kind(content), tmp_path / "chunk.pt")
    rows = read(tmp_path / "chunk.pt")[0]
    np.testing.assert_array_equal(rows.observation.reshape(4, 6, 8), content["obs"])


MEASURED = """
import json, sys
from pathlib import Path
import torch
from pwm_torchrl.data.episodes import import_chunks
from pwm_torchrl.envs.tasks import task_set

def kilobytes(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1])

tasks = task_set(sys.argv[3])
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
import_chunks(sys.argv[1], sys.argv[2], tasks)
print(json.dumps({"growth": 1024 * (kilobytes("VmHWM") - before)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_memory_does_not_grow_with_the_chunk(tmp_path):
    (tmp_path / "source").mkdir()
    pool = chunk(500, 501, [e % 3 for e in range(500)])
    content = torch.cat([pool] * 26)  # 13,000 episodes, 313 MB
    torch.save(content, tmp_path / "source" / "chunk_0.pt")
    size = (tmp_path / "source" / "chunk_0.pt").stat().st_size
    assert size > 280 << 20
    del content
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "source"), str(tmp_path / "store"), ",".join(NAMES)]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    print(found, size)
    assert found["growth"] <= 1.2 * size + 500e6  # what is promised
    assert found["growth"] <= size  # what tells apart one that reads the whole and copies


def test_progress_covers_the_file(tmp_path):
    torch.save(chunk(4, 6, [0, 1, 2, 0]), tmp_path / "chunk.pt")
    file, read_bytes = ChunkFile(tmp_path / "chunk.pt"), []
    file.digest(read_bytes.append)
    assert sum(read_bytes) == file.size
    assert import_chunks(tmp_path / "chunk.pt", tmp_path / "store", tasks()).num_episodes == 4
