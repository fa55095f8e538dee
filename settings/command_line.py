"""From a command line to the settings of a run.

Example:
    command = parse("GE", ["--preset", "cifar100", "--lr", "0.2"])
    command.typed                  # {"preset": "cifar100", "lr": 0.2}
    settings = command.settings()  # every setting of the run

*Settings* are what a run uses, an ``argparse.Namespace`` that nothing changes afterwards. A *recipe* is the
settings that a network was trained with, from its file (``Description.recipe``).
"""

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from args import (
    ADAMW_LR,
    DEFAULTS,
    INHERITED,
    LAUNCH_ONLY,
    MAY_CHANGE_WHEN_EVALUATING,
    MAY_CHANGE_WHEN_RESUMING,
    OWN_NETWORKS,
    SETTINGS,
    STAGES,
    StageSpec,
    all_option_names,
    build_parser,
    flag_of,
    option_names,
)
from models import ExitNetwork
from models.files import BEST, WEIGHTS, shipped_networks
from models.options import current_value
from models.third_party import TIMM_PREFIX
from presets import PRESETS, RELEASED_CHOICES
from settings.conflicts import (
    conflict_of_flags,
    conflict_of_new_training,
    conflict_of_settings,
    conflict_with_arch,
)
from utils import UserError, is_folder


def parse(stage: str, argv: list[str] | None = None) -> "CommandLine":
    """Parse the command line of a stage.

    Args:
        stage: ``GE`` or ``IMTA``, a key of ``args.STAGES``.
        argv: The words after the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: With status 2 and one line, for a flag or value that is not allowed; with status 0 after
            --help.
    """
    parser = build_parser(stage)
    typed = vars(parser.parse_args(argv))
    if conflict := conflict_of_flags(typed, stage):
        parser.error(conflict)
    return CommandLine(STAGES[stage], typed, sys.argv[1:] if argv is None else argv)


class CommandLine:
    """A parsed command line.

    Four sources have values of settings. The first one that has a value counts:

    1. what was typed, and ``implied`` where no recipe says it;
    2. the recipe of the run to resume or of the network to evaluate; of a network to start from only its
       architecture and ``args.INHERITED``;
    3. for a new run, its preset;
    4. ``args.DEFAULTS``.

    Attributes:
        spec: The stage that the program trains.
        typed: Values of the flags that were typed.
        implied: The data set of --data-root and the preset of a data set, where they follow from what was
            typed.
        argv: The words of the command line.
    """

    def __init__(self, spec: StageSpec, typed: dict[str, Any], argv: list[str]):
        self.spec, self.typed, self.argv = spec, typed, argv
        self.implied = _implied_by(typed)

    def __str__(self) -> str:
        return shlex.join(["python", self.spec.program, *self.argv])

    def to_resume(self, launcher: str = "python") -> str:
        """Return the whole command that resumes this run, with ``launcher`` in front of the program."""
        words = [word for word in self.argv if word not in ("--overwrite", "--resume")]
        return f"{launcher} {shlex.join([self.spec.program, *words, '--resume'])}"

    def settings(
        self, recipe: dict[str, Any] | None = None, origin_recipe: dict[str, Any] | None = None
    ) -> Namespace:
        """Return every setting of a run, from the sources that the class names.

        Args:
            recipe: Of the run to resume or the network to evaluate.
            origin_recipe: Of the network that a new run starts from. Where stage 1 takes other data, only the
                network's options and the image size count.

        Raises:
            UserError: A flag that the network or the other settings have no use for, a preset that is not
                stage 1's, a held-out split that is not the recipe's, images that are gone, or --arch together
                with a run that has its own.
        """
        is_new = recipe is None
        if is_new:
            self._check_weights_of_library()
            typed = self._typed_for_new_run(origin_recipe)
            kept = self._from_origin(typed, origin_recipe or {})
        else:
            typed = self._typed_without_auto()
            kept = {name: recipe[name] for name in recipe.keys() & DEFAULTS.keys() - LAUNCH_ONLY}
        self._check_images_are_there(kept, is_new)
        self._check_split(kept)
        if is_new:
            preset = self._preset(typed, kept)
        else:  # a converted network does not know how many images were held out
            name = typed.get("preset", kept.get("preset", DEFAULTS["preset"]))
            val_size = PRESETS.get(name, {"both": {}})["both"].get("val_size")
            preset = {"val_size": None if typed.get("data") == "folder" else val_size}
        values = DEFAULTS | preset | kept | typed
        conflict = conflict_of_settings(self.typed, values)
        if is_new:
            conflict = conflict or conflict_of_new_training(self.typed, values)
        if conflict:
            raise UserError(conflict)
        return Namespace(**_complete(values))

    def _typed_without_auto(self) -> dict[str, Any]:
        """Return the typed values except "auto": where there is a recipe, "auto" means its value."""
        return {name: value for name, value in self.typed.items() if value != "auto"}

    def _typed_for_new_run(self, origin_recipe: dict[str, Any] | None) -> dict[str, Any]:
        """Return what was typed for a new run, and what follows from it unless data are inherited."""
        are_inherited = origin_recipe is not None and self.spec.inherits_data
        return self.typed if are_inherited else {**self.implied, **self.typed}

    def _from_origin(self, typed: dict[str, Any], origin_recipe: dict[str, Any]) -> dict[str, Any]:
        """Return what a new run takes from the recipe of the network that it starts from."""
        names = {"arch", *option_names(_arch(origin_recipe))}
        takes_other_data = not self.spec.inherits_data and ("preset" in typed or "data" in typed)
        names |= {"image_size"} if takes_other_data else INHERITED
        return {name: value for name, value in origin_recipe.items() if name in names}

    def _preset(self, typed: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a new run's preset, as --released, --optimizer and --data change it."""
        trained_with = kept.get("preset")
        preset = typed.get("preset", trained_with or DEFAULTS["preset"])
        if preset not in PRESETS:
            raise UserError(
                f"stage 1 was trained with --preset {preset}, which is unknown here: pass --preset"
            )
        if trained_with in PRESETS and trained_with != preset:
            raise UserError(
                f"stage 1 was trained with --preset {trained_with}, the command line says {preset}"
            )
        values = {"preset": preset, **PRESETS[preset]["both"], **PRESETS[preset][self.spec.name]}
        if typed.get("released"):
            makes_network = self.spec.is_first or typed.get("single_stage")
            if makes_network and _arch(typed) not in OWN_NETWORKS:
                raise UserError(f"--released is for --arch msdnet, not for --arch {_arch(typed)}")
            values |= RELEASED_CHOICES
        if typed.get("optimizer") == "adamw":
            values["lr"] = ADAMW_LR
        if typed.get("data") == "folder":  # a preset does not know its number of images
            values["val_size"] = None
        if "warmup_epochs" in values:  # a shorter training reaches its learning rate too
            epochs = typed.get("epochs", values["epochs"])
            values["warmup_epochs"] = min(values["warmup_epochs"], epochs / 2)
        return values

    def _check_images_are_there(self, kept: dict[str, Any], is_new: bool) -> None:
        if kept.get("data", "demo") == "demo" or "data_root" in self.typed:
            return
        root = kept.get("data_root")
        if root is None or not is_folder(root):
            were = f"are those of {kept['data']}" if root is None else f"were in {root}"
            # In a new run of stage 1, --data-root alone would imply --data folder.
            data = f"--data {kept['data']} " if is_new and not self.spec.inherits_data else ""
            raise UserError(f"the images of this checkpoint {were}; pass {data}--data-root DIR")

    def _check_weights_of_library(self) -> None:
        """Raise ``UserError`` if --arch is given together with a run of this project."""
        path = self.typed.get("pretrained")
        if path is not None and self.pretrained_run is None and (path / BEST).is_file():
            raise UserError(f"{path} is a run, which knows its network: leave out --arch")

    def _check_split(self, kept: dict[str, Any]) -> None:
        for name in ("val_size", "test_size", "split_seed"):
            before = kept.get(name)
            if name in kept and self.typed.get(name, before) != before:
                given = f"without {flag_of(name)}" if before is None else f"with {flag_of(name)} {before}"
                raise UserError(
                    f"the checkpoint's images were held out {given}, "
                    f"not with {self.typed[name]}; the split cannot change"
                )

    def refuse_changes(self, recipe: dict[str, Any], origin: str | None = None) -> None:
        """Check that nothing was typed that the run to resume, or the network to evaluate, cannot follow.

        Args:
            recipe: Of the run or network.
            origin: The file that it was started from, which --pretrained may name in other words.

        Raises:
            UserError: The first flag that asks for something else.
        """
        recipe = settings_from_recipe(recipe)
        if conflict := conflict_with_arch(self.typed, _arch(recipe)):
            raise UserError(conflict)
        if "evalmode" in self.typed:  # ``refuse_other_network`` compares the network's options
            may_differ = {*MAY_CHANGE_WHEN_EVALUATING, *all_option_names()}
            what, way = "network to evaluate", "--evalmode trains nothing"
        else:
            may_differ, what, way = MAY_CHANGE_WHEN_RESUMING, "run to resume", "use a new --save"
            if self.spec.is_first:
                way = f"--pretrained {self.save_directory} with a new --save starts from its weights"
        for name, value in self._typed_without_auto().items():
            # A released network has no recipe. Its training command, with --evalmode added, evaluates it.
            is_unknown = "evalmode" in self.typed and name not in recipe
            if name in may_differ or is_unknown:
                continue
            before = recipe.get(name, DEFAULTS[name])  # older recipes lack newer settings
            is_same = before == (str(value) if isinstance(value, Path) else value)  # recipes hold text
            if name == "pretrained":
                is_same = is_same or any(_is_same_origin(path, value) for path in (before, origin))
                before = before or origin
            if not is_same:
                raise UserError(
                    f"the {what} has {flag_of(name)} {before}, the command line says {value}; {way}"
                )

    def refuse_other_network(self, path: Path, network: ExitNetwork) -> None:
        """Check that flags of the network, as far as any were typed, describe the one in a file.

        Args:
            path: The file, for the message.
            network: The network in it.

        Raises:
            UserError: The first flag that asks for something else.
        """
        own = settings_of_network(network)
        for name in sorted(self.typed.keys() & {"arch", *all_option_names()}):
            value = self.typed[name]
            if name not in own:
                raise UserError(f"{path} has no {flag_of(name)}: it is {network.stage_1.kind}")
            is_number_of_exits = name == "exits" and value == network.num_exits
            if not is_number_of_exits and own[name] != (list(value) if isinstance(value, tuple) else value):
                raise UserError(f"{path} has {flag_of(name)} {own[name]}, the command line says {value}")
        if "pretrained_lr_factor" in self.typed and not any(True for _ in network.pretrained_parameters()):
            raise UserError(f"{path} has no pretrained parameters for --pretrained-lr-factor")

    @property
    def pretrained_run(self) -> Path | None:
        """The run or file of this project that --pretrained names; None for weights of a library."""
        is_own = not self.spec.is_first or _arch(self.typed) in OWN_NETWORKS
        return self.typed.get("pretrained") if is_own else None

    @property
    def save_directory(self) -> Path:
        """Directory of the run.

        ====================================== =================================================
        typed                                  directory
        ====================================== =================================================
        ``--save DIR``                         DIR
        a preset, or no ``--pretrained``       save/PRESET/STAGE
        weights of a library                   save/ARCH/STAGE
        ``--pretrained`` run, stage 1          RUN_2
        ``--pretrained`` run, stage 2          IMTA beside the run
        ``--pretrained`` file or name          save/NAME/STAGE
        ====================================== =================================================

        The preset of a data set counts as typed, but for stage 2 on a network that --pretrained names.
        """
        pretrained, spec = self.typed.get("pretrained"), self.spec
        if "save" in self.typed:
            return _with_name(self.typed["save"])
        implied = {} if spec.inherits_data and pretrained is not None else self.implied
        preset = self.typed.get("preset", implied.get("preset"))
        if preset is not None or pretrained is None:
            return Path("save") / (preset or DEFAULTS["preset"]) / spec.name
        if self.pretrained_run is None:
            return Path("save") / _arch(self.typed).split("/")[-1] / spec.name
        # A folder with the name of a shipped network is a run only if it holds a network, as for ``find``.
        is_run = (pretrained / BEST).is_file()
        is_run = is_run or (pretrained.is_dir() and str(pretrained) not in shipped_networks())
        if is_run or pretrained.name in (BEST, "last.pt"):
            run = _with_name(pretrained if is_run else pretrained.parent)
            return run.parent / (f"{run.name}_2" if spec.is_first else spec.name)
        return Path("save") / pretrained.name.split(".")[0] / spec.name


def settings_from_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings in types and values of today's flags; files hold lists for tuples."""
    settings = {name: value for name, value in recipe.items() if name in DEFAULTS}
    return {
        name: tuple(value) if isinstance(value, list) else current_value(name, value)
        for name, value in settings.items()
    }


def recipe_of(network: ExitNetwork) -> dict[str, Any]:
    """Return the settings that a network was trained with.

    The network itself says which network and image size it is.
    """
    description = network.description
    own = {**settings_of_network(network), "image_size": description.data.image_size}
    return settings_from_recipe({**description.recipe, **own})


def settings_of_network(network: ExitNetwork) -> dict[str, Any]:
    """Return --arch and the options of the network that stage 1 trained, as far as ``args`` knows them."""
    stage_1 = network.stage_1
    archs = [arch for arch, own in OWN_NETWORKS.items() if own.kind == stage_1.kind]
    prefix = TIMM_PREFIX if stage_1.config.get("library") == "timm" else ""
    arch = archs[0] if archs else prefix + stage_1.config.get("name", stage_1.kind)
    options = {name: stage_1.config[name] for name in option_names(arch) if name in stage_1.config}
    return {"arch": arch, **options}


def _arch(settings: dict[str, Any]) -> str:
    return settings.get("arch", DEFAULTS["arch"])


def _with_name(folder: Path) -> Path:
    """Return the same folder by a path that ends in its name, which ``.`` and ``..`` do not."""
    return folder if folder.name not in ("", "..") else folder.resolve()


def _implied_by(typed: dict[str, Any]) -> dict[str, Any]:
    """Return the data set and the preset that follow from --data-root and --data."""
    implied = {}
    if "data_root" in typed and not {"data", "preset"} & typed.keys():
        implied["data"] = "folder"
    data = typed.get("data", implied.get("data"))
    if "preset" not in typed and data in PRESETS:
        implied["preset"] = "finetune" if "pretrained" in typed and data == "folder" else data
    return implied


def _is_same_origin(recorded: str | Path | None, typed: Path) -> bool:
    """Return True if --pretrained names the recorded file, its run, or its name in ``weights/``."""
    if recorded is None:
        return False
    path = Path(recorded).resolve()
    is_name = path.parent.name == WEIGHTS.name and str(typed) == path.stem  # of any clone
    return is_name or typed.resolve() in (path, path.parent)


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those that depend on others, without options of other kinds of networks."""
    values = {**values, "data_root": Path(values["data_root"])}
    for name, setting in SETTINGS.items():
        if values[name] is None and setting.default_from is not None:
            values[name] = setting.default_from(values)
    if values["pretrained"] is None:
        values["pretrained_lr_factor"] = 1.0
    others = all_option_names() - {*option_names(values["arch"])}
    return {name: value for name, value in values.items() if name not in others}
