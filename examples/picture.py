"""PNGs: a grid of image, truth and prediction beside every class's IoU; and curves of the training loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from data import Classes
from segops.metrics import Scores

IGNORED = (0, 0, 0)


def save(path: Path, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: Classes, scores: Scores) -> None:
    """Draws the grid.

    Args:
        path: The PNG.
        rows: image [H, W, 3] uint8, truth [H, W], prediction [H, W] each; sizes may differ from row to row.
        classes: Names and colours.
        scores: What the legend says of each class.
    """
    column = 3.2  # inches
    heights = [column * truth.shape[0] / truth.shape[1] for _, truth, _ in rows]
    # A plain Figure draws PNGs without a display and without pyplot's global state.
    figure = Figure(figsize=(3 * column + 2.6, sum(heights) + 0.1 * len(rows) + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, height_ratios=heights)
    for line, (image, truth, prediction) in zip(axes, rows, strict=True):
        pictures = (image, coloured(truth, classes), coloured(prediction, classes))
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=13)
    labels = [f"{name}  {'absent' if np.isnan(iou) else f'{iou:.2f}'}" for name, iou in scores.iou.items()]
    colours = list(classes.colours)
    if any((truth == classes.ignore_index).any() for _, truth, _ in rows):
        labels.append("not labelled")
        colours.append(IGNORED)
    entries = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor="0.3", label=label)
        for label, colour in zip(labels, colours, strict=True)
    ]
    figure.legend(
        handles=entries, loc="outside right center", fontsize=11, frameon=False, handlelength=1.6, handleheight=1.4,
        labelspacing=0.7, title=f"class and its IoU on val\nmean IoU {scores.miou:.3f}\n", title_fontsize=12,
        alignment="left",
    )  # fmt: skip
    figure.savefig(path, format="png")


def curves(path: Path, losses: dict[str, list[float]]) -> None:
    """Draws training losses against the step, each with its running mean."""
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    for number, (name, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        window = max(1, len(values) // 20)
        axis.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
        means = np.convolve(values, np.full(window, 1 / window), "valid")
        axis.plot(steps[window - 1 :], means, color=f"C{number}", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def coloured(label: np.ndarray, classes: Classes) -> np.ndarray:
    """[H, W] ids to [H, W, 3] uint8."""
    known = (label >= 0) & (label < len(classes.colours)) & (label != classes.ignore_index)
    palette = np.array([*classes.colours, IGNORED], np.uint8)
    return palette[np.where(known, label, len(classes.colours))]
