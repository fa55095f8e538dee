"""Walking through folders of images.

Example:
    files, complaints = find_images([Path("photos")])
    classes = FolderScan().classes(Path("photos/train"))     # {"cat": [files], "dog": [files]}

Hidden files and folders, and those that a NAS, Windows or a Mac makes, are neither images nor classes.
Symbolic links are followed, and every real folder is entered once. Names may be any bytes; what is remembered
of them is the same text on every system.
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import is_folder

SUFFIXES = (*IMG_EXTENSIONS, ".jfif")
LEFT_OUT = "left out: "  # begins the line that counts files which are no images; that is no mistake
# In lower case; names that begin with a dot are hidden, too.
SYSTEM_NAMES = (
    *("__macosx", "lost+found", "desktop.ini", "thumbs.db", "$recycle.bin", "found.000"),
    *("system volume information", "network trash folder", "temporary items"),
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot"),
)


class FolderScan:
    """A scan of folders for classes and images.

    Attributes:
        left_out: Number of files that are not images, by suffix.
        closed: Errors from folders that may not be entered.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.closed: list[OSError] = []

    def classes(self, folder: Path) -> dict[str, list[Path]]:
        """Return the images of every class, a folder in ``folder``.

        Names that differ only in how Unicode composes their letters name one class.
        """
        classes = defaultdict(list)
        for name in self.inner_folders(folder):
            classes[text_of(name)].append(folder / name)
        return {name: self.images(folders) for name, folders in classes.items()}

    def inner_folders(self, folder: Path) -> list[str]:
        """Return the names of the visible folders in ``folder``."""
        if not is_folder(folder):
            return []
        _, names, _ = next(os.walk(folder, onerror=self.closed.append), (None, [], None))
        return _visible(names)

    def images(self, folders: Iterable[Path]) -> list[Path]:
        """Return the image files anywhere below, folder by folder in order of their names."""
        seen, found = set(), []
        for folder in folders:
            for root, inner, names in os.walk(folder, followlinks=True, onerror=self.closed.append):
                real = os.path.realpath(root)
                if real in seen:  # a link led here before; a loop of links would have no end
                    inner.clear()
                    continue
                seen.add(real)
                inner[:] = sorted(_visible(inner))
                found += self._image_names(root, names)
        return [Path(*names) for _, _, names in sorted(found)]

    def complaints(self) -> list[str]:
        """Return a line about every folder that may not be entered, and one about all files left out."""
        closed = [f"cannot enter the folder {error.filename}: {error.strerror}" for error in self.closed]
        kinds = [f"{count:,} {kind}" for kind, count in self.left_out.most_common()]
        return [*closed, *([LEFT_OUT + ", ".join(kinds)] if kinds else [])]

    def _image_names(self, root: str, names: list[str]) -> list[tuple[str, str, tuple[str, str]]]:
        """Return what images are sorted by, and folder and name of each."""
        found, folder = [], text_of(root)
        for name in _visible(names):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                found.append((folder, text_of(name), (root, name)))
            else:
                self.left_out[text_of(suffix) or "without extension"] += 1
        return found


def find_images(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Find image files.

    Args:
        paths: Files and folders; folders are replaced by the images anywhere below them, in order of their
            names.

    Returns:
        The files, and complaints, one line each: about folders without images, folders that may not be
        entered, and files that are no images.
    """
    scan, files, complaints = FolderScan(), [], []
    for path in paths:
        found = scan.images([path]) if is_folder(path) else [path]
        if not found:
            complaints.append(f"the folder {path} holds no image ({suffixes_in_words()})")
        files += found
    return files, complaints + scan.complaints()


def suffixes_in_words() -> str:
    """Return in words which suffixes image files have."""
    return f"a file ending with one of {' '.join(SUFFIXES)}"


def text_of(name: str | Path) -> str:
    r"""Return a name as the same text on every system.

    Letters are composed (NFC), and bytes that are not UTF-8 written as ``\xe9``.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and name.lower() not in SYSTEM_NAMES]
