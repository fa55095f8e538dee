"""An alarm for images that are no longer like the held-out ones, from the stream of predictions alone.

Example:
    reference = read_reference(Path("save/demo/IMTA/reference.safetensors"), curve)
    alarm = DriftAlarm(reference.scores(predictor.policy))
    for images in stream:
        if alarm.update(predictor(images).log_sum_exp):
            break                                    # alarm.fired_after images

The score of an image is the log-sum-exp of the logits of the exit that predicted it. Its conformal p-value is
the share of earlier scores, held-out ones and those of the stream, that are larger (ties are broken at
random). Bets against uniform p-values multiply a capital that starts at 1. For images like the held-out ones
it is a martingale, so it ever reaches 1 / level with a probability of at most ``level`` (Ville's inequality),
however often one looks. ``docs/promises.md`` has the method, what it cannot see, and its limits;
``experiments/drift.py`` measures false alarms and delays.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adaptive_inference.confidence import assign_exits, confidence_by_exit
from adaptive_inference.policies import Policy, PolicyCurve
from utils import UserError, atomic_write

FORMAT = "imta-msdnet reference 1"
NUM_IMAGES = 2_000
FALSE_ALARM_PROBABILITY = 0.01
BETS = np.array([-1.9, -0.95, -0.38, 0.38, 0.95, 1.9])  # b; capital stays positive for |b| < 2
SHARED = 1e-3  # part of the capital that is redistributed equally at every image
SIDE = 256  # scores have 16 bits: their counts are a table of 256 x 256


@dataclass(frozen=True)
class Reference:
    """Scores of held-out images at every exit.

    Attributes:
        log_sum_exp: Log-sum-exp of the logits of every exit, (K, N) float16.
        confidence: Confidence, which decides where an image leaves, (K, N) float32; 16 bits would move some.
        measure: Measure of confidence, as in ``Policy``.
        fingerprint: Fingerprint of the network, as in its policy curve.
        dtype: Dtype of the network, as in its policy curve.
    """

    log_sum_exp: Tensor
    confidence: Tensor
    measure: str
    fingerprint: str
    dtype: str

    def scores(self, policy: Policy) -> Tensor:
        """Return the scores (N,) of the held-out images with ``policy``.

        Raises:
            ValueError: The policy uses another measure of confidence, or another number of exits.
        """
        if (policy.measure, len(policy.thresholds)) != (self.measure, len(self.confidence)):
            raise ValueError(
                f"the policy compares the {policy.measure} of {len(policy.thresholds)} exits, "
                f"the reference holds the {self.measure} of {len(self.confidence)}"
            )
        exits = assign_exits(self.confidence, torch.tensor(policy.thresholds, dtype=torch.float64))
        return self.log_sum_exp.gather(0, exits[None])[0]


def reference_of(logits: Tensor, curve: PolicyCurve) -> Reference:
    """Return the reference of ``NUM_IMAGES`` held-out images, drawn from those with logits (K, N, C).

    Args:
        logits: Logits of the network that ``curve`` belongs to; all images are taken if there are fewer.
        curve: The policies that will be watched.
    """
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = logits[:, order[:NUM_IMAGES].sort().values].float()
    measure = curve.points[0].policy.measure
    confidence, _ = confidence_by_exit(chosen, measure)
    return Reference(chosen.logsumexp(dim=2).half(), confidence, measure, curve.fingerprint, curve.dtype)


def reference_path(policy_file: Path) -> Path:
    """Return where the reference of a policy file lies.

    It is beside the file, "reference" for the last "policy" in its name: ``NAME.reference.safetensors`` for
    ``NAME.policy.json``; and ``NAME.reference.safetensors`` for a ``NAME.json`` without it.
    """
    name = policy_file.name.removesuffix(".json")
    before, found, after = name.rpartition("policy")
    reference = f"{before}reference{after}" if found else f"{name}.reference"
    return policy_file.with_name(f"{reference}.safetensors")


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference file, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    tensors = {"log_sum_exp": reference.log_sum_exp, "confidence": reference.confidence}
    names = ("measure", "fingerprint", "dtype")
    metadata = {"format": FORMAT, **{name: getattr(reference, name) for name in names}}
    with atomic_write(path, "wb") as stream:
        stream.write(safetensors.torch.save(tensors, metadata))


def read_reference(path: Path, curve: PolicyCurve) -> Reference:
    """Read a reference file and check that it belongs to the network of ``curve``.

    Raises:
        UserError: One line: the file is missing, damaged, or of another network, dtype or measure.
    """
    try:
        with safetensors.safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise ValueError(f'its "format" is not "{FORMAT}"')
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            reference = Reference(**tensors, **metadata)
            shapes = {tuple(tensor.shape) for tensor in tensors.values()}
            if len(shapes) != 1 or not reference.confidence.isfinite().all():
                raise ValueError("its tensors do not fit together")
    except FileNotFoundError:
        raise UserError(
            f"there is no {path} with scores of held-out images; --evalmode dynamic writes it for a network "
            "whose held-out images are known to be new to it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a reference file of this project: {str(error)[:200]}") from None
    policy = curve.points[0].policy
    expected = (curve.fingerprint, curve.dtype, policy.measure, len(policy.thresholds))
    if (reference.fingerprint, reference.dtype, reference.measure, len(reference.confidence)) != expected:
        raise UserError(
            f"{path} belongs to another network, dtype or measure; --evalmode dynamic writes one for this"
        )
    return reference


class DriftAlarm:
    """A sequential test whether new images are like the held-out ones.

    Time and memory per image do not depend on the length of the stream.

    Args:
        reference: Scores (N,) of held-out images, from ``Reference.scores``.
        level: Largest probability of ever firing on images like the held-out ones.
        seed: Seed of the random order of equal scores.

    Attributes:
        num_images: Images seen so far.
        fired_after: Number of images after which the alarm fired, None while it has not.
        log_capital: Logarithm of the capital now; it fires at -log(level), and then stops.
    """

    def __init__(self, reference: Tensor, level: float = FALSE_ALARM_PROBABILITY, seed: int = 0):
        self.level, self.num_images, self.log_capital = level, 0, 0.0
        self.fired_after: int | None = None
        self._num_scores = len(reference)
        self._counts = np.bincount(_ordered(reference), minlength=SIDE**2).reshape(SIDE, SIDE)
        self._row_counts = self._counts.sum(axis=1)
        self._shares = np.full(len(BETS), 1 / len(BETS))  # of the capital, by bet
        self._random = np.random.default_rng(seed)

    def update(self, scores: Tensor) -> bool:
        """Take the scores (n,) of the next images, in their order, and return whether the alarm has fired."""
        for key in _ordered(scores).tolist():
            if self.fired_after is not None:
                break
            self.num_images += 1
            self._bet(self._p_value(*divmod(key, SIDE)))
            if self.log_capital >= -np.log(self.level):
                self.fired_after = self.num_images
        return self.fired_after is not None

    def _p_value(self, row: int, column: int) -> float:
        """Return the p-value of a score, and count it for the next ones."""
        counts = self._counts[row]
        larger = self._row_counts[row + 1 :].sum() + counts[column + 1 :].sum()
        counts[column] += 1
        self._row_counts[row] += 1
        self._num_scores += 1
        return (larger + self._random.random() * counts[column]) / self._num_scores

    def _bet(self, p: float) -> None:
        shares = self._shares * (1 + BETS * (p - 0.5))
        growth = shares.sum()
        self.log_capital += np.log(growth)
        self._shares = (1 - SHARED) * shares / growth + SHARED / len(BETS)


def _ordered(scores: Tensor) -> np.ndarray:
    """Map scores (n,) to 0 .. 65535 in the order of their float16 values; NaN counts as the smallest."""
    values = np.nan_to_num(scores.detach().cpu().to(torch.float16).numpy(), nan=-np.inf, posinf=None) + 0.0
    bits = values.view(np.uint16).astype(np.int64)
    return np.where(bits >> 15, 0xFFFF - bits, bits + 0x8000)
