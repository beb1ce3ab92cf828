"""HFGD's parts in plain PyTorch, as its authors' code computes them: same parameters under the same names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .twins import conv_bn


def up(x: Tensor, size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def cbr(block: nn.Module, x: Tensor) -> Tensor:
    return block.bn(block.conv(x)).relu()


def attend(q: Tensor, k: Tensor, v: Tensor, axis: str, heads: int, scale: float) -> Tensor:
    """Along one axis, with the permuted copies that scaled_dot_product_attention wants."""

    def lines(x: Tensor) -> Tensor:  # [N * other axis, heads, axis, d]
        x = x.unflatten(1, (heads, -1))
        x = x.permute(0, 4, 1, 3, 2) if axis == "height" else x.permute(0, 3, 1, 4, 2)
        return x.flatten(0, 1)

    y = F.scaled_dot_product_attention(lines(q), lines(k), lines(v), scale=scale).unflatten(0, (q.shape[0], -1))
    y = y.permute(0, 2, 4, 3, 1) if axis == "height" else y.permute(0, 2, 4, 1, 3)
    return y.flatten(1, 2)


class TwinSelfAttention(nn.Module):
    def __init__(self, channels: int, qk: int, scale: float = 1.0) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, qk, 1), nn.Conv2d(channels, qk, 1)
        self.value, self.scale = nn.Conv2d(channels, channels, 1), scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (conv(x).flatten(2).mT.unsqueeze(1) for conv in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).squeeze(1).mT.reshape(x.shape)


class TwinAxial(nn.Module):
    """The multi-head form: height, then width on its result."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, y = self.query(x), self.key(x), self.value(x)
        for axis in ("height", "width"):
            y = attend(q, k, y, axis, self.heads, (q.shape[1] // self.heads) ** -0.5)
        return y


class TwinFPN(nn.Module):
    """Every level resized on its own, then the sum."""

    def __init__(self, widths, channels: int, lateral: int, last: bool, doublings: int = 0) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_bn(c, channels, lateral) for c in widths[: len(widths) - (not last)])
        depths = [max(1, i) + doublings for i in range(len(widths))]
        self.levels = nn.ModuleList(nn.ModuleList(conv_bn(channels, channels, 3) for _ in range(n)) for n in depths)
        self.closing = conv_bn(channels, channels, 1)
        self.doublings = doublings

    def forward(self, features) -> Tensor:
        pyramid = [cbr(block, x) for block, x in zip(self.laterals, features, strict=False)]
        pyramid += features[len(pyramid) :]
        for i in reversed(range(len(pyramid) - 1)):
            pyramid[i] = pyramid[i] + up(pyramid[i + 1], pyramid[i].shape[2:])
        total = None
        for i, x in enumerate(pyramid):
            for j, block in enumerate(self.levels[i]):
                x = cbr(block, x)
                finer = i - 1 - j
                if finer >= 0:
                    x = up(x, pyramid[finer].shape[2:])
                elif j >= max(i, 1):
                    x = up(x, [2 * side - side % 2 for side in x.shape[2:]])
            total = x if total is None else total + x
        return cbr(self.closing, total)


class TwinCAE(nn.Module):
    def __init__(self, width: int, channels: int, out: int, qk: int) -> None:
        super().__init__()
        self.leading = nn.ModuleList([conv_bn(width, channels, 1), conv_bn(channels, channels, 1)])
        self.attention = TwinSelfAttention(channels, qk)
        self.linear = nn.Conv2d(channels, channels, 1)
        self.trailing = conv_bn(channels, out, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.leading:
            x = cbr(block, x)
        linear = self.linear(x + self.attention(x))
        return linear, cbr(self.trailing, linear)


class TwinHFGD(nn.Module):
    """HFGDHead with encoder, U-SFPN, axial attention and guidance."""

    def __init__(self, widths, classes: int, channels: int, context: int, qk: int, heads: int, doublings: int) -> None:
        super().__init__()
        self.encoder = TwinCAE(widths[-1], context, channels, qk)
        self.neck = TwinFPN((*widths[:-1], channels), channels, 3, False, doublings)
        self.axial = TwinAxial(channels, heads)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def branches(self, features) -> tuple[Tensor, Tensor, Tensor]:
        """Fine logits, coarse logits, and the map of CAR."""
        *finer, c5 = features
        linear, f_c = self.encoder(c5)
        f_a = self.axial(self.neck([x.detach() for x in (*finer, f_c)]))
        fine = F.conv2d(f_a, self.classifier.weight.detach(), self.classifier.bias.detach())
        return fine, self.classifier(f_c), linear

    def forward(self, features) -> Tensor:
        return self.branches(features)[0]

    def loss(self, features, target: Tensor, car: bool = True) -> Tensor:
        fine, coarse, linear = self.branches(features)
        wanted = target.long()
        loss = sum(F.cross_entropy(up(z, target.shape[1:]), wanted, ignore_index=255) for z in (fine, coarse))
        return loss + sum(plain_car(linear, wanted, self.classifier.out_channels)) if car else loss

    @torch.no_grad()
    def predict(self, features, size) -> Tensor:
        return up(self(features), size).argmax(1)


def plain_car(x: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """CAR's losses with one-hot matrix products, centres of the batch (CAR, car_core)."""
    _, c, h, w = x.shape
    rows, columns = (
        ((torch.arange(out) * (into - 1) / max(out - 1, 1)) + 0.5).floor().long()
        for out, into in ((h, target.shape[1]), (w, target.shape[2]))
    )
    labels = target[:, rows][:, :, columns].flatten()
    known = (labels != 255).to(x)
    hot = F.one_hot(labels.where(labels != 255, 0), classes).to(x) * known[:, None]
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c)
    mu = (hot.mT @ pixels) / hot.sum(0).clamp(min=1)[:, None]
    fixed = mu.detach()
    intra = ((hot @ fixed - pixels).abs() * known[:, None]).mean().square().clamp(min=1e-5)
    low, high = 1e-7, 1 - 1e-7
    a = (mu @ fixed.mT / c**0.5).softmax(1)
    others = ~torch.eye(classes, dtype=torch.bool, device=x.device)
    c2c = ((a - 0.5 / (classes - 1)).relu() * others).sum(1).clamp(low, high).mean().square()
    energy = torch.where(hot > 0, fixed.square().sum(1), pixels @ fixed.mT)
    b = (energy / c**0.5).softmax(1)
    c2p = ((b - 0.25 / (classes - 1)).relu() * (hot == 0)).sum(1).clamp(low, high).mean().square()
    return intra, c2c, c2p
