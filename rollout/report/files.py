"""Writing the page to a file: whole, or what was there before stays."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from rollout.errors import UsageError


def write(path: Path, text: str) -> int:
    """Replace `path` at once; the number of bytes. UsageError where it cannot be written."""
    content = text.encode()
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            whole = Path(folder) / path.name
            whole.write_bytes(content)
            whole.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from error
    return len(content)
