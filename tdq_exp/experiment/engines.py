"""How a network is run: quantization simulated, or layers on integers.

All images of a set are made by one engine, which the set's record and `engine.json` name from the
first group on. On a machine that can't run this engine, an unfinished set is refused; a finished
one stays valid and keeps the engine's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.diffusion.draws import Stream
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console

if TYPE_CHECKING:
    from tdq_exp.deploy.choose import Kept

ENGINE = "engine.json"  # which layers of a set run on integers
SIMULATED = "fake"  # how the names of engines begin that simulate quantization


@dataclass(frozen=True)
class ImageSet:
    """A set of images, as far as an engine is concerned.

    Args:
        folder: where the choice of layers is kept, beside the images that are made with it.
        store: of the images.
        recorded: the engine that the set's record names; None if it names none.
    """

    folder: Path
    store: ImageStore
    recorded: str | None = None

    def choice(self) -> Kept:
        """Return where the choice of layers is kept."""
        from tdq_exp.deploy.choose import Kept  # not imported unless used

        return Kept(self.folder / ENGINE, self.store.arrays.of, self.store.begun())

    def begun_with(self) -> str | None:
        """Return the engine that made the groups that are there.

        None without such groups, or if nothing names it: earlier versions wrote no `engine.json`
        where they simulated.
        """
        if not self.store.begun():
            return None
        if self.recorded is not None:
            return self.recorded

        from tdq_exp.deploy.choose import name_of

        found = self.choice().read()
        return None if found is None else name_of(found)

    def refusal(self, engine: str, reason: str) -> ValueError:
        """Return the error of a set that can't be gone on with here."""
        return ValueError(
            f"{self.folder}: its images were begun with the engine {engine!r}, and here {reason};"
            f" go on where they were begun, or remove {self.store.arrays.folder} to begin again"
        )


def engine(
    net: nn.Module,
    model: DiffusionModel,
    name: str,
    images: ImageSet,
    processes: Processes,
    min_speedup: float = 1.0,
) -> tuple[nn.Module, str]:
    """Return the network as an engine runs it, and what it is, for the row.

    Args:
        net: baked.
        model: its description.
        name: `fake` (simulated quantization) or `integer`.
        images: that are to be made; if none is missing, the network is returned as it is.
        processes: who shares the work.
        min_speedup: of a layer that is to run on integers.

    Raises:
        ValueError: if the network has no quantized layers, or the images were begun with an engine
            that can't run here.
    """
    if name == SIMULATED:
        return net, SIMULATED

    # A finished set keeps the name of its engine, which need not run here.
    begun_with = processes.decide(images.begun_with)
    if begun_with is not None and processes.decide(lambda: not images.store.faults()):
        return net, begun_with

    from tdq_exp.deploy import integer

    reason = _first(processes, integer.unavailable(processes.device))
    if reason is None:
        if not integer.codable(net):
            raise ValueError(
                "sampler.engine=integer: the network has no quantized layer that can run on"
                " integers"
            )
        net = net.to(processes.device)  # layers run, and are timed, where the images are made
        reason = _first(processes, _no_candidate(net))

    # A machine that can't is told so in the row, not refused.
    if reason is not None:
        processes.decide(partial(_begin_simulated, images, begun_with, reason))
        return net, begun_with or f"{SIMULATED}: {reason}"

    return _on_integers(net, model, images, processes, begun_with, min_speedup)


def _on_integers(
    net: nn.Module,
    model: DiffusionModel,
    images: ImageSet,
    processes: Processes,
    begun_with: str | None,
    min_speedup: float,
) -> tuple[nn.Module, str]:
    """Return the network with the layers on integers that gain by it, and what it is."""
    from tdq_exp.deploy import choose, integer
    from tdq_exp.deploy.choose import name_of

    # Measured once and kept beside the images.
    batch = images.store.batch
    x = torch.zeros(batch, *model.sample_shape, device=processes.device)
    t = torch.tensor(model.schedule.steps // 2, device=processes.device)
    condition = model.draw_condition(0, Stream.IMAGE, range(batch))
    condition = None if condition is None else condition.to(processes.device)
    chains = model.chains(net)

    def choice() -> dict[str, Any]:
        if begun_with is not None and begun_with.startswith(SIMULATED):
            raise images.refusal(begun_with, "layers run on integers")
        kept = images.choice()
        found = choose.choice(
            net, lambda n: model.predict(n, x, t, condition), min_speedup, kept, chains
        )
        if begun_with not in (None, name_of(found)):
            reason = f"it says {name_of(found)!r}, its images were begun with {begun_with!r}"
            raise files.damaged(kept.file, reason, kept.again)
        return found

    found = processes.decide(choice)

    # The main process chose; the others may be other machines.
    left = integer.left_out(net)
    lacking = next((f"{n} ({left[n]})" for n in found["layers"] if n in left), None)
    if (lacking := _first(processes, lacking)) is not None:
        raise ValueError(f"sampler.engine=integer: one of the processes can't run {lacking}")

    return integer.integerize(net, chains, found["layers"], found.get("tiles")), name_of(found)


def _no_candidate(net: nn.Module) -> str | None:
    """Return why no layer of a network runs on integers on its device, or None if one does."""
    from tdq_exp.deploy import integer

    left = integer.left_out(net)
    codable = integer.codable(net)
    if any(name not in left for name in codable):
        return None
    return integer.INEXACT if integer.INEXACT in left.values() else left[next(iter(codable))]


def _first(processes: Processes, reason: str | None) -> str | None:
    """Return the first reason that a process has: all of them run one engine."""
    return next((one for one in processes.gather_objects(reason) if one is not None), None)


def _begin_simulated(images: ImageSet, begun_with: str | None, reason: str) -> None:
    """Say that quantization is simulated; refuse that for images that were begun with integers.

    Raises:
        ValueError: naming the folder.
    """
    if begun_with is not None and not begun_with.startswith(SIMULATED):
        raise images.refusal(begun_with, reason)

    # A choice of layers that no image was made with.
    if not images.store.begun():
        images.choice().file.unlink(missing_ok=True)
    console.print(f"sampler.engine=integer: {reason}; quantization is simulated")
