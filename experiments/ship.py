"""Make a file for the folder weights/ from a finished run, with its policies and the model card.

    python -m experiments.ship save/cifar100/IMTA weights/imta_cifar100.safetensors
    python -m experiments.ship weights/imta_cifar100.safetensors weights/imta_cifar100.safetensors \
        --data-root data/cifar100          # new policies and figures for a file of the folder

Weights are stored in half precision; the rounded network is evaluated in float32, and no exit may lose more
than ``MAX_LOSS``.
``NAME.policy.json`` beside the file holds the thresholds of the rounded network, README.md the card of all
networks in the folder, with the fields that Hugging Face reads.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from string import Template

import train_GE
import train_IMTA
from args import MAY_CHANGE_WHEN_RESUMING
from engine.checkpoint import LoadedNetwork, load_saved, save_network
from engine.report import best_within, millions, read_csv
from engine.run_directory import RunDirectory
from experiments.corruptions import accuracy_table
from experiments.markdown import markdown_table
from experiments.network_data import load_own_data
from experiments.tables import read_log
from image_data.batches import InMemoryBatches
from image_data.subsets import pixel_digests
from models import ExitNetwork
from models.files import SUFFIX, networks_in
from parsing import CommandLineParser, user_path
from utils import UserError, atomic_write

MAX_LOSS = 0.05  # points of top-1
POLICY_FILES = (".policy.json", ".reference.safetensors")
BFLOAT16_FILES = (".policy.bfloat16.json", ".reference.bfloat16.safetensors")
BUDGETS = (25.0, 50.0, 75.0)  # percent of the full network's operations
RECIPE = (
    "epochs",
    "batch_size",
    "lr",
    "lr_type",
    "warmup_epochs",
    "momentum",
    "nesterov",
    "weight_decay",
    "augment",
    "label_smoothing",
)

MODEL = """- name: {name}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: {data}, type: {data}, split: test}}
    metrics:
    - {{type: accuracy, value: {accuracy:.2f}}}"""
SECTION = """
## {name}

{title}, trained on {d.data.name} ({d.data.num_training_images} training images,
{held_out} of them held out), {d.data.image_size} x {d.data.image_size} pixels,
{classes} classes, seed {d.seed}, epoch {d.epoch}, commit {d.commit}.
Recipe: {recipe}.
{d.training[minutes]} minutes of stage {stage} on {d.training[hardware]}.
The epoch, the thresholds and the policy of each budget were selected on held-out images, nothing on test
images. The figures are in float32:

```bash
python train_{d.stage}.py --evalmode dynamic --amp off --evaluate-from weights/{name}.safetensors \\
    --data-root DIR --save OUT  # the budgets and the ensemble; then --evalmode anytime: each exit
```

| exit | operations | top-1 % | top-5 % | ensemble of exits, top-1 % |
|---|---|---|---|---|
{exits}

| mean budget, at most this % of all operations | test top-1 %, with ensembles where there are any |
|---|---|
{budgets}
{corruptions}"""
CORRUPTIONS = """
Top-1 accuracy in percent on corrupted test images, of each exit for all images, and of the policy nearest to
half of the operations, which may spend a little more than half (strength: sigma of 255 for noise, sigma in
pixels for blur, a factor for brightness, quality for JPEG). The logits were stored in half precision
(`python -m experiments.drift {name} --data-root DIR`):

{table}
"""


class Evaluator:
    """Evaluates files of a network with the program that trained it.

    Args:
        stage: ``GE`` or ``IMTA``.
        data_root: Folder of the images. If None, that of the run.
    """

    def __init__(self, stage: str, data_root: Path | None):
        self.main = {"GE": train_GE, "IMTA": train_IMTA}[stage].main
        self.data = ["--data-root", str(data_root)] if data_root else []

    def __call__(self, file: Path, folder: Path, modes: list[str], amp: str = "off") -> RunDirectory:
        """Evaluate ``file``, by default in float32, in which every machine computes; return its tables."""
        for mode in modes:
            words = ["--evaluate-from", str(file), "--evalmode", mode, "--amp", amp, "--save", str(folder)]
            if self.main([*words, *self.data]):
                raise UserError(f"{file} cannot be evaluated")
        return RunDirectory(folder)


def ship(saved: LoadedNetwork, output: Path, bfloat16: bool = False, data_root: Path | None = None) -> None:
    """Write the file, its policies and the folder's card.

    Args:
        saved: The network of a run, or of a file that was shipped before.
        output: The file.
        bfloat16: Whether to find policies in bfloat16 too, for machines that are faster in it.
        data_root: Folder of the images. If None, that of the run.

    Raises:
        UserError: The rounded network cannot be evaluated, an exit loses too much, or README.md in the
            folder of ``output`` is no model card.
    """
    readme = output.parent / "README.md"
    if readme.exists() and not readme.read_text(encoding="utf-8").startswith("---\n"):
        raise UserError(f"{readme} is no model card, which this would write there: use another folder")
    # Names are many, and of use to the run alone. Others may have the same small images in other files.
    split = saved.split._replace(name_digests=saved.split.name_digests[:0])
    held_out = load_own_data(saved, data_root, "dynamic").val
    if saved.data.name in ("cifar10", "cifar100") and isinstance(held_out, InMemoryBatches):
        split = split._replace(pixel_digests=pixel_digests(held_out.images))
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / output.name
        save_network(rounded, saved.network, saved.description, split, half=True)
        evaluated = Evaluator(saved.description.stage, data_root)
        before = evaluated(saved.path, Path(folder) / "before", ["anytime"])
        tables = evaluated(rounded, Path(folder) / "after", ["dynamic", "anytime"])
        before, after = (read_csv(run.anytime) for run in (before, tables))
        lost = [old["acc1"] - new["acc1"] for old, new in zip(before, after, strict=True)]
        if max(lost) > MAX_LOSS:
            raise UserError(
                f"in half precision exit {lost.index(max(lost)) + 1} loses {max(lost):.2f} points; "
                f"at most {MAX_LOSS} may be lost"
            )
        full = after[-1]["operations"]
        budgets = {share: best_within(read_csv(tables.ensemble), share / 100 * full) for share in BUDGETS}
        # Without ensembles of exits, which ``ExitNetwork.early_exit`` does not know.
        plain = {share: best_within(read_csv(tables.optimised), share / 100 * full) for share in BUDGETS}
        accuracy = {
            **saved.description.accuracy,
            "test_acc1": [row["acc1"] for row in after],
            "test_acc5": [row["acc5"] for row in after],
            "test_ensemble_acc1": [row["ensemble_acc1"] for row in after],
            "budgets": [share for share, row in budgets.items() if row],
            "budgets_test_acc1": [row["test_acc1"] for row in budgets.values() if row],
        }
        # Folders of this machine are of no use to others.
        recipe = {
            name: value
            for name, value in saved.description.recipe.items()
            if name not in {*MAY_CHANGE_WHEN_RESUMING, "pretrained"}
        }
        cleared = {
            "origin": None,
            "frozen_digest": None,
            "training": saved.description.training or training(RunDirectory(saved.path.parent)),
        }
        thresholds = {
            f"{share:.0f}": [row[f"threshold_{k}"] for k in range(1, len(after) + 1)]
            for share, row in plain.items()
            if row
        }
        description = replace(
            saved.description, accuracy=accuracy, recipe=recipe, thresholds=thresholds, **cleared
        )
        made = dict(zip(POLICY_FILES, (tables.policy, tables.reference), strict=True))
        if bfloat16:
            half = evaluated(rounded, Path(folder) / "bfloat16", ["dynamic"], "bf16")
            made |= zip(BFLOAT16_FILES, (half.policy, half.reference), strict=True)
        save_network(output, saved.network, description, split, half=True)
        for suffix in (*POLICY_FILES, *BFLOAT16_FILES):
            # There is no reference where held-out images are not known to be new to the network.
            if suffix in made and (made[suffix].exists() or "policy" in suffix):
                shutil.copyfile(made[suffix], output.with_suffix(suffix))
            else:  # that of an earlier network would not fit this one
                output.with_suffix(suffix).unlink(missing_ok=True)
    with atomic_write(readme) as stream:
        stream.write(card(output.parent))


def training(run: RunDirectory) -> dict[str, str | int]:
    """Return the hardware and the minutes of a run.

    Raises:
        UserError: The files of the run do not have them.
    """
    try:
        session = run.sessions()[-1]
        hardware = ", ".join(session["gpus"]) or f"{session['cores']} cores of {session['processor']}"
        return {
            "hardware": hardware,
            "minutes": round(sum(epoch["seconds"] for epoch in read_log(run.path)) / 60),
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run.run_json} and log.jsonl do not tell how {run.path} was trained: {error}"
        ) from None


def card(folder: Path) -> str:
    """Return the model card of all shipped networks in ``folder``."""
    loaded = {path.stem: load_saved(path) for path in networks_in(folder)}
    networks = {name: one.network for name, one in loaded.items()}
    data = sorted({network.description.data.name for network in networks.values()})
    models = "\n".join(
        MODEL.format(
            name=name,
            data=network.description.data.name,
            accuracy=network.description.accuracy["test_acc1"][-1],
        )
        for name, network in networks.items()
    )
    sections = "".join(_section(name, one.network, len(one.split.held_out)) for name, one in loaded.items())
    template = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    return template.substitute(
        datasets=", ".join(data),
        models=models,
        name=next(iter(networks)),
        overview=_overview(networks),
        sections=sections,
    )


def _overview(networks: dict[str, ExitNetwork]) -> str:
    """Return a table with one row per network."""
    rows = []
    for name, network in networks.items():
        accuracy = network.description.accuracy
        budgets = dict(zip(accuracy["budgets"], accuracy["budgets_test_acc1"], strict=True))
        within = [f"{budgets[share]:.2f}" if share in budgets else "" for share in BUDGETS]
        last, ensemble = accuracy["test_acc1"][-1], accuracy["test_ensemble_acc1"][-1]
        rows.append([f"[{name}](#{name})", _title(network), f"{last:.2f}", f"{ensemble:.2f}", *within])
    shares = [f"{share:.0f} % of the operations" for share in BUDGETS]
    return markdown_table(["network", "training", "last exit", "ensemble of all exits", *shares], rows)


def _title(network: ExitNetwork) -> str:
    """Return the network of stage 1 and the techniques of both stages."""
    stage_1 = network.stage_1
    parts = [stage_1.title]
    if stage_1.gradient_equilibrium:
        parts.append("GE")
    if stage_1.boosted:
        parts.append("boosted exits")
    if stage_1 is not network:
        parts += network.description.title.split(" + ")[1:]  # without "stage 2"
    return " + ".join(parts)


def _section(name: str, network: ExitNetwork, held_out: int) -> str:
    description, accuracy = network.description, network.description.accuracy
    columns = (accuracy[name] for name in ("test_acc1", "test_acc5", "test_ensemble_acc1"))
    rows = zip(description.operations, *columns, strict=True)
    budgets = zip(accuracy["budgets"], accuracy["budgets_test_acc1"], strict=True)
    corruptions = accuracy_table(name)
    return SECTION.format(
        name=name,
        title=_title(network),
        d=description,
        held_out=held_out,
        stage=2 if description.stage == "IMTA" else 1,
        classes=len(description.data.class_names),
        recipe=", ".join(f"{option.replace('_', ' ')} {description.recipe[option]}" for option in RECIPE),
        exits="\n".join(
            f"| {k} | {millions(n)} | " + " | ".join(f"{x:.2f}" for x in row) + " |"
            for k, (n, *row) in enumerate(rows, 1)
        ),
        budgets="\n".join(f"| {share:.0f} | {top1:.2f} |" for share, top1 in budgets),
        corruptions=CORRUPTIONS.format(name=name, table=corruptions) if corruptions else "",
    )


def main(argv: list[str] | None = None) -> int:
    """Ship the run these arguments name (those of the process if None) and return the exit status."""
    parser = CommandLineParser(
        prog="experiments.ship", description="Make a file for weights/ from a finished run."
    )
    parser.add_argument(
        "run",
        type=user_path,
        metavar="RUN",
        help="directory of a finished run, or a file that was shipped before",
    )
    parser.add_argument(
        "output", type=user_path, metavar="FILE", help=f"such as weights/imta_cifar100{SUFFIX}"
    )
    parser.add_argument("--bfloat16", action="store_true", help="find policies in bfloat16 too")
    parser.add_argument(
        "--data-root", type=user_path, metavar="DIR", help="of the images (default: the run's)"
    )
    arguments = parser.parse_args(argv)
    try:
        saved = load_saved(arguments.run)
        if arguments.output.suffix != SUFFIX:
            raise UserError(f"it takes a run of this project and a file ending with {SUFFIX}")
        ship(saved, arguments.output, arguments.bfloat16, arguments.data_root)
    except UserError as error:
        sys.stderr.write(f"experiments.ship: {error}\n")
        return 2
    sys.stdout.write(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
