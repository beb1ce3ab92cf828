"""Made-up street scenes with exact labels, for machines without data: deterministic in (seed, index)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
}
LABEL = {name: i for i, name in enumerate(CLASSES)}


class Scenes:
    """``count`` pairs of image [H, W, 3] uint8 and label [H, W] uint8, drawn on access.

    Args:
        count: Number of scenes.
        seed: Any non-negative int; two sets with different seeds share no scene.
        size: Width and height in pixels.
    """

    def __init__(self, count: int, seed: int, size: tuple[int, int] = (240, 180)) -> None:
        self.count, self.seed, self.size = count, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return _Street(np.random.default_rng([self.seed, index]), *self.size).draw()


class _Street:
    """One scene: a straight street in one-point perspective, drawn from far to near into image and label at once."""

    def __init__(self, rng: Generator, width: int, height: int) -> None:
        self.rng, self.width, self.height = rng, width, height
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height), LABEL["sky"])
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.vanishing = np.array([width * rng.uniform(0.35, 0.65), height * rng.uniform(0.38, 0.5)])

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        self.sky()
        road = rng.uniform(-0.35, 0.1), rng.uniform(0.9, 1.35)  # where the kerbs meet the lower edge, in widths
        pavement = road[0] - rng.uniform(0.25, 0.6), road[1] + rng.uniform(0.25, 0.6)
        self.ground(-9, 10, rng.uniform(90, 130), "pavement")
        self.buildings(pavement)
        self.ground(*pavement, rng.uniform(130, 190), "pavement")
        self.ground(*road, rng.uniform(60, 105), "road")
        self.markings(*road)

        things = []
        for paint, most, left, right in (
            (self.tree, 6, pavement[0] - 0.1, road[0] - 0.05),
            (self.tree, 6, road[1] + 0.05, pavement[1] + 0.1),
            (self.pole, 3, road[0] - 0.08, road[0]),
            (self.pole, 3, road[1], road[1] + 0.08),
            (self.pedestrian, 3, pavement[0], road[0]),
            (self.pedestrian, 3, road[1], pavement[1]),
            (self.car, 4, road[0] + 0.15, road[1] - 0.15),
        ):
            things += [(rng.uniform(0.08, 0.9), paint, rng.uniform(left, right)) for _ in range(rng.integers(most + 1))]
        for nearness, paint, across in sorted(things, key=lambda thing: thing[0]):
            paint(self.at(across, nearness), nearness)
        return self.photograph(), np.array(self.label)

    def at(self, across: float, nearness: float) -> np.ndarray:
        """The ground point on the line from the vanishing point (nearness 0) to the lower edge (nearness 1)."""
        return self.vanishing + nearness * (np.array([across * self.width, self.height]) - self.vanishing)

    def colour(self, *rgb: float, spread: float = 12) -> tuple[int, ...]:
        return tuple(int(c) for c in np.clip(np.array(rgb) + self.rng.normal(0, spread, 3), 0, 255))

    def polygon(self, points: Iterable, colour: tuple[int, ...], name: str) -> None:
        points = [tuple(float(v) for v in point) for point in points]
        for pen, fill in zip(self.pens, (colour, LABEL[name]), strict=True):
            pen.polygon(points, fill=fill)

    def box(self, x: float, y: float, width: float, height: float, colour: tuple[int, ...], name: str) -> None:
        """A box that stands on (x, y), its lower middle."""
        left, right = x - width / 2, x + width / 2
        self.polygon([(left, y - height), (right, y - height), (right, y), (left, y)], colour, name)

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, ...], name: str) -> None:
        for pen, fill in zip(self.pens, (colour, LABEL[name]), strict=True):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def sky(self) -> None:
        top, low = self.colour(120, 160, 215, spread=20), self.colour(215, 220, 225, spread=15)
        rows = np.linspace(top, low, self.height).astype(np.uint8)
        self.image.paste(Image.fromarray(np.repeat(rows[:, None], self.width, 1)))
        for _ in range(self.rng.integers(5)):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0, self.vanishing[1])
            for _ in range(5):
                dx, dy = self.rng.normal(0, 12), self.rng.normal(0, 3)
                self.disc(x + dx, y + dy, self.rng.uniform(4, 10), self.colour(235, 235, 240, spread=4), "sky")

    def ground(self, left: float, right: float, grey: float, name: str) -> None:
        colour = self.colour(grey, grey, grey, spread=6)
        self.polygon([self.vanishing, self.at(right, 1), self.at(left, 1)], colour, name)

    def markings(self, left: float, right: float) -> None:
        middle, white = (left + right) / 2, self.colour(215, 215, 205)
        for near in np.geomspace(0.06, 1.2, 12) * self.rng.uniform(0.8, 1.0):
            left, right, far = middle - 0.012, middle + 0.012, near * 1.15
            ends = (left, near), (right, near), (right, far), (left, far)
            self.polygon([self.at(*end) for end in ends], white, "road")

    def buildings(self, pavement: tuple[float, float]) -> None:
        for across in pavement:
            far = 0.05
            while far < 1.5:
                near = far * self.rng.uniform(1.25, 1.9)
                if self.rng.random() < 0.85:
                    self.facade(across, far, near, self.rng.uniform(0.4, 1.8))
                far = near

    def facade(self, across: float, far: float, near: float, storeys: float) -> None:
        """A wall along the street between two nearnesses; its height falls towards the vanishing point as all does."""

        def point(along: float, up: float) -> np.ndarray:
            nearness = far + (near - far) * along
            return self.at(across, nearness) - np.array([0, up * storeys * nearness * self.height])

        palette = ((165, 120, 95), (190, 175, 150), (120, 110, 110), (150, 85, 70))
        wall = self.colour(*palette[self.rng.integers(len(palette))], spread=15)
        self.polygon([point(0, 0), point(1, 0), point(1, 1), point(0, 1)], wall, "building")
        glass = self.colour(60, 70, 85)
        columns, rows = self.rng.integers(2, 5), max(1, round(storeys * 5))
        for i in range(columns):
            for j in range(rows):
                x0, x1, y0, y1 = (i + 0.3) / columns, (i + 0.75) / columns, (j + 0.35) / rows, (j + 0.8) / rows
                self.polygon([point(x0, y0), point(x1, y0), point(x1, y1), point(x0, y1)], glass, "building")

    def tree(self, foot: np.ndarray, nearness: float) -> None:
        height = nearness * self.height * self.rng.uniform(0.5, 0.9)
        self.box(*foot, 0.08 * height, height * 0.6, self.colour(85, 65, 50), "tree")
        green = self.colour(60, 100, 45, spread=18)
        for _ in range(14):
            dx, dy = self.rng.normal(0, 0.16, 2) * height
            leaf = self.colour(*green, spread=10)
            self.disc(foot[0] + dx, foot[1] - 0.75 * height + dy, self.rng.uniform(0.08, 0.17) * height, leaf, "tree")

    def pole(self, foot: np.ndarray, nearness: float) -> None:
        height = nearness * self.height * self.rng.uniform(0.7, 1.1)
        grey = self.colour(110, 112, 115)
        self.box(*foot, max(1.5, 0.022 * height), height, grey, "pole")
        self.box(foot[0], foot[1] - 0.97 * height, 0.16 * height, max(1.5, 0.03 * height), grey, "pole")

    def pedestrian(self, foot: np.ndarray, nearness: float) -> None:
        height = nearness * self.height * self.rng.uniform(0.33, 0.4)
        x, y = foot
        self.box(x, y, 0.2 * height, 0.5 * height, self.colour(50, 50, 70, spread=20), "pedestrian")
        self.box(x, y - 0.45 * height, 0.3 * height, 0.4 * height, self.colour(140, 80, 80, spread=50), "pedestrian")
        self.disc(x, y - 0.92 * height, 0.09 * height, self.colour(205, 165, 140), "pedestrian")

    def car(self, foot: np.ndarray, nearness: float) -> None:
        height = nearness * self.height * self.rng.uniform(0.28, 0.34)
        width = height * self.rng.uniform(1.25, 1.5)
        x, y = foot
        paint, glass = self.colour(130, 110, 120, spread=70), self.colour(50, 58, 70)
        dark = self.colour(25, 25, 28, spread=4)
        for side in (-1, 1):
            self.box(x + side * 0.36 * width, y, 0.18 * width, 0.3 * height, dark, "car")
        self.box(x, y - 0.12 * height, width, 0.48 * height, paint, "car")
        roof, sill = y - height, y - 0.55 * height
        for colour, inset in ((paint, 0.0), (glass, 0.05)):
            top, low = (0.34 - inset) * width, (0.46 - inset) * width
            edge = roof + inset * 1.5 * height
            self.polygon([(x - top, edge), (x + top, edge), (x + low, sill), (x - low, sill)], colour, "car")
        lamp = self.colour(200, 60, 50) if self.rng.random() < 0.5 else self.colour(240, 235, 200)
        for side in (-1, 1):
            self.box(x + side * 0.38 * width, y - 0.36 * height, 0.14 * width, 0.1 * height, lamp, "car")

    def photograph(self) -> np.ndarray:
        """Daylight or dusk, a tint, a soft lens and sensor noise."""
        pixels = np.asarray(self.image.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
        light = self.rng.uniform(0.45, 1.1) * self.rng.normal(1, 0.05, 3)
        shade = np.linspace(1, self.rng.uniform(0.8, 1.2), self.width)[None, :, None]
        noise = self.rng.normal(0, self.rng.uniform(2, 7), pixels.shape)
        return np.clip(pixels * light * shade + noise, 0, 255).astype(np.uint8)
