"Fine-tuning: limits to the bit, frozen means frozen, test data has no way in, resume, and mutants that the same checks must reject."

import copy
import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.attack import Perturbation
from advssl.data import Splits
from advssl.encoders import add_branches, branch, make_encoder
from advssl.evaluate import finetune as module
from advssl.evaluate import protocol
from advssl.evaluate.finetune import (
    MODES,
    TUNINGS,
    FineTune,
    Tuning,
    TuningRun,
    epochs_to,
    find_mode,
    find_tuning,
    finetune,
    fingerprint,
    new_head,
)
from advssl.evaluate.protocol import PROTOCOLS, STANDARD, evaluate
from advssl.evaluate.robust import robust_accuracy
from advssl.features import Noisy
from advssl.images import ImageSet, stratified, stream
from advssl.masked import fix_position
from advssl.method import Views, count_passes
from advssl.suite.scales import SCALES
from advssl.threat import L2, Linf

QUICK = Tuning(epochs=2, lr=0.01, batch_size=40, augmentation="none", steps=2, heldout=0.2, judge_steps=2)  # a mirror changes the class
BALL = Linf(0.1)


@cache
def toys(n=200, seed=0):
    "Four classes of 6x6 images: a bright quarter, noise on everything."
    torch.manual_seed(seed)
    labels = torch.arange(n) % 4
    x = 0.25 * torch.rand(n, 1, 6, 6)
    for i, c in enumerate(labels.tolist()): x[i, 0, 3 * (c // 2) : 3 * (c // 2) + 3, 3 * (c % 2) : 3 * (c % 2) + 3] += 0.5
    order = torch.randperm(n)
    return ImageSet.from_float(x[order], labels[order], tuple("abcd"), "toys")


def net(seed=0, norm=True):
    "A plain module with BatchNorm whose statistics are not those of any batch, in training mode."
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    with torch.no_grad(): encoder(2 * torch.rand(32, 1, 6, 6) - 0.3)
    return encoder.train()


def state(module): return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tune(mode, encoder=None, images=None, threat=BALL, seed=0, **changes):
    options = {k: changes.pop(k) for k in ("folder", "checkpoint_seconds") if k in changes}
    return finetune(encoder or net(), images or toys(), mode, threat=threat, tuning=replace(QUICK, **changes), seed=seed, **options)


def told(tuned): return [{k: v for k, v in h.items() if k != "seconds"} for h in tuned.history]


# limits


@pytest.mark.parametrize(("attacked", "standard"), [("alf", "slf"), ("aff", "sff")])
@pytest.mark.parametrize("ball", [Linf, L2])
def test_without_a_ball_or_steps_the_modes_are_one(attacked, standard, ball):
    a, b = (tune(m, threat=ball(0.0), augmentation="weak") for m in (attacked, standard))
    assert same(state(a.classifier), state(b.classifier)) and told(a) == told(b) and a.epoch == b.epoch
    a, b = (tune(m, threat=ball(0.2), steps=0) for m in (attacked, standard))
    assert same(state(a.classifier), state(b.classifier)) and told(a) == told(b) and a.epoch == b.epoch


@pytest.mark.parametrize(("attacked", "standard"), [("alf", "slf"), ("aff", "sff")])
def test_trades_without_weight_is_clean_training(attacked, standard):
    a, b = tune(attacked, net(norm=False), loss="trades", beta=0.0, epochs=1), tune(standard, net(norm=False), epochs=1)
    assert same(state(a.classifier), state(b.classifier))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_without_a_rate(mode):
    tuned = tune(mode, lr=1e-30, weight_decay=0.0, optimizer="sgd")
    weights = tuned.classifier[1][1]
    assert weights.weight.abs().max() < 1e-20 and weights.bias.abs().max() < 1e-20
    assert all(torch.equal(a, b) for a, b in zip(tuned.classifier[0].parameters(), net().parameters(), strict=True))


# what moves


def moves():
    "The given encoder never; the copy's weights and buffers in full modes only; the head always."
    ok = True
    for mode in MODES.values():
        encoder = net()
        flags = lambda encoder=encoder: [p.requires_grad for p in encoder.parameters()]
        wanted, before = flags(), state(encoder)
        tuned = tune(mode.name, encoder)
        ok &= same(state(encoder), before) and all(m.training for m in encoder.modules()) and flags() == wanted
        ok &= all(p.grad is None for p in encoder.parameters())
        after = state(tuned.classifier[0])
        changed = {k for k in after if not torch.equal(after[k], before[k])}
        ok &= {"0.weight", "1.weight", "1.running_mean"} <= changed if mode.full else not changed
        ok &= bool(tuned.classifier[1][1].weight.abs().max() > 1e-3) and not any(m.training for m in tuned.classifier.modules())
    return ok


def test_frozen_means_frozen():
    assert moves()


def wrong_train(self, mode=True): return super(FineTune, self).train(mode)


def wrong_modes(): return {n: replace(m, full=not m.full) for n, m in MODES.items()}


@pytest.mark.parametrize("what", ["train mode", "swapped modes", "no copy"])
def test_a_thawed_encoder_is_seen(monkeypatch, what):
    if what == "train mode": monkeypatch.setattr(FineTune, "train", wrong_train)
    if what == "swapped modes":
        wrong = wrong_modes()
        monkeypatch.setattr(module, "find_mode", lambda name: wrong[find_mode(name).name])
    same_object = lambda m: m if isinstance(m, nn.Sequential) else copy.deepcopy(m)
    if what == "no copy": monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=same_object))
    assert not moves()


def test_only_the_active_branch_is_tuned():
    encoder = add_branches(net(), ["clean", "adv"])
    encoder[1].branches["adv"].weight.data *= 2
    for name, other in (("adv", "clean"), ("clean", "adv")):
        with branch(encoder, name): tuned, before = tune("aff", encoder), state(encoder)
        after = state(tuned.classifier[0])
        assert tuned.classifier[0][1].active == name and encoder[1].active == "clean"
        assert all(torch.equal(after[k], before[k]) for k in after if f".{other}." in k)
        assert not any(torch.equal(after[k], before[k]) for k in after if f".{name}." in k)
        assert fingerprint(encoder) != fingerprint(tuned.classifier[0])
    with branch(encoder, "adv"): one = fingerprint(encoder)
    assert one != fingerprint(encoder)


def test_an_averaged_copy_is_opened_and_a_fixed_table_is_not():
    tuned = tune("sff", net().requires_grad_(False))
    assert not torch.equal(tuned.classifier[0][0].weight, net()[0].weight)
    torch.manual_seed(0)
    vit = make_encoder("vit_demo", 1, 28)
    with torch.no_grad(): fix_position(vit.backbone)
    images = ImageSet(torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 2, ("a", "b"), "noise")
    tuned = tune("sff", vit, images, threat=None, epochs=1, batch_size=16)
    assert torch.equal(tuned.classifier[0].backbone.pos_embed, vit.backbone.pos_embed)
    assert not torch.equal(tuned.classifier[0].backbone.patch_embed.proj.weight, vit.backbone.patch_embed.proj.weight)


def test_timm_models_and_stochastic_encoders():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0, in_chans=1)
    images = ImageSet(torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"), "noise")
    for mode in ("alf", "aff"):
        tuned = tune(mode, model, images, epochs=1, batch_size=16, steps=1, judge_steps=1)
        assert tuned.classifier(torch.rand(2, 1, 32, 32)).shape == (2, 2)
    a, b = (tune("alf", Noisy(net(), 0.1)) for _ in range(2))
    assert same(state(a.classifier), state(b.classifier)) and told(a) == told(b)


# the step, written out a second time


def written(mode, encoder, head, x, y, eps, steps, start, beta=None):
    "The objective and its gradients with the attack in plain loops; the clean answer is forwarded at every step."
    f = nn.Sequential(encoder, head)
    x_adv = (x + start).clamp(0, 1)
    f.eval()
    kl = lambda a, b: (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)
    for _ in range(steps if mode.adversarial else 0):
        leaf = x_adv.clone().requires_grad_()
        value = F.cross_entropy(f(leaf), y, reduction="sum") if beta is None else kl(f(x).detach(), f(leaf)).sum()
        (g,) = torch.autograd.grad(value, leaf)
        x_adv = torch.maximum(torch.minimum(x_adv + 2.5 * eps / steps * g.sign(), x + eps), x - eps).clamp(0, 1)
    head.train()
    encoder.train(mode.full)
    if not mode.adversarial: loss = F.cross_entropy(f(x), y)
    elif beta is None: loss = F.cross_entropy(f(x_adv), y)
    else: loss = F.cross_entropy(clean := f(x), y) + beta * kl(clean, f(x_adv)).mean()
    return loss, torch.autograd.grad(loss, list(f.parameters() if mode.full else head.parameters()))


def game(mode, loss="ce", seed=0):
    encoder = net(seed).double()
    head = nn.Sequential(module.Standardise(torch.zeros(24).double(), torch.ones(24).double()), nn.Linear(24, 4).double())
    player = Perturbation(BALL, 3) if mode.adversarial else None
    x, y = torch.rand(7, 1, 6, 6, dtype=torch.float64), torch.arange(7) % 4
    made = FineTune(encoder, head, mode, player, replace(QUICK, loss=loss, beta=2.0)).train()
    made.stream = stream(3, seed)
    return made, x, y


def step_is_right():
    ok = True
    for mode in MODES.values():
        for loss in ("ce", "trades") if mode.adversarial else ("ce",):
            made, x, y = game(mode, loss)
            other = copy.deepcopy(made)
            ((value, who),) = made.turns(Views(image=x, labels=y))
            grads = torch.autograd.grad(value, who.parameters())
            start = BALL.random_start(x, stream(3, 0))
            theirs, by_theirs = written(mode, other.encoder, other.head, x, y, 0.1, 3, start, 2.0 if loss == "trades" else None)
            ok &= torch.allclose(value, theirs, rtol=1e-10) and len(grads) == len(by_theirs)
            ok &= all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(grads, by_theirs, strict=True))
    return ok


def test_the_step_is_the_written_one():
    assert step_is_right()


@pytest.mark.parametrize("what", ["attack dropped", "descends", "labels shifted", "beta dropped", "wrong mode frozen"])
def test_a_wrong_step_is_seen(monkeypatch, what):
    ce, trades = module.adversarial_cross_entropy, module.trades
    if what == "attack dropped": monkeypatch.setattr(module, "adversarial_cross_entropy", lambda m, x, y, *_: F.cross_entropy(m(x), y))
    descends = lambda m, x, y, p, g: ce(m, x, y, replace(p, sign=-1), g)
    if what == "descends": monkeypatch.setattr(module, "adversarial_cross_entropy", descends)
    if what == "labels shifted": monkeypatch.setattr(module, "adversarial_cross_entropy", lambda m, x, y, p, g: ce(m, x, (y + 1) % 4, p, g))
    if what == "beta dropped": monkeypatch.setattr(module, "trades", lambda m, x, y, p, beta, g: trades(m, x, y, p, 0.0, g))
    if what == "wrong mode frozen": monkeypatch.setattr(FineTune, "train", wrong_train)
    assert not step_is_right()


def test_passes_are_counted():
    K, units = 3, {}
    for mode in MODES.values():
        for loss in ("ce", "trades") if mode.adversarial else ("ce",):
            made, x, y = game(mode, loss)
            with count_passes(made.encoder) as passes:
                ((value, who),) = made.turns(Views(image=x, labels=y))
                value.backward(inputs=who.parameters())
            units[mode.name, loss] = passes.units(len(x))
    full = {("sff", "ce"): 3, ("aff", "ce"): 2 * K + 3, ("aff", "trades"): 2 * K + 7}
    assert units == full | {("slf", "ce"): 1, ("alf", "ce"): 2 * K + 1, ("alf", "trades"): 2 * K + 3}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), eps=st.sampled_from([0.0, 0.05, 0.4]), ball=st.sampled_from([Linf, L2]),
       mode=st.sampled_from(list(MODES.values())), use_trades=st.booleans())
def test_the_attack_keeps_its_contract(seed, eps, ball, mode, use_trades):
    "In the ball and in the pixel range, modes restored, no gradient left behind, same seed same bits."
    made, x, y = game(mode, "trades" if use_trades else "ce", seed % 1000)
    if mode.adversarial: made.player = Perturbation(ball(eps), 2)
    seen = []
    handle = made.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    modes = [m.training for m in made.modules()]
    made.stream = stream(seed)
    (one,) = [v.item() for v, _ in made.turns(Views(image=x, labels=y))]
    handle.remove()
    assert [m.training for m in made.modules()] == modes and all(p.grad is None for p in made.parameters())
    for image in seen:
        delta = (image - x).flatten(1)
        assert image.min() >= 0 and image.max() <= 1
        assert (delta.abs().amax() if ball is Linf else delta.norm(dim=1).max()) <= eps + 1e-9
    again, x, y = game(mode, "trades" if use_trades else "ce", seed % 1000)
    again.player, again.stream = made.player, stream(seed)
    assert [v.item() for v, _ in again.turns(Views(image=x, labels=y))] == [one]


# the choice of an epoch


def test_the_best_epoch_on_held_out_images_is_kept(monkeypatch):
    "The verdicts are made up; the classifier is that of the epoch they name, the earliest of equals, by the measure of the mode."
    standard, robust = [0.2, 0.9, 0.5, 0.9], [0.5, 0.1, 0.6, 0.6]
    real = TuningRun.judge

    def judge(self):
        epoch = self.step // self.loader.steps - 1
        monkeypatch.setattr(module, "clean_mask", lambda *a, **k: torch.arange(10) < 10 * standard[epoch])
        monkeypatch.setattr(module, "robust_mask", lambda *a, **k: torch.arange(10) < 10 * robust[epoch])
        seen.append(state(self.method.trained))
        return real(self)

    monkeypatch.setattr(TuningRun, "judge", judge)
    for mode, best in (("slf", 2), ("sff", 2), ("alf", 3), ("aff", 3)):
        seen = []
        tuned = tune(mode, epochs=4)
        assert tuned.epoch == best == tuned.settings["epoch"] and [h["robust"] for h in tuned.history] == pytest.approx(robust)
        assert torch.equal(tuned.classifier[1][1].weight, seen[best - 1]["1.1.weight" if MODES[mode].full else "0.1.weight"])
        assert (tuned.settings["heldout_standard"], tuned.settings["heldout_robust"]) == (standard[best - 1], robust[best - 1])


def test_held_out_images_are_a_stratified_share_and_never_trained_on(monkeypatch):
    seen = []
    real = FineTune.turns
    monkeypatch.setattr(FineTune, "turns", lambda self, views: seen.append(views.image.clone()) or real(self, views))
    tuned = tune("slf", epochs=3, augmentation="none", batch_size=160)
    held, rest = stratified(toys().labels, 0.2, 0)
    trained = {t.numpy().tobytes() for t in torch.cat(seen)}
    images = {k: {t.numpy().tobytes() for t in toys().images[i].float() / 255} for k, i in (("held", held), ("rest", rest))}
    assert trained == images["rest"] and not trained & images["held"]
    assert (tuned.settings["images"], tuned.settings["heldout_images"]) == (160, 40)
    assert toys().labels[held].bincount().tolist() == [10] * 4


def test_a_share_of_the_labels():
    tuned = tune("slf", labels=0.2, batch_size=500)
    assert (tuned.settings["images"], tuned.settings["heldout_images"]) == (32, 8)
    unlabelled = replace(toys(), labels=torch.full((200,), -1), sha256="")
    with pytest.raises(ValueError, match="no labels"): tune("slf", images=unlabelled)


def blind_to_test(monkeypatch):
    "Other test images or labels change neither weights nor the chosen epoch of any protocol."
    made, real = [], module.finetune
    monkeypatch.setattr(protocol, "finetune", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    test = toys(40, 7)
    for mode in MODES:
        for one in (test, replace(test, labels=test.labels.roll(1), sha256=""), toys(40, 8)):
            evaluate(net(), Splits(toys(), one), threat=BALL, protocols=[mode], attacks=["pgd1"], robust_images=4, tuning="smoke")
    groups = [made[i : i + 3] for i in range(0, len(made), 3)]
    alike = lambda a, b: same(state(a.classifier), state(b.classifier)) and told(a) == told(b) and a.epoch == b.epoch
    return len(made) == 12 and all(alike(a, b) and alike(a, c) for a, b, c in groups)


def test_test_data_has_no_way_in(monkeypatch):
    assert blind_to_test(monkeypatch)


def test_a_choice_on_test_data_is_seen(monkeypatch):
    "A protocol that hands the test images to the fine-tuning."
    real = protocol.finetune_protocol
    for mode in MODES:
        wrong = lambda task, mode=mode: real(replace(task, data=Splits(task.data.test, task.data.test)), mode)
        monkeypatch.setitem(PROTOCOLS, mode, wrong)
    assert not blind_to_test(monkeypatch)


# the protocol


def test_protocols_are_there_and_not_run_by_default():
    assert set(MODES) < set(PROTOCOLS) and not set(MODES) & set(STANDARD)
    both = Splits(toys(), toys(40, 7))
    settings = dict(protocols=["aff", "slf"], attacks=["pgd2"], robust_images=20, tuning="smoke", seed=3)
    found = evaluate(net(), both, threat=[BALL, L2(0.5)], **settings)
    record = found["aff.clean"]
    assert json.loads(json.dumps(found)) == found and {"aff.clean", "aff.pgd2.linf-0.1", "aff.pgd2.l2-0.5", "slf.clean"} <= set(found)
    assert (record["mode"], record["norm"], record["eps"], record["steps"]) == ("f4", "linf", 0.1, 1) and record["total"] == 40
    alone = finetune(net(), toys(), "F4", threat=BALL, tuning="smoke", seed=3)
    assert robust_accuracy(alone.classifier, toys(40, 7).images, toys(40, 7).labels, BALL, 2, seed=3).total == 40
    assert record["heldout_robust"] == alone.settings["heldout_robust"]
    without = evaluate(net(), both, threat=(), protocols=["slf"], tuning="smoke")
    assert without["slf.clean"]["heldout_robust"] is None
    with pytest.raises(ValueError, match="pass its ball"): evaluate(net(), both, threat=(), protocols=["aff"])


def test_every_scale_has_recipes():
    for scale in SCALES.values():
        for mode in MODES: assert isinstance(find_tuning(scale.tuning, mode), Tuning)
    assert all(set(t) == set(MODES) for t in TUNINGS.values())


# resume


class Killed(BaseException): pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", [8, 30])
def test_killed_and_resumed(tmp_path, mode, calls):
    "An exception out of the encoder, anywhere: the fine-tuning that goes on ends with the same bits; a finished one is only loaded."
    count = []

    def fate(*_):
        count.append(1)
        if len(count) == calls: raise Killed

    whole, mortal = tune(mode, epochs=3, milestones=(0.5,), optimizer="sgd"), net()
    mortal.register_forward_pre_hook(fate)
    options = dict(epochs=3, milestones=(0.5,), optimizer="sgd", folder=tmp_path)
    try: tune(mode, mortal, checkpoint_seconds=0, **options)
    except Killed: pass
    assert len(count) == calls or (tmp_path / "checkpoint.json").exists()
    torch.manual_seed(99)
    resumed = tune(mode, **options)
    assert same(state(whole.classifier), state(resumed.classifier)) and told(whole) == told(resumed) and whole.epoch == resumed.epoch
    again = tune(mode, **options)
    assert same(state(again.classifier), state(resumed.classifier)) and again.history == resumed.history
    for other in (dict(encoder=net(1)), dict(seed=1), dict(images=toys(200, 5)), dict(threat=Linf(0.2))):
        with pytest.raises(ValueError, match="another run"): tune(mode, **options | other)


def test_the_global_random_numbers_are_left_alone():
    encoder, images = net(), toys()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = tune("aff", encoder, images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(state(a.classifier), state(tune("aff").classifier)) and not same(state(a.classifier), state(tune("aff", seed=1).classifier))


def test_milestones_and_warm_up(tmp_path):
    tuning = replace(QUICK, epochs=5, lr=1.0, milestones=(0.4, 0.8), warmup_epochs=1.0, optimizer="sgd")
    rates = []
    real = TuningRun.one_step
    with pytest.MonkeyPatch.context() as patch:
        rate = lambda run: run.optimizers["network"].param_groups[0]["lr"]
        patch.setattr(TuningRun, "one_step", lambda self, views: (real(self, views), rates.append(rate(self))))
        finetune(net(), toys(), "slf", tuning=tuning)
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0]) and rates[8:] == pytest.approx([0.1] * 8 + [0.01] * 4)


# small things


def test_both_names_and_bad_input():
    assert [find_mode(n).name for n in ("F1", "f2", "sff", "AFF")] == list(MODES)
    a, b = tune("F4"), tune("aff")
    assert same(state(a.classifier), state(b.classifier))
    a, b = tune("aff", loss="trades"), finetune(net(), toys(), "aff", threat=BALL, tuning=QUICK, loss="trades")
    assert same(state(a.classifier), state(b.classifier))
    for call, message in (
        (lambda: find_mode("f5"), "choose one of slf"),
        (lambda: tune("alf", threat=None), "pass its ball"),
        (lambda: find_tuning("huge", "slf"), "choose one of smoke"),
        (lambda: Tuning(epochs=0), "epochs"),
        (lambda: Tuning(labels=0), "labels"),
        (lambda: Tuning(milestones=(60,)), "shares"),
        (lambda: Tuning(steps=-1), "steps"),
        (lambda: Tuning(loss="mse"), "'ce' or 'trades'"),
        (lambda: tune("slf", lr=-1.0), "lr must be"),
        (lambda: tune("slf", optimizer="adam"), "choose one of sgd"),
    ):
        with pytest.raises(ValueError, match=message): call()


def test_epochs_to():
    history = [{"epoch": e + 1, "robust": r} for e, r in enumerate((0.1, 0.4, 0.3, 0.5))]
    assert [epochs_to(history, a) for a in (0.0, 0.2, 0.4, 0.45, 0.6)] == [1, 2, 2, 4, None]
    assert epochs_to([{"epoch": 1, "robust": None}], 0.1) is None
    with pytest.raises(ValueError, match="divide percents"): epochs_to(history, 40)


def test_adversarial_training_makes_robust_and_standard_does_not():
    found = {m: tune(m, epochs=8, threat=Linf(0.15)).settings for m in ("sff", "aff")}
    assert found["aff"]["heldout_robust"] > found["sff"]["heldout_robust"] and found["aff"]["heldout_robust"] > 0.7


def test_head_starts_at_zero_behind_the_features_statistics():
    encoder = net()
    head = new_head(encoder, toys(), True)
    with torch.no_grad(): features = copy.deepcopy(encoder).eval()(toys().images.float() / 255)
    z = head[0](features)
    live = features.std(0) > 1e-5
    torch.testing.assert_close(z[:, live].mean(0), torch.zeros(int(live.sum())), atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:, live].std(0, correction=0), torch.ones(int(live.sum())), atol=1e-3, rtol=0)
    assert z.isfinite().all() and not head[1].weight.any() and torch.equal(new_head(encoder, toys(), False)[0](features), features)
