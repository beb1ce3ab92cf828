"""Class-aware regularisation as a loss module (CAR; HFGD trains with it)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from ..ops.car_losses import CARLosses, car_losses
from ..ops.class_centers import class_centers
from ._layers import check_classes, check_map

__all__ = ["CAR"]


class CAR(nn.Module):
    """The three losses of :func:`segops.car_losses`, each times its weight; their sum is added to the cross-entropy.

    Args:
        num_classes: K >= 2.
        weights: Of intra, c2c and c2p; 1, 1, 1 in the authors' configuration.
        ignore_index: Label of pixels without a class.
        c2c_threshold: As for :func:`segops.car_losses`, as are the next three.
        c2p_threshold: See above.
        per_image: See above.
        mask_ignored_c2p: See above.
        center_momentum: m in [0, 1]: in training the buffer ``centers`` [K, C] moves by ``(1 - m) (mu - centers)`` for
            each class that is there (and whose mu is finite), and takes the place of the centres mu of the batch. c2c
            then has no gradient. The authors' m is 0.9; None (their default) keeps no buffer. It stays in float32
            where the module is cast to half precision, in which it would stand still. Under activation checkpointing
            it moves twice, and the recomputed losses, and so the gradients, are those of other centres.
        channels: C; for the buffer only.
        sync: Over which ranks centres and means are taken: False, True, a process group, or "auto": over all where
            torch.distributed is initialised. Ranks wait for each other, in eval mode too: where one rank alone
            evaluates, pass False.

    Raises:
        ValueError: K < 2, weights that are not three finite numbers, thresholds out of [0, K], a momentum out of
            [0, 1], one without ``channels`` or with ``per_image``; in forward, what :func:`segops.car_losses` raises.
        TypeError: arguments of another type.

    Example:
        >>> car = segops.nn.CAR(19)
        >>> features = torch.randn(2, 64, 16, 16, requires_grad=True)
        >>> losses = car(features, torch.randint(0, 19, (2, 128, 128)))
        >>> sum(losses).backward()
    """

    centers: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        ignore_index: int = 255,
        c2c_threshold: float = 0.5,
        c2p_threshold: float = 0.25,
        per_image: bool = False,
        mask_ignored_c2p: bool = False,
        center_momentum: float | None = None,
        channels: int | None = None,
        sync: Any = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_classes(name, num_classes)
        if len(weights) != 3:
            raise ValueError(f"{name}: weights must be three numbers (intra, c2c, c2p), got {weights!r}")
        for weight in weights:
            _checks.finite(name, "weights", weight)
        for argument, threshold in (("c2c_threshold", c2c_threshold), ("c2p_threshold", c2p_threshold)):
            _checks.number(name, argument, threshold, 0.0, num_classes)
        _checks.integer(name, "ignore_index", ignore_index)
        if isinstance(sync, str) and sync != "auto":
            raise ValueError(f"{name}: sync must be False, True, a process group or 'auto', got {sync!r}")
        self.num_classes, self.weights, self.sync = num_classes, tuple(weights), sync
        self.ignore_index, self.per_image, self.mask_ignored_c2p = ignore_index, per_image, mask_ignored_c2p
        self.c2c_threshold, self.c2p_threshold = c2c_threshold, c2p_threshold
        self.center_momentum = center_momentum
        self.register_buffer("centers", None)
        if center_momentum is not None:
            _checks.number(name, "center_momentum", center_momentum, 0.0, 1.0)
            if channels is None or per_image:
                raise ValueError(f"{name}: center_momentum needs channels, and centres of the batch (per_image=False)")
            _checks.positive(name, "channels", channels)
            self.centers = nn.init.xavier_uniform_(torch.empty(num_classes, channels, dtype=torch.float32))

    def forward(self, features: Tensor, labels: Tensor) -> CARLosses:
        """Three scalars; their sum is the loss.

        Args:
            features: [N, C, h, w].
            labels: [N, H, W], integers, H >= h and W >= w.
        """
        sync = dist.is_available() and dist.is_initialized() if self.sync == "auto" else self.sync
        losses = car_losses(
            features,
            labels,
            self.num_classes,
            centers=self._moving_centers(features, labels, sync),
            ignore_index=self.ignore_index,
            c2c_threshold=self.c2c_threshold,
            c2p_threshold=self.c2p_threshold,
            per_image=self.per_image,
            mask_ignored_c2p=self.mask_ignored_c2p,
            sync=sync,
        )
        return CARLosses(*(weight * loss for weight, loss in zip(self.weights, losses, strict=True)))

    @torch.no_grad()
    def _moving_centers(self, features: Tensor, labels: Tensor, sync: Any) -> Tensor | None:
        if self.centers is None or self.center_momentum is None:
            return None
        check_map(type(self).__name__, "features", features, self.centers.shape[1])
        if not self.training:
            return self.centers
        mean, counts = class_centers(features, labels, self.num_classes, ignore_index=self.ignore_index, sync=sync)
        moved = self.centers.lerp(mean.to(self.centers.dtype), 1 - self.center_momentum)
        known = (counts > 0) & mean.isfinite().all(1)  # one step that overflows would stay in the buffer for good
        moved = torch.where(known.unsqueeze(1), moved, self.centers)
        self.centers.copy_(moved)
        return moved  # not the buffer, which the next call changes before this one's backward

    def _apply(self, fn: Any, recurse: bool = True) -> CAR:
        kept = self.centers
        super()._apply(fn, recurse)
        if kept is not None and self.centers is not None and self.centers.dtype.itemsize < 4:
            self.centers = kept.to(self.centers.device)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.centers is not None and self.centers.dtype.itemsize < 4:  # load_state_dict(assign=True)
            self.centers = self.centers.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> CAR:
        memo[id(self.sync)] = self.sync  # a process group cannot be copied, and is not the module's
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        return f"{self.num_classes}, weights={self.weights}, per_image={self.per_image}, sync={self.sync!r}"
