"""Policy files: written after a budgeted evaluation, read to predict.

Example:
    write_policy(Path("policy.json"), find_policies(network, operations, logits, targets))
    curve = read_policy(policy_path(Path("save/demo/IMTA/best.safetensors")), network)

A policy file is JSON: fingerprint and dtype of the network it belongs to, the measure of confidence, the
operations to each exit, the temperature of each exit, the weights of an ensemble of exits, and a list of
points from cheap to full: thresholds, their results on the held-out images, and the counts from which
``promises`` bounds their loss.
"""

import json
from pathlib import Path
from typing import Any

from adaptive_inference.fingerprint import dtype_of, network_fingerprint
from adaptive_inference.policies import LossCounts, Point, Policy, PolicyCurve
from models import ExitNetwork
from utils import UserError, atomic_write

FORMAT, FORMAT_2 = "imta-msdnet policy 3", "imta-msdnet policy 2"
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_FILE_SIZE = 4 * 2**20  # bytes


def policy_path(network_file: Path, dtype: str | None = None) -> Path:
    """Return the policy file of a network file.

    ``NAME.policy.DTYPE.json`` beside ``NAME.safetensors``, or ``policy.DTYPE.json`` in its directory; where
    neither exists, the file without a dtype, and then that of another dtype.

    Args:
        network_file: The network's file.
        dtype: The dtype that is preferred, such as ``bfloat16``. If None, the file without a dtype.

    Returns:
        A file that exists, or else ``policy.json`` in the directory of the network.
    """
    preferred = [f".{dtype}"] if dtype else []
    for suffix in (*preferred, "", *(f".{name}" for name in DTYPES)):
        for name in (f"{network_file.stem}.policy{suffix}.json", f"policy{suffix}.json"):
            if (path := network_file.with_name(name)).exists():
                return path
    return network_file.with_name("policy.json")


def write_policy(path: Path, curve: PolicyCurve) -> None:
    """Write a policy file, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    policies = [point.policy for point in curve.points]
    content = {
        "format": FORMAT,
        "network": {
            "description": curve.network_description,
            "fingerprint": curve.fingerprint,
            "dtype": curve.dtype,
        },
        "measure": policies[0].measure,
        "temperatures": policies[0].temperatures,
        "ensemble": next((policy.ensemble for policy in policies if policy.ensemble), None),
        "operations": curve.operations,
        "num_images": curve.num_images,
        "certificate": curve.certificate,
        "points": [_as_row(point) for point in curve.points],
    }
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1, allow_nan=False)
        stream.write("\n")


def _as_row(point: Point) -> dict[str, Any]:
    row = {"rule": point.rule, "p": point.number, "thresholds": point.policy.thresholds}
    row |= {"val_acc1": point.val_acc1, "operations": point.operations, "shares": point.shares}
    if point.policy.ensemble is not None:
        row["uses_ensemble"] = True
    if point.losses is not None:
        row["losses"] = point.losses._asdict()
    return row


def read_policy(path: str | Path, network: ExitNetwork | None = None) -> PolicyCurve:
    """Read a policy file.

    Args:
        path: The file.
        network: The network it must belong to. If None, do not check.

    Raises:
        UserError: One line: the file is missing, too large, damaged, or of another network or dtype.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_SIZE + 1)
        if len(raw) > MAX_FILE_SIZE:
            raise ValueError(f"it is larger than {MAX_FILE_SIZE} bytes")
        curve = _parsed(json.loads(raw.decode("utf-8")))
    except FileNotFoundError:
        raise UserError(f"there is no policy file {path}; --evalmode dynamic writes one") from None
    except OSError as error:
        raise UserError(f"cannot read the policy file {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise UserError(f"{path} cannot be read as a policy file: {reason}") from None
    if network is not None:
        check_curve(curve, network, path)
    return curve


def check_curve(curve: PolicyCurve, network: ExitNetwork, source: Path) -> None:
    """Check that the curve was made for this network, its dtype and the size of its images.

    Raises:
        UserError: The curve was made for another network, dtype or size; the line names ``source``.
    """
    if (len(curve.operations), curve.fingerprint) != (network.num_exits, network_fingerprint(network)):
        raise UserError(
            f"{source} is the policy of another network ({curve.network_description}); "
            "--evalmode dynamic makes one for this network"
        )
    if network.description is not None and list(curve.operations) != network.description.operations:
        raise UserError(
            f"{source} was made for {curve.operations[-1]:,.0f} operations per image, the network has "
            f"{network.description.operations[-1]:,} with {network.description.data.image_size} pixels; "
            "--evalmode dynamic makes one for these"
        )
    if curve.dtype != dtype_of(network):
        raise UserError(
            f"{source} was made for this network in {curve.dtype}, not in {dtype_of(network)}, which "
            "rounds logits differently; --evalmode dynamic makes one for the dtype it evaluates"
        )


def _parsed(content: Any) -> PolicyCurve:
    if content["format"] == FORMAT_2:
        raise ValueError("it has format 2; python -m engine.convert FILE converts it")
    if content["format"] != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    temperatures, ensemble = content["temperatures"], content["ensemble"]
    temperatures = None if temperatures is None else _numbers(temperatures)
    ensemble = None if ensemble is None else tuple(map(_numbers, ensemble))
    points = []
    for row in content["points"]:
        weights = ensemble if row.get("uses_ensemble") else None
        policy = Policy(_numbers(row["thresholds"]), content["measure"], temperatures, weights)
        results = _numbers([row["val_acc1"], row["operations"]])
        losses = LossCounts(**row["losses"]) if "losses" in row else None
        points.append(Point(policy, *results, _numbers(row["shares"]), row["rule"], row["p"], losses))
    network = content["network"]
    return PolicyCurve(
        network["fingerprint"],
        network["dtype"],
        network["description"],
        _numbers(content["operations"]),
        tuple(points),
        content["num_images"],
        content["certificate"],
    )


def _numbers(values: Any) -> tuple[float, ...]:
    if not all(type(value) in (int, float) and -1e300 < value < 1e300 for value in values):
        raise ValueError("where numbers belong, there are others than finite ones")
    return tuple(map(float, values))


def from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a policy file of format 2 as one of format 3.

    Its points of the rule "tested" are left out: they were compared with the last exit alone, and are not
    what ``promises.risk`` certifies today.

    Raises:
        KeyError: An entry of ``content`` is missing.
    """
    network = dict(content["network"])
    network["dtype"] = network.pop("form")
    tested = [row for row in content["points"] if row["rule"] == "tested"]
    points = [dict(row) for row in content["points"] if row["rule"] != "tested"]
    for row in points:
        if row["rule"] == "ensemble":
            row["uses_ensemble"] = True
    return content | {
        "format": FORMAT,
        "network": network,
        "temperatures": content.get("temperatures"),
        "ensemble": content.get("ensemble"),
        "num_images": sum(images for images, *_ in tested[0]["losses"]) if tested else None,
        "certificate": None,
        "points": points,
    }
