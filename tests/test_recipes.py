"""Recipes: what is stated has a source, no source is lost on the way to a record, and every recipe for a GPU takes one step on a CPU."""

import itertools
import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

from advssl.cli import app
from advssl.config import Config
from advssl.data import load
from advssl.encoders import VITS
from advssl.method import check_settings, get_method, methods, settings
from advssl.methods.rocl import RoCL
from advssl.pretrain import Run, build
from advssl.suite import reproduce
from advssl.suite.recipes import MAIN, describe, drawn, is_published, overview, recipe_rows, recipe_table
from advssl.suite.scales import FLAT, SCALES, departures, get_scale, resolve

KEYS = [key for key in methods() if key != "untrained"]
GPU = [name for name, scale in SCALES.items() if scale.threads == 0]
MASKED = [key for key in KEYS if get_method(key).backbone == "vit"]


def known(key: str) -> dict:
    """Fields of a run and of a method, with their defaults."""
    config = Config(key)
    return {f.name: getattr(config, f.name) for f in fields(Config)} | settings(get_method(key))


def value_of(config: Config, name: str):
    return config.settings[name] if name in config.settings else getattr(config, name)


# what methods state


def test_the_scales_for_gpus():
    assert GPU == ["cifar10", "cifar100", "stl10", "imagenet100", "imagenet"]
    for name in GPU:
        scale = SCALES[name]
        assert scale.data == name and scale.tuning == "cifar10" and scale.grid == "chen2020" and "autoattack" in scale.attacks
        assert scale.eps[0] == scale.train_eps == (4 if "imagenet" in name else 8) / 255
        assert "nobody has run it here yet" in scale.purpose


@pytest.mark.parametrize("key", KEYS)
def test_statements_are_known_and_typed_and_have_a_source(key):
    cls = get_method(key)
    assert "published" in vars(cls), "another method's sources are not this one's: state them anew"
    assert set(cls.recipes) <= {"*", "smoke", "demo", "laptop"}, "a recipe for a GPU is stated with its sources, in `published`"
    for recipe in cls.recipes.values(): check_settings(known(key), recipe)
    for scale, sources in cls.published.items():
        assert scale in GPU
        for source, stated in sources.items():
            assert len(source) > 8 and source == source.strip() and stated and source.split()[0] != "ours", (scale, source)
            assert source.startswith("ours: ") or is_published(source)
            check_settings(known(key) | {"views": ""}, stated)
            for name, value in stated.items():
                assert type(value) is type((known(key) | {"views": ""})[name]), f"{key} at {scale}: {name} = {value!r} is widened"


@pytest.mark.parametrize("scale", SCALES)
def test_every_method_resolves_and_keeps_what_is_stated(scale):
    """What is stated for the scale arrives in the record; what is stated for the scale that this one is like, where nothing is nearer."""
    for key in KEYS:
        config, cls, nearer = resolve(key, scale), get_method(key), dict(get_method(key).recipes.get(scale, {}))
        for stated in cls.published.get(scale, {}).values():
            for name, value in stated.items():
                if name != "views": assert value_of(config, name) == value, (key, scale, name)
            nearer |= stated
        for stated in cls.published.get(SCALES[scale].like, {}).values():
            for name, value in stated.items():
                if name not in nearer and name != "views": assert value_of(config, name) == value, (key, scale, name)
        for record in config.parents.values(): assert (record["data"], record["encoder"]) == (config.data, config.encoder)


def test_second_derivatives_have_whole_precision():
    for scale in GPU: assert [key for key in KEYS if resolve(key, scale).precision != "bf16-mixed"] == ["multi-task"]


# how statements meet


LAYERS = {  # later wins: lr tells which one did
    "scale": {}, "*": {"lr": 1.0}, "recipes, like": {"lr": 2.0}, "published, like": {"lr": 3.0},
    "recipes": {"lr": 4.0}, "published": {"lr": 5.0}, "override": {"lr": 6.0},
}


@pytest.mark.parametrize("last", range(len(LAYERS)))
def test_precedence(monkeypatch, last):
    own = {name: stated if i <= last else {} for i, (name, stated) in enumerate(LAYERS.items())}
    monkeypatch.setattr(RoCL, "recipes", {"*": own["*"], "cifar10": own["recipes, like"], "cifar100": own["recipes"]})
    sources = {"cifar10": {"b": own["published, like"]}, "cifar100": {"a": {"views": "simclr"}, "b": own["published"]}}
    monkeypatch.setattr(RoCL, "published", sources)
    config = resolve("rocl", "cifar100", 0, own["override"])
    assert config.lr == (last or get_scale("cifar100").lr)
    page = "the method's page"
    whence = ("the scale cifar100", f"{page}, for every scale", f"as at cifar10: {page}", "as at cifar10: b", page, "b")
    row = {row["field"]: row for row in recipe_rows("rocl", "cifar100")}["lr"]
    if last < len(whence): assert row["source"] == whence[last]


def test_longer_is_for_recipes_alone(monkeypatch):
    scale = replace(get_scale("cifar100"), longer=3)
    monkeypatch.setattr(RoCL, "recipes", {"cifar10": {"epochs": 7}})
    for published, epochs in (({}, 21), ({"cifar10": {"a": {"epochs": 100}}}, 100), ({"cifar100": {"a": {"epochs": 50}}}, 50)):
        monkeypatch.setattr(RoCL, "published", published)
        assert resolve("rocl", scale).epochs == epochs
    monkeypatch.setattr(RoCL, "recipes", {"cifar100": {"epochs": 7}})
    monkeypatch.setattr(RoCL, "published", {})
    assert resolve("rocl", scale).epochs == 7 and RoCL.recipes == {"cifar100": {"epochs": 7}}


@pytest.mark.parametrize("scale", ["cifar10", "cifar100"])
def test_a_field_stated_twice_is_an_error(monkeypatch, scale):
    monkeypatch.setattr(RoCL, "published", {"cifar10": {"README": {"lr": 1.5, "eps": 0.1}, "code": {"eps": 0.1, "lr": 1.5}}})
    with pytest.raises(ValueError, match="two sources of rocl at scale cifar10 state eps, lr: leave"): resolve("rocl", scale)
    resolve("rocl", "imagenet")


def test_an_unknown_field_is_an_error(monkeypatch):
    monkeypatch.setattr(RoCL, "published", {"cifar10": {"README": {"learning_rate": 1.5}}})
    with pytest.raises(ValueError, match="unknown setting 'learning_rate': choose among"): resolve("rocl", "cifar10")


# rows and tables


@pytest.mark.parametrize("scale", SCALES)
def test_rows_cover_the_record(scale):
    for key in KEYS:
        config, rows = resolve(key, scale), recipe_rows(key, scale)
        assert [row["field"] for row in rows] == [*FLAT, "views", *config.settings, *get_method(key).parents]
        by = {row["field"]: row for row in rows}
        last = {name: source for source, stated in departures(key, SCALES[scale]) for name in stated}
        for name in (*FLAT, *config.settings):
            row = by[name]
            assert row["value"] == value_of(config, name)
            assert row["source"] == last[name] if name in last else row["source"].startswith(("the ", "a run's "))
            here = get_method(key).published.get(scale, {})
            stated_here = any(name in stated for source, stated in here.items() if not source.startswith("ours"))
            assert row["published"] == stated_here, (key, scale, name)
        assert all(row["source"] for row in rows)
        assert len(recipe_table(key, scale).splitlines()) == 2 + len(rows)
        json.dumps(rows)


def test_sources_of_values_that_nobody_states():
    rows = {row["field"]: row["source"] for row in recipe_rows("rocl", "cifar10")}
    assert (rows["data"], rows["precision"], rows["norm"], rows["encoder"]) == ("the scale cifar10",) * 4
    assert (rows["compile"], rows["sign"]) == ("a run's default", "the method's default")
    assert {row["field"]: row for row in recipe_rows("rocl", "demo")}["steps"]["source"] == "the scale demo"
    assert {row["field"]: row for row in recipe_rows("untrained", "demo")}["epochs"]["source"] == "the method's page, for every scale"
    assert {row["field"]: row for row in recipe_rows("deacl", "stl10")}["teacher"]["value"] == "the run of simclr"


def test_overview_marks_what_is_ours():
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in overview("cifar10").splitlines()[2:]}
    assert len(lines) == len(KEYS) and all(len(cells) == 1 + len(MAIN) for cells in lines.values())
    assert lines["RoCL"][1:10] == ["1000", "512", "lars", "1.5", "1e-06", "10", "0.0314", "7", "0.007"]
    assert lines["RoCL"][10].startswith("simclr°")
    assert lines["MoCo-v2"][4] == "0.06°" and lines["SimCLR"][7:10] == ["", "", ""]
    assert len(overview("imagenet", ("adco",)).splitlines()) == 3 and "| 0.03 |" in overview("imagenet", ("adco",)).splitlines()[2]


@pytest.mark.parametrize("scale", GPU)
def test_stated_views_are_what_is_drawn(scale):
    for key in (key for key in KEYS if scale in get_method(key).published):
        widths = {k: 8 for k in ("bank_size", "queue_size", "hidden_dim") if k in settings(get_method(key))}
        small = {"encoder": "vit_demo" if key in MASKED else "small_convnet"} | widths
        views = build(resolve(key, scale, 0, small), 3, 28).views
        assert {row["field"]: row for row in recipe_rows(key, scale)}["views"]["value"] == drawn(views), key


def test_words_for_views():
    from advssl.augment import RECIPES

    assert [describe(recipe) for recipe in RECIPES.values()] == list(RECIPES) == [describe(name) for name in RECIPES]
    assert describe(replace(RECIPES["mae"], scale=0.5)) == "mae with scale 0.5"
    assert drawn({"a": "weak", "b": RECIPES["weak"]}) == "weak" and drawn({"a": "weak", "b": "none", "c": "weak"}) == "a, c: weak; b: none"


def test_command_line():
    run = CliRunner().invoke(app, ["recipe", "acl", "--scale", "cifar100", "--json"])
    assert json.loads(run.output) == json.loads(json.dumps(recipe_rows("acl", "cifar100")))
    assert CliRunner().invoke(app, ["recipe", "acl"]).output.strip() == recipe_table("acl", "demo")


@pytest.mark.parametrize("scale", GPU)
def test_the_whole_suite_can_be_planned(scale, tmp_path):
    """By the plan that `--dry-run` prints, of the target that has all methods."""
    jobs = reproduce.plan(["robustness"], scale, tmp_path, tmp_path)["jobs"]
    for key in KEYS: assert sum(job.startswith(f"{key}/") for job in jobs) >= len(SCALES[scale].seeds), key
    assert not list(tmp_path.iterdir())


# one step of every recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets of these scales in their real formats, with random pixels and 10 to 50 training images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for kind, classes in ((torchvision.datasets.CIFAR10, 10), (torchvision.datasets.CIFAR100, 100)):
        folder = root / kind.base_folder
        folder.mkdir(parents=True)
        for name, _ in kind.train_list + kind.test_list:
            x, y = rng.integers(0, 256, (10, 3072), np.uint8), (np.arange(10) % classes).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": x, "fine_labels" if classes == 100 else "labels": y}))
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{k}" for k in range(classes)]}))
    stl10 = root / torchvision.datasets.STL10.base_folder
    stl10.mkdir()
    for name, n in (("train", 10), ("test", 10), ("unlabeled", 20)):
        rng.integers(0, 256, (n, 3, 96, 96), np.uint8).tofile(stl10 / f"{name}_X.bin")
        if name != "unlabeled": (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(stl10 / f"{name}_y.bin")
    (stl10 / "class_names.txt").write_text("\n".join(f"c{k}" for k in range(10)))
    for part, i in itertools.product(("imagenet/train", "imagenet/val", "imagenet100/train", "imagenet100/val"), range(12)):
        folder = root / part / f"n0{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(folder / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:  # torchvision compares the md5 of the real files
        for kind in ("cifar", "stl10"): patch.setattr(f"torchvision.datasets.{kind}.check_integrity", lambda path, md5=None: True)
        yield root


class Small(Run):
    """A run on ImageNet whose images are kept at another size: 224 pixels for transformers, 64 for the others."""

    def materials(self):
        pool = load(self.config.data, self.root, size=224 if self.config.encoder in VITS else 64).train
        return pool, build(self.config, *pool.images.shape[1:3])


def tiny(config: Config, steps: int | None) -> Config:
    """What a batch of two, a data set of a dozen and a CPU force (its 16-bit convolutions take seconds); and fewer steps of an attack."""
    forced = {"shares": 1, "bank_size": 16, "queue_size": 16, "clusters": "2 4"}  # filled two keys at a time; fewer clusters than images
    if steps is not None: forced["steps"] = steps
    own = {k: v for k, v in forced.items() if k in config.settings}
    return replace(config, batch_size=2, precision="32-true", settings=config.settings | own)


def one_step(config: Config, folder, root, kind=Run) -> None:
    """A step in the middle of the run: behind every warm-up, and with every player on the field. Parents have random weights."""
    run = kind(config, folder, root=root)
    run.method.train()
    run.method.prepare(run.loader.endless(), run.data.images)
    before = [p.detach().clone() for p in run.method.encoder.parameters()]
    run.step = run.total // 2
    run.one_step(next(run.loader.epoch(*divmod(run.step, run.loader.steps))))
    assert run.meter.finite()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.method.encoder.parameters(), strict=True)), "no weight has moved"


@pytest.mark.parametrize("key", KEYS)
def test_one_step_on_cifar10(key, root, tmp_path):
    """ResNet-18 or the small ViT, 32 pixels; ACL attacks with the published number of steps, the others with one."""
    one_step(tiny(resolve(key, "cifar10"), None if key == "acl" else 1), tmp_path, root)


def test_one_step_in_the_precision_of_the_scale(root, tmp_path):
    config = resolve("mae", "cifar10")
    assert config.precision == "bf16-mixed"
    one_step(replace(tiny(config, None), precision=config.precision), tmp_path, root)


@pytest.mark.parametrize("key", ["hcl", "mae"])
def test_one_step_on_cifar100(key, root, tmp_path):
    one_step(tiny(resolve(key, "cifar100"), 1), tmp_path, root)


@pytest.mark.parametrize("key", MASKED)
def test_one_step_on_imagenet_with_vit_base(key, root, tmp_path, monkeypatch):
    """ViT-B at 224 pixels, for MAE with all its blocks, for the others with two of the twelve; one step of an attack instead of five."""
    config = tiny(resolve(key, "imagenet"), 1)
    assert config.encoder == "vit_base" and VITS["vit_base"] == (16, 768, 12, 12)
    if key != "mae": monkeypatch.setitem(VITS, "vit_base", (16, 768, 2, 12))
    one_step(config, tmp_path, root, Small)


AT_HOME = ["simclr", "moco-v2", "adco", "caco", "mochi", "ifm", "hcl", "byol"]


@pytest.mark.parametrize("key", [*AT_HOME, "acl", "deacl", "adv-selfie"])
def test_one_step_on_imagenet(key, root, tmp_path):
    """ResNet-18 at 64 pixels in the place of ResNet-50; three defences for all, which have the scale's recipe; one step of an attack."""
    config = resolve(key, "imagenet", 0, {"encoder": "resnet18"})
    one_step(tiny(config, 1), tmp_path, root, Small)


@pytest.mark.recipes
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scale", GPU)
def test_one_step_of_every_recipe(scale, key, root, tmp_path):
    """All of them with all steps of their attacks: transformers whole, ViT-B on ImageNet; the others with ResNet-18."""
    config = resolve(key, scale)
    if key not in MASKED: config = resolve(key, scale, 0, {"encoder": "resnet18"})
    one_step(tiny(config, None), tmp_path, root, Small if "imagenet" in scale else Run)
