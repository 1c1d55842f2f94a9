"""How near is the predicted memory of a run to what it takes? Real runs, one process each.

    python benchmarks/memory_accuracy.py

Each row is a run of two epochs on HalfCheetah-v5 through the training loop: its plan's prediction, and the growth of
the process's resident memory above what it held when the plan was made (on a GPU, the peak allocated). A prediction is
within tolerance if it differs by no more than 10 % of what was measured or 64 MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

MIB = 2**20
#: Runs are cut to what shows their peak; replay is as large as what these epochs fill.
SHORT = [
    "env=halfcheetah",
    "env.num_envs=8",
    "training.epochs=2",
    "training.replay_capacity=256",
    "training.eval_episodes=1",
    "training.eval_every=0",
    "training.video=false",
    "training.progress=false",
    "training.threads=1",
    "algorithm.random_steps=0",
    "algorithm.first_model_updates=2",
    "algorithm.model_updates=2",
    "algorithm.actor_updates=1",
    "algorithm=pwm_paper",
    "algorithm.critic_passes=1",
]
RECOMPUTE = "model.dynamics.checkpoint_substeps=true"
CONFIGS = [
    ["model=mlp", "size=tiny"],
    ["model=flow_v2", "size=tiny"],
    ["model=flow_v3", "size=tiny", "algorithm.model_batch=512"],
    ["model=flow_v2", "size=tiny", "algorithm.model_batch=1024", RECOMPUTE],
    ["model=residual", "size=tiny", "algorithm.model_batch=1024", "algorithm.actor_batch=512"],
    ["model=mlp", "size=5m"],
    ["model=residual", "size=5m", "algorithm.model_batch=512"],
    ["model=flow_v1", "size=5m"],
    ["model=flow_v2", "size=5m"],
    ["model=flow_v2", "size=5m", RECOMPUTE],
    ["model=flow_v2", "size=5m", "algorithm.model_batch=512", "memory.model_micro_batch=128"],
    ["model=flow_v3", "size=5m", RECOMPUTE, "algorithm.model_batch=512"],
    ["model=flow_v3", "size=5m", "memory.model_micro_batch=64", "memory.actor_micro_batch=32"],
    ["model=mlp", "size=5m", "model.reward_head=two_hot", "algorithm.model_batch=1024"],
]
QUICK = [CONFIGS[0], CONFIGS[3]]
LARGE = ["model=flow_v2", "size=48m", "algorithm.model_updates=1", "algorithm.first_model_updates=1"]


def measure(words: list[str], device: str) -> dict[str, Any]:
    """Run one configuration in a process of its own; returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        # What is not written is planned; the budget is that of a 24 GB machine or GPU for every row alike.
        command = [
            *SHORT,
            *words,
            f"device={device}",
            f"run_dir={run_dir}",
            "memory.host_gib=24",
            *(["memory.device_gib=24"] if device != "cpu" else []),
        ]
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "train.py"), *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
        plan = json.loads((run_dir / "memory_plan.json").read_text(encoding="utf-8"))
    place = plan["prediction"]["compute"]
    totals = plan["prediction"]["totals"]
    predicted = totals["device"] if place == "device" else totals["host"] - plan["prediction"]["base"]
    measured = plan["measured"][place]
    error = predicted - measured
    return {
        "config": " ".join(words),
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": error / measured,
        "error_bytes": error,
        "within": abs(error) <= max(0.1 * measured, 64 * MIB),
        "choices": plan["choices"],
    }


def main() -> int:
    """Run the grid and write the table; exit code 1 if a prediction is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small configurations")
    parser.add_argument("--skip-large", action="store_true", help="leave out 48m V2 at batch 1024 (about 9 GiB)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    import torch

    configs = QUICK if args.quick else CONFIGS if args.skip_large else [*CONFIGS, LARGE]
    rows = []
    print(f"{'configuration':<82} {'predicted':>11} {'measured':>11} {'error':>8}")
    for words in configs:
        row = measure(words, args.device)
        rows.append(row)
        print(
            f"{row['config']:<82} {row['predicted_bytes'] / MIB:>7.0f} MiB {row['measured_bytes'] / MIB:>7.0f} MiB "
            f"{row['error']:>+8.1%}{'' if row['within'] else '  OUT OF TOLERANCE'}",
            flush=True,
        )
        content = {"date": date.today().isoformat(), "torch": torch.__version__, "device": args.device, "rows": rows}
        if args.json is not None:  # after every row: a run that is cut short has shown something
            args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
