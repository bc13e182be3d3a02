"""The networks by name.

One file, one paper, one line in `MODELS`. A model (`revseg.models.network.Network`) takes images [N, 3, H, W]
of any size, uint8 or float already normalised, and returns logits [N, num_classes, h, w] at its own `stride`;
in training a model with auxiliary heads returns a tuple, the main logits first.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from revseg.files import CheckpointError, load_weights
from revseg.layers.images import Normalization
from revseg.models.bisenet import BiSeNetResNet18, BiSeNetXception39
from revseg.models.cfpnet import CFPNet
from revseg.models.cgnet import CGNet
from revseg.models.dabnet import DABNet
from revseg.models.enet import ENet
from revseg.models.erfnet import ERFNet
from revseg.models.espnet import ESPNet
from revseg.models.fpenet import FPENet
from revseg.models.fssnet import FSSNet
from revseg.models.icnet import ICNet
from revseg.models.network import Network
from revseg.models.pspnet import PSPNet
from revseg.models.segnet import SegNet
from revseg.models.vnet import VNet

MODELS: dict[str, Callable[..., Network]] = {
    "bisenet_resnet18": BiSeNetResNet18,
    "bisenet_xception39": BiSeNetXception39,
    "cfpnet": CFPNet,
    "cgnet": CGNet,
    "dabnet": DABNet,
    "enet": ENet,
    "enet_rev": partial(ENet, reversible=True),
    "erfnet": ERFNet,
    "erfnet_rev": partial(ERFNet, reversible=True),
    "espnet": ESPNet,
    "espnet_rev": partial(ESPNet, reversible=True),
    "fpenet": FPENet,
    "fssnet": FSSNet,
    "icnet": ICNet,
    "pspnet": PSPNet,
    "segnet": SegNet,
    "vnet": VNet,
}


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(MODELS)


def create_model(name: str, num_classes: int = 19, **hyperparameters: object) -> nn.Module:
    """A new network with random weights.

    Args:
        name: One of `list_models()`.
        num_classes: C, the number of classes to tell apart.
        **hyperparameters: Arguments of the model's class; the defaults are the paper's.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If the name or a hyperparameter is unknown, or a value is out of range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
    known = [key for key in inspect.signature(MODELS[name]).parameters if key != "num_classes"]
    for key in hyperparameters:
        if key not in known:
            raise ValueError(f"unknown hyperparameter {key!r} of {name}; choose one of {', '.join(known)}")
    return MODELS[name](num_classes=num_classes, **hyperparameters)


def load_model(path: str | Path, **hyperparameters: object) -> nn.Module:
    """The network of a weights file, as `revseg train` writes it, in evaluation mode.

    Args:
        path: A safetensors file whose header describes the network; it may say how it normalises images
            ("normalization", as from `dataclasses.asdict`).
        **hyperparameters: Replace those in the file, as in `memory="lowest"`.

    Returns:
        The model with its weights, on the CPU.

    Raises:
        CheckpointError: If the file is damaged, from elsewhere, or does not fit the network.
    """
    path = Path(path)
    weights, description = load_weights(path)
    try:
        hyperparameters = {**description["hyperparameters"], **hyperparameters}
        model = create_model(description["model"], description["num_classes"], **hyperparameters)
        model.load_state_dict(weights)
        if isinstance(model, Network) and "normalization" in description:
            model.normalization = Normalization.of(description["normalization"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model it names: {error}") from error
    return model.eval()


def load_official(
    model: nn.Module, state: Mapping[str, Tensor], normalization: Normalization | None = None
) -> None:
    """Load weights that are named as in the official code of the network's paper.

    The network then takes bytes as that code does: its `normalization` is set too.

    Args:
        model: The network, with the hyperparameters of the weights.
        state: The state dict of the official network; names may begin with "module.". Of SegNet and ICNet, which were
            released for Caffe, what `revseg.models.caffe.read_caffemodel` reads.
        normalization: How the images were normalised that the weights were trained with; None for what the
            official code does with the data set that has so many classes.

    Raises:
        ValueError: If no official names are known for this network, or one of these is not known; or if
            the number of classes is not that of released weights and no normalization is given.
        RuntimeError: If the weights do not fit the network.
    """
    kind = type(model).__name__
    convert = getattr(model, "from_official", None)
    if convert is None or not isinstance(model, Network):
        why = getattr(model, "official_missing", "")
        raise ValueError(f"expected a model with official weights, got {kind}{': ' if why else ''}{why}")
    if getattr(model, "reversible", False):
        raise ValueError(f"expected a model with official weights, got a reversible {kind}")
    weights = convert(state)
    known = model.official_normalizations
    found = normalization or known.get(model.num_classes) or known.get(None)
    if found is None:
        released = " or ".join(str(classes) for classes in known)
        raise ValueError(
            f"the official code normalises images by the data set, known for {released} classes: for "
            f"{model.num_classes} give normalization=Normalization(mean, std), as the weights were trained"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        if not model.official_files:
            raise
        raise RuntimeError(f"{error}\n{model.official_files}") from error
    model.normalization = found
