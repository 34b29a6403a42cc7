"""A real photograph, as a classifier wants it.

Takes: nothing; the picture (Grace Hopper, public domain, US Navy) ships inside matplotlib. Gives: a tensor
`(1, 3, 224, 224)`, float32, resized, cropped and normalised as ImageNet classifiers expect.
Must not change: anything. Errors: ImportError naming the extra to install.
"""

from __future__ import annotations

import torch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per colour


def photograph(size: int = 224) -> torch.Tensor:
    """The photograph, its shorter side resized to 8/7 of `size` and the middle `size` x `size` cut out."""
    try:
        import numpy
        from matplotlib import cbook
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{error}; the demo needs its extra: pip install 'opara-backend[demo]'") from error
    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as picture:
        scale = size * 8 / 7 / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = numpy.asarray(resized.crop((left, top, left + size, top + size)), dtype="float32")
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    return ((image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)).unsqueeze(0)
