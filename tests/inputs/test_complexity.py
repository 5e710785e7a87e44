"""How much there is to see in an image: pictures made by hand, of which every number is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diag.inputs.complexity import colour_entropy, complexity_of, edge_density


def test_a_step_has_edges_on_both_sides_of_it() -> None:
    pixels = np.zeros((12, 22, 3), np.uint8)
    pixels[:, 11:] = 255
    assert edge_density(pixels) == pytest.approx(2 / 20)  # 20 columns have neighbours
    assert edge_density(pixels.transpose(1, 0, 2)) == pytest.approx(2 / 20)
    faint = np.zeros_like(pixels)
    faint[:, 11:] = 20  # 8 % of the way to white: no edge
    assert edge_density(faint) == 0.0
    assert edge_density(np.zeros((2, 9, 3), np.uint8)) == 0.0


def test_edges_are_those_of_a_loop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    luma = (pixels / 255) @ [0.299, 0.587, 0.114]
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    edges = 0
    for row in range(1, 8):
        for column in range(1, 6):
            patch = luma[row - 1 : row + 2, column - 1 : column + 2]
            edges += np.hypot((patch * kernel).sum(), (patch * kernel.T).sum()) > 0.1
    assert edge_density(pixels) == pytest.approx(edges / 35)


def test_colours_share_their_entropy() -> None:
    assert colour_entropy(np.full((4, 4, 3), 77, np.uint8)) == 0.0
    four = np.zeros((4, 4, 3), np.uint8)
    four[1, :, 0] = four[2, :, 1] = four[3, :, 2] = 255
    assert colour_entropy(four) == pytest.approx(2.0)
    near = np.zeros((2, 2, 3), np.uint8)
    near[0] = 31  # the same of eight levels
    assert colour_entropy(near) == 0.0


def test_size_does_not_count() -> None:
    checks = Image.fromarray(np.kron(np.eye(2), np.full((128, 128), 255)).astype(np.uint8))
    large = checks.resize((1024, 1024), Image.Resampling.NEAREST)
    small, same = complexity_of(checks), complexity_of(large)
    assert small["edge_density"] == pytest.approx(same["edge_density"], abs=0.01)
    assert small["edge_density"] > 0
