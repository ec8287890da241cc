"Exported encoders: timm's features are ours for every masked method and kind of BatchNorm, and a file is written whole or not at all."

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from advssl import export
from advssl.cli import app
from advssl.encoders import BranchedBatchNorm, Encoder, SplitBatchNorm, add_branches, branch, make_encoder, split_batch_norm
from advssl.export import constants, export_encoder, export_run, how_to_load, plain_batch_norm
from advssl.features import Noisy
from advssl.method import get_method, methods
from advssl.pretrain import Run, restore
from advssl.suite.scales import resolve

VIT = [k for k in methods() if get_method(k).backbone == "vit"]


def trained(folder, method, **overrides):
    "A run of two steps, which has moved weights, players and statistics."
    few = {"images": 64, "batch_size": 32, "epochs": 1, "warmup_epochs": 0.0}
    Run(resolve(method, "smoke", 3, few | overrides), folder).train()
    return folder


def loaded(path, about):
    "What the printed lines define, executed as they stand."
    place = {}
    exec(how_to_load(path, about), place)
    return place


def differs(path, about, encoder, images) -> float:
    "Largest difference between the exported features and ours, relative to their size."
    with torch.no_grad(): ours, theirs = encoder.eval()(images), loaded(path, about)["features"](images)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def same(path, about, encoder, images=None) -> bool:
    return differs(path, about, encoder, torch.rand(5, 1, 28, 28) if images is None else images) < 1e-5


def unlike(module, seed=0):
    "As if trained: no two weights, statistics or branches alike."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p += 0.05 * torch.randn(p.shape, generator=generator)
        for m in module.modules():
            if not isinstance(m, nn.BatchNorm2d): continue
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def written(folder, encoder):
    content, about = export_encoder(encoder)
    path = folder / "encoder.safetensors"
    path.write_bytes(content)
    return path, about


# transformers


@pytest.mark.parametrize("method", [*VIT, "adios", "simclr", "untrained"])
def test_features_of_every_method_on_a_transformer(method, tmp_path):
    run = trained(tmp_path / "run", method, encoder="vit_demo")
    path, about = export_run(run)
    encoder = restore(run)[0].evaluated()
    assert same(path, about, encoder) and "checkpoint_path=FILE" in about["create"]
    model = loaded(path, about)["model"]
    assert torch.equal(model.pos_embed, encoder.backbone.pos_embed)  # a fixed table travels as it is


@pytest.mark.parametrize("settings", [{"mode": "coordinate"}, {"mode": "embedding"}, {"memory": False}])
def test_a_relative_position_bias_becomes_beit(settings, tmp_path):
    run = trained(tmp_path / "run", "adpe", position="relative", shift_lr=0.1, **settings)
    path, about = export_run(run)
    encoder = restore(run)[0].evaluated()
    assert encoder.backbone.blocks.table.std() > 0.01 and same(path, about, encoder)
    assert type(loaded(path, about)["model"]).__name__ == "Beit"


def relative_encoder():
    encoder = make_encoder("vit_demo")
    get_method("adpe")(encoder, position="relative")
    return unlike(encoder)


TABLE = "rel_pos_bias.relative_position_bias_table"


def without_table(weights): return weights | {TABLE: torch.zeros_like(weights[TABLE])}
def turned_table(weights): return weights | {TABLE: weights[TABLE].flip(0)}
def no_positions(weights): return weights | {"pos_embed": torch.zeros_like(weights["pos_embed"])}


def values_for_queries(weights):
    return weights | {k: weights[k.replace("q_bias", "v_bias")].clone() for k in weights if k.endswith("q_bias")}


def class_token_biased(weights):
    weights[TABLE][-3:] = torch.tensor([1.0, 2.0, 0.0])[:, None]
    return weights


@pytest.mark.parametrize("mutant", [without_table, turned_table, values_for_queries, no_positions, class_token_biased])
def test_mutants_of_the_renaming_are_rejected(mutant, tmp_path, monkeypatch):
    encoder, real = relative_encoder(), export.relative_weights
    assert same(*written(tmp_path, encoder), encoder)
    monkeypatch.setattr(export, "relative_weights", lambda vit: mutant(real(vit)))
    assert not same(*written(tmp_path, encoder), encoder)


def test_a_forgotten_normalisation_is_seen(tmp_path):
    encoder = unlike(make_encoder("vit_tiny", 3, 32))
    path, about = written(tmp_path, encoder)
    images = torch.rand(3, 3, 32, 32)
    assert same(path, about, encoder, images)
    assert not same(path, about | {"mean": "[0.0, 0.0, 0.0]"}, encoder, images)
    assert not same(path, about | {"std": "[1.0, 1.0, 1.0]"}, encoder, images)


# ResNets and BatchNorm


@pytest.mark.parametrize("size", [32, 72])
def test_resnets_of_both_stems(size, tmp_path):
    encoder = unlike(make_encoder("resnet18", 3, size))
    path, about = written(tmp_path, encoder)
    assert same(path, about, encoder, torch.rand(2, 3, size, size))
    assert ("checkpoint_path=FILE" in about["create"]) == (size == 72)
    config = timm.data.resolve_model_data_config(loaded(path, about)["model"])
    assert [*config["mean"], *config["std"]] == pytest.approx([*constants(encoder)["mean"], *constants(encoder)["std"]])


@pytest.mark.parametrize("name", ["resnet18", "small_convnet"])
def test_the_branch_in_use_is_exported(name, tmp_path):
    encoder = unlike(add_branches(make_encoder(name), ["adv", "clean"]))
    for which in ("adv", "clean"):
        with branch(encoder, which):
            path, about = written(tmp_path, encoder)
            assert same(path, about, encoder) and about["batch_norm_branch"] == which
        with branch(encoder, "clean" if which == "adv" else "adv"): assert not same(path, about, encoder)
    assert any(isinstance(m, BranchedBatchNorm) for m in encoder.modules())  # ours is as it was
    keys = list(plain_batch_norm(encoder).state_dict())
    assert keys == list(make_encoder(name).state_dict())


def test_split_batch_norm_is_its_base(tmp_path):
    encoder = unlike(split_batch_norm(make_encoder("resnet18"), 4))
    assert any(isinstance(m, SplitBatchNorm) for m in encoder.modules()) and same(*written(tmp_path, encoder), encoder)


@pytest.mark.parametrize("method", ["acl", "dynacl", "moco-v2"])
def test_runs_with_branches_and_shares(method, tmp_path):
    run = trained(tmp_path / "run", method)
    assert same(*export_run(run), restore(run)[0].evaluated())


def test_noise_is_left_out_and_named(tmp_path):
    encoder = unlike(make_encoder("vit_demo"))
    path, about = written(tmp_path, Noisy(encoder, 0.25))
    assert "deviation 0.25" in about["noise"] and about["noise"] in how_to_load(path, about) and same(path, about, encoder)
    assert "noise" not in written(tmp_path, encoder)[1]


# the file


def test_metadata_tell_where_the_file_is_from(tmp_path):
    run = trained(tmp_path / "run", "mae")
    path, about = export_run(run, tmp_path / "out" / "mae.safetensors")
    with safe_open(path, "pt") as f: assert f.metadata() == about and set(f.keys()) == set(loaded(path, about)["model"].state_dict())
    assert (about["format"], about["method"], about["seed"], about["features"], about["step"]) == ("pt", "MAE", "3", "96", "2")
    assert json.loads(about["config"]) == json.loads((run / "config.json").read_text())
    assert not (run / "encoder.safetensors").exists()


def test_the_file_needs_nothing_of_this_library(tmp_path):
    run = trained(tmp_path / "run", "mae")
    path, about = export_run(run)
    images = torch.rand(3, 1, 28, 28)
    torch.save(images, tmp_path / "images.pt")
    script = "import sys; sys.modules['advssl'] = None\n" + how_to_load(path, about)
    script += "\nwith torch.no_grad(): torch.save(features(torch.load('images.pt')), 'features.pt')"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    with torch.no_grad(): ours = restore(run)[0].evaluated()(images)
    assert torch.allclose(torch.load(tmp_path / "features.pt"), ours, rtol=1e-5, atol=1e-6)


def test_a_file_is_never_replaced(tmp_path):
    run = trained(tmp_path / "run", "mae")
    path, _ = export_run(run)
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns
    export_run(run)  # the same once more: nothing is written
    assert path.read_bytes() == content and path.stat().st_mtime_ns == stamp
    assert export_run(run, tmp_path / "two.safetensors")[0].read_bytes() == content  # byte by byte
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="holds something else: choose another file"): export_run(run)
    assert path.read_bytes() == content[:-1]


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "mae")
    before = sorted(run.iterdir())

    def power_cut(*args): raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt): export_run(run)
    assert sorted(run.iterdir()) == before


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="is not a run"): export_run(tmp_path)
    with pytest.raises(ValueError, match="must end in .safetensors"): export_run(tmp_path, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"pass method.evaluated\(\)"): export_encoder(nn.Flatten())
    with pytest.raises(ValueError, match="no export for a Flatten"): export_encoder(Encoder(nn.Flatten(), 784))
    for words in (["nowhere"], ["nowhere", "--out", "x.pt"]):
        result = CliRunner().invoke(app, ["export", *words])
        assert result.exit_code and isinstance(result.exception, ValueError)  # `main` makes it one line and exit status 2
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_lines(tmp_path):
    run = trained(tmp_path / "run", "simclr")
    out = tmp_path / "x.safetensors"
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(out)])
    assert result.exit_code == 0 and out.exists() and not (run / "encoder.safetensors").exists()
    place = {}
    exec(result.output, place)
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad(): assert torch.allclose(place["features"](x), restore(run)[0].evaluated()(x), rtol=1e-5, atol=1e-6)
