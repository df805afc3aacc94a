"""Says what of a requirements file is not installed in this very version: a line each, nothing if all is there."""

import importlib.metadata as metadata
import platform
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    requirement, _, condition = (part.strip() for part in line.partition(";"))
    if not requirement or requirement.startswith("#"):
        continue
    if "Linux" in condition and platform.system() != "Linux":
        continue
    name, _, version = requirement.partition("==")
    try:
        found = metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        found = "missing"
    if found != version:
        print(f"{name} {version} ({found})")
