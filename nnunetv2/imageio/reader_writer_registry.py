"""Choose the reader and writer of a dataset's images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter, FilePath
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.trusted_names import find_class

logger = logging.getLogger(__name__)

_FOLDER = str(Path(__file__).parent)

LIST_OF_IO_CLASSES = [
    NaturalImage2DIO,
    SimpleITKIO,
    Tiff3DIO,
    NibabelIO,
    NibabelIOWithReorient,
    SimpleITKIOWithReorient,
]
"""In the order in which they are tried."""


def determine_reader_writer_from_dataset_json(
    dataset_json_content: Mapping,
    example_file: FilePath | None = None,
    allow_nonmatching_filename: bool = False,
    verbose: bool = True,
) -> type[BaseReaderWriter]:
    """Return the class that dataset.json names, else the one that its `file_ending` suggests.

    See `determine_reader_writer_from_file_ending` for the other arguments.
    """
    name = dataset_json_content.get("overwrite_image_reader_writer")
    if name not in (None, "None"):
        found = _find_by_name(name, "overwrite_image_reader_writer in dataset.json")
        if found is not None:
            _log_choice(found, verbose)
            return found
        logger.warning(
            "dataset.json names the reader %s, which is not in %s; choosing one by the file ending instead",
            name,
            _FOLDER,
        )
    return determine_reader_writer_from_file_ending(
        dataset_json_content["file_ending"], example_file, allow_nonmatching_filename, verbose
    )


def determine_reader_writer_from_file_ending(
    file_ending: str,
    example_file: FilePath | None = None,
    allow_nonmatching_filename: bool = False,
    verbose: bool = True,
) -> type[BaseReaderWriter]:
    """Return the first class that supports the ending and reads the example.

    Without an example, the ending decides.

    Args:
        file_ending: With dot; upper and lower case do not matter.
        example_file: An image to try.
        allow_nonmatching_filename: Try the example with classes for other endings, too.
        verbose: Log the choice.

    Raises:
        RuntimeError: No class fits. The message says why each one that was tried does not.
    """
    failures = []
    for candidate in LIST_OF_IO_CLASSES:
        matches = file_ending.lower() in candidate.supported_file_endings
        if not matches and (example_file is None or not allow_nonmatching_filename):
            continue
        failure = None if example_file is None else _why_unreadable(candidate, example_file)
        if failure is None:
            _log_choice(candidate, verbose)
            return candidate
        failures.append(f"{candidate.__name__}: {failure}")
    tried = f" Tried with {example_file}: {'; '.join(failures)}." if failures else ""
    raise RuntimeError(
        f"no reader found for files that end in {file_ending!r}.{tried} Name a reader in "
        "overwrite_image_reader_writer of dataset.json, or convert the images"
    )


def recursive_find_reader_writer_by_name(rw_class_name: str) -> type[BaseReaderWriter]:
    """Return a reader and writer class by its name, from nnunetv2/imageio.

    Raises:
        RuntimeError: There is none.
        UntrustedNameError: The name means something else.
    """
    found = _find_by_name(rw_class_name, "the image_reader_writer")
    if found is None:
        raise RuntimeError(f"no reader and writer named {rw_class_name!r} found in {_FOLDER}")
    return found


def _find_by_name(rw_class_name: str, field: str) -> type[BaseReaderWriter] | None:
    return find_class(rw_class_name, field=field, folder=_FOLDER, package="nnunetv2.imageio", base=BaseReaderWriter)


def _why_unreadable(reader_class: type[BaseReaderWriter], example_file: FilePath) -> str | None:
    """Return why a reader cannot read a file, or None if it can."""
    try:
        reader_class().read_images((example_file,))
    except Exception as error:  # each library has exceptions of its own, and this is a trial
        logger.debug("%s cannot read %s", reader_class.__name__, example_file, exc_info=True)
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _log_choice(reader_class: type[BaseReaderWriter], verbose: bool) -> None:
    if verbose:
        logger.info("reading images with %s", reader_class.__name__)
