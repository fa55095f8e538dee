"""Both kinds of ONNX export give the predictions of PyTorch, image by image; bad input is one line."""

import ctypes
import gc
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import export_onnx as program
from adaptive_inference.export import FORMAT, convert_blocks, export_blocks, export_onnx
from adaptive_inference.finding import policy_curve
from adaptive_inference.policies import Policy
from adaptive_inference.predictor import AdaptivePredictor
from engine.checkpoint import save_network
from image_data import synthetic
from models import Backbone, build_backbone, load
from models.description import Split
from tests import contract
from tests.backbones import Chain, make_small
from tests.conftest import describe, policy_point
from tests.helpers import ALL, NONE, logits_of, make_network, quantile_policy
from utils import UserError

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
ROOT = Path(__file__).resolve().parents[1]
if INSTALLED:
    import onnx

    from examples import same_predictions
    from onnx_predictor import OnnxPredictor

needs_onnx = pytest.mark.skipif(not INSTALLED, reason="needs requirements-export.txt")
needs_node = pytest.mark.skipif(
    not (INSTALLED and same_predictions.has_node()),
    reason="needs Node.js and npm install in examples/browser",
)
needs_openvino = pytest.mark.skipif(
    not (INSTALLED and importlib.util.find_spec("openvino")), reason="needs openvino"
)


def described_network(stage, size=32, **options):
    """Return a small network in single precision with a description."""
    network = make_network(stage, **options).float()
    description = describe(network)
    network.description = replace(description, data=replace(description.data, image_size=size))
    return network


def random_pixels(count, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def normalised(network, pixels):
    data = network.description.data
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    return (pixels / 255 - mean) / std


def export_both(network, folder, curve=None, blocks=None):
    """Export ``network`` in both kinds, and return their predictors."""
    blocks = blocks or convert_blocks(network)
    export_onnx(network, folder / "network.onnx", curve, blocks)
    export_blocks(network, folder / "network", curve, blocks)
    return [OnnxPredictor(folder / name, threads=1) for name in ("network.onnx", "network")]


def predictor_class(runtime):
    if runtime == "onnxruntime":
        return OnnxPredictor
    from examples.openvino_predictor import OpenVinoPredictor

    return OpenVinoPredictor


class SignalStack(ctypes.Structure):
    """The C library's ``stack_t``, on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def same_signal_stack():
    """Give back the stack on which Python handles signals.

    OpenVINO replaces it while a model is compiled, and by a stack that is gone where models are not released
    in the order opposite to that in which they were made. The next signal would then end the process.
    """
    if sys.platform != "linux" or not importlib.util.find_spec("openvino"):
        yield
        return
    library, before = ctypes.CDLL(None), SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    yield
    gc.collect()
    library.sigaltstack(ctypes.byref(before), None)


@pytest.fixture(scope="module")
def converted():
    """A network and its converted blocks."""
    torch.manual_seed(0)
    network = described_network(2)
    return network, convert_blocks(network)


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    """A network, its policies, and the directory of its two exports."""
    network, blocks = converted
    folder = tmp_path_factory.mktemp("onnx")
    points = [
        policy_point(1, [0.2, 0.3, 0.4], 40.0, 1e5, [0.2, 0.3, 0.5]),
        policy_point(2, [0.5, 0.6, 0.7], 60.0, 2e5, [0.2, 0.3, 0.5]),
        policy_point(3, [0.8, 0.8, 0.8], 60.0, 3e5, [0.2, 0.3, 0.5]),
    ]
    curve = policy_curve(network, network.description.operations, points)
    export_both(network, folder, curve, blocks)
    return network, curve, folder


@pytest.fixture(params=["network.onnx", "network"], ids=["one file", "a file per block"])
def export_path(exported, request):
    """Each kind of export in turn."""
    return exported[2] / request.param


def test_missing_package_is_one_line(tmp_path):
    code = (
        "import sys; sys.modules['onnxscript'] = None\n"  # what importing a missing package comes to
        "import export_onnx\n"
        f"sys.exit(export_onnx.main(['--model', 'imta_cifar100', '--output', {str(tmp_path / 'x.onnx')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    message = "this needs the packages onnx and onnxscript: pip install -r requirements-export.txt"
    assert result.stderr == f"export_onnx.py: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_output_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--model", "imta_cifar100", "--output", ""])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "argument --output: an empty name is not a file or folder" in error
    assert error.count("\n") == 1


def test_a_photograph_is_not_replaced(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"pixels")
    with pytest.raises(SystemExit):
        program.main(["--model", "imta_cifar100", "--output", str(tmp_path / "photo.jpg")])
    assert "photo.jpg is a file already" in capsys.readouterr().err
    assert (tmp_path / "photo.jpg").read_bytes() == b"pixels"


def test_a_name_of_neither_kind_is_refused(tmp_path, capsys):
    path = tmp_path / "network"
    with pytest.raises(SystemExit):
        program.main(["--model", "imta_cifar100", "--output", str(path)])
    assert f"{path}: pass a file ending in .onnx, or a directory as {path}/" in capsys.readouterr().err


def test_command_line_without_a_checkpoint(tmp_path, capsys):
    assert program.main(["--model", str(tmp_path / "missing.pt"), "--output", str(tmp_path / "x.onnx")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def assert_same_predictions(network, runners):
    """Compare runners with PyTorch, where images leave at all exits, at the first and at the last one."""
    pixels = random_pixels(40, network.description.data.image_size)
    images = normalised(network, pixels)
    logits = logits_of(network, images)
    none, every = (Policy((threshold,) * network.num_exits) for threshold in (NONE, ALL))
    some = quantile_policy(logits, 0.4)
    for runner in runners:
        for count, policy in ((0, none), (40, some), (40, none), (40, every), (1, none), (1, every)):
            found = runner.predict(pixels[:count].numpy(), policy.thresholds)
            expected = AdaptivePredictor(network, policy)(images[:count])
            assert found.exits.tolist() == expected.exits.tolist()
            assert found.classes.tolist() == expected.classes.tolist()
            torch.testing.assert_close(
                torch.from_numpy(found.confidence), expected.confidence, atol=1e-5, rtol=1e-4
            )
            at_exit = logits[expected.exits, torch.arange(count)]
            torch.testing.assert_close(torch.from_numpy(found.logits), at_exit, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_same_predictions(exported):
    network, _, folder = exported
    runners = [OnnxPredictor(folder / name, threads=1) for name in ("network.onnx", "network")]
    assert_same_predictions(network, runners)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(
    ("stage", "options", "size"),
    [
        (2, {"step_mode": "lin_grow", "bottleneck": False, "prune": "min"}, 24),
        (1, {"reduction": 0.0, "boosted_exits": True}, 33),
        (1, {"num_blocks": 1}, 32),
    ],
)
def test_same_predictions_of_other_networks(stage, options, size, tmp_path):
    network = described_network(stage, size, **options)
    assert_same_predictions(network, export_both(network, tmp_path))


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", ["msdnet_four_scales", "imta_boosted"])
def test_networks_of_the_contract(name):
    """``python -m tests.contract`` checks all of them."""
    assert contract.check_onnx(contract.CASES[name]) is None


@pytest.mark.slow
@needs_onnx
def test_a_backbone(tmp_path):
    network = build_backbone("mobilenet_v3_small", exits=2, num_classes=10).eval()
    network.description = replace(describe(make_network(1)), operations=[1, 2])
    pixels = random_pixels(8)
    logits = logits_of(network, normalised(network, pixels))
    for runner in export_both(network, tmp_path):
        for k, thresholds in enumerate(([ALL] * 2, [NONE] * 2)):
            found = runner.predict(pixels.numpy(), thresholds)
            assert found.exits.tolist() == [k] * 8
            torch.testing.assert_close(torch.from_numpy(found.logits), logits[k], atol=1e-4, rtol=1e-4)


@needs_onnx
def test_a_network_of_ones_own(tmp_path, capsys):
    """The program says that it cannot make the network; in Python, one passes it."""
    network = make_small("chain").eval()
    save_network(tmp_path / "own.safetensors", network, describe(network), Split.unknown())
    assert (
        program.main(["--model", str(tmp_path / "own.safetensors"), "--output", str(tmp_path / "x.onnx")])
        == 2
    )
    assert "pass it: load(path, network=...)\n" in capsys.readouterr().err
    loaded = load(tmp_path / "own.safetensors", network=Chain())
    pixels = random_pixels(3)
    logits = logits_of(network, normalised(loaded, pixels))
    for runner in export_both(loaded, tmp_path):
        found = runner.predict(pixels.numpy(), [NONE] * 3)
        torch.testing.assert_close(torch.from_numpy(found.logits), logits[-1], atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.parametrize("ensemble", [None, [[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [0.2, 0.0, 0.7]]])
def test_same_probabilities_by_temperatures_and_ensembles(converted, tmp_path, ensemble):
    (network, blocks), pixels = converted, random_pixels(40)
    images = normalised(network, pixels)
    thresholds = list(quantile_policy(logits_of(network, images), 0.4).thresholds)
    policy = {"temperatures": (2.0, 0.5, 3.0), "ensemble": ensemble and tuple(map(tuple, ensemble))}
    point = policy_point(1, thresholds, 50.0, 1e5, [0.4, 0.3, 0.3], **policy)
    point = replace(point, rule="ensemble" if ensemble else "optimised")
    curve = policy_curve(network, network.description.operations, [point])
    expected = AdaptivePredictor(network, curve.points[0].policy)(images)
    for runner in export_both(network, tmp_path, curve, blocks):
        found = runner.predict(pixels.numpy())
        assert len(set(found.exits)) == 3
        assert found.exits.tolist() == expected.exits.tolist()
        assert found.classes.tolist() == expected.classes.tolist()
        probs = torch.from_numpy(found.probs)
        torch.testing.assert_close(probs, expected.probs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            torch.from_numpy(found.confidence), expected.confidence, atol=1e-5, rtol=1e-4
        )


@needs_onnx
def test_an_export_describes_itself(exported, export_path):
    _, curve, _ = exported
    runner = OnnxPredictor(export_path, threads=1)
    assert (runner.class_names[3], runner.image_size, runner.num_exits, runner.num_classes) == (
        "class 3",
        32,
        3,
        10,
    )
    assert runner.operations == sorted(runner.operations)
    preprocessing = {"crop_share": 1.0, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    assert runner.preprocessing == preprocessing
    for operations, p in ((math.inf, 2), (1e5, 1), (2.5e5, 2), (None, 3)):
        expected = np.array(curve.points[p - 1].policy.thresholds, np.float32)
        np.testing.assert_array_equal(runner.choose(operations), expected)
    pixels = random_pixels(20).numpy()
    np.testing.assert_array_equal(runner.predict(pixels).exits, runner.predict(pixels, [0.8, 0.8, 0.8]).exits)
    with pytest.raises(ValueError, match="at most 10 operations per image: the cheapest of 3 needs 1e\\+05"):
        runner.choose(operations=10)


@needs_onnx
def test_both_kinds_hold_the_same_metadata(exported):
    _, curve, folder = exported
    content = json.loads((folder / "network" / "network.json").read_text(encoding="utf-8"))
    texts = {x.key: x.value for x in onnx.load(folder / "network.onnx").metadata_props}
    assert content["fingerprint"] == curve.fingerprint
    blocks = content.pop("blocks")
    assert [block["file"] for block in blocks] == ["block1.onnx", "block2.onnx", "block3.onnx"]
    assert blocks[0]["inputs"] == {"images": ["N", 3, 32, 32]}
    assert blocks[2]["outputs"] == {"logits": ["N", 10]}
    assert {
        name: x if isinstance(x, str) else json.loads(texts[name]) for name, x in content.items()
    } == content


@needs_onnx
def test_blocks_have_no_control_flow_and_no_trace_of_this_machine(exported):
    folder = exported[2]
    for file in folder.rglob("*.onnx"):
        assert str(ROOT).encode() not in file.read_bytes()
        if file.name.startswith("block"):
            operators = {node.op_type for node in onnx.load(file).graph.node}
            assert operators.isdisjoint({"If", "Loop", "NonZero"})


@needs_onnx
def test_bad_calls_are_one_line(export_path):
    runner, good = OnnxPredictor(export_path, threads=1), random_pixels(2).numpy()
    for images, thresholds, message in (
        (good, [0.5] * 4, r"thresholds are \(4,\); this network has 3 exits"),
        (
            good.astype(np.float32),
            [0.5] * 3,
            r"images are float32 \(2, 3, 32, 32\); this network needs uint8 \(N, 3, 32, 32\)",
        ),
        (good[:, :, :31], [0.5] * 3, r"images are uint8 \(2, 3, 31, 32\)"),
        (good[0], [0.5] * 3, r"images are uint8 \(3, 32, 32\)"),
        (good.tolist(), [0.5] * 3, r"images are int64 \(2, 3, 32, 32\)"),
        (good, [0.5, math.nan, 0.5], r"thresholds are \[0.5, nan, 0.5\]; not all of them are numbers"),
        (good, [None, 0.5, 0.5], r"thresholds are \[nan, 0.5, 0.5\]; not all of them are numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.predict(images, thresholds)


@needs_onnx
def test_outputs_that_are_not_finite_are_refused(tmp_path):
    network = described_network(1)
    network.exits[-1].linear.weight.data[0, 0] = math.nan
    for runner in export_both(network, tmp_path):
        assert len(runner.predict(random_pixels(3).numpy(), [-1.0, 2.0, 2.0]).classes) == 3
        with pytest.raises(ValueError, match="not finite for 3 of 3 images; the first is at position 0"):
            runner.predict(random_pixels(3).numpy(), [2.0, 2.0, 2.0])


class Bessel(nn.Module):
    """ONNX has no Bessel functions."""

    def __init__(self):
        super().__init__()
        self.first, self.linear = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 10)

    def forward(self, images):
        return self.linear(torch.special.bessel_j0(self.first(images).relu()).mean((2, 3)))


@needs_onnx
def test_a_network_that_pytorch_cannot_convert_is_one_line(tmp_path):
    network = Backbone(Bessel(), ["first"])
    network.description = describe(network)
    with pytest.raises(UserError, match=r"cannot convert the network to ONNX: .*bessel_j0") as caught:
        export_onnx(network, tmp_path / "network.onnx")
    assert "\n" not in str(caught.value)


@needs_onnx
def test_bad_files_are_one_line(exported, tmp_path):
    folder = exported[2]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.onnx"):
        OnnxPredictor(tmp_path / "missing.onnx")
    with pytest.raises(FileNotFoundError, match=r"there is no file ~no-such-user/x\.onnx"):
        OnnxPredictor("~no-such-user/x.onnx")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*network\.json"):
        OnnxPredictor(tmp_path)
    (tmp_path / "cut.onnx").write_bytes((folder / "network.onnx").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot load the model .*cut\.onnx") as caught:
        OnnxPredictor(tmp_path / "cut.onnx")
    assert "\n" not in str(caught.value)
    model = onnx.load(folder / "network.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="its format is None"):
        OnnxPredictor(tmp_path / "foreign.onnx")

    content = json.loads((folder / "network" / "network.json").read_text(encoding="utf-8"))
    (tmp_path / "network.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*block1\.onnx"):
        OnnxPredictor(tmp_path)
    (tmp_path / "network.json").write_text(json.dumps(content | {"format": "older"}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"its format is 'older', not '{FORMAT}'"):
        OnnxPredictor(tmp_path)
    (tmp_path / "network.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot read .*network\.json"):
        OnnxPredictor(tmp_path)


@needs_onnx
@pytest.mark.parametrize("field", ["class_names", "fingerprint", "points", "weights", "blocks"])
def test_a_missing_field_is_one_line(exported, tmp_path, field):
    content = json.loads((exported[2] / "network" / "network.json").read_text(encoding="utf-8"))
    del content[field]
    (tmp_path / "network.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"network\.json lacks {field}$"):
        OnnxPredictor(tmp_path)
    if field == "blocks":
        return
    model = onnx.load(exported[2] / "network.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != field}
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "network.onnx")
    with pytest.raises(ValueError, match=rf"network\.onnx lacks {field}$"):
        OnnxPredictor(tmp_path / "network.onnx")


@needs_onnx
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", 3),
        ("operations", None),
        ("points", 0),
        ("weights", []),
        ("blocks", {}),
        ("blocks", ["block1.onnx"] * 3),
        ("blocks", [{"file": "../block1.onnx"}] * 3),
    ],
)
def test_a_field_of_another_type_is_one_line(exported, tmp_path, field, value):
    content = json.loads((exported[2] / "network" / "network.json").read_text(encoding="utf-8"))
    (tmp_path / "network.json").write_text(json.dumps(content | {field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"network\.json is damaged: see its {field}$"):
        OnnxPredictor(tmp_path)


@needs_onnx
def test_a_block_alone_is_no_network(exported):
    with pytest.raises(ValueError, match="it is one block of a network: pass its directory"):
        OnnxPredictor(exported[2] / "network" / "block1.onnx")


@needs_onnx
def test_too_few_blocks_are_one_line(exported, tmp_path):
    content = json.loads((exported[2] / "network" / "network.json").read_text(encoding="utf-8"))
    del content["blocks"][-1]
    (tmp_path / "network.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"network\.json has 3 exits, but 2 blocks"):
        OnnxPredictor(tmp_path)


@needs_onnx
@pytest.mark.parametrize("metadata", [None, {"fingerprint": "0" * 32}, {"format": "imta-msdnet onnx 3"}])
@pytest.mark.parametrize(
    "runtime",
    ["onnxruntime", pytest.param("openvino", marks=needs_openvino), pytest.param("node", marks=needs_node)],
)
def test_a_block_of_another_network_or_version_is_refused(exported, tmp_path, metadata, runtime):
    shutil.copytree(exported[2] / "network", tmp_path, dirs_exist_ok=True)
    model = onnx.load(tmp_path / "block2.onnx")
    own = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {} if metadata is None else own | metadata)
    onnx.save(model, tmp_path / "block2.onnx")
    message = r"block2\.onnx is a block of another network or version than .*network\.json"
    if runtime == "node":
        assert re.search(message, refused_by_node(tmp_path))
        return
    with pytest.raises(ValueError, match=message):
        predictor_class(runtime)(tmp_path, threads=1)


def test_an_interrupted_export_ends_in_one_line(monkeypatch, tmp_path, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load_saved", interrupt)
    assert program.main(["--model", "imta_cifar100", "--output", str(tmp_path / "x.onnx")]) == 130
    assert capsys.readouterr().err == "export_onnx.py: interrupted\n"


@needs_onnx
def test_an_interrupted_export_leaves_no_mixture(converted, tmp_path):
    """The second block cannot be written; the first is new and the third old."""
    network, blocks = converted
    export_blocks(network, tmp_path, None, blocks)
    (tmp_path / "block2.onnx").unlink()
    (tmp_path / "block2.onnx").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*block2\.onnx"):
        export_blocks(network, tmp_path, None, blocks)
    with pytest.raises(FileNotFoundError, match=r"network\.json"):
        OnnxPredictor(tmp_path)


@needs_onnx
def test_blocks_of_a_deeper_network_are_removed_and_nothing_else(converted, tmp_path):
    network, blocks = converted
    export_blocks(network, tmp_path, None, blocks)
    exported = sorted(path.name for path in tmp_path.iterdir())
    shutil.copy(tmp_path / "block3.onnx", tmp_path / "block4.onnx")
    shutil.copy(tmp_path / "block3.onnx", tmp_path / "block10.onnx")
    others = {"block5.onnx": b"no network", "block6.txt": b"", "blocks.onnx": b"", "other.onnx": b""}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    model = onnx.load(tmp_path / "block3.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "block7.onnx")
    (tmp_path / "block8.onnx").mkdir()
    export_blocks(network, tmp_path, None, blocks)
    kept = [*exported, *others, "block7.onnx", "block8.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@needs_onnx
def test_a_block_of_another_program_is_not_replaced(converted, tmp_path):
    network, blocks = converted
    (tmp_path / "block2.onnx").write_bytes(b"of another program")
    with pytest.raises(UserError, match=r"block2\.onnx was not written by an export"):
        export_blocks(network, tmp_path, None, blocks)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"of another program"]


@needs_onnx
def test_only_blocks_that_an_earlier_export_lists_are_replaced(converted, tmp_path):
    network, blocks = converted
    export_blocks(network, tmp_path, None, blocks)
    (tmp_path / "block2.onnx").write_bytes(b"damaged")
    export_blocks(network, tmp_path, None, blocks)
    content = json.loads((tmp_path / "network.json").read_text(encoding="utf-8"))
    (tmp_path / "block3.onnx").write_bytes(b"of another program")
    for listed in (content["blocks"][:2], 3):  # of a network with two exits; damaged
        (tmp_path / "network.json").write_text(json.dumps(content | {"blocks": listed}), encoding="utf-8")
        with pytest.raises(UserError, match=r"block3\.onnx was not written by an export"):
            export_blocks(network, tmp_path, None, blocks)
    assert (tmp_path / "block3.onnx").read_bytes() == b"of another program"
    assert (tmp_path / "network.json").exists()


@needs_onnx
def test_more_exits_than_one_file_holds(tmp_path):
    """Graphs inside graphs have a limit, which a file per block does not meet."""
    network = make_small("chain").eval()
    network.description = describe(network)
    first, middle, last = convert_blocks(network)
    network.num_exits = 40
    network.description = replace(network.description, operations=list(range(1, 41)))
    blocks = [first, *[middle] * 38, last]
    with pytest.raises(UserError, match=r"x\.onnx: an ONNX file holds at most 2 GiB and about 30 exits"):
        export_onnx(network, tmp_path / "x.onnx", None, blocks)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_no_description_is_one_line(tmp_path):
    for export in (export_onnx, export_blocks):
        with pytest.raises(UserError, match=r"the network has no description, .* export what models.load"):
            export(make_network(1), tmp_path / "network")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_paths_may_be_text(converted, tmp_path):
    network, blocks = converted
    export_onnx(network, f"{tmp_path}/a/network.onnx", None, blocks)
    export_blocks(network, f"{tmp_path}/b", None, blocks)
    pixels = random_pixels(1).numpy()
    one, other = (OnnxPredictor(f"{tmp_path}/{name}", threads=1) for name in ("a/network.onnx", "b"))
    np.testing.assert_allclose(one.predict(pixels, [2] * 3).logits, other.predict(pixels, [2] * 3).logits)


@needs_onnx
def test_what_cannot_be_exported(exported, tmp_path):
    network, curve, _ = exported
    points = tuple(replace(point, policy=replace(point.policy, measure="margin")) for point in curve.points)
    with pytest.raises(UserError, match="compares softmax only; these policies compare margin"):
        export_onnx(network, tmp_path / "x.onnx", replace(curve, points=points))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the directory"):
        export_blocks(network, tmp_path / "file", curve)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


@needs_onnx
def test_the_predictor_needs_no_pytorch(export_path):
    code = (
        f"import sys, onnx_predictor; onnx_predictor.OnnxPredictor({str(export_path)!r}, 1); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_onnx
def test_policies_of_other_weights_are_not_exported(exported, tmp_path):
    curve = replace(exported[1], fingerprint="another")
    with pytest.raises(UserError, match="policies of another network, or of other weights"):
        export_onnx(exported[0], tmp_path / "network.onnx", curve)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_another_programs_network_json_stays(exported, tmp_path):
    for content in ("{}", "[", '{"format": "tf"}'):
        (tmp_path / "network.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="was not written by an export"):
            export_blocks(exported[0], tmp_path)
        assert (tmp_path / "network.json").read_text(encoding="utf-8") == content


@pytest.mark.slow
@needs_onnx
def test_every_way_gives_the_same_predictions(finished, tmp_path, capsys):
    """All runtimes that are installed agree, after the command line has written a directory."""
    model = str(finished / "IMTA")
    output = f"{tmp_path / 'blocks'}/"
    assert program.main(["--model", model, "--output", output]) == 0
    assert capsys.readouterr().out.endswith(f"policies: {tmp_path / 'blocks'}\n")
    assert (tmp_path / "blocks" / "network.json").is_file()
    images, _ = synthetic.generate(30, 0, 32)
    for n, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{n}.png")
    assert same_predictions.main([str(tmp_path), "--model", model, "--openvino-images", "20"]) == 0
    with pytest.raises(SystemExit):
        same_predictions.main([str(tmp_path), "--model", model, "--openvino-images", "0"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("30 images; ")
    ways = [line.split(":")[0] for line in lines if "predictions differ" in line]
    assert ways[:2] == ["ONNX, one file", "ONNX, a file per block"]
    assert ("Node.js, one file" in ways) is same_predictions.has_node()
    assert ("OpenVINO" in ways) is bool(importlib.util.find_spec("openvino"))


@needs_onnx
def test_waiting_threads_hardly_spin(exported, monkeypatch):
    """Beside a busy core, threads that spin as long as ONNX Runtime likes make every call much slower."""
    import onnxruntime

    real, given = onnxruntime.InferenceSession, []

    def session(path, options, **others):
        given.append(options)
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxPredictor(exported[2] / "network.onnx")
    entry = given[0].get_session_config_entry
    if entry("session.intra_op.allow_spinning") == "1":  # since version 1.26, which can limit it
        assert 0 < int(entry("session.intra_op.spin_duration_us")) <= 100


@needs_openvino
def test_openvino(exported, capsys):
    from examples import openvino_predictor

    folder, pixels = exported[2] / "network", random_pixels(33).numpy()
    ours = openvino_predictor.OpenVinoPredictor(folder, threads=1)
    theirs = OnnxPredictor(folder, threads=1)
    for thresholds in ([2.0] * 3, [-1.0] * 3, None):
        found, expected = ours.predict(pixels, thresholds), theirs.predict(pixels, thresholds)
        assert found.exits.tolist() == expected.exits.tolist()
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert openvino_predictor.main([str(folder), "--threads", "1", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.endswith("predictions that differ: 0 of 64\n")
    assert openvino_predictor.main([str(folder / "missing")]) == 2


@needs_openvino
def test_threads_may_share_openvino(exported):
    from examples import openvino_predictor

    predictor = openvino_predictor.OpenVinoPredictor(exported[2] / "network", threads=1)
    batches = [random_pixels(8).numpy() for _ in range(2)] * 20
    expected = [predictor.predict(pixels, [2.0] * 3).logits for pixels in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pixels: predictor.predict(pixels, [2.0] * 3).logits, batches))
    assert all(map(np.array_equal, found, expected))


@needs_openvino
def test_openvino_refuses_in_one_line(exported, tmp_path, capsys):
    from examples import openvino_predictor

    # One file would run on ONNX Runtime.
    assert openvino_predictor.main([str(exported[2] / "network.onnx")]) == 2
    assert "is one file with control flow; OpenVINO needs a directory of blocks\n" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"there is no file ~no-such-user/network"):
        openvino_predictor.OpenVinoPredictor("~no-such-user/network")
    with pytest.raises(SystemExit):
        openvino_predictor.main([str(exported[2] / "network"), "--rounds", "0"])
    shutil.copytree(exported[2] / "network", tmp_path, dirs_exist_ok=True)
    (tmp_path / "block2.onnx").write_bytes((tmp_path / "block2.onnx").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot load the model .*block2\.onnx") as caught:
        openvino_predictor.OpenVinoPredictor(tmp_path)
    assert "\n" not in str(caught.value)


@needs_onnx
@pytest.mark.parametrize(
    ("classes", "confidence", "exits", "fails"),
    [
        ([1, 2, 3], [0.5, 0.6, 0.7], [0, 1, 2], False),
        ([1, 5, 3], [0.5, 0.6, 0.7], [0, 2, 2], False),  # left later: the second image is near at exit 2
        ([5, 2, 3], [0.5, 0.6, 0.7], [1, 1, 2], True),  # left later: the first is near no threshold
        ([1, 2, 3], [0.5, 0.6, 0.7], [0, 1, 0], True),  # left earlier: the third is near at exit 2 only
        ([1, 5, 3], [0.5, 0.6, 0.7], [0, 1, 2], True),  # another class at the same exit
        ([1, 2, 3], [0.5, 0.6, 0.7001], [0, 1, 2], True),
    ],
)
def test_only_images_near_a_threshold_may_differ(classes, confidence, exits, fails):
    near = np.array([[False, False, False], [False, True, True], [False, False, False]])
    expected = same_predictions.Rows(np.array([1, 2, 3]), np.array([0.5, 0.6, 0.7]), np.array([0, 1, 2]))
    found = same_predictions.Rows(*map(np.array, (classes, confidence, exits)))
    assert same_predictions.report("a way", found, expected, near, 1e-5) is fails


@needs_node
def test_a_failure_of_node_is_one_line(exported):
    network, _, folder = exported
    names = network.description.data.class_names
    with pytest.raises(UserError, match=r"classify\.mjs failed: there are 2 thresholds"):
        same_predictions.by_node(folder / "network", Policy((0.5, 0.5)), random_pixels(1), names)


@needs_node
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("0.5,0.5", "there are 2 thresholds; this network has 3 exits"),
        ("10", "no policy needs at most 10 operations per image: the cheapest needs 100000"),
        *[(text, f'"{text}" is neither a number') for text in ("nan,0,0", "0.9,,0.9", "a,0,0", "much", "")],
    ],
)
def test_node_refuses_thresholds_in_one_line(exported, tmp_path, limit, message):
    image = tmp_path / "image.ppm"
    image.write_bytes(b"P6 32 32 255\n" + bytes(3072))
    assert refused_by_node(exported[2] / "network", limit, image).startswith(message)


@needs_node
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("predict(pixels, [0.5, NaN, 0.5])", "thresholds are 0.5, NaN, 0.5; not all of them are numbers"),
        (
            "predict(pixels, [0.5, , null])",
            "thresholds are 0.5, undefined, null; not all of them are numbers",
        ),
        ("predict(pixels, '0.5')", "thresholds are 0, ., 5; not all of them are numbers"),
        ("predict(pixels)", "there are no thresholds; this network has 3 exits"),
        ("choose()", "the operations per image are undefined, which is not a number"),
        ("choose(NaN)", "the operations per image are NaN, which is not a number"),
    ],
)
def test_bad_calls_in_javascript_are_one_line(export_path, call, message):
    assert run_javascript(export_path, f"predictor.{call}").stderr == f"{message}\n"


@needs_node
def test_javascript_reads_the_same_metadata_from_both_kinds(exported, export_path):
    shown = run_javascript(export_path, "[predictor.preprocessing, predictor.fingerprint]").stdout
    python = OnnxPredictor(export_path, threads=1)
    assert json.loads(shown) == [python.preprocessing, python.fingerprint]


@needs_node
def test_javascript_without_policies(converted, tmp_path):
    network, blocks = converted
    export_both(network, tmp_path, None, blocks)
    for name in ("network", "network.onnx"):
        message = "this network was exported without policies: pass thresholds\n"
        assert run_javascript(tmp_path / name, "predictor.choose(1e9)").stderr == message


@needs_node
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "older"}, f'network.json was not written by .* its format is "older", not "{FORMAT}"'),
        ({"points": None}, "network.json lacks points$"),
        ({"preprocessing": None, "blocks": None}, "network.json lacks preprocessing, blocks$"),
        ({"blocks": []}, "network.json has 3 exits, but 0 blocks"),
        ({"blocks": [{"file": "../block1.onnx"}] * 3}, "network.json is damaged: see its blocks$"),
        ({"blocks": [{"file": "%2e%2e"}] * 3}, "network.json is damaged: see its blocks$"),
        ({"blocks": [None] * 3}, "network.json is damaged: see its blocks$"),
        ("null", "network.json was not written by this version"),
        ("{", "cannot read network.json: "),
    ],
)
def test_node_refuses_a_bad_description_in_one_line(exported, tmp_path, change, message):
    shutil.copytree(exported[2] / "network", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "network.json"
    if isinstance(change, dict):
        content = json.loads(file.read_text(encoding="utf-8")) | change
        change = json.dumps({name: x for name, x in content.items() if x is not None})
    file.write_text(change, encoding="utf-8")
    assert re.match(message, refused_by_node(tmp_path))


@needs_node
def test_node_refuses_bad_files_in_one_line(exported, tmp_path):
    folder = exported[2]
    assert refused_by_node(tmp_path / "missing.onnx") == f"there is no file {tmp_path / 'missing.onnx'}\n"
    block = folder / "network" / "block1.onnx"
    message = "class_names, .*weights; it is one block of a network: pass its directory"
    assert re.match(f"{re.escape(str(block))} lacks {message}", refused_by_node(block))
    whole = (folder / "network.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    for content in (whole[:-1000], whole[: len(whole) // 2], b"no network\n"):
        cut.write_bytes(content)
        assert refused_by_node(cut).startswith(f"{cut} is damaged, or is no ONNX file")
    model = onnx.load(folder / "network.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    for change, message in ((("points", None), "lacks points"), (("points", "["), "points of .*x.onnx")):
        changed = dict([*metadata.items(), change])
        onnx.helper.set_model_props(model, {name: x for name, x in changed.items() if x is not None})
        onnx.save(model, tmp_path / "x.onnx")
        assert re.search(message, refused_by_node(tmp_path / "x.onnx"))
    model.graph.node[0].op_type = "Unheard"
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "x.onnx")
    assert refused_by_node(tmp_path / "x.onnx").startswith(f"cannot load {tmp_path / 'x.onnx'}: ")

    blocks = tmp_path / "blocks"
    shutil.copytree(folder / "network", blocks)
    (blocks / "block3.onnx").write_bytes((blocks / "block3.onnx").read_bytes()[:-1000])
    assert refused_by_node(blocks).startswith("block3.onnx is damaged, or is no ONNX file")
    (blocks / "block3.onnx").unlink()
    assert refused_by_node(blocks) == f"there is no file {blocks / 'block3.onnx'}\n"


@needs_node
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is no binary PPM image"),
        (b"P5 32 32 255\n" + bytes(1024), " is no binary PPM image"),
        (b"P6 31 32 255\n" + bytes(2976), " has 31 x 32 pixels; this network needs 32 x 32"),
        (b"P6 32 32 65535\n" + bytes(6144), " has values up to 65535"),
        (b"P6 32 32 255\n" + bytes(3071), " is cut off: it has 3071 of 3072 bytes"),
        (b"P6 32 32 255\n" + bytes(3072) + b"P6 32 32 255\n", " is cut off: it has 0 of 3072 bytes"),
        (b"P6 32 32 255\n" + bytes(3072) + b"more", " is no binary PPM image"),
        (None, "cannot read "),
    ],
)
def test_node_refuses_bad_images_in_one_line(exported, tmp_path, content, message):
    image = tmp_path / "image.ppm"
    if content is None:
        image.mkdir()
    else:
        image.write_bytes(content)
    error = refused_by_node(exported[2] / "network.onnx", image=image)
    assert message in error
    assert "image.ppm" in error or content is None


@needs_node
def test_node_reads_comments_and_ends_of_ppm_files(exported, tmp_path):
    pixels = np.random.default_rng(0).integers(10, 13, 3072, dtype=np.uint8).tobytes()  # newlines among them
    plain = b"P6\n32 32\n255\n" + pixels
    commented = b"P6 # a comment\n#another 255\n32\t32 # 1\n255\n" + pixels
    for name, content in (("plain", plain), ("many", plain + b"\n" + commented + commented + b"\r\n")):
        (tmp_path / f"{name}.ppm").write_bytes(content)
    names = [str(tmp_path / name) for name in ("plain.ppm", "many.ppm")]
    result = classify(exported[2] / "network.onnx", "0.5,0.5,0", *names)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [names[0], *[names[1]] * 3]
    assert len({line.split(": ")[1] for line in lines}) == 1


def classify(*arguments):
    """Run the program for Node.js."""
    command = ["node", "classify.mjs", *map(str, arguments)]
    return subprocess.run(
        command, cwd=same_predictions.BROWSER, capture_output=True, text=True, encoding="utf-8"
    )


def refused_by_node(model, limit="1e9", image="missing.ppm"):
    """Return the one line with which the program for Node.js ends."""
    result = classify(model, limit, image)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def run_javascript(path, expression):
    """Run JavaScript with ``predictor`` and ``pixels``, and print its value or the message of its error."""
    code = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ createRequire }} from "node:module";
        import {{ Predictor }} from "{(same_predictions.BROWSER / "predictor.mjs").as_uri()}";
        const ort = createRequire("{same_predictions.BROWSER.as_uri()}/")("onnxruntime-node");
        const path = {json.dumps(str(path))};
        const predictor = path.endsWith(".onnx")
            ? await Predictor.loadFile(ort, readFileSync(path))
            : await Predictor.load(ort, (name) => readFileSync(`${{path}}/${{name}}`));
        const pixels = new Uint8Array(3 * 32 * 32);
        try {{
            console.log(JSON.stringify(await {expression}));
        }} catch (error) {{
            console.error(error.message);
        }}
    """
    command = ["node", "--input-type=module", "-e", code]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
