"""Float pre-training: `method=fp fit=pretrain`.

Adam, warm-up, flips, and the average of the weights as the result.
"""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.diffusion.draws import require_batch
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.fit import Fit, Subject, Work
from tdq_exp.fit.loop import History, Training, TrainingSets
from tdq_exp.fit.options import PretrainOptions
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.trainable import Trainable
from tdq_exp.models.weights.fill import load_weights, save_weights
from tdq_exp.quant.convert import Recipe
from tdq_exp.runtime import figures, files
from tdq_exp.runtime.context import RunContext

STEP = 3  # forward passes that one training step takes
WEIGHTS = "weights.safetensors"


class Pretrain(Fit[PretrainOptions]):
    """Trains a model, or a part of one, from random weights."""

    def run(
        self, context: RunContext, net: nn.Module | None, subject: Subject
    ) -> tuple[nn.Module, dict[str, Any]]:
        trained, data = self.trained(subject.model), subject.data
        sets = TrainingSets(
            subject.samples(trained, data.train, context, mirror=True),
            subject.samples(trained, data.held_out, context),
        )

        net = trained.build(context.seed).to(context.processes.device)
        group = {"params": list(net.parameters()), "lr": self.options.lr, "name": "weights"}
        optimizer = torch.optim.Adam([group])
        average, history = Training(net, trained, sets, optimizer, self.options, context).run()

        trained.settle(average, sets.train, context.processes.device)
        context.processes.decide(lambda: _write(context, trained, average, history, sets.held_out))
        return average, history.facts()

    def network_file(self, folder: Path) -> Path:
        return folder / WEIGHTS

    def finished(
        self, model: DiffusionModel, recipe: Recipe | None, folder: Path, device: torch.device
    ) -> nn.Module:
        net = self.trained(model).build()
        load_weights(net, str(self.network_file(folder)))
        return net.to(device).eval()

    def work(self, model: DiffusionModel, net: nn.Module, sampling_steps: int) -> Work:
        o = self.options
        parameters = sum(p.numel() for p in net.parameters())
        text = f"{o.kind}, {o.updates} updates of {o.batch_size}"
        return Work(STEP * o.updates * o.batch_size, parameters * 4 * 5, text)

    def require_files(self) -> None:
        if self.options.export is not None:
            files.require_folder(Path(self.options.export).expanduser().parent, "fit.export")

    def require_startable(self, subject: Subject, world: int, micro_batches: int = 1) -> None:
        export = self.options.export
        if export is not None and Path(export).expanduser().exists():
            raise ValueError(f"fit.export={export}: exists; remove it or choose another name")
        require_batch(self.options.batch_size, len(subject.data.train), world, micro_batches)

    def export(self, folder: Path, record: dict[str, Any]) -> None:
        """Copy the trained net to where `fit.export` says, its validation losses beside it.

        Args:
            folder: of the run.
            record: of the finished fit.

        Raises:
            ValueError: if there is another net.
        """
        if self.options.export is None:
            return

        path, target = folder / WEIGHTS, Path(self.options.export).expanduser()
        if target.exists() and not filecmp.cmp(path, target, shallow=False):
            raise ValueError(
                f"fit.export={target}: exists and is another net; remove it or choose another name"
            )

        files.copy(path, target, "set fit.export=FILE to another place")

        # Beside the weights: how they were made.
        facts = record["facts"]
        history = {
            "net": target.name,
            "name": record["name"],
            "fingerprint": record["fingerprint"],
            "seconds": facts["seconds"],
            **facts["environment"],
            "validation_loss": facts["validation"],
        }
        files.write_json(target.with_suffix(".history.json"), history)


def _write(
    context: RunContext, model: Trainable, net: nn.Module, history: History, held_out: Samples
) -> None:
    """Write a trained net, and a picture of what it does, if there is one."""
    folder, (update, loss) = context.folder, history.validation[-1]
    about = {"validation_loss": repr(loss), "updates": str(update), "fit": context.fingerprint}
    save_weights(net, folder / WEIGHTS, about)

    rows = model.shown(net, held_out)
    if rows:
        figures.sample_grid(rows, folder / "grid.png")
        figures.sign(folder / "grid.png", context.fingerprint)
