"""The loop of both stages through their programs: what they leave behind, what goes on bit by bit, what is refused."""

import contextlib
import json
import shutil
import signal
from functools import partial

import pytest
import torch

import dataloader
import datasets
import train_GE
import train_IMTA
from adaptive_inference import AdaptivePredictor, read_policy
from adaptive_inference.timing import deadline_rows, measure_blocks, runtime_rows
from args import parse
from engine import evaluate, training
from engine.checkpoint import FORMAT, load_checkpoint, load_saved, save_checkpoint
from engine.report import read_csv
from engine.schedule import learning_rate
from engine.stepper import Stepper
from models import load, to_released
from tests.conftest import TINY_DEMO, TINY_FLAGS
from utils import UserError

pytestmark = pytest.mark.usefixtures("tiny_demo")


def train_ge(save, *flags):
    return train_GE.main(["--save", str(save), *TINY_FLAGS, *flags])


def train_imta(root, *flags):
    return train_IMTA.main(["--pretrained", str(root / "GE"), "--epochs", "1", "--batch-size", "32", *flags])


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DEMO_IMAGES", TINY_DEMO)
        assert train_ge(folder / "GE") == 0
    return folder / "GE"


@pytest.fixture
def stage_1(trained_once, tmp_path):
    """A folder with a finished stage 1 in GE, of which the test may do what it likes."""
    shutil.copytree(trained_once, tmp_path / "GE")
    return tmp_path


def weights(run):
    return load(run / "best.safetensors").state_dict()


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_both_stages_leave_tables_curves_logs_and_checkpoints(stage_1, capsys):
    assert train_imta(stage_1) == 0
    for stage, exits in (("GE", 3), ("IMTA", 3)):
        run = stage_1 / stage
        anytime, budgeted = read_csv(run / "anytime.csv"), read_csv(run / "budgeted.csv")
        assert [row["exit"] for row in anytime] == [1, 2, 3]
        assert list(anytime[0]) == ["exit", "operations", "acc1", "acc5", "ece", "ece_scaled", "temperature", "ensemble_acc1"]
        assert len(budgeted) == 40
        assert all(abs(sum(row[f"share_{k}"] for k in range(1, exits + 1)) - 1) < 1e-5 for row in budgeted)
        assert [len(read_csv(run / name)) for name in ("optimised.csv", "ensemble.csv")] == [40, 40]
        assert all((run / picture).read_bytes().startswith(b"\x89PNG") for picture in ("curves.png", "examples.png"))
        assert any((run / "tensorboard").iterdir())
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1]
        assert len(rows[0]["val_acc1"]) == 3
    assert "stage-1" not in capsys.readouterr().err


def test_stage_2_uses_network_split_and_data_of_stage_1_and_moves_nothing_frozen(stage_1):
    assert train_imta(stage_1) == 0
    before, after = (load_saved(stage_1 / stage / "best.safetensors", {}) for stage in ("GE", "IMTA"))
    assert torch.equal(before.split.held_out, after.split.held_out)
    assert after.data == before.data
    assert after.network.backbone.config == before.network.config
    assert same_tensors(after.network.backbone.state_dict(), before.network.state_dict())


def test_a_moved_backbone_is_noticed(stage_1, monkeypatch, capsys):
    def disturb(task, *args):
        task.network.backbone.stem.scales[0][1].running_mean += 1
        return real(task, *args)

    real = training.train
    monkeypatch.setattr("engine.stage.train", disturb)
    assert train_imta(stage_1) == 2
    assert "frozen stage-1 network changed" in capsys.readouterr().err


def test_moving_batchnorm_moves_statistics_only(stage_1):
    assert train_imta(stage_1, "--backbone-bn", "moving") == 0
    before, after = (weights(stage_1 / stage) for stage in ("GE", "IMTA"))
    moved = {name for name in before if not torch.equal(before[name], after[f"backbone.{name}"])}
    assert moved
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)


@pytest.mark.parametrize("flags", [["--no-isc"], ["--no-ofa"], ["--released"], ["--single-stage", *TINY_FLAGS]])
def test_every_arm_of_the_paper_trains(stage_1, flags):
    origin = [] if "--single-stage" in flags else ["--pretrained", str(stage_1 / "GE")]
    assert train_IMTA.main([*origin, "--save", str(stage_1 / "IMTA"), "--epochs", "1", "--batch-size", "32", *flags]) == 0
    assert ("links.0.0.weight" in weights(stage_1 / "IMTA")) is ("--no-isc" not in flags)


def test_same_seed_same_weights(tmp_path):
    for name in ("a", "b"):
        assert train_ge(tmp_path / name, "--deterministic") == 0
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["state_dict"] for name in ("a", "b"))
    assert same_tensors(a, b)
    assert train_ge(tmp_path / "c", "--seed", "2") == 0
    assert not same_tensors(a, load_checkpoint(tmp_path / "c" / "last.pt")["state_dict"])


class StopAt:
    """Raises a signal in the process after so many steps."""

    def __init__(self, monkeypatch, step, number):
        real, self.count = Stepper.step, 0

        def counted(stepper, *args):
            real(stepper, *args)
            self.count += 1
            if self.count == step:
                signal.raise_signal(number)

        monkeypatch.setattr(Stepper, "step", counted)


@pytest.mark.parametrize(("number", "status", "step"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 6)])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, monkeypatch, number, status, step):
    """4 steps an epoch: in the middle of epoch 1, at its end, in the middle of epoch 2."""
    flags = ["--epochs", "2", "--augment", "standard"]
    assert train_ge(tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        StopAt(patch, step, number)
        assert train_ge(tmp_path / "parts", *flags) == status
    assert train_GE.main(["--save", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert same_tensors(whole["state_dict"], parts["state_dict"])
    momentum = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (whole, parts)]
    assert all(torch.equal(a, b) for a, b in zip(*momentum, strict=True))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    for a, b in zip(*logs, strict=True):
        measured = {"seconds", "images_per_second"}
        assert {n: v for n, v in a.items() if n not in measured} == {n: v for n, v in b.items() if n not in measured}
    for name in ("anytime.csv", "budgeted.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_best_is_the_highest_mean_accuracy(tmp_path, monkeypatch):
    accuracies = iter([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0], [0.0, 0.0, 90.0]])
    monkeypatch.setattr(training, "accuracy_per_exit", lambda *args: (next(accuracies), [100.0] * 3))
    assert train_ge(tmp_path / "GE", "--epochs", "3") == 0
    best, last = load(tmp_path / "GE" / "best.safetensors").description, load_checkpoint(tmp_path / "GE" / "last.pt")
    assert (best.epoch, best.accuracy["val_acc1"]) == (2, [40.0, 50.0, 60.0])
    assert (last["epoch"], last["best_epoch"], last["best_accuracy"]) == (3, 2, 50.0)


def test_without_held_out_images_the_last_epoch_is_best(tmp_path):
    assert train_ge(tmp_path / "GE", "--val-size", "0", "--epochs", "2") == 0
    assert load(tmp_path / "GE" / "best.safetensors").description.epoch == 2
    assert not (tmp_path / "GE" / "budgeted.csv").exists()
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--evalmode"]) == 2


@pytest.mark.parametrize(
    "flags", [["--amp", "bf16"], ["--amp", "fp16"], ["--clip-grad", "1", "--nesterov", "--label-smoothing", "0.1"], ["--no-channels-last"]]
)
def test_training_options(tmp_path, flags):
    assert train_ge(tmp_path / "GE", *flags) == 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert train_ge(tmp_path / "GE", "--lr", "1e30") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "learning rate" in message
    assert not (tmp_path / "GE" / "last.pt").exists()


def test_a_directory_that_holds_a_run_is_left_alone(stage_1, capsys):
    before = (stage_1 / "GE" / "best.safetensors").read_bytes()
    assert train_ge(stage_1 / "GE") == 2
    assert "--resume" in capsys.readouterr().err
    assert (stage_1 / "GE" / "best.safetensors").read_bytes() == before
    assert train_ge(stage_1 / "GE", "--overwrite", "--seed", "5") == 0
    assert (stage_1 / "GE" / "best.safetensors").read_bytes() != before


def test_a_mistake_with_overwrite_loses_nothing(stage_1, capsys):
    before = (stage_1 / "GE" / "best.safetensors").read_bytes()
    assert train_ge(stage_1 / "GE", "--overwrite", "--image-size", "16") == 2
    assert "at least 17" in capsys.readouterr().err
    assert (stage_1 / "GE" / "best.safetensors").read_bytes() == before


def saved_positions(monkeypatch):
    """(epoch, step) of everything that is saved as last.pt."""
    real, positions = training.save_checkpoint, []

    def noted(path, state):
        real(path, state)
        if path.name == "last.pt":
            positions.append((state["epoch"], state["step"]))

    monkeypatch.setattr(training, "save_checkpoint", noted)
    return positions


def test_sigusr1_saves_and_goes_on(tmp_path, monkeypatch):
    positions = saved_positions(monkeypatch)
    StopAt(monkeypatch, 2, signal.SIGUSR1)
    assert train_ge(tmp_path / "GE") == 0
    assert positions == [(0, 2), (1, 0)]


def test_saves_after_some_minutes(tmp_path, monkeypatch):
    positions = saved_positions(monkeypatch)
    assert train_ge(tmp_path / "GE", "--save-every-minutes", "1e-9") == 0
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_the_old_checkpoint_stays_until_the_new_one_reads_back(stage_1, monkeypatch):
    path = stage_1 / "GE" / "last.pt"
    state, before = load_checkpoint(path), path.read_bytes()
    real = torch.save

    def damaged(content, stream):
        real(content, stream)
        stream.seek(1000)
        stream.write(b"\xff" * 500)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(path, state)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))


def test_a_run_records_how_it_was_made(stage_1):
    record = json.loads((stage_1 / "GE" / "run.json").read_text())
    (piece,) = record["pieces"]
    assert piece["command"].startswith("python train_GE.py --save ")
    assert piece["torch"] == torch.__version__
    assert piece["ended"] >= piece["began"]
    assert piece["complete"]
    assert record["settings"]["num_blocks"] == 3
    assert train_ge(stage_1 / "GE", "--resume") == 0
    assert len(json.loads((stage_1 / "GE" / "run.json").read_text())["pieces"]) == 2


def test_the_record_of_a_stopped_run_tells_when_it_ended(stage_1, monkeypatch):
    with monkeypatch.context() as patch:
        StopAt(patch, 3, signal.SIGTERM)
        assert train_imta(stage_1) == 143
    assert train_imta(stage_1, "--resume") == 0
    record = json.loads((stage_1 / "IMTA" / "run.json").read_text())
    assert [piece["complete"] for piece in record["pieces"]] == [False, True]
    assert all(piece["ended"] for piece in record["pieces"])
    assert record["frozen_digest"] == load(stage_1 / "IMTA" / "best.safetensors").description.frozen_digest


def test_folded_backbone_trains_the_same_classifiers(stage_1, monkeypatch):
    assert train_imta(stage_1) == 0
    folded = weights(stage_1 / "IMTA")
    monkeypatch.setattr(train_IMTA.Distillation, "_frozen_features", lambda objective, images: objective.network.features(images))
    assert train_imta(stage_1, "--save", str(stage_1 / "plain")) == 0
    plain = weights(stage_1 / "plain")
    for name, tensor in plain.items():
        torch.testing.assert_close(folded[name], tensor, atol=1e-4, rtol=1e-3)


def test_refused_run_leaves_no_folder(tmp_path):
    assert train_ge(tmp_path / "new" / "GE", "--val-size", "1000000") == 2
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_directory(stage_1, capsys):
    from engine.run_directory import RunDirectory

    with RunDirectory(stage_1 / "GE").lock():
        assert train_ge(stage_1 / "GE", "--overwrite") == 2
    assert "another run" in capsys.readouterr().err


def test_resuming_with_other_settings_or_another_program(stage_1, capsys):
    assert train_ge(stage_1 / "GE", "--resume", "--lr", "0.7") == 2
    assert "--lr 0.05" in capsys.readouterr().err
    assert train_IMTA.main(["--save", str(stage_1 / "GE"), "--resume"]) == 2
    assert "train_GE.py" in capsys.readouterr().err


def test_stage_1_starts_from_weights(stage_1, image_folder):
    """With so small a rate, what was taken over is still there."""
    before = load(stage_1 / "GE" / "best.safetensors")
    start = ["--pretrained", str(stage_1 / "GE"), "--epochs", "1", "--batch-size", "16", "--lr", "1e-12", "--save"]
    assert train_GE.main([*start, str(stage_1 / "more")]) == 0
    assert train_GE.main([*start, str(stage_1 / "again"), "--preset", "demo", "--val-size", "32"]) == 0
    assert train_GE.main([*start, str(stage_1 / "tuned"), "--data", "folder", "--data-root", str(image_folder), "--val-size", "12"]) == 0
    more, again, tuned = (load_saved(stage_1 / name, {}) for name in ("more", "again", "tuned"))
    assert more.split.held_out.tolist() == again.split.held_out.tolist() == load_saved(stage_1 / "GE", {}).split.held_out.tolist()
    assert [p.shape for p in more.network.parameters()] == [p.shape for p in before.parameters()]
    assert tuned.network.num_classes == 3
    assert (tuned.description.image_size, tuned.settings["num_blocks"], tuned.settings["epochs"]) == (32, 3, 1)
    for name, x in before.named_parameters():
        torch.testing.assert_close(more.network.get_parameter(name), x)
        if ".linear." not in name:
            torch.testing.assert_close(tuned.network.get_parameter(name), x)


def test_starting_from_weights_that_are_not_there(stage_1, capsys):
    for flags, words in (([], "--pretrained needs --save"), (["--save", "x"], "there are: ")):
        with contextlib.suppress(SystemExit):
            assert train_GE.main(["--pretrained", "resnet", *flags]) == 2
        assert words in capsys.readouterr().err
    assert train_GE.main(["--save", str(stage_1 / "GE"), "--resume", "--epochs", "7"]) == 2
    assert f"--pretrained {stage_1 / 'GE'} with a new --save starts from its weights" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--backbone-bn", "moving"]])
def test_stage_2_goes_on_with_the_same_command(stage_1, monkeypatch, flags):
    flags = [*flags, "--epochs", "2"]
    assert train_imta(stage_1, *flags, "--save", str(stage_1 / "whole")) == 0
    with monkeypatch.context() as patch:
        StopAt(patch, 3, signal.SIGTERM)
        assert train_imta(stage_1, *flags) == 143
    assert train_imta(stage_1, *flags, "--resume") == 0
    whole, parts = (load_checkpoint(stage_1 / name / "last.pt")["state_dict"] for name in ("whole", "IMTA"))
    assert same_tensors(whole, parts)


def test_resume_without_a_last_checkpoint_loses_nothing(stage_1, capsys):
    (stage_1 / "GE" / "last.pt").unlink()
    before = (stage_1 / "GE" / "best.safetensors").read_bytes()
    assert train_ge(stage_1 / "GE", "--resume") == 2
    assert "without last.pt" in capsys.readouterr().err
    (stage_1 / "GE" / "last.pt").write_bytes(before)
    assert train_GE.main(["--save", str(stage_1 / "GE"), "--resume"]) == 2
    assert "last.pt: it is no PyTorch checkpoint" in capsys.readouterr().err
    assert (stage_1 / "GE" / "best.safetensors").read_bytes() == before


def test_evaluation_does_not_write_into_another_run(stage_1, capsys):
    assert train_imta(stage_1) == 0
    before = (stage_1 / "IMTA" / "anytime.csv").read_bytes()
    flags = ["--evalmode", "anytime", "--evaluate-from", str(stage_1 / "GE" / "best.safetensors"), "--save", str(stage_1 / "IMTA")]
    assert train_IMTA.main(flags) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (stage_1 / "IMTA" / "anytime.csv").read_bytes() == before


def test_a_full_disk_is_one_line_and_loses_nothing(stage_1, capsys):
    import resource

    before = (stage_1 / "GE" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        with pytest.raises(UserError, match="cannot write"):
            save_checkpoint(stage_1 / "GE" / "last.pt", load_checkpoint(stage_1 / "GE" / "last.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (stage_1 / "GE" / "last.pt").read_bytes() == before
    assert not list((stage_1 / "GE").glob(".*.tmp"))


def test_stage_2_with_one_image_a_step(stage_1, capsys):
    assert train_IMTA.main(["--pretrained", str(stage_1 / "GE"), "--batch-size", "1"]) == 2
    assert "at least 2 images" in capsys.readouterr().err


def test_stage_2_with_the_preset_of_another_network(stage_1, capsys):
    assert train_imta(stage_1, "--preset", "cifar100") == 2
    assert "trained with --preset demo" in capsys.readouterr().err


def test_stage_2_without_stage_1(tmp_path, capsys):
    assert train_IMTA.main(["--save", str(tmp_path / "IMTA")]) == 2
    message = capsys.readouterr().err
    assert "run stage 1 first" in message
    assert message.count("\n") == 1


def test_stage_2_of_another_network(stage_1, capsys):
    assert train_imta(stage_1, "--nBlocks", "5") == 2
    assert "--nBlocks 3, the command line says 5" in capsys.readouterr().err


def test_a_refused_run_leaves_no_directory(tmp_path):
    assert train_ge(tmp_path / "GE", "--data", "folder", "--data-root", str(tmp_path / "nowhere")) == 2
    assert not (tmp_path / "GE").exists()


def test_a_gpu_that_does_not_exist(tmp_path, capsys):
    assert train_ge(tmp_path / "GE", "--gpu", "99") == 2
    assert "this machine has" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train_GE, train_IMTA])
def test_evaluation_alone_repeats_the_tables(stage_1, program):
    assert train_imta(stage_1) == 0
    run = stage_1 / ("GE" if program is train_GE else "IMTA")
    for mode, table in ((["anytime"], "anytime.csv"), ([], "budgeted.csv"), (["dynamic"], "budgeted.csv")):
        before = (run / table).read_bytes()
        (run / table).unlink()
        assert program.main(["--save", str(run), "--evalmode", *mode]) == 0
        assert (run / table).read_bytes() == before


@pytest.mark.parametrize("measure", ["entropy", "margin", "patience"])
def test_policies_of_every_measure_answer_as_the_evaluation_says(stage_1, measure):
    run = stage_1 / "GE"
    assert train_GE.main(["--save", str(run), "--evalmode", "dynamic", "--measure", measure]) == 0
    saved = load_saved(run / "best.safetensors", {})
    curve = read_policy(run / "policy.json", saved.network)
    data = dataloader.load_data(parse("GE", TINY_FLAGS).settings(stored=saved.settings), torch.device("cpu"), None, saved.data, saved.split)
    images, targets = (torch.cat(parts) for parts in zip(*data.test, strict=True))
    for row, point in zip(read_csv(run / "budgeted.csv"), curve.of_rule("geometric"), strict=True):
        if row["p"] in (1, 20, 40):
            assert point.policy.measure == measure
            prediction = AdaptivePredictor(saved.network, point.policy)(images)
            assert 100 * (prediction.classes == targets).double().mean().item() == pytest.approx(row["test_acc1"], abs=0.01)


def test_measured_time_beside_counted_operations(stage_1, monkeypatch):
    monkeypatch.setattr(evaluate, "runtime_rows", partial(runtime_rows, seconds=0.1))
    monkeypatch.setattr(evaluate, "measure_blocks", partial(measure_blocks, seconds=0.1))
    monkeypatch.setattr(evaluate, "deadline_rows", partial(deadline_rows, calls=2))
    assert train_GE.main(["--save", str(stage_1 / "GE"), "--evalmode", "runtime"]) == 0
    rows = read_csv(stage_1 / "GE" / "runtime.csv")
    assert {row["batch_size"] for row in rows} == {1, 64}
    assert [row["p"] for row in rows].count(0) == 2  # every exit
    assert all(0 < row["lazy_operations"] <= row["operations"] for row in rows)
    assert all(row["milliseconds"] > 0 for row in rows)
    assert all(0 <= row["late"] <= 1 for row in read_csv(stage_1 / "GE" / "deadline.csv"))
    assert (stage_1 / "GE" / "runtime.png").exists()


def test_runtime_needs_the_policies_of_this_network(stage_1, capsys):
    policy = stage_1 / "GE" / "policy.json"
    assert train_imta(stage_1) == 0
    policy.write_bytes((stage_1 / "IMTA" / "policy.json").read_bytes())
    assert train_GE.main(["--save", str(stage_1 / "GE"), "--evalmode", "runtime"]) == 2
    assert "policy of another network" in capsys.readouterr().err
    policy.unlink()
    assert train_GE.main(["--save", str(stage_1 / "GE"), "--evalmode", "runtime"]) == 2
    assert "--evalmode dynamic" in capsys.readouterr().err


def test_evaluate_from_a_file_into_another_directory(stage_1, tmp_path):
    source = stage_1 / "GE" / "best.safetensors"
    assert train_GE.main(["--evaluate-from", str(source), "--evalmode", "anytime", "--save", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "anytime.csv").exists()


def test_a_released_checkpoint_is_evaluated_and_starts_stage_2(stage_1, capsys):
    network = load(stage_1 / "GE" / "best.safetensors")
    released = stage_1 / "released.pth.tar"
    torch.save({"epoch": 3, "arch": "msdnet_ge", "state_dict": to_released(network), "best_acc1": 1.0}, released)
    start = [*("--val-size", "64", "--nChannels", "4", "--growthRate", "4"), "--save", str(stage_1 / "again")]
    for mode in ("dynamic", "anytime"):
        assert train_GE.main(["--evaluate-from", str(released), "--evalmode", mode, *start]) == 0
    assert (stage_1 / "again" / "anytime.csv").read_bytes() == (stage_1 / "GE" / "anytime.csv").read_bytes()
    assert train_IMTA.main(["--pretrained", str(released), *start, "--overwrite", "--epochs", "1", "--batch-size", "32"]) == 0
    assert train_GE.main(["--evaluate-from", str(released), "--evalmode", "anytime", "--nBlocks", "7", "--save", "x"]) == 2
    assert "the file has 3 exits, --nBlocks says 7" in capsys.readouterr().err


def test_a_pickle_that_would_run_code_does_not(stage_1, capsys):
    marker = stage_1 / "ran"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for name, flags in (("best.safetensors", ["--evalmode"]), ("last.pt", ["--resume"])):
        torch.save({"format": FORMAT, "state_dict": Malicious()}, stage_1 / "GE" / name)
        assert train_GE.main(["--save", str(stage_1 / "GE"), *flags]) == 2
        message = capsys.readouterr().err
        assert name in message
        assert message.count("\n") == 1
    assert not marker.exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train_ge(tmp_path / "file" / "GE") == 2
    assert "cannot write" in capsys.readouterr().err


def test_image_folders_of_another_size_and_number_of_classes(image_folder, tmp_path):
    flags = ["--data", "folder", "--data-root", str(image_folder), "--val-size", "12", "--batch-size", "16", "--workers", "0"]
    assert train_ge(tmp_path / "GE", *flags, "--image-size", "72", "--no-small-inputs") == 0
    assert len(read_csv(tmp_path / "GE" / "anytime.csv")) == 3
    assert load(tmp_path / "GE" / "best.safetensors").description.class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("size", [["--image-size", "72", "--no-small-inputs", "--workers", "0"], ["--image-size", "32"]])
def test_anytime_evaluation_needs_test_images_only(image_folder, tmp_path, size, capsys):
    flags = ["--data", "folder", "--data-root", str(image_folder), "--val-size", "12", "--batch-size", "16", *size]
    assert train_ge(tmp_path / "GE", *flags) == 0
    before = read_csv(tmp_path / "GE" / "anytime.csv")
    (image_folder / "train").rename(image_folder / "elsewhere")
    (tmp_path / "GE" / "anytime.csv").unlink()
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--evalmode", "anytime"]) == 0
    assert read_csv(tmp_path / "GE" / "anytime.csv") == before
    capsys.readouterr()
    assert train_GE.main(["--save", str(tmp_path / "GE"), "--evalmode", "dynamic"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert train_ge(tmp_path / "new", *flags) == 2


def test_learning_rates():
    cosine = parse("GE", ["--lr", "0.8", "--lr-type", "cosine", "--epochs", "10", "--warmup-epochs", "0"]).settings()
    assert learning_rate(cosine, 0, 5) == 0.8
    assert learning_rate(cosine, 25, 5) == pytest.approx(0.4)
    assert learning_rate(cosine, 49, 5) == pytest.approx(0.8 * 0.5 * (1 + torch.tensor(torch.pi * 0.98).cos().item()), rel=1e-4)
    steps = parse("GE", ["--lr", "1", "--lr-type", "multistep", "--epochs", "8", "--warmup-epochs", "2"]).settings()
    assert [round(learning_rate(steps, s, 1), 4) for s in range(8)] == [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    given = parse(
        "GE", ["--lr", "1", "--lr-type", "multistep", "--lr-milestones", "1,3", "--decay-rate", "0.5", "--warmup-epochs", "0"]
    ).settings()
    assert [learning_rate(given, s, 2) for s in range(8)] == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
