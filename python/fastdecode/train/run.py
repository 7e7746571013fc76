"""One training run: data order, schedule, optimizer, checkpoints, progress bar, loss plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What a run does. The learning rate is constant, then falls linearly to 0 over the last `decay` of the run.

    Because it is constant before, a run may be resumed with another `tokens` or `minutes` at any time before the
    decay and gives what a run with the new value would have given.
    """

    tokens: int  # length of the run, in training tokens
    minutes: float | None = None  # if set, length of the run in minutes of training, instead of `tokens`
    tokens_per_step: int = 4096
    window: int = 512  # tokens per training window before the decay
    decay_window: int = 1024  # and during it
    warmup_steps: int = 100
    decay: float = 0.45
    muon_lr: float = 0.015  # weight matrices (Jordan et al. 2024)
    adam_lr: float = 3e-3  # embedding and norms
    seed: int = 0


class Windows:
    """Windows of a token stream in random order without replacement; every epoch has its own order and offset."""

    def __init__(self, stream: np.ndarray, size: int, seed: int):
        self.stream, self.size, self.seed = stream, size, seed
        self.per_epoch = (len(stream) - 1) // size - 1

    def batch(self, step: int, rows: int) -> Tensor:
        """Batch number `step`: int64 [rows, size + 1]."""
        picked = []
        for i in range(step * rows, (step + 1) * rows):
            epoch, index = divmod(i, self.per_epoch)
            rng = np.random.default_rng((self.seed, self.size, epoch))
            start = rng.integers(self.size) + rng.permutation(self.per_epoch)[index] * self.size
            picked.append(self.stream[start : start + self.size + 1])
        return torch.from_numpy(np.stack(picked).astype(np.int64))


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: nn.Module,
    stream: np.ndarray,
    loss_of: Callable[[Tensor], Tensor],
    recipe: Recipe,
    folder: Path,
    *,
    monitor: Callable[[], float] | None = None,
    save_every: int = 100,
) -> dict[str, Any]:
    """Train `model` in place, resuming from `folder/state.pt` if it is there.

    Args:
        model: the parameters to train.
        stream: training tokens, int32 [total].
        loss_of: windows int64 [rows, size + 1] -> scalar loss in nats per token.
        recipe: schedule and optimizer.
        folder: state, log (`log.jsonl`) and plot (`loss.png`) go here.
        monitor: returns a number to log at every save, or None.
    Returns:
        `{"steps", "tokens", "seconds", "loss"}` of the finished run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opts = optimizers(model, recipe)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    s: dict[str, Any] = {"steps": 0, "decay_steps": 0, "tokens": 0, "seconds": 0.0, "loss": float("nan")}
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, d in zip(opts, saved["optimizers"], strict=True):
            o.load_state_dict(d)
        s = saved["progress"]

    early = Windows(stream, recipe.window, recipe.seed)
    late = Windows(stream, recipe.decay_window, recipe.seed)

    def fraction() -> float:
        return s["tokens"] / recipe.tokens if recipe.minutes is None else s["seconds"] / (60 * recipe.minutes)

    columns = (
        "[progress.description]{task.description}",
        "loss {task.fields[loss]:.3f}",
        "{task.fields[speed]:.0f} tokens/s",
    )
    with Progress(*map(TextColumn, columns), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(folder.name, total=1.0, loss=float("nan"), speed=0.0)
        bar.update(task, completed=fraction())
        while (done := fraction()) < 1.0:
            start = time.monotonic()
            decaying = done > 1.0 - recipe.decay
            if decaying:
                rows = recipe.tokens_per_step // recipe.decay_window
                windows = late.batch(s["decay_steps"], rows)
            else:
                rows = recipe.tokens_per_step // recipe.window
                windows = early.batch(s["steps"], rows)
            scale = min(1.0, (s["steps"] + 1) / recipe.warmup_steps, (1.0 - done) / recipe.decay)
            for o, lrs in zip(opts, base, strict=True):
                for group, lr in zip(o.param_groups, lrs, strict=True):
                    group["lr"] = lr * scale
            loss = loss_of(windows)
            loss.backward()
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            seconds = time.monotonic() - start
            s["steps"] += 1
            s["decay_steps"] += decaying
            s["tokens"] += recipe.tokens_per_step
            s["seconds"] += seconds
            s["loss"] = loss.item()
            bar.update(task, completed=fraction(), loss=s["loss"], speed=recipe.tokens_per_step / seconds)
            if s["steps"] % save_every == 0 or fraction() >= 1.0:
                row = {**s, "lr_scale": scale, "monitor": monitor() if monitor else None}
                with log_file.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "progress": s}
                torch.save(state, state_file.with_suffix(".tmp"))
                state_file.with_suffix(".tmp").rename(state_file)
                plot(folder)
    return s


def plot(folder: Path) -> None:
    """Draw `folder/log.jsonl` into `folder/loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    millions = [r["tokens"] / 1e6 for r in rows]
    fig, axes = plt.subplots(figsize=(7, 4))
    axes.plot(millions, [r["loss"] for r in rows], lw=0.8, label="training batch")
    if any(r["monitor"] is not None for r in rows):
        axes.plot(millions, [r["monitor"] for r in rows], lw=1.6, label="held-out sample")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    fig.tight_layout()
    fig.savefig(folder / "loss.png", dpi=110)
    plt.close(fig)
