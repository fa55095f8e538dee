"""The build backend: ``pip install .`` prints that this project is not an installable package, and fails."""

import sys

MESSAGE = (
    "imta-msdnet is not a package to install: use torch.hub.load(CLONE, 'imta_cifar100', source='local'), "
    "the ONNX file of export_onnx.py, or the clone itself on PYTHONPATH; "
    "its requirements: pip install -r requirements.txt"
)


def _refuse(*arguments: object) -> None:
    sys.exit(MESSAGE)


# The hooks of PEP 517 and PEP 660; pip calls one of the first two.
get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _refuse
build_wheel = build_editable = build_sdist = _refuse
