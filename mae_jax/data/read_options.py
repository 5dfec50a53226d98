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

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    nodata: str | None = None
    bands: str | None = None

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

    @property
    def band_list(self) -> tuple[int | str, ...]:
        """Return the bands: names, or numbers from 1; empty for all."""
        text = (self.bands or "").strip()
        if text.startswith("(") and text.endswith(")"):
            text = text[1:-1]
        names = [name.strip(" '\"") for name in text.split(",")]
        return tuple(int(name) if name.isdecimal() else name for name in names if name)

    @property
    def of_decoded(self) -> "ReadOptions":
        """Return the options to read the results of `decode` again, as of images in memory."""
        return ReadOptions() if self.nodata is None else ReadOptions(nodata="nan")

    def is_missing(
        self, samples: Shaped[np.ndarray, "h w c"], file_value: float | None
    ) -> Shaped[np.ndarray, "h w c"]:
        """Return where samples have no data; file_value: NoData that the file names."""
        value = file_value if self.nodata in (None, FILE) else float(self.nodata)
        missing = ~np.isfinite(samples)
        if value is None or math.isnan(value):
            return missing
        if samples.dtype.kind == "f":
            with np.errstate(over="ignore"):
                value = samples.dtype.type(value)  # as rounded in the file
        return missing | (samples == value)
