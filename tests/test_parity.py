"The library against what the official codes return: every case of every file, through the adapter of the file's name."
import json
import os
from pathlib import Path

import parity_adapters
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("ADVSSL_PARITY_DIR") or Path(__file__).parent / "parity")
OPTIONAL = ("formula_", "exact_", "clamped_rows")  # the formula's own values: compared when the adapter returns them


def cases():
    for path in sorted(FOLDER.glob("*.json")):
        text = json.loads(path.read_text())
        for case in text["cases"]:
            yield pytest.param(path.stem, text["tolerance"], case, id=f"{path.stem}-{case['label']}")


def convert(value):
    "Lists of numbers become float64 tensors, at any depth; scalars, words and lists of records stay."
    if isinstance(value, dict): return {key: convert(v) for key, v in value.items()}
    if not isinstance(value, list): return value
    inner = [convert(v) for v in value]
    if all(isinstance(v, (int, float)) for v in inner): return torch.tensor(inner, dtype=torch.float64)
    same_shape = all(isinstance(v, Tensor) for v in inner) and len({v.shape for v in inner}) == 1
    return torch.stack(inner) if same_shape else inner


def compare(name, ours, theirs, tolerance):
    "|a - b| <= atol + rtol * max|b| for every array; all differences of a record are reported together."
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if "fp32" in key: continue
            if key in ours: yield from compare(f"{name}.{key}", ours[key], value, tolerance)
            elif not key.startswith(OPTIONAL): yield f"{name}.{key} is missing"
    elif isinstance(theirs, list):
        if len(ours) != len(theirs): yield f"{name} has {len(ours)} entries, not {len(theirs)}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)): yield from compare(f"{name}[{i}]", a, b, tolerance)
    elif isinstance(theirs, str | None):
        if ours != theirs: yield f"{name} is {ours!r}, not {theirs!r}"
    else:
        a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (ours, theirs))
        if a.shape != b.shape: yield f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        elif b.numel():
            error, bound = (a - b).abs().max(), tolerance["atol"] + tolerance["rtol"] * b.abs().max()
            if not error <= bound: yield f"{name} differs by {error:.3g}, more than {bound:.3g}"


def test_there_are_cases():
    assert list(cases()), f"no parity file in {FOLDER}"


@pytest.mark.parametrize(("name", "tolerance", "case"), cases())
def test_parity(name, tolerance, case):
    adapter = getattr(parity_adapters, name, None)
    assert adapter, f"{name}.json has no adapter: add a function {name}(inputs) to tests/parity_adapters.py"
    differences = list(compare(name, adapter(convert(case["inputs"])), convert(case["outputs"]), tolerance))
    assert not differences, "\n".join(differences)


def test_a_difference_is_seen():
    "The comparison itself: values, shapes, missing fields, NaN, and what may be left out."
    tolerance = {"rtol": 0.0, "atol": 1e-9}
    theirs = convert({"a": [1.0, 2.0], "b": [{"c": 1.0}], "formula_d": 3.0, "grad_fp32": 1.0})
    ours = {"a": torch.tensor([1.0, 2.0]), "b": [{"c": torch.tensor(1.0)}]}
    assert not list(compare("x", ours, theirs, tolerance))
    for wrong in ({"a": torch.tensor([1.0, 2.1])}, {"a": torch.ones(3)}, {"a": torch.tensor([1.0, torch.nan])},
                  {"b": []}, {"b": [{}]}, {"formula_d": 4.0}):
        assert list(compare("x", ours | wrong, theirs, tolerance)), wrong
