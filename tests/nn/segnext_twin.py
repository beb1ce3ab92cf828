"""The SegNeXt family in plain PyTorch, under the official parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise(c: int, k: int, w: int, dilation: int = 1) -> nn.Conv2d:
    padding = (k // 2 * dilation, w // 2 * dilation)
    return nn.Conv2d(c, c, (k, w), padding=padding, groups=c, dilation=dilation)


class TwinMSCA(nn.Module):
    def __init__(self, c, lengths):
        super().__init__()
        self.conv0 = depthwise(c, 5, 5)
        for i, k in enumerate(lengths):
            setattr(self, f"conv{i}_1", depthwise(c, 1, k))
            setattr(self, f"conv{i}_2", depthwise(c, k, 1))
        self.conv3 = nn.Conv2d(c, c, 1)
        self.pairs = len(lengths)

    def forward(self, x):
        a = self.conv0(x)
        branches = [getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(a)) for i in range(self.pairs)]
        return self.conv3(a + sum(branches)) * x


class TwinLKA(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv0, self.conv_spatial = depthwise(c, 5, 5), depthwise(c, 7, 7, dilation=3)
        self.conv1 = nn.Conv2d(c, c, 1)

    def forward(self, x):
        return self.conv1(self.conv_spatial(self.conv0(x))) * x


class TwinBlock(nn.Module):
    def __init__(self, c, ratio, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.attn = nn.Module()
        self.attn.proj_1, self.attn.proj_2 = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.attn.spatial_gating_unit = attention
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Conv2d(c, ratio * c, 1), nn.Conv2d(ratio * c, c, 1)
        self.mlp.dwconv = nn.Module()
        self.mlp.dwconv.dwconv = depthwise(ratio * c, 3, 3)
        self.layer_scale_1, self.layer_scale_2 = nn.Parameter(torch.empty(c)), nn.Parameter(torch.empty(c))

    def forward(self, x):
        y = self.norm1(x)
        y = y + self.attn.proj_2(self.attn.spatial_gating_unit(F.gelu(self.attn.proj_1(y))))
        x = x + self.layer_scale_1.view(1, -1, 1, 1) * y
        y = self.mlp.fc2(F.gelu(self.mlp.dwconv.dwconv(self.mlp.fc1(self.norm2(x)))))
        return x + self.layer_scale_2.view(1, -1, 1, 1) * y


class TwinMSCAN(nn.Module):
    def __init__(self, embed_dims, depths, mlp_ratios, strip_lengths, attention="msca"):
        super().__init__()
        before = 3
        for i, (c, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True), 1):
            embed = nn.Module()
            if i == 1:
                embed.proj = nn.Sequential(
                    nn.Conv2d(3, c // 2, 3, 2, 1), nn.BatchNorm2d(c // 2), nn.GELU(), nn.Conv2d(c // 2, c, 3, 2, 1),
                    nn.BatchNorm2d(c),
                )  # fmt: skip
            else:
                embed.proj, embed.norm = nn.Conv2d(before, c, 3, 2, 1), nn.BatchNorm2d(c)
            setattr(self, f"patch_embed{i}", embed)
            gates = [TwinMSCA(c, strip_lengths) if attention == "msca" else TwinLKA(c) for _ in range(depth)]
            setattr(self, f"block{i}", nn.ModuleList(TwinBlock(c, ratio, gate) for gate in gates))
            setattr(self, f"norm{i}", nn.LayerNorm(c))
            before = c

    def forward(self, x):
        maps = []
        for i in range(1, 5):
            embed = getattr(self, f"patch_embed{i}")
            x = embed.proj(x) if i == 1 else embed.norm(embed.proj(x))
            for block in getattr(self, f"block{i}"):
                x = block(x)
            n, c, h, w = x.shape
            tokens = getattr(self, f"norm{i}")(x.flatten(2).transpose(1, 2))
            x = tokens.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()
            maps.append(x)
        return maps


def nmf(x: Tensor, b: Tensor, steps: int) -> Tensor:
    n, d, h, w = x.shape
    x = x.view(n, d, h * w)
    c = torch.softmax(torch.bmm(x.transpose(1, 2), b), -1)
    for _ in range(steps):
        c = c * torch.bmm(x.transpose(1, 2), b) / (c.bmm(b.transpose(1, 2).bmm(b)) + 1e-6)
        b = b * torch.bmm(x, c) / (b.bmm(c.transpose(1, 2).bmm(c)) + 1e-6)
    c = c * torch.bmm(x.transpose(1, 2), b) / (c.bmm(b.transpose(1, 2).bmm(b)) + 1e-6)
    return torch.bmm(b, c.transpose(1, 2)).view(n, d, h, w)


class Norm(nn.Module):
    """A 1x1 convolution and GroupNorm, without activation."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.gn = nn.GroupNorm(groups, c_out)

    def forward(self, x):
        return self.gn(self.conv(x))


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class TwinHam(nn.Module):
    def __init__(self, widths, classes, d, groups, context="ham", steps=(6, 7)):
        super().__init__()
        self.steps = steps
        self.squeeze, self.align = Norm(sum(widths), d, groups), Norm(d, d, groups)
        self.conv_seg = nn.Conv2d(d, classes, 1)
        if context == "ham":
            self.hamburger = nn.Module()
            self.hamburger.ham_in = nn.Module()
            self.hamburger.ham_in.conv = nn.Conv2d(d, d, 1)
            self.hamburger.ham_out = Norm(d, d, groups)
        else:
            self.context = {"nl": TwinNL, "cc": TwinCC, "ema": TwinEMA}[context](d, groups)

    def forward(self, features, bases=None):
        f = torch.cat([up(x, features[0]) for x in features], 1)
        s = self.squeeze(f).relu()
        if bases is None:
            m = self.context(s)
        else:
            x = self.hamburger.ham_in.conv(s).relu()
            h = nmf(x, bases.expand(len(s), -1, -1), self.steps[0 if self.training else 1])
            m = (s + self.hamburger.ham_out(h)).relu()
        return self.conv_seg(self.align(m).relu())


class TwinNL(nn.Module):
    def __init__(self, d, groups):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(d, d // 2, 1) for _ in range(3))
        self.conv_out = Norm(d // 2, d, groups)

    def forward(self, x):
        n, d, h, w = x.shape
        logits = torch.bmm(self.theta(x).flatten(2).transpose(1, 2), self.phi(x).flatten(2)) / (d // 2) ** 0.5
        y = torch.bmm(self.g(x).flatten(2), logits.softmax(-1).transpose(1, 2))
        return x + self.conv_out(y.view(n, d // 2, h, w))


class TwinCC(nn.Module):
    """Criss-cross attention, pixel by pixel."""

    def __init__(self, d, groups):
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(d, d // 8, 1), nn.Conv2d(d, d // 8, 1), nn.Conv2d(d, d, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def once(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        rows = []
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                cross = [(a, j) for a in range(x.shape[2]) if a != i] + [(i, b) for b in range(x.shape[3])]
                keys = torch.stack([k[:, :, a, b] for a, b in cross], 2)
                values = torch.stack([v[:, :, a, b] for a, b in cross], 2)
                weights = (q[:, :, i, j, None] * keys).sum(1).softmax(1)
                rows.append((values * weights[:, None]).sum(2))
        return x + self.gamma * torch.stack(rows, 2).view_as(x)

    def forward(self, x):
        return self.once(self.once(x))


class TwinEMA(nn.Module):
    def __init__(self, d, groups):
        super().__init__()
        self.mid, self.out = nn.Conv2d(d, d, 1), Norm(d, d, groups)
        self.register_buffer("bases", torch.empty(d, 64))

    def forward(self, x):
        with torch.no_grad():
            v, b = self.mid(x).flatten(2), self.bases[None]
            for _ in range(3):
                z = torch.einsum("ncp,ncr->npr", v, b.expand(len(v), -1, -1)).softmax(2)
                b = torch.einsum("ncp,npr->ncr", v, z / z.sum(1, keepdim=True))
                b = b / b.norm(dim=1, keepdim=True)
            y = torch.einsum("ncr,npr->ncp", b, z).view_as(x)
        return (x + self.out(y.relu())).relu()


class TwinMLP(nn.Module):
    def __init__(self, widths, classes, d):
        super().__init__()
        self.convs = nn.ModuleList(self.block(c, d) for c in widths)
        self.fusion_conv = self.block(d * len(widths), d)
        self.conv_seg = nn.Conv2d(d, classes, 1)

    @staticmethod
    def block(c_in, c_out):
        block = nn.Module()
        block.conv, block.bn = nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        return block

    def forward(self, features):
        maps = [conv.bn(conv.conv(x)).relu() for conv, x in zip(self.convs, features, strict=True)]
        y = torch.cat([up(x, features[0]) for x in maps], 1)
        return self.conv_seg(self.fusion_conv.bn(self.fusion_conv.conv(y)).relu())
