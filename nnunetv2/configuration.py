"""Numbers that hold for the whole package."""

import os

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

default_num_processes = int(os.environ.get("nnUNet_def_n_proc", 8))
"""Worker processes of everything but data augmentation."""

ANISO_THRESHOLD = 3
"""A spacing (or shape) is anisotropic if its largest entry exceeds its smallest more than so many times."""

default_n_proc_DA = get_allowed_n_proc_DA()
"""Worker processes of data augmentation."""
