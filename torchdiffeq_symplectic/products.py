"""Sums of vector-Jacobian products: a step's are summed first and added to the total once, which halves rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Products"]


class Products:
    """The products with a list of tensors.

    Args:
        targets: the tensors.
        batched: whether products are batches in disguise, which cannot be added in place.
    """

    def __init__(self, targets: Sequence[Tensor], batched: bool = False) -> None:
        self._targets, self._in_place = targets, not batched
        self._totals: list[Tensor | None] = [None] * len(targets)
        self._indices: tuple[int, ...] = ()  # of the targets that the present step reached
        self._sums: list[Tensor] = []

    def add(self, indices: Sequence[int], products: Sequence[Tensor | None]) -> None:
        """Add the products with the targets of these numbers to the sums of the present step, None for zero."""
        present = [product for product in products if product is not None]
        if not present:
            return
        if len(present) < len(products):
            indices = [i for i, product in zip(indices, products, strict=True) if product is not None]
        if any(product.is_sparse for product in present):
            for i, product in zip(indices, present, strict=True):
                total = self._totals[i]
                self._totals[i] = product if total is None else total + product
        elif not self._sums:
            self._indices, self._sums = tuple(indices), [product.clone() for product in present]
        elif self._in_place and self._indices == tuple(indices):
            torch._foreach_add_(self._sums, present)
        else:
            self._merge(indices, present)

    def _merge(self, indices: Sequence[int], products: Sequence[Tensor]) -> None:
        sums = dict(zip(self._indices, self._sums, strict=True))
        for i, product in zip(indices, products, strict=True):
            sums[i] = sums[i] + product if i in sums else product.clone()
        self._indices, self._sums = tuple(sums), list(sums.values())

    def close_step(self) -> None:
        """Add the sums of the present step to the totals."""
        if not self._sums:
            return
        totals = [self._totals[i] for i in self._indices]
        dense = [total for total in totals if total is not None and not total.is_sparse]
        if self._in_place and len(dense) == len(totals):
            torch._foreach_add_(dense, self._sums)
        else:
            for i, total, sum_ in zip(self._indices, totals, self._sums, strict=True):
                self._totals[i] = sum_ if total is None else total + sum_
        self._indices, self._sums = (), []

    def totals(self) -> list[Tensor]:
        """The sums over all steps, zeros where a target is not used."""
        self.close_step()
        pairs = zip(self._targets, self._totals, strict=True)
        return [torch.zeros_like(target) if total is None else total for target, total in pairs]
