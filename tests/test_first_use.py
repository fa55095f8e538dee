"""The commands of docs/first_use.md, run as written there, on 120 photographs of 64 pixels."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

from engine.report import read_csv
from image_data.preprocessing import preprocess
from models.description import DataInfo

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "first_use.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.strip().splitlines()
]
TRAINING, USE, LATER = COMMANDS[:3], COMMANDS[3:9], COMMANDS[9:]
SMALL_IMAGES = "--image-size 64 --workers 1"
CLASSES = ("car", "cat", "daisy", "dog")


@pytest.fixture
def place(tmp_path):
    """A folder that looks like a checkout, with photographs in it."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists() or path.name == "weights":
            (tmp_path / path.name).symlink_to(path)
    for number, script in enumerate(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / ("predict_one.py", "onnx_predict_one.py")[number]).symlink_to(
            tmp_path / "elsewhere" / f"{number}.py"
        )
        (tmp_path / "elsewhere" / f"{number}.py").write_text(script, encoding="utf-8")
    for i in range(120):
        pixels = torch.randint(90, (200, 200, 3), dtype=torch.uint8)
        pixels[..., i % 4 % 3] += 40 * (i % 4)
        folder = tmp_path / "photos" / ("test" if i < 24 else "train") / CLASSES[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.jpg")
    # In the place of the download.
    weights = tmp_path / "torch" / "hub" / "checkpoints" / Path(MobileNet_V3_Small_Weights.DEFAULT.url).name
    weights.parent.mkdir(parents=True)
    torch.save(mobilenet_v3_small().state_dict(), weights)
    (tmp_path / "photo.jpg").symlink_to(tmp_path / "photos" / "test" / "cat" / "1.jpg")
    return tmp_path


def run(command, place, extra=""):
    """Return the output and errors of a command that ends well, or with status 130 after Ctrl-C."""
    command, _, comment = command.partition("#")
    line = command.strip().replace("python ", f"{shlex.quote(sys.executable)} ") + f" {extra}"
    # One process that bash becomes, for the signal.
    line = line if line.startswith("PYTHONPATH") else f"exec {line}"
    settings = {
        "TORCH_HOME": str(place / "torch"),
        "PROCESSES": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        ["bash", "-c", line],
        cwd=place,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    if "Ctrl-C" in comment:
        while "epoch 1/" not in seen and process.poll() is None:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == (130 if "Ctrl-C" in comment else 0), errors
    assert "Warning" not in output + errors
    assert all(line.startswith(("predict.py: ", "train_GE.py: stopped")) for line in errors.splitlines()), (
        errors
    )
    if "train_" in command:
        assert re.search("^(preset .*, training into|reading the images)", (seen + output).splitlines()[0])
    return seen + output, errors


def use(place):
    table, json_file, library, export, exported, runtime = USE
    output, errors = run(table, place)
    shown = output.splitlines()[-1].split()
    assert shown[0] in CLASSES
    assert shown[-1] == "photo.jpg"
    assert "1 image: " in errors.splitlines()[-1]
    _, errors = run(json_file + " --model save/finetune/IMTA", place)
    assert "predict.py: policy " in errors
    content = json.loads((place / "predictions.json").read_text(encoding="utf-8"))
    assert (len(content["predictions"]), content["summary"]["images"]) == (24, 24)
    assert len(content["predictions"][0]["top5"]) == 4
    name, confidence, _, _, exit_number = run(library, place)[0].split()
    assert (name, exit_number) == (shown[0], shown[2])
    assert float(confidence) == pytest.approx(float(shown[1]), abs=1e-3)
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        assert run(export, place)[0].endswith(": photos.onnx\n")
        assert re.fullmatch(rf"({'|'.join(CLASSES)}) [01]\.\d+ at exit [1-4]\n", run(exported, place)[0])
    measured, _ = run(runtime, place)
    assert re.search(r" every exit .* \d+$", measured, re.MULTILINE)  # no decimals of 24 test images
    assert "late %" in measured
    assert len(read_csv(place / "save" / "finetune" / "IMTA" / "runtime.csv")) > 2


def stop_and_go_on(place):
    stop, resume, more = LATER
    _, errors = run(stop, place, SMALL_IMAGES + " --epochs 12")
    assert re.search(
        r"stopped by a signal (in|after) epoch \d+ of 12, .*saved; to resume: python train_GE.py .* --resume",
        errors,
    )
    output, _ = run(resume, place)
    assert "resuming save/again/GE/last.pt" in output
    assert output.endswith("next: python train_IMTA.py --pretrained save/again/GE\n")
    output, _ = run(more.replace("--epochs 20", "--epochs 3"), place)
    assert "epoch 3/3: " in output
    assert output.endswith("next: python train_IMTA.py --pretrained save/longer/GE\n")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_the_onnx_program_prepares_images_as_evaluation_does(mode, tmp_path, monkeypatch, capsys):
    """Also what lies behind transparent pixels, and images on their side."""
    side = np.linspace(0, 255, 90, dtype=np.uint8)
    channels = np.stack(np.broadcast_arrays(side, side[:70, None], side[::-1], side[70:0:-1, None]), axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(channels, "RGBA").convert(mode).save(tmp_path / "photo.jpg", format="PNG", exif=exif)
    seen = []

    class Predictor:
        image_size, class_names = 56, ("cat", "dog")

        def __init__(self, path):
            self.preprocessing = {"crop_share": 0.875, "interpolation": "bicubic"}

        def predict(self, images):
            seen.append(images)
            return SimpleNamespace(classes=[1], confidence=[0.5], exits=[0])

    monkeypatch.setitem(sys.modules, "onnx_predictor", SimpleNamespace(OnnxPredictor=Predictor))
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], {})
    assert capsys.readouterr().out == "dog 0.5 at exit 1\n"
    data = DataInfo("folder", ["cat", "dog"], 56, 0.875, "bicubic", [0.0] * 3, [1.0] * 3, 0, "")
    assert np.array_equal(seen[0][0], preprocess("photo.jpg", data).numpy())


@pytest.mark.slow
def test_commands(place):
    stage_1, stage_2, look = TRAINING
    output, _ = run(stage_1, place, SMALL_IMAGES + " --epochs 2")
    assert "preset finetune, training into save/finetune/GE" in output
    assert "folder: 87 training, 9 held-out, 24 test images" in output
    assert output.endswith("next: python train_IMTA.py --pretrained save/finetune/GE\n")
    output, _ = run(stage_2, place, "--epochs 1")
    assert output.endswith("next: python predict.py photo.jpg --model save/finetune/IMTA\n")
    assert {"anytime.csv", "budgeted.csv", "curves.png", "examples.png", "policy.json"} <= set(
        run(look, place)[0].split()
    )
    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(part, place) for part in (use, stop_and_go_on)]:
            work.result()
