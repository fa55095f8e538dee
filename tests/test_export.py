"""Export: ONNX Runtime gives PyTorch's logits and stops where PyTorch stops; without the optional packages, one line."""

import importlib.util
import json
import sys

import pytest
import torch

from adaptive_inference import export
from adaptive_inference.policies import policy_curve, read_policy, write_policy
from adaptive_inference.predictor import AdaptivePredictor, simulate
from models import MSDNet
from tests.conftest import TINY_NETWORK
from tests.test_predictor import logits_of, make_network, quantile_policy
from utils import UserError

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


@pytest.mark.parametrize(
    ("package", "use"),
    [("onnx", lambda folder: export.export_onnx(MSDNet(**TINY_NETWORK).eval(), folder, 32)), ("onnxruntime", export.OnnxNetwork)],
)
def test_missing_package_is_one_line(package, use, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what importing a missing package comes to
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install -r requirements-export\.txt") as caught:
        use(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_command_line_without_a_checkpoint(tmp_path, capsys):
    assert export.main(["--checkpoint", str(tmp_path / "missing.pt"), "--output", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_impossible_descriptions(tmp_path):
    path = tmp_path / export.DESCRIPTION
    with pytest.raises(UserError, match="holds no exported network"):
        export._read_description(path)
    good = {"format": export.FORMAT, "network": {"fingerprint": "x"}, "num_exits": 2, "num_classes": 3, "image_size": 32}
    for damage in ({"format": "other"}, {"num_exits": 10**6}, {"num_exits": "2"}, {"network": None}, {"image_size": True}):
        path.write_text(json.dumps({**good, **damage}))
        with pytest.raises(UserError, match="describes no exported network"):
            export._read_description(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="describes no exported network"):
        export._read_description(path)


if INSTALLED:  # an optional install: elsewhere there is nothing to test

    @pytest.mark.parametrize("lazy", [True, False])
    @pytest.mark.parametrize(
        ("stage", "options", "size"),
        [
            (1, {}, 32),
            (2, {"num_blocks": 4, "step_mode": "lin_grow"}, 32),
            (2, {"bottleneck": False, "prune": "min", "base": 2}, 24),
            (1, {"reduction": 0.0}, 33),
        ],
    )
    def test_same_answers(stage, options, size, lazy, tmp_path):
        network = make_network(stage, **options).float()
        export.export_onnx(network, tmp_path, size, lazy)
        runner = export.OnnxNetwork(tmp_path, threads=1)
        for count in (1, 13):
            images = torch.randn(count, 3, size, size)
            for ours, expected in zip(runner(images), logits_of(network, images), strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        logits = logits_of(network, images)
        policy = quantile_policy(logits, 0.4)
        expected, prediction = simulate(logits, policy), AdaptivePredictor(runner, policy)(images)
        assert torch.equal(prediction.exits, expected.exits)
        assert torch.equal(prediction.classes, expected.classes)

    def test_imagenet_stem(tmp_path):
        network = MSDNet(**{**TINY_NETWORK, "small_inputs": False}).eval()
        size = network.minimum_image_size
        export.export_onnx(network, tmp_path, size)
        images = torch.randn(2, 3, size, size)
        for ours, expected in zip(export.OnnxNetwork(tmp_path, 1)(images), logits_of(network, images), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)

    def test_the_network_s_policies_are_accepted_and_no_others(tmp_path):
        network = make_network(2).float()
        export.export_onnx(network, tmp_path, 32)
        runner = export.OnnxNetwork(tmp_path, 1)
        rows = [{"p": 1, "thresholds": [0.5] * 3, "val_acc": 50.0, "val_flops": 2.0}]
        for source in (network, make_network(2).float()):
            write_policy(tmp_path / "policy.json", policy_curve(source, [1, 2, 3], {"geometric": rows}))
            if source is network:
                assert read_policy(tmp_path / "policy.json", runner).points[0].operations == 2.0
            else:
                with pytest.raises(UserError, match="another network"):
                    read_policy(tmp_path / "policy.json", runner)

    def test_damaged_model_is_one_line(tmp_path):
        export.export_onnx(make_network(1).float(), tmp_path, 32)
        (tmp_path / "exit_2.onnx").write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"cannot load the model .*exit_2\.onnx") as caught:
            export.OnnxNetwork(tmp_path)
        assert "\n" not in str(caught.value)

    def test_too_small_images(tmp_path):
        with pytest.raises(UserError, match="too small"):
            export.export_onnx(MSDNet(**TINY_NETWORK).eval(), tmp_path, 8)
