"""The Markdown documents: links lead somewhere, programs take the commands, the README's Python runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import predict
from models import IMTA, MSDNet
from models.losses import one_for_all_loss
from presets import PRESETS
from settings.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(text: str) -> str:
    """Return ``text`` without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> list[str]:
    """Return the relative links of a document that lead nowhere."""
    dead = []
    for link in LINK.findall(without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def documents() -> list[Path]:
    """Return the project's Markdown files, without those of environments and runs."""
    folders = ("adaptive_inference", "benchmarks", "docs", "results", "tests", "weights")
    return [ROOT / "README.md", *(path for name in folders for path in sorted((ROOT / name).rglob("*.md")))]


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert dead_links(document) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Two words: `code`\n", encoding="utf-8")
    text = "[a](other.md#two-words-code) [b](other.md#three) [c](none.md) [d](#title) [e](#none) [f](https://x.y)"
    document = tmp_path / "document.md"
    document.write_text(f"# Title\n{text}\n```\n[g](in_code.md)\n```\n", encoding="utf-8")
    assert dead_links(document) == ["other.md#three", "none.md", "#none"]


METHOD, PYTHON = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_the_method_in_the_readme():
    """Its five lines compute what the functions compute that their comments name."""
    network = IMTA(MSDNet(num_blocks=2, base=1, step=1, num_channels=4, growth_rate=4, num_classes=5)).eval()
    start = torch.randn(3, network.feature_dims[1], requires_grad=True)
    previous, teacher, targets = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 3, 4])
    names = {
        **{"torch": torch, "rescale": network.backbone.rescale, "block": nn.Identity(), "x": start},
        **{"exits": [None, SimpleNamespace(features=nn.Identity())], "K": 5, "k": 1, "T": 4.0, "gamma": 0.5},
        **{"classifier": network.classifiers[1], "link": network.links[0], "previous_logits": previous},
        "ce": lambda logits: F.cross_entropy(logits, targets, reduction="none"),
        "teacher": teacher,
        "p": lambda logits: logits.softmax(dim=1),
        "kl": lambda p, q: F.kl_div(q.log(), p, reduction="none").sum(dim=1),
    }
    exec(METHOD, names)
    for name, share in (("features", 1 / 4), ("x", 3 / 4)):
        (gradient,) = torch.autograd.grad(names[name].sum(), start, retain_graph=True)
        torch.testing.assert_close(gradient, torch.full_like(gradient, share))
        assert torch.equal(names[name], start)
    logits = names["logits"]
    torch.testing.assert_close(logits, network.classify_next(1, start, previous))
    loss = one_for_all_loss([logits, previous], targets, teacher, temperature=4.0, gamma=0.5)
    torch.testing.assert_close(names["loss"], loss - names["ce"](previous))


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the programs that a document calls, and their arguments."""
    text = text.replace("\\\n", " ")
    starts = r"(?:python|torchrun [^`\n]*?) (train_GE|train_IMTA|predict)\.py +([^`\n]+)"
    for program, words in re.findall(starts, text):
        if words != "--help":
            yield program, shlex.split(words, comments=True)
    for stage, preset, words in re.findall(r"bash run_(GE|IMTA)\.sh +([a-z0-9-]+)([^`\n]*)", text):
        yield f"train_{stage}", ["--preset", preset, *shlex.split(words, comments=True)]


def test_the_programs_take_the_commands_of_the_documents():
    stages = {f"train_{stage}": partial(parse, stage) for stage in ("GE", "IMTA")}
    parsers = {"predict": predict.parse, **stages}
    found = [command for path in documents() for command in commands(path.read_text(encoding="utf-8"))]
    assert len(found) > 30
    for program, words in found:
        parsers[program](words)


def test_the_presets_are_those_of_the_table():
    table = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| (\d+) \+ (\d+) \|", table, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(PRESETS)
    for name, network, *epochs in rows:
        settings = [parse(stage, ["--preset", name]).settings() for stage in ("GE", "IMTA")]
        assert [s.epochs for s in settings] == [int(number) for number in epochs], name
        if exits := re.match(r"(\d) exits", network):
            assert {s.num_blocks for s in settings} == {int(exits[1])}, name


def test_the_figures_of_the_introduction_are_those_of_the_tables():
    """The tables themselves are compared with the result files in test_results.py."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, document in (("On CIFAR-100 the last", "weights"), ("**It pays**", "results")):
        (line,) = [line for line in readme.splitlines() if line.startswith(begin)]
        tables = (ROOT / document / "README.md").read_text(encoding="utf-8")
        figures = re.findall(r"\d\d\.\d\d", line)
        assert len(figures) >= 5
        assert all(f" {figure} " in tables for figure in figures), figures


def test_the_python_of_the_readme(tmp_path):
    """It runs in a clone's folder that holds a photograph."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in {"adaptive_inference", "image_data", "models", "weights"}:
            (tmp_path / path.name).symlink_to(path)
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "photo.jpg")
    program = tmp_path / "program.py"
    program.write_text(
        PYTHON + "print(logits.shape, exits.shape, prediction.probs.shape)\n", encoding="utf-8"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.findall(r"\[(.*?)\]", ended.stdout) == ["8, 100", "8", "1, 100"]
