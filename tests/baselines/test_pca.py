"""The Gaussian in principal components, against numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb.baselines.pca import fit_pixel_gaussian


def test_mean_directions_and_deviations_are_those_of_numpys_eigenvectors(digits):
    images = digits[0][:307]
    found = fit_pixel_gaussian(images, 7)
    flat = images.flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    assert_close(found.mean, torch.as_tensor(flat.mean(0)).float())
    assert_close(found.deviation.double(), torch.as_tensor(values[::-1][:7].copy()) ** 0.5, rtol=1e-3, atol=0)
    overlap = np.abs(np.sum(found.directions.numpy() * vectors[:, ::-1][:, :7].T, axis=1))
    assert overlap == pytest.approx(np.ones(7), abs=1e-3)


def test_samples_have_the_moments_of_the_images_except_where_they_are_cut(digits, rng):
    images = (digits[0][:503] + 4) / 9  # far from 0 and 1, so that nothing is cut
    samples = fit_pixel_gaussian(images, 500).sample(20_011, rng=rng)
    assert_close(samples.mean(0), images.mean(0), atol=0.005, rtol=0)
    assert_close(samples.flatten(1).T.cov(), images.flatten(1).T.cov(), atol=5e-4, rtol=0)
    cut = fit_pixel_gaussian(digits[0][:503], 5).sample(101, rng=rng)
    assert cut.shape == (101, 1, 28, 28) and cut.min() == 0 and cut.max() == 1


def test_more_components_than_images_are_refused(digits):
    with pytest.raises(ValueError, match="n_components=13 must be between"):
        fit_pixel_gaussian(digits[0][:11], 13)
