import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jaxtok.eval.reconstruction import jpeg_webp, psnr, ssim


def pictures(n=3, h=24, w=19, seed=0):
    """Smooth pictures and noisy copies of them, each pair worse than the last; float32 in [0, 1]. # 2 x [N H W 3]"""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / h
    phase = rng.uniform(0, 6, (n, 1, 1, 3))
    clean = 0.5 + 0.5 * np.sin(5 * y[..., None] + 3 * x[..., None] + phase)
    noise = rng.normal(size=clean.shape) * np.linspace(0.02, 0.3, n)[:, None, None, None]
    return clean.astype(np.float32), np.clip(clean + noise, 0, 1).astype(np.float32)


def scikit_ssim(a, b):
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1)
    pairs = zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    return np.array([structural_similarity(x, y, **options) for x, y in pairs])


def test_psnr_of_a_known_error():
    a = np.full((2, 4, 4, 3), 0.5, np.float32)
    b = a + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), [20, 40], rtol=1e-4)
    assert np.isinf(psnr(a, a)).all()


def test_psnr_and_ssim_agree_with_scikit_image():
    a, b = pictures()
    wanted = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), wanted, rtol=1e-5)
    wanted = scikit_ssim(a, b)
    assert wanted[0] - wanted[2] > 0.2  # the pictures span a range, so agreement means something
    np.testing.assert_allclose(ssim(a, b), wanted, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ssim)(a, b), wanted, atol=1e-5)


def test_ssim_holds_its_precision_on_bright_flat_pictures():
    # Variances far below the squared means: where float32 loses most.
    a, b = pictures()
    a, b = 0.97 + 0.03 * a, 0.97 + 0.03 * b
    wanted = scikit_ssim(a, b)
    np.testing.assert_allclose(ssim(a, b), wanted, atol=1e-5)


def test_ssim_is_one_for_equal_pictures_and_each_picture_stands_alone():
    a, b = pictures()
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-5)
    np.testing.assert_allclose(ssim(a, b)[1], ssim(a[1:2], b[1:2])[0], atol=1e-6)


def test_bytes_and_floats_give_the_same_and_values_outside_are_clipped():
    a, b = (np.round(255 * x).astype(np.uint8) for x in pictures())
    for measure in (psnr, ssim):
        np.testing.assert_allclose(measure(a, b), measure(a / np.float32(255), b / np.float32(255)), rtol=1e-5)
        np.testing.assert_allclose(measure(a, b.astype(jnp.bfloat16) / 255), measure(a, b), rtol=0.05)
    white, brighter = np.ones((1, 11, 11, 3), np.float32), np.full((1, 11, 11, 3), 1.7, np.float32)
    assert np.isinf(psnr(white, brighter)).all()
    np.testing.assert_allclose(ssim(white, brighter), 1, atol=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pictures_that_cannot_be_compared(measure):
    a = np.zeros((2, 16, 16, 3), np.float32)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 16, 16, 3\) and \(1, 16, 16, 3\)"):
        measure(a, a[:1])
    with pytest.raises(ValueError, match=r"\[B H W C\]"):
        measure(a[0], a[0])
    with pytest.raises(TypeError, match="int32"):
        measure(a.astype(np.int32), a)


def test_ssim_needs_room_for_its_window():
    a = np.zeros((1, 10, 16, 3), np.float32)
    with pytest.raises(ValueError, match="11x11 pixels, got 10x16"):
        ssim(a, a)


def test_jpeg_and_webp_rows():
    images = (255 * pictures(h=32, w=32)[0]).astype(np.uint8)
    rows = {row["codec"]: row for row in jpeg_webp(images, qualities=(5, 80))}
    assert list(rows) == ["JPEG q5", "JPEG q80", "WebP q5", "WebP q80"]
    for codec in ("JPEG", "WebP"):
        low, high = rows[f"{codec} q5"], rows[f"{codec} q80"]
        assert 50 < low["bytes"] < high["bytes"] < 1500
        assert 15 < low["psnr"] < high["psnr"] - 3 < 50 and low["ssim"] < high["ssim"] < 1
    # The bytes are those of files that decode to the pictures that were scored.
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "WEBP", quality=80)
    assert rows["WebP q80"]["bytes"] == np.mean([len(file.getvalue()) for file in files])
    decoded = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_allclose(rows["WebP q80"]["psnr"], np.mean(psnr(images, decoded)), rtol=1e-6)


def test_jpeg_webp_takes_bytes_only():
    with pytest.raises(ValueError, match="float32"):
        jpeg_webp(np.zeros((1, 16, 16, 3), np.float32))
