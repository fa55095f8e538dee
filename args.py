"""The command line of both stages: the only place that sees strings.

``parse("GE", argv)`` gives a ``CommandLine``; its ``settings()`` are what was typed, over what a checkpoint stored, over a preset, over the
defaults. Published flag spellings stay; everything behind them is typed and named in snake_case.
"""

import argparse
import atexit
import gc
import json
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Any

from engine.run_directory import RunDirectory
from models.files import find
from models.options import NETWORK_FIELDS
from settings import COMMON, FLAGS, INHERITED, OPTIONS, PRESETS, RELEASED_CHOICES, RESUMABLE, Settings
from utils import CommandLineParser, UserError, at_least, in_range, in_words, int_list, is_folder, tell

EXAMPLES = """\
examples:
  python train_{stage}.py                                     the embedded demo, minutes on a CPU
  python train_{stage}.py --preset cifar100 --data-root data  the published CIFAR-100 settings
  python train_{stage}.py --data-root photos                  your own images: photos/train/CLASS/*.jpg, photos/test/CLASS/*.jpg
"""


# What a checkpoint stored of these says nothing about another start.
_OF_THIS_START = ("resume", "overwrite", "evalmode", "evaluate_from", "gpu")


class CommandLine:
    """A parsed command line: what was typed (``explicit``), and the settings that follow from it."""

    def __init__(self, stage: str, explicit: dict, argv: list[str]):
        self.stage, self.explicit, self.argv = stage, explicit, argv

    def __str__(self) -> str:
        return shlex.join(["python", f"train_{self.stage}.py", *self.argv])

    def settings(self, stored: dict | None = None, inherited: dict | None = None) -> Settings:
        """The settings of a run.

        Args:
            stored: those of a checkpoint to go on from or to evaluate; they take the place of the preset.
            inherited: those of the run to start from; its preset, data and network options hold here too. Stage 1 may take other data:
                then only the network's and the size of images do.

        Raises:
            UserError: a preset that is not stage 1's, another held-out split than the checkpoint's, or images that have gone.
        """
        if self.stage == "GE" and inherited and {"preset", "data"} & self.explicit.keys():
            inherited = {
                name: inherited[name] for name in (*NETWORK_FIELDS, "image_size") if name in inherited
            }
        known = stored or inherited or {}
        if (
            known.get("data", "demo") != "demo"
            and "data_root" not in self.explicit
            and not is_folder(known.get("data_root", ""))
        ):
            were = (
                f"were in {known['data_root']}" if "data_root" in known else f"are those of {known['data']}"
            )
            raise UserError(f"the images of this checkpoint {were}; say with --data-root where they are")
        for name in ("val_size", "test_size", "split_seed"):
            before = known.get(name)
            if name in known and self.explicit.get(name, before) != before:
                given = f"without {FLAGS[name]}" if before is None else f"with {FLAGS[name]} {before}"
                raise UserError(
                    f"the checkpoint's images were held out {given}, not with {self.explicit[name]}; they stay so"
                )
        if stored is not None:
            base = {name: value for name, value in stored.items() if name not in _OF_THIS_START}
        else:
            inherited = inherited or {}
            trained_with = inherited.get("preset")
            if trained_with and self.explicit.get("preset", trained_with) != trained_with:
                raise UserError(
                    f"stage 1 was trained with --preset {trained_with}, the command line says {self.explicit['preset']}"
                )
            base = self._from_preset(inherited.get("preset", Settings.preset))
            base |= {name: inherited[name] for name in INHERITED if name in inherited}
        chosen = {**base, **self.explicit}
        if "data_root" in chosen:
            chosen["data_root"] = Path(chosen["data_root"])
        return Settings(**{name: value for name, value in chosen.items() if name in OPTIONS})

    def refuse_changes(self, stored: dict) -> None:
        """A resumed run must go on as it began.

        Raises:
            UserError: names the first flag that asks for something else.
        """
        for name, value in self.explicit.items():
            before = stored.get(name)
            if name == "pretrained":  # stored as the file that was found
                is_same = str(before).startswith(str(value.resolve())) or Path(str(before)).stem == str(value)
                before = value if is_same else before
            if isinstance(before, list):  # a tuple, read from a file
                before = tuple(before)
            if name not in RESUMABLE and name in stored and before != value:
                way = f"--pretrained {self.save_directory} with a new --save starts from its weights"
                way = way if self.stage == "GE" else "use a new --save"
                raise UserError(
                    f"the run to resume has {FLAGS[name]} {before}, the command line says {value}; {way}"
                )

    @property
    def save_directory(self) -> Path:
        """--save; else a neighbour of the --pretrained run; else save/<preset>/<stage>."""
        if "save" in self.explicit:
            return self.explicit["save"]
        origin = self.explicit.get("pretrained")
        if "preset" not in self.explicit and origin is not None:
            if origin.is_dir():
                return origin.parent / self.stage
            if origin.name in ("best.safetensors", "last.pt"):
                return origin.parent.parent / self.stage
        return Path("save") / self.explicit.get("preset", Settings.preset) / self.stage

    def origin(self) -> Path | None:
        """The network to start from: --pretrained; for stage 2 else the run in the directory GE beside this one's; None from scratch.

        Raises:
            UserError, OSError: it is not there.
        """
        path = self.explicit.get("pretrained")
        if path is None and self.stage == "IMTA" and "single_stage" not in self.explicit:
            path = RunDirectory(self.save_directory.parent / "GE").best
            if not path.exists():
                raise UserError(
                    f"there is no stage-1 checkpoint {path}: run stage 1 first (train_GE.py), or name one with --pretrained"
                )
        return path and find(path)

    def refuse_early(self) -> None:
        """Raise the ``UserError`` or ``OSError`` that the run would end with, where it can be told without PyTorch."""
        run = RunDirectory(self.save_directory)
        if "evalmode" in self.explicit:
            find(self.explicit.get("evaluate_from", run.best))
        elif "resume" in self.explicit and run.holds_run():
            with suppress(
                OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
            ):  # of a damaged record
                recorded = json.loads(run.record.read_text(encoding="utf-8"))["settings"]
                # Where it started from is recorded as it was given; last.pt knows the file.
                self.refuse_changes({name: value for name, value in recorded.items() if name != "pretrained"})
        elif "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun may start a run again
            if "overwrite" not in self.explicit:
                run.refuse_second()
            self.origin()

    def _from_preset(self, preset: str) -> dict:
        chosen = PRESETS[self.explicit.get("preset", preset)]
        released = RELEASED_CHOICES if self.explicit.get("released") else {}
        share = (
            {"val_size": None} if self.explicit.get("data") == "folder" else {}
        )  # a preset does not know its number of images
        return {"preset": preset, **chosen["both"], **chosen[self.stage], **released, **share}


def parse(stage: str, argv: list[str] | None = None) -> CommandLine:
    """Parse the command line of ``stage`` ("GE" or "IMTA"); ``argv`` None reads ``sys.argv``.

    Raises:
        SystemExit: with status 2 and one line, for a flag or value that is not allowed; with status 0 after --help.
    """
    parser = build_parser(stage)
    explicit = vars(parser.parse_args(argv))
    if explicit.get("nesterov") and explicit.get("momentum") == 0:
        parser.error("--nesterov needs a --momentum above 0")
    for first, second in (
        ("resume", "overwrite"),
        ("single_stage", "pretrained"),
        ("evalmode", "resume"),
        ("evalmode", "overwrite"),
    ):
        if first in explicit and second in explicit:
            parser.error(f"{FLAGS[first]} and {FLAGS[second]} do not go together")
    if "evaluate_from" in explicit and "evalmode" not in explicit:
        parser.error("--evaluate-from needs --evalmode (anytime, dynamic or runtime)")
    if stage == "GE" and "pretrained" in explicit and "save" not in explicit:
        parser.error("--pretrained needs --save, the directory of the new run")
    has_origin = (
        stage == "IMTA" and "single_stage" not in explicit and bool({"pretrained", "save"} & explicit.keys())
    )
    goes_on = {"resume", "evalmode"} & explicit.keys() or has_origin
    if "data_root" in explicit and not {"data", "preset"} & explicit.keys() and not goes_on:
        explicit["data"] = "folder"
    if "preset" not in explicit and explicit.get("data") in PRESETS and not has_origin:
        explicit["preset"] = explicit["data"]  # not the demo's small network
    return CommandLine(stage, explicit, sys.argv[1:] if argv is None else argv)


def announce(stage: str) -> None:
    """Read the process's command line, as ``parse``, and say at once what begins, or what is wrong: PyTorch takes seconds to load."""
    atexit.register(gc.freeze)  # a last search for garbage in all of PyTorch would take seconds, too
    command = parse(stage)
    try:
        command.refuse_early()
    except (UserError, OSError) as error:
        sys.stderr.write(f"train_{stage}.py: {in_words(error)}\n")
        sys.exit(2)
    if int(os.environ.get("RANK", "0")) == 0:
        preset = command.explicit.get("preset")
        what = f"preset {preset}, training into" if preset else "training into"
        where = command.save_directory
        if "evalmode" in command.explicit:
            what, where = "evaluating", command.explicit.get("evaluate_from", where)
        tell(f"train_{stage}.py: {what} {where}; loading PyTorch")


def build_parser(stage: str) -> argparse.ArgumentParser:
    """The parser of ``stage`` ("GE" or "IMTA"); it leaves out what was not typed."""
    purpose = {
        "GE": "Stage 1: train an MSDNet, by default with Gradient Equilibrium.",
        "IMTA": "Stage 2: train new classifiers with ISC and One-for-all distillation on a stage-1 network.",
    }[stage]
    parser = CommandLineParser(
        prog=f"train_{stage}.py",
        usage="%(prog)s [flags]",
        description=f"{purpose}\n\n{EXAMPLES.format(stage=stage)}\nDefaults shown are those of --preset demo.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    demo = {**PRESETS["demo"]["both"], **PRESETS["demo"][stage]}
    described = sorted(
        OPTIONS.values(), key=lambda o: (o.metadata.get("group") != COMMON, o.name in NETWORK_FIELDS)
    )
    groups: dict[str, Any] = {}
    for choice in described:
        known = choice.metadata
        if known.get("stage", stage) != stage:
            continue
        title = known.get("group", "network" if choice.name in NETWORK_FIELDS else "run")
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        default = known.get("shown") or _shown(demo.get(choice.name, choice.default))
        text = f"{known['help']} (default: {default})".replace("%", "%%")
        group.add_argument(
            known["flag"], *known.get("aliases", ()), dest=choice.name, help=text, **_rules(choice)
        )
    return parser


def as_typed(name: str, value: Any) -> Any:
    """A setting that a file holds in plain types, as its flag would give it.

    Raises:
        UserError: the flag would refuse it.
    """
    rules, separator = _rules(OPTIONS[name]), "," if "kind" in OPTIONS[name].metadata else "-"
    if (value is None and OPTIONS[name].default is None) or (isinstance(value, bool) and "action" in rules):
        return value
    try:
        typed = rules.get("type", bool)(
            separator.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        )
    except argparse.ArgumentTypeError:
        typed = None
    if typed is None or "action" in rules or typed not in rules.get("choices", [typed]):
        raise UserError(f"the checkpoint was made with {FLAGS[name]} {value!a:.60}, which is not allowed")
    return typed


def _rules(choice: Field) -> dict[str, Any]:
    """What ``argparse`` must know to read an option."""
    known = choice.metadata
    if isinstance(choice.default, bool) or choice.name == "small_inputs":
        return {"action": "store_true" if known.get("switch") else argparse.BooleanOptionalAction}
    choices = list(PRESETS) if choice.name == "preset" else known.get("choices")
    rules = {name: known[name] for name in ("nargs", "const", "metavar") if name in known}
    if choices:
        return {"choices": choices, "type": str.lower, **rules}
    default_kinds = {int: (at_least(1), "N"), float: (in_range(0, 1), "R"), tuple: (int_list("-"), "1-2-4")}
    kind, metavar = default_kinds.get(type(choice.default), (None, "N"))
    return {"metavar": metavar, **rules, "type": known.get("kind") or kind}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
