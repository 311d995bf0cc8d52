"""The figures and sample grids of a stage as TensorBoard's event files.

Needs the extra ``tensorboard``: ``pip install ctm_fast[tensorboard]``. Without it, importing this module raises
ImportError.
"""

from pathlib import Path

import numpy as np
from PIL import Image

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(f"event files need tensorboard: pip install ctm_fast[tensorboard] ({error})") from error


class EventFiles:
    """Writes to ``directory``; what is there of later steps than ``start``, of a process that was killed, is void.

    A reader drops what is void, as it reads the files in order.
    """

    def __init__(self, directory: Path, start: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=start + 1)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        """Each of ``figures``, under its name, after ``step`` steps."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """A grey or RGB image."""
        pixels = np.asarray(image)
        self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def flush(self) -> None:
        """Have all of it in the files."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and end the writing thread."""
        self._writer.close()
