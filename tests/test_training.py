"""Both stages through their programs: what they leave, what resumes bit by bit, what is refused."""

import itertools
import json
import shutil
import signal
import time
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dataloader
import train_GE
import train_IMTA
from adaptive_inference import AdaptivePredictor, fold, read_policy
from engine import run, trainer
from engine.checkpoint import LoadedNetwork, load_checkpoint, load_saved, save_network
from engine.networks import expected_images
from engine.report import read_csv
from engine.run import _check_one_folder, _check_one_state
from engine.run_data import held_out_are_new, split_is_complete
from engine.run_directory import RunDirectory
from engine.stepper import Stepper
from engine.trainer import learning_rate
from image_data import synthetic
from image_data.batches import InMemoryBatches
from image_data.defaults import default_crop_share
from models import MSDNet, load
from models.description import DataInfo, Description, Split
from settings.command_line import parse, recipe_of
from tests.compare import differences
from tests.conftest import TINY_DEMO, TINY_FLAGS, TINY_NETWORK, TINY_STAGE_2, describe
from utils import UserError

pytestmark = pytest.mark.usefixtures("tiny_demo")


def train_ge(save, *flags):
    return train_GE.main(["--save", str(save), *TINY_FLAGS, *flags])


def train_imta(runs, name, *flags):
    return train_IMTA.main(["--pretrained", "GE", "--save", str(runs / name), *TINY_STAGE_2, *flags])


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    """The working folder, with both stages in GE and IMTA, of which the test may do what it likes."""
    for name in ("GE", "IMTA"):
        shutil.copytree(finished / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run):
    return load(run / "best.safetensors").state_dict()


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def run_json(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_a_run_leaves_tables_curves_logs_and_how_it_was_made(runs, stage):
    run = runs / stage
    anytime, budgeted = read_csv(run / "anytime.csv"), read_csv(run / "budgeted.csv")
    assert [row["exit"] for row in anytime] == [1, 2, 3]
    assert " ".join(anytime[0]) == "exit operations acc1 acc5 ece ece_scaled temperature ensemble_acc1"
    assert len(budgeted) == 40
    assert [len(read_csv(run / name)) for name in ("optimised.csv", "ensemble.csv")] == [40, 40]
    assert all(abs(sum(row[f"share_{k}"] for k in (1, 2, 3)) - 1) < 1e-5 for row in budgeted)
    assert all(
        (run / picture).read_bytes().startswith(b"\x89PNG") for picture in ("curves.png", "examples.png")
    )
    assert any((run / "tensorboard").iterdir())
    (row,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert (row["epoch"], len(row["val_acc1"])) == (1, 3)
    (session,) = run_json(run)["sessions"]
    assert session["command"].startswith(f"python train_{stage}.py --")
    assert session["torch"] == torch.__version__
    assert session["complete"]
    assert run_json(run)["settings"]["num_blocks"] == 3


def test_stage_2_uses_network_split_and_data_of_stage_1_and_moves_nothing_frozen(runs):
    before, after = (load_saved(runs / stage / "best.safetensors") for stage in ("GE", "IMTA"))
    assert torch.equal(before.split.held_out, after.split.held_out)
    assert after.data == before.data
    assert after.network.backbone.config == before.network.config
    assert same_tensors(after.network.backbone.state_dict(), before.network.state_dict())
    assert run_json(runs / "IMTA")["frozen_digest"] == after.description.frozen_digest


def test_a_run_does_not_replace_the_network_it_starts_from(runs, capsys):
    before = contents(runs)
    for program, flags in ((train_IMTA, TINY_STAGE_2), (train_GE, TINY_FLAGS)):
        folder = str(runs / "GE")
        assert program.main(["--pretrained", folder, "--save", folder, "--overwrite", *flags]) == 2
        assert "is the run of --pretrained" in capsys.readouterr().err
    assert contents(runs) == before


def test_too_few_values_for_batch_normalisation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "DEMO_IMAGES", TINY_DEMO)
    flags = "--arch resnet18 --exits 2 --epochs 1 --batch-size 4 --accumulate 4 --val-size 64 --amp off"
    assert train_GE.main(["--save", str(tmp_path / "GE"), *flags.split()]) == 2
    assert "batch normalisation cannot learn" in capsys.readouterr().err.splitlines()[-1]


def test_processes_that_resume_different_states_stop():
    """As on machines whose folders of runs are not one."""

    state = {"epoch": 2, "step": 7}
    same = SimpleNamespace(all_equal=lambda value: True)
    _check_one_state(same, state)
    _check_one_state(same, None)
    different = SimpleNamespace(all_equal=lambda value: False)
    with pytest.raises(UserError, match="find different checkpoints"):
        _check_one_state(different, state)


def test_processes_that_do_not_share_a_folder_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SECONDS_TO_APPEAR", 0)
    alone = SimpleNamespace(all_reduce_max=lambda value: value)
    other_sees_none = SimpleNamespace(all_reduce_max=lambda value: max(value, True))
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match="must be a folder that all machines share"):
        _check_one_folder(alone, directory)
    with directory.lock():
        _check_one_folder(alone, directory)
        with pytest.raises(UserError, match="not all processes"):
            _check_one_folder(other_sees_none, directory)


def test_a_moved_backbone_is_noticed(runs, monkeypatch):
    def disturb(built, *args):
        built.objective.network.backbone.stem.scales[0][1].running_mean += 1
        return real(built, *args)

    real = trainer.train
    monkeypatch.setattr("engine.run.train", disturb)
    with pytest.raises(RuntimeError, match="frozen stage-1 network changed"):
        train_imta(runs, "new")


def test_an_objective_has_no_parameters_of_its_own(runs, monkeypatch):
    def with_scale(stage, network, settings):
        objective = real(stage, network, settings)
        objective.scale = torch.nn.Parameter(torch.ones(()))
        return objective

    real = train_IMTA.Stage2.make_objective
    monkeypatch.setattr(train_IMTA.Stage2, "make_objective", with_scale)
    with pytest.raises(RuntimeError, match="Stage2Objective has a parameter of its own, scale"):
        train_imta(runs, "new")


def test_moving_batchnorm_moves_statistics_only(runs):
    assert train_imta(runs, "new", "--backbone-bn", "moving") == 0
    before, after = weights(runs / "GE"), weights(runs / "new")
    moved = {name for name in before if not torch.equal(before[name], after[f"backbone.{name}"])}
    assert moved
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)


@pytest.mark.parametrize(
    "flags", [["--no-isc"], ["--no-ofa"], ["--released"], ["--single-stage", *TINY_FLAGS]]
)
def test_every_arm_of_the_paper_trains(runs, flags):
    origin = [] if "--single-stage" in flags else ["--pretrained", "GE"]
    assert train_IMTA.main([*origin, "--save", "new", *TINY_STAGE_2, *flags]) == 0
    assert ("links.0.0.weight" in weights(runs / "new")) is ("--no-isc" not in flags)


def test_folded_backbone_trains_the_same_classifiers(runs, monkeypatch):
    def unfolded(stage, network, settings):
        objective = real(stage, network, settings)
        objective.folded_backbone = None
        return objective

    real = train_IMTA.Stage2.make_objective
    monkeypatch.setattr(train_IMTA.Stage2, "make_objective", unfolded)
    assert train_imta(runs, "plain") == 0
    folded = weights(runs / "IMTA")
    for name, tensor in weights(runs / "plain").items():
        torch.testing.assert_close(folded[name], tensor, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16", "--no-channels-last"],
        ["--amp", "fp16", "--clip-grad", "1", "--nesterov", "--label-smoothing", "0.1", "--deterministic"],
    ],
)
def test_training_options(tmp_path, flags):
    assert train_ge(tmp_path / "GE", *flags) == 0
    assert torch.are_deterministic_algorithms_enabled() is ("--deterministic" in flags)
    assert run_json(tmp_path / "GE")["settings"]["amp"] == flags[1]


def signal_after(monkeypatch, step, number):
    """The process gets a signal after so many steps."""
    real, steps = Stepper.step, itertools.count(1)

    def counted(stepper, *args):
        real(stepper, *args)
        if next(steps) == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Stepper, "step", counted)


TWO_EPOCHS = ["--epochs", "2", "--augment", "standard"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "DEMO_IMAGES", TINY_DEMO)
        assert train_ge(folder, *TWO_EPOCHS) == 0
    return folder


def test_interrupted_and_resumed_equals_undisturbed(undisturbed, tmp_path, monkeypatch, request):
    """Stop in the middle of epoch 1 of 4 steps, at its end, and in the middle of epoch 2."""
    # The tests may run under nohup, where SIGHUP is ignored.
    request.addfinalizer(partial(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL)))
    flags = [*TINY_FLAGS, *TWO_EPOCHS]
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number, done in zip(signals, (2, 4, 6), strict=True):
        with monkeypatch.context() as patch:
            signal_after(patch, 2, number)
            assert train_GE.main(["--save", str(tmp_path / "GE"), *flags]) == 128 + number
        checkpoint = load_checkpoint(tmp_path / "GE" / "last.pt")
        assert 4 * checkpoint["epoch"] + checkpoint["step"] == done
        flags = ["--resume"]
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--resume"]) == 0
    assert len(run_json(tmp_path / "GE")["sessions"]) == 4
    assert differences(tmp_path / "GE", undisturbed) == []


@pytest.mark.parametrize("step", [0, 2])
def test_a_signal_ends_the_wait_for_images(undisturbed, tmp_path, monkeypatch, step):
    """At once; what was trained until then is saved."""
    real, began = InMemoryBatches.epoch, time.monotonic()

    def epoch(batches, *position):
        for number, batch in enumerate(real(batches, *position)):
            if number == step:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(60)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(InMemoryBatches, "epoch", epoch)
        assert train_ge(tmp_path / "GE", *TWO_EPOCHS) == 143
    assert time.monotonic() - began < 60
    assert (tmp_path / "GE" / "last.pt").exists() == (step > 0)
    again = [] if step else [*TINY_FLAGS, *TWO_EPOCHS]
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--resume", *again]) == 0
    assert differences(tmp_path / "GE", undisturbed) == []


def test_a_failed_evaluation_loses_no_step(undisturbed, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("a held-out image cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accuracy_per_exit", fail)
        assert train_ge(tmp_path / "GE", *TWO_EPOCHS) == 2
    last = load_checkpoint(tmp_path / "GE" / "last.pt")
    assert (last["epoch"], last["step"]) == (0, 4)
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--resume"]) == 0
    assert differences(tmp_path / "GE", undisturbed) == []


def test_the_steps_before_an_unreadable_image_are_saved(undisturbed, tmp_path, monkeypatch):
    real = InMemoryBatches.epoch

    def epoch(batches, *position):
        yield from itertools.islice(real(batches, *position), 2)
        raise UserError("a training image cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(InMemoryBatches, "epoch", epoch)
        assert train_ge(tmp_path / "GE", *TWO_EPOCHS) == 2
    assert load_checkpoint(tmp_path / "GE" / "last.pt")["step"] == 2
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--resume"]) == 0
    assert differences(tmp_path / "GE", undisturbed) == []


@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--backbone-bn", "moving", "--ema-decay", "0.9"], marks=pytest.mark.slow)]
)
def test_stage_2_goes_on_with_the_same_command(runs, monkeypatch, flags):
    flags = [*flags, "--epochs", "2"]
    assert train_imta(runs, "whole", *flags) == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 3, signal.SIGTERM)
        assert train_imta(runs, "parts", *flags) == 143
    assert train_imta(runs, "parts", *flags, "--resume") == 0
    assert differences(runs / "parts", runs / "whole") == []
    sessions = run_json(runs / "parts")["sessions"]
    assert [session["complete"] for session in sessions] == [False, True]
    assert all(session["ended"] >= session["began"] for session in sessions)


@pytest.mark.slow
def test_average_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "DEMO_IMAGES", TINY_DEMO)
    flags = (*TWO_EPOCHS, "--ema-decay", "0.9")
    assert train_ge(tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGTERM)
        assert train_ge(tmp_path / "parts", *flags) == 143
    assert train_GE.main(["--save", str(tmp_path / "parts"), "--resume"]) == 0
    assert differences(tmp_path / "parts", tmp_path / "whole") == []


@pytest.mark.parametrize(
    ("flags", "positions"),
    [
        ([], [(0, 2), (0, 4), (1, 0)]),
        (["--save-every-minutes", "1e-9"], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]),
    ],
)
def test_saves_in_the_middle_and_goes_on(tmp_path, monkeypatch, flags, positions):
    """Expect (epoch, step) of every last.pt: on SIGUSR1, here in step 2, after some minutes, before and after
    the evaluation."""
    real, saved = trainer.save_checkpoint, []

    def noted(path, state):
        real(path, state)
        if path.name == "last.pt":
            saved.append((state["epoch"], state["step"]))

    monkeypatch.setattr(trainer, "save_checkpoint", noted)
    signal_after(monkeypatch, 2, signal.SIGUSR1)
    assert train_ge(tmp_path / "GE", *flags) == 0
    assert saved == positions


def test_best_is_the_highest_mean_accuracy(tmp_path, monkeypatch):
    # Accuracies of the exits, held-out loss, and whether the epoch is the best one so far.
    epochs = [
        ([10.0, 20.0, 30.0], 5.0, True),
        ([40.0, 50.0, 60.0], 6.0, True),
        ([0.0, 0.0, 90.0], 1.0, False),
        ([50.0, 50.0, 50.0], 4.0, True),  # of equals, the lower held-out loss
        ([60.0, 50.0, 40.0], 4.0, True),  # of equals again, the later epoch
        ([50.0, 50.0, 50.0], 4.5, False),
    ]
    remaining = iter(epochs)

    def evaluated(*_):
        accuracies, loss, _ = next(remaining)
        return accuracies, [100.0] * 3, loss

    monkeypatch.setattr(trainer, "accuracy_per_exit", evaluated)
    one_step = ["--val-size", "160"]
    assert train_ge(tmp_path / "GE", "--epochs", str(len(epochs)), *one_step) == 0
    rows = [json.loads(line) for line in (tmp_path / "GE" / "log.jsonl").read_text().splitlines()]
    assert [row["best"] for row in rows] == [is_best for _, _, is_best in epochs]
    described = load(tmp_path / "GE" / "best.safetensors").description
    last = load_checkpoint(tmp_path / "GE" / "last.pt")
    assert (described.epoch, described.accuracy["val_acc1"]) == (5, epochs[4][0])
    assert (last["epoch"], last["best_epoch"]) == (6, 5)


def test_without_held_out_images_the_last_epoch_is_best(tmp_path):
    assert train_ge(tmp_path / "GE", "--val-size", "0", "--epochs", "2") == 0
    assert load(tmp_path / "GE" / "best.safetensors").description.epoch == 2
    assert not (tmp_path / "GE" / "budgeted.csv").exists()
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--evalmode"]) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert train_ge(tmp_path / "GE", "--lr", "1e30") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "learning rate" in message
    assert not (tmp_path / "GE" / "last.pt").exists()


NEW_GE = ["--save", "new/GE", *TINY_FLAGS]
NEW_IMTA = ["--save", "new/IMTA", "--pretrained", "GE"]


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        (train_GE, ["--save", "GE", *TINY_FLAGS], "--resume"),
        (train_GE, ["--save", "GE", *TINY_FLAGS, "--overwrite", "--image-size", "16"], "at least 17"),
        (train_GE, ["--save", "GE", "--resume", "--lr", "0.7"], "--lr 0.05"),
        (
            train_GE,
            ["--save", "GE", "--resume", "--epochs", "7"],
            "--pretrained GE with a new --save starts from its weights",
        ),
        (
            train_GE,
            ["--save", "IMTA", "--evaluate-from", "GE/best.safetensors", "--evalmode", "anytime"],
            "holds another run",
        ),
        (train_GE, ["--save", "file/GE", *TINY_FLAGS], "cannot read or write file"),
        (train_GE, ["--save", "new/GE", "--pretrained", "resnet"], "there are: "),
        (train_GE, [*NEW_GE, "--val-size", "1000000"], "1000000 images are to be held out"),
        (train_GE, [*NEW_GE, "--data", "folder", "--data-root", "nowhere"], "nowhere"),
        (train_GE, [*NEW_GE, "--gpu", "99"], "no GPU on this machine"),
        (train_IMTA, ["--save", "GE", "--resume"], "train_GE.py"),
        (train_IMTA, ["--save", "new/IMTA"], "run stage 1 first"),
        (train_IMTA, ["--save", "new/IMTA", "--pretrained", "IMTA"], "is a stage-2 checkpoint"),
        (train_IMTA, [*NEW_IMTA, "--batch-size", "1"], "at least 2 images"),
        (train_IMTA, [*NEW_IMTA, "--preset", "cifar100"], "trained with --preset demo"),
        (train_IMTA, [*NEW_IMTA, "--nBlocks", "5"], "--nBlocks 3, the command line says 5"),
    ],
)
def test_what_is_refused_writes_one_line_and_no_file(runs, capsys, program, argv, words):
    (runs / "file").write_text("in the way")
    before = contents(runs)
    try:
        status = program.main(argv)
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert (status, message.count("\n")) == (2, 1)
    assert words in message
    assert contents(runs) == before
    assert not (runs / "new").exists()


def test_tables_of_an_evaluation_are_not_replaced(runs, capsys):
    evaluated = ["--evaluate-from", "GE/best.safetensors", "--evalmode", "dynamic", "--save", "tables"]
    assert train_GE.main(evaluated) == 0
    before = contents(runs / "tables")
    assert train_ge("tables") == 2
    assert "holds the tables of an evaluation; --overwrite replaces them" in capsys.readouterr().err
    assert contents(runs / "tables") == before
    (runs / "tables" / "tensorboard").mkdir()
    (runs / "tables" / "tensorboard" / "of another program").touch()
    assert train_ge("tables", "--overwrite") == 0
    assert (runs / "tables" / "tensorboard" / "of another program").exists()


def test_a_resumption_that_skips_unreadable_images_is_remembered(image_folder, tmp_path, capsys):
    """The message about such an image advises it, and stage 2 would meet the image again."""
    flags = [*TINY_FLAGS, "--image-size", "80", "--val-size", "12", "--batch-size", "16", "--workers", "1"]
    save = ["--save", str(tmp_path / "GE")]
    for path in (image_folder / "train").rglob("3.png"):
        path.write_bytes(path.read_bytes()[:60])
    assert train_GE.main([*save, "--data-root", str(image_folder), *flags]) == 2
    assert "--skip-unreadable" in capsys.readouterr().err
    assert train_GE.main([*save, "--resume", "--skip-unreadable"]) == 0
    assert load_saved(tmp_path / "GE").description.recipe["skip_unreadable"]
    assert train_GE.main([*save, "--resume"]) == 0


def test_a_run_is_resumed_where_it_cannot_be_compiled(runs, capsys):
    """As a run of one GPU is by DataParallel: --compile auto was resolved where the run began."""
    assert train_ge("GE", "--overwrite", "--checkpoint-activations", "--epochs", "1") == 0
    checkpoint = torch.load(runs / "GE" / "last.pt", weights_only=True)
    checkpoint["description"]["recipe"]["compile"] = "default"
    torch.save(checkpoint, runs / "GE" / "last.pt")
    capsys.readouterr()
    assert train_GE.main(["--save", "GE", "--resume"]) == 0
    line = "training is not compiled: --compile and --checkpoint-activations do not go together"
    assert line in capsys.readouterr().out


def test_a_network_of_an_unknown_preset(runs, capsys):
    """As a clone with presets of its own writes it."""
    saved = load_saved(runs / "GE")
    recipe = {**saved.description.recipe, "preset": "mydata"}
    save_network(
        runs / "GE" / "best.safetensors",
        saved.network,
        replace(saved.description, recipe=recipe),
        saved.split,
    )
    assert train_GE.main(["--save", "GE", "--evalmode", "anytime"]) == 0
    assert train_IMTA.main(["--pretrained", "GE", "--save", "new", "--epochs", "1"]) == 2
    assert "--preset mydata, which is unknown here: pass --preset" in capsys.readouterr().err
    assert train_imta(runs, "new", "--preset", "demo") == 0


def test_a_directory_is_overwritten_when_asked(runs):
    assert train_ge("GE", "--overwrite", "--seed", "5") == 0
    assert not same_tensors(weights(runs / "GE"), load_saved(runs / "IMTA").network.backbone.state_dict())


def test_an_objective_that_is_refused_leaves_the_old_run(runs, monkeypatch, capsys):
    def refuse(self, network, settings):
        raise UserError("no such loss")

    monkeypatch.setattr(train_GE.Stage1, "make_objective", refuse)
    before = weights(runs / "GE")
    assert train_ge(runs / "GE", "--overwrite") == 2
    assert "no such loss" in capsys.readouterr().err
    assert same_tensors(weights(runs / "GE"), before)


def test_an_optimizer_that_cannot_be_built_leaves_the_old_run(runs, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("no such momentum")

    monkeypatch.setattr(torch.optim, "SGD", refuse)
    before = contents(runs)
    with pytest.raises(ValueError, match="no such momentum"):
        train_ge(runs / "GE", "--overwrite")
    assert contents(runs) == before


def test_resume_without_a_last_checkpoint_loses_nothing(runs, capsys):
    best, last = runs / "GE" / "best.safetensors", runs / "GE" / "last.pt"
    last.unlink()
    before = best.read_bytes()
    assert train_GE.main(["--save", "GE", "--resume"]) == 2
    assert "without last.pt" in capsys.readouterr().err
    last.write_bytes(before)
    assert train_GE.main(["--save", "GE", "--resume"]) == 2
    assert "last.pt: it is damaged, or not a PyTorch checkpoint" in capsys.readouterr().err
    last.unlink()
    (runs / "GE" / "log.jsonl").unlink()
    assert train_GE.main(["--save", "GE", "--resume"]) == 2
    assert "without last.pt" in capsys.readouterr().err
    torch.save({"format": "imta-msdnet run 99"}, last)
    assert train_GE.main(["--save", "GE", "--resume"]) == 2
    assert "not a run of this version of the project" in capsys.readouterr().err
    assert best.read_bytes() == before


def test_stage_1_starts_from_weights(runs, image_folder, capsys):
    """With so small a rate, what was taken over is still there."""
    before = load(runs / "GE" / "best.safetensors")
    start = ["--pretrained", "GE", "--epochs", "1", "--batch-size", "16", "--lr", "1e-12", "--save"]
    assert train_GE.main([*start, "more"]) == 0
    capsys.readouterr()
    again = [*start, "again", "--preset", "demo", "--val-size", "32"]
    assert train_GE.main(again) == 0
    size = len(load_saved(runs / "GE").split.held_out)
    assert f"GE/best.safetensors: the same {size} of them are held out" in capsys.readouterr().out
    assert train_GE.main([*again, "--resume"]) == 0
    assert (
        train_GE.main(
            [*start, "tuned", "--data", "folder", "--data-root", str(image_folder), "--val-size", "12"]
        )
        == 0
    )
    more, again, tuned = (load_saved(runs / name) for name in ("more", "again", "tuned"))
    assert (
        more.split.held_out.tolist()
        == again.split.held_out.tolist()
        == load_saved(runs / "GE").split.held_out.tolist()
    )
    assert [p.shape for p in more.network.parameters()] == [p.shape for p in before.parameters()]
    assert tuned.network.num_classes == 3
    recipe = recipe_of(tuned.network)
    assert (tuned.description.data.image_size, recipe["num_blocks"], recipe["epochs"]) == (
        32,
        3,
        1,
    )
    for name, x in before.named_parameters():
        torch.testing.assert_close(more.network.get_parameter(name), x)
        if ".linear." not in name:
            torch.testing.assert_close(tuned.network.get_parameter(name), x)


def test_images_that_trained_a_network_stay_training_images_when_others_come(runs, image_folder, capsys):
    images = ["--data", "folder", "--data-root", str(image_folder), "--epochs", "1", "--batch-size", "16"]
    assert train_GE.main(["--pretrained", "GE", "--save", "first", *images, "--val-size", "12"]) == 0
    shutil.copy(image_folder / "train" / "ant" / "0.png", image_folder / "train" / "ant" / "new.png")
    trained = set(load_saved(runs / "first").split.training_digests.tolist())

    def held_out(name, size):
        flags = ["--pretrained", "first", "--save", name, *images, "--val-size", size]
        assert train_GE.main(flags) == 0
        saved = load_saved(runs / name)
        return saved, set(saved.split.name_digests[saved.split.held_out].tolist())

    saved, digests = held_out("second", "12")
    assert saved.description.held_out_are_new
    assert not digests & trained
    assert (runs / "second" / "reference.safetensors").exists()
    capsys.readouterr()
    saved, digests = held_out("third", "20")  # only 13 are new
    assert not saved.description.held_out_are_new
    assert len(digests & trained) == 7
    assert "thresholds set on them promise nothing" in capsys.readouterr().out
    assert not (runs / "third" / "reference.safetensors").exists()
    assert train_GE.main(["--save", "third", "--evalmode"]) == 0
    assert not (runs / "third" / "reference.safetensors").exists()


def test_whether_held_out_images_are_new_to_the_weights_is_known_or_false():
    names = torch.arange(10)
    split = Split(torch.tensor([0, 1]), names)
    info = DataInfo("folder", ["a", "b"], 32, 1.0, "bilinear", [0.5] * 3, [0.2] * 3, 10, "first")
    settings, network = Namespace(pretrained=Path("weights")), MSDNet(**TINY_NETWORK)

    def is_new(found, held_out=(0, 1), digests=names, has_new_classifier=True, **origin):
        network.has_new_classifier = has_new_classifier
        loaded = None
        if origin:
            description = replace(
                describe(network),
                data=origin["data"],
                held_out_are_new=origin["flag"],
                split_is_complete=origin.get("complete", True),
            )
            loaded = LoadedNetwork(Path("origin"), network, description, origin["split"])
        data = SimpleNamespace(info=found, split=Split(torch.tensor(held_out), digests))
        return held_out_are_new(settings, loaded, data, network)

    other, imagenet, copied = (
        replace(info, fingerprint="second", name=name) for name in ("folder", "imagenet", "cifar100")
    )
    cifar = replace(copied, class_names=["c", "d"])
    none, others = names[:0], names + 10
    known = {"data": info, "split": split, "flag": True}
    seen = {**known, "flag": False}
    unlisted = {**known, "split": split._replace(name_digests=none)}
    released = {**known, "data": replace(info, num_training_images=0)}
    incomplete = {**known, "complete": False}
    one_more = {"held_out": (0, 10), "digests": torch.arange(11)}
    rows = {
        "weights of a library": (is_new(other), True),
        "weights of a library, images of ImageNet": (is_new(imagenet), False),
        "weights of a library with their classifier": (is_new(other, has_new_classifier=False), False),
        "the same images": (is_new(info, **known), True),
        "a changed folder": (is_new(other, **known), True),
        "a changed folder, one training image held out": (is_new(other, held_out=(1, 2), **known), False),
        "the same images, not new to the origin": (is_new(info, **seen), False),
        "a changed folder, not new to the origin": (is_new(other, **seen), False),
        "other images": (is_new(other, digests=others, **seen), True),
        "images without names": (is_new(other, digests=none, **known), False),
        "a shipped network": (is_new(other, **unlisted), False),
        "a shipped network, another data set": (is_new(cifar, **unlisted), True),
        "a shipped network, another data set with its classes": (is_new(copied, **unlisted), False),
        "a released network": (is_new(other, **released), False),
        "a released network, another data set": (is_new(cifar, **released), True),
        "an incomplete split, the same images": (is_new(info, **incomplete), True),
        "an incomplete split, a changed folder": (is_new(other, **incomplete), True),
        "a changed folder, one new image held out": (is_new(other, **one_more, **known), True),
        "an incomplete split, one new image held out": (is_new(other, **one_more, **incomplete), False),
        "an incomplete split, other images": (is_new(other, digests=others, **incomplete), False),
        "an incomplete split, another data set": (is_new(cifar, digests=none, **incomplete), False),
    }
    for name, (found, expected) in rows.items():
        assert found is expected, name


def test_the_split_of_a_fine_tuned_network_is_complete_if_it_lists_the_images_of_its_origin():
    names = torch.arange(10)
    info = DataInfo("folder", ["a", "b"], 32, 1.0, "bilinear", [0.5] * 3, [0.2] * 3, 10, "first")
    network, held_out = MSDNet(**TINY_NETWORK), torch.tensor([0, 1])

    def is_complete(fingerprint, digests, origin_digests=names, of_origin=True):
        description = replace(describe(network), data=info, split_is_complete=of_origin)
        origin = LoadedNetwork(Path("origin"), network, description, Split(held_out, origin_digests))
        data = SimpleNamespace(info=replace(info, fingerprint=fingerprint), split=Split(held_out, digests))
        return split_is_complete(origin, data)

    assert split_is_complete(None, None)
    assert is_complete("first", names[:0], names[:0])  # the same archive
    assert not is_complete("second", names[:0], names[:0])
    assert is_complete("second", torch.arange(12))  # two images came
    assert not is_complete("second", torch.arange(1, 12))  # one has gone
    assert not is_complete("first", names, of_origin=False)


def test_older_files_of_fine_tuned_networks_have_no_complete_split(runs):
    def is_complete(**values):
        older = asdict(load_saved(runs / "GE").description) | values
        del older["split_is_complete"]
        return Description.from_dict(older).split_is_complete

    assert is_complete()
    assert not is_complete(origin="save/GE/best.safetensors")
    assert is_complete(origin="save/GE/best.safetensors", stage="IMTA")


def test_images_of_another_size_than_the_origins_get_the_crop_of_their_size(runs):
    saved = load_saved(runs / "GE")
    data = replace(saved.data, image_size=224, crop_share=0.875)
    saved = replace(saved, description=replace(saved.description, data=data))
    shares = [
        expected_images(parse("GE", ["--data-root", "photos", *flags]).settings(), saved).crop_share
        for flags in (["--image-size", "224"], ["--image-size", "32"])
    ]
    assert shares == [0.875, 1.0]


def test_policies_are_those_of_the_networks_image_size(runs, capsys):
    assert train_GE.main(["--save", "GE", "--evalmode", "--image-size", "64"]) == 2
    assert "are for images of 32 pixels; pass --save DIR" in capsys.readouterr().err


def test_an_evaluation_at_another_image_size_has_crop_and_policies_of_its_own(
    runs, image_folder, monkeypatch
):
    images = ["--data", "folder", "--data-root", str(image_folder), "--epochs", "1", "--batch-size", "16"]
    assert train_GE.main(["--pretrained", "GE", "--save", "run", *images, "--val-size", "12"]) == 0
    larger = ["--evaluate-from", "run/best.safetensors", "--save", "larger", "--image-size", "64"]
    assert train_GE.main([*larger, "--evalmode", "dynamic"]) == 0
    assert train_GE.main([*larger, "--evalmode", "anytime"]) == 0
    assert "ensemble_acc1" in (runs / "larger" / "anytime.csv").read_text()  # of the policy file

    real, shares = dataloader.evaluation_transform, []
    monkeypatch.setattr(
        dataloader,
        "evaluation_transform",
        lambda size, crop_share, *others: shares.append(crop_share) or real(size, crop_share, *others),
    )
    assert train_GE.main([*larger, "--evalmode", "anytime", "--image-size", "160", "--save", "largest"]) == 0
    assert shares == [default_crop_share(160)]
    with pytest.raises(UserError, match=r"the network has .* with 32 pixels"):
        read_policy(runs / "larger" / "policy.json", fold(load(runs / "run" / "best.safetensors")))


@pytest.mark.parametrize("program", [train_GE, train_IMTA])
def test_evaluation_alone_repeats_the_tables(runs, program):
    run = runs / program.__name__.removeprefix("train_")
    for mode, table in ((["anytime"], "anytime.csv"), ([], "budgeted.csv"), (["dynamic"], "budgeted.csv")):
        before = (run / table).read_bytes()
        (run / table).unlink()
        assert program.main(["--save", str(run), "--evalmode", *mode]) == 0
        assert (run / table).read_bytes() == before


def test_later_evaluations_take_what_a_resumption_changed(runs):
    """Also where the best epoch is older, or training had ended."""
    before = load_saved(runs / "GE")
    assert train_GE.main(["--save", "GE", "--resume", "--measure", "entropy"]) == 0
    after = load_saved(runs / "GE")
    assert after.description.recipe == {**before.description.recipe, "measure": "entropy"}
    assert same_tensors(after.network.state_dict(), before.network.state_dict())
    assert read_policy(runs / "GE" / "policy.json").points[0].policy.measure == "entropy"


@pytest.mark.parametrize("measure", ["entropy", "margin", "patience"])
def test_policies_of_every_measure_answer_as_the_evaluation_says(runs, measure):
    run = runs / "GE"
    assert train_GE.main(["--save", "GE", "--evalmode", "dynamic", "--measure", measure]) == 0
    saved = load_saved(run / "best.safetensors")
    curve = read_policy(run / "policy.json", saved.network)
    data = dataloader.load_data(
        parse("GE", TINY_FLAGS).settings(recipe=recipe_of(saved.network)),
        torch.device("cpu"),
        None,
        saved.data,
        saved.split,
    )
    images, targets = (torch.cat(parts) for parts in zip(*data.test, strict=True))
    for row, point in zip(read_csv(run / "budgeted.csv"), curve.of_rule("geometric"), strict=True):
        if row["p"] in (1, 20, 40):
            assert point.policy.measure == measure
            prediction = AdaptivePredictor(fold(saved.network), point.policy)(images)
            acc1 = 100 * (prediction.classes == targets).double().mean().item()
            # Batches of another size round differently, which may move one image at a threshold.
            assert acc1 == pytest.approx(row["test_acc1"], abs=100 / len(targets) + 0.01)


def test_runtime_needs_the_policies_of_this_network(runs, capsys):
    shutil.copy("IMTA/policy.json", "GE/policy.json")
    assert train_GE.main(["--save", "GE", "--evalmode", "runtime"]) == 2
    assert "policy of another network" in capsys.readouterr().err
    (runs / "GE" / "policy.json").unlink()
    assert train_GE.main(["--save", "GE", "--evalmode", "runtime"]) == 2
    assert "--evalmode dynamic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", [["--image-size", "72", "--no-small-inputs", "--workers", "0"], ["--image-size", "32"]]
)
def test_anytime_evaluation_needs_test_images_only(image_folder, tmp_path, size, capsys):
    flags = [
        *("--data", "folder", "--data-root", str(image_folder), "--val-size", "12", "--batch-size", "16"),
        *size,
    ]
    run = tmp_path / "GE"
    assert train_ge(run, *flags) == 0
    assert load(run / "best.safetensors").description.data.class_names == ["ant", "bee", "cat"]
    before = (run / "anytime.csv").read_bytes()
    (image_folder / "train").rename(image_folder / "elsewhere")
    (run / "anytime.csv").unlink()
    assert train_GE.main(["--save", str(run), "--evalmode", "anytime"]) == 0
    assert (run / "anytime.csv").read_bytes() == before
    assert "gets no temperatures" not in capsys.readouterr().out
    assert train_GE.main(["--save", str(run), "--evalmode", "anytime", "--amp", "bf16"]) == 0
    output = capsys.readouterr().out
    assert "anytime.csv gets no temperatures and no ensemble" in output
    assert "policy.json was made for this network in float32, not in bfloat16" in output
    assert train_GE.main(["--save", str(run), "--evalmode", "dynamic"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "steps_per_epoch", "rates"),
    [
        (
            ["cosine", "--epochs", "10", "--warmup-epochs", "0"],
            5,
            {0: 1, 25: 0.5, 40: 0.5 * (1 - 0.8090169943749475)},
        ),
        (
            ["multistep", "--epochs", "8", "--warmup-epochs", "2"],
            1,
            dict(enumerate([0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])),
        ),
        (
            ["multistep", "--lr-milestones", "1,3", "--decay-rate", "0.5", "--warmup-epochs", "0"],
            2,
            {1: 1, 2: 0.5, 5: 0.5, 6: 0.25},
        ),
    ],
)
def test_learning_rates(flags, steps_per_epoch, rates):
    settings = parse("GE", ["--lr", "1", "--lr-type", *flags]).settings()
    assert {step: learning_rate(settings, step, steps_per_epoch) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({}, "MSDNet + GE"),
        ({"boosted_exits": True}, "MSDNet + GE + boosted exits"),
        ({"gradient_equilibrium": False}, "MSDNet"),
    ],
)
def test_titles_of_stage_1(options, title):
    assert train_GE.Stage1().title(MSDNet(**TINY_NETWORK, **options), parse("GE", []).settings()) == title
