"""Labelled images from a folder in CamVid layout, and the training batches cut from them."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class DataError(Exception):
    """One line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class Classes:
    """What the labels mean: names and display colours of ids 0 to K-1, and the id that carries no meaning."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignore_index: int


class Pairs(Protocol):
    """Images and their labels: image [H, W, 3] uint8 and label [H, W] of an integer dtype, sizes as they come."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class Folder:
    """Pairs of image [H, W, 3] uint8 and label [H, W] int32, decoded on access; sizes may differ from pair to pair.

    Args:
        root: A folder with ``<split>/`` (images), ``<split>annot/`` (``<stem>.png``, one channel of class ids) and
            optionally ``<split>.txt`` (a stem per line; without it, every image).
        split: "train", "val" or "test".

    Raises:
        DataError: something is missing, cannot be decoded, or an image and its label have different sizes.
    """

    def __init__(self, root: Path, split: str) -> None:
        for folder in (root, root / split, root / f"{split}annot"):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder")
        found = {path.stem: path for path in sorted((root / split).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
        listing = root / f"{split}.txt"
        # The lists of the original CamVid release hold "image label" paths; the first one's stem is meant.
        lines = listing.read_text().splitlines() if listing.exists() else found
        stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
        if not stems:
            raise DataError(f"{root / split}: no images")
        for stem in stems:
            if stem not in found:
                raise DataError(f"{listing}: names {stem!r}, but {root / split} has no such image")
        self.images = [found[stem] for stem in stems]
        self.labels = [root / f"{split}annot" / f"{stem}.png" for stem in stems]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.images[index], self.labels[index]
        if not label.exists():
            raise DataError(f"{image}: has no label {label}")
        pixels = decode(image, "RGB")
        ids = decode(label)
        if ids.ndim != 2:
            raise DataError(f"{label}: expected one channel of class ids, got an image of shape {ids.shape}")
        if ids.shape != pixels.shape[:2]:
            h, w = ids.shape
            raise DataError(f"{label}: is {w}x{h}, but its image {image} is {pixels.shape[1]}x{pixels.shape[0]}")
        return pixels, ids.astype(np.int32)


def decode(path: Path, mode: str | None = None) -> np.ndarray:
    """The pixels of an image file; DataError if there are none."""
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert(mode) if mode else file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded: {str(error).splitlines()[0]}") from error


def open_folder(
    root: Path, ignore_index: int | None = None, num_classes: int | None = None
) -> tuple[Classes, Folder, Folder]:
    """The classes, train and val of a folder in CamVid layout, every file of it decoded and checked.

    Args:
        root: The folder; see :class:`Folder`. ``classes.json`` in it may give ``num_classes``, ``ignore_index`` and
            ``classes``, a list of ``{"id", "name", "rgb"}``.
        ignore_index: Overrides that of classes.json; 255 where neither says.
        num_classes: Overrides that of classes.json; one more than the largest label where neither says.

    Raises:
        DataError: the first thing that is wrong.
    """
    splits = Folder(root, "train"), Folder(root, "val")
    about = _about(root / "classes.json")
    ignore_index = next(i for i in (ignore_index, about.get("ignore_index"), 255) if i is not None)
    num_classes = num_classes or about.get("num_classes")
    largest = 0
    for folder in splits:
        for i, path in enumerate(folder.labels):
            ids = np.unique(folder[i][1])
            ids = ids[ids != ignore_index]
            wrong = ids[(ids < 0) | (ids >= num_classes)] if num_classes else ids[ids < 0]
            if len(wrong):
                raise DataError(
                    f"{path}: label {wrong[0]} is not in [0, {num_classes}); "
                    f"if it marks unlabelled pixels, pass --ignore-index {wrong[0]}"
                )
            largest = max(largest, *ids.tolist(), 0)
    num_classes = num_classes or max(largest + 1, 2)
    known = {entry["id"]: entry for entry in about.get("classes", ())}
    names, colours = [], []
    for i in range(num_classes):
        names.append(str(known.get(i, {}).get("name", f"class {i}")))
        colours.append(tuple(known.get(i, {}).get("rgb") or colour_of(i)))
    return Classes(tuple(names), tuple(colours), ignore_index), *splits


def colour_of(label: int) -> tuple[int, int, int]:
    """For a class without a colour: the golden ratio spreads any number of hues."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 0.9)
    return int(255 * red), int(255 * green), int(255 * blue)


def _about(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or not all("id" in entry for entry in about.get("classes", ())):
            raise ValueError('expected {"num_classes", "ignore_index", "classes": [{"id", "name", "rgb"}]}')
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error
    return about


class TrainingBatches(torch.utils.data.Dataset):
    """The batch of every training step: random crops, flips, scales and light.

    Batch ``step`` depends on (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.

    Args:
        source: Pairs of image and label.
        steps: Number of batches.
        batch_size: Crops per batch.
        crop: Side of a crop in pixels; a multiple of 8 wastes nothing.
        ignore_index: Label of what lies outside the image.
        seed: Any non-negative int.
    """

    def __init__(self, source: Pairs, steps: int, batch_size: int, crop: int, ignore_index: int, seed: int) -> None:
        self.source, self.steps, self.batch_size = source, steps, batch_size
        self.crop, self.ignore_index, self.seed = crop, ignore_index, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """image [B, 3, crop, crop] float32 in [0, 1], target [B, crop, crop] int64."""
        rng = np.random.default_rng([self.seed, step])
        pairs = [
            self.augment(rng, *self.source[self.index(step * self.batch_size + i)]) for i in range(self.batch_size)
        ]
        images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return to_tensor(images), torch.from_numpy(labels).long()

    def index(self, position: int) -> int:
        """Every epoch is its own shuffle of the source."""
        epoch, within = divmod(position, len(self.source))
        return int(np.random.default_rng([self.seed, 1 << 20, epoch]).permutation(len(self.source))[within])

    def augment(self, rng: Generator, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = label.shape
        scale = np.exp(rng.uniform(np.log(0.75), np.log(1.6)))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        label = np.asarray(Image.fromarray(label.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
        short = [(0, max(0, self.crop - side)) for side in label.shape]
        image = np.pad(image, (*short, (0, 0)), constant_values=128)
        label = np.pad(label, short, constant_values=self.ignore_index)
        top, left = (rng.integers(side - self.crop + 1) for side in label.shape)
        window = np.s_[top : top + self.crop, left : left + self.crop]
        image, label = image[window], label[window]
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        # Dusk and daylight differ by a factor of two and in colour; contrast turns about the middle grey.
        gain = np.exp(rng.uniform(-0.5, 0.5)) * np.exp(rng.uniform(-0.1, 0.1, 3))
        contrast = rng.uniform(0.75, 1.25)
        image = np.clip((image * gain - 128) * contrast + 128, 0, 255)
        return image.astype(np.uint8), label


def labels_of(pairs: Pairs) -> Sequence[Path] | Sequence[np.ndarray]:
    """The label maps alone; of a folder their paths, so that no image is decoded."""
    return pairs.labels if isinstance(pairs, Folder) else [pairs[i][1] for i in range(len(pairs))]


def to_tensor(image: np.ndarray) -> Tensor:
    """[..., H, W, 3] uint8 to [..., 3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, -3).float() / 255
