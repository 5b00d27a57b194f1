"""The training loop of every fit: float pre-training and quantization-aware training share it.

One update draws (images, t, eps) for the global batch, takes this process' shard, computes the
model's loss, steps the optimiser, and takes the weights into their average. Validation is the
average's loss over fixed (x, t, eps). Killed and started again, the loop ends with the same bits as
one that was never killed; on a GPU up to the order of sums, which cuDNN's convolutions, and the
gradients of step sizes per time step, leave open. A signal that asks it to stop
(`runtime.signals`) saves after the update, on a GPU within ten updates.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Draws, Stream, draw_batch, seed_global
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.ahead import batches_ahead
from tdq_exp.fit.checkpoint import FIXED, States, best_file, load_state, state_of_fit
from tdq_exp.fit.ema import Ema
from tdq_exp.fit.gradients import Batch, Gradients
from tdq_exp.fit.losses import batch_of, validation_draws, validation_loss
from tdq_exp.fit.options import TrainOptions, learning_rates
from tdq_exp.fit.weight_update import WeightUpdate
from tdq_exp.models.compiled import CompiledBlocks
from tdq_exp.models.recompute import recompute_activations
from tdq_exp.models.trainable import Trainable
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.runtime import signals
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.precision import autocast, products
from tdq_exp.runtime.progress import track
from tdq_exp.runtime.tensor_files import values_of

LOG_EVERY = 10  # updates; on a GPU the loss is read as often, for each reading waits for it


@dataclass(frozen=True)
class TrainingSets:
    """What a model is trained and validated on.

    Args:
        train: the training set.
        held_out: samples for the validation loss; never trained on.
    """

    train: Samples
    held_out: Samples


@dataclass
class History:
    """What the loop noted, update by update. Plain lists, so that it is a file as it stands.

    Args:
        validation: (update, loss).
        best: (loss, update) of the kept checkpoints, lowest loss first.
        seconds: spent, interrupted runs included.
        compiled: whether torch compiled the network's blocks, in any phase.
    """

    validation: list[tuple[int, float]] = field(default_factory=list)
    best: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0
    compiled: bool = False

    def facts(self) -> dict[str, Any]:
        """Return what the record of the fit says of it."""
        return {
            "seconds": round(self.seconds, 1),
            "validation_loss": self.validation[-1][1],
            "validation": self.validation,
            "best": [update for _, update in sorted(self.best)],
            **({"compiled": True} if self.compiled else {}),
        }


class Interrupted(InterruptedError):
    """The loop was told to stop early (`fit.stop_after`); its state is on disk."""


class Training:
    """The training of one network, resumable at every validation.

    A fit that adds something to the loss, or has phases, overrides `penalty`, `phase` and
    `set_phase`.

    Args:
        net: network in its starting state, on the processes' device; trained in place.
        model: its description.
        sets: what it is trained and validated on.
        optimizer: over the parameters of `net`; its groups' `lr` are the rates after warm-up.
        options: numbers of the loop.
        context: of the run.
    """

    checkpoints: ClassVar[int] = 0  # averages of lowest validation loss that are kept

    def __init__(
        self,
        net: nn.Module,
        model: Trainable,
        sets: TrainingSets,
        optimizer: torch.optim.Optimizer,
        options: TrainOptions,
        context: RunContext,
    ) -> None:
        self.net, self.model, self.sets = net, model, sets
        self.options, self.context = options, context
        self.processes = context.processes
        self.state_file = context.folder / "state.pt"
        self.states = States(self.state_file)

        self.ema = Ema(net, options.ema_decay)
        if context.recompute:
            recompute_activations(net)
        self.compiled = CompiledBlocks(net) if context.compile else None
        self.history = History()

        device = context.processes.device
        self.gradients = Gradients(net, self._loss, context.processes, context.micro_batches)
        self.weight_update = WeightUpdate(net, optimizer, self.ema, options.grad_clip, device)
        self.read_every = 1 if device.type == "cpu" else LOG_EVERY
        self._unread: list[Tensor] = []  # losses since the last reading
        self._phase: int | None = None

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of an update, or None."""
        return None

    def phase(self, update: int) -> int:
        """Return the number of the phase that an update, counted from 0, belongs to."""
        return 0

    def set_phase(self, phase: int) -> None:
        """Prepare for a phase."""

    def run(self) -> tuple[nn.Module, History]:
        """Train, and return the average of the weights and the history.

        Raises:
            FloatingPointError: if the loss is not finite; the last good state stays on disk.
            Interrupted: see `TrainOptions.stop_after`.
            Stopped: by a signal; the state after the last update is on disk.
        """
        options, context = self.options, self.context
        # 1. The state that an interrupted run left, if there is one.
        seed_global(context.seed, Stream.TRAINING_NOISE, self.processes.rank)  # all else has a key
        first = self._restore()

        # 2. The same network on all processes, and the fixed validation set.
        self.processes.share(self.net)
        validation = validation_draws(
            self.model, self.sets.held_out, options.validation_samples, context.seed
        )

        # 3. The updates.
        self.net.train()
        began, before = time.monotonic(), self.history.seconds
        device, remark = self.processes.device, ""

        with (
            track("training", options.updates, first, show=self.processes.main) as advance,
            signals.deferred(),
            closing(self),
            closing(batches_ahead(self._batch, first, options.updates, device)) as batches,
        ):
            for done, batch in enumerate(batches, first + 1):
                self._update(done - 1, batch)

                # A validation is also where an interrupted run goes on.
                validates = done % options.validate_every == 0 or done == options.updates
                stop = False
                if validates or done == options.stop_after or done % self.read_every == 0:
                    loss, stop = self._read(done)
                    remark = f"loss {loss:.4f}"
                    self._log(loss, done)

                advance(remark)
                if validates:
                    self._validate(validation, done)

                if validates or stop:
                    self.history.seconds = before + time.monotonic() - began
                    self._save(done)

                if stop:
                    number = signals.pending() or signal.SIGTERM  # another process' signal
                    raise signals.Stopped(number, f"the state of update {done} is saved")

                if done == options.stop_after and done < options.updates:
                    raise Interrupted(f"stopped after update {done}, as asked")

        self.processes.decide(self.states.finish)
        return self.ema.net, self.history

    def close(self) -> None:
        """Free the recordings, whose memory is that of all activations."""
        self.gradients.forget()
        self.weight_update.forget()

    def _batch(self, update: int) -> Batch:
        """Return this process' part of the batch of an update, on the CPU (see `batch_of`)."""
        model, images = self.model, self.sets.train
        draws = draw_batch(
            self.context.seed,
            update,
            batch_size=self.options.batch_size,
            images=len(images),
            shape=model.sample_shape,
            steps=model.steps,
            flip=model.flip,
            random=images.random,
        )
        return batch_of(images, draws.shard(self.processes.rank, self.processes.world))

    def _loss(self, *batch: Tensor) -> Tensor:
        """Return the loss of a batch, with penalties."""
        with autocast(self.processes.device, self.options.precision):
            loss = self.model.training_loss(self.net, *batch)
        penalty = self.penalty()
        return loss if penalty is None else loss + penalty

    def _update(self, update: int, batch: Batch) -> None:
        """Make one update; its loss is left for `_read`.

        Args:
            update: counted from 0.
            batch: this process' part, on its device.
        """
        # A new phase changes what a recording holds.
        phase = self.phase(update)
        if phase != self._phase:
            self.set_phase(phase)
            self.close()
            self._phase = phase
            self._compile(batch)

        with products(self.options.precision):
            loss = self.gradients(batch)
        self._unread.append(loss.clone())

        # The step, at the rate of the schedule, and the average of the weights.
        self.weight_update(update, self.options.rate(update), fixed=self.gradients.recorded)

    def _compile(self, batch: Batch) -> None:
        """Compile the blocks, if asked to, on a batch; what is drawn meanwhile is drawn again."""
        if self.compiled is None:
            return

        random = self.processes.random_state()
        with products(self.options.precision):
            self.compiled.try_out(lambda: self.gradients.launch(batch))
        self.processes.set_random_state(random)
        self.history.compiled |= self.compiled.active  # whatever a later phase does

    def _read(self, done: int) -> tuple[float, bool]:
        """Return the loss of the last update, and whether any process was asked to stop.

        One message for both: a state is saved by all processes after the same update, or by none.
        Nothing is saved before it: a loss that is no number ends the run here.

        Args:
            done: number of updates so far.

        Raises:
            FloatingPointError: if one of the losses since the last reading is not finite.
        """
        losses, self._unread = torch.stack(self._unread), []
        asked = losses.new_tensor([float(signals.pending() is not None)])
        *values, share = self.processes.mean(torch.cat([losses, asked])).tolist()

        for update, value in enumerate(values, done - len(values) + 1):
            self._require_finite(value, "loss", update)
        return values[-1], share > 0

    def _require_finite(self, loss: float, what: str, update: int) -> None:
        """Refuse a loss that is no number, and say what is known of its cause.

        Raises:
            FloatingPointError: naming the update, the rates, and the state that is kept.
        """
        if math.isfinite(loss):
            return

        # Before the first step nothing has moved: no rate is at fault.
        rates = ", ".join(f"{key}={rate:g}" for key, rate in learning_rates(self.options).items())
        cause = f"one of the rates is too large ({rates})"
        if update == 1 and what == "loss":
            cause = "no step was made yet, so no rate is at fault: look at the weights and images"

        state = load_state(self.state_file)
        kept = "no state was saved yet"
        if state:
            kept = f"the state of update {state['update']} is kept in {self.state_file}"
        raise FloatingPointError(f"the {what} is {loss} at update {update}: {cause}; {kept}")

    def _log(self, loss: float, done: int) -> None:
        log = self.context.log
        if log is None or (done % LOG_EVERY and done != self.options.updates):
            return
        rates = self.weight_update.rates_by_name()
        log({"loss": loss, **{f"lr/{name}": rate for name, rate in rates.items()}}, done)

    def _validate(self, draws: Draws, done: int) -> None:
        """Compute the average's validation loss; keep its weights if among the best."""
        batch = self.options.batch_size
        loss = validation_loss(
            self.ema.net, self.model, self.sets.held_out, draws, batch, self.processes
        )
        self._require_finite(loss, "validation loss", done)  # the good state is still there

        self.history.validation.append((done, loss))
        if self.context.log is not None:
            self.context.log({"validation_loss": loss}, done)
        self._keep_best(loss, done)

    def _keep_best(self, loss: float, update: int) -> None:
        if not self.checkpoints:
            return

        ranked = sorted([*self.history.best, (loss, update)])
        self.history.best = ranked[: self.checkpoints]
        self.states.dropped |= {old for _, old in ranked[self.checkpoints :]}

        if (loss, update) in self.history.best:
            file = best_file(self.context.folder, update)
            about = {"update": str(update), "loss": repr(loss), "fit": self.context.fingerprint}
            self.processes.decide(lambda: save_weights(self.ema.net, file, about))

    def _save(self, update: int) -> None:
        """Write all that the next update depends on."""
        state = {
            "fingerprint": self.context.fingerprint,
            "update": update,
            **self._fixed(),
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.weight_update.state_dict(),
            "random": self.processes.gather_objects(self.processes.random_state()),
            "validation": self.history.validation,
            "best": self.history.best,
            "seconds": self.history.seconds,
            "compiled": self.history.compiled,
        }
        self.processes.decide(lambda: self.states.save(state))

    def _fixed(self) -> dict[str, object]:
        return {name: getattr(self.context, name) for name in FIXED}

    def _restore(self) -> int:
        """Put back the state of an interrupted run; return the number of its updates.

        Raises:
            ValueError: if it is of another fit, or of another number of processes.
        """
        # Refused once, for all processes.
        fit, world = self.context.fingerprint, self.processes.world
        file = self.processes.decide(
            lambda: state_of_fit(self.state_file, fit, world, self._fixed())
        )
        state = load_state(file) if file is not None else None
        if state is None:
            return 0

        # All that the next update depends on, then what is recorded.
        with values_of(self.state_file):
            self.net.load_state_dict(state["net"])
            self.ema.net.load_state_dict(state["ema"])
            self.weight_update.load_state_dict(state["optimizer"])
            self.processes.set_random_state(state["random"][self.processes.rank])

            self.history.validation = [(int(u), float(loss)) for u, loss in state["validation"]]
            self.history.best = [(float(loss), int(u)) for loss, u in state["best"]]
            self.history.seconds = float(state["seconds"])
            self.history.compiled = bool(state.get("compiled", False))  # older states lack it
            update = int(state["update"])
            if not 0 < update <= self.options.updates:
                raise ValueError(f"its update is {update}, of {self.options.updates}")
            self.states.restored(update, [kept for _, kept in self.history.best])
            return update
