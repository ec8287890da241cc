"One function for each parity file: a case's inputs to its outputs, by calls of the library and without maths."
import torch
import torch.nn.functional as F
from parity_models import TanhEncoder, linear, tanh_layer, tanh_masks
from torch import nn

import advssl.trades
from advssl.attack import Perturbation, fgsm, pgd_path
from advssl.contrast import (
    contrast,
    hard_log_sum,
    info_nce,
    log_sum,
    logits,
    mix_pairs,
    mix_query,
    nt_xent,
    select,
    supcon,
    unit,
    view_pairs,
)
from advssl.diversity import diversity
from advssl.encoders import Encoder, Normalise
from advssl.masked import grid_coordinates, sincos_position_embedding
from advssl.method import Method, Player, Views, play
from advssl.methods.adco import AdCo
from advssl.methods.adios import ADIOS, area_penalty
from advssl.methods.adpe import Shift
from advssl.methods.advcl import AdvCL, high_pass
from advssl.methods.byol import bootstrap_loss
from advssl.methods.caco import CaCo
from advssl.methods.deacl import DeACL
from advssl.methods.dynacl import air_loss, invariance
from advssl.methods.jigsaw import force_identity, shuffle
from advssl.methods.rotation import AdvRotation, rotate
from advssl.threat import Linf
from advssl.trades import divergence

# bank


def _with_bank(cls, inputs, **names):
    "A method whose bank holds the case's slots and velocity; the files store them as columns. `names`: our settings, their names."
    W, v = inputs["W0"].T, inputs["v0"].T
    encoder = nn.Identity()
    encoder.out_dim = 1
    own = {ours: inputs["hyper"][theirs] for ours, theirs in names.items()}
    method = cls(encoder, bank_size=len(W), embedding_dim=W.shape[1], hidden_dim=1, **own).double()
    method.bank.load_state_dict({"W": W, "velocity": v, "hits": method.bank.hits})
    return method


def adco_bank(inputs):
    mode, out = inputs["mode"], []
    temperatures = {"temperature": "moco_t", "bank_temperature": "mem_t"}
    method = _with_bank(AdCo, inputs, bank_momentum="momentum", bank_decay="mem_wd", bank_lr="memory_lr", **temperatures)
    bank, weight = method.bank, 0.5 if mode == "sym" else 1.0
    for step in inputs["steps"]:
        queries = ["q_pred", "k_pred"] if mode == "sym" else [name for name in step if name != "k"]
        leaf = {name: torch.stack(list(step[name])).requires_grad_() for name in queries}  # a copy; crops may be a list
        crops = [crop for q in leaf.values() for crop in (q if q.ndim == 3 else [q])]
        keys = [step["k"], step["q"]] if mode == "sym" else [step["k"]] * len(crops)
        losses, pulls = zip(*(method.contrast(q, k) for q, k in zip(crops, keys, strict=True)), strict=True)
        loss = weight * torch.stack(losses).sum()
        grads = torch.autograd.grad(loss, list(leaf.values()))
        outside = torch.stack([bank.metrics(q, k)["outside"] for q, k in zip(crops, keys, strict=True)])
        bank.move(*pulls, weights=[weight] * len(pulls))
        out.append({"loss": loss.detach(), "bank_prob": outside.mean() if mode == "sym" else outside[0]})
        out[-1] |= {"W": bank.W.T.clone(), "v": bank.velocity.T.clone()}
        out[-1] |= {"grad_q": grads[0]} | {f"grad_{name}": grad for name, grad in zip(leaf, grads, strict=True)}
    return {"steps": out}


def caco_bank(inputs):
    temperatures, out = {"temperature": "moco_t", "bank_temperature": "bank_t"}, []
    method = _with_bank(CaCo, inputs, bank_momentum="mem_momentum", bank_lr="memory_lr", **temperatures)
    bank = method.bank
    for step in inputs["steps"]:
        views = [step[name].clone().requires_grad_() for name in ("q_pred", "k_pred")]
        labels = [bank.nearest(step["k"]), bank.nearest(step["q"])]  # each view's query, the other view's key
        losses, pulls = zip(*(method.contrast(q, y) for q, y in zip(views, labels, strict=True)), strict=True)
        grads = torch.autograd.grad(sum(losses), views)
        positive_prob = bank.metrics(views[0], positives=labels[0])["positive"]
        bank.move(*pulls)
        out.append({"loss": sum(losses).detach(), "positive_prob": positive_prob})
        out[-1] |= {"labels_1": labels[0], "labels_2": labels[1]}
        out[-1] |= {"W": bank.W.T.clone(), "v": bank.velocity.T.clone()}
        out[-1] |= {"grad_q_pred": grads[0], "grad_k_pred": grads[1]}
    return {"steps": out}


# attack


def _iterates(objective, inputs, x, delta0, **settings):
    "The images after each step of an L-infinity attack with the case's settings."
    steps = {"steps": inputs["steps"], "step_size": inputs["alpha"], "start": delta0}
    path = pgd_path(objective, x, Linf(inputs["epsilon"]), **steps, **settings)
    return torch.stack([point for point, _ in path][1:])


def attack_ce_pgd(inputs):
    net, labels = TanhEncoder(inputs["encoder"]), inputs["labels"].long()
    case = lambda t: F.cross_entropy(net(t), labels), inputs, inputs["x"], inputs["delta0"]
    acl = _iterates(*case, model=net, clip_start=False)
    return {"x_adv_acl": acl, "x_adv_rocl": _iterates(*case, model=net, last="project")}


def attack_rocl(inputs):
    net, x1, x2 = TanhEncoder(inputs["encoder"]), inputs["x1"], inputs["x2"]
    rocl = {"temperature": inputs["temperature"], "stop_columns": True, "guard": 1e-8}
    loss = lambda a, b: nt_xent(torch.stack([net(a), net(b)]), **rocl)
    path = _iterates(lambda t: loss(t, x2), inputs, x1, inputs["delta0"], model=net, last="project")
    reg = loss(path[-1], x2 if inputs["regularizer"] == "other" else x1) / inputs["weight"]
    reg.backward()
    return {"x_adv_after_each_step": path, "reg_loss": reg, "reg_grads": net.grads()}


def attack_acl(inputs):
    "Rows 2i and 2i + 1 are views; with single_image the odd ones stay as they are."
    net, attacked = TanhEncoder(inputs["encoder"]), slice(None, None, 2 if inputs["single_image"] else 1)

    def views(t):
        x = inputs["x"].clone()
        x[attacked] = t
        return x

    def objective(t):
        z = net(views(t))
        return nt_xent(torch.stack([z[::2], z[1::2]]), inputs["temperature"])

    x, delta0 = inputs["x"][attacked], inputs["delta0"][attacked]
    path = _iterates(objective, inputs, x, delta0, model=net, clip_start=False)
    return {"x_adv_after_each_step": torch.stack([views(t) for t in path])}


def attack_clae(inputs):
    net, x = TanhEncoder(inputs["encoder"]), inputs["x"]
    z = net(x).detach()
    loss = lambda t: nt_xent(torch.stack([z, net(t)]), inputs["temperature"])
    x_adv = fgsm(loss, x, Linf(inputs["epsilon"]), model=net, pixels=None)
    return {"x_adv": x_adv, "loss_before": loss(x), "loss_after": loss(x_adv)}


# contrast


def _graded(loss, others=(), **leaves):
    "A loss, other outputs, and the gradients of the loss as grad_<name>."
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss, **dict(others)} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def _blocked(z, views): return torch.stack(z.chunk(views))  # rows of view 1, then of view 2, ...


def ntxent_acl(inputs):
    z = inputs["z"].requires_grad_()
    return _graded(nt_xent(torch.stack([z[::2], z[1::2]]), inputs["temperature"]), z=z)


def ntxent_clae(inputs):
    z_i, z_j = (inputs[name].requires_grad_() for name in ("z_i", "z_j"))
    return _graded(nt_xent(torch.stack([z_i, z_j]), inputs["temperature"]), z_i=z_i, z_j=z_j)


def _rocl(inputs, views, positives):
    z, tau, guard = inputs["z"].requires_grad_(), inputs["temperature"], 1e-8
    loss = nt_xent(_blocked(z, views), tau, stop_columns=True, guard=guard, positives=positives)
    _, (sim, _) = view_pairs(unit(_blocked(z, views), guard))
    return _graded(loss, {"similarity": logits(sim, temperature=tau).flatten(0, 1)}, z=z)


def ntxent_rocl_2view(inputs): return _rocl(inputs, 2, "mean")


def ntxent_rocl_3view(inputs): return _rocl(inputs, 3, "sum")


def supcon_advcl(inputs):
    f, tau = inputs["features"].requires_grad_(), {name: inputs[name] for name in ("temperature", "base_temperature")}
    return _graded(supcon(f.transpose(0, 1), **tau, normalise=False), features=f)


def ifm(inputs):
    q_raw, tau, eps = inputs["q_raw"].requires_grad_(), inputs["temperature"], inputs["epsilon"]
    q, k = unit(q_raw), unit(inputs["k_raw"])
    (pos, _), neg = select(q @ k.T, torch.arange(len(q))), q @ inputs["queue"]
    alpha = None if inputs["ifm_only"] else inputs["alpha"]
    others = {
        "logits": logits(pos, neg, temperature=tau),
        "logits_adv": logits(pos, neg, temperature=tau, margin=(eps, eps)),
        "loss_clean": info_nce(q, k, neg, temperature=tau),
        "loss_adv": info_nce(q, k, neg, temperature=tau, margin=(eps, eps)),
    }
    return _graded(info_nce(q, k, neg, temperature=tau, margin=(eps, eps), alpha=alpha), others, q_raw=q_raw)


def hcl(inputs):
    out = {name: inputs[name].requires_grad_() for name in ("out_1", "out_2")}
    pos, neg = view_pairs(torch.stack(list(out.values())))
    tau, clamped = inputs["temperature"], torch.zeros(())
    if inputs["estimator"] == "easy": log_neg = log_sum(neg, temperature=tau)
    else: log_neg, clamped = hard_log_sum(pos, neg, temperature=tau, beta=inputs["beta"], tau_plus=inputs["tau_plus"])
    return _graded(contrast(pos, log_neg, tau).mean(), {"clamped_rows": clamped.sum()}, **out)


def mochi(inputs):
    q, k, queue, tau = inputs["q"].requires_grad_(), inputs["k"], inputs["queue"], inputs["temperature"]
    hard = inputs["hard_indices"].long()
    i, j, j2 = (hard.gather(1, inputs[name].long()) for name in ("idx_i", "idx_j", "idx_s2"))
    sim = q @ queue.T
    blocks = sim, mix_pairs(sim, queue, i, j, inputs["alpha"]), mix_query(q, sim, j2, inputs["beta"])
    pos, _ = select(q @ k.T, torch.arange(len(q)))
    others = {"logits": logits(pos, *blocks, temperature=tau)}
    return _graded(info_nce(q, k, *blocks, temperature=tau), others, q=q)


# masked


def adpe_pos_embed(inputs):
    grid = grid_coordinates(inputs["grid"], inputs["grid"]).double()
    delta = inputs["delta"].requires_grad_()
    shifted = sincos_position_embedding(grid + delta, inputs["dim"])
    (grad,) = torch.autograd.grad(shifted, delta, inputs["cotangent"])
    clean = sincos_position_embedding(grid, inputs["dim"])
    return {"pos_embed_shifted": shifted, "pos_embed_clean": clean, "grad_delta": grad}


# diversity


def ensemble_logdet(inputs):
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("g1", "g2", "g3")}
    value = diversity(list(leaves.values())).mean()
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {"log_det": value.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


# trades


def trades(inputs):
    net, labels = TanhEncoder(inputs["encoder"]), inputs["labels"].long()
    natural = net(inputs["x"]).detach()
    path = _iterates(lambda t: divergence(natural, net(t)), inputs, inputs["x"], inputs["delta0"], model=net, clip_start=False)
    player = Perturbation(Linf(inputs["epsilon"]), inputs["steps"], inputs["alpha"], inputs["delta0"], clip_start=False)
    loss = advssl.trades.trades(net, inputs["x"], labels, player, inputs["beta"])
    loss.backward()
    return {"x_adv_after_each_step": path, "loss": loss, "loss_grads": net.grads()}


# AdvCL


def advcl_high_pass(inputs): return {"high_pass": high_pass(inputs["x"], inputs["radius"])}


def attack_advcl(inputs):
    net, heads = TanhEncoder(inputs["encoder"]), inputs["heads"]
    net.out_dim = len(net.b2)
    clusters = " ".join(str(len(head["b"])) for head in heads)
    method = AdvCL(net, nn.Identity(), inputs["temperature"], clusters=clusters, weight=inputs["ce_weight"], upstream=True).double()
    method.heads.load_state_dict({ours: torch.cat([head[theirs] for head in heads]) for ours, theirs in (("weight", "W"), ("bias", "b"))})
    high, targets = high_pass(inputs["org"], inputs["radius"]), inputs["targets"].long().T
    fixed = torch.stack([net(t) for t in (inputs["t1"], inputs["t2"], high)]).detach()
    search = lambda objective, start: _iterates(objective, inputs, inputs["org"], inputs[start], model=method, clip_start=False)
    x_cl = search(lambda t: method.loss(torch.cat([net(t)[None], fixed])), "delta0_cl")
    x_ce = search(lambda t: method.pseudo_loss(net(t), targets), "delta0_ce")
    return {"x_cl_after_each_step": x_cl, "x_ce_after_each_step": x_ce, "high_pass": high}


# DeACL


def attack_deacl(inputs):
    student, teacher, x = TanhEncoder(inputs["student"]), TanhEncoder(inputs["teacher"]), inputs["x"]
    method, target = DeACL(student, teacher), teacher(x).detach()
    path = _iterates(lambda t: method.distance(student(t), target), inputs, x, inputs["delta0"], model=student, clip_start=False)
    loss = method.loss(student(x), student(path[-1]), target)
    loss.backward()
    outer = {"formula_outer_loss": loss, "formula_outer_grads": student.grads()}
    return {"teacher_features": target, "x_adv_after_each_step": path} | outer


# DynACL


def air(inputs):
    names = "zi", "zj", "z_orig", "zi_adv", "zj_adv"
    leaves, how = {k: inputs[k].requires_grad_() for k in names}, {k: inputs[k] for k in ("temperature", "weight", "lambda1", "lambda2")}
    total, parts = air_loss(*leaves.values(), **how, form="upstream")
    upstream = _graded(total, {"total": total, **parts}, **leaves)
    exact, product = (invariance(*leaves.values(), inputs["temperature"], form) for form in ("exact", "product"))
    return {"upstream": upstream, "exact_by_formula": {"SIR": exact[0], "AIR_renormalised": exact[1], "AIR_not_renormalised": product[1]}}


# ADIOS


def adios_penalty(inputs):
    areas = inputs.get("areas", inputs.get("areas_fp32")).requires_grad_()
    price = area_penalty(areas, margin=0.0)
    return {"penalty": price, "grad": torch.autograd.grad(price.sum(), areas)[0]}


def adios_losses(inputs):
    z1, z2 = (inputs[name].requires_grad_() for name in ("z1", "z2"))
    simclr, byol = nt_xent(torch.stack([z1, z2]), inputs["temperature"]), bootstrap_loss(z1, z2.detach()).mean()
    grads = torch.autograd.grad(simclr, (z1, z2))
    out = {"simclr_loss": simclr, "simclr_grad_z1": grads[0], "simclr_grad_z2": grads[1]}
    return out | {"byol_loss": byol, "byol_grad_p": torch.autograd.grad(byol, z1)[0]}


def _adios_encoder(weight, bias):
    "The stand-in, whose mean colour is 0."
    encoder = Encoder(tanh_layer(weight, bias), len(bias), in_channels=3)
    encoder.normalise = Normalise([0.0] * 3, [1.0] * 3)
    return encoder.double()


def _adios(inputs, base, **settings):
    "ADIOS as the official code has it, with the stand-in networks of the file."
    w = inputs["params"]
    encoder = _adios_encoder(w["W1"], w["b1"])
    settings |= {"masks": inputs["N"], "weight": inputs["alpha_sparsity"], "margin": 0.0, "reduction": "sum", "symmetric": False}
    method = ADIOS(encoder, base, **settings).double()
    method.projector, method.mask_net = linear(w["Wp"], w["bp"]), tanh_masks(w)
    method.masker.modules = (method.mask_net,)
    return method, Views(strong1=inputs["x_orig"], strong2=inputs["x_transformed"])


def _adios_turns(method, views, names):
    "Both turns, nobody having moved: objectives and gradients by the names of the file."
    (loss, network), (objective, masker) = method.turns(views)
    mine, theirs = (torch.autograd.grad(value, player.parameters()) for value, player in ((loss, network), (objective, masker)))
    out = {"inpaint_loss": loss, "inpaint_grads": dict(zip(names, mine, strict=True)), "mask_objective": objective}
    mask_grads = dict(zip(("Wm1", "bm1", "Wm2", "bm2"), (g.squeeze() for g in theirs), strict=True))
    return out | {"masks": method.mask_net(views.strong2), "mask_objective_grads": mask_grads}


def adios_simclr(inputs):
    return _adios_turns(*_adios(inputs, "simclr", temperature=inputs["temperature"]), ("W1", "b1", "Wp", "bp"))


def adios_s_simclr(inputs):
    "The official code draws another mask for the second turn; ours plays both turns with one."
    out = {}
    for turn, chosen in (("inpaint", inputs["chosen_inpaint"]), ("mask", inputs["chosen_mask"])):
        method, views = _adios(inputs, "simclr", temperature=inputs["temperature"])
        method.choose = lambda masks, chosen=chosen: masks[torch.arange(len(masks)), chosen.long()][:, None]
        both = _adios_turns(method, views, ("W1", "b1", "Wp", "bp"))
        out |= {name: value for name, value in both.items() if name.startswith(turn)}
    return out


def adios_byol(inputs):
    method, views = _adios(inputs, "byol")
    w = inputs["params"]
    method.predictor = linear(w["Wq"], w["bq"])
    method.target.module = nn.Sequential(_adios_encoder(w["W1_mom"], w["b1_mom"]), linear(w["Wp_mom"], w["bp_mom"])).requires_grad_(False)
    return _adios_turns(method, views, ("W1", "b1", "Wp", "bp", "Wq", "bq"))


# AdPE


def adpe_adversary(inputs):
    "Six moves of the shift. A decay, which at the official negative rate is a growth, is played at that rate by a player who descends."
    grows, ball = inputs["weight_decay"] > 0, {1: "l2", 2: "linf"}.get(inputs["norm_type"])
    shift, after = Shift(2, inputs["limit"], ball or "l2"), []
    shift.value = nn.Parameter(inputs["token0"].clone())
    player = Player("shift", (shift,), -1 if grows else 1, project=shift.project if ball else None)
    how = {"betas": tuple(inputs["betas"].tolist()), "eps": inputs["eps"], "weight_decay": inputs["weight_decay"]}
    optimizer = torch.optim.AdamW(player.parameters(), inputs["adv_lr"], **how)
    if grows: optimizer.param_groups[0]["lr"] *= -1
    game = Method(nn.Identity())
    game.turns = lambda gradient: [((gradient * shift.value).sum(), player)]
    for gradient in inputs["grads"]:
        play(game, gradient, {"shift": optimizer})
        after.append(shift.value.detach().clone())
    return {"token_after_each_step": torch.stack(after)}


# pretext tasks


def rotation(inputs): return {"x_rotated": rotate(inputs["x"], inputs["labels"].long())}


def jigsaw(inputs):
    permutations, labels = (inputs[name].long() for name in ("permutations", "drawn_order"))
    labels = force_identity(labels, inputs["drawn_uniform"], inputs["bias"])
    orders = torch.cat([torch.arange(permutations.shape[1])[None], permutations])
    return {"x_jigsaw": shuffle(inputs["x"], orders[labels]), "labels": labels}


def attack_rotation(inputs):
    net, labels = TanhEncoder(inputs["encoder"]), inputs["labels"].long()
    net.out_dim = len(net.b2)
    method = AdvRotation(net).double()
    method.head = nn.Identity()
    method.player = Perturbation(Linf(inputs["epsilon"]), inputs["steps"], inputs["alpha"], inputs["delta0"], clip_start=False)
    objective = lambda t: method.losses(method.logits(t), labels)
    path = _iterates(objective, inputs, inputs["x_rotated"], inputs["delta0"], model=method, clip_start=False)
    loss = method.objective(inputs["x_rotated"], labels)
    loss.backward()
    return {"x_adv_after_each_step": path, "formula_outer_loss": loss, "formula_outer_grads": net.grads()}
