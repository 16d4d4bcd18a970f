"""Images that come with a package: scikit-learn's handwritten digits, as files in folders."""

from __future__ import annotations

from pathlib import Path

from model.errors import UserError
from model.files import atomic_write_text
from tools.dev import run
from tools.dev.quickstarts import DIGITS

SOURCE = "scikit-learn's digits: 8 x 8 pixels, UCI handwritten digits, CC BY 4.0\n"


def write_digits(folder: Path) -> None:
    """Writes the 1797 images as FOLDER/CLASS/*.png.

    Raises UserError where scikit-learn is missing.
    """
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are in the package scikit-learn: pip install '.[digits]'") from None
    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        # Pixels are 0 .. 16.
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"{number:04}.png")
    atomic_write_text(folder / DIGITS, SOURCE)


if __name__ == "__main__":
    run(write_digits)
