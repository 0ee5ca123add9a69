"""AdaDiff's uncertainty heads: their numbers, their names on disk, and that running all at once changes nothing."""

from pathlib import Path

import pytest
import torch
from exit_networks import certainty_maps
from torch.nn import functional

import sample
from libs import config as config_files
from libs import uvit_checkpoint
from libs.backbones import uvit
from libs.build import describe
from libs.checkpoint import build_backbone, infer_uvit, load_described, save_backbone
from libs.errors import UserError
from libs.heads import UEMHeads

FORMS = ("released", "paper")
UVITS = sorted(path.stem for path in Path("configs").glob("*uvit*.py"))
TINY = {"name": "uvit", "img_size": 8, "patch_size": 4, "in_chans": 3, "embed_dim": 64, "depth": 4, "num_heads": 1,
        "mlp_ratio": 4.0, "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1, "conv": True, "skip": True}


def tiny(**options):
    """A U-ViT whose layers and heads all say something of their own."""
    net = build_backbone(TINY | options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def shown(net, rows=3, dtype=torch.float32):
    """Arguments of a call, with what the network is conditioned on."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, net.in_chans, net.img_size, net.img_size, generator=generator, dtype=dtype)
    cond = {"y": torch.arange(rows)} if net.num_classes > 0 else {}
    if net.num_clip_token:
        width = net.context_embed.in_features
        cond["context"] = torch.randn(rows, net.num_clip_token, width, generator=generator, dtype=dtype)
    return (x, torch.linspace(1, 900, rows)), cond


def one_after_another(net, args, cond):
    """What `every_layer=True` should give, by one head and one layer at a time."""
    tokens, skips, out, certainty = net.embed(*args, **cond), [], [], []
    for layer, block in enumerate(net.block_list()):
        half = net.depth // 2
        tokens = block(tokens, skips.pop()) if layer > half else block(tokens)
        if layer < half:
            skips.append(tokens)
        out.append(net.head(tokens))
        maps = certainty_maps(net, layer, tokens.detach(), net.uem_time(args[1]))
        certainty.append(net.unpatchify(maps))
    return torch.stack(out), torch.stack(certainty)


# What a head computes


def test_heads_start_as_a_uvit_does():
    heads = UEMHeads(512, 12, 13)
    weights = torch.stack([head.lte.weight for head in heads]).detach()
    assert abs(weights.std() - 0.02) < 2e-4
    assert abs(weights.mean()) < 2e-4
    assert weights.abs().max() < 2  # truncated
    assert not torch.stack([head.lte.bias for head in heads]).any()
    assert len({float(weight[0, 0]) for weight in weights}) == 13


@pytest.mark.parametrize("form", FORMS)
def test_certainty_is_a_sigmoid_of_one_linear_map(form):
    net = tiny(uem=form, num_classes=5)
    tokens, time = torch.randn(2, 2 + 4, 64), torch.tensor([3.0, 700.0])
    for layer, head in enumerate(net.lte_classifer):
        features = tokens[:, 2:]
        if form == "paper":  # [L_i, timestep embedding], equation 5
            embedding = uvit.timestep_embedding(time, 64)
            features = torch.cat([features, embedding[:, None].expand_as(features)], dim=-1)
        expected = functional.linear(features, head.lte.weight, head.lte.bias).sigmoid()
        certainty = certainty_maps(net, layer, tokens, net.uem_time(time))
        assert certainty.shape == (2, 4, 48)
        torch.testing.assert_close(certainty, expected, atol=1e-6, rtol=0)
    assert (net.uem_time(time) is None) == (form == "released")


def test_certainty_is_float32_under_autocast():
    net = tiny(uem="paper")
    args, cond = shown(net)
    exact = net(*args, **cond, every_layer=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, certainty = net(*args, **cond, every_layer=True)
    assert (out.dtype, certainty.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(certainty, exact)
    assert (certainty - exact).abs().mean() < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_as_certain_as_their_patches(form):
    net = tiny(uem=form, num_classes=5)
    tokens, time = torch.randn(3, 2 + 4, 64), net.uem_time(torch.tensor([3.0, 400.0, 900.0]))
    ask = net.mean_certainty()
    for layer in range(5):
        expected = certainty_maps(net, layer, tokens, time).mean(dim=(1, 2)).tolist()
        assert ask(layer, tokens, time) == pytest.approx(expected, abs=1e-6)
        assert ask(layer, tokens[1:], time if time is None else time[1:]) == pytest.approx(expected[1:], abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_asked_in_the_precision_of_their_tokens(form):
    """Autocast makes no copy of them: float32 tokens, as the in-blocks give them, are not rounded."""
    net = tiny(uem=form)
    tokens, time = torch.randn(2, 5, 64), net.uem_time(torch.tensor([3.0, 700.0]))
    exact = net.mean_certainty()(2, tokens, time)
    with torch.autocast("cpu", torch.bfloat16):
        ask = net.mean_certainty()
        assert ask(2, tokens, time) == exact
        rounded = ask(2, tokens.bfloat16(), time)
        assert ask(2, tokens, time) == exact
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.01)


# All of them at once


@pytest.mark.parametrize("together", [1, 2, 4, 9])
@pytest.mark.parametrize("form", FORMS)
def test_every_head_is_each_head(monkeypatch, form, together):
    """Values and gradients are those of a plain loop, with labels and text beside the patches."""
    monkeypatch.setattr(uvit, "TOGETHER", together)
    net = tiny(uem=form, num_classes=5, clip_dim=6, num_clip_token=3).double()
    args, cond = shown(net, dtype=torch.float64)
    weights = torch.randn(2, 5, 3, 3, 8, 8, dtype=torch.float64)
    results = []
    for run in (lambda: net(*args, **cond, every_layer=True), lambda: one_after_another(net, args, cond)):
        net.zero_grad()
        out, certainty = run()
        assert out.shape == certainty.shape == (5, 3, 3, 8, 8)
        (weights[0] * out + weights[1] * certainty).sum().backward()
        results.append((out.detach(), certainty.detach(), {name: each.grad for name, each in net.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][2].values())
    with torch.no_grad():
        torch.testing.assert_close(net(*args, **cond), results[0][0][-1], atol=1e-12, rtol=0)
        torch.testing.assert_close(net(*args, **cond, every_layer=True)[1], results[0][1], atol=1e-6, rtol=0)


def test_networks_without_skips_or_heads_give_every_layer_too():
    net = tiny(skip=False)
    args, cond = shown(net)
    with torch.no_grad():
        out, certainty = net(*args, **cond, every_layer=True)
        assert certainty is None
        tokens = net.embed(*args)
        for layer, block in enumerate(net.block_list()):
            tokens = block(tokens)
            torch.testing.assert_close(out[layer], net.head(tokens), atol=1e-6, rtol=1e-6)


def test_heads_change_nothing_of_the_output():
    net = tiny(num_classes=5)
    args, cond = shown(net)
    before = net(*args, **cond)
    net.add_uem_heads("paper")
    assert torch.equal(net(*args, **cond), before)


@pytest.mark.parametrize("form", FORMS)
def test_certainty_gives_the_backbone_no_gradient(form):
    net = tiny(uem=form)
    args, cond = shown(net)
    net(*args, **cond, every_layer=True)[1].sum().backward()
    for name, parameter in net.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == name.startswith("lte_classifer."), name


def test_compiled_as_one_graph():
    net = tiny(uem="paper", depth=2)
    args, cond = shown(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    gradients = []
    for each in (net, compiled):
        net.zero_grad()
        out, certainty = each(*args, **cond, every_layer=True)
        (out.square().sum() + certainty.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


# Every U-ViT config


@pytest.mark.parametrize(("name", "parameters"), [
    ("cifar10_uvit_small", 80_028), ("celeba64_uvit_small", 320_112), ("imagenet256_uvit_large", 344_400),
    ("mscoco_uvit_small", 106_704)])
def test_added_parameters(name, parameters):
    with torch.device("meta"):
        plain, heads = (build_backbone(config_files.load(f"configs/{name}.py{method}").backbone)
                        for method in ("", ":early_exit"))
    assert sum(each.numel() for each in heads.lte_classifer.parameters()) == parameters
    added = heads.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"lte_classifer.{i}.lte.{part}" for i in range(plain.depth + 1) for part in ("weight", "bias")}


@pytest.mark.parametrize("name", UVITS)
@pytest.mark.parametrize("method", ["early_exit", "early_exit_paper"])
def test_every_config_builds(name, method):
    config = config_files.load(f"configs/{name}.py:{method}")
    assert (config.policy.name, config.policy.mode) == ("early_exit", "per_sample")
    assert 0.8 < config.policy.threshold < 1
    with torch.device("meta"):
        net = build_backbone(config.backbone)
    d, out = net.embed_dim, net.patch_size**2 * net.in_chans
    shapes = {tuple(head.lte.weight.shape) for head in net.lte_classifer}
    assert shapes == {(out, d if method == "early_exit" else 2 * d)}
    assert len(net.lte_classifer) == net.depth + 1


def test_the_huge_models_are_among_them():
    assert {"imagenet256_uvit_huge", "imagenet512_uvit_huge", "mscoco_uvit_deep", "digits_uvit"} < {*UVITS}


@pytest.mark.parametrize("config", ["cifar10_unet", "celebahq256_unet"])
def test_other_networks_are_refused(config):
    with pytest.raises(UserError, match="method early_exit: it leaves a U-ViT .*backbone.name is '(unet2d|ddpm_unet)'"):
        config_files.load(f"configs/{config}.py:early_exit")


def test_unknown_form_is_refused():
    with pytest.raises(UserError, match="backbone: U-ViT: uem='both'; choose from released, paper"):
        build_backbone(TINY | {"uem": "both"})


# Files


def saved(net, path):
    torch.save(net.state_dict(), path)
    return path


def early_exit_config(**backbone):
    config = config_files.load("configs/cifar10_uvit_small.py:early_exit")
    config.backbone.update(TINY | {"uem": "released"} | backbone)
    return config


def test_published_uvit_brings_no_heads(tmp_path):
    path = saved(tiny(), tmp_path / "uvit.pth")
    net, _ = load_described(path, early_exit_config().backbone)
    assert net.lte_classifer is None
    assert "uem" not in infer_uvit(net.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_published_heads_load_strictly(tmp_path, form):
    net = tiny(uem=form)
    path = saved(net, tmp_path / "adadiff.pth")
    for section in (None, TINY, TINY | {"uem": form}):  # without a config, into a plain one, into one of early exit
        loaded, _ = load_described(path, section)
        assert loaded.lte_classifer.form == form
        held = loaded.state_dict()
        assert held.keys() == net.state_dict().keys()
        assert all(torch.equal(held[name], each) for name, each in net.state_dict().items())
    assert infer_uvit(net.state_dict())["uem"] == form


@pytest.mark.parametrize(("change", "problem"), [
    (lambda held: held.pop("lte_classifer.4.lte.bias"), "lte_classifer.4.lte.bias is missing"),
    (lambda held: held.update({"lte_classifer.5.lte.bias": torch.zeros(48)}), "lte_classifer.5.lte.bias is unknown"),
    (lambda held: held.update({"lte_classifer.2.lte.weight": torch.zeros(12, 64)}),
     r"lte_classifer.2.lte.weight has shape \(12, 64\), the network wants \(48, 64\)")])
def test_heads_of_another_network_are_refused(tmp_path, change, problem):
    tensors = tiny(uem="released").state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth is of another architecture: {problem}"):
        load_described(tmp_path / "other.pth", TINY)


@pytest.mark.parametrize("section", [None, TINY])
@pytest.mark.parametrize(("change", "problem"), [
    (lambda held: drop(held, "lte_classifer.3.", "lte_classifer.4."), "heads (lte_classifer) of 3 layers; this"),
    (lambda held: held.update({"lte_classifer.5.lte.weight": torch.zeros(48, 64)}),
     "heads (lte_classifer) of 6 layers; this network has 5"),
    (lambda held: drop(held, "lte_classifer.0."), "heads (lte_classifer) of 4 layers (0 is missing); this network"),
    (lambda held: held.update({"lte_classifer.0.lte.weight": torch.zeros(48, 100)}),
     "heads (lte_classifer) of shape (48, 100); this network's take 64 values, or 128 in the paper's form")])
def test_it_is_said_that_the_heads_are_anothers(tmp_path, section, change, problem):
    tensors = tiny(uem="released").state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(UserError) as caught:
        load_described(tmp_path / "other.pth", section)
    assert str(caught.value).startswith(f"these weights have uncertainty {problem}")


def drop(tensors, *beginnings):
    for name in [name for name in tensors if name.startswith(beginnings)]:
        del tensors[name]


@pytest.mark.parametrize("method", ["", ":early_exit"])
def test_samples_from_a_published_file(run_main, tmp_path, method):
    path = saved(tiny(uem="released"), tmp_path / "adadiff.pth")
    flags = [f"--config.backbone.{name}={value}" for name, value in TINY.items()
             if name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")]
    ran = run_main(sample.main, f"--config=configs/cifar10_uvit_small.py{method}", *flags, f"--checkpoint={path}",
                   "--config.data.image_size=8", "--config.compute.device=cpu", "--config.compute.rows=2",
                   "--config.compute.precision=fp32", "--config.sampler.steps=3", "--seeds=0-1",
                   f"--out={tmp_path / 'out'}")
    assert ran.status == 0, ran.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2


# Written for U-ViT's and AdaDiff's code


def run_of(net, config, folder):
    """A training folder with these EMA weights."""
    path = folder / "ckpts/00000007"
    path.mkdir(parents=True)
    save_backbone(path / "backbone_ema.safetensors", net.state_dict(), describe(config))
    return folder


def test_written_and_read_back(run_main, tmp_path):
    net = tiny(uem="released")
    folder = run_of(net, early_exit_config(), tmp_path / "run")
    arguments = f"--checkpoint={folder}", f"--out={tmp_path / 'adadiff.pth'}"
    assert run_main(uvit_checkpoint.main, *arguments).status == 0
    held = torch.load(tmp_path / "adadiff.pth", weights_only=True)
    assert type(held) is dict
    assert held.keys() == net.state_dict().keys()
    assert all(torch.equal(held[name], each) for name, each in net.state_dict().items())
    again, description = load_described(tmp_path / "adadiff.pth", TINY)
    args, _ = shown(net)
    assert description == {}
    assert all(map(torch.equal, again(*args, every_layer=True), net(*args, every_layer=True)))

    assert run_main(uvit_checkpoint.main, *arguments, "--noheads").status == 0
    plain = torch.load(tmp_path / "adadiff.pth", weights_only=True)
    assert {name for name in held if name not in plain} == {name for name in held if name.startswith("lte_classifer.")}
    assert torch.equal(load_described(tmp_path / "adadiff.pth", TINY)[0](*args), net(*args))
    assert not list(tmp_path.glob(".*"))

    for argument, problem in ((f"--checkpoint={tmp_path / 'adadiff.pth'}", "does not describe itself"),
                              ("--checkpoint=cifar10_unet_v", "error: backbone.name='unet2d' cannot be written"),
                              (f"--out={tmp_path / 'x.safetensors'}", "must end in .pth")):
        ran = run_main(uvit_checkpoint.main, *arguments, argument)
        assert (ran.status, problem in ran.stderr) == (2, True), ran.stderr


@pytest.mark.parametrize(("section", "change", "problem"), [
    ("schedule", {"name": "cosine"}, "schedule.name='cosine' with denoiser.time_input='999t' .* vp_linear"),
    ("schedule", {"beta_max": 10.0}, "schedule.name='vp_linear' with .* cannot be written"),
    ("denoiser", {"time_input": "step"}, "with denoiser.time_input='step' cannot be written"),
    ("denoiser", {"time_scale": 2.0}, "cannot be written as U-ViT's .pth, whose networks are trained"),
    ("denoiser", {"prediction": "v"}, "denoiser.prediction='v' cannot be written .* predict eps"),
    ("backbone", {"guidance_embed": True}, "backbone.guidance_embed=True cannot be written .* no scale"),
])
def test_what_the_format_cannot_say(section, change, problem):
    description = describe(early_exit_config())
    description[section] = description[section] | change
    with pytest.raises(UserError, match=problem) as caught:
        uvit_checkpoint.state_dict(tiny(uem="released").state_dict(), description)
    assert "\n" not in str(caught.value)


def test_the_discrete_process_and_the_papers_heads():
    description = describe(early_exit_config(uem="paper"))
    description["schedule"] = {"name": "scaled_linear", "steps": 1000}
    description["denoiser"] |= {"time_input": "step"}
    tensors = tiny(uem="paper").half().state_dict()
    with pytest.raises(UserError, match="backbone.uem='paper' cannot be written .* --noheads leaves them out"):
        uvit_checkpoint.state_dict(tensors, description)
    written = uvit_checkpoint.state_dict(tensors, description, heads=False)
    assert written.keys() == tiny().state_dict().keys()
    assert {each.dtype for each in written.values()} == {torch.float32}
