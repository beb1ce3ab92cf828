"""How much of a label map survives DUpsampling's compression: the best any network behind it could score.

    python examples/dupsampling_upper_bound.py                                   # made-up scenes
    python examples/dupsampling_upper_bound.py --data CAMVID                     # val, and test where it is
    python examples/dupsampling_upper_bound.py --data CAMVID --autoencoder 500   # Table 1's networks too

Learns W and P from the label maps of train by PCA (segops.dupsampling.fit) and counts mIoU of
argmax(W P (v - m) + m) for each number of channels C~, against window means upsampled bilinearly. Into --out go
table.txt (or --table) and reconstructions.png. Wrong data: one line on stderr, exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import picture
import scenes
import segops
from data import Classes, DataError, Folder, Pairs, TrainingBatches, open_folder
from segops import dupsampling
from segops.metrics import ConfusionMatrix, Scores
from segops.nn import LabelAutoencoder
from train import at_least, atomic


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    try:
        classes, splits = open_splits(args)
        shown = len(splits["val"]) // 2 if args.show is None else args.show
        if shown >= len(splits["val"]):
            raise DataError(f"--show must be less than the {len(splits['val'])} maps of val, got {shown}")
        lines, pictures = reconstructions(args, classes, splits, shown)
        if args.autoencoder:
            lines += autoencoders(args, classes, splits["train"], splits["val"])
    except (DataError, ValueError, RuntimeError, ImportError) as error:
        print(f"dupsampling_upper_bound.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    out = args.out or Path("runs") / f"upper_bound_{args.data.resolve().name if args.data else 'scenes'}"
    table = args.table or out / "table.txt"
    for folder in (out, table.parent):
        folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(lines))
    command = shlex.join(["python", "examples/dupsampling_upper_bound.py", *(sys.argv[1:] if argv is None else argv)])
    with atomic(table) as path:
        path.write_text("\n".join([f"# {command}", f"# {about(time.perf_counter() - start)}", "", *lines]) + "\n")
    with atomic(out / "reconstructions.png") as path:
        draw(path, splits["val"][shown][1], pictures, classes)
    print(f"\nwritten: {table}, {out / 'reconstructions.png'}")
    return 0


def arguments() -> argparse.ArgumentParser:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder in CamVid layout; without it, made-up scenes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/upper_bound_<name of the data>")
    parser.add_argument("--table", type=Path, metavar="FILE", help="default: table.txt in --out")
    parser.add_argument("--ignore-index", type=int, metavar="ID", help="unlabelled (default: classes.json's, else 255)")
    parser.add_argument(
        "--num-classes", type=at_least(2), metavar="K", help="default: classes.json's, else as labelled"
    )
    parser.add_argument("--scale-factors", type=at_least(1), nargs="+", default=[16, 32], metavar="R",
                        help="pixels per cell and axis (default: 16 32)")  # fmt: skip
    parser.add_argument("--channels", type=at_least(1), nargs="+", default=[32, 64, 128, 256], metavar="C",
                        help="numbers per cell (default: 32 64 128 256)")  # fmt: skip
    parser.add_argument("--show", type=at_least(0), metavar="I", help="map of val in the picture (default: the middle)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("label autoencoder (section 4.1.1): four networks, 16 and 32, trained on crops")
    group.add_argument("--autoencoder", type=at_least(1), metavar="STEPS", help="train them for so many steps each")
    group.add_argument("--batch-size", type=at_least(2), default=8, metavar="N", help="default: %(default)s")
    group.add_argument("--crop", type=at_least(32), default=160, metavar="N", help="side of a crop (%(default)s)")
    group.add_argument("--lr", type=float, default=0.07, help="SGD's, falls polynomially (%(default)s, the paper's)")
    group.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: %(default)s")
    return parser


def about(seconds: float) -> str:
    parts = [f"segops {segops.__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        parts.append(f"commit {subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()}")
    return ", ".join([*parts, f"{torch.get_num_threads()} threads", f"{seconds:.0f} s"])


def open_splits(args: argparse.Namespace) -> tuple[Classes, dict[str, Pairs]]:
    """The classes; train, val, and test where there is one."""
    if args.data:
        classes, train_set, val_set = open_folder(args.data, args.ignore_index, args.num_classes)
        splits: dict[str, Pairs] = {"train": train_set, "val": val_set}
        if (args.data / "test").is_dir():
            splits["test"] = Folder(args.data, "test")
        return classes, splits
    classes = Classes(tuple(scenes.CLASSES), tuple(scenes.CLASSES.values()), 255)
    counts = {"train": 200, "val": 24, "test": 24}
    return classes, {split: list(scenes.Scenes(n, seed)) for seed, (split, n) in enumerate(counts.items())}


def labels_of(pairs: Pairs) -> list:
    """Label files where there are some: nothing else is read then."""
    return pairs.labels if isinstance(pairs, Folder) else [pairs[i][1] for i in range(len(pairs))]


def reconstructions(
    args: argparse.Namespace, classes: Classes, splits: dict[str, Pairs], shown: int
) -> tuple[list[str], dict[int, dict[str, Tensor]]]:
    """The table's lines, and by r what becomes of one label map of val."""
    channels = sorted(set(args.channels))
    maps = {split: labels_of(pairs) for split, pairs in splits.items()}
    counts = ", ".join(f"{split} {len(labels)}" for split, labels in maps.items())
    lines = [
        f"mIoU of argmax(W P (v - m) + m), W and P from train ({counts} label maps, {len(classes.names)} classes)",
        "",
    ]
    lines += [f"{'r':>3}  {'split':6}{'bilinear':>10}" + "".join(f"{f'C~ {c}':>9}" for c in channels)]
    pictures = {}
    for r in args.scale_factors:
        fit = dupsampling.fit(maps["train"], len(classes.names), r, channels[-1], ignore_index=classes.ignore_index)
        for split in maps:
            if split != "train":
                table = dupsampling.reconstruct(maps[split], fit, channels=channels, class_names=classes.names)
                scores: list[Scores] = [table.bilinear, *table.scores.values()]
                cells = [f"{one.miou:.4f}" for one in scores]
                lines.append(f"{r:3}  {split:6}{cells[0]:>10}" + "".join(f"{cell:>9}" for cell in cells[1:]))
        kept = fit.explained_variance.cumsum(0) / fit.total_variance
        lines.append(f"{r:3}  variance kept{'':3}" + "".join(f"{f'{100 * kept[c - 1]:.2f} %':>9}" for c in channels))
        bilinear, decoded = dupsampling.roundtrip(maps["val"][shown], fit, channels=channels)
        pictures[r] = {"bilinear": bilinear, **{f"C~ = {c}": label for c, label in decoded.items()}}
    return lines, pictures


def autoencoders(args: argparse.Namespace, classes: Classes, train_set: Pairs, val_set: Pairs) -> list[str]:
    """Trains the four networks of Table 1 and counts them on val."""
    recipe = f"batch size {args.batch_size}, crop {args.crop}, lr {args.lr:g}, seed {args.seed}"
    lines = ["", f"mIoU of the label autoencoder on val after {args.autoencoder} steps ({recipe})", ""]
    lines += [f"{'r':>3}{'bilinear':>11}{'C~ 64':>9}"]
    for r in (16, 32):
        fit = dupsampling.fit(labels_of(train_set), len(classes.names), r, 64, ignore_index=classes.ignore_index)
        bilinear, dup = (autoencoder(args, classes, train_set, val_set, r, one).miou for one in (None, fit))
        lines.append(f"{r:3}{bilinear:11.4f}{dup:9.4f}")
    return lines


def autoencoder(
    args: argparse.Namespace,
    classes: Classes,
    train_set: Pairs,
    val_set: Pairs,
    r: int,
    fit: dupsampling.DUpsamplingFit | None,
) -> Scores:
    """The network with DUpsampling from ``fit``, which trains on with the rest; bilinear without one."""
    torch.manual_seed(args.seed)
    upsampler = "dup" if fit else "bilinear"
    model = LabelAutoencoder(len(classes.names), output_stride=r, upsampler=upsampler)
    if fit:
        model.upsample.load_fit(fit)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, args.autoencoder, power=0.9)
    ignored = classes.ignore_index
    batches = TrainingBatches(train_set, args.autoencoder, args.batch_size, args.crop, ignored, args.seed)
    with tqdm(range(len(batches)), desc=f"{upsampler} {r}", unit="step") as bar:
        for step in bar:
            loss = model.loss(batches[step][1], ignore_index=ignored)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    matrix = ConfusionMatrix(len(classes.names), ignore_index=ignored, class_names=classes.names)
    for i in tqdm(range(len(val_set)), desc="val", unit="map"):
        label = torch.from_numpy(val_set[i][1])
        matrix.update(model.predict(label[None], ignored)[0], label)
    return matrix.compute()


def draw(path: Path, truth: np.ndarray, pictures: dict[int, dict[str, Tensor]], classes: Classes) -> None:
    """A row for each r: the label map, and what comes back with the mIoU on this map."""
    column, height = 3.0, 3.0 * truth.shape[0] / truth.shape[1]
    columns = 1 + len(next(iter(pictures.values())))
    figure = Figure(figsize=(columns * column, len(pictures) * (height + 0.35)), dpi=110, layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for line, (r, decoded) in zip(axes, pictures.items(), strict=True):
        for axis, (name, label) in zip(line, {"labels": torch.from_numpy(truth), **decoded}.items(), strict=True):
            matrix = ConfusionMatrix(len(classes.names), ignore_index=classes.ignore_index)
            matrix.update(label, torch.from_numpy(truth))
            title = f"r = {r}: {name}, {matrix.compute().miou:.3f}" if name != "labels" else f"{name} (mIoU beside)"
            axis.imshow(picture.coloured(label.numpy(), classes), interpolation="nearest")
            axis.set_title(title, fontsize=11)
            axis.set_axis_off()
    figure.savefig(path, format="png")


if __name__ == "__main__":
    sys.exit(main())
