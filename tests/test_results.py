"""The tables of the documents agree with the result files, whose runs are commands of the programs."""

import importlib
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import train_GE
import train_IMTA
from adaptive_inference import read_policy
from adaptive_inference.promises.drift import read_reference
from engine.report import millions
from experiments import arms, ship, tables
from experiments.markdown import spread
from image_data.reading import read_image
from models import load
from settings.command_line import parse
from tests.conftest import TINY_FLAGS, TINY_STAGE_2
from utils import UserError

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def test_documents_agree_with_the_result_files():
    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    assert all(f"<!-- table {name} -->" in "".join(texts) for name in tables.TABLES)
    for text in texts:
        assert tables.with_tables(text) == text
    tables.check_backbones()
    assert tables.with_tables(texts[0].replace("| 63.73 |", "| 99.99 |")) == texts[0]


def test_arms_on_different_backbones_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SCHEDULES", {"short": SimpleNamespace(results=tmp_path)})
    for arm, digest in {
        "GE": None,
        "GE_ISC": "a",
        "GE_ISC_OFA_moving": "b",
        "released_IMTA": "c",
        "GE_OFA": "a",
    }.items():
        (tmp_path / "seed_1" / arm).mkdir(parents=True)
        (tmp_path / "seed_1" / arm / "run.json").write_text(json.dumps({"frozen_digest": digest}))
    tables.check_backbones()
    (tmp_path / "seed_1" / "GE_OFA" / "run.json").write_text(json.dumps({"frozen_digest": "d"}))
    with pytest.raises(UserError, match="GE_OFA started from another GE"):
        tables.check_backbones()


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert spread([1.0, 3.0], "+", digits=1) == "+2.0 ± 1.4"
    assert (spread([1.0]), spread([])) == ("1.00", "")
    assert tables.with_count([1.0, 3.0], "+") == "+2.00 ± 1.41 (n = 2)"
    assert tables.spread_columns([[1.0, 2.0], [3.0, 2.0]]) == ["2.00 ± 1.41", "2.00 ± 0.00", "2"]


@pytest.mark.parametrize("schedule", arms.SCHEDULES.values(), ids=arms.SCHEDULES)
@pytest.mark.parametrize("arm", arms.ARMS)
def test_commands_of_the_arms_are_understood(arm, schedule):
    program, *flags = arms.command(arm, schedule, 2, Path("data"), Path("work"))
    command = parse(program.removeprefix("train_").removesuffix(".py"), flags)
    assert command.settings().seed == 2
    assert command.save_directory == Path("work/seed_2") / arm


def test_arms_are_trained_once_after_those_they_start_from(image_folder, tmp_path, monkeypatch, capsys):
    flags = [*TINY_FLAGS, "--val-size", "12", "--batch-size", "16"]
    stage_1 = ["--data", "folder", "--image-size", "32", *flags]
    schedule = arms.Schedule(2, (1, 1), stage_1, flags, tmp_path / "results")
    trained = []

    def in_this_process(words):
        trained.append(words[0])
        return importlib.import_module(words[0].removesuffix(".py")).main(words[1:])

    monkeypatch.setattr(arms, "run_command", in_this_process)
    for _ in range(2):
        assert arms.train_all(schedule, image_folder, tmp_path / "work", [5], ["GE_ISC"]) == 0
    assert trained == ["train_GE.py", "train_IMTA.py"]
    assert f"complete: {tmp_path / 'work' / 'seed_5' / 'GE'}\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "results" / "seed_5" / "GE_ISC").iterdir()} == set(
        arms.KEPT_FILES
    )
    assert arms.seeds_of("GE_ISC", tmp_path / "results") == [tmp_path / "results" / "seed_5" / "GE_ISC"]
    assert sorted(path.name for path in (tmp_path / "work" / "classes" / "train").iterdir()) == ["ant", "cat"]


def test_a_run_of_other_flags_is_no_result(tmp_path):
    run = tmp_path / "seed_1" / "GE"
    run.mkdir(parents=True)
    command = "python train_GE.py --epochs 1 --data-root elsewhere --save 'old folder/GE' --resume"
    (run / "run.json").write_text(json.dumps({"sessions": [{"command": command, "complete": True}]}))

    def train(epochs):
        words = ["train_GE.py", "--epochs", epochs, "--save", str(run), "--data-root", "here", "--resume"]
        return arms.train_arms(["GE"], [1], lambda arm, seed: words, tmp_path, None)

    assert train("1") == 0
    with pytest.raises(UserError, match="was trained by another command"):
        train("2")


def test_a_run_that_fails_ends_the_series(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr(arms, "run_command", lambda words: 143)
    assert arms.train_all(arms.SCHEDULES["published"], image_folder, tmp_path / "work", [1], ["GE"]) == 143


def test_classes_from_an_archive(tmp_path, monkeypatch):
    part = SimpleNamespace(
        targets=torch.tensor([0, 1, 2, 2]),
        images=torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).reshape(4, 3, 8, 8),
    )
    monkeypatch.setattr(arms, "read_cifar", lambda *_: (part, part, ["a", "b", "c"]))
    found = arms.choose_classes(tmp_path, tmp_path / "work" / "classes", 2)
    files = sorted(path.relative_to(found / "train") for path in (found / "train").rglob("*.png"))
    assert files == [Path("a/00000.png"), Path("c/00002.png"), Path("c/00003.png")]
    torch.testing.assert_close(read_image(found / "test" / files[1], pil_to_tensor), part.images[2])
    whole = arms.class_folders(tmp_path, tmp_path / "whole")
    assert sorted(path.name for path in (whole / "test").iterdir()) == ["a", "b", "c"]
    assert arms.class_folders(whole, tmp_path / "again") == whole


def test_a_program_that_is_asked_to_stop_may_save_first():
    stopping = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert arms.run_command(["-c", f"import os, signal, sys, time; {stopping}"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_run_becomes_a_file_with_policies_and_a_card(finished, tiny_demo, tmp_path, capsys):
    file = tmp_path / "weights" / "tiny.safetensors"
    assert ship.main([str(finished / "GE"), str(file), "--bfloat16"]) == 0
    network, before = load(file), load(finished / "GE" / "best.safetensors")
    assert file.stat().st_size < 0.7 * (finished / "GE" / "best.safetensors").stat().st_size
    assert network.description.accuracy["val_acc1"] == before.description.accuracy["val_acc1"]
    assert str(finished) not in str(network.description)
    curve = read_policy(file.with_suffix(".policy.json"), network)
    reference = read_reference(file.with_suffix(".reference.safetensors"), curve)
    assert len(reference.scores(curve.points[-1].policy)) > 0
    (tmp_path / "README.md").write_text("# Another document")
    assert ship.main([str(finished / "GE"), str(tmp_path / "tiny.safetensors")]) == 2
    assert "README.md is no model card" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Another document"
    card = (file.parent / "README.md").read_text()
    assert "- name: tiny\n" in card
    assert "\n0 minutes of stage 1 on " in card
    accuracy = network.description.accuracy["test_acc1"][2]
    assert f"| 3 | {millions(network.description.operations[2])} | {accuracy:.2f} | " in card
    assert train_GE.main(["--evaluate-from", str(file), "--evalmode", "anytime"]) == 2
    assert "pass --save DIR for its tables" in capsys.readouterr().err
    # Shipped again without --bfloat16: no policies of the earlier network are left beside it.
    bfloat16 = file.with_suffix(".policy.bfloat16.json")
    assert bfloat16.exists()
    assert ship.main([str(finished / "GE"), str(file)]) == 0
    assert not bfloat16.exists()
    # It is taken as stage 1 by its path, and goes on from there.
    assert train_IMTA.main(["--pretrained", str(file), "--save", str(tmp_path / "IMTA"), *TINY_STAGE_2]) == 0


def test_the_card_of_the_weights_is_that_of_their_files():
    assert ship.card(WEIGHTS) == (WEIGHTS / "README.md").read_text(encoding="utf-8")


def test_a_file_that_loses_accuracy_is_not_shipped(finished, tiny_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ship, "MAX_LOSS", -1.0)
    assert ship.main([str(finished / "GE"), str(tmp_path / "tiny.safetensors")]) == 2
    assert "points; at most -1.0 may be lost" in capsys.readouterr().err
    assert not (tmp_path / "tiny.safetensors").exists()


def test_findings_are_of_the_longest_schedule_that_has_both_arms(tmp_path, monkeypatch):
    schedules = {name: SimpleNamespace(results=tmp_path / name) for name in tables.FULL_SCHEDULES}
    monkeypatch.setattr(tables, "SCHEDULES", schedules)
    for place in ("30_epochs/seed_1/MSDNet", "30_epochs/seed_1/GE", "100_epochs/seed_1/GE"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "anytime.csv").touch()
    assert tables.longest("GE") == "100_epochs"
    assert tables.longest("MSDNet", "GE") == "30_epochs"
    (tmp_path / "100_epochs" / "seed_2" / "MSDNet").mkdir(parents=True)
    (tmp_path / "100_epochs" / "seed_2" / "MSDNet" / "anytime.csv").touch()
    assert tables.longest("MSDNet", "GE") == "30_epochs"  # the seeds of 100 epochs differ
    with pytest.raises(UserError, match="GE and GE_boosted"):
        tables.longest("GE", "GE_boosted")
