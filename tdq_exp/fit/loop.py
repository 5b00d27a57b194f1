"""The training loop of every fit: float pre-training and quantization-aware training differ in what they pass to it.

One update: draw (images, t, eps) for the global batch, take this process' shard, compute the model's loss, step the
optimiser, take the weights into the average. Validation is the average's loss over fixed (x, t, eps). Killed and started again, the
loop ends with the same bits as one that was never killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Draws, Stream, draw_batch, fixed_draws, seed_global
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.checkpoint import load_state, save_state
from tdq_exp.fit.ema import Ema
from tdq_exp.models.pixel import Trainable
from tdq_exp.models.weights.load import save_weights
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track

Log = Callable[[Mapping[str, Any], int], None]


@dataclass(frozen=True)
class TrainOptions:
    """Numbers of the loop.

    Args:
        updates: optimiser steps.
        batch_size: global, over all processes.
        warmup: updates over which the learning rates rise linearly from 0.
        lr_schedule: what the rates do after it: `constant`, or `cosine` to 0 at the last update.
        ema_decay: of the weights' average.
        grad_clip: largest norm of the whole gradient; 0 does not clip.
        validate_every: updates between two validations (and checkpoints).
        validation_samples: (x, t, eps) triples of the fixed validation set.
        keep_best: number of averages of lowest validation loss to keep.
        precision: `float32` or `bfloat16` autocast.
        stop_after: leave the loop after so many updates, as a kill would (0: don't); for rehearsals.
    """

    updates: int
    batch_size: int
    warmup: int = 0
    lr_schedule: str = "constant"
    ema_decay: float = 0.9999
    grad_clip: float = 0.0
    validate_every: int = 1000
    validation_samples: int = 1024
    keep_best: int = 0
    precision: str = "float32"
    stop_after: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "validate_every", "validation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be at least 1")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"fit.precision={self.precision!r}: choose float32 or bfloat16")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"fit.lr_schedule={self.lr_schedule!r}: choose constant or cosine")

    def rate(self, update: int) -> float:
        """Share of the learning rates that an update (counted from 0) takes, in (0, 1].

        (u + 1) / warmup while warming up, so that the first update moves; then 1, or a cosine over the rest.
        """
        if update < self.warmup:
            return (update + 1) / self.warmup
        return 1.0 if self.lr_schedule == "constant" else cosine(update - self.warmup, self.updates - self.warmup)


def cosine(update: int, updates: int) -> float:
    """`(1 + cos(pi u / updates)) / 2`: from 1 at the first update towards 0."""
    return (1 + math.cos(math.pi * update / updates)) / 2


@dataclass
class History:
    """What the loop noted, update by update. Plain lists, so that it is a file as it stands."""

    validation: list[tuple[int, float]] = field(default_factory=list)
    best: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0


class Interrupted(InterruptedError):
    """The loop was told to stop early (`stop_after`); the state of its last validation is on disk."""


def train(
    net: nn.Module,
    model: Trainable,
    images: Samples,
    held_out: Samples,
    optimizer: torch.optim.Optimizer,
    options: TrainOptions,
    *,
    seed: int,
    folder: Path,
    mark: str,
    processes: Processes,
    penalty: Callable[[], Tensor | None] | None = None,
    on_update: Callable[[int], None] | None = None,
    log: Log | None = None,
) -> tuple[nn.Module, History]:
    """Trains `net` in place and returns the average of its weights, and the history.

    Args:
        net: network in its starting state, on the processes' device.
        model: its description.
        images: training set.
        held_out: samples for the validation loss; never trained on.
        optimizer: over the parameters of `net`; its groups' `lr` are the rates after warm-up.
        options: numbers of the loop.
        seed: of the draws and of dropout.
        folder: where the training state lives.
        mark: the fit's fingerprint; a state of another fit is refused.
        processes: who shares the batch.
        penalty: added to the loss (PACT's L2 on its clipping values).
        on_update: called with the index of the update before it is made (NIPQ's phases).
        log: receives loss, learning rates and validation loss.

    Raises:
        FloatingPointError: if the loss is not finite; the last good state stays on disk.
        Interrupted: see `TrainOptions.stop_after`.
    """
    device = processes.device
    ema = Ema(net, options.ema_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    history = History()
    seed_global(seed, Stream.TRAINING_NOISE, processes.rank)  # every other draw has a key
    state_file = folder / "state.pt"
    first = _restore(state_file, mark, net, ema, optimizer, history, processes)
    shared = processes.wrap(net)
    validation = fixed_draws(
        seed, Stream.VALIDATION, samples=options.validation_samples, images=len(held_out),
        shape=model.sample_shape, steps=model.steps, random=held_out.random,
    )  # fmt: skip
    net.train()
    began, before = time.monotonic(), history.seconds
    with track("training", options.updates, first, show=processes.main) as advance:
        for update in range(first, options.updates):
            if on_update is not None:
                on_update(update)
            share = options.rate(update)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            draws = draw_batch(
                seed, update, batch_size=options.batch_size, images=len(images), shape=model.sample_shape,
                steps=model.steps, flip=model.flip, random=images.random,
            ).shard(processes.rank, processes.world)  # fmt: skip
            loss = _loss(shared, model, images, draws, device, options.precision)
            extra = None if penalty is None else penalty()
            total = loss if extra is None else loss + extra
            value = float(processes.mean(total.detach()))
            _require_finite(value, "loss", update + 1, state_file)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if options.grad_clip:
                nn.utils.clip_grad_norm_(net.parameters(), options.grad_clip)
            optimizer.step()
            ema.update(net, update)
            done = update + 1
            advance(f"loss {value:.4f}")
            if log is not None and (done % 10 == 0 or done == options.updates):
                names = {f"lr/{g.get('name', i)}": g["lr"] for i, g in enumerate(optimizer.param_groups)}
                log({"loss": value, **names}, done)
            if done % options.validate_every == 0 or done == options.updates:
                loss_ema = validation_loss(ema.net, model, held_out, validation, options.batch_size, processes)
                _require_finite(loss_ema, "validation loss", done, state_file)  # before the good state is replaced
                history.validation.append((done, loss_ema))
                if log is not None:
                    log({"validation_loss": loss_ema}, done)
                _keep_best(ema.net, loss_ema, done, history, options.keep_best, folder, processes)
                history.seconds = before + time.monotonic() - began
                _save(state_file, mark, done, net, ema, optimizer, history, processes)
            if done == options.stop_after and done < options.updates:
                raise Interrupted(f"stopped after update {done}, as asked")
    return ema.net, history


def _loss(
    net: nn.Module, model: Trainable, images: Samples, draws: Draws, device: torch.device, precision: str
) -> Tensor:
    x_0 = images.batch(draws.index, draws.flip, draws.noise).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model.training_loss(net, x_0, draws.t.to(device), draws.eps.to(device))


@torch.no_grad()
def validation_loss(
    net: nn.Module, model: Trainable, images: Samples, draws: Draws, batch_size: int, processes: Processes
) -> float:
    """Mean loss over fixed draws, in float32. Batches are dealt out to the processes in turn."""
    was_training = net.training
    net.eval()
    total, samples = torch.zeros((), dtype=torch.float64), len(draws.t)
    for number, start in enumerate(range(0, samples, batch_size)):
        if number % processes.world == processes.rank:
            batch = draws.of(slice(start, min(start + batch_size, samples)))
            total += float(_loss(net, model, images, batch, processes.device, "float32")) * len(batch.t)
    net.train(was_training)
    return float(processes.sum(total.float().to(processes.device))) / samples


def best_file(folder: Path, update: int) -> Path:
    """Weights of the average after an update, if it was one of the best."""
    return folder / f"best-{update:07d}.safetensors"


def _keep_best(
    net: nn.Module, loss: float, update: int, history: History, keep: int, folder: Path, processes: Processes
) -> None:
    if not keep:
        return
    history.best = sorted([*history.best, (loss, update)])
    dropped, history.best = history.best[keep:], history.best[:keep]
    if processes.main:
        if (loss, update) in history.best:
            save_weights(net, best_file(folder, update), {"update": str(update), "loss": repr(loss)})
        for _, old in dropped:
            best_file(folder, old).unlink(missing_ok=True)


def _save(
    path: Path, mark: str, update: int, net: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, history: History,
    processes: Processes,
) -> None:  # fmt: skip
    random = processes.gather_objects(processes.random_state())
    state = {
        "mark": mark, "update": update, "net": net.state_dict(), "ema": ema.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random, "validation": history.validation, "best": history.best, "seconds": history.seconds,
    }  # fmt: skip
    processes.decide(lambda: save_state(path, state))


def _restore(
    path: Path, mark: str, net: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, history: History,
    processes: Processes,
) -> int:  # fmt: skip
    state = load_state(path)
    if state is None:
        return 0
    if state["mark"] != mark:
        raise ValueError(f"{path}: the training state of another fit; remove it to start this one")
    if len(state["random"]) != processes.world:
        raise ValueError(
            f"{path}: begun with {len(state['random'])} processes, now {processes.world}; use launcher.nproc="
            f"{len(state['random'])} or remove the file to start again"
        )
    net.load_state_dict(state["net"])
    ema.net.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    processes.set_random_state(state["random"][processes.rank])
    history.validation = [tuple(v) for v in state["validation"]]
    history.best = [tuple(b) for b in state["best"]]
    history.seconds = state["seconds"]
    return int(state["update"])


def _require_finite(loss: float, what: str, update: int, path: Path) -> None:
    if math.isfinite(loss):
        return
    state = load_state(path)
    kept = f"the state of update {state['update']} is kept in {path}" if state else "no state was saved yet"
    raise FloatingPointError(f"the {what} is {loss} at update {update}: lower fit.lr; {kept}")
