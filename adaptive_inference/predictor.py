"""Early exit for real: answered images leave the batch, and later blocks run on the others only, or not at all.

    predictor = AdaptivePredictor(network, Policy((0.9, 0.8, -1e8), "softmax"))
    prediction = predictor(images)                       # (N, 3, H, W)
    prediction.classes, prediction.confidence, prediction.exits   # (N,) each

Answers are those of the simulation (``simulate``): an image leaves at the first exit whose confidence reaches that exit's threshold.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adaptive_inference.budgeted import assign_exits
from adaptive_inference.policies import Answer, Policy, confidence_by_exit, next_answer
from models.stepwise import Stepwise


class Prediction(NamedTuple):
    """Answers to N images, on the device of the images: ``classes`` (N,) int64, ``confidence`` (N,) in the policy's measure, at the exit
    that answered, and ``exits`` (N,) int64, 0-based."""

    classes: Tensor
    confidence: Tensor
    exits: Tensor


class Run(Protocol):
    """A pass over the exits: ``models.Stepwise`` or its counterpart on ONNX Runtime."""

    def next_logits(self) -> Tensor: ...

    def keep(self, images: Tensor) -> None: ...


class AdaptivePredictor:
    """Classify batches with a network that stops as early as a policy allows.

    Args:
        network: ``MSDNet`` or ``IMTA`` in evaluation mode (best in its ``inference_form``), or an ``export.OnnxNetwork``.
        policy: thresholds and confidence measure.
        lazy: as for ``models.Stepwise``. An ``OnnxNetwork`` computes as it was exported.

    Raises:
        ValueError: the policy has not one threshold an exit.
    """

    def __init__(self, network: nn.Module, policy: Policy, lazy: bool = True):
        if len(policy.thresholds) != network.num_exits:
            raise ValueError(f"the policy has {len(policy.thresholds)} thresholds, the network {network.num_exits} exits")
        self.network, self.policy, self.lazy = network, policy, lazy

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Answer images (N, 3, H, W), normalised as in training.

        The host waits for the device at most once a block, to learn how many images go on; when none does, nothing more is launched.
        """
        if len(images) == 0:
            none = torch.empty(0, dtype=torch.int64, device=images.device)
            return Prediction(none, torch.empty(0, device=images.device), none)
        run = self.network.begin(images) if hasattr(self.network, "begin") else Stepwise(self.network, images, self.lazy)
        measure, thresholds = self.policy.confidence, self.policy.thresholds
        last = len(thresholds) - 1
        here: Tensor | None = None  # indices of the images still in the batch, None for all
        answer: Answer | None = None
        classes = confidence = exits = None
        for k, threshold in enumerate(thresholds):
            answer = next_answer(measure, run.next_logits(), answer)
            # Every present image is answered; a later exit overrules. That needs no list of those that leave.
            if here is None:
                classes, confidence = answer
            else:
                classes[here], confidence[here], exits[here] = answer.classes, answer.confidence, k
            if k == last:
                break
            leaves = answer.confidence >= threshold
            if len(leaves) == 1:
                if leaves.item():
                    break
                continue
            going_on = leaves.logical_not().nonzero().flatten()  # the one wait of this block
            if len(going_on) == 0:
                break
            if len(going_on) < len(leaves):
                run.keep(going_on)
                if here is None:
                    exits = torch.full_like(classes, k)
                here = going_on if here is None else here[going_on]
                answer = Answer(answer.classes[going_on], answer.confidence[going_on])
        return Prediction(classes, confidence, torch.full_like(classes, k) if exits is None else exits)


def simulate(logits: Tensor, policy: Policy) -> Prediction:
    """What the predictor answers, from the logits (K, N, C) of every exit."""
    confidence, classes = confidence_by_exit(logits, policy.confidence)
    exits = assign_exits(confidence, torch.tensor(policy.thresholds, dtype=torch.float64))
    return Prediction(classes.gather(0, exits[None])[0], confidence.gather(0, exits[None])[0], exits)
