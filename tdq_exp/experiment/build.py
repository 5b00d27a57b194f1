"""A run as objects: what a config says, instantiated. Beyond this module nothing knows of Hydra.

Building decides everything that can be wrong before anything is computed: unknown options of a `_target_`, a data
folder that isn't there, an interval that a weight can't have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tdq_exp.config import assets, records, schema
from tdq_exp.data.sources import Source
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.fit.loop import TrainOptions
from tdq_exp.fit.ptq.calibration_set import CalibrationSpec
from tdq_exp.fit.ptq.ptq import PtqOptions
from tdq_exp.fit.ptq.reconstruct import ReconstructOptions
from tdq_exp.fit.qat import Rates
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.fidelity import check_names
from tdq_exp.models.pixel import DiffusionModel, Trainable
from tdq_exp.quant.convert import Recipe


@dataclass(frozen=True)
class Job:
    """One run. `config` is the whole configuration as plain values: what the row and the tracker show."""

    name: str
    sample_name: str
    folder: Path
    config: dict[str, Any]
    model: DiffusionModel
    weights: str | None
    ema: bool
    source: Source | None
    cache: str | None
    limit: int | None
    fit: schema.FitConfig
    train: TrainOptions | None
    ptq: PtqOptions | None
    calibration: CalibrationSpec | None
    calibration_path: str | None
    trajectory: Ddim
    recipe: Recipe | None
    rates: Rates
    sampler: Ddim
    sampling: schema.SamplerConfig
    features: Callable[[], FeatureNetwork]
    evaluation: schema.EvalConfig
    tracker: schema.TrackerConfig
    launcher: schema.LauncherConfig
    seed: int

    @property
    def subject(self) -> Trainable:
        """What the fit trains: the model, or a part of it."""
        return self.model.part(self.fit.part)

    @property
    def smoke(self) -> bool:
        """Is this a rehearsal of a step or two (`debug=smoke`)?"""
        updates = [self.train.updates] if self.train else [self.ptq.block.updates] if self.ptq else []
        return all(number <= 2 for number in updates) and self.sampling.images <= 8

    def recorded(self) -> dict[str, Any]:
        """The config as it is kept: without what only says where things lie on this machine, or how they are run."""
        kept = {
            key: value
            for key, value in self.config.items()
            if key not in ("out", "plan_only", "go", "traceback", "tracker", "launcher")
        }
        source = dict(kept["data"]["source"])
        if "path" in source and Path(source["path"]).expanduser().exists():
            source["path"] = "(a local copy)"
        calibration = {**kept["calibration"], "path": None}
        return {**kept, "data": {**kept["data"], "source": source, "cache": None}, "calibration": calibration}

    def part(self, *groups: str) -> dict[str, Any]:
        """Groups of the config as fingerprint parts: the keys that a result depends on, and no others."""
        return {group: parts_of(group, self.config[group]) for group in groups}


TRAINING = (
    "kind", "updates", "batch_size", "lr", "warmup", "ema_decay", "grad_clip", "validate_every", "validation_samples",
    "precision",
)  # fmt: skip
PARTS = {
    "model": ("definition",),
    "calibration": ("kind", "samples", "images", "mu", "sigma", "seed"),
    "bits": ("weight", "act"),
    "weight": ("quantizer", "interval"),
    "act": ("quantizer",),
    "tdq": ("interval", "zero_point"),
    "plan": ("plan",),
    "habits": ("habits",),
    "pretrain": TRAINING,
    "qat": (
        *TRAINING, "weight_decay", "lr_step_size", "lr_zero_point", "lr_generator", "decay_generator", "real_rounding",
        "calibration_samples",
    ),
    "ptq": (
        "kind", "reconstruct", "updates", "batch_size", "lr", "lr_zero_point", "lr_generator", "power", "rounding",
        "rounding_updates", "lr_rounding", "rounding_weight", "validation_samples",
    ),
    "eval": ("features", "metrics", "batch", "reference_images"),
    "sampler": ("method", "images", "batch", "seed", "truncate", "engine"),
}  # fmt: skip
# Keys that came later, with the value that every earlier result was made with: they are parts where they differ from it.
LATER: dict[str, dict[str, Any]] = {
    "pretrain": {"lr_schedule": "constant", "part": "network"}, "qat": {"lr_schedule": "constant"},
    "ptq": {"balance": False}, "sampler": {"min_speedup": 1.0},
}  # fmt: skip


def parts_of(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a group that a result depends on: no label, no path, nothing that says only where or how fast.

    They are written down, so that a new key of the configuration does not turn every earlier result into another one.

    Args:
        group: name of a config group; of `fit`, the keys depend on its kind.
        values: the group, plain.
    """
    kind = values["kind"] if group == "fit" else group
    keys = PARTS.get(kind, ("kind",)) if group == "fit" else PARTS[group]
    later = {key: values.get(key, old) for key, old in LATER.get(kind, {}).items()}
    later = {key: value for key, value in later.items() if value != LATER[kind][key]}
    return {**{key: values[key] for key in keys}, **later}


def build(cfg: DictConfig, source: bool = True) -> Job:
    """Checks a composed config and instantiates it.

    Args:
        cfg: the root of the config.
        source: False leaves the data alone: a finished net can be loaded where they are not.

    Raises:
        ValueError: one line that names the key.
    """
    schema.validate(cfg)
    check_names(cfg.eval.metrics)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    cfg = OmegaConf.create(values)  # resolved once: no interpolation is left
    fit = schema.FitConfig(**cfg.fit)
    train = None
    ptq = spec = None
    if fit.kind == "ptq":
        ptq = _ptq_options(fit)
        c = cfg.calibration
        spec = CalibrationSpec(c.kind, c.samples, c.images, c.mu, c.sigma, c.seed)
    elif fit.kind != "none":
        train = TrainOptions(
            updates=fit.updates, batch_size=fit.batch_size, warmup=fit.warmup, lr_schedule=fit.lr_schedule,
            ema_decay=fit.ema_decay, grad_clip=fit.grad_clip, validate_every=fit.validate_every, validation_samples=fit.validation_samples,
            precision=fit.precision, stop_after=fit.stop_after, keep_best=5 if fit.kind == "qat" else 0,
        )  # fmt: skip
    model = make(cfg, "model.definition")
    model.part(fit.part)  # refused here if there is none
    if fit.part == "network":
        model.attach(_shipped(cfg.model.autoencoder))
    if cfg.model.weights is None and fit.kind != "pretrain":
        raise ValueError("model.weights has no value: name a file, or train the model first (method=fp fit=pretrain)")
    return Job(
        name=schema.fit_name(cfg),
        sample_name=schema.sample_name(cfg),
        folder=schema.run_folder(cfg),
        config=schema.plain(cfg),
        model=model,
        weights=None if fit.kind == "pretrain" else _shipped(cfg.model.weights),
        ema=cfg.model.ema,
        source=make(cfg, "data.source") if source else None,
        cache=cfg.data.cache,
        limit=cfg.data.limit,
        fit=fit,
        train=train,
        ptq=ptq,
        calibration=spec,
        calibration_path=cfg.calibration.path,
        trajectory=_trajectory(cfg),
        recipe=_recipe(cfg) if cfg.method.quantized else None,
        rates=Rates(
            fit.lr, fit.weight_decay, fit.lr_step_size, fit.lr_zero_point, fit.lr_generator, fit.decay_generator
        ),
        sampler=make(cfg, "sampler.method"),
        sampling=schema.SamplerConfig(**cfg.sampler),
        features=lambda: features_of(cfg),
        evaluation=schema.EvalConfig(**schema.plain(cfg.eval)),
        tracker=schema.TrackerConfig(**cfg.tracker),
        launcher=schema.LauncherConfig(**cfg.launcher),
        seed=cfg.seed,
    )


def _ptq_options(fit: schema.FitConfig) -> PtqOptions:
    names = (
        "updates", "batch_size", "lr", "lr_zero_point", "lr_generator", "power", "balance", "rounding",
        "rounding_updates", "lr_rounding", "rounding_weight",
    )  # fmt: skip
    block = ReconstructOptions(**{name: getattr(fit, name) for name in names})
    return PtqOptions(fit.reconstruct, block, fit.memory_gb, fit.stop_after)


def _trajectory(cfg: DictConfig) -> Ddim:
    """The denoising runs of a calibration set: DDIM without noise over the sampler's own time steps."""
    s = cfg.sampler
    return Ddim(s.steps, s.spacing, 0.0, s.clip, s.offset, s.final_alpha_one)


def _shipped(weights: str | None) -> str | None:
    """The path of a shipped net; anything else as it is (a path, or a hub id)."""
    return str(assets.weights(weights)) if weights is not None and weights.startswith("shipped:") else weights


def features_of(cfg: DictConfig) -> FeatureNetwork:
    """The feature network that a config names."""
    cfg = cfg.copy()
    if cfg.eval.features.get("weights") is not None:
        cfg.eval.features.weights = _shipped(cfg.eval.features.weights)
    return make(cfg, "eval.features")


def _recipe(cfg: DictConfig) -> Recipe:
    return Recipe(
        weight_bits=cfg.bits.weight,
        act_bits=cfg.bits.act,
        weight=make(cfg, "weight.quantizer"),
        act=make(cfg, "act.quantizer"),
        intervals=make(cfg, "tdq.interval"),
        weight_interval=cfg.weight.interval,
        zero_point=cfg.tdq.zero_point,
        plan=make(cfg, "plan.plan"),
        habits=make(cfg, "habits.habits"),
    )


def rebuild(recorded: dict[str, Any], where: Path) -> Job:
    """Return the job of a finished run, from the config that it recorded; its data are not looked for.

    Args:
        recorded: the config; an older record's names are read as what they are called now.
        where: the file that holds it, for messages.

    Raises:
        ValueError: if the record names anything that is not ours; nothing of it is called then.
    """
    current = records.upgrade(recorded)
    records.require_known(current, str(where))
    return build(OmegaConf.merge(OmegaConf.structured(schema.Config), current), source=False)  # type: ignore[arg-type]


def make(cfg: DictConfig, key: str) -> Any:
    """Instantiates a node.

    Raises:
        ValueError: what its constructor says of a value, or which option it does not know.
    """
    try:
        return instantiate(OmegaConf.select(cfg, key), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, FileNotFoundError | ValueError):
            raise type(cause)(str(cause)) from error
        raise ValueError(f"{key}: {str(cause or error).splitlines()[0]}") from error
