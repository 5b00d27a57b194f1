"""EfficientNet-Lite0 on ONNX Runtime: the same features, about four times as fast on a CPU.

Nine tenths of the network's products are 1x1 convolutions of small images. ONNX Runtime folds batch
normalisation and ReLU6 into them and keeps channels in blocks; torch runs each as an operation of
its own. The values differ by float32 rounding (relative 1e-6).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

_OPSET, _IR = 17, 8


class LiteSession:
    """The layers "pool" and "logits" of an EfficientNet-Lite, computed by ONNX Runtime.

    Args:
        network: an `EfficientNet` of the package efficientnet_lite_pytorch in eval mode, with ReLU6
            and without squeeze and excitation.
    """

    engine = f"onnxruntime {onnxruntime.__version__}"

    def __init__(self, network: Any) -> None:
        self.model = _Graph(network).serialized()
        self.sessions: dict[int, onnxruntime.InferenceSession] = {}

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute both layers.

        Args:
            x: normalised images, float32 `[N, 3, 224, 224]`, on the CPU.

        Returns:
            "pool" `[N, 1280]` and "logits" `[N, 1000]`.
        """
        # As many threads as torch has now.
        threads = torch.get_num_threads()
        if threads not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self.sessions[threads] = onnxruntime.InferenceSession(
                self.model, options, providers=["CPUExecutionProvider"]
            )

        found = self.sessions[threads].run(["pool", "logits"], {"x": x.contiguous().numpy()})
        return tuple(torch.from_numpy(values) for values in found)


class _Graph:
    """The ONNX graph of an EfficientNet-Lite, node after node."""

    def __init__(self, network: Any) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.low = self._constant("low", np.float32(0))
        self.high = self._constant("high", np.float32(6))

        x = self._convolution("x", network._conv_stem, network._bn0, relu=True)
        for block in network._blocks:
            x = self._block(x, block)
        x = self._convolution(x, network._conv_head, network._bn1, relu=True)

        pooled = self._node("ReduceMean", [x], axes=[2, 3], keepdims=0, output="pool")
        weight = self._constant("fc_weight", _array(network._fc.weight))
        bias = self._constant("fc_bias", _array(network._fc.bias))
        self._node("Gemm", [pooled, weight, bias], transB=1, output="logits")

    def serialized(self) -> bytes:
        """Return the model's bytes."""
        shapes: dict[str, list[str | int | None]] = {
            "x": ["N", 3, 224, 224],
            "pool": ["N", 1280],
            "logits": ["N", 1000],
        }
        values = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        }
        graph = helper.make_graph(
            self.nodes,
            "efficientnet_lite",
            [values["x"]],
            [values["pool"], values["logits"]],
            initializer=self.weights,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
        )
        return bytes(model.SerializeToString())

    def _block(self, x: str, block: Any) -> str:
        """Add one inverted residual block and return the name of its output."""
        y = x
        if hasattr(block, "_expand_conv"):
            y = self._convolution(y, block._expand_conv, block._bn0, relu=True)
        y = self._convolution(y, block._depthwise_conv, block._bn1, relu=True)
        y = self._convolution(y, block._project_conv, block._bn2, relu=False)

        # The package's own condition: a stride of [1] is not equal to 1, so that the first block of
        # a stage has no shortcut.
        args = block._block_args
        if block.id_skip and args.stride == 1 and args.input_filters == args.output_filters:
            y = self._node("Add", [y, x])
        return y

    def _convolution(self, x: str, layer: Any, norm: nn.BatchNorm2d, relu: bool) -> str:
        """Add a convolution, its batch normalisation and, if asked for, ReLU6."""
        # Zeros around the image: left, right, top, bottom in torch; top, left, bottom, right here.
        left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
        kernel = self._constant(f"weight{len(self.nodes)}", _array(layer.weight))
        y = self._node(
            "Conv",
            [x, kernel],
            strides=list(layer.stride),
            group=layer.groups,
            pads=[top, left, bottom, right],
        )

        statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        names = [
            self._constant(f"norm{len(self.nodes)}_{k}", _array(values))
            for k, values in enumerate(statistics)
        ]
        y = self._node("BatchNormalization", [y, *names], epsilon=norm.eps)
        return self._node("Clip", [y, self.low, self.high]) if relu else y

    def _node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, values: np.ndarray | np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def _array(values: torch.Tensor | None) -> np.ndarray:
    assert values is not None  # a normalisation with statistics and affine parameters has all four
    return values.detach().cpu().contiguous().numpy()
