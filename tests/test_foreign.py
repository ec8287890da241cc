"""Encoders from elsewhere: the same features as where they came from, or a message that says what is wrong."""

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

from advssl.checkpoint import write_atomic
from advssl.cli import app, radius
from advssl.encoders import make_encoder
from advssl.evaluate.foreign import exported_encoder, is_foreign, open_encoder, timm_encoder
from advssl.export import export_encoder


@pytest.mark.parametrize(("name", "channels", "size"), [("small_convnet", 1, 28), ("vit_demo", 1, 28), ("resnet18", 3, 32)])
def test_an_exported_file_has_the_features_of_its_encoder(tmp_path, name, channels, size):
    torch.manual_seed(0)
    encoder, x = make_encoder(name, channels, size).eval(), torch.rand(3, channels, size, size)
    with torch.no_grad():
        for t in encoder.backbone.buffers():
            if t.is_floating_point(): t.uniform_(0.5, 1.5)
        encoder.normalise.mean.fill_(0.3)
        content, _ = export_encoder(encoder, config=json.dumps({"encoder": name}))
        write_atomic(tmp_path / "e.safetensors", content)
        torch.testing.assert_close(open_encoder(str(tmp_path / "e.safetensors"), channels, size)(x), encoder(x), rtol=0, atol=0)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "e.safetensors"
    with pytest.raises(ValueError, match="does not exist"): exported_encoder(path, 28)
    content, _ = export_encoder(make_encoder("small_convnet"), config=json.dumps({"encoder": "vit_demo"}))
    whole = "no whole safetensors file"
    for wrong, message in ((content[:-50], whole), (b"", whole), (b"<html>", whole), (content, "holds no plain vit_demo")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=message): exported_encoder(path, 28)
    path.write_bytes(export_encoder(make_encoder("small_convnet"))[0])
    with pytest.raises(ValueError, match="does not say what it holds"): exported_encoder(path, 28)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 40), ("vit_tiny_patch16_224", 48), ("convnext_atto", 64)])
def test_timm_networks_read_pixels_in_the_unit_interval(name, size):
    torch.manual_seed(0)
    ours, x = timm_encoder(name, 3, size, pretrained=False), torch.rand(2, 3, size, size)
    assert not ours.training and ours.size == (224 if name.startswith("vit") else None)
    cfg = ours.backbone.pretrained_cfg
    plain = timm.data.transforms_factory.transforms.Normalize(cfg["mean"], cfg["std"])
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear") if ours.size else x
        torch.testing.assert_close(ours(x), ours.backbone(plain(resized)))
    grey = timm_encoder(name, 1, size, pretrained=False)
    assert grey(x[:, :1]).shape == (2, grey.out_dim) and grey.normalise.mean.item() == pytest.approx(sum(cfg["mean"]) / 3)


def test_names_and_untrained_weights():
    assert all(is_foreign(s) for s in ("timm:resnet18", "timm-untrained:x", "a/b.safetensors"))
    assert not any(is_foreign(s) for s in ("runs/demo/simclr/0-1", "resnet18", ""))
    state = torch.random.get_rng_state()
    first = lambda seed: open_encoder("timm-untrained:resnet10t", 1, 28, seed).backbone.conv1[0].weight
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="did you mean resnet10t"): open_encoder("timm:resnet10tt", 1, 28)
    with pytest.raises(ValueError, match="timm.list_models"): open_encoder("timm:qqqqqqqqqqqq", 1, 28)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, pretrained, **kwargs):
        assert pretrained
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="could not be fetched.*timm-untrained:resnet18 needs none"): open_encoder("timm:resnet18", 3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a run"),
        (["nowhere", "--norm", "l2"], "--norm needs --eps"),
        (["nowhere", "--eps", "8:255"], "such as 0.03 or 8/255; got '8:255'"),
        (["nowhere", "--eps", "1", "--norm", "l7"], "unknown norm 'l7'"),
        (["nowhere", "--images", "-1"], "0 for all; got -1"),
        (["timm-untrained:resnet1818", "--scale", "smoke"], "did you mean resnet18"),
        (["timm-untrained:resnet18", "--scale", "huge"], "huge"),
        (["timm-untrained:resnet18", "--scale", "smoke", "--attack", "autoattack9"], "it would not be autoattack"),
        (["timm-untrained:resnet18", "--scale", "smoke", "--measure", "fog"], "unknown measure 'fog'"),
        (["timm-untrained:resnet18", "--scale", "smoke", "--protocol", "lp"], "unknown protocol 'lp'"),
    ],
)
def test_what_the_command_line_refuses(arguments, message):
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_one_command_evaluates_a_network_from_elsewhere_and_goes_on(tmp_path):
    command = ["evaluate", "timm-untrained:resnet10t", "--scale", "smoke", "--protocol", "linear", "--attack", "square3", "--eps", "4/255"]
    command += ["--eps", "0.5", "--norm", "linf", "--norm", "l2", "--images", "6", "--measure", "certified", "--keep", str(tmp_path)]
    from advssl.evaluate import protocol

    real = protocol.MEASURES["certified"]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(protocol.MEASURES, "certified", lambda *a, **k: real(*a, **k, select=3, draws=5))
        results = [CliRunner().invoke(app, command) for _ in range(2)]
    assert results[0].exit_code == 0 and results[0].stdout == results[1].stdout
    found = json.loads(results[0].stdout)
    assert found["encoder"] == "timm-untrained:resnet10t" and found["robust_images"] == 6
    keys = [f"linear.square3.{ball}" for ball in ("linf-0.01569", "linf-0.5", "l2-0.01569", "l2-0.5")]
    assert {*keys, "linear.certified.l2-0.5", "linear.clean"} <= set(found) and "knn.clean" not in found
    assert list(tmp_path.glob("units/*.json")) and radius("4/255") == 4 / 255
