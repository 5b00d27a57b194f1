"""The root of the configuration: types of every key, the names of a run, and checks with messages that name the key.

Nodes of type `Any` hold a `_target_`; their keys are checked by the constructor that they name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

BITS = range(2, 17)
REPORTS = ("last", "best_of_5")
TRACKERS = ("none", "offline", "wandb")


@dataclass
class Sampling:
    """A model's own conventions of sampling."""

    clip: bool = False
    offset: int = 0
    final_alpha_one: bool = True


@dataclass
class ModelConfig:
    label: str = MISSING
    definition: Any = MISSING  # _target_: a class like tdq_exp.models.model.DiffusionModel
    weights: str | None = None  # safetensors, .ckpt, diffusers folder, hub id, or shipped:NAME
    ema: bool = True  # of a .ckpt that holds both
    autoencoder: str | None = None  # weights of a latent model's first stage, from the same kinds of source
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class DataConfig:
    label: str = ""
    source: Any = MISSING
    cache: str | None = None  # folder of decoded sets; default ~/.cache/tdq_exp
    limit: int | None = None  # only the first so many images of each split, for rehearsals


@dataclass
class FitNumbers:
    updates: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    lr_step_size: float = 0.0
    lr_zero_point: float = 0.0
    warmup: int = 0
    lr_schedule: str = "constant"  # constant, cosine
    ema_decay: float = 0.9999
    grad_clip: float = 0.0
    validate_every: int = 1000
    validation_samples: int = 1024
    precision: str = "float32"


@dataclass
class AutoencoderNumbers(FitNumbers):
    updates: int = 0
    batch_size: int = 1
    lr: float = 0.0


@dataclass
class PtqNumbers:
    updates: int = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    lr_zero_point: float = MISSING
    lr_generator: float = MISSING
    validation_samples: int = MISSING
    samples: int = MISSING  # of a calibration set
    images: int = MISSING  # trajectories of a set, where t is drawn from the steps of each
    ndtc_images: int = MISSING  # the same, where t is drawn from PTQ4DM's normal distribution
    steps: int = MISSING  # of sampling after post-training quantization


@dataclass
class SampleNumbers:
    images: int = MISSING
    steps: int = MISSING
    batch: int = MISSING


@dataclass
class Protocol:
    """The numbers of an experiment at one scale; the groups `fit` and `sampler` read them."""

    scale: str = MISSING  # paper, small, digits, tiny
    pretrain: FitNumbers = field(default_factory=FitNumbers)
    autoencoder: AutoencoderNumbers = field(default_factory=AutoencoderNumbers)  # where a model has one to be trained
    qat: FitNumbers = field(default_factory=FitNumbers)
    ptq: PtqNumbers = field(default_factory=PtqNumbers)
    sampling: SampleNumbers = field(default_factory=SampleNumbers)


@dataclass
class BitsConfig:
    label: str = MISSING
    weight: int = MISSING
    act: int = MISSING


@dataclass
class SlotConfig:
    """The rule of one kind of tensor, or null."""

    label: str = ""
    quantizer: Any = None
    interval: str = "static"  # of weights: static, max_abs or channel_range; activations take theirs from the group tdq


@dataclass
class CalibrationConfig:
    """The calibration set of post-training quantization; see `fit/calibration_sets.py`."""

    label: str = ""
    kind: str = "none"  # none, uniform, ndtc, ndtc_published, forward
    samples: int = 0
    images: int = 0
    mu: float = 0.4
    sigma: float = 0.4
    seed: int = 0
    path: str | None = None  # a finished set to use; made and cached if not given


@dataclass
class TdqConfig:
    label: str = ""
    interval: Any = MISSING
    zero_point: str = "by_role"  # static, lower_bound, by_role


@dataclass
class PlanConfig:
    label: str = ""
    plan: Any = MISSING


@dataclass
class HabitsConfig:
    label: str = ""
    habits: Any = MISSING


@dataclass
class MethodConfig:
    label: str = MISSING
    quantized: bool = True
    calibration: str = ""  # label of the calibration set that the method's name stands for


@dataclass
class FitConfig(FitNumbers):
    label: str = ""
    kind: str = MISSING  # none, pretrain, qat, ptq
    part: str = "network"  # pretrain: which part of the model; network, or autoencoder
    updates: int = 0
    batch_size: int = 1
    lr: float = 0.0
    weight_decay: float = 0.0
    lr_step_size: float = 0.0  # of step sizes (static and per-step intervals, weights' steps)
    lr_zero_point: float = 0.0  # of zero points: the share of the grid that one update can move
    lr_generator: float = 0.0  # of TDQ's generators
    decay_generator: float = 0.0
    real_rounding: float = 0.2  # NIPQ: last share of the updates that trains with real rounding
    calibration_samples: int = 1024
    reconstruct: bool = False  # ptq: block by block, or calibration alone
    power: float = 2.4  # ptq: of a block's loss
    balance: bool = False  # ptq: let every time step weigh alike in a block's loss
    rounding: str = "nearest"  # ptq: of weights, or adaround
    rounding_updates: int = 20000  # adaround: updates of each block, as published
    lr_rounding: float = 1.0e-3
    rounding_weight: float = 0.01
    memory_gb: float = 4.0  # ptq: budget; what does not fit goes to files
    report: str = "last"
    export: str | None = None  # pretrain: also write the weights here
    stop_after: int = 0


@dataclass
class SamplerConfig:
    label: str = MISSING
    method: Any = MISSING
    steps: int = MISSING
    spacing: str = "leading"
    eta: float = 0.0
    clip: bool = False
    offset: int = 0
    final_alpha_one: bool = True
    images: int = MISSING
    batch: int = MISSING
    seed: int = 0
    truncate: bool = False
    engine: str = "fake"  # simulated quantization, or integer
    min_speedup: float = 1.0  # integer: least gain of a layer that runs on integers; 0 takes every one that can
    png: bool = False  # also write every image as a PNG


@dataclass
class EvalConfig:
    label: str = MISSING
    features: Any = MISSING
    metrics: list[str] = field(default_factory=lambda: ["fid", "isc", "kid"])  # also prc: precision and recall
    batch: int = 50
    reference_images: int | None = None  # the first so many of the training set; all of them if null


@dataclass
class TrackerConfig:
    kind: str = "none"  # none, offline, wandb
    project: str = "tdq_exp"


@dataclass
class LauncherConfig:
    nproc: str = "auto"  # a number, or auto: every visible GPU, 1 on a CPU
    cpu: bool = False
    threads: int = 0  # torch threads of each process; 0 leaves torch's default


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocol: Protocol = field(default_factory=Protocol)
    bits: BitsConfig = field(default_factory=BitsConfig)
    weight: SlotConfig = field(default_factory=SlotConfig)
    act: SlotConfig = field(default_factory=SlotConfig)
    tdq: TdqConfig = field(default_factory=TdqConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    habits: HabitsConfig = field(default_factory=HabitsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    seed: int = 0
    label: str = ""  # appended to the fit's name: set it when you change numbers
    out: str = "results"
    plan_only: bool = False  # print what would be done, its cost, and stop
    traceback: bool = False  # show where an error was raised, in place of one line
    go: bool = False  # start a paper-scale run although there is no GPU


def fit_name(cfg: DictConfig) -> str:
    """`${model}_${bits}_${method}[_${tdq}]`, then the label of every other group that differs from its default."""
    parts = [cfg.model.label, cfg.bits.label if cfg.method.quantized else "", cfg.method.label]
    parts += [cfg[group].label for group in ("tdq", "weight", "act", "plan", "habits", "data", "fit")]
    if cfg.calibration.label != cfg.method.calibration:
        parts.append(cfg.calibration.label)
    parts += ["balanced" if cfg.fit.balance else "", "adaround" if cfg.fit.rounding == "adaround" else "", cfg.label]
    return "_".join(part for part in parts if part)


def sample_name(cfg: DictConfig) -> str:
    """Sampler, number of images, and whatever differs from the defaults: `ddim50_n5000`, `ddim50quad_n5000_seed1`."""
    s = cfg.sampler
    name = (
        s.label + ("" if s.spacing == "leading" else s.spacing) + (f"eta{s.eta:g}" if s.eta else "") + f"_n{s.images}"
    )
    name += f"_seed{s.seed}" if s.seed else ""
    name += "_best5" if cfg.fit.report == "best_of_5" else ""
    if s.engine != "fake":
        name += f"_{s.engine}" + (f"{s.min_speedup:g}" if s.min_speedup != 1 else "")
    return name


def run_folder(cfg: DictConfig) -> Path:
    """`<out>/runs/<fit name>/seed<k>`."""
    return Path(cfg.out).expanduser().resolve() / "runs" / fit_name(cfg) / f"seed{cfg.seed}"


def plain(node: Any) -> Any:
    """A config node as dicts, lists and scalars, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def read_yaml(path: Path) -> Any:
    """A YAML file as dicts, lists and scalars; `${...}` stays as written, for whoever composes a config of it."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def validate(cfg: DictConfig) -> None:
    """Everything that can be said of a config without reading a file.

    Raises:
        ValueError: one line that names the key.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value: choose an option of its group, or set it")
    if cfg.method.quantized:
        for kind in ("weight", "act"):
            if cfg.bits[kind] not in BITS:
                raise ValueError(f"bits.{kind}={cfg.bits[kind]}: must be a whole number from {BITS[0]} to {BITS[-1]}")
    for key in (
        "fit.batch_size",
        "fit.calibration_samples",
        "sampler.batch",
        "sampler.images",
        "sampler.steps",
        "eval.batch",
    ):
        if OmegaConf.select(cfg, key) < 1:
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)}: must be at least 1")
    if cfg.fit.kind not in ("none", "pretrain", "qat", "ptq"):
        raise ValueError(f"fit.kind={cfg.fit.kind!r}: choose none, pretrain, qat or ptq")
    if cfg.fit.part != "network" and cfg.fit.kind != "pretrain":
        raise ValueError(f"fit.part={cfg.fit.part}: only a pre-training has a choice (fit=pretrain_autoencoder)")
    if (cfg.fit.kind in ("qat", "ptq")) != cfg.method.quantized:
        raise ValueError(f"fit.kind={cfg.fit.kind} does not go with method={cfg.method.label}")
    if cfg.fit.report not in REPORTS:
        raise ValueError(f"fit.report={cfg.fit.report!r}: choose one of {', '.join(REPORTS)}")
    if cfg.fit.rounding != "nearest" and not cfg.fit.reconstruct:
        raise ValueError(
            f"fit.rounding={cfg.fit.rounding}: is learned by a block's reconstruction, and fit.reconstruct=false makes none"
        )
    if cfg.fit.kind == "ptq" and cfg.fit.reconstruct and cfg.tdq.interval._target_.endswith("DynamicIntervals"):
        raise ValueError(
            f"tdq={cfg.tdq.label}: ranges that are read from the input can't be reconstructed; use method=minmax"
        )
    if cfg.fit.report == "best_of_5" and "fid" not in cfg.eval.metrics:
        raise ValueError("fit.report=best_of_5 chooses by fid: eval.metrics must hold it")
    if cfg.tracker.kind not in TRACKERS:
        raise ValueError(f"tracker.kind={cfg.tracker.kind!r}: choose one of {', '.join(TRACKERS)}")
    for key in (
        "fit.lr",
        "fit.warmup",
        "fit.grad_clip",
        "sampler.eta",
        "sampler.min_speedup",
        "fit.weight_decay",
        "launcher.threads",
    ):
        if OmegaConf.select(cfg, key) < 0:
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)}: must not be negative")
    if not 0 <= cfg.fit.real_rounding <= 1:
        raise ValueError(f"fit.real_rounding={cfg.fit.real_rounding}: a share of the updates, from 0 to 1")
    if (cfg.fit.kind == "ptq") != (cfg.calibration.kind != "none"):
        raise ValueError(
            f"calibration.kind={cfg.calibration.kind}: does not go with fit.kind={cfg.fit.kind}; post-training"
            " quantization needs a calibration set, and nothing else takes one"
        )
    if (cfg.fit.kind == "ptq") != (cfg.weight.interval == "channel_range"):
        raise ValueError(
            f"weight.interval={cfg.weight.interval}: does not go with fit.kind={cfg.fit.kind}; weights that follow their"
            " channels' ranges (weight=minmax) are for post-training quantization, which takes no others"
        )
    if cfg.fit.report == "best_of_5" and cfg.fit.kind != "qat":
        raise ValueError("fit.report=best_of_5 needs a fit with checkpoints (fit=qat)")
    if cfg.sampler.engine not in ("fake", "integer"):
        raise ValueError(f"sampler.engine={cfg.sampler.engine!r}: choose fake (simulated quantization) or integer")
    if cfg.sampler.engine == "integer" and not cfg.method.quantized:
        raise ValueError(f"sampler.engine=integer does not go with method={cfg.method.label}, which is not quantized")
    total = OmegaConf.select(cfg, "model.definition.schedule.steps")
    if total is not None and cfg.sampler.steps > total:
        raise ValueError(f"sampler.steps={cfg.sampler.steps}: must be between 1 and the model's {total} time steps")
    if cfg.launcher.nproc != "auto" and not (cfg.launcher.nproc.isdecimal() and int(cfg.launcher.nproc) > 0):
        raise ValueError(f"launcher.nproc={cfg.launcher.nproc}: a positive number, or auto")
    if cfg.seed < 0 or cfg.sampler.seed < 0:
        raise ValueError("seed and sampler.seed must not be negative")
    if cfg.data.limit is not None and cfg.data.limit < 1:
        raise ValueError(f"data.limit={cfg.data.limit}: must be at least 1")
