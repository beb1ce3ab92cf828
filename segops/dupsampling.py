"""DUpsampling's matrices, learned from label maps (papers/dupsampling.txt, section 3.1).

A label map is cut into windows of r x r pixels; a window's one-hot labels are v [r²K] with v[(dy * r + dx) * K + k] = 1
where pixel (dy, dx) has class k. :func:`fit` finds P and W that lose least of v in W P v; :func:`reconstruct` says what
is lost, as mIoU, before any network is trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks, _native
from .metrics import ConfusionMatrix, Scores
from .ops.dupsample_argmax import dupsample_argmax
from .ops.upsample_argmax import upsample_argmax

__all__ = ["DUpsamplingFit", "Reconstruction", "fit", "reconstruct", "roundtrip"]

METHODS = ("pca", "sgd")
IGNORE = ("zero", "background", "drop_window")

_DENSE = 6144  # entries of a window up to which the covariance is stored: 0.3 GB in float64
_LANCZOS = 512  # entries from which a few eigenvectors are cheaper than all
_FLUSH = 1 << 22  # corners that wait for the covariance


@dataclass(frozen=True, eq=False)
class DUpsamplingFit:
    """What :func:`fit` learned: v is approximated by ``weight @ (projection @ (v - bias)) + bias``.

    Attributes:
        weight: [r²K, C~] float32, W; with "pca" its columns are orthonormal, leading directions first.
        bias: [r²K] float32: the mean of v with "pca", zeros with "sgd", which does not centre.
        projection: [C~, r²K] float32, P; with "pca" the transpose of W.
        explained_variance: [C~] float64, largest first: with "pca" the eigenvalues of the covariance
            E (v - m)(v - m)ᵀ, with "sgd" those of the covariance within the span of W.
        total_variance: Trace of the covariance.
        num_windows: Windows learned from.
        num_classes: K.
        scale_factor: r.
        method: "pca" or "sgd".
        ignore: "zero", "background" or "drop_window".
        ignore_index: Label that counts as not there.
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor
    explained_variance: Tensor
    total_variance: float
    num_windows: int
    num_classes: int
    scale_factor: int
    method: str
    ignore: str
    ignore_index: int

    @property
    def channels(self) -> int:
        """C~."""
        return self.weight.shape[1]

    def truncated(self, channels: int) -> DUpsamplingFit:
        """The fit with fewer channels: principal components are nested.

        Raises:
            ValueError: channels is not in [1, C~], or less than C~ and the method is not "pca".
        """
        self._check("truncated", channels)
        return replace(
            self,
            weight=self.weight[:, :channels],
            projection=self.projection[:channels],
            explained_variance=self.explained_variance[:channels],
        )

    def _check(self, function: str, channels: int) -> None:
        _checks.positive(function, "channels", channels)
        if self.method == "pca" and channels > self.channels:
            raise ValueError(f"{function}: channels must be at most the fit's {self.channels}, got {channels}")
        if self.method != "pca" and channels != self.channels:
            raise ValueError(
                f"{function}: channels must be the fit's {self.channels} (method {self.method!r} is not nested), "
                f"got {channels}"
            )


def fit(
    labels: Iterable[Any],
    num_classes: int,
    scale_factor: int,
    channels: int,
    method: str = "pca",
    ignore: str = "zero",
    *,
    ignore_index: int = 255,
    seed: int = 0,
    epochs: int = 5,
    lr: float = 3e-3,
    batch_size: int = 256,
    progress: bool = True,
) -> DUpsamplingFit:
    """Learns DUpsampling's W and P from label maps, which are read once.

    Memory: where r²K <= 6144 the covariance, whatever the number of maps. Beyond that the windows are kept by the
    corners of their regions, 4 bytes each (on street scenes 0.2 bytes per pixel; at most 16), beside about 2 C~
    vectors of r²K.

    Args:
        labels: Label maps [H, W] of any sizes and integer dtypes, in any iterable, also one that can be read only
            once: numpy arrays, tensors, paths of one-channel images or .npy files, or batches [N, H, W] of these. Below
            and to the right a map is padded with ignored pixels to a multiple of r.
        num_classes: K.
        scale_factor: r.
        channels: C~, at most r²K.
        method: "pca": exact principal components. "sgd": stochastic gradient steps (Adam) on the mean squared error of
            v - W P v, without centring, from Kaiming initialisation.
        ignore: What an ignored pixel is in v: "zero" (K zeros), "background" (class 0), or "drop_window" (a window that
            has one is left out, at the padded border too).
        ignore_index: Label of ignored pixels.
        seed: Of PCA's first vector and of SGD's initialisation and order. Equal seeds give equal bits on one machine.
        epochs: Of "sgd".
        lr: First learning rate of "sgd"; it falls to zero polynomially.
        batch_size: Windows per step of "sgd".
        progress: Show progress bars, if tqdm is installed.

    Returns:
        The matrices; in each column of "pca" the entry of largest magnitude (the first of equal ones) is positive.

    Raises:
        ValueError: no label map, no window left, a label that is neither in [0, K) nor ignore_index (the message names
            the map and the pixel), a map that is not [H, W], or an argument out of range.
        RuntimeError: segops._labels is not loaded.
        ImportError: scipy is needed (r²K > 6144) or Pillow (paths) and is missing: ``pip install segops[dupsampling]``.

    Example:
        >>> from segops import dupsampling
        >>> labels = [torch.arange(40).view(4, 10) // 15, torch.zeros(5, 7, dtype=torch.uint8)]
        >>> learned = dupsampling.fit(labels, num_classes=3, scale_factor=2, channels=4, progress=False)
        >>> learned.weight.shape, learned.bias.shape, learned.projection.shape, learned.num_windows
        (torch.Size([12, 4]), torch.Size([12]), torch.Size([4, 12]), 22)
    """
    for name, value in (
        ("num_classes", num_classes), ("scale_factor", scale_factor), ("channels", channels),
        ("epochs", epochs), ("batch_size", batch_size),
    ):  # fmt: skip
        _checks.positive("fit", name, value)
    if num_classes < 2:
        raise ValueError(f"fit: num_classes must be at least 2, got {num_classes}")
    _checks.choice("fit", "method", method, METHODS)
    _checks.choice("fit", "ignore", ignore, IGNORE)
    if not lr > 0:
        raise ValueError(f"fit: lr must be positive, got {lr}")
    entries = scale_factor**2 * num_classes
    if channels > entries:
        raise ValueError(f"fit: channels must be at most scale_factor² * num_classes = {entries}, got {channels}")
    windows = _windows("fit", num_classes, scale_factor)
    gram = np.zeros((entries, entries), np.uint32) if method == "pca" and entries <= _DENSE else None
    if gram is None and method == "pca":
        _optional("scipy.sparse.linalg", f"PCA of windows with {entries} > {_DENSE} entries")
    ones, count, index = np.zeros(entries, np.int64), 0, -1

    def flush() -> None:
        nonlocal count
        count += len(windows)
        ones[:] += windows.sum()
        if gram is not None:
            windows.add_gram(gram, _threads())
            windows.clear()

    with _bar(progress, "label maps", "map", len(labels) if isinstance(labels, Sized) else None) as bar:
        for index, (name, array) in enumerate(_maps("fit", labels)):  # noqa: B007
            _add("fit", windows, name, array, ignore_index, ignore)
            if gram is not None and windows.corners >= _FLUSH:
                flush()
            bar.update()
    if index < 0:
        raise ValueError("fit: labels must hold at least one label map, got none")
    flush()
    if not count:
        raise ValueError(f"fit: no window left: ignore={ignore!r} and each of the {index + 1} label maps' windows "
                         f"has a pixel that is {ignore_index} or padding")  # fmt: skip
    grid = scale_factor, scale_factor, num_classes
    mean = _prefix_sums(ones.reshape(*grid)).ravel() / count
    if method == "sgd":
        weight, projection = _descend(windows, channels, epochs, lr, batch_size, seed, progress)
        bias = torch.zeros(entries)
        basis = np.linalg.qr(weight.double().numpy())[0]
        codes = windows.product(_suffix_sums(basis, grid), _threads())
        variances = np.linalg.eigvalsh(codes.T @ codes / count - np.outer(mean @ basis, mean @ basis))[::-1]
    else:
        if gram is not None:
            variances, vectors = _dense_pca(gram, grid, mean, count, channels, seed, progress)
        else:
            variances, vectors = _sparse_pca(windows, grid, mean, count, channels, seed, progress)
        size = np.abs(vectors)
        largest = (size > (1 - 1e-6) * size.max(0)).argmax(0)  # the first of those that differ by rounding only
        vectors *= np.where(vectors[largest, np.arange(channels)] < 0, -1.0, 1.0)
        weight, bias = torch.from_numpy(vectors).float(), torch.from_numpy(mean).float()
        projection = weight.T.contiguous()
    return DUpsamplingFit(
        weight=weight,
        bias=bias,
        projection=projection,
        explained_variance=torch.from_numpy(np.maximum(variances, 0)),
        total_variance=float((mean - mean**2).sum()),  # v holds zeros and ones
        num_windows=count,
        num_classes=num_classes,
        scale_factor=scale_factor,
        method=method,
        ignore=ignore,
        ignore_index=ignore_index,
    )


@dataclass(frozen=True)
class Reconstruction:
    """What survives compression to C~ numbers per window; ``print`` shows it as a table.

    Attributes:
        scale_factor: r.
        num_maps: Label maps counted.
        bilinear: Scores of window means, upsampled bilinearly.
        scores: Scores of W P (v - m) + m by C~.
    """

    scale_factor: int
    num_maps: int
    bilinear: Scores
    scores: dict[int, Scores]

    def __str__(self) -> str:
        rows = [("bilinear", "K", self.bilinear)]
        rows += [("W P (v - m) + m", str(channels), scores) for channels, scores in self.scores.items()]
        lines = [f"{'r':>3}  {'upsampling':16}{'C~':>5}{'mIoU':>8}{'accuracy':>10}"]
        lines += [f"{self.scale_factor:3}  {name:16}{channels:>5}{scores.miou:8.4f}{scores.accuracy:10.4f}"
                  for name, channels, scores in rows]  # fmt: skip
        return "\n".join(lines)


def reconstruct(
    labels: Iterable[Any],
    fit: DUpsamplingFit,
    *,
    channels: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """How much of label maps survives W P, against window means upsampled bilinearly: an upper bound without training.

    Counts argmax over classes of W P (v - m) + m for each C~, and the argmax of the windows' class shares (over their
    pixels that are not ignored) after bilinear upsampling (``align_corners=False``: the shares lie in window centres).

    Args:
        labels: As for :func:`fit`. Ignored pixels are not counted; in v they are what ``fit.ignore`` says, zeros for
            "drop_window".
        fit: Learned matrices.
        channels: C~ to count, each at most that of the fit; None means that of the fit. Principal components are
            nested, so one fit serves all; a fit by "sgd" serves only its own C~.
        class_names: K names for the scores.
        progress: Show a progress bar, if tqdm is installed.

    Raises:
        ValueError: no label map, a wrong label (the message names the map), or channels the fit has not.
        RuntimeError: segops._labels is not loaded.

    Example:
        >>> from segops import dupsampling
        >>> labels = [torch.arange(40).view(4, 10) // 15]
        >>> learned = dupsampling.fit(labels, num_classes=3, scale_factor=2, channels=6, progress=False)
        >>> result = dupsampling.reconstruct(labels, learned, channels=(1, 6), progress=False)
        >>> str(result).splitlines()[-1]
        '  2  W P (v - m) + m     6  1.0000    1.0000'
    """
    codec = _Codec("reconstruct", fit, channels)
    matrices = [
        ConfusionMatrix(fit.num_classes, ignore_index=fit.ignore_index, class_names=class_names)
        for _ in (None, *codec.channels)
    ]
    count = 0
    with _bar(progress, "reconstruct", "map", len(labels) if isinstance(labels, Sized) else None) as bar:
        for name, array in _maps("reconstruct", labels):
            target = torch.from_numpy(array.astype(np.int64))
            bilinear, decoded = codec(name, array)
            for matrix, prediction in zip(matrices, (bilinear, *decoded.values()), strict=True):
                matrix.update(prediction, target)
            count += 1
            bar.update()
    if not count:
        raise ValueError("reconstruct: labels must hold at least one label map, got none")
    bilinear_scores, *scores = (matrix.compute() for matrix in matrices)
    return Reconstruction(fit.scale_factor, count, bilinear_scores, dict(zip(codec.channels, scores, strict=True)))


def roundtrip(
    label: Any, fit: DUpsamplingFit, *, channels: Sequence[int] | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """One label map after compression: by window means and bilinear upsampling, and by W P for each C~.

    Args:
        label: One label map, as for :func:`fit`.
        fit: Learned matrices.
        channels: As for :func:`reconstruct`.

    Returns:
        [H, W] labels of the bilinear way, and [H, W] labels by C~.

    Raises:
        ValueError: As :func:`reconstruct`, or more than one label map.
    """
    maps = list(_maps("roundtrip", label if _is_single(label) else [label]))
    if len(maps) != 1:
        raise ValueError(f"roundtrip: label must be one label map, got {len(maps)}")
    return _Codec("roundtrip", fit, channels)(*maps[0])


class _Codec:
    """Label map -> codes -> label maps; the projection's sums are taken once for all maps."""

    def __init__(self, function: str, fit: DUpsamplingFit, channels: Sequence[int] | None) -> None:
        self.function, self.fit = function, fit
        self.channels = tuple(sorted({fit.channels} if channels is None else set(channels)))
        if not self.channels:
            raise ValueError(f"{function}: channels must name at least one C~, got none")
        for one in self.channels:
            fit._check(function, one)
        self.ignore = "zero" if fit.ignore == "drop_window" else fit.ignore
        grid = fit.scale_factor, fit.scale_factor, fit.num_classes
        basis = fit.projection[: self.channels[-1]].double().numpy().T
        self.table = _suffix_sums(basis, grid)
        self.offset = fit.bias.double().numpy() @ basis
        self.windows = _windows(function, fit.num_classes, fit.scale_factor)

    def __call__(self, name: str, array: np.ndarray) -> tuple[Tensor, dict[int, Tensor]]:
        fit, (height, width) = self.fit, array.shape
        r = fit.scale_factor
        h, w = -(-height // r), -(-width // r)
        self.windows.clear()
        _add(self.function, self.windows, name, array, fit.ignore_index, self.ignore)
        codes = torch.from_numpy(self.windows.product(self.table, _threads()) - self.offset).float()
        x = codes.view(1, h, w, -1).permute(0, 3, 1, 2)
        decoded = {
            channels: dupsample_argmax(
                x[:, :channels], fit.weight[:, :channels], fit.bias, scale_factor=r, size=(height, width)
            )[0]
            for channels in self.channels
        }
        return self._bilinear(array, h, w), decoded

    def _bilinear(self, array: np.ndarray, h: int, w: int) -> Tensor:
        r, k = self.fit.scale_factor, self.fit.num_classes
        ignored_as = 0 if self.ignore == "background" else k
        padded = np.full((h * r, w * r), ignored_as, np.int64)
        padded[: array.shape[0], : array.shape[1]] = np.where(array == self.fit.ignore_index, ignored_as, array)
        cell = np.arange(h * r)[:, None] // r * w + np.arange(w * r) // r
        counts = np.bincount((cell * (k + 1) + padded).ravel(), minlength=h * w * (k + 1)).reshape(h, w, k + 1)[..., :k]
        shares = torch.from_numpy(counts / np.maximum(counts.sum(-1, keepdims=True), 1)).float()
        upsampled = upsample_argmax(shares.permute(2, 0, 1)[None], (h * r, w * r))  # cells are r apart, then cropped
        return upsampled[0, : array.shape[0], : array.shape[1]]


def _windows(function: str, num_classes: int, scale_factor: int) -> Any:
    reason = _native.why_not("_labels")
    if reason is not None:
        raise RuntimeError(f"{function}: {reason}; build it with pip install --no-build-isolation segops")
    return importlib.import_module("segops._labels").Windows(num_classes, scale_factor)


def _optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "Pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f"{what} needs {package}: pip install 'segops[dupsampling]' ({error})") from error


def _threads() -> int:
    return torch.get_num_threads()


def _is_single(labels: Any) -> bool:
    return isinstance(labels, (str, Path)) or getattr(labels, "ndim", None) == 2


def _maps(function: str, labels: Iterable[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [H, W] uint8 or int64, contiguous) of each label map."""
    index = 0
    for item in [labels] if _is_single(labels) else labels:
        source = f" ({item})" if isinstance(item, (str, Path)) else ""
        name = f"label map {index}{source}"
        if source:
            array = _read(function, name, Path(str(item)))
        else:
            array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        if array.dtype.kind not in "iub":
            raise TypeError(f"{function}: {name} must have an integer dtype, got {array.dtype}")
        if array.ndim not in (2, 3):
            raise ValueError(f"{function}: {name} must be [H, W], got shape {array.shape}")
        array = np.ascontiguousarray(array, np.uint8 if array.dtype in (np.uint8, np.bool_) else np.int64)
        for one in array if array.ndim == 3 else (array,):
            yield f"label map {index}{source}", one
            index += 1


def _read(function: str, name: str, path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path)
        with _optional("PIL.Image", f"{function}: {name}").open(path) as file:
            array = np.asarray(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{function}: {name} cannot be read: {str(error).splitlines()[0]}") from error
    if array.ndim != 2:
        raise ValueError(f"{function}: {name} must have one channel of class ids, got shape {array.shape}")
    return array


def _add(function: str, windows: Any, name: str, array: np.ndarray, ignore_index: int, ignore: str) -> None:
    wrong = windows.add(array, ignore_index, 0 if ignore == "background" else -1, ignore == "drop_window")
    if wrong >= 0:
        y, x = divmod(wrong, array.shape[1])
        raise ValueError(
            f"{function}: {name} has label {array[y, x]} at row {y}, column {x}, which is neither in "
            f"[0, {windows.num_classes}) nor ignore_index={ignore_index}"
        )


def _bar(progress: bool, what: str, unit: str, total: int | None) -> Any:
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return _NoBar()
    return tqdm(desc=what, unit=unit, total=total, disable=not progress)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        pass


def _prefix_sums(grid: np.ndarray, axis: int = 0) -> np.ndarray:
    """Over rows and columns (``axis`` and the next), in place: from mixed differences to values."""
    np.cumsum(grid, axis=axis, out=grid)
    return np.cumsum(grid, axis=axis + 1, out=grid)


def _suffix_sums(table: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """The transpose of _prefix_sums, of [r²K] or [r²K, C]."""
    reverse = np.cumsum(table.reshape(*grid[:2], -1)[::-1, ::-1], axis=0)
    np.cumsum(reverse, axis=1, out=reverse)
    return np.ascontiguousarray(reverse[::-1, ::-1]).reshape(table.shape)


def _dense_pca(
    gram: np.ndarray, grid: tuple[int, int, int], mean: np.ndarray, count: int, channels: int, seed: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [C~], largest first, and eigenvectors [N, C~]; overwrites the corners' Gram matrix."""
    r, _, k = grid
    _prefix_sums(gram.reshape(r, r, -1))
    _prefix_sums(gram.reshape(-1, r, r, k), axis=1)
    covariance = gram / count
    covariance -= np.outer(mean, mean)
    if len(mean) > _LANCZOS and channels < len(mean) // 4:
        try:
            return _eigsh(lambda v: covariance @ v, len(mean), channels, seed, progress)
        except ImportError:
            pass
    values, vectors = np.linalg.eigh(covariance)
    return values[: -channels - 1 : -1], vectors[:, : -channels - 1 : -1].copy()


def _sparse_pca(
    windows: Any, grid: tuple[int, int, int], mean: np.ndarray, count: int, channels: int, seed: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The same without the covariance: its product with a vector comes straight from the windows."""

    def product(v: np.ndarray) -> np.ndarray:
        second = windows.gram_product(_suffix_sums(v, grid), _threads())
        return _prefix_sums(second.reshape(grid)).ravel() / count - mean * (mean @ v)

    return _eigsh(product, len(mean), channels, seed, progress)


def _eigsh(
    product: Callable[[np.ndarray], np.ndarray], entries: int, channels: int, seed: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    linalg = _optional("scipy.sparse.linalg", f"PCA of windows with {entries} entries")

    start = np.random.default_rng(seed).standard_normal(entries)
    with _bar(progress, "PCA", "product", None) as bar:

        def counted(v: np.ndarray) -> np.ndarray:
            bar.update()
            return product(v.ravel())

        operator = linalg.LinearOperator((entries, entries), matvec=counted, dtype=np.float64)
        values, vectors = linalg.eigsh(operator, k=channels, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]


def _descend(
    windows: Any, channels: int, epochs: int, lr: float, batch_size: int, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """W and P by minimising the mean of (v - W P v)²."""
    entries = windows.entries
    generator = torch.Generator().manual_seed(seed)
    projection, weight = torch.empty(channels, entries), torch.empty(entries, channels)
    for matrix in (projection, weight):
        torch.nn.init.kaiming_normal_(matrix, generator=generator)
        matrix.requires_grad_()
    optimizer = torch.optim.Adam([projection, weight], lr=lr)
    steps = epochs * -(-len(windows) // batch_size)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    with torch.enable_grad(), _bar(progress, "SGD", "step", steps) as bar:
        for _ in range(epochs):
            for indices in torch.randperm(len(windows), generator=generator).split(batch_size):
                v = torch.from_numpy(windows.one_hot(indices.numpy(), _threads()))
                loss = torch.nn.functional.mse_loss(v @ projection.T @ weight.T, v)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return weight.detach(), projection.detach()
