"""Export: one ONNX file answers what the PyTorch predictor answers, image by image; what it cannot use is refused in one line."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import export_onnx as program
from adaptive_inference.export import export_onnx
from adaptive_inference.policies import Policy, policy_curve
from adaptive_inference.predictor import AdaptivePredictor
from image_data import synthetic
from models import MSDNet
from tests.conftest import TINY_NETWORK, policy_point
from tests.test_predictor import ALL, NONE, logits_of, make_network, quantile_policy
from utils import UserError

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.35]


def description(size=32, num_classes=10):
    class_names = [f"class {c}" for c in range(num_classes)]
    return SimpleNamespace(data=SimpleNamespace(class_names=class_names, image_size=size, mean=MEAN, std=STD))


def random_pixels(count, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def normalised(pixels):
    return (pixels / 255 - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # what importing a missing package comes to
    with pytest.raises(UserError, match=r"needs the package onnx: pip install -r requirements-export\.txt"):
        export_onnx(MSDNet(**TINY_NETWORK).eval(), tmp_path / "x.onnx", description())
    assert list(tmp_path.iterdir()) == []


def test_command_line_without_a_checkpoint(tmp_path, capsys):
    assert program.main(["--model", str(tmp_path / "missing.pt"), "--output", str(tmp_path / "x.onnx")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


if INSTALLED:  # an optional install: elsewhere there is nothing to test
    import onnx

    from examples import same_answers
    from onnx_predictor import OnnxPredictor

    @pytest.fixture(scope="module")
    def exported(tmp_path_factory):
        """A network, its policies, and its file."""
        torch.manual_seed(0)
        network, path = make_network(2).float(), tmp_path_factory.mktemp("onnx") / "network.onnx"
        points = [
            (1, [0.2, 0.3, 0.4], 40.0, 1e5),
            (2, [0.5, 0.6, 0.7], 60.0, 2e5),
            (3, [0.8, 0.8, 0.8], 60.0, 3e5),
        ]
        curve = policy_curve(network, [1, 2, 3], [policy_point(*point, [0.2, 0.3, 0.5]) for point in points])
        export_onnx(network, path, description(), curve)
        return network, curve, path

    @pytest.mark.parametrize(
        ("stage", "options", "size"),
        [
            (1, {}, 32),
            (2, {"num_blocks": 4, "step_mode": "lin_grow"}, 32),
            (2, {"bottleneck": False, "prune": "min", "base": 2}, 24),
            (1, {"reduction": 0.0, "boosted_exits": True}, 33),
            (1, {"num_blocks": 1}, 32),
            (1, {"small_inputs": False}, 65),
        ],
    )
    def test_same_answers(stage, options, size, tmp_path):
        network = make_network(stage, **options).float()
        export_onnx(network, tmp_path / "network.onnx", description(size))
        runner = OnnxPredictor(tmp_path / "network.onnx", threads=1)
        pixels = random_pixels(40, size)
        images = normalised(pixels)
        logits = logits_of(network, images)
        none, every = (Policy((threshold,) * network.num_exits) for threshold in (NONE, ALL))
        for count, policy in (
            (0, none),
            (40, quantile_policy(logits, 0.4)),
            (40, none),
            (40, every),
            (1, none),
            (1, every),
        ):
            ours = runner.predict(pixels[:count].numpy(), policy.thresholds)
            expected = AdaptivePredictor(network, policy)(images[:count])
            assert ours.exits.tolist() == expected.exits.tolist()
            assert ours.classes.tolist() == expected.classes.tolist()
            torch.testing.assert_close(
                torch.from_numpy(ours.confidence), expected.confidence, atol=1e-5, rtol=1e-4
            )
            answered = logits[expected.exits, torch.arange(count)]
            torch.testing.assert_close(torch.from_numpy(ours.logits), answered, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("ensemble", [None, [[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [0.2, 0.0, 0.7]]])
    def test_same_probabilities_by_temperatures_and_ensembles(tmp_path, ensemble):
        network, pixels = make_network(2).float(), random_pixels(40)
        images = normalised(pixels)
        thresholds = list(quantile_policy(logits_of(network, images), 0.4).thresholds)
        policy = {"temperatures": (2.0, 0.5, 3.0), "ensemble": ensemble and tuple(map(tuple, ensemble))}
        point = policy_point(1, thresholds, 50.0, 1e5, [0.4, 0.3, 0.3], **policy)
        rule = "ensemble" if ensemble else "optimised"
        curve = policy_curve(network, [1, 2, 3], [replace(point, rule=rule)])
        export_onnx(network, tmp_path / "network.onnx", description(), curve)
        ours = OnnxPredictor(tmp_path / "network.onnx", threads=1).predict(pixels.numpy())
        expected = AdaptivePredictor(network, curve.points[0].policy)(images)
        assert len(set(ours.exits)) == 3
        assert (ours.exits.tolist(), ours.classes.tolist()) == (
            expected.exits.tolist(),
            expected.classes.tolist(),
        )
        torch.testing.assert_close(
            torch.from_numpy(ours.logits).softmax(1), expected.probs, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            torch.from_numpy(ours.confidence), expected.confidence, atol=1e-5, rtol=1e-4
        )

    def test_the_file_describes_itself(exported):
        _, curve, path = exported
        runner = OnnxPredictor(path, threads=1)
        assert (runner.class_names[3], runner.image_size, runner.num_exits, runner.num_classes) == (
            "class 3",
            32,
            3,
            10,
        )
        assert runner.operations == sorted(runner.operations)
        metadata = runner.session.get_modelmeta().custom_metadata_map
        assert metadata["fingerprint"] == curve.fingerprint
        for operations, p in ((math.inf, 2), (1e5, 1), (2.5e5, 2), (None, 3)):
            np.testing.assert_array_equal(
                runner.choose(operations), np.array(curve.points[p - 1].policy.thresholds, np.float32)
            )
        pixels = random_pixels(20).numpy()
        np.testing.assert_array_equal(
            runner.predict(pixels).exits, runner.predict(pixels, [0.8, 0.8, 0.8]).exits
        )
        with pytest.raises(ValueError, match="none of this file's 3 policies spends at most 10 operations"):
            runner.choose(operations=10)

    def test_bad_calls_are_one_line(exported):
        runner, good = OnnxPredictor(exported[2], threads=1), random_pixels(2).numpy()
        for images, thresholds, message in (
            (good, [0.5] * 4, r"thresholds are \(4,\); this network has 3 exits"),
            (
                good.astype(np.float32),
                [0.5] * 3,
                r"images are float32 \(2, 3, 32, 32\); this network wants uint8 \(N, 3, 32, 32\)",
            ),
            (good[:, :, :31], [0.5] * 3, r"images are uint8 \(2, 3, 31, 32\)"),
            (good[0], [0.5] * 3, r"images are uint8 \(3, 32, 32\)"),
        ):
            with pytest.raises(ValueError, match=message):
                runner.predict(images, thresholds)
            # The file itself refuses them, too, in any language.
            with pytest.raises(Exception, match=r"(?i)invalid|unexpected"):
                runner.session.run(None, {"images": images, "thresholds": np.array(thresholds, np.float32)})

    def test_bad_files_are_one_line(exported, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            OnnxPredictor(tmp_path / "missing.onnx")
        (tmp_path / "cut.onnx").write_bytes(exported[2].read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"cannot load the model .*cut\.onnx") as caught:
            OnnxPredictor(tmp_path / "cut.onnx")
        assert "\n" not in str(caught.value)
        model = onnx.load(exported[2])
        del model.metadata_props[:]
        onnx.save(model, tmp_path / "foreign.onnx")
        with pytest.raises(ValueError, match="its format is None"):
            OnnxPredictor(tmp_path / "foreign.onnx")

    def test_what_cannot_be_exported(exported, tmp_path):
        network = exported[0]
        with pytest.raises(UserError, match="too small"):
            export_onnx(network, tmp_path / "x.onnx", description(8))
        points = tuple(
            replace(point, policy=replace(point.policy, measure="margin")) for point in exported[1].points
        )
        with pytest.raises(UserError, match="softmax alone; these policies are of margin"):
            export_onnx(network, tmp_path / "x.onnx", description(), replace(exported[1], points=points))
        assert list(tmp_path.iterdir()) == []

    def test_the_runner_needs_no_pytorch(exported):
        code = f"import sys, onnx_predictor as o; o.OnnxPredictor({str(exported[2])!r}, 1); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_the_same_answers_in_four_ways(tmp_path, monkeypatch, capsys):
        """torch.hub, predict.py, ONNX in Python, and in JavaScript where it is installed."""
        images, _ = synthetic.generate(10, 0, 32)
        files = [str(tmp_path / f"{n}.png") for n in range(10)]
        for image, file in zip(images, files, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        assert same_answers.main(files) == 0
        *answers, summary = capsys.readouterr().out.splitlines()
        assert summary.endswith("identical answers to 10 images")
        assert ("JavaScript:" in summary) is same_answers.has_javascript()
        assert len({line[-1] for line in answers[-10:]}) > 1
        monkeypatch.setattr(same_answers, "by_hub", lambda *_: [(0, 0.5, 1)] * 10)
        assert same_answers.main(files) == 1
