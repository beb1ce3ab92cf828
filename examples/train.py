"""Trains a segmentation network with segops' fused layers, on a folder in CamVid layout or on made-up scenes.

    python examples/train.py                                        # GALD, no data needed
    python examples/train.py --data CAMVID --steps 2000
    python examples/train.py --model dupsampling                    # W from the training labels
    python examples/train.py --model dupsampling --temperature-plot # and once more with T = 1
    python examples/train.py --model segnext-t                      # SegNeXt; or -s, -b, -l
    python examples/train.py --model hfgd-os4                       # HFGD; or hfgd-os2, semanticfpn
    python examples/train.py --model hfgd-os4 --backbone resnet50   # on a backbone of timm, untrained
    python examples/train.py --resume runs/CAMVID/checkpoint.pt     # goes on where a run stopped

A folder in CamVid layout holds train/ and val/ (images of any sizes), trainannot/ and valannot/ (<stem>.png, one
channel of class ids), optionally train.txt and val.txt (a stem per line) and classes.json (num_classes, ignore_index,
names and colours). Into --out go checkpoint.pt, predictions.png and results.json, and temperature.png if asked for.
Wrong data or a wrong checkpoint: one line on stderr, exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import compare
import picture
import scenes
import segops
from data import Classes, DataError, Pairs, TrainingBatches, labels_of, open_folder, to_tensor
from network import MODELS
from segops.metrics import ConfusionMatrix, Scores
from segops.nn import SegmentationModel

# What decides the weights that come out: a resumed run takes these from its checkpoint and refuses other values.
RECIPE = (
    "model", "steps", "batch_size", "crop", "lr", "weight_decay", "seed", "width", "kernel_size", "dilation",
    "num_heads", "border", "dup_channels", "backbone", "ignore_index", "num_classes",
)  # fmt: skip
TEMPERATURE_RATE = 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        saved = None
        if args.resume:
            saved = load_checkpoint(args.resume)
            parser.set_defaults(out=args.resume.parent, data=saved["data"] and Path(saved["data"]), **saved["recipe"])
            args = parser.parse_args(argv)
            for name, value in saved["recipe"].items():
                if getattr(args, name) != value:
                    flag = name.replace("_", "-")
                    raise DataError(f"{args.resume}: was made with --{flag} {value}, not {getattr(args, name)}")
        classes, train_set, val_set = open_data(args)
        if saved and saved["classes"] != list(classes.names):
            raise DataError(f"{args.resume}: was made for the classes {', '.join(saved['classes'])}, not these")
    except DataError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2

    if args.temperature_plot and args.model != "dupsampling":
        parser.error(f"--temperature-plot needs --model dupsampling, not {args.model}")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or Path("runs") / (args.data.resolve().name if args.data else "scenes")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        run = Run(args, classes, device, out / "checkpoint.pt")
        if saved:
            run.restore(saved)
        else:
            run.learn_from_labels(train_set)
        out.mkdir(parents=True, exist_ok=True)
    # a network, device or folder that cannot be, or labels that cannot be learned from
    except (ValueError, RuntimeError, AssertionError, OSError, ImportError) as error:
        parser.error(str(error).splitlines()[0])
    batches = TrainingBatches(train_set, args.steps, args.batch_size, args.crop, classes.ignore_index, args.seed)
    if not run.train(batches):
        print(f"stopped after step {run.step} of {args.steps}; go on with --resume {run.checkpoint}")
        return 0

    matrix, rows = evaluate(run.model, val_set, classes, device, show=args.show)
    scores, majority = matrix.compute(), majority_scores(matrix)
    print(report(scores, majority))
    with atomic(out / "predictions.png") as path:
        picture.save(path, rows, classes, scores)
    results: dict[str, Any] = {
        "scores": dataclasses.asdict(scores),
        "majority_class": dataclasses.asdict(majority),
        "seconds_of_training": run.seconds,
        "losses": run.losses,
        "arguments": vars(args),
        "versions": {"segops": segops.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }
    if args.compare:
        image, target = (tensor.to(device) for tensor in batches[0])
        results["fused_against_reference"] = compare.compare(
            run.checkpoint, run.model, image, target, classes.ignore_index, rounds=args.compare
        )
        print("\n" + compare.table(results["fused_against_reference"]))
    written = [run.checkpoint, out / "predictions.png", out / "results.json"]
    if args.temperature_plot:
        vanilla = Run(args, classes, device, None, learn_temperature=False)
        vanilla.learn_from_labels(train_set)
        vanilla.train(batches)
        results["losses_with_t_1"] = vanilla.losses
        written.append(out / "temperature.png")
        learned = run.model.decode_head.upsample.temperature.item()
        curves = {"vanilla softmax (T = 1)": vanilla.losses, f"learned temperature (T = {learned:.2f})": run.losses}
        with atomic(written[-1]) as path:
            picture.curves(path, curves)
    with atomic(out / "results.json") as path:
        path.write_text(json.dumps(plain(results), indent=1) + "\n")
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def arguments() -> argparse.ArgumentParser:
    summary, _, layout = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=layout, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("data and files")
    group.add_argument("--data", type=Path, metavar="DIR", help="folder in CamVid layout; without it, made-up scenes")
    group.add_argument("--out", type=Path, metavar="DIR", help="results go here (default: runs/<name of the data>)")
    group.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint.pt of a run that stopped")
    group.add_argument("--ignore-index", type=int, metavar="ID", help="unlabelled (default: classes.json's, else 255)")
    group.add_argument("--num-classes", type=at_least(2), metavar="K", help="default: classes.json's, else as labelled")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=at_least(1), default=200, metavar="N", help="default: %(default)s")
    group.add_argument("--batch-size", type=at_least(2), default=8, metavar="N", help="at least 2 (%(default)s)")
    group.add_argument("--crop", type=at_least(16), default=160, metavar="N", help="side of a crop (%(default)s)")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW, one cycle (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.02, help="default: %(default)s")
    group.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: %(default)s")
    group.add_argument("--save-every", type=at_least(1), default=50, metavar="N", help="steps between checkpoints (50)")
    group.add_argument("--stop-at", type=at_least(1), metavar="STEP", help="save there and end, to be resumed")
    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=tuple(MODELS), default="gald", help="default: %(default)s")
    group.add_argument(
        "--width", type=at_least(8), default=64, metavar="C", help="of the decoder of gald, dupsampling (%(default)s)"
    )
    group = parser.add_argument_group("network: gald")
    group.add_argument("--kernel-size", type=at_least(1), default=5, metavar="K", help="taps per axis (%(default)s)")
    group.add_argument("--dilation", type=at_least(1), default=3, metavar="R", help="between taps (%(default)s)")
    group.add_argument("--num-heads", type=at_least(1), default=1, metavar="N", help="default: %(default)s")
    group.add_argument("--border", choices=("zero", "mask", "shift"), default="zero", help="default: %(default)s")
    group = parser.add_argument_group("network: dupsampling")
    group.add_argument("--dup-channels", type=at_least(1), default=64, metavar="C", help="columns of W (%(default)s)")
    group.add_argument("--temperature-plot", action="store_true",
                       help="train again with T fixed at 1 and plot both loss curves")  # fmt: skip
    group = parser.add_argument_group("network: hfgd, semanticfpn")
    group.add_argument("--backbone", default="mscan-t", metavar="NAME",
                       help="mscan-t, -s, -b, -l, or a model of timm, as resnet50 (%(default)s)")  # fmt: skip
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    group.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--workers", type=at_least(0), default=0, metavar="N", help="processes that read data (0: none)")
    group.add_argument("--show", type=at_least(1), default=4, metavar="N", help="images in the picture (%(default)s)")
    group.add_argument("--compare", type=at_least(0), default=5, metavar="N",
                       help="timed steps, fused against reference, at the end (%(default)s; 0: none)")  # fmt: skip
    return parser


def at_least(smallest: int) -> Callable[[str], int]:
    """For argparse: an int that is not smaller."""

    def parse(text: str) -> int:
        if (value := int(text)) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    parse.__name__ = "int"  # argparse says "invalid int value"
    return parse


def open_data(args: argparse.Namespace) -> tuple[Classes, Pairs, Pairs]:
    """The classes, and the pairs of train and val."""
    if args.data:
        return open_folder(args.data, args.ignore_index, args.num_classes)
    classes = Classes(tuple(scenes.CLASSES), tuple(scenes.CLASSES.values()), 255)
    # Drawn once: a step that draws its eight scenes takes half as long again.
    return classes, list(scenes.Scenes(200, seed=2 * args.seed)), list(scenes.Scenes(24, seed=2 * args.seed + 1))


class Run:
    """What a checkpoint holds: model, optimizer, schedule, step, random state and the losses so far.

    Args:
        args: From the command line.
        classes: Of the data.
        device: Where to train.
        checkpoint: None saves nothing.
        options: Beside those in ``args``, for the network.
    """

    def __init__(
        self, args: argparse.Namespace, classes: Classes, device: torch.device, checkpoint: Path | None, **options: Any
    ) -> None:
        self.args, self.classes, self.device, self.checkpoint = args, classes, device, checkpoint
        self.kind = MODELS[args.model]
        known = {**vars(args), "ignore_index": classes.ignore_index}
        self.network = {
            "num_classes": len(classes.names),
            **{name: known[name] for name in self.kind.options},
            **options,
        }
        torch.manual_seed(args.seed)
        self.model = self.kind.build(**self.network).to(device)
        # AdamW moves a parameter by about its rate per step: at that of the others T would hardly leave 1.
        named = list(self.model.named_parameters())
        temperatures = [p for name, p in named if name.endswith("temperature")]
        groups = [
            {"params": [p for name, p in named if not name.endswith("temperature")]},
            {"params": temperatures, "lr": TEMPERATURE_RATE * args.lr, "weight_decay": 0.0},
        ][: 2 if temperatures else 1]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            # The warm-up must take more than one of OneCycleLR's steps, also in the shortest runs.
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=args.steps + 1,
            pct_start=max(0.2, 1.5 / (args.steps + 1)),
        )
        self.step, self.seconds = 0, 0.0  # seconds without the reading of data
        self.losses: list[float] = []

    def learn_from_labels(self, pairs: Pairs) -> None:
        """What the network takes from the label maps of the training set before it is trained."""
        if self.kind.from_labels:
            self.kind.from_labels(self.model, labels_of(pairs), self.classes.ignore_index)

    def train(self, batches: TrainingBatches) -> bool:
        """Trains until the last step or ``--stop-at``; True when the run is complete."""
        last = min(self.args.stop_at or self.args.steps, self.args.steps)
        loader = torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.step, last),
            num_workers=self.args.workers,
            generator=torch.Generator(),  # else the loader draws from the global one, and a resumed run differs
            pin_memory=self.device.type == "cuda",
        )
        self.model.train()
        with tqdm(total=self.args.steps, initial=self.step, desc="train", unit="step") as bar:
            for image, target in loader:
                start = time.perf_counter()
                image, target = image.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
                loss = self.model(image, target, ignore_index=self.classes.ignore_index)["loss"]
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                self.losses.append(loss.item())
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()
                self.seconds += time.perf_counter() - start
                if self.checkpoint and (self.step % self.args.save_every == 0 or self.step == last):
                    self.save()
        return self.step >= self.args.steps

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "network": self.network,
            "classes": list(self.classes.names),
            "colours": [list(colour) for colour in self.classes.colours],
            "data": str(self.args.data.resolve()) if self.args.data else None,
            "recipe": {name: getattr(self.args, name) for name in RECIPE},
        }
        with atomic(self.checkpoint) as path:
            torch.save(state, path)

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved["losses"]
        torch.set_rng_state(saved["rng"])
        if self.device.type == "cuda" and len(saved["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or "recipe" not in saved:
            raise ValueError("not a checkpoint of this script")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return saved


@torch.no_grad()
def evaluate(
    model: SegmentationModel, pairs: Pairs, classes: Classes, device: torch.device, show: int
) -> tuple[ConfusionMatrix, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Counts on whole images, one by one; and ``show`` evenly spaced triples of image, truth and prediction."""
    model.eval()
    matrix = ConfusionMatrix(len(classes.names), ignore_index=classes.ignore_index, class_names=classes.names)
    shown = set(np.linspace(0, len(pairs) - 1, min(show, len(pairs))).round().astype(int).tolist())
    rows = []
    for i in tqdm(range(len(pairs)), desc="val", unit="image"):
        image, truth = pairs[i]
        prediction = model.predict(to_tensor(image)[None].to(device))[0].cpu()
        matrix.update(prediction, torch.from_numpy(truth))
        if i in shown:
            rows.append((image, truth, prediction.numpy()))
    return matrix, rows


def majority_scores(matrix: ConfusionMatrix) -> Scores:
    """What predicting the most frequent class everywhere would have scored."""
    majority = ConfusionMatrix(matrix.num_classes, class_names=matrix.class_names)
    pixels = matrix.counts.sum(1)
    majority.counts[:, pixels.argmax()] = pixels
    return majority.compute()


def report(scores: Scores, majority: Scores) -> str:
    lines = ["", f"{'class':16}{'IoU on val':>10}"]
    lines += [f"{name:16}{'absent' if np.isnan(iou) else f'{iou:.3f}':>10}" for name, iou in scores.iou.items()]
    lines += [f"{'mIoU':16}{scores.miou:10.3f}   (the majority class everywhere: {majority.miou:.3f})"]
    lines += [f"{'accuracy':16}{scores.accuracy:10.3f}   (the majority class everywhere: {majority.accuracy:.3f})"]
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """What JSON can say: paths as text, NaN (the IoU of an absent class) as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside ``path`` that takes its place once it is written: an interrupted run leaves the old file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
