"""The page of examples/browser in headless Chromium: Python's predictions, a working slider, clear lines."""

import functools
import importlib.util
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import export_onnx
from image_data import synthetic
from image_data.defaults import default_crop_share
from image_data.reading import read_image
from image_data.transforms import evaluation_transform

ROOT = Path(__file__).resolve().parents[1]
BROWSER = ROOT / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = ("onnxruntime-web", "puppeteer-core")
INSTALLED = (
    all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    and shutil.which("node")
    and CHROMIUM
    and all((BROWSER / "node_modules" / name).is_dir() for name in NEEDED)
)
pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs Chromium, requirements-export.txt and npm install in examples/browser"
)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, *_):
        """Drop the line."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page with the shipped network, and 20 images: of the network's size, larger and smaller."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(
        BROWSER, folder, ignore=shutil.ignore_patterns("node_modules", "network"), dirs_exist_ok=True
    )
    (folder / "node_modules").symlink_to((BROWSER / "node_modules").resolve())
    assert export_onnx.main(["--model", "imta_cifar100", "--output", f"{folder / 'network'}/"]) == 0
    images, _ = synthetic.generate(20, 0, 32)
    files = []
    for n, image in enumerate(images):
        size = [(32, 32), (1500, 1100), (200, 150), (90, 141), (24, 30)][max(0, n - 15)]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size)
        files.append(folder / f"image{n}.png")
        picture.save(files[-1])
    return folder, files


@pytest.fixture(scope="module")
def seen(site):
    """What the page shows, as tests/browser.mjs reports it."""
    folder, files = site
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command = ["node", str(ROOT / "tests" / "browser.mjs"), CHROMIUM, url, *map(str, files)]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_same_predictions_as_python(site, seen):
    from onnx_predictor import OnnxPredictor

    folder, files = site
    runner = OnnxPredictor(folder / "network", threads=1)
    transform = evaluation_transform(runner.image_size, default_crop_share(runner.image_size))
    pixels = np.stack([read_image(file, transform).numpy() for file in files])
    points = sorted(runner.points, key=lambda point: point["operations"])
    assert {view["policy"] for view in seen["views"]} >= {0, len(points) - 1}
    for view in seen["views"]:
        expected = runner.predict(pixels, points[view["policy"]]["thresholds"])
        assert [card["name"] for card in view["cards"]] == [file.name for file in files]
        assert [card["class"] for card in view["cards"]] == [runner.class_names[c] for c in expected.classes]
        assert [int(card["exit"]) for card in view["cards"]] == (expected.exits + 1).tolist()
        confidence = [float(card["confidence"]) for card in view["cards"]]
        np.testing.assert_allclose(confidence[:16], expected.confidence[:16], atol=1e-5)
        np.testing.assert_allclose(
            confidence, expected.confidence, atol=0.03
        )  # resized pixels differ by a rounding
        assert view["bars"] == np.bincount(expected.exits, minlength=runner.num_exits).tolist()


def test_the_slider_changes_exits_and_savings(seen):
    _, cheap, full = seen["views"]
    exits = [sum(int(card["exit"]) for card in view["cards"]) for view in (cheap, full)]
    assert exits[0] < exits[1]
    saved = [int(view["saved"][0].removesuffix("\N{NO-BREAK SPACE}%")) for view in (cheap, full)]
    assert saved[0] > saved[1]
    assert full["summary"].startswith("20 images: ")


def test_example_pictures_are_classified_when_the_page_opens(seen):
    named = [card["name"] == card["class"] for card in seen["pictures"]["cards"]]
    assert sum(named) >= len(named) - 3
    assert seen["seconds"] > 0  # until the first prediction
    assert seen["cleared"]["cards"] == []


def test_unusual_images_are_called_so(seen):
    notes = {card["name"]: card["note"] for card in seen["views"][0]["cards"] + seen["pictures"]["cards"]}
    assert "Unlike the training images: 200 × 150 pixels, shrunk to 32 × 32." in notes["image17.png"]
    assert "Smaller than the network's images: 24 × 30 pixels, enlarged." in notes["image19.png"]
    assert "Unlike the training images: 960 × 720 pixels" in notes["traffic_light"]
    assert notes["apple"] == ""
    unsure = [card for card in seen["views"][0]["cards"] if float(card["confidence"]) < 0.5]
    assert unsure
    assert all("perhaps none of the 100 classes" in card["note"] for card in unsure)


def test_no_error_no_other_host_and_controls_have_names(seen):
    assert seen["errors"] == []
    assert seen["withoutNames"] == []
    assert not seen["overflows"]


def test_a_quick_user_gets_sound_numbers(seen):
    """The slider goes through all policies at once, and files are dropped twice while others are read."""
    full, hurried = seen["views"][-1], seen["hurried"]
    assert hurried["policy"] == full["policy"]
    names = [card["name"] for card in full["cards"]]
    assert [card["name"] for card in hurried["cards"][:20]] == names
    assert sorted(card["name"] for card in hurried["cards"][20:]) == ["first.png", "second.png", "third.png"]
    assert [card["exit"] for card in hurried["cards"][:20]] == [card["exit"] for card in full["cards"]]
    assert sum(hurried["bars"]) == 23
    problem = hurried["problem"]
    assert problem.startswith("These files cannot be used as images: ")
    assert sorted(problem.split(": ")[1].removesuffix(".").split(", ")) == ["empty.gif", "notes.txt"]
    # Almost every image takes every exit: the time saved is small, whatever else ran meanwhile.
    exits = [int(card["exit"]) for card in hurried["cards"]]
    assert np.mean(exits) > 4
    assert int(hurried["saved"][1].removesuffix("\N{NO-BREAK SPACE}%")) < 50


def test_remove_all_stops_reading(seen):
    assert seen["stopped"]["cards"] == []
    assert seen["stopped"]["summary"] == "No images yet."
    assert sum(seen["stopped"]["bars"]) == 0


def test_problems_are_one_line(seen):
    writes = "export_onnx.py --output examples/browser/network/ writes it."
    assert seen["problems"] == {
        "webassembly": "This browser has no WebAssembly, which the network needs.",
        "block": f"There is no file /network/block3.onnx. {writes}",
        "version": "network.json was not written by this version of export_onnx.py: "
        'its format is "another 1", not "imta-msdnet onnx 4"',
        "pictures": "There is no file /pictures/apple.svg.",
        "file": "This page needs a server: type python -m http.server in examples/browser, and open http://localhost:8000.",
    }
