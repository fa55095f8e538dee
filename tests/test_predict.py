"""predict.py: rows in three formats, what can be asked for, interruptions, and files that cannot be read."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine.prediction.predict_all
import predict
from adaptive_inference.confidence import confidence_by_exit
from adaptive_inference.finding import policy_curve
from adaptive_inference.policies import LossCounts
from adaptive_inference.policy_files import write_policy
from adaptive_inference.predictor import Prediction
from adaptive_inference.promises.risk import CERTIFICATE
from engine.checkpoint import save_network
from engine.prediction.predict_all import TimedPredictor
from engine.prediction.rows import WRITERS, prediction_rows
from engine.runtime.device import limit_threads
from models import IMTA, MSDNet, count_operations, to_released
from models.description import Split
from models.saved import read_network
from tests.conftest import TINY_NETWORK, describe, policy_point

CLASS_NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with policies: point p lets about p tenths of all images leave at the first exit."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    network = IMTA(MSDNet(**TINY_NETWORK)).eval()
    save_network(
        folder / "best.safetensors",
        network,
        describe(network),
        Split(torch.arange(3), torch.empty(0, dtype=torch.int64)),
    )
    with torch.no_grad():
        confidence, _ = confidence_by_exit(torch.stack(network(torch.randn(50, 3, 32, 32))))
    operations = count_operations(network, 32)
    rows = []
    for p in (10, 5, 1):
        mean = operations[0] * p / 10 + operations[2] * (1 - p / 10)
        rows.append(
            policy_point(
                p,
                [confidence[0].quantile(1 - p / 10).item(), 1e8, -1e8],
                90.0 - p,
                mean,
                [p / 10, 0.0, 1 - p / 10],
                temperatures=(2.0,) * 3,
            )
        )
    tested = replace(rows[1], rule="certified", losses=LossCounts(900, 2, 3, 9))
    # An ensemble of exits would cost so much more than the last exit alone.
    full = replace(
        rows[0], policy=replace(rows[0].policy, thresholds=(1e8, 1e8, -1e8)), operations=operations[2] + 30
    )
    full = replace(full, rule="certified", number=41, losses=LossCounts(900, 0, 0, 0))
    curve = policy_curve(network, operations, [*rows, tested, full], 1000, CERTIFICATE)
    write_policy(folder / "policy.json", curve)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for i, name in enumerate(["a.png", "b.png", "deeper/c.jpg", "d.webp"]):
        pixels = torch.randint(256, (40 + i, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(trained, *arguments):
    return predict.main(
        ["--model", str(trained / "best.safetensors"), "--device", "cpu", *map(str, arguments)]
    )


def test_formats_agree(trained, images, capsys):
    assert run(trained, images, "--rule", "geometric", "--format", "json") == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    rows, summary = content["predictions"], content["summary"]
    assert [row["file"].removeprefix(f"{images}/") for row in rows] == [
        "a.png",
        "b.png",
        "d.webp",
        "deeper/c.jpg",
    ]
    for row in rows:
        assert len(row["top5"]) == 5
        best = row["top5"][0]
        assert (row["class"], row["confidence"]) == (best["class"], best["confidence"])
        assert row["class"] == CLASS_NAMES[best["index"]]
        assert 0 < row["confidence"] <= 1
        assert row["exit"] in (1, 3)
        assert row["operations"] > 0
        assert row["network_milliseconds"] > 0
    assert content["policy"]["p"] == 10  # the nearest to half of the operations
    assert len(content["policy"]["thresholds"]) == 3
    assert summary["images"] == 4
    assert summary["operations"] == pytest.approx(sum(row["operations"] for row in rows) / 4, abs=1)
    assert summary["share_of_exits"] == [sum(row["exit"] == k for row in rows) / 4 for k in (1, 2, 3)]
    assert "nothing was asked for" in printed.err
    assert "4 images: " in printed.err.splitlines()[-1]
    assert run(trained, images, "--rule", "geometric", "--format", "csv", "--batch-size", "1") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = ("file", "class", "exit", "operations")
    assert [[row[name] for name in names] for row in table] == [
        [str(row[name]) for name in names] for row in rows
    ]
    assert run(trained, images) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.parametrize(
    ("operations", "variable", "expected"), [(5e7, None, 1), (1e12, None, 2), (5e7, "2", 2)]
)
def test_small_batches_use_one_thread(operations, variable, expected, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:  # chosen by the user
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("engine.runtime.device.available_cores", lambda: 2)
    try:
        torch.set_num_threads(2)
        limit_threads(None, operations)
        assert torch.get_num_threads() == expected
        limit_threads(3, operations)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_wishes_of_all_kinds_are_granted(trained, images, capsys):
    """The three policies have their own number; time depends on the machine."""
    geometric = ["--rule", "geometric"]
    for flags, expected in (
        (["--budget", "100%", *geometric], 1),
        (["--budget", "1000M", *geometric], 1),
        (["--budget", "1000000ms", *geometric], 1),
        (["--accuracy", "84", *geometric], 5),
        (["--max-loss", "2%"], 5),
        (["--max-loss", "0"], 41),
        (["--max-loss", "0", "--budget", "100%"], 41),
        (["--max-loss", "2%", "--confidence-level", "100"], 41),
    ):
        assert run(trained, images, *flags, "--format", "json") == 0
        assert json.loads(capsys.readouterr().out)["policy"]["p"] == expected, flags
    assert run(trained, images, "--max-loss", "2%", "--format", "json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["policy"]["promise"] == "lose at most 2 % with 95 % confidence"
    assert "the promise is to lose at most 2 % with 95 % confidence" in printed.err
    assert "85.0 % of 900 held-out images right" in printed.err
    assert run(trained, images, "--deadline", "1000000ms", "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    assert {row["exit"] for row in content["predictions"]} == {3}
    assert content["summary"]["late"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "0.000001M"], "cheapest policy"),
        (["--budget", "0.000001ms"], "ms is too small here"),
        (["--budget", "50%", "--accuracy", "88", "--rule", "geometric"], "the cheapest policy allowed needs"),
        (["--budget", "50%", "--max-loss", "2%"], "the cheapest policy allowed needs"),
        (["--deadline", "0.000001ms"], "too short here"),
        (["--accuracy", "95"], "reaches 95 %"),
        (["--rule", "optimised"], "optimised"),
        (["--policy", "missing.json"], "no policy file"),
        (["--device", "no-such-device"], "--device"),
    ],
)
def test_wishes_that_cannot_be_granted(trained, images, capsys, flags, message):
    assert run(trained, images, *flags) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""


def test_unreadable_files_are_named_and_skipped(trained, images, tmp_path, capsys):
    """Damaged, missing, a pipe that nobody writes into, a line of pixels, and an empty folder."""
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    os.mkfifo(images / "pipe.png")
    Image.new("RGB", (40_000, 2)).save(images / "line.png")
    (tmp_path / "empty").mkdir()
    others = [images / "missing.png", tmp_path / "empty"]
    assert run(trained, images, *others, "--format", "json") == 1
    output = capsys.readouterr()
    assert len(json.loads(output.out)["predictions"]) == 4
    errors = [line for line in output.err.splitlines() if "skipped" in line]
    for name, reason in (
        ("broken.png", ""),
        ("missing.png", ""),
        ("pipe.png", "it is not a file"),
        ("line.png", "differ too much"),
    ):
        (line,) = (line for line in errors if name in line)
        assert reason in line
    assert "empty holds no image" in output.err


def test_an_older_output_stays_where_nothing_can_be_predicted(trained, tmp_path, capsys):
    output = tmp_path / "predictions.csv"
    output.write_text("of yesterday")
    for path in (output, tmp_path / "new.csv"):
        assert run(trained, tmp_path / "missing.png", "--format", "csv", "--output", path) == 1
        assert f"nothing is written to {path}" in capsys.readouterr().err
    assert output.read_text() == "of yesterday"
    assert not (tmp_path / "new.csv").exists()


def test_images_without_a_finite_output_are_named_and_skipped(trained, images, tmp_path, capsys):
    """With this normalisation all but dark pixels become infinite; a black image is predicted."""
    network, description, split = read_network(trained / "best.safetensors")
    data = replace(description.data, mean=(0.0,) * 3, std=(1e-39,) * 3)
    model = tmp_path / "overflowing" / "best.safetensors"
    model.parent.mkdir()
    save_network(model, network, replace(description, data=data), split)
    Image.new("RGB", (32, 32)).save(images / "black.png")
    words = [str(images), "--model", str(model), "--format", "json"]
    for batch_size in ("1", "2", "64"):
        assert predict.main([*words, "--batch-size", batch_size]) == 1
        printed = capsys.readouterr()
        (row,) = json.loads(printed.out)["predictions"]
        assert row["file"].endswith("black.png")
        skipped = [line for line in printed.err.splitlines() if "is not finite; skipped" in line]
        assert len(skipped) == 4
        assert any("deeper/c.jpg" in line for line in skipped)


def test_newest_run_is_taken(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.files.WEIGHTS", tmp_path)
    assert predict.main([str(images)]) == 2
    assert "no network of that name" in capsys.readouterr().err
    for name, age in (("old", 100), ("new", 0), ("without_policy", -100)):
        shutil.copytree(trained, tmp_path / "save" / name)
        os.utime(tmp_path / "save" / name / "best.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "save" / "without_policy" / "policy.json").unlink()
    assert predict.main([str(images)]) == 0
    assert "network save/new/best.safetensors, the newest one" in capsys.readouterr().err


def test_network_without_policy_predicts_with_all_of_it(trained, images, tmp_path, capsys):
    shutil.copy(trained / "best.safetensors", tmp_path / "best.safetensors")
    assert predict.main([str(images), "--model", str(tmp_path / "best.safetensors"), "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert {row["exit"] for row in json.loads(printed.out)["predictions"]} == {3}
    assert "every image runs the full network" in printed.err
    assert predict.main([str(images), "--model", str(tmp_path / "best.safetensors"), "--budget", "50%"]) == 2
    assert "there is no policy file" in capsys.readouterr().err


def test_a_released_checkpoint_names_the_command(images, tmp_path, capsys):
    path = tmp_path / "released.pth.tar"
    torch.save({"state_dict": to_released(MSDNet(num_classes=10, step_mode="lin_grow"))}, path)
    assert predict.main([str(images), "--model", str(path)]) == 2
    assert f"python -m engine.convert {path}" in capsys.readouterr().err


def stop_at_call(monkeypatch, number, stop):
    """Let the prediction of the batch of this number, from 1, call ``stop``."""
    real, calls = TimedPredictor.predict, iter(range(1, 100))

    def predict_or_stop(self, files, images):
        if next(calls) == number:
            stop()
        return real(self, files, images)

    monkeypatch.setattr(TimedPredictor, "predict", predict_or_stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["a row", "the end"])
def test_a_signal_while_the_output_is_written(trained, images, tmp_path, monkeypatch, capsys, number, place):
    """What is being written is finished, and the summary counts what is there."""
    target, name = (WRITERS["json"], "row") if place == "a row" else (os, "fsync")
    real, calls = getattr(target, name), iter(range(100))

    def write_and_signal(*arguments):
        if next(calls) == 0:
            signal.raise_signal(number)
        return real(*arguments)

    monkeypatch.setattr(target, name, write_and_signal)
    output = tmp_path / "new" / "predictions.json"
    assert run(trained, images, "--batch-size", "2", "--format", "json", "--output", output) == 128 + number
    content = json.loads(output.read_text())
    assert len(content["predictions"]) == content["summary"]["images"] == (2 if place == "a row" else 4)
    assert "stopped by a signal" in capsys.readouterr().err.splitlines()[-1]
    assert list(output.parent.iterdir()) == [output]


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("format", ["json", "csv", "table"])
@pytest.mark.parametrize(
    ("stop", "status", "message"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped by a signal"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped by a signal"),
        (out_of_memory, 2, "not enough memory"),
    ],
    ids=["SIGINT", "SIGTERM", "memory"],
)
def test_what_was_predicted_is_kept(
    trained, images, tmp_path, monkeypatch, capsys, format, stop, status, message
):
    output = tmp_path / "new" / format
    flags = ("--batch-size", "2", "--format", format, "--output", output)
    stop_at_call(monkeypatch, 2, stop)
    assert run(trained, images, *flags) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "the 2 predictions so far are kept" in printed.err
    assert message in printed.err.splitlines()[-1]
    kept = output.read_text()
    if format == "json":
        assert len(json.loads(kept)["predictions"]) == 2
    else:
        assert len(kept.splitlines()) == 3  # with the line of the columns
    assert list(output.parent.iterdir()) == [output]

    # Before the first prediction an older file stays.
    stop_at_call(monkeypatch, 1, stop)
    assert run(trained, images, *flags) == status
    assert output.read_text() == kept


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        ("| head -1", 0, None),
        pytest.param(">/dev/full", 2, "No space", marks=pytest.mark.slow),
        pytest.param(">&-", 2, "is closed", marks=pytest.mark.slow),
    ],
)
def test_standard_output_that_ends(trained, images, redirection, status, message):
    """Its reader leaves, its disk is full, or it was closed from the start."""
    model = trained / "best.safetensors"
    words = [sys.executable, predict.__file__, str(images), "--model", str(model), "--batch-size", "1"]
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join(words)} {redirection}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    assert message is None or message in ended.stderr.splitlines()[-1]


def test_memory_that_is_not_there_is_told_in_words(trained, images, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    monkeypatch.setattr(engine.prediction.predict_all.AdaptivePredictor, "__call__", fail)
    assert run(trained, images) == 2
    assert "a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: PATH"),
        (["x", "--budget", "nanM"], "'nan' is not a finite number"),
        (["x", "--budget", "-3M"], "--budget: expected one argument"),
        (["x", "--budget", "200%"], "at most 100"),
        (["x", "--budget", "60"], "'60' has no unit"),
        (["x", "--deadline", "0ms"], "more than 0"),
        (["x", "--max-loss", "200"], "at most 100"),
        (["x", "--confidence-level", "90"], "belong to --max-loss"),
        (["x", "--disagreement"], "belong to --max-loss"),
        (["x", "--deadline", "5ms", "--budget", "2ms"], "--deadline and --budget ask for different policies"),
        (
            ["x", "--max-loss", "1%", "--rule", "geometric"],
            "--max-loss and --rule ask for",
        ),
        (["x", "--max-loss", "1%", "--confidence-level", "0.95"], "at least 50"),
        (["x", "--batch-size", "0"], "at least 1"),
        (["x", "--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_command_lines_that_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_output_replaces_no_image(trained, images, monkeypatch, capsys):
    """Whatever names the image: another spelling, or its folder. A file of former predictions is replaced."""
    monkeypatch.chdir(images)
    pixels = (images / "a.png").read_bytes()
    for path, output in (
        (images / "a.png", "a.png"),
        ("a.png", "deeper/../a.png"),
        (images, images / "a.png"),
    ):
        assert run(trained, "missing.png", path, "--output", output) == 2
        assert re.search(r"a\.png would replace .*a\.png, which is read", capsys.readouterr().err)
        assert (images / "a.png").read_bytes() == pixels
    for name in ("best.safetensors", "policy.json"):
        content = (trained / name).read_bytes()
        assert run(trained, images, "--output", trained / name) == 2
        assert "which is read" in capsys.readouterr().err
        assert (trained / name).read_bytes() == content
    for _ in range(2):
        assert run(trained, images, "--output", images / "rows.csv", "--format", "csv") == 0
    assert len((images / "rows.csv").read_text().splitlines()) == 5


def test_an_output_behind_a_link_leaves_the_link(trained, images, tmp_path):
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    link.symlink_to(real)
    for _ in range(2):  # first there is nothing behind it
        assert run(trained, images, "--format", "csv", "--output", link) == 0
        assert link.is_symlink()
        assert len(real.read_text().splitlines()) == 5
        real.write_text("old")


def test_paths_of_any_bytes(trained, images, tmp_path):
    run_of_bytes, images_of_bytes = (tmp_path / os.fsdecode(name) for name in (b"run\xe9", b"images\xe9"))
    shutil.copytree(trained, run_of_bytes)
    images.rename(images_of_bytes)
    assert run(run_of_bytes, images_of_bytes, "--format", "json", "--output", tmp_path / "rows.json") == 0
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert content["model"].endswith("/run\ufffd/best.safetensors")
    assert content["predictions"][0]["file"].endswith("/images\ufffd/a.png")


def test_output_into_a_device_leaves_it_one(trained, images, tmp_path):
    device = tmp_path / "null"
    device.symlink_to(os.devnull)
    words = [str(images), "--model", str(trained / "best.safetensors"), "--output", str(device)]
    assert predict.main(words) == 0
    assert device.is_char_device()
    assert device.is_symlink()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_no_prediction_is_lost_to_an_encoding(trained, tmp_path, monkeypatch, encoding, format):
    """Names of files and classes in any writing system, on a terminal that has few characters."""
    (tmp_path / "run").mkdir()
    network, description, split = read_network(trained / "best.safetensors")
    names = [f"{name} {i}" for i, name in enumerate(["café", "ねこ", "кот", "\U0001f408", "قط"] * 2)]
    data = replace(description.data, class_names=names)
    save_network(tmp_path / "run" / "best.safetensors", network, replace(description, data=data), split)
    Image.new("RGB", (32, 32)).save(tmp_path / "Zoë ねこ.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    flags = ["--model", str(tmp_path / "run" / "best.safetensors"), "--format", format]
    assert predict.main([str(tmp_path / "Zoë ねこ.png"), *flags]) == 0
    text = stdout.buffer.getvalue().decode(encoding)
    if format == "json":
        (row,) = json.loads(text)["predictions"]
        assert row["class"] in names
        assert row["file"].endswith("Zoë ねこ.png")
    elif format == "csv":
        (row,) = csv.DictReader(io.StringIO(text))
        assert row["class"] in [name.encode(encoding, "backslashreplace").decode(encoding) for name in names]
    else:
        assert len(text.splitlines()) == 2


def test_of_equal_probabilities_the_predicted_class_comes_first():
    probs = torch.full((1, 100), 0.01)
    prediction = Prediction(
        torch.tensor([7]), torch.tensor([0.01]), torch.tensor([0]), probs, torch.tensor([0.0])
    )
    (row,) = prediction_rows([Path("a.png")], prediction, 1.0, [1], [f"class {k}" for k in range(100)])
    assert (row["class"], row["confidence"]) == ("class 7", 0.01)
    assert len({best["index"] for best in row["top5"]}) == 5
    assert {best["confidence"] for best in row["top5"]} == {0.01}


def test_five_best_stay_five_where_classes_have_one_name(trained, images, tmp_path, capsys):
    network, description, split = read_network(trained / "best.safetensors")
    data = replace(description.data, class_names=["crane"] * 10)
    save_network(tmp_path / "best.safetensors", network, replace(description, data=data), split)
    command = [str(images), "--model", str(tmp_path / "best.safetensors"), "--format", "json"]
    assert predict.main(command) == 0
    for row in json.loads(capsys.readouterr().out)["predictions"]:
        assert len({best["index"] for best in row["top5"]}) == 5


def test_home_is_expanded_in_every_path(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    flags = ["--model", "~/run", "--policy", "~/run/policy.json", "--output", "~/rows.csv", "--format", "csv"]
    assert predict.main(["~/images", *flags]) == 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5
    assert predict.main(["~/images", "--model", "~no-such-user/run"]) == 2
    assert "~no-such-user" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "words"), [(400, "far more than the network's 32"), (40, None), (10, "are enlarged to")]
)
def test_images_far_from_the_networks_are_named(trained, tmp_path, capsys, size, words):
    Image.new("RGB", (size, size + 10)).save(tmp_path / "image.png")
    assert run(trained, tmp_path / "image.png") == 0
    errors = capsys.readouterr().err
    assert "it knows 10 classes (class 0, class 1, class 2, ...) in images of 32 x 32 pixels" in errors
    assert ("pixels per side" in errors) is (words is not None)
    assert words is None or words in errors


@pytest.mark.parametrize("size", [400, 10])
def test_a_network_of_ones_own_photographs_is_not_doubted(trained, tmp_path, capsys, size):
    """It was trained on photographs that were scaled to its size, too."""
    network, description, split = read_network(trained / "best.safetensors")
    data = replace(description.data, name="folder")
    save_network(tmp_path / "best.safetensors", network, replace(description, data=data), split)
    Image.new("RGB", (size, size)).save(tmp_path / "image.png")
    assert predict.main([str(tmp_path / "image.png"), "--model", str(tmp_path / "best.safetensors")]) == 0
    assert "pixels per side" not in capsys.readouterr().err


def test_the_line_of_a_budget_in_time_says_over_how_many_images_it_holds(trained, images, capsys):
    assert run(trained, images, "--budget", "1000000ms", "--batch-size", "4", "--threads", "1") == 0
    assert "the mean holds over about 72 images or more" in capsys.readouterr().err
