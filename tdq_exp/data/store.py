"""A generated image set on disk: one memory-mapped uint8 array, and a map of the groups that are finished."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdq_exp.data.grouped import GroupedArray


class ImageStore(GroupedArray):
    """Images of one sampling run, uint8 `[N, H, W, C]`.

    Args:
        folder: holds `images.npy` and `groups.npy`.
        images: N.
        batch: images of a group.
        shape: (H, W, C).

    Raises:
        ValueError: if the files there are of another set.
        OSError: if the folder can't be written.
    """

    def __init__(self, folder: Path, images: int, batch: int, shape: tuple[int, int, int]) -> None:
        super().__init__(folder, "images", (images, *shape), np.uint8, batch, again="sample", elsewhere="out")
        self.images, self.batch = images, batch

    def read(self) -> NDArray[np.uint8]:
        """The whole set, memory-mapped.

        Raises:
            ValueError: if images are missing: fewer than asked is an error, never a number.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self.groups} groups of images are missing; "
                "run the same command again to finish them"
            )
        return super().read()
