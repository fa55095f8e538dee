"""Imports run downwards only, without cycles, and in short chains."""

import pytest

from tests.imports import ImportGraph

MAX_CHAIN = 8
PROMISES = "adaptive_inference.promises"
# What the modules of each part may import besides each other.
ALLOWED = {
    "utils": (),
    "parsing": ("utils",),
    "models": (),
    "image_data": ("models.description", "models.errors", "models.normalizer", "utils"),
    "dataloader": ("image_data", "models.description", "models.normalizer", "utils"),
    "adaptive_inference": ("image_data.preprocessing", "models", "utils"),
    PROMISES: ("adaptive_inference", "models", "utils"),
    "presets": (),
    "args": (
        *("adaptive_inference.confidence", "image_data.defaults", "models", "parsing", "presets"),
        "utils",
    ),
    "settings": ("args", "models", "presets", "utils"),
    "engine": (
        *(PROMISES, "adaptive_inference", "args", "dataloader", "image_data", "models"),
        *("parsing", "settings", "utils"),
    ),
    "onnx_predictor": (),
    "hubconf": ("models",),
}
PROGRAMS = ("train_GE", "train_IMTA", "predict", "export_onnx")
NEVER_IMPORTED = ("benchmarks", "examples")


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph()


def part_of(module: str) -> str:
    return PROMISES if module.startswith(PROMISES) else module.split(".")[0]


def test_there_is_no_cycle(graph):
    assert graph.cycles() == []


def test_chains_are_short(graph):
    chain = graph.longest_chain()
    assert len(chain) <= MAX_CHAIN, " -> ".join(chain)


def test_imports_run_downwards(graph):
    upwards = []
    for module, imported in graph.imports.items():
        part = part_of(module)
        for other in sorted(imported):
            is_same = part_of(other) == part
            is_allowed = any(other == name or (part_of(other) == name) for name in ALLOWED.get(part, ()))
            if part in ALLOWED and not is_same and not is_allowed:
                upwards.append(f"{module} imports {other}")
            if part_of(other) in NEVER_IMPORTED and not is_same:
                upwards.append(f"{module} imports {other}")
    assert upwards == []


def test_prediction_needs_no_search_for_thresholds_and_no_timing(graph):
    reached = graph.reachable("adaptive_inference.loading")
    others = ("calibration", "optimised", "timing", "block_times", "export")
    assert reached & {f"adaptive_inference.{name}" for name in others} == set()
    assert "adaptive_inference.predictor" in reached


def test_nothing_below_the_programs_imports_one(graph):
    importers = {
        module
        for module, imported in graph.imports.items()
        if imported & set(PROGRAMS) and part_of(module) in ALLOWED
    }
    assert importers == set()


def test_every_part_is_known(graph):
    parts = {part_of(module) for module in graph.files}
    assert parts - ALLOWED.keys() - set(PROGRAMS) == {"benchmarks", "examples", "experiments"}
