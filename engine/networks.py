"""The network that stage 1 trains: a new one, or that of a checkpoint with its weights."""

from argparse import Namespace

from args import OWN_NETWORKS, option_names
from engine.checkpoint import LoadedNetwork
from image_data.defaults import default_crop_share
from models import ExitNetwork, build_backbone
from models.description import DataInfo, ImageSpec
from models.module_state import load_tensors
from models.third_party import image_spec_of_weights
from utils import UserError


def new_network(settings: Namespace, data: DataInfo) -> ExitNetwork:
    """Build the network of --arch for the classes of a data set.

    Raises:
        UserError: The combination of options is impossible, or the pretrained weights cannot be loaded.
    """
    num_classes = len(data.class_names)
    try:
        if own := OWN_NETWORKS.get(settings.arch):
            options = {name: getattr(settings, name) for name in option_names(settings.arch)}
            return ExitNetwork.kinds[own.kind](num_classes=num_classes, **options)
        return build_backbone(
            settings.arch,
            settings.exits,
            num_classes,
            pretrained=settings.pretrained and str(settings.pretrained),
            image_size=data.image_size,
            gradient_equilibrium=settings.gradient_equilibrium,
            boosted_exits=settings.boosted_exits,
        )
    except OSError as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"impossible network: {error}") from None


def expected_images(settings: Namespace, origin: LoadedNetwork | None) -> ImageSpec | None:
    """Return the images that the network to train expects: ``origin``, or a new one of --arch.

    Returns:
        None if it takes images of any preprocessing, as a new network of ``OWN_NETWORKS`` does.

    Raises:
        UserError: There is no network of that name.
    """
    if origin is not None:
        spec = origin.data.image_spec
    elif settings.arch in OWN_NETWORKS:
        return None
    else:
        try:
            spec = image_spec_of_weights(settings.arch, settings.pretrained and str(settings.pretrained))
        except ValueError as error:
            raise UserError(f"--arch {settings.arch}: {error}") from None
    if settings.image_size in (None, spec.image_size):
        return spec
    # The central crop that a network is evaluated with is one for images of its size.
    return spec._replace(crop_share=default_crop_share(settings.image_size))


def stage_1_network_from(origin: LoadedNetwork, data: DataInfo) -> ExitNetwork:
    """Build the stage-1 network of ``origin`` with its weights, for the classes of a data set.

    Classifiers are taken over only where the classes are the same. A converted checkpoint has the class names
    that its user gave, so there an equal number of classes counts as the same.
    """
    stage_1 = origin.network.stage_1
    num_classes = len(data.class_names)
    same_classes = (
        stage_1.num_classes == num_classes
        and (origin.data.class_names == data.class_names or not origin.data.knows_class_names)
        # Trained in a single stage, an IMTA leaves the classifiers of its stage-1 network as they were made.
        and not (origin.network is not stage_1 and origin.description.recipe.get("single_stage"))
    )
    network = stage_1.for_classes(num_classes, same_classes)
    left_out = set() if same_classes else {name for name, _ in stage_1.classifier_parameters()}
    weights = {name: x for name, x in stage_1.state_dict().items() if name not in left_out}
    load_tensors(network, {**network.state_dict(), **weights})
    return network
