"""Export of any ``ExitNetwork`` to ONNX: one file that stops early, or one file per block.

Example:
    export_onnx(network, Path("network.onnx"), read_policy(Path("policy.json"), network))
    export_blocks(network, Path("network"), read_policy(Path("policy.json"), network))

The single file has these inputs and outputs:

    inputs    images (N, 3, S, S) uint8, thresholds (K,) float32
    outputs   classes (N,) int64, confidence (N,) float32, exits (N,) int64 (0-based), logits (N, C) float32

Each image leaves at the first exit whose largest softmax probability reaches that exit's threshold; nested
``If`` nodes run later blocks for the other images only. The logits are the exit's, divided by its
temperature, or the policy's weighted sum over all exits so far. The first block normalises the images.

The files of ``export_blocks`` have no control flow, for runtimes that support none. Block k reads the state
of the network and the logits of exit k - 1, and returns the logits of exit k and the next state;
``network.json`` names the files, their inputs and outputs, and holds what the metadata of the single file
hold. ``onnx_predictor.py`` and ``examples/browser/predictor.mjs`` run both kinds.

PyTorch's own exporter (torch.export) converts each block. It needs the packages onnx and onnxscript
(requirements-export.txt).
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_inference.fingerprint import describe, network_fingerprint
from adaptive_inference.fold import fold
from adaptive_inference.policies import PolicyCurve
from models.description import Description
from models.network import ExitNetwork
from utils import UserError, atomic_write, one_line

try:
    import onnx
    import onnxscript  # noqa: F401 - torch.onnx.export needs it
    from google.protobuf.message import Error as ProtobufError
    from onnx import TensorProto, compose, helper, numpy_helper
except ImportError:
    onnx = None

FORMAT = "imta-msdnet onnx 4"
OPSET, IR_VERSION = 18, 8  # read by every ONNX Runtime since 1.14
# TensorProto.FLOAT is 1 and TensorProto.INT64 is 7; onnx may be missing here.
OUTPUTS = {"classes": 7, "confidence": 1, "exits": 7, "logits": 1}


def export_onnx(
    network: ExitNetwork,
    path: str | Path,
    curve: PolicyCurve | None = None,
    blocks: Sequence["onnx.GraphProto"] | None = None,
) -> None:
    """Write ``network`` as one ONNX file that stops early.

    Args:
        network: A network with a description; it is not changed.
        path: The file to write.
        curve: Policies of the network; the points of its best rule go into the file.
        blocks: Converted blocks, as ``convert_blocks`` returns them; None converts the network here.

    Raises:
        UserError: A package or the description is missing, the policies do not compare softmax, or the
            file cannot be written.
    """
    path, metadata = Path(path), _metadata(network, curve)
    blocks = blocks or convert_blocks(network)
    hint = " and about 30 exits; a file per block (--output DIR/) holds more"
    with _protobuf_limits(path, hint):
        whole = _whole_graph(network, blocks, np.array(metadata["weights"], np.float32))
        _write(whole, metadata, path)


def _whole_graph(
    network: ExitNetwork, blocks: Sequence["onnx.GraphProto"], weights: np.ndarray
) -> "onnx.GraphProto":
    """Return one graph that stops early; weights are those of ``_add_exits``."""
    blocks = [
        compose.add_prefix_graph(block, f"exit{k + 1}_", rename_inputs=k > 0)
        for k, block in enumerate(blocks)
    ]
    graph, results = _add_exits(blocks, weights)
    shapes = {"classes": ["N"], "confidence": ["N"], "exits": ["N"], "logits": ["N", network.num_classes]}
    for name, result in zip(shapes, results, strict=True):
        graph.add("Identity", result, name=name)
    thresholds = helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [network.num_exits])
    outputs = [helper.make_tensor_value_info(name, OUTPUTS[name], shape) for name, shape in shapes.items()]
    return graph.finish(outputs, [*blocks[0].input, thresholds])


def export_blocks(
    network: ExitNetwork,
    folder: str | Path,
    curve: PolicyCurve | None = None,
    blocks: Sequence["onnx.GraphProto"] | None = None,
) -> None:
    """Write ``network`` as one ONNX file per block, and ``network.json``.

    Those of an earlier export in this directory are replaced; other files stay.

    Args:
        network: A network with a description; it is not changed.
        folder: The directory to write; it is made if it does not exist.
        curve: Policies of the network; the points of its best rule go into ``network.json``.
        blocks: Converted blocks, as ``convert_blocks`` returns them; None converts the network here.

    Raises:
        UserError: A package or the description is missing, the policies do not compare softmax, the folder
            has a ``network.json`` or block of another program, or a file cannot be written.
    """
    folder, metadata = Path(folder), _metadata(network, curve)
    block_metadata = {name: metadata[name] for name in ("format", "fingerprint")}
    metadata["blocks"] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {folder}: {error.strerror}") from None
    listed = _listed_files(folder / "network.json")
    for number in range(1, network.num_exits + 1):
        path = folder / f"block{number}.onnx"
        if path.exists() and path.name not in listed and not _is_exported_block(path):
            raise UserError(f"{path} was not written by an export: choose another directory, or remove it")
    blocks = blocks or convert_blocks(network)
    # Nobody finds new blocks beside the network.json of an older export if this is interrupted.
    with contextlib.suppress(OSError):
        (folder / "network.json").unlink()
    _remove_later_blocks(folder, len(blocks))
    for number, graph in enumerate(blocks, start=1):
        file = f"block{number}.onnx"
        with _protobuf_limits(folder / file):
            _write(graph, block_metadata, folder / file)
        inputs, outputs = (
            {value.name: _shape(value) for value in values} for values in (graph.input, graph.output)
        )
        metadata["blocks"].append({"file": file, "inputs": inputs, "outputs": outputs})
    with atomic_write(folder / "network.json") as stream:
        json.dump(metadata, stream, indent=1, allow_nan=False)
        stream.write("\n")


def _listed_files(path: Path) -> set[str]:
    """Return the files of blocks that the ``network.json`` of an earlier export lists.

    Raises:
        UserError: No export wrote that file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, RecursionError):
        content = None
    written_by = str(content.get("format")) if isinstance(content, dict) else ""
    if not written_by.startswith(FORMAT.rstrip("0123456789")):  # of any version
        raise UserError(f"{path} was not written by an export: choose another directory, or remove it")
    blocks = content.get("blocks")
    entries = blocks if isinstance(blocks, list) else []
    return {str(block.get("file")) for block in entries if isinstance(block, dict)}


def _remove_later_blocks(folder: Path, count: int) -> None:
    """Remove the blocks after the first ``count``, which an export of a deeper network left there."""
    for path in folder.glob("block*.onnx"):
        number = path.stem.removeprefix("block")
        if not number.isdecimal() or int(number) <= count:
            continue
        if _is_exported_block(path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_exported_block(path: Path) -> bool:
    """Return True if a file is a block that an export wrote; what cannot be read is none."""
    try:
        metadata = onnx.load(path, load_external_data=False).metadata_props
    except (OSError, ProtobufError):
        return False
    return {entry.key for entry in metadata} == {"format", "fingerprint"}


def _metadata(network: ExitNetwork, curve: PolicyCurve | None) -> dict[str, Any]:
    """Return what both kinds of export say of the network, in plain types."""
    points = curve.of_rule(None) if curve else ()
    if any(point.policy.measure != "softmax" for point in points):
        measure = points[0].policy.measure
        raise UserError(f"an ONNX file compares softmax only; these policies compare {measure}")
    fingerprint = network_fingerprint(network)
    if curve is not None and curve.fingerprint != fingerprint:
        raise UserError(
            f"these are policies of another network, or of other weights: {curve.network_description}"
        )
    data = _description(network).data
    return {
        "format": FORMAT,
        "network": describe(network),
        "fingerprint": fingerprint,
        "confidence": "softmax",
        "class_names": list(data.class_names),
        "image_size": data.image_size,
        "preprocessing": {
            "crop_share": data.crop_share,
            "interpolation": data.interpolation,
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "operations": list(network.description.operations),
        "weights": [list(row) for row in points[0].policy.weights]
        if points
        else np.eye(network.num_exits).tolist(),
        "points": [
            {
                "rule": point.rule,
                "p": point.number,
                "val_acc1": point.val_acc1,
                "operations": point.operations,
                "thresholds": list(point.policy.thresholds),
            }
            for point in points
        ],
    }


def _description(network: ExitNetwork) -> Description:
    """Return the network's description, or raise UserError if it has none."""
    if network.description is None:
        raise UserError(
            "the network has no description, which holds its classes and preprocessing: "
            "save it, and export what models.load returns"
        )
    return network.description


class _Block(nn.Module):
    """Block and exit ``k`` as a function of tensors alone.

    Args:
        network: A folded network.
        k: The block.
        names: Keys of the state that the block reads; unused by the first block, which reads images.
    """

    def __init__(self, network: ExitNetwork, k: int, names: Sequence[str]):
        super().__init__()
        self.network, self.k, self.names = network, k, names
        data = network.description.data
        # (1, 3, 1, 1) each, for pixels from 0 to 255
        self.register_buffer("mean", 255 * torch.tensor(data.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data.std).reshape(1, 3, 1, 1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (n, C) of the exit, and the next state.

        Args:
            tensors: Images (n, 3, S, S) uint8 for the first block; the previous exit's logits and the
                state for all others.
        """
        logits, state = self.run(*tensors)
        return (logits, *state.values())

    def run(self, *tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what ``forward`` returns, with the names of the state."""
        if self.k == 0:
            previous_logits, state = None, self.network.start((tensors[0].float() - self.mean) / self.std)
        else:
            previous_logits, state = tensors[0], dict(zip(self.names, tensors[1:], strict=True))
        features, state = self.network.advance(self.k, state)
        return self.network.classify_next(self.k, features, previous_logits), state


def convert_blocks(network: ExitNetwork) -> list["onnx.GraphProto"]:
    """Convert each block with its exit; this takes seconds per block.

    Args:
        network: A network with a description; it is not changed.

    Returns:
        A graph per block. Its inputs are ``images``, or those of ``previous_logits`` and the state that it
        reads; its outputs are ``logits`` and the next state, whose names begin with ``next_``.

    Raises:
        UserError: A package or the description is missing, or PyTorch cannot convert the network.
    """
    size = _description(network).data.image_size
    if onnx is None:
        raise UserError("this needs the packages onnx and onnxscript: pip install -r requirements-export.txt")
    network = fold(network, channels_last=False, dtype=torch.float32).cpu()
    # Two images, as the exporter would turn a batch of one into a constant.
    tensors, names = (torch.zeros(2, 3, size, size, dtype=torch.uint8),), ["images"]
    graphs = []
    for k in range(network.num_exits):
        block = _Block(network, k, names[1:]).eval()
        with torch.no_grad():
            logits, state = block.run(*tensors)
        graphs.append(_convert(block, tensors, names, ["logits", *(f"next_{key}" for key in state)]))
        tensors, names = (logits, *state.values()), ["previous_logits", *state]
    return graphs


def _convert(
    block: _Block, tensors: tuple[Tensor, ...], inputs: list[str], outputs: list[str]
) -> "onnx.GraphProto":
    """Return the graph of one block, without the exporter's notes on the source code."""
    dynamic_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    with warnings.catch_warnings(), _quiet("torch", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                block,
                tensors,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=(dynamic_batch,),
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            raise UserError(one_line(f"PyTorch cannot convert the network to ONNX: {reason}")) from None
    graph = program.model_proto.graph
    nodes = list(graph.node)
    # PyTorch 2.6 gives an input that is also an output, or both, other names than it was asked to.
    names = {value.name: name for value, name in zip(graph.input, inputs, strict=True)}
    for value, name in zip(graph.output, outputs, strict=True):
        if value.name in names:
            nodes.append(helper.make_node("Identity", [value.name], [name]))
        else:
            names[value.name] = name
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.ClearField("metadata_props")  # a stack trace, with paths of this machine
        node.ClearField("doc_string")
    for value, name in zip([*graph.input, *graph.output], [*inputs, *outputs], strict=True):
        value.name = name
    used = {name for node in nodes for name in node.input}
    return helper.make_graph(
        nodes,
        graph.name,
        [_declare(value) for value in graph.input if value.name in used],
        [_declare(value) for value in graph.output],
        [tensor for tensor in graph.initializer if tensor.name in used],
    )


def _declare(value: "onnx.ValueInfoProto") -> "onnx.ValueInfoProto":
    """Return an input or output with the size of the batch called N."""
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, _shape(value))


def _shape(value: "onnx.ValueInfoProto") -> list[int | str]:
    """Return the sizes of an input or output, the batch N first."""
    return ["N", *(size.dim_value for size in value.type.tensor_type.shape.dim[1:])]


class _Graph:
    """Nodes and constants of one graph while it is put together.

    Args:
        prefix: Beginning of all its names; the branches of ``If`` see the names of the graphs around them.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(
        self, operator: str, *inputs: str | np.ndarray, name: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with one output, and return its name; arrays become constants."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        name = name or f"{self.prefix}{operator}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return name

    def add_weighted_sum(self, names: dict[int, str], weights: np.ndarray) -> str:
        """Add the sum of these tensors, each times its weight; tensors of weight 0 are left out."""
        total = None
        for j, name in names.items():
            if weights[j] == 0:
                continue
            term = name if weights[j] == 1 else self.add("Mul", name, weights[j])
            total = term if total is None else self.add("Add", total, term)
        return total

    def add_largest_probability(self, logits: str) -> str:
        """Add the largest softmax probability (n,) of logits (n, C)."""
        probs = self.add("Softmax", logits, axis=1)
        return self.add("ReduceMax", probs, np.array([1]), keepdims=0)

    def finish(
        self, outputs: Sequence["onnx.ValueInfoProto"], inputs: Sequence["onnx.ValueInfoProto"] = ()
    ) -> "onnx.GraphProto":
        """Return the graph."""
        return helper.make_graph(self.nodes, f"{self.prefix}graph", inputs, outputs, self.constants)

    def finish_branch(self, results: Sequence[str]) -> "onnx.GraphProto":
        """Return the graph as a branch of ``If``, with the values of these names as ``OUTPUTS``."""
        types = zip(results, OUTPUTS.values(), strict=True)
        return self.finish([helper.make_tensor_value_info(name, kind, None) for name, kind in types])

    def _constant(self, value: np.ndarray) -> str:
        name = f"{self.prefix}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def _add_exits(
    blocks: Sequence["onnx.GraphProto"],
    weights: np.ndarray,
    k: int = 0,
    rows: str = "",
    seen: dict[int, str] | None = None,
) -> tuple[_Graph, list[str]]:
    """Put block ``k`` and all later ones together, each inside the ``If`` of the previous exit.

    Args:
        blocks: The graph of every block; all names of block k begin with ``exit{k + 1}_``.
        weights: (K, K), of the logits of all exits in the predictions at each exit.
        k: The block.
        rows: Name of the indices (n, 1) of the images that stay, among those of the previous exit.
        seen: Names of the logits of earlier exits, of the images of the previous exit.

    Returns:
        The graph, and the names of its ``OUTPUTS``.
    """
    graph, before = _Graph(f"exit{k + 1}_"), f"exit{k}_"
    logits = {}
    if k > 0:
        for value in blocks[k].input:
            key = value.name.removeprefix(graph.prefix)
            source = f"{before}logits" if key == "previous_logits" else f"{before}next_{key}"
            graph.add("GatherND", source, rows, name=value.name)
        logits = {j: graph.add("GatherND", name, rows) for j, name in seen.items() if weights[k:, j].any()}
    graph.nodes += blocks[k].node
    graph.constants += blocks[k].initializer
    logits[k] = f"{graph.prefix}logits"
    predicted = graph.add_weighted_sum(logits, weights[k])
    classes = graph.add("ArgMax", predicted, axis=1, keepdims=0)
    exits = graph.add("Expand", np.array([k]), graph.add("Shape", classes))
    results = [classes, graph.add_largest_probability(predicted), exits, predicted]
    if k == len(blocks) - 1:
        return graph, results

    threshold = graph.add("Gather", "thresholds", np.array(k))
    leaves = graph.add("GreaterOrEqual", graph.add_largest_probability(logits[k]), threshold)
    stay = graph.add("Transpose", graph.add("NonZero", graph.add("Not", leaves)))
    some_stay = graph.add("Cast", graph.add("Size", stay), to=TensorProto.BOOL)
    later, later_results = _add_exits(blocks, weights, k + 1, stay, logits)
    merged = [later.add("ScatterND", x, stay, y) for x, y in zip(results, later_results, strict=True)]
    stop = _Graph(f"{graph.prefix}stop_")
    unchanged = [stop.add("Identity", x) for x in results]
    names = [f"{graph.prefix}{name}_at_last" for name in OUTPUTS]
    branches = {"then_branch": later.finish_branch(merged), "else_branch": stop.finish_branch(unchanged)}
    graph.nodes.append(helper.make_node("If", [some_stay], names, **branches))
    return graph, names


def _write(graph: "onnx.GraphProto", metadata: dict[str, Any], path: Path) -> None:
    """Check and write a model; of the metadata, all but texts become JSON."""
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="imta-msdnet",
    )
    texts = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items()}
    helper.set_model_props(model, texts)
    onnx.checker.check_model(model)
    with atomic_write(path, "wb") as stream:
        stream.write(model.SerializeToString())


@contextlib.contextmanager
def _protobuf_limits(path: Path, hint: str = "") -> Iterator[None]:
    """Raise UserError where a file becomes larger, or its graphs more deeply nested, than ONNX allows."""
    try:
        yield
    except ProtobufError:
        raise UserError(f"cannot write {path}: an ONNX file holds at most 2 GiB{hint}") from None


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let these loggers report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
