"""Make advssl/assets/fashion_mnist_subset.npz from the full Fashion-MNIST: the same bytes every time.

    apt-get install dataset-fashion-mnist       # or any folder with the four idx files
    python tools/make_fashion_subset.py [--source FOLDER] [--out FILE]

For each class a seeded permutation chooses 1,000 training and 200 test images; a second one shuffles them.
It prints the file's sha256, which advssl.data pins as FASHION_SHA256.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from advssl.data import FASHION_FILES, read_idx

SEED = 2210
PER_CLASS = {"train": 1000, "test": 200}
OUT = Path(__file__).parents[1] / "advssl" / "assets" / "fashion_mnist_subset.npz"


def choose(labels: np.ndarray, per_class: int, rng: np.random.RandomState) -> np.ndarray:
    "Indices of `per_class` images of each class, in random order."
    chosen = [rng.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(10)]
    return rng.permutation(np.concatenate(chosen))


def subset(source: Path) -> dict[str, np.ndarray]:
    "The four arrays, by name."
    rng = np.random.RandomState(SEED)  # its stream is frozen by numpy's compatibility policy
    arrays = {}
    for split, (images, labels) in FASHION_FILES.items():
        x, y = read_idx(source / f"{images}.gz"), read_idx(source / f"{labels}.gz")
        index = choose(y, PER_CLASS[split], rng)
        arrays |= {f"x_{split}": x[index], f"y_{split}": y[index]}
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    "As numpy.savez_compressed, but with LZMA (14 % smaller here; numpy.load reads it) and without times."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system = zipfile.ZIP_LZMA, 3
            archive.writestr(entry, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    write_npz(args.out, subset(args.source))
    print(hashlib.sha256(args.out.read_bytes()).hexdigest(), args.out.stat().st_size, args.out)


if __name__ == "__main__":
    main()
