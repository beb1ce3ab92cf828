"""segops.dupsampling against dense one-hot windows and a dense float64 PCA."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from segops import _native, dupsampling

if _native.why_not("_labels"):
    pytest.skip(_native.why_not("_labels"), allow_module_level=True)

IGNORED = 255


def maps_of(num_classes: int, *sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Noise on the upper half, regions on the lower one, some ignored pixels."""
    rng = np.random.default_rng(seed)
    maps = []
    for height, width in sizes:
        label = rng.integers(0, num_classes, (height, width)).astype(np.uint8)
        label[height // 2 :] = np.arange(width) * num_classes // width
        label[rng.random(label.shape) < 0.03] = IGNORED
        maps.append(label)
    return maps


def regions(count: int, side: int, num_classes: int, cells: int = 30) -> list[np.ndarray]:
    """Voronoi cells of random classes."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side]
    maps = []
    for _ in range(count):
        centres, classes = rng.uniform(0, side, (cells, 2)), rng.integers(0, num_classes, cells)
        nearest = np.stack([(y - a) ** 2 + (x - b) ** 2 for a, b in centres]).argmin(0)
        maps.append(classes[nearest].astype(np.uint8))
    return maps


def one_hot_windows(label: np.ndarray, num_classes: int, r: int, ignore: str = "zero") -> np.ndarray:
    """[windows, r²K] float64."""
    height, width = label.shape
    h, w = -(-height // r), -(-width // r)
    padded = np.full((h * r, w * r), IGNORED)
    padded[:height, :width] = label
    windows = padded.reshape(h, r, w, r).transpose(0, 2, 1, 3).reshape(h * w, r * r)
    if ignore == "background":
        windows[windows == IGNORED] = 0
    if ignore == "drop_window":
        windows = windows[(windows != IGNORED).all(1)]
    return (windows[:, :, None] == np.arange(num_classes)).reshape(len(windows), r * r * num_classes).astype(np.float64)


def dense_pca(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, eigenvalues (largest first) and eigenvectors."""
    mean = v.mean(0)
    values, vectors = np.linalg.eigh((v - mean).T @ (v - mean) / len(v))
    return mean, values[::-1], vectors[:, ::-1]


def fit(*arguments, **options):
    return dupsampling.fit(*arguments, progress=False, **options)


@pytest.mark.parametrize("ignore", dupsampling.IGNORE)
@pytest.mark.parametrize(("r", "num_classes"), [(1, 3), (2, 2), (3, 5), (4, 3), (8, 2)])
def test_windows_and_pca_equal_dense_ones(r, num_classes, ignore):
    maps = maps_of(num_classes, (16, 24), (7, 11), (31, 29), (3, 1))
    v = np.concatenate([one_hot_windows(label, num_classes, r, ignore) for label in maps])
    kernel = dupsampling._windows("test", num_classes, r)
    for label in maps:
        assert kernel.add(label, IGNORED, 0 if ignore == "background" else -1, ignore == "drop_window") == -1
    np.testing.assert_array_equal(kernel.one_hot(np.arange(len(v))[::-1].copy(), 2), v[::-1])

    mean, values, vectors = dense_pca(v)
    for channels in (1, min(5, v.shape[1]), v.shape[1]):
        got = fit(maps, num_classes, r, channels, ignore=ignore)
        assert got.num_windows == len(v)
        assert (got.weight.shape, got.projection.shape) == ((v.shape[1], channels), (channels, v.shape[1]))
        np.testing.assert_allclose(got.bias, mean, atol=1e-7)
        np.testing.assert_allclose(got.explained_variance, np.maximum(values[:channels], 0), atol=1e-12)
        assert got.total_variance == pytest.approx(values.sum(), rel=1e-12)
        weight = got.weight.double().numpy()
        np.testing.assert_allclose(weight.T @ weight, np.eye(channels), atol=1e-6)
        assert torch.equal(got.projection, got.weight.T)
        largest = (np.abs(weight) > (1 - 1e-5) * np.abs(weight).max(0)).argmax(0)
        assert (weight[largest, np.arange(channels)] > 0).all()
        if channels < len(values) and values[channels - 1] - values[channels] > 1e-6:
            np.testing.assert_allclose(weight @ weight.T, vectors[:, :channels] @ vectors[:, :channels].T, atol=1e-4)


@pytest.mark.parametrize("dense", [True, False], ids=["covariance", "products"])
def test_lanczos_equals_dense_pca(monkeypatch, dense):
    """Both ways to a few of many directions, with more corners than are collected at once."""
    monkeypatch.setattr(dupsampling, "_DENSE", 6144 if dense else 1)
    monkeypatch.setattr(dupsampling, "_LANCZOS", 1)
    monkeypatch.setattr(dupsampling, "_FLUSH", 500)
    maps = [*regions(30, 36, 5), *maps_of(5, (20, 17))]
    _, values, vectors = dense_pca(np.concatenate([one_hot_windows(label, 5, 8) for label in maps]))
    got = fit(maps, 5, 8, 20)
    np.testing.assert_allclose(got.explained_variance, values[:20], rtol=1e-9)
    assert values[19] - values[20] > 1e-3
    weight = got.weight.double().numpy()
    np.testing.assert_allclose(weight @ weight.T, vectors[:, :20] @ vectors[:, :20].T, atol=1e-5)

    again = fit(maps, 5, 8, 20)
    for field in dataclasses.fields(got):
        first, second = getattr(got, field.name), getattr(again, field.name)
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_products_do_not_depend_on_the_threads():
    maps = regions(20, 40, 6)
    kernel = dupsampling._windows("test", 6, 8)
    for label in maps:
        kernel.add(label, IGNORED, -1, False)
    v = np.concatenate([one_hot_windows(label, 6, 8) for label in maps])
    grid, rng = (8, 8, 6), np.random.default_rng(0)
    table = rng.standard_normal((v.shape[1], 3))
    sums = dupsampling._suffix_sums(table, grid)
    outputs = []
    for threads in (1, 2, 3, 40):
        gram = np.zeros((v.shape[1],) * 2, np.uint32)
        kernel.add_gram(gram, threads)
        outputs.append((gram, kernel.product(sums, threads), kernel.gram_product(sums[:, 0].copy(), threads)))
        for first, second in zip(outputs[0], outputs[-1], strict=True):
            assert np.array_equal(first, second)
    np.testing.assert_allclose(outputs[0][1], v @ table, atol=1e-11)
    back = dupsampling._prefix_sums(outputs[0][2].reshape(grid)).ravel()
    np.testing.assert_allclose(back, v.T @ (v @ table[:, 0]), atol=1e-9)


def test_long_windows_in_bounded_memory():
    """r=32, K=150: the covariance would take 189 GB."""
    maps = regions(8, 200, 150)
    tracemalloc.start()  # counts numpy's arrays, the eigenvectors' 2 C~ + 1 among them
    got = fit(maps, 150, 32, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got.weight.shape == (153_600, 8)
    assert peak < 200 << 20

    cells = np.concatenate([np.pad(m, ((0, 24), (0, 24)), constant_values=IGNORED).reshape(7, 32, 7, 32) for m in maps])
    cells = cells.transpose(0, 2, 1, 3).reshape(-1, 1024).astype(np.int64)
    known = cells != IGNORED
    dots = np.stack([((cells == cell) & known).sum(1) for cell in cells]).astype(np.float64)  # v v^T
    dots -= dots.mean(0)
    dots -= dots.mean(1, keepdims=True)
    values = np.linalg.eigvalsh(dots / len(cells))[::-1]
    np.testing.assert_allclose(got.explained_variance, values[:8], rtol=1e-8)
    assert got.total_variance == pytest.approx(values.sum(), rel=1e-9)
    weight = got.weight.double().numpy()
    codes = (weight[np.where(known, np.arange(1024) * 150 + cells, 0)] * known[..., None]).sum(1)
    np.testing.assert_allclose(np.cov(codes.T, bias=True), np.diag(values[:8]), atol=1e-5)
    np.testing.assert_allclose(weight.T @ weight, np.eye(8), atol=1e-6)


def test_every_kind_of_labels_is_read(tmp_path):
    maps = maps_of(4, (12, 15), (12, 15), (9, 20))
    paths = []
    for i, label in enumerate(maps):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(label).save(paths[-1])
    np.save(tmp_path / "0.npy", maps[0].astype(np.int32))
    fortran = np.asfortranarray(maps[1].astype(np.int16))
    want = fit(maps, 4, 4, 6)
    for labels in (
        iter(maps),
        (torch.from_numpy(label).long() for label in maps),
        paths,
        [str(path) for path in paths],
        [tmp_path / "0.npy", fortran[:, ::-1][:, ::-1], torch.from_numpy(maps[2]).t().contiguous().t()],
        [np.stack(maps[:2]).astype(np.int64), maps[2].astype(np.uint16)],
    ):
        got = fit(labels, 4, 4, 6)
        assert torch.equal(got.weight, want.weight)
        assert got.num_windows == want.num_windows
    one = fit(paths[2], 4, 4, 6)
    assert torch.equal(one.weight, fit(maps[2], 4, 4, 6).weight)
    assert torch.equal(one.weight, fit(maps[2].astype(np.int32)[None], 4, 4, 6).weight)


def test_ignore_index_may_be_any_label():
    label = maps_of(3, (10, 10))[0]
    want = fit([label], 3, 2, 4)
    for ignored in (3, -1, 77_000):
        got = fit([np.where(label == IGNORED, ignored, label.astype(np.int64))], 3, 2, 4, ignore_index=ignored)
        assert torch.equal(got.weight, want.weight)


def test_errors_name_what_is_wrong(tmp_path):
    good = np.zeros((6, 6), np.uint8)
    bad = good.copy()
    bad[4, 5] = 7
    path = tmp_path / "street.png"
    Image.fromarray(bad).save(path)
    colours = tmp_path / "colours.png"
    Image.new("RGB", (6, 6)).save(colours)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")

    wrong = "label 7 at row 4, column 5, which is neither in [0, 3) nor ignore_index=255"
    for labels, options, words in (
        ([good, path], {}, f"label map 1 ({path}) has {wrong}"),
        ([np.stack([good, good]), bad], {}, f"label map 2 has {wrong}"),
        ([np.full((2, 2), -1)], {}, "label map 0 has label -1 at row 0, column 0"),
        ([good, colours], {}, f"label map 1 ({colours}) must have one channel of class ids, got shape (6, 6, 3)"),
        ([broken], {}, f"label map 0 ({broken}) cannot be read"),
        ([tmp_path / "none.png"], {}, "No such file"),
        ([], {}, "labels must hold at least one label map, got none"),
        (iter(()), {}, "labels must hold at least one label map, got none"),
        ([np.zeros(3, int)], {}, "label map 0 must be [H, W], got shape (3,)"),
        ([good], {"channels": 13}, "channels must be at most scale_factor² * num_classes = 12"),
        ([good], {"channels": 0}, "channels must be at least 1"),
        ([good], {"num_classes": 1}, "num_classes must be at least 2"),
        ([good], {"scale_factor": 0}, "scale_factor must be at least 1"),
        ([good], {"method": "ica"}, "method must be one of 'pca', 'sgd', got 'ica'"),
        ([good], {"ignore": "skip"}, "ignore must be one of 'zero', 'background', 'drop_window', got 'skip'"),
        ([good], {"method": "sgd", "lr": float("nan")}, "lr must be positive"),
        ([np.zeros((1, 9), np.uint8)], {"ignore": "drop_window"}, "no window left"),
    ):
        with pytest.raises(ValueError) as caught:
            fit(labels, **{"num_classes": 3, "scale_factor": 2, "channels": 4, **options})
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="label map 0 must have an integer dtype, got float32"):
        fit([torch.zeros(4, 4)], 3, 2, 4)
    with pytest.raises(TypeError, match=r"channels must be an int, got 4\.0"):
        fit([good], 3, 2, 4.0)

    learned = fit([good], 3, 2, 4)
    for arguments, words in (
        (([good], (5,)), "reconstruct: channels must be at most the fit's 4, got 5"),
        (([good], ()), "reconstruct: channels must name at least one C~"),
        (([], None), "reconstruct: labels must hold at least one label map"),
        (([good, bad], None), f"reconstruct: label map 1 has {wrong}"),
    ):
        with pytest.raises(ValueError) as caught:
            dupsampling.reconstruct(arguments[0], learned, channels=arguments[1], progress=False)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="label must be one label map, got 2"):
        dupsampling.roundtrip(np.stack([good, good]), learned)


def test_a_wrong_label_changes_nothing():
    kernel = dupsampling._windows("test", 3, 2)
    good, bad = maps_of(3, (8, 8), (8, 8))
    kernel.add(good, IGNORED, -1, False)
    before = len(kernel), kernel.corners, kernel.sum()
    bad[7, 3] = 9
    assert kernel.add(bad, IGNORED, -1, False) == 7 * 8 + 3
    assert (len(kernel), kernel.corners) == before[:2]
    assert np.array_equal(kernel.sum(), before[2])


def test_sgd_comes_close_to_pca():
    maps = regions(40, 48, 3, cells=8)
    v = np.concatenate([one_hot_windows(label, 3, 4) for label in maps])
    pca = fit(maps, 3, 4, 8)
    sgd = fit(maps, 3, 4, 8, method="sgd", epochs=20, lr=3e-2, batch_size=64)
    short = fit(maps, 3, 4, 8, method="sgd", epochs=1, lr=3e-2, batch_size=64)
    assert torch.equal(sgd.bias, torch.zeros(48))

    def error(learned) -> float:
        weight, projection, bias = (t.double().numpy() for t in (learned.weight, learned.projection, learned.bias))
        return float((((v - bias) - (v - bias) @ projection.T @ weight.T) ** 2).sum() / len(v))

    best = error(pca)
    assert best == pytest.approx(pca.total_variance - pca.explained_variance.sum().item(), rel=1e-5)
    assert best < error(sgd) < 1.25 * best < error(short)
    assert 0.95 < sgd.explained_variance.sum() / pca.explained_variance.sum() < 1
    assert (sgd.explained_variance.diff() <= 0).all()

    same, other = (fit(maps, 3, 4, 8, method="sgd", epochs=1, lr=3e-2, batch_size=64, seed=s) for s in (0, 1))
    assert torch.equal(same.weight, short.weight)
    assert not torch.equal(other.weight, short.weight)
    with torch.no_grad():
        assert torch.equal(fit(maps, 3, 4, 8, method="sgd", epochs=1, lr=3e-2, batch_size=64).weight, short.weight)
    with pytest.raises(ValueError, match="channels must be the fit's 8"):
        dupsampling.reconstruct(maps, sgd, channels=(4,), progress=False)
    assert dupsampling.reconstruct(maps, sgd, progress=False).scores[8].miou > 0.9


@pytest.mark.parametrize("ignore", dupsampling.IGNORE)
def test_full_rank_reconstruction_is_perfect_and_tables_are_ordered(ignore):
    maps = maps_of(3, (12, 20), (13, 19), (8, 8))
    learned = fit(maps, 3, 4, 48, ignore=ignore)
    table = dupsampling.reconstruct(iter(maps), learned, channels=(48, 4, 1, 16), progress=False)
    assert list(table.scores) == [1, 4, 16, 48]
    assert table.scores[48].miou == 1
    accuracy = [table.scores[channels].accuracy for channels in table.scores]
    assert accuracy == sorted(accuracy)
    assert table.bilinear.accuracy < table.scores[16].accuracy
    assert table.num_maps == 3
    lines = str(table).splitlines()
    assert [line.split()[-3] for line in lines] == ["C~", "K", "1", "4", "16", "48"]


def test_roundtrip_equals_dense_formulas():
    maps = maps_of(3, (13, 18))
    (label,) = maps
    learned = fit(maps, 3, 4, 6)
    bilinear, decoded = dupsampling.roundtrip(label, learned, channels=(2, 6))
    v = one_hot_windows(label, 3, 4)
    for channels, got in decoded.items():
        part = learned.truncated(channels)
        weight, mean = part.weight.double().numpy(), part.bias.double().numpy()
        z = ((v - mean) @ weight @ weight.T + mean).reshape(4, 5, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 20, 3)
        assert np.array_equal(got, z.argmax(-1)[:13, :18])
    counts = v.reshape(4, 5, 16, 3).sum(2)
    shares = torch.from_numpy(counts / counts.sum(-1, keepdims=True))
    full = torch.nn.functional.interpolate(shares.permute(2, 0, 1)[None], (16, 20), mode="bilinear")
    assert (bilinear == full[0, :, :13, :18].argmax(0)).float().mean() > 0.99  # ties may round either way
    assert learned.truncated(2).channels == 2
    with pytest.raises(ValueError, match="truncated: channels must be at most the fit's 6, got 7"):
        learned.truncated(7)


def test_progress_bar(capsys):
    dupsampling.fit(regions(3, 8, 3), 3, 4, 2)
    shown = capsys.readouterr().err
    assert "label maps: 100%" in shown
    assert "3/3" in shown
    fit(regions(3, 8, 3), 3, 4, 2)
    assert not capsys.readouterr().err


def test_without_what_is_optional():
    """No scipy, tqdm or Pillow; then no segops._labels."""
    code = """
import sys
for name in ("scipy", "scipy.sparse", "scipy.sparse.linalg", "tqdm", "PIL", "PIL.Image"):
    sys.modules[name] = None
import torch, segops
from segops import _native, dupsampling
labels = [torch.arange(4096).view(64, 64) % 3]
print(tuple(dupsampling.fit(labels, 3, 16, 4).weight.shape))
for arguments in ((labels, 10, 32, 4), (["street.png"], 3, 2, 4)):
    try:
        dupsampling.fit(*arguments)
    except ImportError as error:
        print(error)
_native._reasons["_labels"] = "segops._labels was not built"
try:
    dupsampling.fit(labels, 3, 16, 4)
except RuntimeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    shape, scipy, pillow, native = ran.stdout.splitlines()
    assert shape == "(768, 4)"
    assert "needs scipy: pip install 'segops[dupsampling]'" in scipy
    assert "street.png) needs Pillow: pip install 'segops[dupsampling]'" in pillow
    assert native.startswith("fit: segops._labels was not built")
