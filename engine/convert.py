"""Convert released checkpoints, and files of this project's format 2, to today's files.

    python -m engine.convert save/cifar100/GE                                    # a finished run, in place
    python -m engine.convert old.safetensors new.safetensors
    python -m engine.convert msdnet-step=4.pth.tar imagenet.safetensors --classes names.txt

An unfinished training is finished with the code it began with.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptive_inference.policy_files import FORMAT as POLICY_FORMAT
from adaptive_inference.policy_files import from_format_2
from args import add_msdnet_sizes
from engine.checkpoint import FORMAT as RUN_FORMAT
from engine.checkpoint import save_checkpoint, save_network
from engine.run_directory import RunDirectory
from image_data.defaults import NORMALIZATION, default_crop_share
from image_data.folders import FolderScan, text_of
from models import count_operations, load_released
from models.description import DataInfo, Description, Split
from models.files import SUFFIX, is_network_file
from models.network import to_config
from models.options import MSDNET_FIELDS
from models.pytorch_files import STATE_DICTS, read_checkpoint
from models.released import PUBLISHED_NAMES
from models.saved import FORMAT, network_from_tensors, read_safetensors, tensor_bytes
from parsing import CommandLineParser, at_least, user_path
from utils import UserError, atomic_write, error_message, one_line, print_error, print_line

OLD_NETWORK, OLD_RUN, OLD_POLICY = (f"imta-msdnet {kind} 2" for kind in ("network", "run", "policy"))
DATA_OF_CLASSES = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


def main(argv: list[str] | None = None) -> int:
    """Convert what these arguments name (those of the process if None) and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        for line in convert(arguments):
            print_line(one_line(line))
    except (UserError, OSError, ValueError) as error:
        text = one_line(str(error)) if isinstance(error, ValueError) else error_message(error)
        print_error(f"engine.convert: {text}")
        return 2
    return 0


def convert(arguments: argparse.Namespace) -> Iterator[str]:
    """Convert the file or the run that ``arguments.input`` names; yield a line about each file.

    Raises:
        UserError, OSError, ValueError: One line: a file is missing, damaged or of another kind, or --classes
            is missing.
    """
    path, output = arguments.input, arguments.output
    if path.is_dir():
        yield from _convert_run(RunDirectory(path), RunDirectory(output or path))
    elif path.suffix == ".json":
        yield _convert_policy(path, output or path)
    elif is_network_file(path):
        yield _convert_network(path, output or path)
    else:
        checkpoint = read_checkpoint(path)
        if str(checkpoint.get("format")).startswith("imta-msdnet run"):
            yield _convert_last(path, output or path)
        else:
            output = output or path.with_name(_stem(path) + SUFFIX)
            yield _convert_released(checkpoint, path, output, arguments)


def _convert_run(old: RunDirectory, new: RunDirectory) -> Iterator[str]:
    """Convert the files of a run, and copy the others where the folder is a new one."""
    if not old.best.exists():
        raise UserError(f"{old.path} holds no {old.best.name}: it is not a run of this project")
    yield _convert_network(old.best, new.best)
    if old.policy.exists():
        yield _convert_policy(old.policy, new.policy)
    if old.last.exists():
        try:
            yield _convert_last(old.last, new.last)
        except (UserError, ValueError) as error:
            yield f"left alone: {error}"
    if old.path.resolve() != new.path.resolve():
        for path in old.files:
            if path not in (old.best, old.policy, old.last) and path.exists():
                shutil.copyfile(path, new.path / path.name)


def _copy(path: Path, output: Path) -> str:
    """Copy a file of today's format, where the output is another file."""
    if path.resolve() == output.resolve():
        return f"{path} is of today's format already"
    with atomic_write(output, "wb") as stream:
        stream.write(path.read_bytes())
    return f"{path} is of today's format already: {output} is a copy"


def _convert_network(path: Path, output: Path) -> str:
    tensors, header = read_safetensors(path)
    if header.get("format") == FORMAT:
        return _copy(path, output)
    if header.get("format") != OLD_NETWORK:
        raise UserError(
            f"{path} is not a network of this project: its format is {header.get('format')!a:.80}"
        )
    try:
        description = _from_format_2(json.loads(header["description"]))
        network_from_tensors(tensors, description)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or made by another program: {error}") from None
    with atomic_write(output, "wb") as stream:
        stream.write(tensor_bytes(tensors, description))
    return f"network: {output}"


def _convert_policy(path: Path, output: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == POLICY_FORMAT:
            return _copy(path, output)
        if content["format"] != OLD_POLICY:
            raise ValueError(f"its format is {content['format']!a:.80}")
        content = from_format_2(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a policy file of this project: {type(error).__name__} {error}"
        ) from None
    with atomic_write(output) as stream:
        json.dump(content, stream, indent=1, allow_nan=False)
        stream.write("\n")
    return f"policies: {output}"


def _convert_last(path: Path, output: Path) -> str:
    state = dict(read_checkpoint(path))
    if state.get("format") == RUN_FORMAT:
        return _copy(path, output)
    if state.get("format") != OLD_RUN:
        raise UserError(f"{path} is not a run of this project: its format is {state.get('format')!a:.80}")
    try:
        description = _from_format_2(state["description"])
        is_finished = state["epoch"] >= description.recipe["epochs"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if not is_finished:
        raise UserError(f"{path}: an unfinished training is finished with the code it began with")
    save_checkpoint(output, {**state, "description": asdict(description)})
    return f"finished run: {output}"


def _convert_released(checkpoint: Mapping, path: Path, output: Path, arguments: argparse.Namespace) -> str:
    flags = {
        flag: getattr(arguments, option)
        for flag, option in PUBLISHED_NAMES.items()
        if hasattr(arguments, option)
    }
    network = load_released(path, gradient_equilibrium=arguments.gradient_equilibrium, **flags)
    if arguments.classes is None:
        raise UserError(
            f"{path} is a checkpoint of the released code, which stores no class names: "
            "give --classes FILE, one name a line, or the folder that holds a folder for each class"
        )
    options = network.stage_1.config
    name = arguments.data or _data_name(network.num_classes, options["small_inputs"])
    image_size = arguments.image_size or (32 if options["small_inputs"] else 224)
    mean, std = NORMALIZATION.get(name, NORMALIZATION["imagenet"])
    data = _data_info(
        name=name,
        class_names=read_class_names(arguments.classes, network.num_classes),
        image_size=image_size,
        mean=list(mean),
        std=list(std),
        num_training_images=0,
        fingerprint="",
    )
    description = Description(
        network=to_config(network),
        data=data,
        operations=count_operations(network, image_size),
        stage="GE" if network.stage_1 is network else "IMTA",
        title=_stem(path),
        recipe={"preset": name, "data": name, **{o: options[o] for o in MSDNET_FIELDS if o in options}},
        seed=None,
        commit=None,
    )
    save_network(output, network, description, Split.unknown())
    found = [key for key in STATE_DICTS if isinstance(checkpoint.get(key), Mapping)]
    averages = [key for key in checkpoint if "ema" in str(key).lower() or "average" in str(key).lower()]
    others = [key for key in averages if key not in found[:1]]
    taken = f", from {found[0]!r}, not from {others[0]!r}" if found and others else ""
    return f"network: {output}{taken}"


def _data_name(num_classes: int, small_inputs: bool) -> str:
    """Return the published data set with so many classes and such images, else ``folder``."""
    name = DATA_OF_CLASSES.get(num_classes, "folder")
    return name if small_inputs == (name in ("cifar10", "cifar100")) else "folder"


def read_class_names(path: Path, count: int) -> list[str]:
    """Read the names of ``count`` classes from a file, one name a line, or from the folders in a folder.

    Two classes may have the same name; a byte order mark is no part of a name.

    Raises:
        UserError: The file cannot be read, or holds another number of names.
    """
    if path.is_dir():
        names = sorted(map(text_of, FolderScan().inner_folders(path)))
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--classes {path} cannot be read: {reason}") from None
        names = [line.strip() for line in lines if line.strip()]
    if len(names) != count:
        raise UserError(f"--classes {path} holds {len(names)} names, the network knows {count} classes")
    return names


def _from_format_2(values: dict[str, Any]) -> Description:
    values = dict(values)
    preprocessing = {name: values.pop(name) for name in ("class_names", "image_size", "mean", "std")}
    data = _data_info(**values["data"], **preprocessing)
    return Description.from_dict({**values, "data": asdict(data)})


def _data_info(*, image_size: int, **values: Any) -> DataInfo:
    crop_share = default_crop_share(image_size)
    return DataInfo(image_size=image_size, crop_share=crop_share, interpolation="bilinear", **values)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".tar").rsplit(".", 1)[0]


def _parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="engine.convert",
        usage="python -m engine.convert INPUT [OUTPUT] [flags]",
        description="Convert a released checkpoint, or a file or run of this project's format 2, to today's "
        "files. "
        "An unfinished training is finished with the code it began with.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "input",
        type=user_path,
        metavar="INPUT",
        help="checkpoint, network, policy file or directory of a run",
    )
    add(
        "output",
        type=user_path,
        metavar="OUTPUT",
        nargs="?",
        help="default: in place; of a released checkpoint: NAME.safetensors beside it",
    )
    released = parser.add_argument_group("released checkpoints, which store no more than weights")
    add = released.add_argument
    add(
        "--classes",
        type=user_path,
        metavar="FILE",
        help="names of the classes, one a line, or a folder with a folder for each class",
    )
    add("--image-size", type=at_least(1), metavar="PIXELS", help="default: 32 or 224, by its layers")
    add(
        "--data",
        choices=[*NORMALIZATION, "folder"],
        type=str.lower,
        help="data set, for the normalisation (default: by the number of classes)",
    )
    add(
        "--GE",
        dest="gradient_equilibrium",
        action=argparse.BooleanOptionalAction,
        help="default: as the file says",
    )
    network = parser.add_argument_group(
        "networks of other sizes than the published ones", argument_default=argparse.SUPPRESS
    )
    add_msdnet_sizes(network.add_argument)
    return parser


if __name__ == "__main__":
    sys.exit(main())
