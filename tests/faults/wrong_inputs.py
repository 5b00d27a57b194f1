"""Wrong inputs: overrides of a command line, and words that the one line of the answer must hold.

Each is refused before a file is written, in one line, without a traceback. Every entry stands for a
kind: a range, a type, a name that is a path, a key that is misspelt, a file that is not there, a
choice that contradicts another. `tests/faults/test_wrong_inputs.py` tries them all in process;
the base of each is `BASE`, a model of a few thousand parameters.
"""

from __future__ import annotations

from typing import NamedTuple

BASE = ("model=tiny", "launcher=cpu", "tracker=none", "debug=smoke")
PTQ = ("method=ptq4dm",)
ADAROUND = (*PTQ, "fit.rounding=adaround")
PRETRAIN = ("method=fp", "fit=pretrain")
LATENT = ("model=tiny_latent", "method=fp", "fit=pretrain_autoencoder")
GROUPS = ("tdq=s10",)
DYNAMIC = ("tdq=dynamic",)
FOLDER = ("data=image_folder",)
INCEPTION = ("eval=inception",)

NOT_FINITE = ("nan", "inf")
NETWORK = "model.definition.network"


class Wrong(NamedTuple):
    """A wrong input.

    Args:
        overrides: beside `BASE`; the last one is the mistake.
        words: of the answer, each of which must be in it.
    """

    overrides: tuple[str, ...]
    words: tuple[str, ...]


def _numbers(
    keys: str, values: tuple[str, ...], word: str, choices: tuple[str, ...] = ()
) -> list[Wrong]:
    """Return every key with every value; the answer names the key and says `word`."""
    return [
        Wrong((*choices, f"{key}={value}"), (f"{key}=", word))
        for key in keys.split()
        for value in values
    ]


RATES = "fit.lr fit.lr_step_size fit.lr_zero_point fit.lr_generator"
DECAYS = "fit.weight_decay fit.decay_generator fit.grad_clip"
OF_PTQ = "fit.lr fit.lr_zero_point fit.lr_generator fit.power fit.memory_gb"
OF_ADAROUND = "fit.lr_rounding fit.rounding_weight fit.beta_start fit.beta_end"

NUMBERS = [
    # Rates, decays and other numbers of a fit.
    *_numbers(f"{RATES} {DECAYS}", ("-1",), "negative"),
    *_numbers(f"{RATES} {DECAYS} fit.ema_decay fit.real_rounding", NOT_FINITE, "finite"),
    *_numbers(RATES, ("1e30", "1e300"), "at most"),
    *_numbers("fit.ema_decay", ("1", "1.5"), "below 1"),
    *_numbers("fit.real_rounding", ("-0.1", "1.1"), "from 0 to 1"),
    *_numbers("fit.updates fit.batch_size fit.validate_every", ("0", "-1"), "at least 1"),
    *_numbers("fit.validation_samples fit.calibration_samples", ("0", "-1"), "at least 1"),
    *_numbers("fit.warmup fit.stop_after", ("-1",), "negative"),
    *_numbers("fit.updates fit.batch_size fit.validation_samples", ("1" + "0" * 20,), "at most"),
    *_numbers(OF_PTQ, NOT_FINITE, "finite", PTQ),
    *_numbers("fit.lr fit.lr_zero_point fit.lr_generator", ("-1",), "negative", PTQ),
    *_numbers("fit.power fit.memory_gb", ("0", "-1"), "positive", PTQ),
    *_numbers("fit.power fit.memory_gb", ("1e30",), "at most", PTQ),
    *_numbers("fit.updates fit.rounding_updates", ("0", "-1"), "at least 1", PTQ),
    *_numbers("fit.validation_samples fit.batch_size", ("0",), "at least 1", PTQ),
    *_numbers(OF_ADAROUND, NOT_FINITE, "finite", ADAROUND),
    *_numbers("fit.lr_rounding fit.rounding_weight", ("-1",), "negative", ADAROUND),
    *_numbers("fit.beta_start fit.beta_end", ("0", "-1"), "positive", ADAROUND),
    *_numbers("fit.rounding_warmup", ("-1", "1.5"), "from 0 to 1", ADAROUND),
    *_numbers("fit.stop_after", ("-1",), "negative", PTQ),
    # The same numbers where a protocol holds them.
    *_numbers("protocol.qat.lr protocol.pretrain.lr", ("-1",), "negative"),
    *_numbers("protocol.ptq.lr protocol.qat.lr_step_size", ("nan",), "finite"),
    *_numbers("protocol.ptq.samples protocol.sampling.images", ("-1",), "at least 1"),
    # A calibration set.
    *_numbers("calibration.mu calibration.sigma", NOT_FINITE, "finite", PTQ),
    *_numbers("calibration.mu", ("-1", "2"), "from 0 to 1", PTQ),
    *_numbers("calibration.sigma", ("-1",), "negative", PTQ),
    *_numbers("calibration.seed", ("-1", "1" + "0" * 30), "from 0 to", PTQ),
    *_numbers("calibration.samples", ("7", "-8"), "multiple", PTQ),
    # Seeds, images, and how they are sampled and measured.
    *_numbers("seed sampler.seed", ("-1", "1" + "0" * 30), "from 0 to"),
    *_numbers("sampler.images sampler.batch eval.batch", ("0", "-1"), "at least 1"),
    *_numbers("sampler.images sampler.batch eval.batch", ("1" + "0" * 15,), "at most"),
    *_numbers("sampler.steps", ("0", "-1"), "at least 1"),
    *_numbers("sampler.steps", ("1001",), "1000 time steps"),
    *_numbers("sampler.eta", ("-1", "2", "1.0001"), "from 0 to 1"),
    *_numbers("sampler.eta sampler.min_speedup", NOT_FINITE, "finite"),
    *_numbers("sampler.min_speedup", ("-1",), "negative"),
    *_numbers("eval.reference_images data.limit", ("0", "-5"), "at least 1"),
    *_numbers("data.limit", ("1" + "0" * 25,), "at most"),
    *_numbers("bits.weight bits.act", ("0", "1", "17"), "from 2 to 16"),
    # Processes and threads.
    *_numbers("launcher.threads", ("-1",), "negative"),
    *_numbers("launcher.threads", ("1000000",), "at most"),
    *_numbers("launcher.nproc", ("0", "-1", "1.5", "abc", "1000000"), "or auto"),
]

# Arguments of the classes that a configuration names.
ARGUMENTS = [
    *_numbers("tdq.interval.groups", ("2.5", "abc", "true", "null"), "whole number", GROUPS),
    *_numbers("tdq.interval.groups", ("0", "-1"), "at least 1", GROUPS),
    *_numbers("tdq.interval.groups", ("1001",), "1000 time steps", GROUPS),
    *_numbers("tdq.interval.width tdq.interval.layers", ("2.5", "abc"), "whole number"),
    *_numbers("tdq.interval.width tdq.interval.layers", ("0", "-1"), "at least 1"),
    *_numbers("tdq.interval.width", ("100000000",), "at most"),
    *_numbers("tdq.interval.encoding", ("7",), "even"),
    *_numbers("tdq.interval.dropout", ("2", "1"), "below 1"),
    *_numbers("tdq.interval.dropout", ("nan",), "finite"),
    Wrong(("habits.habits.dropout=nan",), ("dropout=nan", "finite")),
    *_numbers("tdq.interval.he", ("7", "abc"), "true or false"),
    *_numbers("tdq.interval.per_sample", ("7",), "true or false", DYNAMIC),
    *_numbers("model.definition.schedule.steps", ("0", "-1"), "at least 1"),
    *_numbers("model.definition.schedule.steps", ("1.5", "abc"), "whole number"),
    *_numbers("model.definition.schedule.beta_end", ("nan",), "finite"),
    *_numbers(f"{NETWORK}.sample_size {NETWORK}.in_channels", ("0", "-8"), "at least 1"),
    *_numbers(f"{NETWORK}.sample_size {NETWORK}.in_channels", ("2.5", "abc"), "whole number"),
    *_numbers(f"{NETWORK}.layers_per_block", ("0", "-1"), "at least 1"),
    *_numbers(f"{NETWORK}.layers_per_block", ("1000000000",), "at most"),
    *_numbers(f"{NETWORK}.dropout", ("2",), "below 1"),
    *_numbers(f"{NETWORK}.norm_eps", ("nan",), "finite"),
    Wrong((f"{NETWORK}.sample_size=9",), (NETWORK, "[1, 1, 9, 9]")),
    *_numbers(f"{NETWORK}.flip_sin_to_cos", ("abc", "2.5", "[]"), "true or false"),
    *_numbers(f"{NETWORK}.freq_shift {NETWORK}.attention_head_dim", ("true",), "a number"),
    Wrong((f"+{NETWORK}.downsample_type=abc",), ("downsample_type=abc", "conv or resnet")),
    Wrong((f"+{NETWORK}.upsample_type=''",), ("upsample_type=", "conv or resnet")),
    Wrong(
        (f"+{NETWORK}.resnet_time_scale_shift=abc",),
        ("resnet_time_scale_shift=abc", "default or scale_shift"),
    ),
    Wrong((f"{NETWORK}.norm_num_groups=3",), (NETWORK, "num_groups")),
    Wrong((f"{NETWORK}.block_out_channels=[8]",), (NETWORK,)),
    Wrong((f"{NETWORK}.block_out_channels=[8,-16]",), (NETWORK, "at least 1")),
    Wrong((f"{NETWORK}.block_out_channels=[16000,60000]",), (NETWORK, "GB")),
    Wrong((f"{NETWORK}.block_out_channels=8",), (NETWORK,)),
    Wrong((f"{NETWORK}.down_block_types=[Nope,Nope]",), (NETWORK, "Nope")),
    Wrong((f"+{NETWORK}.layers_per_blocks=1",), (NETWORK, "did you mean layers_per_block?")),
    Wrong((f"+{NETWORK}.class_embed_type=timestep",), (NETWORK, "num_class_embeds=N")),
    Wrong((f"{NETWORK}.out_channels=2",), (f"{NETWORK}.out_channels=2", "channels")),
    Wrong(("model.definition=null",), ("model.definition",)),
    Wrong(("model.definition._target_=tdq_exp.quant.Lsq",), ("model.definition",)),
    Wrong(("model.definition.schedule=null",), ("model.definition.schedule", "_target_")),
    Wrong(("model.definition.loss=l3",), ("model.definition.loss=l3", "l1")),
    Wrong(("+model.definition.attention_heads=3",), ("attention_heads=3", "divide")),
    Wrong(("+sampler.method.nope=1",), ("sampler.method.nope", "no such key")),
    Wrong(("sampler.method.eta=0.5",), ("sampler.method.eta=0.5", "sampler.eta")),
    Wrong(("sampler.method._target_=os.system",), ("sampler.method",)),
    Wrong(("+tdq.interval.widht=64",), ("tdq.interval.widht", "did you mean width?")),
    Wrong(("+plan.plan.edge_bits=99",), ("plan.plan.edge_bits=99", "from 2 to 16")),
    Wrong(("+plan.plan.shortcut_bits=1",), ("plan.plan.shortcut_bits=1", "from 2 to 16")),
    Wrong(("+plan.plan.keep_float=first",), ("plan.plan.keep_float=first", "list")),
    Wrong(("+plan.plan.keep_float=[nope]",), ("plan.plan.keep_float", "nope")),
    Wrong(("+habits.habits.start=abc",), ("habits.habits.start", "moments")),
    Wrong(("+act.quantizer.nope=1",), ("act.quantizer.nope", "no such key")),
    Wrong(("act.quantizer._target_=tdq_exp.quant.Nope",), ("act.quantizer", "no such class")),
    Wrong(("act.quantizer=null",), ("act.quantizer=null", "act=OPTION")),
    Wrong(("act.quantizer=[]",), ("act.quantizer=[]", "Cannot merge")),
    Wrong(("act.quantizer._partial_=7",), ("act.quantizer._partial_=7", "true or false")),
    Wrong(("act.quantizer._partial_=false",), ("act.quantizer", "arguments")),
    Wrong(("act.quantizer._target_=../x",), ("act.quantizer._target_=../x", "dotted name")),
    Wrong(("act.quantizer._target_=tdq_exp.quant.Grid",), ("act.quantizer", "a quantizer")),
    Wrong(("act.quantizer._target_=tdq_exp.quant.Quantizer",), ("act.quantizer", "a quantizer")),
    *_numbers("tdq.interval plan.plan eval.features data.source", ("null",), "_target_"),
    Wrong(("habits.habits=null",), ("habits.habits",)),
    Wrong(("tdq.interval=[]",), ("tdq.interval=[]", "Cannot merge")),
    Wrong(("plan.plan._target_=tdq_exp.quant.Grid",), ("plan.plan", "Grid")),
    Wrong(("eval.features=7",), ("eval.features=7", "_target_")),
    Wrong(("eval.features.weights=7",), ("eval.features.weights=7", "text")),
    Wrong(("sampler.offset=1" + "0" * 25,), ("sampler.offset=1", "1000 time steps")),
    Wrong(("fit.precision=${oops}",), ("fit.precision", "oops")),
    Wrong((*LATENT, "model.definition.autoencoder.batch=0"), ("autoencoder.batch=0",)),
    Wrong((*LATENT, "model.definition.autoencoder.batch=1" + "0" * 25), ("batch=1", "at most")),
    Wrong((*LATENT, "model.definition.autoencoder.scale=nan"), ("autoencoder.scale=nan",)),
    Wrong((*LATENT, "+model.definition.autoencoder.kl_weight=-1"), ("kl_weight=-1", "negative")),
    Wrong(("+eval.features.nope=1",), ("eval.features.nope", "no such key")),
    Wrong(("eval.features.weights=null",), ("eval.features.weights=None", "text")),
]

# Labels are parts of paths: nothing leaves the folder of results.
LABELS = [
    Wrong((f"{key}={value}",), (f"{key}=", "folder's name"))
    for key, value in [
        ("label", "../../../escaped"),
        ("label", "/tmp/escaped"),
        ("label", "."),
        ("label", ".."),
        ("label", ".hidden"),
        ("label", "-rf"),
        ("label", "a/b"),
        ("label", "'a b'"),
        ("label", "'é'"),
        ("label", "'*'"),
        ("label", "x" * 300),
        *(
            (f"{group}.label", value)
            for group in [
                "model",
                "sampler",
                "data",
                "method",
                "eval",
                "fit",
                "tdq",
                "bits",
                "plan",
                "act",
                "weight",
            ]
            for value in ("../../escaped", "/tmp/x")
        ),
        ("tracker.project", "../x"),
        ("protocol.scale", "../x"),
    ]
]

# Choices that are none, or that contradict each other.
CHOICES = [
    Wrong(("fit.precision=float16",), ("fit.precision='float16'", "bfloat16")),
    Wrong(("fit.precision=tf32",), ("fit.precision=tf32", "only GPUs have it")),
    Wrong(("launcher.micro_batches=0",), ("launcher.micro_batches=0", "at least 1")),
    Wrong(("fit.lr_schedule=linear",), ("fit.lr_schedule='linear'", "cosine")),
    Wrong(("fit.report=best",), ("fit.report='best'", "best_of_5")),
    Wrong(("fit.kind=ptq",), ("fit.kind='ptq'", "fit=OPTION")),
    Wrong(("sampler.spacing=abc",), ("sampler.spacing='abc'", "trailing")),
    Wrong(("sampler.engine=abc",), ("sampler.engine='abc'", "integer")),
    Wrong(("sampler.offset=-1",), ("offset=-1", "1000 time steps")),
    Wrong(("eval.metrics=[nope]",), ("eval.metrics", "kid")),
    Wrong(("eval.metrics=[]",), ("eval.metrics", "kid")),
    Wrong(("eval.metrics=[fid,fid]",), ("eval.metrics", "twice")),
    Wrong(("tdq.zero_point=abc",), ("tdq.zero_point", "abc")),
    Wrong(("weight.interval=abc",), ("weight.interval", "abc")),
    Wrong((*PTQ, "fit.rounding=abc"), ("fit.rounding='abc'", "adaround")),
    Wrong((*PTQ, "fit.report=best_of_5"), ("fit.report=best_of_5", "fit=qat")),
    Wrong((*PTQ, "calibration.kind=abc"), ("calibration.kind='abc'", "uniform")),
    Wrong((*PTQ, "tdq=dynamic"), ("tdq=dynamic", "minmax")),
    Wrong((*PTQ, "calibration=none"), ("calibration.kind=none",)),
    Wrong((*PTQ, "weight=lsq"), ("weight.interval=static",)),
    Wrong((*PRETRAIN, "fit.part=abc"), ("fit.part=abc",)),
    Wrong((*PRETRAIN, "fit.part=autoencoder"), ("fit.part=autoencoder",)),
    Wrong((*PRETRAIN, "model.autoencoder=/nowhere"), ("model.autoencoder=/nowhere",)),
]

# Files and folders that are not there, or are something else. `{folder}` holds what the test makes:
# `pipe` (a FIFO), `text` (a text file), `empty` (an empty folder).
FILES = [
    Wrong(("model.weights=/nowhere.ckpt",), ("model.weights=/nowhere.ckpt", "no such file")),
    Wrong(("model.weights=nowhere",), ("model.weights=nowhere", "no such file")),
    Wrong(("model.weights={folder}/pipe",), ("{folder}/pipe", "a pipe")),
    Wrong(("model.weights=/dev/zero",), ("/dev/zero", "a device")),
    Wrong(("model.weights={folder}/empty",), ("{folder}/empty", "config.json")),
    Wrong(("model.weights=shipped:nope",), ("shipped:nope", "digits")),
    Wrong(("model.weights=null",), ("model.weights has no value",)),
    Wrong(("eval.features.weights=/nowhere",), ("eval.features.weights=/nowhere",)),
    Wrong(("eval.features.weights={folder}/pipe",), ("{folder}/pipe", "a pipe")),
    Wrong(("eval.features.weights={folder}/text",), ("{folder}/text",)),
    Wrong((*INCEPTION, "eval.features.weights=/nowhere"), ("eval.features.weights=/nowhere",)),
    Wrong((*INCEPTION, "eval.features.weights={folder}/pipe"), ("{folder}/pipe", "a pipe")),
    Wrong((*INCEPTION, "eval.features.weights={folder}/text"), ("{folder}/text",)),
    Wrong((*PTQ, "calibration.path=/nowhere"), ("calibration.path=/nowhere", "about.json")),
    Wrong((*PTQ, "calibration.path={folder}/pipe"), ("calibration.path={folder}/pipe",)),
    Wrong((*PTQ, "calibration.path={folder}/empty"), ("{folder}/empty", "about.json")),
    Wrong((*FOLDER, "data.source.path=/nowhere"), ("data.source.path=/nowhere",)),
    Wrong((*FOLDER, "data.source.path={folder}/empty"), ("{folder}/empty",)),
    Wrong((*FOLDER, "data.source.path={folder}/pipe"), ("{folder}/pipe",)),
    Wrong(("data.cache={folder}/text",), ("data.cache={folder}/text", "no folder")),
    Wrong(("data.cache=/dev/null",), ("data.cache=/dev/null", "no folder")),
    Wrong(("out={folder}/pipe",), ("out=", "no folder")),
    Wrong(("out=''",), ("out has no value",)),
    Wrong(("model.weights=''",), ("model.weights has no value",)),
    Wrong((*PRETRAIN, "fit.export=/dev/null/x.safetensors"), ("fit.export=", "no folder")),
]

# What Hydra reads: its grammar, its groups, its types. Each needs a composition of its own.
GRAMMAR = [
    Wrong(
        ("model.weights=/x/epoch=9-step=99.ckpt",),
        ("\"model.weights='/x/epoch=9-step=99.ckpt'\"", "quotes"),
    ),
    Wrong(("fit=[qat",), ("\"fit='[qat'\"", "quotes")),
    Wrong(("out=/x/my runs (v2)",), ("\"out='/x/my runs (v2)'\"", "quotes")),
    Wrong(("label=a{b",), ("label=a{b", "quotes")),
    Wrong(("nonsense",), ("'nonsense'", "KEY=VALUE")),
    Wrong(("fit.updates=2.5",), ("fit.updates=2.5", "Integer")),
    Wrong(("fit.lr=abc",), ("fit.lr=abc", "Float")),
    Wrong(("fit=kind/qat",), ("fit/kind/qat", "ptq")),
    Wrong(("fit.nope=1",), ("fit.nope",)),
    Wrong(("+fit.nope=1",), ("fit.nope", "no such key")),
    Wrong(("+experiment=tiny_w4a4_lsp",), ("tiny_w4a4_lsp", "nearest")),
]

# Found with the data, still before a file is written.
LATE = [
    Wrong(("fit.batch_size=33",), ("fit.batch_size=33", "32 images")),
    Wrong((*PRETRAIN, "fit.batch_size=33"), ("fit.batch_size=33", "32 images")),
    Wrong(
        (*PTQ, "calibration=uniform", "calibration.samples=64"),
        ("calibration.samples=64", "2 steps"),
    ),
]

COMPOSED = [*NUMBERS, *ARGUMENTS, *LABELS, *CHOICES, *FILES]
ALL = [*COMPOSED, *GRAMMAR, *LATE]
