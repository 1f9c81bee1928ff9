"""Data sets of images with known factors, one file per format; see `open_dataset`.

Import the names below from here, formats from their modules; imports files and errors.
"""

from encdiff.data.dataset import Dataset, SubGrid, describe, to_float, to_uint8
from encdiff.data.formats import open_dataset

__all__ = ["Dataset", "SubGrid", "describe", "open_dataset", "to_float", "to_uint8"]
