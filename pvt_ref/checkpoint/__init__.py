"""Reading and writing weights: one file per format, one for key maps, one for recognising."""

from pvt_ref.checkpoint.files import load, save

__all__ = ["load", "save"]
