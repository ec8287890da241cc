"""advssl.data and advssl.images: every on-disk format in miniature, every refusal, every promise about randomness."""

import gzip
import importlib.util
import json
import pickle
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advssl import data as D
from advssl.data import ImageSet, batches, few_labels, load, split, stratified, stream
from advssl.images import check_images, content_sha256

ASSETS = files("advssl") / "assets"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def tool():
    path = Path(__file__).parents[1] / "tools" / "make_fashion_subset.py"
    spec = importlib.util.spec_from_file_location("make_fashion_subset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(n: int = 200, classes: int = 4) -> ImageSet:
    "Images that show their own label and index, so that a mix-up can be seen."
    labels = torch.arange(n) % classes
    images = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels.byte(), (torch.arange(n) % 256).byte()
    return ImageSet(images, labels, tuple(f"c{k}" for k in range(classes)), "toy")


def aligned(s: ImageSet) -> bool:
    return torch.equal(s.images[:, 0, 0, 0].long(), s.labels)


# The embedded set


def test_embedded_set():
    data = load()
    for s, per_class in ((data.train, 1000), (data.test, 200)):
        assert s.images.dtype == torch.uint8 and s.images.shape == (10 * per_class, 1, 28, 28)
        assert s.labels.bincount().tolist() == [per_class] * 10 and len(s.classes) == 10
        assert (s.labels[:-1] != s.labels[1:]).float().mean() > 0.8  # shuffled
    assert data.unlabelled is None
    # Pinned content: order and alignment of images and labels included.
    assert data.train.sha256.startswith("b2e6bbcc") and data.test.sha256.startswith("99d7ac4f")
    assert content_sha256(data.train.images, data.train.labels) == data.train.sha256


def test_labels_fit_the_images():
    "The nearest class mean is right for two of three test images; with labels out of step it would be one of ten."
    data = load()
    x, t = (s.images.flatten(1).float() for s in (data.train, data.test))
    means = torch.stack([x[data.train.labels == k].mean(0) for k in range(10)])
    assert (torch.cdist(t, means).argmin(1) == data.test.labels).float().mean() > 0.6


def test_asset_is_small_and_has_its_licence():
    assert len((ASSETS / "fashion_mnist_subset.npz").read_bytes()) < 5e6
    notice = (ASSETS / "fashion_mnist_subset-LICENSE").read_text()
    assert "Zalando SE" in notice and "Permission is hereby granted" in notice


def test_no_two_loads_share_memory():
    a = load()
    a.train.images.zero_()
    assert load().train.images.max() == 255


@pytest.mark.parametrize("damage", [lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], lambda b: b[:-1], lambda b: b""])
def test_damaged_asset_is_refused(tmp_path, damage):
    (tmp_path / "a.npz").write_bytes(damage((ASSETS / "fashion_mnist_subset.npz").read_bytes()))
    with pytest.raises(ValueError, match="is damaged.*reinstall advssl"):
        D.read_npz(tmp_path / "a.npz", D.FASHION_SHA256)


def test_tool_writes_the_same_bytes_twice(tmp_path):
    arrays = {"x_train": np.arange(5000, dtype=np.uint8).reshape(50, 10, 10), "y_train": np.arange(50, dtype=np.uint8)}
    for name in ("a", "b"): tool().write_npz(tmp_path / name, arrays)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as back:
        for k, v in arrays.items(): np.testing.assert_array_equal(back[k], v)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_tool_makes_the_embedded_set_from_the_full_one(tmp_path):
    arrays = tool().subset(DEBIAN)
    embedded = D.read_npz(ASSETS / "fashion_mnist_subset.npz", D.FASHION_SHA256)
    assert arrays.keys() == embedded.keys()
    for k in arrays: np.testing.assert_array_equal(arrays[k], embedded[k])


# Formats on disk


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_fashion(folder: Path, n: int = 20) -> None:
    for images, labels in D.FASHION_FILES.values():
        y = (np.arange(n) % 10).astype(np.uint8)
        x = np.zeros((n, 28, 28), np.uint8)
        x[:, 0, 0] = y
        write_idx(folder / f"{images}.gz", x)
        write_idx(folder / f"{labels}.gz", y)


@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw"])
def test_fashion_full(tmp_path, place):
    write_fashion(tmp_path / place)
    data = load("fashion-full", tmp_path)
    assert data.train.images.shape == (20, 1, 28, 28) and aligned(data.train) and aligned(data.test)


def test_damaged_idx_is_refused(tmp_path):
    path = tmp_path / "x-idx3-ubyte.gz"
    write_idx(path, np.zeros((3, 4, 4), np.uint8))
    good, raw = path.read_bytes(), gzip.decompress(path.read_bytes())
    np.testing.assert_array_equal(D.read_idx(path), np.zeros((3, 4, 4)))
    (tmp_path / "x-idx3-ubyte").write_bytes(raw)
    assert D.read_idx(tmp_path / "x-idx3-ubyte").shape == (3, 4, 4)
    for bad in (good[:-9], b"plain text", gzip.compress(raw[:-1]), gzip.compress(raw + b"x"), gzip.compress(b"\0\0\x0d" + raw[3:])):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged.*fetch it again"): D.read_idx(path)


@pytest.fixture
def no_md5(monkeypatch):
    "torchvision compares the md5 of the real files; the miniature ones only have to exist."
    exists = lambda path, md5=None: Path(path).exists()
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", exists)
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", exists)


def coded(n: int, classes: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    "Bytes (n, 3, side, side): the first pixel shows the label, the second row starts with 7, channel c has c elsewhere."
    y = np.arange(n) % classes
    x = np.broadcast_to(np.arange(3, dtype=np.uint8)[None, :, None, None], (n, 3, side, side)).copy()
    x[:, 0, 0, 0], x[:, 0, 1, 0] = y, 7
    return x, y


def write_cifar(root: Path, kind: type, classes: int) -> None:
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    fine = "fine_labels" if classes == 100 else "labels"
    for name, _ in kind.train_list + kind.test_list:
        x, y = coded(10, classes, 32)
        (folder / name).write_bytes(pickle.dumps({"data": x.reshape(10, -1), fine: y.tolist()}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{k}" for k in range(classes)]}))


def right_way_up(s: ImageSet) -> bool:
    x = s.images
    return bool((x[:, 0, 1, 0] == 7).all() and (x[:, 0, 0, 1] == 0).all() and (x[:, 2, 1:] == 2).all())


@pytest.mark.parametrize("name, classes, train", [("cifar10", 10, 50), ("cifar100", 100, 10)])
def test_cifar(tmp_path, no_md5, name, classes, train):
    write_cifar(tmp_path, getattr(torchvision.datasets, name.upper()), classes)
    data = load(name, tmp_path)
    assert data.train.images.shape == (train, 3, 32, 32) and data.test.images.shape == (10, 3, 32, 32)
    assert data.train.name == f"{name}/train" and data.train.classes[9] == "c9" and len(data.train.classes) == classes
    assert data.train.images.is_contiguous()
    for s in (data.train, data.test): assert aligned(s) and right_way_up(s)


def test_damaged_cifar_is_refused(tmp_path):
    "With torchvision's md5 check in force, the miniature files are damaged ones."
    write_cifar(tmp_path, torchvision.datasets.CIFAR10, 10)
    with pytest.raises(FileNotFoundError, match=r"cifar10: no intact files in .*cifar-10-batches-py.*download=True"):
        load("cifar10", tmp_path)


def test_stl10(tmp_path, no_md5):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, n in (("train", 10), ("test", 10), ("unlabeled", 4)):
        x, y = coded(n, 10, 96)
        (folder / f"{name}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())  # columns first
        if name != "unlabeled": (folder / f"{name}_y.bin").write_bytes((y + 1).astype(np.uint8).tobytes())  # from 1
    (folder / "class_names.txt").write_text("\n".join(f"c{k}" for k in range(10)))
    data = load("stl10", tmp_path)
    assert data.unlabelled.images.shape == (4, 3, 96, 96) and (data.unlabelled.labels == -1).all()
    assert data.train.classes[0] == "c0" and right_way_up(data.unlabelled)
    for s in (data.train, data.test): assert aligned(s) and right_way_up(s)
    with pytest.raises(ValueError, match="have no labels"): stratified(data.unlabelled.labels, 0.5)


def write_folders(home: Path, train: int = 3) -> None:
    "Class k is a flat colour 60 k; images are wider or taller than square."
    for part, count in (("train", train), ("val", 2)):
        for k in range(3):
            folder = home / part / f"n0{k}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (50 + 20 * (i % 2), 60), (60 * k, 255, 0)).save(folder / f"{i}.jpg")


def test_folders_of_jpeg_files(tmp_path):
    write_folders(tmp_path / "imagenet100")
    data = load("imagenet100", tmp_path, size=24)
    assert data.train.images.shape == (9, 3, 24, 24) and data.train.classes == ("n00", "n01", "n02")
    for s in (data.train, data.test):
        red = s.images[:, 0].float().mean((1, 2))
        assert torch.equal((red / 60).round().long(), s.labels)
        assert (s.images[:, 1] > 200).all()
        assert s.sha256 == content_sha256(s.images, s.labels)
    assert len(data.train.subset(torch.tensor([8, 0]))) == 2


def test_middle_of_the_image_is_kept(tmp_path):
    "Shorter side to `size`, then the centre: as torchvision's Resize and CenterCrop."
    write_folders(tmp_path / "imagenet", train=1)
    wide = Image.fromarray(np.repeat(np.linspace(0, 255, 80).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    wide.save(tmp_path / "imagenet" / "train" / "n00" / "0.jpg", quality=95)
    row = load("imagenet", tmp_path, size=20).train.images[0, 0, 10].float()
    assert abs(row.mean() - 127.5) < 2 and row[0] > 50 and row[-1] < 205


def test_conversion_is_reused_and_renewed(tmp_path):
    home = tmp_path / "imagenet100"
    write_folders(home)
    first = load("imagenet100", tmp_path, size=16)
    file = home / "16px" / "train.bytes"
    written = file.stat().st_mtime_ns
    assert load("imagenet100", tmp_path, size=16).train.sha256 == first.train.sha256 and file.stat().st_mtime_ns == written
    write_folders(home, train=4)  # the folder has changed
    assert len(load("imagenet100", tmp_path, size=16).train) == 12
    assert not list(home.rglob("*.part"))
    for part in ("train", "val"): (home / part).rename(home / f"{part}-moved")  # the folder has gone
    assert len(load("imagenet100", tmp_path, size=16).train) == 12
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged.*delete the folder"): load("imagenet100", tmp_path, size=16)


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path):
    home = tmp_path / "imagenet100"
    write_folders(home)
    bad = home / "train" / "n02" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"2\.jpg cannot be decoded"): load("imagenet100", tmp_path, size=16)
    assert [p.suffix for p in (home / "16px").iterdir()] == [".lock"]


def test_folders_that_disagree_are_refused(tmp_path):
    home = tmp_path / "imagenet100"
    write_folders(home)
    (home / "val" / "n02").rename(home / "val" / "n99")
    with pytest.raises(ValueError, match=r"different class folders: \['n02', 'n99'\]"): load("imagenet100", tmp_path, size=8)


def test_too_little_space_is_noticed_before_decoding(tmp_path, monkeypatch):
    write_folders(tmp_path / "imagenet")
    monkeypatch.setattr(D.shutil, "disk_usage", lambda path: D.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="choose a smaller size or another root"): load("imagenet", tmp_path, size=8)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "imagenet100", "imagenet"])
def test_missing_files_say_where_they_go(tmp_path, name, monkeypatch):
    monkeypatch.setenv("ADVSSL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{name}: no intact files in {tmp_path}.*ADVSSL_DATA"): load(name)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_download_only_when_asked(tmp_path, monkeypatch):
    asked = []
    for kind in ("CIFAR10", "STL10"):
        monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", lambda self: asked.append(type(self).__name__))
    for name in ("cifar10", "stl10"):
        for download in (False, True):
            with pytest.raises(FileNotFoundError): load(name, tmp_path, download=download)
    assert asked == ["CIFAR10"] + ["STL10"] * (len(asked) - 1) and len(asked) == 2


def test_unknown_names_and_sizes():
    with pytest.raises(ValueError, match="known: fashion, fashion-full, cifar10, cifar100, stl10, imagenet100, imagenet"):
        load("mnist")
    with pytest.raises(ValueError, match="fixed size"): load("fashion", size=32)


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, "add the channel axis"),
        ({"images": torch.zeros(4, 2, 8, 8, dtype=torch.uint8)}, "1 or 3"),
        ({"images": torch.zeros(4, 1, 8, 9, dtype=torch.uint8)}, "crop to squares"),
        ({"images": torch.zeros(4, 1, 8, 8)}, "ImageSet.from_float"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.int32)}, r"\.byte\(\)"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)}, "3 images but 4 labels"),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(0).long()}, "no images"),
        ({"labels": torch.tensor([0, 1, 2, 1])}, r"\[0, 2\] for 2 classes"),
        ({"labels": torch.tensor([0, 1, -1, 1])}, "count from 0"),
        ({"labels": torch.zeros(4)}, r"\.long\(\)"),
        ({"labels": torch.zeros(4, 1).long()}, "shape"),
    ],
)
def test_bad_sets_are_refused(change, message):
    good = {"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 1])}
    ImageSet(**good, classes=("a", "b"), name="toy")
    with pytest.raises(ValueError, match=message): ImageSet(**good | change, classes=("a", "b"), name="toy")


@pytest.mark.parametrize("value, message", [(torch.nan, "NaN"), (1.01, "divide bytes by 255"), (-0.1, "normalisation"), (255.0, "255")])
def test_bad_floats_are_refused(value, message):
    x = torch.full((2, 3, 4, 4), 0.5)
    check_images(x)
    x[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=message): check_images(x)
    with pytest.raises(ValueError, match=message): ImageSet.from_float(x, torch.zeros(2).long(), ("a",), "toy")


def test_from_float_refuses_bytes():
    with pytest.raises(ValueError, match="images are float.*bytes go to ImageSet itself"):
        ImageSet.from_float(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), ("a",), "toy")


def test_from_float_inverts_division():
    s = toy()
    t = ImageSet.from_float(s.images / 255, s.labels, s.classes, "toy")
    assert torch.equal(t.images, s.images) and t.sha256 == s.sha256
    near = torch.tensor([0.999, 0.4999, 0.0019]).view(3, 1, 1, 1)  # rounded, not cut off
    assert ImageSet.from_float(near, torch.zeros(3).long(), ("a",), "toy").images.flatten().tolist() == [255, 127, 0]


def test_fingerprint_sees_every_change():
    s = toy()
    x, y = s.images.clone(), s.labels.clone()
    assert content_sha256(x, y) == s.sha256 == s.to("cpu").sha256
    x[7, 0, 1, 1] ^= 1
    y[5] = (y[5] + 1) % 4
    prints = {s.sha256, content_sha256(x, s.labels), content_sha256(s.images, y), content_sha256(s.images.view(50, 4, 2, 2), s.labels)}
    assert len(prints) == 4


# Randomness


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.data())
def test_batches_cover_an_epoch(n, data):
    size, seed, epoch = data.draw(st.integers(1, n)), data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 1000))
    whole = batches(n, size, seed, epoch, drop_last=False)
    assert sorted(torch.cat(whole).tolist()) == list(range(n))
    full = batches(n, size, seed, epoch)
    assert len(full) == n // size and all(len(b) == size for b in full)
    for a, b in zip(full, whole, strict=False): assert torch.equal(a, b)


def test_batches_depend_on_their_arguments_only():
    torch.manual_seed(0)
    a = batches(100, 10, 3, 7)
    torch.rand(5)
    assert all(torch.equal(x, y) for x, y in zip(a, batches(100, 10, 3, 7), strict=True))
    others = [batches(100, 10, s, e)[0] for s, e in ((3, 8), (7, 3), (4, 7), (0, 0))]
    assert not any(torch.equal(a[0], o) for o in others)
    for bad in (0, 101):
        with pytest.raises(ValueError, match="1 to 100"): batches(100, bad, 0, 0)


def test_streams_are_named_by_their_keys():
    draw = lambda *k: tuple(torch.rand(4, generator=stream(*k)).tolist())
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40, 3), (0, 0, 0)]
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*k) for k in keys}) == len(keys)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 0.99), st.integers(0, 2**31), st.integers(20, 300))
def test_stratified_takes_a_share_of_every_class(fraction, seed, n):
    labels = torch.randint(3, (n,), generator=stream(seed))
    labels[:3] = torch.arange(3)
    chosen, rest = stratified(labels, fraction, seed)
    assert sorted(torch.cat([chosen, rest]).tolist()) == list(range(n))
    for k in range(3):
        total = int((labels == k).sum())
        assert int((labels[chosen] == k).sum()) == max(1, round(fraction * total))
    assert all(torch.equal(a, b) for a, b in zip((chosen, rest), stratified(labels, fraction, seed), strict=True))


def test_split_and_few_labels_keep_images_and_labels_together():
    s = toy()
    fit, held = split(s, 0.2, seed=1)
    assert aligned(fit) and aligned(held) and len(fit) == 160 and held.labels.bincount().tolist() == [10] * 4
    index = lambda t: set((t.images[:, 0, 0, 1]).tolist())
    assert not index(fit) & index(held)
    small, large = few_labels(s, 0.04, seed=1), few_labels(s, 0.4, seed=1)
    assert aligned(small) and small.labels.bincount().tolist() == [2] * 4 and index(small) < index(large)
    assert index(few_labels(s, 0.1, seed=1)) != index(few_labels(s, 0.1, seed=2))
    for bad in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"): split(s, bad)


def test_record_of_a_conversion_is_readable(tmp_path):
    write_folders(tmp_path / "imagenet100")
    load("imagenet100", tmp_path, size=8)
    about = json.loads((tmp_path / "imagenet100" / "8px" / "train.json").read_text())
    assert about["counts"] == [3, 3, 3] and len(about["sha256"]) == 64
