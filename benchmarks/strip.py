"""A strip of pictures of trained policies, a row for each run: one deterministic episode, with its return so far.

    python benchmarks/strip.py runs/pendulum runs/cartpole --out docs/_static/strip.png

The episode is the first of those that ``launch/evaluate.py`` plays; no other was looked at. Most of what there is to
see happens early, so the pictures lie closer together there. Each row shows the part of the picture that moves.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

import numpy as np
import torch

import pwm_torchrl
from pwm_torchrl.envs import env_info, render_frame
from pwm_torchrl.run.directory import load_config

#: Pictures of a row; in pixels their side, what is left between them, and the heights of the two lines above them.
PICTURES, PICTURE, GAP, LINES = 5, 200, 3, (48, 32)
#: Share of the moving part that is left around it.
MARGIN = 0.15


@dataclass(frozen=True)
class Episode:
    """A filmed episode."""

    title: str
    frames: np.ndarray  # uint8 [T, height, width, 3]
    returns: np.ndarray  # [T], the sum of rewards up to each frame
    total: float


def film(run: Path) -> Episode:
    """One deterministic episode of a run's best policy."""
    policy, env = pwm_torchrl.load_policy(run), pwm_torchrl.load_env(run, render=True)
    state, total = env.reset(), 0.0
    frames, returns = [], []
    with torch.no_grad():
        for _ in range(env_info(env).episode_length or 10_000):
            frames.append(render_frame(env))
            returns.append(total)
            state, following = env.step_and_maybe_reset(policy(state))
            total += state["next", "reward"].sum().item()
            if state["next", "done"].any():
                break
            state = following
    env.close()
    env_cfg = load_config(run).env
    title = str(env_cfg.get("id") or env_cfg["name"]).replace("_", "-")
    return Episode(title, np.stack(frames), np.array(returns), total)


def moving_part(frames: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the square in which something changes."""
    height, width = frames.shape[1:3]
    changes = (np.ptp(frames[:: max(1, len(frames) // 50)].astype(np.int16), axis=0) > 40).any(-1)
    rows, columns = np.flatnonzero(changes.any(1)), np.flatnonzero(changes.any(0))
    if not len(rows):
        return slice(0, height), slice(0, width)
    side = min(round(max(np.ptp(rows), np.ptp(columns)) * (1 + 2 * MARGIN)), height, width)
    return _span(rows, side, height), _span(columns, side, width)


def _span(where: np.ndarray, size: int, limit: int) -> slice:
    first = min(max(round((where[0] + where[-1] - size) / 2), 0), limit - size)
    return slice(first, first + size)


def draw(episodes: list[Episode], out: Path) -> None:
    """Write the strip."""
    from matplotlib.figure import Figure

    row = PICTURE + sum(LINES)
    width, height = PICTURES * PICTURE, row * len(episodes)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    def text(x: int, y: int, words: str, **style: object) -> None:
        figure.text(x / width, 1 - y / height, words, va="bottom", **style)

    for i, episode in enumerate(episodes):
        rows, columns = moving_part(episode.frames)
        last = len(episode.frames) - 1
        top = i * row
        text(GAP, top + LINES[0], f"{episode.title}: return {minus(episode.total)}", size=20, weight="bold")
        top += sum(LINES)
        for k in range(PICTURES):
            step = round(last * (k / (PICTURES - 1)) ** 2)
            value = episode.total if step == last else episode.returns[step]
            left = k * PICTURE
            text(left + GAP, top - 2, f"step {step}:  {minus(value)}", size=15, color="0.3")
            side = PICTURE - 2 * GAP
            place = (left + GAP, height - top - PICTURE + GAP, side, side)
            axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
            axes.imshow(episode.frames[step, rows, columns], interpolation="lanczos", aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.8")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white", pil_kwargs={"optimize": True})


def minus(value: float) -> str:
    """A whole number with the sign that is as wide as a plus."""
    return f"{value:.0f}".replace("-", "\N{MINUS SIGN}")


def main() -> None:
    """Film and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, one row each")
    parser.add_argument("--out", type=Path, default=Path("strip.png"), metavar="FILE", help="default: strip.png")
    args = parser.parse_args()
    episodes = [film(run) for run in args.runs]
    draw(episodes, args.out)
    for run, episode in zip(args.runs, episodes):
        print(f"{run}: return {episode.total:.1f} in {len(episode.frames)} steps")
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
