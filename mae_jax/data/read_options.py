"""What of an image file is read, beyond its colors: options that most datasets do not need."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from mae_jax.utils.errors import UserError

FILE = "file"  # the value that the file itself names


@dataclass(frozen=True)
class ReadOptions:
    """Options of `mae_jax.data.decode.decode`, as texts of the config keys `data.*`.

    nodata: samples without data become NaN: those of a number, as "-9999", or of the value that
    the file names ("file"), and always NaN and Inf ("nan": these alone). None: NaN is an error.
    bands: of a TIFF, in this order, as "B04,B03,B02" or "4,3,2": descriptions, or numbers from 1.
    None: all.

    dicom_window: of gray DICOM images, which then have 8 bits: "CENTER,WIDTH" in their units, as
    "40,400", or "file", the first window or VOI LUT of each file. None keeps their units.

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    nodata: str | None = None
    bands: str | None = None
    dicom_window: str | None = None

    def __post_init__(self):
        if self.nodata not in (None, FILE):
            try:
                float(self.nodata)
            except ValueError:
                problem = "must be a number, as -9999, or 'nan', or 'file' (GDAL's tag of a TIFF)"
                raise UserError(problem, key="data.nodata", value=self.nodata) from None
        if self.bands is not None and (not self.band_list or 0 in self.band_list):
            problem = "must be names or numbers from 1, as in B04,B03,B02 or 4,3,2"
            raise UserError(problem, key="data.bands", value=self.bands)
        if self.dicom_window not in (None, FILE) and self.window is None:
            problem = "must be 'file', or CENTER,WIDTH with a width of at least 1, as in 40,400"
            raise UserError(problem, key="data.dicom_window", value=self.dicom_window)

    @property
    def band_list(self) -> tuple[int | str, ...]:
        """Return the bands: names, or numbers from 1; empty for all."""
        text = (self.bands or "").strip()
        if text.startswith("(") and text.endswith(")"):
            text = text[1:-1]
        names = [name.strip(" '\"") for name in text.split(",")]
        return tuple(int(name) if name.isdecimal() else name for name in names if name)

    @property
    def window(self) -> tuple[float, float] | None:
        """Return center and width of `dicom_window`; None if it has none."""
        try:
            center, width = (float(x) for x in str(self.dicom_window).strip("() ").split(","))
        except ValueError:
            return None
        return (center, width) if math.isfinite(center) and 1 <= width < math.inf else None

    @property
    def of_decoded(self) -> "ReadOptions":
        """Return the options to read the results of `decode` again, as of images in memory."""
        return ReadOptions() if self.nodata is None else ReadOptions(nodata="nan")

    def is_missing(
        self, samples: Shaped[np.ndarray, "h w c"], file_value: float | None
    ) -> Shaped[np.ndarray, "h w c"]:
        """Return where samples have no data; file_value: NoData that the file names."""
        value = file_value if self.nodata == FILE else float(self.nodata or "nan")
        missing = ~np.isfinite(samples)
        if value is None or math.isnan(value):
            return missing
        if samples.dtype.kind == "f":
            with np.errstate(over="ignore"):
                value = samples.dtype.type(value)  # as rounded in the file
        return missing | (samples == value)
