"""AdaDiff's layer-wise loss: its numbers by hand, and what learns from which of its terms."""

import math

import pytest
import torch

from libs import config as config_files
from libs.build import make_denoiser
from libs.denoiser import PREDICTIONS, Denoiser
from libs.errors import UserError
from libs.schedule import make_schedule
from libs.training import setup
from libs.training.batches import Batch
from libs.training.early_exit import LayerwiseLoss, Lesson

HEADS = "lte_classifer."

# What 3 layers say of 2 images of 2 pixels
G = [[[0.5, -0.1], [0.0, 0.2]], [[0.4, 0.1], [-0.3, 0.2]], [[0.3, 0.2], [-0.5, 0.1]]]
C = [[[0.2, 0.6], [0.9, 0.7]], [[0.5, 0.5], [0.4, 0.8]], [[0.7, 0.9], [0.3, 0.1]]]
EPS = [[0.3, 0.4], [-0.4, 0.2]]
CODE = {}
PAPER = {"u_reduction": "sum", "ual_norm": "none", "ual_per_sample": True, "ual_last_layer": False}


def tensors(values):
    """... b 2 -> ... b 1 1 2, with a gradient."""
    return torch.tensor(values)[..., None, None, :].requires_grad_()


def loss_of(**options):
    out, certainty, target = tensors(G), tensors(C), tensors(EPS).detach()
    return LayerwiseLoss(**options).of_layers(out, certainty, target), out, certainty


@pytest.mark.parametrize("prediction", ["eps_damped", "eps_to_x_0"])
def test_differences_of_eps_count_as_those_of_v(prediction):
    schedule, t = make_schedule("vp_linear"), torch.tensor([0.9, 0.4], dtype=torch.float64)
    x_t, out, certainty, target = torch.randn(2, 1, 1, 2), *(tensors(each).detach() for each in (G, C, EPS))
    ours, v = (Denoiser(None, schedule, name) for name in (prediction, "v"))

    def to_v(said):
        return v.target(*PREDICTIONS[prediction](x_t, said, *ours.alpha_sigma(t, x_t)), t)

    ours.net = lambda x, timesteps, every_layer: (out, certainty)
    v.net = lambda x, timesteps, every_layer: (torch.stack([to_v(each) for each in out]), certainty)
    for name in ("eps_error", "final_gap"):
        one, other = (LayerwiseLoss(target=name, lesson=lambda *_, said=said: Lesson(x_t, t, None, said))
                      for said in (target, to_v(target)))
        torch.testing.assert_close(one(ours, None), other(v, None), rtol=1e-4, atol=1e-5)


def test_the_layerwise_loss_counts_from_a_time_on():
    schedule, t = make_schedule("vp_linear"), torch.tensor([0.45, 0.44], dtype=torch.float64)
    out, certainty, target = (tensors(each).detach() for each in (G, C, EPS))
    denoiser = Denoiser(lambda *_, every_layer: (out, certainty), schedule, "v")

    def loss(**options):
        lesson = Lesson(torch.zeros(2, 1, 1, 2), t, None, target)
        return LayerwiseLoss(lesson=lambda *_: lesson, **options)(denoiser, None)

    expect = torch.stack([loss()[0], loss(beta_ual=0.0)[1]])
    assert torch.equal(loss(ual_from=0.45), expect)
    assert not torch.equal(loss(), expect)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"--config.early_exit.ual_from={value} must be a time from 0 to 1"):
            LayerwiseLoss(ual_from=value)


def mean(values):
    return sum(values) / len(values)


def by_hand(image, target="eps_error", u_reduction="mean", ual_norm="sum1", ual_per_sample=False, ual_last_layer=True,
            lambda_u=1.0, beta_ual=1.0, ual_detach=False):
    """The loss of one image in plain Python, from the formulas of the module's docstring."""
    squares = [mean([(e - g) ** 2 for g, e in zip(layer[image], EPS[image], strict=True)]) for layer in G]
    wanted = EPS[image] if target == "eps_error" else G[-1][image]
    errors = [mean([(c - (1 - math.tanh(abs(g - w)))) ** 2
                    for c, g, w in zip(cs[image], gs[image], wanted, strict=True)])
              for cs, gs in zip(C, G, strict=True)]
    weights = [mean(cs[image]) if ual_per_sample else mean([*cs[0], *cs[1]]) for cs in C]
    layers = 3 if ual_last_layer else 2
    total = sum(weights[:layers]) if ual_norm == "sum1" else 1
    layerwise = sum(w / total * s for w, s in zip(weights[:layers], squares[:layers], strict=True))
    uncertainty = mean(errors) if u_reduction == "mean" else sum(errors)
    return squares[-1] + lambda_u * uncertainty + beta_ual * layerwise


# The loss


@pytest.mark.parametrize(("preset", "numbers"), [
    # ms(eps - g_3) + the mean of .183508, .101908, .049741 + (2.4 * .145 + 2.2 * .05 + 2 * .02) / 6.6, and so on
    (CODE, (0.02 + 0.111719 + 0.075455, 0.01 + 0.243272 + 0.033788)),
    # their sum, and .4 * .145 + .5 * .05
    (PAPER, (0.02 + 0.335157 + 0.083, 0.01 + 0.729817 + 0.067))])
def test_loss_of_both_presets(preset, numbers):
    """Numbers worked out on paper from those above."""
    loss, _, _ = loss_of(**preset)
    assert loss.tolist() == pytest.approx(numbers, abs=3e-6)
    assert loss.tolist() == pytest.approx([by_hand(0, **preset), by_hand(1, **preset)], abs=1e-6)


@pytest.mark.parametrize("option", [
    {"lambda_u": 0.0}, {"lambda_u": 2.5}, {"beta_ual": 0.0}, {"beta_ual": 3.0}, {"target": "final_gap"},
    {"u_reduction": "sum"}, {"ual_norm": "none"}, {"ual_per_sample": True}, {"ual_last_layer": False}])
@pytest.mark.parametrize("preset", [CODE, PAPER])
def test_every_option_changes_its_term(preset, option):
    loss, _, _ = loss_of(**preset | option)
    assert loss.tolist() == pytest.approx([by_hand(0, **preset | option), by_hand(1, **preset | option)], abs=1e-6)
    if any(preset.get(name, LayerwiseLoss.__dataclass_fields__[name].default) != each for name, each in option.items()):
        assert loss.tolist() != pytest.approx([by_hand(0, **preset), by_hand(1, **preset)], abs=1e-4)


def test_presets_of_the_methods():
    for method, preset, form in (("early_exit", CODE, "released"), ("early_exit_paper", PAPER, "paper")):
        config = config_files.load(f"configs/digits_uvit.py:{method}")
        assert setup.make_objective(config) == LayerwiseLoss(**preset)
        assert config.backbone.uem == form


@pytest.mark.parametrize("target", ["eps_error", "final_gap"])
def test_uncertainty_loss_gives_the_outputs_no_gradient(target):
    """What it adds to the gradients goes to the certainties alone."""
    gradients = []
    for lambda_u in (0.0, 5.0):
        loss, out, certainty = loss_of(lambda_u=lambda_u, beta_ual=0.0, target=target)
        loss.sum().backward()
        gradients.append((out.grad, certainty.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not gradients[0][1].any()
    assert gradients[1][1].all()


def test_layerwise_loss_reaches_the_heads_unless_detached():
    values, gradients = [], []
    for detach in (False, True):
        loss, out, certainty = loss_of(lambda_u=0.0, ual_detach=detach, ual_norm="none")
        loss.sum().backward()
        values.append(loss)
        gradients.append((out.grad, certainty.grad))
    assert torch.equal(*values)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not gradients[1][1].any()
    # d/dc of mean(c) * ms(eps - g): the heads are pushed to be less certain, the more a layer errs
    expected = [[sum(mean([(e - g) ** 2 for g, e in zip(layer[k], EPS[k], strict=True)]) for k in (0, 1)) / 4
                 for layer in G]]
    torch.testing.assert_close(gradients[0][1][:, 0, 0, 0, 0], torch.tensor(expected[0]))


def test_last_layer_counts_twice_in_the_released_loss_alone():
    """Its gradient is (1 + w_N) times that of L_simple; without it, L_simple's."""
    ratios = {}
    for last in (True, False):
        loss, out, _ = loss_of(lambda_u=0.0, ual_last_layer=last)
        loss.sum().backward()
        simple = (out[-1] - tensors(EPS)).detach()  # of two pixels: 2 / 2 of the error
        ratios[last] = (out.grad[-1] / simple)[simple != 0].tolist()
    w = 2.0 / (2.4 + 2.2 + 2.0)  # sums of the layers' certainties
    assert ratios[True] == pytest.approx([1 + w] * 3, abs=1e-5)
    assert ratios[False] == pytest.approx([1] * 3, abs=1e-5)


@pytest.mark.parametrize(("option", "problem"), [
    ({"target": "gap"}, "early_exit.target='gap' is unknown; choose from eps_error, final_gap"),
    ({"u_reduction": "max"}, "early_exit.u_reduction='max' is unknown; choose from mean, sum"),
    ({"ual_norm": "l2"}, "early_exit.ual_norm='l2' is unknown; choose from sum1, none"),
    ({"lambda_u": -1.0}, "--config.early_exit.lambda_u=-1.0 must be a number of at least 0"),
    ({"beta_ual": math.nan}, "--config.early_exit.beta_ual=nan must be a number of at least 0")])
def test_bad_options(option, problem):
    with pytest.raises(UserError) as caught:
        LayerwiseLoss(**option)
    assert str(caught.value) == problem


# What a network learns


def tiny_config(method="early_exit", **early_exit):
    config = config_files.load(f"configs/digits_uvit.py:{method}")
    with config.unlocked():
        config.compute.update(device="cpu", rows=4)
        config.backbone.update(patch_size=4, embed_dim=16, depth=4, num_heads=2)
        if early_exit:
            config.early_exit.update(early_exit)
    return config


def a_batch(rows=4):
    generator = torch.Generator().manual_seed(3)
    cond = {"y": torch.arange(rows) % 10}
    return Batch(torch.randn(rows, 1, 8, 8, generator=generator), cond, torch.arange(rows), seed=1, step=0)


def gradients_of(config):
    net, description = setup.start_network(config, None)
    torch.manual_seed(5)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    setup.make_objective(config)(make_denoiser(net, description), a_batch()).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("method", ["early_exit", "early_exit_paper"])
def test_backbone_learns_nothing_from_the_uncertainty_loss(method):
    one, other = (gradients_of(tiny_config(method, lambda_u=weight, ual_detach=True)) for weight in (0.0, 3.0))
    for name, gradient in one.items():
        assert torch.equal(gradient, other[name]) != name.startswith(HEADS), name
        assert gradient.any() != name.startswith(HEADS), name


def test_every_layer_learns_from_the_layerwise_loss():
    """The last block gets its gradient from L_simple alone, the others from the layers after them too."""
    one, other = (gradients_of(tiny_config(lambda_u=0.0, beta_ual=weight, ual_last_layer=False))
                  for weight in (0.0, 1.0))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert {"in_blocks.0.mlp.fc1.weight", "mid_block.mlp.fc1.weight", "out_blocks.0.mlp.fc1.weight",
            "decoder_pred.weight", f"{HEADS}0.lte.weight", f"{HEADS}3.lte.bias"} < changed
    assert not {name for name in changed if name.startswith(("out_blocks.1.", f"{HEADS}4."))}


def test_loss_is_of_the_networks_own_target():
    """Its last layer is the plain loss: v on the digits' schedule."""
    config = tiny_config(lambda_u=0.0, beta_ual=0.0)
    net, description = setup.start_network(config, None)
    denoiser, batch = make_denoiser(net, description), a_batch()
    losses = [objective(denoiser, batch) for objective in (setup.make_objective(config), setup.diffusion_loss)]
    torch.testing.assert_close(*losses)


def test_fresh_heads_are_of_the_seed():
    held = [setup.start_network(tiny_config(), None)[0].lte_classifer[2].lte.weight for _ in range(2)]
    assert torch.equal(*held)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_errors_at_high_noise_count_more(power):
    """An error of eps is one of alpha / sigma times the size in x_0: p = 1 counts the larger of the two."""
    batch = a_batch()

    class OneLayer:
        """Errs by 0.1 everywhere, and is certain of all."""

        def __call__(self, x, timesteps, y, every_layer):
            return (batch.noise() + 0.1)[None], torch.ones(1, len(x), 1, 8, 8)

    denoiser = make_denoiser(OneLayer(), {"schedule": {"name": "vp_linear"},
                                          "denoiser": {"prediction": "eps", "time_input": "999t"}})
    loss = LayerwiseLoss(lambda_u=0.0, beta_ual=0.0, noise_power=power)(denoiser, batch)
    t = batch.uniform()
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    larger = torch.maximum(torch.ones_like(t), sigma / alpha)
    assert set((larger > 1).tolist()) == {True, False}
    torch.testing.assert_close(loss.double(), 0.01 * larger ** (2 * power), rtol=1e-4, atol=0)
