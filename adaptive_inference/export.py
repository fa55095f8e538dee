"""Export to one ONNX file that stops early, in any language that ONNX Runtime speaks.

    export_onnx(network, Path("network.onnx"), description, read_policy(Path("policy.json"), network))

    inputs    images (N, 3, S, S) uint8, thresholds (K,) float32
    outputs   classes (N,) int64, confidence (N,) float32, exits (N,) int64 (0-based), logits (N, C) float32 of the answers

An image leaves at the first exit whose largest softmax probability reaches that exit's threshold; nested ``If`` nodes run later blocks for
the others only. It is answered by that exit's logits, divided by its temperature, or by the ensemble of all exits so far. Normalisation is
inside; the file's metadata name the classes and the policies (``onnx_predictor.py`` reads them). Needs the package onnx
(requirements-export.txt). The folded network is recorded node by node, so nothing depends on PyTorch's exporter.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_inference.fingerprint import describe
from adaptive_inference.fold import fold
from adaptive_inference.policies import PolicyCurve
from models import Description, ExitNetwork, State, count_operations
from utils import UserError, atomic_write

FORMAT = "imta-msdnet onnx 3"
OPSET, IR_VERSION = 17, 8  # read by every ONNX Runtime since 1.12
POINT = ("rule", "p", "val_acc1", "operations")
OUTPUTS = {"classes": "INT64", "confidence": "FLOAT", "exits": "INT64", "logits": "FLOAT"}


def export_onnx(
    network: ExitNetwork, path: Path, description: Description, curve: PolicyCurve | None = None
) -> None:
    """Write ``network`` and what is known of it as one file.

    Args:
        network: ``MSDNet`` or ``IMTA``; it is folded on the way, and not changed.
        description: its classes and preprocessing, such as ``network.description``.
        curve: its policies, of which the best rule's go into the file: its points, and how they make answers.

    Raises:
        UserError: onnx is not installed, the images are too small, the policies do not compare softmax, or the file cannot be written.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("this needs the package onnx: pip install -r requirements-export.txt") from None
    size, points = description.data.image_size, curve.of_rule(None) if curve else ()
    try:
        network.check_image_size(size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if any(point.policy.measure != "softmax" for point in points):
        raise UserError(
            f"an ONNX file compares softmax alone; these policies are of {points[0].policy.measure}"
        )
    form = fold(network, channels_last=False, dtype=torch.float32).cpu()
    graph = _Graph(
        onnx, {id(parameter): name for name, parameter in form.named_parameters()}, itertools.count()
    )
    mean, std = (
        255 * np.array(values, np.float32).reshape(3, 1, 1)
        for values in (description.data.mean, description.data.std)
    )
    pixels = graph.add("Cast", [_Value(graph, "images")], to=onnx.TensorProto.FLOAT)
    images = graph.add("Div", [graph.add("Sub", [pixels, mean]), std])
    weights = np.array(points[0].policy.weights if points else np.eye(network.num_exits), np.float32)
    answer = _record_exits(graph, form, 0, form.start(images), {}, weights)
    answer = [graph.record("Identity", [x], [name])[0] for name, x in zip(OUTPUTS, answer, strict=True)]
    inputs = [
        graph.declared("images", "UINT8", ["N", 3, size, size]),
        graph.declared("thresholds", "FLOAT", [network.num_exits]),
    ]
    model = onnx.helper.make_model(
        graph.finished(answer, inputs, [["N"], ["N"], ["N"], ["N", network.num_classes]]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        producer_name="imta-msdnet",
        ir_version=IR_VERSION,
        doc_string="An image leaves at the first exit whose largest probability reaches that exit's threshold. Exits count from 0.",
    )
    metadata = {
        "class_names": list(description.data.class_names),
        "image_size": size,
        "operations": count_operations(network, size),
        "points": [
            {name: getattr(point, name) for name in POINT} | {"thresholds": point.policy.thresholds}
            for point in points
        ],
    }
    texts = {
        "format": FORMAT,
        "network": describe(form),
        "fingerprint": form.fingerprint,
        "confidence": "softmax",
    }
    onnx.helper.set_model_props(model, texts | {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(model)
    with atomic_write(path, "wb") as stream:
        stream.write(model.SerializeToString())


def _record_exits(
    graph: "_Graph",
    form: ExitNetwork,
    k: int,
    state: State,
    seen: dict[int, "_Value"],
    weights: np.ndarray,
) -> list["_Value"]:
    """Record exit ``k`` and all later ones for the images still here, n of them.

    Args:
        state: as for ``ExitNetwork.advance``.
        seen: logits (n, C) of earlier exits, those that are still needed.
        weights: (K, K), of all exits in the answers at each exit.

    Returns:
        ``OUTPUTS``, (n,) each but the logits (n, C), of the exits that answer.
    """
    features, state = form.advance(k, state)
    logits = form.classify_next(k, features, seen.get(k - 1))
    seen = {**seen, k: logits}
    answered = _sum(
        [
            x if weights[k, j] == 1 else graph.add("Mul", [x, weights[k, j]])
            for j, x in seen.items()
            if weights[k, j]
        ]
    )
    probs = graph.add("Softmax", [answered], axis=1)
    classes = graph.add("ArgMax", [probs], axis=1, keepdims=0)
    exits = graph.add("Expand", [np.array([k], np.int64), graph.add("Shape", [classes])])
    answer = [classes, graph.add("ReduceMax", [probs], axes=[1], keepdims=0), exits, answered]
    if k == form.num_exits - 1:
        return answer
    confidence = graph.add("ReduceMax", [graph.add("Softmax", [logits], axis=1)], axes=[1], keepdims=0)
    threshold = graph.add("Gather", [_Value(graph, "thresholds"), np.array(k, np.int64)])
    stays = graph.add("Not", [graph.add("GreaterOrEqual", [confidence, threshold])])
    rows = graph.add("Transpose", [graph.add("NonZero", [stays])])  # (n', 1)
    some_stay = graph.add("Cast", [graph.add("Size", [rows])], to=graph.onnx.TensorProto.BOOL)

    stop, go_on = (_Graph(graph.onnx, graph.parameter_names, graph.numbers) for _ in range(2))
    unchanged = [stop.add("Identity", [x]) for x in answer]
    state = {key: go_on.add("GatherND", [x, rows]) for key, x in state.items()}
    needed = {
        j: go_on.add("GatherND", [x, rows]) for j, x in seen.items() if j == k or weights[k + 1 :, j].any()
    }
    later = _record_exits(go_on, form, k + 1, state, needed, weights)
    merged = [go_on.add("ScatterND", [x, rows, y]) for x, y in zip(answer, later, strict=True)]
    branches = {"then_branch": go_on.finished(merged), "else_branch": stop.finished(unchanged)}
    return graph.record("If", [some_stay], [f"{name}_of_exit_{k}" for name in OUTPUTS], **branches)


def _sum(values: Sequence["_Value"]) -> "_Value":
    return functools.reduce(lambda x, y: x.graph.add("Add", [x, y]), values)


class _Graph:
    """Nodes and weights as they are recorded, of the model or of a branch, which may also read what the graphs around it hold."""

    def __init__(self, onnx: ModuleType, parameter_names: dict[int, str], numbers: "itertools.count"):
        self.onnx, self.parameter_names = onnx, parameter_names
        self.numbers = numbers  # for names, which must differ between branches, too
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def record(
        self, operator: str, inputs: list[Any], outputs: list[str], **attributes: Any
    ) -> list["_Value"]:
        """Add a node; inputs are values, parameters and constants, None where there is none."""
        names = [x.name if isinstance(x, _Value) else self._weight(x) for x in inputs if x is not None]
        self.nodes.append(self.onnx.helper.make_node(operator, names, outputs, **attributes))
        return [_Value(self, name) for name in outputs]

    def add(self, operator: str, inputs: list[Any], **attributes: Any) -> "_Value":
        """``record`` a node with one output."""
        return self.record(operator, inputs, [f"{operator}_{next(self.numbers)}"], **attributes)[0]

    def _weight(self, value: Tensor | np.ndarray) -> str:
        if isinstance(value, Tensor):
            name, array = self.parameter_names[id(value)], np.ascontiguousarray(value.detach().numpy())
        else:
            name, array = f"constant_{next(self.numbers)}", value
        self.weights[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def declared(self, name: str, kind: str, shape: list[int | str] | None) -> Any:
        """An input or output; a branch need not know its shapes."""
        return self.onnx.helper.make_tensor_value_info(name, getattr(self.onnx.TensorProto, kind), shape)

    def finished(
        self,
        answer: list["_Value"],
        inputs: Sequence[Any] = (),
        shapes: Sequence[list | None] = (None,) * len(OUTPUTS),
    ) -> Any:
        """The graph, whose outputs are ``answer``."""
        outputs = [
            self.declared(x.name, kind, shape)
            for x, kind, shape in zip(answer, OUTPUTS.values(), shapes, strict=True)
        ]
        return self.onnx.helper.make_graph(
            self.nodes, f"graph_{next(self.numbers)}", inputs, outputs, list(self.weights.values())
        )


class _Value:
    """Stands for a tensor while a network runs: PyTorch hands every function called with one to ``__torch_function__``."""

    def __init__(self, graph: _Graph, name: str):
        self.graph, self.name = graph, name

    def to(self, **_options: Any) -> "_Value":
        return self

    def detach(self) -> "_Value":
        return self

    def flatten(self, axis: int) -> "_Value":
        return self.graph.add("Flatten", [self], axis=axis)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> "_Value":
        operator = _OPERATORS.get(getattr(function, "__name__", ""))
        if operator is None:
            raise TypeError(f"no ONNX operator is known for {function}")
        return operator(*arguments, **(options or {}))


def _conv(
    x: _Value,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
) -> _Value:
    return x.graph.add(
        "Conv", [x, weight, bias], strides=stride, pads=padding * 2, dilations=dilation, group=groups
    )


def _add(x: _Value, y: _Value, alpha: float) -> _Value:
    return x.graph.add("Add", [x, x.graph.add("Mul", [y, np.array(alpha, np.float32)])])


def _max_pool(x: _Value, kernel_size: int, stride: int, padding: int, *_: Any, **__: Any) -> _Value:
    return x.graph.add(
        "MaxPool", [x], kernel_shape=[kernel_size] * 2, strides=[stride] * 2, pads=[padding] * 4
    )


_OPERATORS: dict[str, Callable[..., _Value]] = {
    "conv2d": _conv,
    "add": _add,
    "linear": lambda x, weight, bias: x.graph.add("Gemm", [x, weight, bias], transB=1),
    "relu": lambda x, inplace=False: x.graph.add("Relu", [x]),
    "cat": lambda tensors, dim: tensors[0].graph.add("Concat", list(tensors), axis=dim),
    "max_pool2d": _max_pool,
    "adaptive_avg_pool2d": lambda x, output_size: x.graph.add(
        "GlobalAveragePool", [x]
    ),  # to 1x1, in every exit
}
