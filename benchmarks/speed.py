"""How fast are the updates and epochs of the package, and how near is that to what the machine's matrix products allow?

    python benchmarks/speed.py --quick                       tiny, and updates of mlp and flow_v2 at 5m; under 2 minutes
    python benchmarks/speed.py --json FILE                   every model at tiny and 5m
    python benchmarks/speed.py --against 8699799 --models flow_v2 --sizes tiny   this tree and that commit in turn

Every row is measured in a process of its own, one thread unless OMP_NUM_THREADS says otherwise. A row's *floor* is the
number of floating-point operations in its matrix products over the rate of such a product measured in the same process;
*plain* is a plain eager implementation (``plain_pwm.py``), called in turn with ours in the same process; epochs are
whole epochs of real runs on HalfCheetah-v5, collection, sampling and logging included. The columns are medians, and
the spread is half the distance of the quartiles relative to the median. Other processes make a machine slower and less
even: the load is noted, and ratios are the figures to quote.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("mlp", "residual", "flow_v1", "flow_v2", "flow_v3", "few_step")
SIZES = ("tiny", "5m", "48m")
PRECISIONS = ("fp32", "tf32", "bf16")
UPDATES = ("model update", "actor update", "critic updates")
EPOCH = "epoch"

#: What a run is that is timed: its epochs all have the same updates, and nothing else happens.
RUN = [
    "env=halfcheetah",
    "env.num_envs=16",
    "algorithm.random_steps=0",
    "algorithm.first_model_updates=8",
    "training.eval_every=0",
    "training.eval_episodes=1",
    "training.checkpoint_every=0",
    "training.gradient_profile_every=0",
    "training.video=false",
    "training.progress=false",
    "training.threads=1",
]
#: Epochs of a timed run; the first is left out.
EPOCHS = {"tiny": 13, "5m": 3, "48m": 2}


class Tree:
    """A checkout of the package that is measured.

    Args:
        root (Path): its root.
        name (str): for the table.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run Python with this tree's package, one thread unless the environment says otherwise."""
        path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)

    def lines(self, words: list[str]) -> dict[str, Any] | None:
        """What ``speed_lines.py`` measures; ``None`` where this tree cannot."""
        done = self.call([str(ROOT / "benchmarks" / "speed_lines.py"), *words])
        if done.returncode:
            print(f"{self.name}: {' '.join(words)}: {last_line(done.stderr)}", file=sys.stderr)
            return None
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def epochs(self, model: str, size: str, words: list[str]) -> list[float] | None:
        """Seconds of each epoch of a run but the first; ``None`` where this tree cannot."""
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            run = [f"model={model}", f"size={size}", *RUN, *words, f"training.epochs={EPOCHS[size]}"]
            done = self.call([str(self.root / "launch" / "train.py"), *run, f"run_dir={run_dir}"])
            if done.returncode:
                print(f"{self.name}: {' '.join(run)}: {last_line(done.stderr + done.stdout)}", file=sys.stderr)
                return None
            with open(run_dir / "metrics.csv", encoding="utf-8") as file:
                return [float(row["time/epoch_s"]) for row in csv.DictReader(file)][1:]


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


@contextmanager
def trees(commit: str | None) -> Iterator[list[Tree]]:
    """This tree and, in a worktree that is removed afterwards, another commit's."""
    here = Tree(ROOT, "this tree")
    if commit is None:
        yield [here]
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(other), commit], check=True)
        try:
            yield [here, Tree(other, commit)]
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)


def spread(times: list[float]) -> float:
    """Half the distance of the quartiles relative to the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / median(times)


def measure(args: argparse.Namespace, model: str, size: str, compared: list[Tree]) -> list[dict[str, Any]]:
    """Rows of one model at one size: each tree in turn, ``--rounds`` times."""
    lines = args.lines or ("" if len(compared) == 1 else ",".join((*UPDATES, "imagination")))
    if args.quick and size != "tiny":
        lines = "model update,actor update"
    words = ["--model", model, "--size", size, "--device", args.device, "--precision", args.precision]
    words += ["--seconds", str(args.seconds), "--least", "2" if size == "48m" else "3", "--lines", lines]
    words += ["--compile"] * args.compile + ["--no-plain"] * (size == "48m" or len(compared) > 1)
    found: dict[str, dict[str, Any]] = {}
    load: list[float] = []
    for _ in range(args.rounds):
        for index, tree in enumerate(compared):
            result = tree.lines(words)
            if result is not None:
                load += result["load"]
                for line, values in result["lines"].items():
                    if values is not None:
                        collect(found.setdefault(line, {}), values, index)
            if args.epochs and model != "few_step" and not (args.quick and size != "tiny"):
                seconds = tree.epochs(model, size, run_words(args))
                if seconds is not None:
                    collect(found.setdefault(EPOCH, {}), {"ours": seconds}, index)
    facts = {"model": model, "size": size, "precision": args.precision, "compile": args.compile, "device": args.device}
    return [{**facts, "line": line, "load": max(load, default=0.0), **summary(row)} for line, row in found.items()]


def run_words(args: argparse.Namespace) -> list[str]:
    """Words of a timed run that the package knows only by now."""
    words = [f"algorithm.compile={str(args.compile).lower()}", f"device={args.device}"]
    return words + ([] if args.precision == "fp32" else [f"training.precision={args.precision}"])


def collect(row: dict[str, Any], values: dict[str, Any], index: int) -> None:
    """Add a process's times to a row; floors are those of the first tree."""
    row.setdefault("ours" if index == 0 else "other", []).extend(values["ours"])
    if index == 0:
        row.setdefault("plain", []).extend(values.get("plain", []))
        row.update({key: values[key] for key in ("floor", "operations", "rate", "first") if key in values})


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads and ratios."""
    out: dict[str, Any] = {key: row.get(key) for key in ("floor", "operations", "rate", "first")}
    for key in ("ours", "plain", "other"):
        times = row.get(key) or []
        out[key] = median(times) if times else None
        out[f"{key}_spread"] = spread(times) if times else None
        out[f"{key}_runs"] = len(times)
    return out


def table(rows: list[dict[str, Any]], other: str | None) -> str:
    """The rows as Markdown."""

    def seconds(value: float | None) -> str:
        return "" if not value else f"{value:.3f}" if value >= 1 else f"{1000 * value:.2f} ms"

    def times(numerator: float | None, denominator: float | None) -> str:
        return f"{numerator / denominator:.2f}" if numerator and denominator else ""

    head = ["model", "size", "line", "ours", "spread", "floor", "ours / floor", "plain", "plain / ours"]
    if other:
        head += [other, f"{other} / ours"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["model"], r["size"], r["line"], seconds(r["ours"]), f"{100 * (r['ours_spread'] or 0):.0f} %"]
        cells += [seconds(r["floor"]), times(r["ours"], r["floor"]), seconds(r["plain"]), times(r["plain"], r["ours"])]
        if other:
            cells += [seconds(r["other"]), times(r["other"], r["ours"])]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def cpu_name() -> str:
    """The processor's name, and the extensions for products of bfloat16 that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = dict(line.split(":", 1) for line in text.splitlines()[::-1] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in found.items()}
    flags = fields.get("flags", "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.processor())} ({', '.join(bf16) or 'no bfloat16 instructions'})"


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions and settings."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny flow_v2, and updates of mlp and flow_v2 at 5m")
    parser.add_argument("--models", default=",".join(MODELS), help="names separated by commas")
    parser.add_argument("--sizes", default="tiny,5m", help="tiny, 5m, 48m, separated by commas")
    parser.add_argument("--lines", default="", help="names separated by commas; default: all")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--compile", action="store_true", help="algorithm.compile=true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", metavar="COMMIT", help="also time another commit, alternating with this one")
    parser.add_argument("--rounds", type=int, default=1, help="processes per tree and row")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per line, at least three repetitions")
    parser.add_argument("--epochs", action="store_true", help="time whole epochs of real runs, too")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    args = parser.parse_args()
    pairs = [(model, size) for size in args.sizes.split(",") for model in args.models.split(",")]
    if args.quick:
        args.seconds = min(args.seconds, 1.0)
        pairs = [("flow_v2", "tiny"), ("mlp", "5m"), ("flow_v2", "5m")]
    for model, size in pairs:
        if model not in MODELS or size not in SIZES:
            parser.error(f"{model} at {size}: models are {', '.join(MODELS)}; sizes are {', '.join(SIZES)}.")
    about = facts(args)
    rows: list[dict[str, Any]] = []
    with trees(args.against) as compared:
        for model, size in pairs:
            rows += measure(args, model, size, compared)
            print(f"measured {model} at {size}", file=sys.stderr)
    about["load_after"] = os.getloadavg()
    print(", ".join(f"{name}: {value}" for name, value in about.items() if value is not None))
    print()
    print(table(rows, args.against))
    if args.json:
        args.json.write_text(json.dumps({"facts": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    measured = {(row["model"], row["size"]) for row in rows if row["ours"] is not None}
    missing = [f"{model} at {size}" for model, size in pairs if (model, size) not in measured]
    if missing:
        sys.exit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
