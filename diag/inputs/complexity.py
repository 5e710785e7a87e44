"""How much there is to see in an image, by numbers of its pixels alone: edge density and colour entropy.

Images are made 256 pixels long first, so that what is counted does not hang on how large a photograph is.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from diag.inputs.images import rgb

SIDE = 256
"""Pixels of the longer side; smaller images stay as they are."""
EDGE = 0.1
"""From which gradient on a pixel is an edge, as a share of the step from black to white."""
LEVELS = 8
"""Levels of each of three colours in the histogram: 512 cells, so that the entropy is 9 bits at most."""

EDGE_DENSITY, COLOUR_ENTROPY = "edge_density", "colour_entropy"
MEASURES = {EDGE_DENSITY: "edge density (share of pixels)", COLOUR_ENTROPY: "colour entropy (bits)"}
"""Measure of complexity -> its axis."""


def complexity_of(image: Image.Image) -> dict[str, float]:
    """Every measure of `MEASURES` of one image. Raises UnreadableInput as `diag.inputs.images.rgb` does."""
    seen = rgb(image)
    seen.thumbnail((SIDE, SIDE))
    pixels = np.asarray(seen)
    return {EDGE_DENSITY: edge_density(pixels), COLOUR_ENTROPY: colour_entropy(pixels)}


def edge_density(pixels: np.ndarray) -> float:
    """The share of pixels `[height, width, 3]` of uint8 whose Sobel gradient of luma is above `EDGE`.

    The gradient of a straight step from black to white is 1; borders, which have no neighbours, do not count.
    """
    luma = pixels.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
    if min(luma.shape) < 3:
        return 0.0
    down = luma[2:] - luma[:-2]
    across = luma[:, 2:] - luma[:, :-2]
    vertical = (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) / 4
    horizontal = (across[:-2] + 2 * across[1:-1] + across[2:]) / 4
    return float((np.hypot(vertical, horizontal) > EDGE).mean())


def colour_entropy(pixels: np.ndarray) -> float:
    """Entropy in bits of the joint histogram of red, green and blue, `LEVELS` levels each."""
    level = pixels.astype(int) * LEVELS // 256
    cells = (level[..., 0] * LEVELS + level[..., 1]) * LEVELS + level[..., 2]
    shares = np.bincount(cells.reshape(-1)) / cells.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # not minus nought
