"""The root of the configuration: its groups, and the checks that concern more than one of them.

Each group is the dataclass of the component that consumes it, or one of `groups`; the group `fit`
is of the class that the registry gives for its kind. Free of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdq_exp.config import setting as settings
from tdq_exp.config.groups import (
    ActConfig,
    BitsConfig,
    DataConfig,
    HabitsConfig,
    MethodConfig,
    ModelConfig,
    PlanConfig,
    Protocol,
    TdqConfig,
    WeightConfig,
)
from tdq_exp.config.records import texts
from tdq_exp.config.setting import SEED, setting
from tdq_exp.experiment.options import EvalOptions, SamplerOptions
from tdq_exp.fit.calibration_options import CalibrationSpec
from tdq_exp.fit.options import (
    FitOptions,
    LoadOptions,
    PretrainOptions,
    PtqNumbers,
    PtqOptions,
    QatNumbers,
    QatOptions,
    TrainOptions,
)
from tdq_exp.fit.registry import OPTIONS, options_class
from tdq_exp.runtime.options import LauncherOptions, TrackerOptions

# Groups that say how a network is quantized; `model` says what it is.
QUANTIZERS = ("bits", "weight", "act", "tdq", "plan", "habits")


@dataclass
class Config:
    """A whole experiment: the root of the configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocol: Protocol = field(default_factory=Protocol)
    bits: BitsConfig = field(default_factory=BitsConfig)
    weight: WeightConfig = field(default_factory=WeightConfig)
    act: ActConfig = field(default_factory=ActConfig)
    tdq: TdqConfig = field(default_factory=TdqConfig)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    plan: PlanConfig = field(default_factory=PlanConfig)
    habits: HabitsConfig = field(default_factory=HabitsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    fit: FitOptions = field(default_factory=FitOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    tracker: TrackerOptions = field(default_factory=TrackerOptions)
    launcher: LauncherOptions = field(default_factory=LauncherOptions)
    seed: int = setting(0, low=0, high=SEED, help="seed of the fit; sampling has sampler.seed")
    label: str = setting(
        "", is_name=True, help="appended to the fit's name: set it when you change numbers"
    )
    out: str = setting("results", help="folder of results")
    smoke: bool = setting(False, help="a two-step trial run; set by debug=smoke")
    plan_only: bool = setting(False, help="print what would be done, its cost, and stop")
    traceback: bool = setting(False, help="show where an error was raised, in place of one line")
    go: bool = setting(False, help="start a paper-scale run although there is no GPU")


def nodes() -> Iterator[tuple[str | None, str, Any]]:
    """Yield (group, name, node) of all that Hydra is to know: the root, and each kind of fit.

    A fit's node reads the numbers of its protocol by interpolation; `configs/fit` adds the rest.
    """
    yield None, "schema", Config
    yield None, "options_of_none", LoadOptions
    yield None, "options_of_pretrain", _from_protocol(PretrainOptions, "pretrain", TrainOptions)
    yield (
        None,
        "options_of_autoencoder",
        _from_protocol(PretrainOptions, "autoencoder", TrainOptions),
    )
    yield None, "options_of_qat", _from_protocol(QatOptions, "qat", QatNumbers)
    yield None, "options_of_ptq", _from_protocol(PtqOptions, "ptq", PtqNumbers)


def _from_protocol(options: type[FitOptions], part: str, numbers: type[Any]) -> FitOptions:
    """Return options whose numbers are those of a part of the protocol."""
    names = [f.name for f in dataclasses.fields(numbers)]
    return options(**{name: f"${{protocol.{part}.{name}}}" for name in names})


def parts_of(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a group that a result depends on, as parts of a fingerprint.

    Args:
        group: name of a config group; the keys of `fit` depend on its kind.
        values: the group, plain.
    """
    return settings.fingerprint_keys(class_of(group, values), values)


def groups() -> list[str]:
    """Return the config groups: the fields of `Config` that hold a dataclass."""
    fields = dataclasses.fields(Config)
    return [field.name for field in fields if dataclasses.is_dataclass(field.default_factory)]


def class_of(group: str, values: Mapping[str, Any]) -> type[Any]:
    """Return the dataclass that declares the keys of a group; that of `fit` depends on its kind.

    Args:
        group: name of a config group.
        values: the group, plain.
    """
    if group == "fit":
        return options_class(values["kind"])
    (node,) = (field for field in dataclasses.fields(Config) if field.name == group)
    return node.default_factory  # type: ignore[return-value]


def root_of(kind: Any) -> DictConfig:
    """Return the root without values, its fit of a kind; a recorded config is merged into it.

    Args:
        kind: stable name of the fit.

    Raises:
        ValueError: if there is no such fit.
    """
    root: DictConfig = OmegaConf.structured(Config)
    root.fit = OmegaConf.structured(options_class(kind))
    return root


def known_keys() -> dict[str, set[str]]:
    """Return, for groups that were one flat bag in older records, every key of any kind."""
    fits = {f.name for options in OPTIONS.values() for f in dataclasses.fields(options)}
    slot = {f.name for f in dataclasses.fields(WeightConfig)}
    protocol = {f"protocol.{part}": fits for part in ("pretrain", "autoencoder", "qat")}
    return {"fit": fits, "act": slot, **protocol}


def plain(node: Any) -> Any:
    """Return a config node as dicts, lists and scalars, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def typed(cfg: DictConfig) -> Config:
    """Return a composed config as its dataclasses, every value checked.

    Raises:
        ValueError: one line that names the key.
    """
    try:
        return _typed(cfg)
    except OmegaConfBaseException as error:
        raise one_line(error) from error


def one_line(error: OmegaConfBaseException) -> ValueError:
    """Return an error of OmegaConf's as one line that names the key."""
    key = getattr(error, "full_key", None)
    return ValueError(f"{key}: {str(error).splitlines()[0]}")


def _typed(cfg: DictConfig) -> Config:
    # An interpolation of a missing value needs no look: what it names is among the values.
    if MISSING in texts(OmegaConf.to_container(cfg)):
        missing = sorted(OmegaConf.missing_keys(cfg))
        raise ValueError(f"{missing[0]} has no value: choose an option of its group, or set it")

    # Types that a merge may have replaced, and keys that none of them declares.
    options = options_class(cfg.fit.kind)
    if OmegaConf.get_type(cfg.fit) is not options:
        raise ValueError(
            f"fit.kind={cfg.fit.kind!r}: is not the kind of this fit; choose it as fit=OPTION"
        )

    for group in dataclasses.fields(Config):
        _require_known_keys(cfg[group.name], group.name)

    config: Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    validate(config)
    return config


def _require_known_keys(node: Any, prefix: str) -> None:
    """Refuse keys that the dataclass of a node does not declare, in the node or below it.

    Raises:
        ValueError: naming the key.
    """
    declared = OmegaConf.get_type(node) if OmegaConf.is_dict(node) else None
    if declared is None or not dataclasses.is_dataclass(declared):
        return

    unknown = settings.unknown_keys(declared, node)
    if unknown:
        raise ValueError(f"{prefix}.{unknown[0]}: there is no such key")
    for option in dataclasses.fields(declared):
        _require_known_keys(node._get_node(option.name), f"{prefix}.{option.name}")


def validate(config: Config) -> None:
    """Check everything that can be said of a config without reading a file.

    Raises:
        ValueError: one line that names the key.
    """
    # The protocol first, where most numbers come from; a part that it does not set has no meaning.
    settings.check(config.protocol, "protocol", defaults=False)

    settings.check(config, "", skip=("protocol",))

    config.fit.check()
    config.launcher.check()
    _check_method(config)
    _check_measures(config)


def _check_method(config: Config) -> None:
    """Refuse a fit that does not go with the method, its calibration set or its quantizers."""
    fit, method = config.fit, config.method

    # Each pair of choices that contradict each other, with what to choose instead.
    if fit.quantizes != method.quantized:
        raise ValueError(f"fit.kind={fit.kind} does not go with method={method.label}")

    for name, quantizer in (("act", config.act.quantizer), ("weight", config.weight.quantizer)):
        if method.quantized and quantizer is None:
            raise ValueError(
                f"{name}.quantizer=null: method={method.label} quantizes; choose {name}=OPTION, or"
                " method=fp"
            )

    if fit.needs_calibration_set != config.calibration.wanted:
        raise ValueError(
            f"calibration.kind={config.calibration.kind}: does not go with fit.kind={fit.kind};"
            " post-training quantization needs a calibration set, and nothing else takes one"
        )

    if fit.needs_calibration_set != (config.weight.interval == "channel_range"):
        raise ValueError(
            f"weight.interval={config.weight.interval}: does not go with fit.kind={fit.kind};"
            " weights that follow their channels' ranges (weight=minmax) are for post-training"
            " quantization, which takes no others"
        )


def _check_measures(config: Config) -> None:
    """Refuse sampling or measuring that the fit or the model can't have."""
    _check_sampler(config.sampler)

    if config.fit.chooses_checkpoint and "fid" not in config.eval.metrics:
        raise ValueError("fit.report=best_of_5 chooses by fid: eval.metrics must hold it")

    if config.sampler.engine == "integer" and not config.method.quantized:
        raise ValueError(
            f"sampler.engine=integer does not go with method={config.method.label}, which is not"
            " quantized"
        )

    definition = config.model.definition
    schedule = definition.get("schedule") if isinstance(definition, Mapping) else None
    total = schedule.get("steps") if isinstance(schedule, Mapping) else None
    if isinstance(total, int) and 0 < total < config.sampler.steps:
        raise ValueError(
            f"sampler.steps={config.sampler.steps}: must be between 1 and the model's {total} time"
            " steps"
        )


def _check_sampler(sampler: SamplerOptions) -> None:
    """Refuse a sampler whose own keys contradict those of the group, which name its images."""
    if not isinstance(sampler.method, Mapping):
        raise ValueError(f"sampler.method={sampler.method}: must name a sampler by its _target_")

    for option in dataclasses.fields(sampler):
        name = option.name
        own = sampler.method.get(name, getattr(sampler, name))
        if own != getattr(sampler, name):
            raise ValueError(f"sampler.method.{name}={own}: set sampler.{name} instead")
