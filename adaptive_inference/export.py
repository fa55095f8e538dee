"""Export to ONNX, each block with its exit as a model of its own, and a runner on ONNX Runtime that stops early.

    python -m adaptive_inference.export --checkpoint save/demo/IMTA/best.pt --output exported/

    network = OnnxNetwork(Path("exported"))
    prediction = AdaptivePredictor(network, policy)(images)

Needs the packages onnx and onnxruntime (requirements-export.txt), which nothing else does. Model k reads what earlier models left (the
first one, the images) and gives the logits of exit k and what later models need; the number of images is free. The folded network is
recorded node by node, so nothing depends on PyTorch's exporter or its version.
"""

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_inference.form import inference_form
from adaptive_inference.policies import describe
from models.stepwise import advance, exit_plans, stem_cells
from utils import CommandLineParser, UserError, atomic_write

FORMAT = "imta-msdnet onnx 1"
DESCRIPTION = "network.json"
OPSET, IR_VERSION = 17, 8  # read by every ONNX Runtime since 1.12
LARGEST_DESCRIPTION = 2**16  # bytes
MOST_EXITS = 100


def export_onnx(network: nn.Module, folder: Path, image_size: int, lazy: bool = True) -> list[Path]:
    """Write ``exit_1.onnx`` .. ``exit_K.onnx``, and a description of the network, into ``folder``.

    Args:
        network: ``MSDNet`` or ``IMTA``; it is folded on the way, and not changed.
        image_size: height and width in pixels.
        lazy: as for ``models.Stepwise``.

    Returns:
        The models' files.

    Raises:
        UserError: onnx is not installed, the image is too small, or a file cannot be written.
    """
    onnx = _optional("onnx")
    if image_size < network.minimum_image_size:
        raise UserError(f"images of {image_size} pixels are too small: this network needs at least {network.minimum_image_size}")
    form = inference_form(network, channels_last=False, dtype=torch.float32).cpu()
    parameter_names = {id(parameter): name for name, parameter in form.named_parameters()}
    # The same computation twice: on recorded values for the nodes, on the meta device for the shapes.
    shadow = copy.deepcopy(form).to("meta")
    shadow_images = torch.empty(1, 3, image_size, image_size, device="meta")
    shadow_cells, shadow_logits, cell_names = stem_cells(shadow, shadow_images), None, None
    paths = []
    for k, plan in enumerate(exit_plans(form, lazy)):
        graph = _Graph(onnx, parameter_names)
        inputs = {"images": shadow_images} if k == 0 else {_cell_name(key): x for key, x in shadow_cells.items()}
        values = {name: _Value(graph, name) for name in inputs}
        cells = stem_cells(form, values["images"]) if k == 0 else {key: values[_cell_name(key)] for key in cell_names}
        previous = None if k == 0 else _Value(graph, "previous_logits")
        logits, cells = advance(form, plan, cells, previous)
        if k > 0:
            inputs["previous_logits"] = shadow_logits
        shadow_logits, shadow_cells = advance(shadow, plan, shadow_cells, shadow_logits)
        outputs = {"logits": (logits, shadow_logits)}
        # What a model hands on unchanged, the runner still has.
        outputs |= {_cell_name(key): (x, shadow_cells[key]) for key, x in cells.items() if _cell_name(key) not in inputs}
        paths.append(folder / f"exit_{k + 1}.onnx")
        with atomic_write(paths[-1], "wb") as stream:
            stream.write(graph.model(inputs, outputs).SerializeToString())
        cell_names = list(cells)
    description = {
        "format": FORMAT,
        "network": {"description": describe(form), "fingerprint": form.fingerprint},
        "num_exits": form.num_exits,
        "num_classes": form.num_classes,
        "image_size": image_size,
    }
    with atomic_write(folder / DESCRIPTION) as stream:
        json.dump(description, stream, indent=1)
        stream.write("\n")
    return paths


class OnnxNetwork:
    """An exported network on ONNX Runtime, for ``AdaptivePredictor`` and for all exits at once.

    Args:
        folder: what ``export_onnx`` wrote.
        threads: of one operation; None: as many as PyTorch uses.
        providers: where it runs, in ONNX Runtime's words, such as ``["CUDAExecutionProvider"]``.

    Raises:
        UserError: onnxruntime is not installed, or the folder holds no exported network.
    """

    def __init__(self, folder: Path, threads: int | None = None, providers: tuple[str, ...] | list[str] = ("CPUExecutionProvider",)):
        runtime = _optional("onnxruntime")
        description = _read_description(folder / DESCRIPTION)
        self.num_exits, self.num_classes = description["num_exits"], description["num_classes"]
        self.image_size = description["image_size"]
        self.fingerprint = description["network"]["fingerprint"]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Each model has threads of its own; those of a finished one would spin on the cores that the next one needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.sessions = []
        for k in range(1, self.num_exits + 1):
            path = folder / f"exit_{k}.onnx"
            try:
                self.sessions.append(runtime.InferenceSession(str(path), options, providers=list(providers)))
            except Exception as error:  # the runtime's own types are not public in all its versions
                raise UserError(f"cannot load the model {path}: {' '.join(str(error).split())[:200]}") from None
        self.inputs = [[value.name for value in session.get_inputs()] for session in self.sessions]
        self.outputs = [[value.name for value in session.get_outputs()] for session in self.sessions]
        # Names that some later model reads, after each exit.
        self.needed = [{name for names in self.inputs[k + 1 :] for name in names} for k in range(self.num_exits)]

    def begin(self, images: Tensor) -> "OnnxRun":
        """Start a pass over the exits for images (N, 3, H, W)."""
        return OnnxRun(self, images)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) -> logits (N, num_classes) of every exit."""
        run = self.begin(images)
        return [run.next_logits() for _ in range(self.num_exits)]


class OnnxRun:
    """The counterpart of ``models.Stepwise``: one pass over the exits for a batch that may shrink between them."""

    def __init__(self, network: OnnxNetwork, images: Tensor):
        self.network, self.device, self.exits_done = network, images.device, 0
        self._values: dict[str, np.ndarray] = {"images": np.ascontiguousarray(images.detach().cpu().float().numpy())}

    def next_logits(self) -> Tensor:
        """Logits (n, C) of the next exit for the images still here.

        Raises:
            IndexError: all exits are done.
        """
        network, k = self.network, self.exits_done
        if k == network.num_exits:
            raise IndexError(f"all {k} exits are done")
        arrays = network.sessions[k].run(None, {name: self._values[name] for name in network.inputs[k]})
        results = dict(zip(network.outputs[k], arrays, strict=True))
        logits = results.pop("logits")
        known = {**self._values, **results, "previous_logits": logits}
        self._values = {name: array for name, array in known.items() if name in network.needed[k]}
        self.exits_done += 1
        return torch.from_numpy(logits).to(self.device)

    def keep(self, images: Tensor) -> None:
        """Carry on with these of the present images: a boolean mask (n,) or indices."""
        chosen = images.cpu().numpy()
        self._values = {name: array[chosen] for name, array in self._values.items()}


class _Graph:
    """The nodes and weights of one model, as they are recorded."""

    def __init__(self, onnx: ModuleType, parameter_names: dict[int, str]):
        self.onnx, self.parameter_names = onnx, parameter_names
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def add(self, operator: str, inputs: list[Any], **attributes: Any) -> "_Value":
        names = [x.name if isinstance(x, _Value) else self._weight(x) for x in inputs if x is not None]
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, names, [name], **attributes))
        return _Value(self, name)

    def _weight(self, parameter: Tensor) -> str:
        name = self.parameter_names[id(parameter)]
        if name not in self.weights:
            array = np.ascontiguousarray(parameter.detach().cpu().numpy())
            self.weights[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def model(self, inputs: dict[str, Tensor], outputs: dict[str, tuple["_Value", Tensor]]) -> Any:
        """The model of these inputs (name -> a tensor of its shape) and outputs (name -> what was recorded, a tensor of its shape)."""
        helper = self.onnx.helper

        def declare(name: str, tensor: Tensor) -> Any:
            return helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, ["images", *tensor.shape[1:]])

        used = {name for node in self.nodes for name in node.input}
        final_names = {value.name: name for name, (value, _) in outputs.items()}
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [final_names.get(name, name) for name in names]
        graph = helper.make_graph(
            self.nodes,
            "block_with_exit",
            [declare(name, tensor) for name, tensor in inputs.items() if name in used],
            [declare(name, tensor) for name, (_, tensor) in outputs.items()],
            list(self.weights.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="imta-msdnet")
        model.ir_version = IR_VERSION
        self.onnx.checker.check_model(model)
        return model


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
    def __torch_function__(cls, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None) -> "_Value":
        operator = _OPERATORS.get(getattr(function, "__name__", ""))
        if operator is None:
            raise TypeError(f"no ONNX operator is known for {function}")
        return operator(*arguments, **(options or {}))


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv(x: _Value, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> _Value:
    pads = _pair(padding) * 2
    sizes = {"kernel_shape": list(weight.shape[2:]), "strides": _pair(stride), "pads": pads, "dilations": _pair(dilation), "group": groups}
    return x.graph.add("Conv", [x, weight, bias], **sizes)


def _max_pool(x: _Value, kernel_size: Any, stride: Any, padding: Any, *_: Any, **__: Any) -> _Value:
    return x.graph.add("MaxPool", [x], kernel_shape=_pair(kernel_size), strides=_pair(stride), pads=_pair(padding) * 2)


def _mean_of_map(x: _Value, output_size: int) -> _Value:
    if output_size != 1:
        raise TypeError(f"no ONNX operator is known for adaptive pooling to {output_size}")
    return x.graph.add("GlobalAveragePool", [x])


_OPERATORS: dict[str, Callable[..., _Value]] = {
    "conv2d": _conv,
    "linear": lambda x, weight, bias: x.graph.add("Gemm", [x, weight, bias], transB=1),
    "relu": lambda x, inplace=False: x.graph.add("Relu", [x]),
    "cat": lambda tensors, dim: tensors[0].graph.add("Concat", list(tensors), axis=dim),
    "max_pool2d": _max_pool,
    "adaptive_avg_pool2d": _mean_of_map,
}


def _cell_name(key: tuple[int, int]) -> str:
    return f"stage_{key[0]}_scale_{key[1]}"


def _read_description(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            description = json.loads(stream.read(LARGEST_DESCRIPTION).decode("utf-8"))
        numbers = [description[name] for name in ("num_exits", "num_classes", "image_size")]
        fingerprint = description["network"]["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no exported network; python -m adaptive_inference.export writes one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} describes no exported network ({type(error).__name__})") from None
    plausible = all(type(n) is int and n > 0 for n in numbers) and numbers[0] <= MOST_EXITS and isinstance(fingerprint, str)
    if description.get("format") != FORMAT or not plausible:
        raise UserError(f"{path} describes no exported network")
    return description


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this needs the package {name}: pip install -r requirements-export.txt") from None


def main(argv: list[str] | None = None) -> int:
    """Export the checkpoint these arguments name (None: those of the process) and return the exit status."""
    # Here, as the runner alone needs no checkpoints.
    from engine.checkpoint import load_saved

    parser = CommandLineParser(
        prog="adaptive_inference.export", description="Write each block of a network with its exit as an ONNX model."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="of either stage")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the models")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width (default: as in training)")
    parser.add_argument(
        "--lazy", action=argparse.BooleanOptionalAction, default=True, help="compute only what each exit reads (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        saved = load_saved(arguments.checkpoint, {})
        image_size = arguments.image_size or (saved.data.image_size if saved.data else None)
        if image_size is None:
            raise UserError(f"{arguments.checkpoint} is of the released program, which stores no image size; give --image-size")
        paths = export_onnx(saved.network, arguments.output, image_size, arguments.lazy)
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    sys.stdout.write(f"{len(paths)} models of {describe(saved.network)} for images of {image_size} pixels: {arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
