"""Checks at the library's boundary: each says what was expected, what came and what to do."""

from torch import Tensor


def require_floats(**tensors: Tensor) -> None:
    """Raise ValueError unless every tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, expected floating-point numbers; call {name}.float() first")


def require_finite(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        # The sum is finite only if all numbers are, and takes no memory; a sum that overflows asks for a closer look.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values; check where it was computed")


def require_shape(tensor: Tensor, shape: tuple[int | None, ...], name: str, meaning: str) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``, where None stands for any size."""
    fits = tensor.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected}): {meaning}")


def require_choice(value: str, choices, name: str) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")


def require_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless all ``labels`` are numbers of classes, from 0 on."""
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(f"labels lie in [{low}, {high}], expected [0, {classes - 1}]; number the classes from 0")


def require_images(images: Tensor, size: int = 28) -> None:
    """Raise ValueError unless ``images`` is [B, 1, size, size], floating point, finite and within [0, 1]."""
    require_shape(images, (None, 1, size, size), "images", f"[batch, 1, {size}, {size}]")
    require_floats(images=images)
    require_finite(images=images)
    if images.numel() and (images.min() < 0 or images.max() > 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], expected [0, 1]; divide 8-bit images by 255")
