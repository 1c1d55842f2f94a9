"""The tutorial's notebook: its code runs in order, in a process of its own, and none of its output is committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
#: What makes it short: a line of the notebook, and what stands in its place.
SHORTENED = {
    "epochs = 48": "epochs = 2",
    "settings = [": "settings = [\"algorithm.random_steps=100\", \"algorithm.first_model_updates=2\", "
    "\"algorithm.max_updates=2\", \"training.eval_every=1\", \"training.eval_episodes=2\", ",
}  # fmt: skip
#: Runs after the cells, and sees their names.
CHECKS = """
assert summary["status"] == "finished" and summary["epochs_done"] == epochs
assert real.shape == (4, 200) and real["action"].abs().max() <= 2
assert happened.shape == along_real_actions.shape == dreamed.reward.shape == (horizon, 4, 1)
assert torch.isfinite(along_real_actions).all() and torch.isfinite(dreamed.reward).all()
# The same steps by the model's parts, from the first observation alone.
with torch.no_grad():
    z = networks.model.encode(real["observation"][:, 0])
    for t in range(horizon):
        z, reward, _ = networks.model(z, real["action"][:, t] / 2)
        torch.testing.assert_close(along_real_actions[t], reward)
assert along_real_actions.std(0).min() > 0
# Both begin in the same latent, with the action that the policy takes there.
torch.testing.assert_close(dreamed.reward[0], along_real_actions[0])
assert all(axis.has_data() for axis in (left, right, *axes))
assert len(left.lines[0].get_xdata()) == epochs and len(axes[0].lines[0].get_xdata()) == horizon
"""


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_its_code_runs_from_top_to_bottom(tmp_path):
    code = "\n\n".join(cells("code"))
    for line, short in SHORTENED.items():
        assert code.count(line) == 1
        code = code.replace(line, short)
    script = tmp_path / "notebook.py"
    script.write_text(code + CHECKS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONWARNINGS": ""}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "notebook" / "summary.json").is_file()


def test_no_output_is_committed():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_is_found_from_the_tutorial_and_the_readme():
    assert "](../examples/tutorial.ipynb)" in (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert "](examples/tutorial.ipynb)" in (ROOT / "README.md").read_text(encoding="utf-8")
