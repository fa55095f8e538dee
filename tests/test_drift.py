"""The drift alarm rarely fires on images like the held-out ones, and soon on others."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from adaptive_inference import AdaptivePredictor, policy_curve, read_policy, simulate
from adaptive_inference.policies import Point, Policy
from adaptive_inference.promises.drift import (
    BETS,
    NUM_IMAGES,
    SHARED,
    DriftAlarm,
    read_reference,
    reference_of,
    reference_path,
    write_reference,
)
from experiments import drift
from experiments.corruptions import CORRUPTIONS
from tests.helpers import make_network, quantile_policy
from utils import UserError


def fired(alarm, scores, batch_size=64):
    """Feed scores in batches, and return after how many images the alarm fired, or None."""
    for batch in scores.split(batch_size):
        alarm.update(batch)
    return alarm.fired_after


def test_false_alarms_are_rare():
    generator = torch.Generator().manual_seed(1)
    count = 0
    for seed in range(100):
        scores = torch.randn(1500, generator=generator)
        count += fired(DriftAlarm(scores[:500], seed=seed), scores[500:]) is not None
    assert count <= 4  # of 1 expected at most; 5 or more have a probability below 0.4 %


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_fires_soon_on_shifted_scores(shift):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2500, generator=generator)
    alarm = DriftAlarm(scores[:2000])
    assert fired(alarm, scores[2000:]) is None
    fired_after = fired(alarm, torch.randn(500, generator=generator) + shift)
    assert 500 < fired_after < 580
    assert alarm.num_images == fired_after  # it stops counting
    assert alarm.log_capital >= math.log(100)


def test_capital_against_a_plain_loop():
    """Compare with p-values by counting and with the product of the bets, on scores with many ties."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(-5, 5, (90,), generator=generator).half() / 4
    alarm, random = DriftAlarm(scores[:30], level=1e-12, seed=7), np.random.default_rng(7)
    capitals = np.full(len(BETS), 1 / len(BETS))
    for i in range(30, 90):
        alarm.update(scores[i : i + 1])
        larger = (scores[:i] > scores[i]).sum().item()
        equal = (scores[:i] == scores[i]).sum().item() + 1
        p = (larger + random.random() * equal) / (i + 1)
        capitals = capitals * (1 + BETS * (p - 0.5))
        capitals = (1 - SHARED) * capitals + SHARED * capitals.sum() / len(BETS)
        assert alarm.log_capital == pytest.approx(math.log(capitals.sum()))


def test_batches_do_not_matter():
    scores = torch.randn(700, generator=torch.Generator().manual_seed(4))
    single, batched = DriftAlarm(scores[:500]), DriftAlarm(scores[:500])
    fired(single, scores[500:], 1)
    fired(batched, scores[500:], 100)
    assert single.log_capital == batched.log_capital


def test_extreme_scores():
    alarm = DriftAlarm(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e9]))
    assert not alarm.update(torch.tensor([math.nan, math.inf, -1e9, 0.0]))
    assert math.isfinite(alarm.log_capital)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return make_network(2).float()


@pytest.fixture(scope="module")
def logits(network):
    with torch.no_grad():
        return torch.stack(network(torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(5))))


def curve_of(network, policy):
    return policy_curve(network, [1, 2, 3], [Point(policy, 50.0, 2.0, (0.5, 0.0, 0.5))])


@pytest.mark.parametrize("measure", ["softmax", "entropy", "margin", "patience"])
def test_scores_are_those_of_the_predictor(network, logits, measure):
    policy = quantile_policy(logits, 0.5, measure)
    if measure == "patience":
        policy = Policy((2.0, 2.0, -1e8), measure)
    reference = reference_of(logits, curve_of(network, policy))
    weights = ((1.0, 0.0, 0.0), (0.5, 0.6, 0.0), (0.2, 0.3, 0.7))
    for changes in ({}, {"temperatures": (2.0, 3.0, 0.5)}, {"ensemble": weights}):
        own = dataclasses.replace(policy, **changes)
        assert torch.equal(reference.scores(own), simulate(logits, own).log_sum_exp.half())
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        expected = simulate(torch.stack(network(images)), policy)
    predicted = AdaptivePredictor(network, policy)(images)
    torch.testing.assert_close(predicted.log_sum_exp, expected.log_sum_exp)


def test_file(network, logits, tmp_path):
    policy = quantile_policy(logits, 0.5)
    curve = curve_of(network, policy)
    path = reference_path(tmp_path / "name.policy.json")
    assert path == tmp_path / "name.reference.safetensors"
    assert reference_path(tmp_path / "policy.json") == tmp_path / "reference.safetensors"
    assert reference_path(tmp_path / "policy.bfloat16.json") == tmp_path / "reference.bfloat16.safetensors"
    assert reference_path(tmp_path / "mine.json") == tmp_path / "mine.reference.safetensors"
    with pytest.raises(UserError, match="--evalmode dynamic writes it"):
        read_reference(path, curve)
    many = logits.repeat(1, 10, 1)
    write_reference(path, reference_of(many, curve))
    reference = read_reference(path, curve)
    assert reference.scores(policy).shape == (NUM_IMAGES,)
    assert torch.equal(reference.scores(policy), reference_of(many, curve).scores(policy))
    assert path.stat().st_size < 40 * NUM_IMAGES
    with pytest.raises(UserError, match="belongs to another network, dtype"):
        read_reference(path, curve_of(make_network(1).float(), policy))
    with pytest.raises(UserError, match="another network, dtype or measure"):
        read_reference(path, curve_of(network, Policy(policy.thresholds, "margin")))
    with pytest.raises(ValueError, match="compares the margin of 3 exits"):
        reference.scores(Policy(policy.thresholds, "margin"))


@pytest.mark.parametrize("damage", ["cut", "foreign", "text"])
def test_damaged_file(network, logits, tmp_path, damage):
    curve, path = curve_of(network, quantile_policy(logits, 0.5)), tmp_path / "reference.safetensors"
    write_reference(path, reference_of(logits, curve))
    content = path.read_bytes()
    changed = {
        "cut": content[:-100],
        "foreign": content.replace(b"reference 1", b"reference 9"),
        "text": b"no",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match="is not a reference file of this project"):
        read_reference(path, curve)


@pytest.mark.slow
def test_experiment(finished, tiny_demo, tmp_path, capsys):
    """The experiment prints its tables for a run, and reads the logits of the first time the second time."""
    network, table = finished / "GE" / "best.safetensors", tmp_path / "corruptions.csv"
    flags = ["--limit", "60", "--clean-streams", "3", "--streams", "2", "--cache", str(tmp_path / "cache")]
    printed = []
    for _ in range(2):
        assert drift.main([str(network), *flags, "--csv", str(table)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "of 3 streams of 60 clean images" in printed[0]
    assert "clean images sorted by class: " in printed[0]
    assert len(table.read_text().splitlines()) == 22
    assert len(list((tmp_path / "cache").iterdir())) == 21


def test_corruptions_keep_the_form_of_images():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    for corruption in CORRUPTIONS.values():
        errors = []
        for strength in corruption.strengths:
            corrupted = corruption.apply(images, strength)
            assert (corrupted.shape, corrupted.dtype) == (images.shape, images.dtype)
            errors.append((corrupted.float() - images.float()).abs().mean().item())
        assert errors == sorted(errors)
        assert errors[0] > 0


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(8)
    for i in range(40):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


def test_command_line(finished, photographs, tmp_path, capsys):
    """Photographs fire it if all of them score higher than the held-out images; other statuses come first."""
    run = tmp_path / "run"
    shutil.copytree(finished / "GE", run)
    curve = read_policy(run / "policy.json")
    reference = read_reference(run / "reference.safetensors", curve)
    shifted = dataclasses.replace(reference, log_sum_exp=reference.log_sum_exp - 100)
    write_reference(run / "reference.safetensors", shifted)
    flags = [str(photographs), "--model", str(run), "--drift-alarm"]
    assert predict.main(flags[:-1]) == 0
    assert predict.main([str(photographs / "00.png"), *flags[1:]]) == 0
    assert "drift alarm" not in capsys.readouterr().err
    assert predict.main([*flags, "--format", "json"]) == 3
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "drift alarm after " in line]
    fired_after = json.loads(printed.out)["summary"]["drift_alarm"]["fired_after"]
    assert f"after {fired_after} images" in line
    assert "sorted" in line  # which fires it too
    (photographs / "broken.png").write_bytes(b"no image")
    assert predict.main(flags) == 1
    (run / "reference.safetensors").unlink()
    assert predict.main(flags) == 2
    assert "--evalmode dynamic writes it" in capsys.readouterr().err


def test_json_tells_no_alarm_from_none_asked_for(finished, photographs, capsys):
    flags = [str(photographs / "00.png"), "--model", str(finished / "GE"), "--format", "json"]
    assert predict.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["drift_alarm"] is None
    assert predict.main([*flags, "--drift-alarm"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["drift_alarm"] == {"fired_after": None}


@pytest.mark.parametrize("flags", [["--deadline", "5ms"], ["--budget", "2ms"]])
def test_no_alarm_where_load_changes_the_policy(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main(["photo.png", "--drift-alarm", *flags])
    assert ended.value.code == 2
    assert "--drift-alarm needs one policy" in capsys.readouterr().err
