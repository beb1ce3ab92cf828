"""Segments a folder of images with a checkpoint of train.py.

    python examples/predict.py --checkpoint runs/CAMVID/checkpoint.pt --images FOLDER --out FOLDER
    python examples/predict.py ... --tile 512 --overlap 128         # large images, a tile at a time
    python examples/predict.py ... --flip --scales 0.75 1 1.5       # mean of the softmaxes of six views

Into --out go masks/<stem>.png (class ids, one channel of 8 bits, or 16 for more than 255 classes) and
overlays/<stem>.png (the colours of the classes over the image). Logits of the image's size never exist.
A wrong folder, image or checkpoint: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import picture
import segops
from data import IMAGE_SUFFIXES, Classes, DataError, colour_of, decode, to_tensor
from network import MODELS
from segops.nn import SegmentationModel
from train import at_least, load_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.tile and args.overlap >= args.tile:
        parser.error(f"--overlap must be smaller than --tile {args.tile}, got {args.overlap}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        model, classes = open_checkpoint(args.checkpoint)
        model.to(device).eval()
        paths = images_in(args.images)
        folders = args.out / "masks", args.out / "overlays"
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path in tqdm(paths, desc="predict", unit="image"):
            image = decode(path, "RGB")
            labels = segment(model, to_tensor(image)[None].to(device), args)[0].cpu().numpy()
            mask = labels.astype(np.uint8 if len(classes.names) <= 255 else np.uint16)
            colours = picture.coloured(labels.astype(np.int64), classes)
            overlay = (1 - args.opacity) * image + args.opacity * colours
            for folder, pixels in zip(folders, (mask, overlay.round().astype(np.uint8)), strict=True):
                Image.fromarray(pixels).save(folder / f"{path.stem}.png")
    except (DataError, OSError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {len(paths)} images in {folders[0]} and {folders[1]}")
    return 0


def arguments() -> argparse.ArgumentParser:
    summary, _, layout = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=layout, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint.pt of train.py")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="every image in it is segmented")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="masks and overlays go here")
    parser.add_argument("--tile", type=at_least(16), metavar="N", help="side of a tile (default: whole images)")
    shared = "pixels that neighbouring tiles share, of which each keeps the nearer half (%(default)s)"
    parser.add_argument("--overlap", type=at_least(0), default=64, metavar="N", help=shared)
    parser.add_argument("--flip", action="store_true", help="also segment the mirrored image")
    parser.add_argument("--scales", type=scale, nargs="+", default=[1.0], metavar="S", help="sizes of the image (1)")
    parser.add_argument("--opacity", type=float, default=0.5, metavar="A", help="of the colours (%(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def scale(text: str) -> float:
    if not 0.1 <= (value := float(text)) <= 8:
        raise argparse.ArgumentTypeError(f"must be between 0.1 and 8, got {value:g}")
    return value


def open_checkpoint(path: Path) -> tuple[SegmentationModel, Classes]:
    saved: dict[str, Any] = load_checkpoint(path)
    names = saved["classes"]
    colours = saved.get("colours") or [colour_of(i) for i in range(len(names))]
    model = MODELS[saved["recipe"]["model"]].build(**saved["network"])
    model.load_state_dict(saved["model"])
    return model, Classes(tuple(names), tuple(map(tuple, colours)), ignore_index=-1)


def images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise DataError(f"{folder}: no images")
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise DataError(f"{path}: another image has the same name without its suffix")
    return paths


@torch.no_grad()
def segment(model: SegmentationModel, image: Tensor, args: argparse.Namespace) -> Tensor:
    """[1, 3, H, W] in [0, 1] to labels [1, H, W], as a whole or tile by tile."""
    height, width = image.shape[2:]
    if not args.tile:
        return labels_of(model, image, args.scales, args.flip)
    out = torch.empty(1, height, width, dtype=torch.int64, device=image.device)
    for top, bottom, keep_y in spans(height, args.tile, args.overlap):
        for left, right, keep_x in spans(width, args.tile, args.overlap):
            labels = labels_of(model, image[:, :, top:bottom, left:right], args.scales, args.flip)
            inside = labels[:, keep_y.start - top : keep_y.stop - top, keep_x.start - left : keep_x.stop - left]
            out[:, keep_y, keep_x] = inside.long()
    return out


def labels_of(model: SegmentationModel, image: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """The argmax of the mean of the softmaxes over every scale, and mirrored."""
    height, width = image.shape[2:]
    if list(scales) == [1.0] and not flip:
        return model.predict(image)
    logits = []
    for factor in scales:
        size = max(round(height * factor), 1), max(round(width * factor), 1)
        view = F.interpolate(image, size, mode="bilinear", align_corners=False) if factor != 1 else image
        # A decoder of whole cells may reach beyond the image.
        logits.append(model.logits(view)[:, :, : size[0], : size[1]])
        if flip:
            logits.append(model.logits(view.flip(3))[:, :, : size[0], : size[1]].flip(3))
    corners = getattr(model.decode_head, "align_corners", False)
    return segops.upsample_argmax(logits, (height, width), align_corners=corners)


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int, slice]]:
    """Begin and end of each tile along an axis, and what is kept of it: every pixel once."""
    starts = [*range(0, length - tile, tile - overlap), max(length - tile, 0)]
    ends = [min(start + tile, length) for start in starts]
    cuts = [0, *((end + start) // 2 for end, start in zip(ends, starts[1:], strict=False)), length]
    for start, end, first, last in zip(starts, ends, cuts, cuts[1:], strict=False):
        yield start, end, slice(first, last)


if __name__ == "__main__":
    sys.exit(main())
