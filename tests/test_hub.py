"""torch.hub beside a program's own ``models``; what ``pip install .`` says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOAD = f"import torch; network = torch.hub.load({str(ROOT)!r}, 'imta_cifar100', source='local')"
LOAD_OTHER = "import torch; torch.hub.load('other', 'network', source='local')"


INTERRUPTED = f"""
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "imta_msdnet.saved":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
try:
    {LOAD}
except KeyboardInterrupt:
    {LOAD}
else:
    sys.exit("it was not interrupted")
"""
PROGRAMS = (
    INTERRUPTED,
    f"import models, utils; mine = sys.modules['models']; {LOAD}; assert sys.modules['models'] is mine",
    f"{LOAD}; import models, utils; assert models.MINE and utils.MINE",
    f"{LOAD_OTHER}; {LOAD}; {LOAD}",
    f"{LOAD}; {LOAD_OTHER}; assert 'models' in sys.modules",
    f"{LOAD}; network.early_exit(torch.zeros(1, 3, 32, 32), [0.5] * 5)",
)
# Every program runs in a fork, as importing PyTorch takes seconds.
RUN_ALL = f"""
import os, sys, torch
statuses = []
for program in {PROGRAMS!r}:
    process = os.fork()
    if process == 0:
        exec(program)
        assert type(network).__name__ == "IMTA"
        os._exit(0)
    statuses.append(os.waitpid(process, 0)[1])
print(statuses)
"""


def run_program(path):
    """Run a program in its folder."""
    return subprocess.run(
        [sys.executable, path.name],
        cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_hub_neither_meets_nor_hides_another_package(tmp_path):
    for folder in (tmp_path / "models", tmp_path / "other" / "models"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("MINE = 1\nclass Network: pass\n")
    for name in ("utils", "args", "dataloader"):
        (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    (tmp_path / "other" / "hubconf.py").write_text(
        "dependencies = []\nfrom models import Network as _N\ndef network(): return _N()\n"
    )
    (tmp_path / "programs.py").write_text(RUN_ALL)
    ended = run_program(tmp_path / "programs.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{[0] * len(PROGRAMS)}\n"


@pytest.mark.slow
def test_the_library_in_a_folder_that_holds_files_of_the_same_names(tmp_path):
    """With the clone first on the path, as documented."""
    (tmp_path / "models").mkdir()
    for name in ("utils.py", "datasets.py", "args.py", "models/__init__.py"):
        (tmp_path / name).write_text("MINE = 1\n")
    (tmp_path / "program.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from adaptive_inference import load_predictor\n"
        "from image_data.preprocessing import preprocess\n"
        "assert load_predictor('imta_cifar100').network.num_exits == 5\n"
        "import datasets; assert datasets.MINE\n"
    )
    ended = run_program(tmp_path / "program.py")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_installing_is_refused_with_the_ways_that_work(monkeypatch):
    sys_path = [str(ROOT / ".ci"), *sys.path]
    monkeypatch.setattr(sys, "path", sys_path)
    import no_package

    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable", "build_wheel"):
        with pytest.raises(SystemExit) as ended:
            getattr(no_package, hook)()
        assert "\n" not in ended.value.code
        for way in ("torch.hub", "ONNX", "PYTHONPATH"):
            assert way in ended.value.code
