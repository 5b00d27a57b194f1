"""An experiment as objects. What computes knows nothing of Hydra.

Building decides everything that can be wrong before anything is computed: unknown options of a
`_target_`, a data folder that isn't there, step sizes that a weight can't have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdq_exp.config import assets, naming, records, schema
from tdq_exp.config.compose import compose
from tdq_exp.config.schema import QUANTIZERS, parts_of
from tdq_exp.data.images import Data, default_cache
from tdq_exp.data.sources import Source
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.experiment.adapt import adapted
from tdq_exp.experiment.arguments import require_node
from tdq_exp.experiment.nodes import make, make_of, recipe_of, source_of
from tdq_exp.experiment.options import EvalOptions, SamplerOptions
from tdq_exp.fit.fit import Fit, Subject
from tdq_exp.fit.options import FitOptions
from tdq_exp.fit.registry import fit_class
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.fetched import file_to_fetch
from tdq_exp.metrics.fidelity import check_names
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.trainable import Trainable
from tdq_exp.models.weights.folder import which_weights
from tdq_exp.quant.convert import Recipe
from tdq_exp.runtime.options import LauncherOptions, TrackerOptions

# What only says where things lie on this machine, or how they are run.
UNRECORDED = ("out", "plan_only", "go", "traceback", "tracker", "launcher")


@dataclass(frozen=True)
class FloatWeights:
    """Where the float network comes from.

    Args:
        path: file, folder or hub id; None where it is to be trained.
        ema: take the averaged weights if the source has both.
    """

    path: str | None
    ema: bool

    def load(self, model: DiffusionModel, net: Any) -> str:
        """Fill a network and return the content hash of what was loaded.

        Raises:
            ValueError: if there are no weights.
        """
        if self.path is None:
            raise ValueError("model.weights has no value: name a file, or train the model first")
        return model.load(net, self.path, self.ema)

    def which(self) -> str | None:
        """Return which of its sets of weights the source gives; None if it has only one."""
        return None if self.path is None else which_weights(self.path, self.ema)


@dataclass(frozen=True)
class DataChoice:
    """Which images, and where what is decoded of them is kept.

    Args:
        source: of the images; None where a finished network is loaded without them.
        cache: folder that is kept between runs.
        limit: only the first so many images of each split.
    """

    source: Source | None
    cache: Path
    limit: int | None


@dataclass(frozen=True)
class Machine:
    """How a run is executed and followed; no result depends on it."""

    launcher: LauncherOptions
    tracker: TrackerOptions
    smoke: bool  # a rehearsal of a step or two


@dataclass(frozen=True)
class Experiment:
    """One run.

    Args:
        name: of the fit.
        sample_name: of the sampled set.
        folder: of the fit.
        seed: of the fit.
        config: the whole configuration, plain: what the row and the tracker show.
        model: a description, without a network.
        weights: of the float network.
        data: images.
        fit: how the network comes by its weights.
        recipe: of the quantizers; None for a float network.
        sampler: DDIM, or another with its call.
        sampling: numbers of the sampled set.
        evaluation: numbers of the measuring.
        machine: how it is executed.
        notes: lines that a reader should see before it runs.
    """

    name: str
    sample_name: str
    folder: Path
    seed: int
    config: dict[str, Any]
    model: DiffusionModel
    weights: FloatWeights
    data: DataChoice
    fit: Fit[FitOptions]
    recipe: Recipe | None
    sampler: Ddim
    sampling: SamplerOptions
    evaluation: EvalOptions
    machine: Machine
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> Trainable:
        """What the fit trains: the model, or a part of it."""
        return self.fit.trained(self.model)

    def features(self) -> FeatureNetwork:
        """Return the feature network."""
        return features_of(self.config)

    def features_to_fetch(self) -> Path | None:
        """Return the file of weights that the feature network fetches if it is not there."""
        node = self.config["eval"]["features"]
        return file_to_fetch(get_object(node["_target_"]), node.get("weights"))

    def subject(self, data: Data, weights: str | None) -> Subject:
        """Return what the fit works on.

        Args:
            data: the images.
            weights: content hash of the float weights.
        """
        return Subject(self.model, self.recipe, self.part("model", *QUANTIZERS), weights, data)

    def part(self, *groups: str) -> dict[str, Any]:
        """Return groups of the config as parts of a fingerprint."""
        return {group: parts_of(group, self.config[group]) for group in groups}

    def recorded(self) -> dict[str, Any]:
        """Return the config as it is kept, without what only concerns this machine."""
        kept = {key: value for key, value in self.config.items() if key not in UNRECORDED}

        source = dict(kept["data"]["source"])
        if "path" in source and Path(source["path"]).expanduser().exists():
            source["path"] = "(a local copy)"

        data = {**kept["data"], "source": source, "cache": None}
        return {**kept, "data": data, "calibration": {**kept["calibration"], "path": None}}


def build(cfg: DictConfig, source: bool = True) -> Experiment:
    """Check a composed config and instantiate it.

    Args:
        cfg: the root of the config.
        source: False leaves the data alone: a finished net can be loaded where they are not.

    Raises:
        ValueError: one line that names the key.
    """
    # 1. Values, checked; names; and the same values without interpolations.
    try:
        cfg, notes = adapted(cfg)
    except OmegaConfBaseException as error:
        raise schema.one_line(error) from error

    config = schema.typed(cfg)
    require_node(schema.plain(config.eval.features), "eval.features")
    check_names(config.eval.metrics)
    if not config.out.strip():  # an unset variable of a script
        raise ValueError("out has no value: name a folder, out=FOLDER")

    name, sample = naming.fit_name(cfg), naming.sample_name(cfg)
    folder = naming.run_folder(cfg, name)

    values = schema.plain(cfg)

    # 2. The quantizers.
    recipe = _recipe(config, values)

    # 3. The model, and what of it is fitted: refused here if there is no such part.
    model = make_of(values, "model.definition", DiffusionModel)
    _require_classes_only(model)

    fit = _fit(config)
    fit.trained(model)

    if fit.options.fits_network:
        model.attach(shipped(config.model.autoencoder))

    if not config.model.weights and fit.options.needs_weights:
        raise ValueError(
            "model.weights has no value: name a file, or train the model first"
            " (method=fp fit=pretrain)"
        )

    weights = shipped(config.model.weights) if fit.options.needs_weights else None

    # 4. The sampler: what it can't do is known before a fit of days.
    sampler = make(values, "sampler.method")
    if not callable(getattr(sampler, "check", None)):
        raise ValueError(f"sampler.method={config.sampler.method}: is no sampler")
    if fit.options.gives_rows:
        sampler.check(model.schedule)
    if fit.options.corrects and model.prediction_type != "epsilon":
        raise ValueError(
            "fit.correction: corrects the predicted noise, and this network's"
            f" model.definition.prediction_type is {model.prediction_type}; take"
            " fit.correction=none"
        )
    if fit.options.corrects and sampler.keeps_variance:
        raise ValueError(
            "fit.correction: its smaller noise does not go with"
            f" sampler.label={config.sampler.label}, which has a variance of its own; take"
            " sampler=ddim, or fit.correction=none"
        )

    # 5. The rest.
    cache = Path(config.data.cache).expanduser() if config.data.cache else default_cache()
    images = source_of(values) if source else None

    return Experiment(
        name=name,
        sample_name=sample,
        folder=folder,
        seed=config.seed,
        config=values,
        model=model,
        weights=FloatWeights(weights, config.model.ema),
        data=DataChoice(images, cache, config.data.limit),
        fit=fit,
        recipe=recipe,
        sampler=sampler,
        sampling=config.sampler,
        evaluation=config.eval,
        machine=Machine(config.launcher, config.tracker, config.smoke),
        notes=notes,
    )


def _recipe(config: schema.Config, values: Mapping[str, Any]) -> Recipe | None:
    """Return the quantizers that a config names; None for a float network.

    Raises:
        ValueError: if the fit can't have them.
    """
    if not config.method.quantized:
        return None

    recipe = recipe_of(values)
    if config.fit.reconstructs and recipe.intervals.dynamic:
        raise ValueError(
            f"tdq={config.tdq.label}: ranges that are read from the input can't be reconstructed;"
            " use method=minmax"
        )
    return recipe


def _require_classes_only(model: DiffusionModel) -> None:
    """Refuse a network that wants a condition which no stage has: classes are all there is.

    Raises:
        ValueError: naming the key.
    """
    kind = model.network.get("class_embed_type")
    if kind is not None:
        raise ValueError(
            f"model.definition.network.class_embed_type={kind}: no stage gives a network such a"
            " condition; num_class_embeds=N takes the images' classes"
        )


def _fit(config: schema.Config) -> Fit[FitOptions]:
    """Return the fit that a config names."""
    chosen, options = fit_class(config.fit), config.fit
    if options.needs_calibration_set:
        trajectory = Ddim.without_noise(vars(config.sampler))
        return chosen(options, config.calibration, trajectory)  # type: ignore[call-arg]
    return chosen(options)


def shipped(weights: str | None) -> str | None:
    """Return the path of a shipped net; anything else as it is (a path, or a hub id)."""
    return (
        str(assets.weights(weights))
        if weights is not None and weights.startswith("shipped:")
        else weights
    )


def features_of(config: Mapping[str, Any]) -> FeatureNetwork:
    """Return the feature network that a configuration names, as plain values."""
    node = dict(config["eval"]["features"])
    if node.get("weights") is not None:
        node["weights"] = shipped(node["weights"])
    features: FeatureNetwork = make({"eval": {"features": node}}, "eval.features")
    return features


def of_network(network: dict[str, Any], overrides: Sequence[str]) -> Experiment:
    """Return an experiment of somebody's own network, without data: for its quantizers.

    Args:
        network: arguments of `UNet2DModel`.
        overrides: as on the command line.

    Raises:
        ValueError: one line that names the key.
    """
    # A caller's own Hydra, if there is one, is as it was afterwards.
    hydra = GlobalHydra.instance()
    theirs = hydra.hydra
    try:
        cfg = compose(["model=tiny", "model.label=own", "model.weights=own", *overrides]).copy()
    finally:
        hydra.hydra = theirs

    OmegaConf.update(cfg, "model.definition.network", network, merge=False)
    return build(cfg, source=False)


def rebuild(recorded: dict[str, Any], where: Path) -> Experiment:
    """Return the experiment of a finished run, from its recorded config; data are not looked for.

    Args:
        recorded: the config; an older record's names are read as what they are called now.
        where: the file that holds it, for messages.

    Raises:
        ValueError: if the record names anything that is not ours, when nothing of it is called; or
            if it is not the configuration of a run.
    """
    try:
        return _rebuilt(recorded, where)
    except (ValueError, OSError) as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # whatever a stranger's record may lead to
        raise ValueError(
            f"{where}: holds no configuration of a run ({type(error).__name__}:"
            f" {str(error).strip().partition(chr(10))[0]})"
        ) from error


def _rebuilt(recorded: dict[str, Any], where: Path) -> Experiment:
    current = records.upgrade(recorded)
    records.require_known(current, str(where))

    root, known = schema.root_of(current["fit"]["kind"]), schema.known_keys()
    declared = {path: set(OmegaConf.select(root, path)) for path in known}
    current = records.of_its_kind(current, declared, known)
    return build(OmegaConf.merge(root, current), source=False)  # type: ignore[arg-type]
