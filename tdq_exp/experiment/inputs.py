"""What a run would refuse only after hours: looked for before anything is computed or written.

A network that can't run, quantizers that it can't have, weights that are not there, a feature
network whose file is missing: each is found here within seconds, by its key.
"""

from __future__ import annotations

import json

import torch

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.config.schema import QUANTIZERS
from tdq_exp.experiment.build import Experiment, shipped
from tdq_exp.experiment.stored_network import network_is_here
from tdq_exp.models.compiled import blocks_to_compile
from tdq_exp.models.recompute import require_blocks
from tdq_exp.models.weights.fill import locate
from tdq_exp.runtime import files, launch
from tdq_exp.runtime.environment import memory_bytes

# Networks that were found to run, by their configuration: one process may start many runs of one.
_RUNNABLE: set[str] = set()


def require_inputs(job: Experiment, download: bool = True) -> None:
    """Refuse a run whose network, weights or features can't be had.

    Args:
        job: the experiment.
        download: whether what the hub has is fetched now; else only local files are looked for.

    Raises:
        ValueError, OSError: one line that names the key or the file.
    """
    # 1. The folder that everything is written to.
    files.require_folder(job.folder, "out")
    files.require_folder(job.data.cache, "data.cache")

    # 2. The precision of a fit that is still to be made.
    precision = getattr(job.fit.options, "precision", None)
    if precision == "tf32" and launch.device(job.machine.launcher).type == "cpu":
        fitted = files.read_json(job.folder / FIT_RECORD) or {}
        if not (fitted.get("done") and network_is_here(job)):
            raise ValueError("fit.precision=tf32: only GPUs have it; take float32, or bfloat16")

    # 3. The network, with its quantizers: shapes alone, nothing is computed.
    require_network(job)

    # 4. Weights, of the network and of the autoencoder.
    if job.weights.path is not None:
        locate(job.weights.path, "unet", "model.weights", download)
    autoencoder = shipped(job.config["model"]["autoencoder"])
    if autoencoder is not None and job.fit.options.fits_network:
        locate(autoencoder, "vae", "model.autoencoder", download)

    # 5. What the fit is given, and the network that measures.
    job.fit.require_files()
    if job.fit.options.gives_rows:
        require_features(job, download)


def require_features(job: Experiment, download: bool = True) -> None:
    """Refuse a feature network whose weights or package are missing, or are something else.

    Args:
        job: the experiment.
        download: whether weights that are named by no file are fetched.
    """
    if download or job.features_to_fetch() is None:
        job.features()


def require_network(job: Experiment) -> None:
    """Refuse a network that can't denoise a sample, or can't have these quantizers.

    Raises:
        ValueError: one line that names the key.
    """
    launcher = job.machine.launcher
    parts = [job.part("model", *QUANTIZERS), launcher.recompute, launcher.compile]
    key = json.dumps(parts, sort_keys=True, default=str)
    if key in _RUNNABLE:
        return

    job.model.require_runnable()
    if launcher.recompute or launcher.compile:
        with torch.device("meta"):
            trained = job.trained.build()
        if launcher.recompute:
            require_blocks(trained)
        if launcher.compile:
            blocks_to_compile(trained)
    with torch.device("meta"):
        net = job.model.build()
        if job.recipe is not None:
            job.model.quantize(net, job.recipe)

    wanted = sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))
    if wanted > memory_bytes():
        raise ValueError(
            f"model.definition, tdq.interval: the network takes {wanted / 1e9:.0f} GB, and this"
            f" machine has {memory_bytes() / 1e9:.0f} GB"
        )
    _RUNNABLE.add(key)
