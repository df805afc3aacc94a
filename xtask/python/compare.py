"""Compares two trees of fixtures: tensors within a tolerance, JSON by value, everything else byte by byte.

    python compare.py COMMITTED FRESH

Only what is in FRESH is compared, because fixtures can be remade in part. Prints a line for each difference.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

RELATIVE = 1e-6  # of the largest value of a tensor: another processor sums in another order


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def compare_tensors(old, new):
    old, new = tensors(old), tensors(new)
    for key in sorted(old.keys() ^ new.keys()):
        yield f"`{key}` is only in the {'committed' if key in old else 'fresh'} file"
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"`{key}` was {a.dtype} {list(a.shape)}, is {b.dtype} {list(b.shape)}"
        elif not a.is_floating_point():
            if not torch.equal(a, b):
                yield f"`{key}` has other values"
        elif a.numel():
            a, b = a.double(), b.double()
            off = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-30)
            if not off <= RELATIVE:
                yield f"`{key}` is off by {off:.1e}"


def compare_json(old, new, at="", close=RELATIVE):
    if isinstance(old, float) and isinstance(new, float):
        if abs(old - new) > close * max(abs(old), 1e-30):
            yield f"`{at}` was {old}, is {new}"
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                yield f"`{at}.{key}` is only in the {'committed' if key in old else 'fresh'} file"
            else:
                yield from compare_json(old[key], new[key], f"{at}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new)):
            yield from compare_json(a, b, f"{at}[{index}]")
    elif old != new:
        yield f"`{at}` was {old!r}, is {new!r}"


def compare(old, new):
    if not old.exists():
        yield "is not committed"
    elif new.suffix == ".safetensors":
        yield from compare_tensors(old, new)
    elif new.suffix == ".json":
        yield from compare_json(json.loads(old.read_text()), json.loads(new.read_text()))
    elif old.read_bytes() != new.read_bytes():
        yield "has other bytes"


def main(committed, fresh):
    files = sorted(path for path in fresh.rglob("*") if path.is_file())
    differences = 0
    for path in files:
        name = path.relative_to(fresh)
        for difference in compare(committed / name, path):
            print(f"fixtures/{name}: {difference}")
            differences += 1
    print(f"{len(files)} files compared, {differences} differences")
    return 1 if differences or not files else 0


sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
