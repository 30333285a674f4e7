"""What the extra ``resolver[datafusion]`` must have brought, checked before it is used."""

from __future__ import annotations

from importlib import metadata
from typing import Final

__all__ = ["DATAFUSION_MAJOR", "check"]

DATAFUSION_MAJOR: Final = 55
"""The major version of datafusion whose plan encoding ``_plan_proto`` knows."""

# As the extra ``resolver[datafusion]`` has them.
_WANTED: Final = {"datafusion": f"datafusion=={DATAFUSION_MAJOR}.*", "protobuf": "protobuf>=5"}


def check() -> None:
    """Raise ``ImportError``, with what to install, unless everything needed is there."""
    install = f"pip install {' '.join(map(repr, _WANTED.values()))}"
    for package in _WANTED:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"resolver.distributed needs {package}, which the extra [datafusion] brings: "
                f"{install}",
                name=package,
            ) from None
        if package == "datafusion" and version.partition(".")[0] != str(DATAFUSION_MAJOR):
            raise ImportError(
                f"resolver.distributed reads the plan encoding of datafusion {DATAFUSION_MAJOR}, "
                f"and datafusion {version} is installed: {install}",
                name=package,
            )
