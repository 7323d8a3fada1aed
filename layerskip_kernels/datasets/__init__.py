"""The data sets that the measuring commands know: from the hub, from a local file, from a Python package."""

from layerskip_kernels.datasets.formats import DATASETS, Format, Sample
from layerskip_kernels.datasets.load import load_samples

__all__ = ["DATASETS", "Format", "Sample", "load_samples"]
