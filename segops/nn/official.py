"""Weights of SegNeXt that others saved, under the names of segops.nn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .mscan import MSCAN

__all__ = ["official_state_dict"]

WRAPPERS = ("state_dict", "model", "state_dict_ema")
CLASSIFIER = ("head.weight", "head.bias")
MISSING_LEVEL = re.compile(r"\.mlp\.dwconv\.(weight|bias)$")  # mmsegmentation 1.x


def official_state_dict(
    checkpoint: Mapping[str, Any], model: nn.Module, *, keep: Sequence[str] = ()
) -> dict[str, Tensor]:
    """What ``model.load_state_dict`` takes, from a SegNeXt or MSCAN checkpoint of others.

    Understood are the authors' segmentation files and those of mmsegmentation 0.x and 1.x, for a
    :class:`segops.nn.SegNeXt` or, of which they take the part, its backbone; and the authors' ImageNet classification
    files, for a :class:`segops.nn.MSCAN`, which leave their classifier.

    Args:
        checkpoint: What ``torch.load`` returns: tensors by name, or a dict that holds those as ``"state_dict"`` or
            ``"model"``.
        model: Whom the weights are for; it is not changed.
        keep: Prefixes of names whose weights stay the model's own, such as ``"decode_head.conv_seg"`` for another
            number of classes.

    Returns:
        Every name of ``model.state_dict()``, with tensors of its shapes.

    Raises:
        ValueError: names that are missing or unknown, or a wrong shape; the message names each and what was expected.
        TypeError: checkpoint is not a mapping from names to tensors.

    Example:
        >>> from segops.nn import MSCAN, official_state_dict
        >>> imagenet = {"state_dict": {**MSCAN().state_dict(), "head.weight": torch.zeros(1000, 256),
        ...                            "head.bias": torch.zeros(1000)}}
        >>> backbone = MSCAN()
        >>> backbone.load_state_dict(official_state_dict(imagenet, backbone))
        <All keys matched successfully>
    """
    name = "official_state_dict"
    weights: Any = checkpoint
    for wrapper in WRAPPERS:
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
            break
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise TypeError(f"{name}: checkpoint must map names to tensors, got {_kind(weights)}")
    found = {key.removeprefix("module."): weight for key, weight in weights.items()}
    found = {MISSING_LEVEL.sub(r".mlp.dwconv.dwconv.\1", key): weight for key, weight in found.items()}
    wanted = model.state_dict()
    if isinstance(model, MSCAN):
        if any(key.startswith("backbone.") for key in found):
            found = {key.removeprefix("backbone."): w for key, w in found.items() if key.startswith("backbone.")}
        found = {key: weight for key, weight in found.items() if key not in CLASSIFIER}
    elif any(key.startswith("patch_embed1.") for key in found):
        raise ValueError(
            f"{name}: this is a file of the backbone alone, without decode_head: convert it for model.backbone"
        )
    kept = [key for key in wanted if key.startswith(tuple(keep))]
    found = {key: weight for key, weight in found.items() if not key.startswith(tuple(keep))} | {
        key: wanted[key] for key in kept
    }
    for key in wanted:
        # Files that were saved before BatchNorm counted its batches.
        if key.endswith("num_batches_tracked") and key not in found:
            found[key] = wanted[key]
    complaints = [f"missing {key} {_shape(w)}" for key, w in wanted.items() if key not in found]
    complaints += [f"unknown {key} {_shape(w)}" for key, w in found.items() if key not in wanted]
    complaints += [
        f"{key} must be {_shape(wanted[key])}, got {_shape(w)}"
        for key, w in found.items()
        if key in wanted and w.shape != wanted[key].shape
    ]
    if complaints:
        raise ValueError(f"{name}: the checkpoint does not fit {type(model).__name__}:\n  " + "\n  ".join(complaints))
    return {key: found[key] for key in wanted}


def _shape(weight: Tensor) -> str:
    return str(list(weight.shape))


def _kind(weights: Any) -> str:
    if not isinstance(weights, Mapping):
        return type(weights).__name__
    key, value = next((k, v) for k, v in weights.items() if not isinstance(v, Tensor))
    return f"{type(value).__name__} under {key!r}"
