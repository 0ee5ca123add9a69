"""Early exit by a schedule: given as text or file, or calibrated; it runs the depths it says, and nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from exit_networks import digits_checkpoint
from torch import nn

import sample
import train
from libs import build
from libs.backbones import UViT
from libs.config import load, override
from libs.cost import gmacs_per_image
from libs.errors import UserError
from libs.exits import schedule as exit_schedule
from libs.policies import make_policy
from libs.policies.early_exit import EarlyExit, Scheduled
from libs.policies.exit_calibration import find_threshold
from libs.policies.exit_schedule import depths_of, read_schedule

CPU = torch.device("cpu")
CALIBRATION = 2**62  # the first seed
SCHEDULED = {"policy__mode": "schedule"}


def tiny(depth: int = 4, uem: str = "released", **options) -> UViT:
    torch.manual_seed(0)
    net = UViT(img_size=8, patch_size=2, embed_dim=32, num_heads=2, num_classes=11, depth=depth, uem=uem,
               **options).eval()
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3 if "lte" in name else 0.15)
    return net


def chain(net=None, methods: str = "early_exit", **fields):
    config = load(f"configs/digits_uvit.py:{methods}")
    config.data.update(image_size=8, channels=3)
    for name, value in {"sampler__steps": 6, "compute__rows": 4, "policy__threshold": 0.5,
                        "policy__calibration_images": 6, **fields}.items():
        if "early_exit" in methods or not name.startswith("policy"):
            override(config, name.replace("__", "."), str(value))
    return build.make_chain(config, tiny() if net is None else net, build.describe(config), CPU)


def depths_run(used, *sampled) -> list[int]:
    """Blocks of each call, counted as they run."""
    calls = []
    net = used.policy.inner
    hooks = [net.patch_embed.register_forward_hook(lambda *_: calls.append(0))]
    for block in net.block_list():
        hooks.append(block.register_forward_hook(lambda *_: calls.append(calls.pop() + 1)))
    used.sample(*sampled)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(("text", "depths"), [
    ("3", [3] * 6), ("1x2,4x1,5x3", [1, 1, 4, 5, 5, 5]), ("60%", [3] * 6), ("1%", [1] * 6),
    ("2x30%,80%x20%,100%x50%", [2, 2, 4, 5, 5, 5])])
def test_a_schedule_runs_the_depths_it_says(text, depths):
    net = tiny(uem="")  # no heads are needed
    used = chain(net, **SCHEDULED, policy__schedule=text)
    assert depths_run(used, [0, 1], [2, 3]) == depths
    assert used.policy.last["exit_layer"].tolist() == used.policy.last["executed"].tolist() == [depths[-1]] * 8
    told = used.policy.report()
    assert (told["schedule"], told["threshold"], told["images"]) == (depths, None, 2)
    assert told["layer_ratio"] == told["executed_ratio"] == pytest.approx(sum(depths) / 30)
    assert told["spread"] == [0] * 6


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_a_depth_is_the_head_on_the_tokens_after_so_many_blocks(depth, skip):
    net = tiny(skip=skip)
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([10.0, 400.0, 990.0]), torch.tensor([1, 2, 10])
    policy = EarlyExit(mode="schedule", schedule=str(depth)).attach(net)
    policy.start(torch.tensor([1.0]))
    with torch.no_grad():
        outs, _ = net(x, t, y, every_layer=True)
        torch.testing.assert_close(policy(x, t, y), outs[depth - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "euler_sde"])
def test_full_depth_is_the_plain_network_bit_for_bit(sampler):
    fields = {"sampler__name": sampler, "sampler__grid": "logsnr", "sampler__t_end": 0.01}
    plain = chain(methods="", **fields).sample([3, 4], [1, 2])
    for text in ("5", "5x6"):
        assert torch.equal(chain(**SCHEDULED, policy__schedule=text, **fields).sample([3, 4], [1, 2]), plain)


def test_gmacs_are_those_of_the_depths():
    net = tiny()
    gmacs = {text: gmacs_per_image(chain(net, **SCHEDULED, policy__schedule=text), [0], [1])["with_attention_products"]
             for text in ("5", "2", "2x3,5x3")}
    assert gmacs["2x3,5x3"] == pytest.approx((gmacs["2"] + gmacs["5"]) / 2)
    assert gmacs["5"] == pytest.approx(gmacs_per_image(chain(net, ""), [0], [1])["with_attention_products"])


def calibration_exits(net, **fields) -> torch.Tensor:
    """(calls, rows): the exit layers by which a schedule is to be made."""
    used, exits = chain(net, **fields), []
    for group in ([0, 1, 2, 3], [4, 5]):
        used.sample([CALIBRATION + i for i in group], group)
        exits.append(used.policy.exits)
    return torch.cat(exits, dim=1)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_a_schedule_is_the_quantile_of_the_exits_on_calibration_images(quantile):
    net = tiny()
    used = chain(net, **SCHEDULED, policy__quantile=quantile)
    assert used.policy.schedule is None  # nothing is sampled when the chain is made
    exits = calibration_exits(net).sort(dim=1).values
    assert len(exits.unique()) > 2
    wanted = exits[:, -(-int(quantile * 11 * 2) // 2)].tolist()  # of 12 rows, rounded up
    assert depths_run(used, [0], [1])[-6:] == wanted
    assert used.policy.report()["schedule"] == wanted
    stats = used.policy.stats()
    assert (stats["calls"], stats["images"]) == (6, 1)
    assert depths_run(used, [5], [2]) == wanted  # it calibrates once


def test_a_schedule_meets_a_target_ratio_by_its_own_depths():
    used = chain(**SCHEDULED, policy__target_layer_ratio=0.6, policy__threshold=0.9, sampler__steps=10)
    depths = depths_run(used, [0], [1])[-10:]
    assert sum(depths) / 50 == pytest.approx(0.6, abs=0.0501)
    assert len({*depths}) > 1
    told = used.policy.report()
    assert told["threshold"] != 0.9
    assert told["layer_ratio"] == pytest.approx(sum(depths) / 50)


def test_bisection_ends_near_the_target(caplog):
    tried = []

    def ratio_at(threshold: float) -> float:
        tried.append(threshold)
        return 0.1 + 0.9 * threshold**8

    threshold, ratio = find_threshold(ratio_at, 0.55)
    assert ratio == 0.1 + 0.9 * threshold**8
    assert abs(ratio - 0.55) <= 0.01
    assert len(tried) <= 13
    assert find_threshold(lambda threshold: 1 / 0, 1.0) == (1.0, 1.0)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_target_that_is_only_nearly_reached_is_told(caplog):
    """Ratios jump where many images leave together."""
    threshold, ratio = find_threshold(lambda threshold: 0.5 if threshold < 0.7 else 0.6, 0.56)
    assert threshold >= 0.7
    assert ratio == 0.6
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == "policy.target_layer_ratio=0.56: the nearest that a threshold reaches is 0.600"


def test_the_log_names_the_ratio_that_was_reached(caplog):
    policy = chain(policy__target_layer_ratio=0.6).policy
    with caplog.at_level("INFO", logger="absl"):
        policy.ready()
    reached = policy._ratio(policy._exits_at(policy.threshold))
    assert f"{reached:.3f}" != "0.600"
    assert caplog.messages[-1] == (f"early exit: threshold {policy.threshold:.5f} for a layer ratio of {reached:.3f}, "
                                   "0.6 was asked for")


def test_changed_weights_are_calibrated_anew():
    net = tiny()
    used = chain(net, **SCHEDULED)
    used.sample([0], [1])
    before = used.policy.schedule
    with torch.no_grad():
        net.lte_classifer[0].lte.bias += 5.0
    used.sample([0], [1])
    assert before != used.policy.schedule == (1,) * 6


def test_other_times_than_the_chains_get_the_nearest_depths():
    """As in a benchmark with fewer steps."""
    used = chain(**SCHEDULED, policy__schedule="1x2,3x2,5x2")
    assert depths_run(replace(used, ts=used.ts[[0, 2, 4, 6]]), [0], [1]) == [1, 3, 5]
    assert depths_run(used, [0], [1]) == [1, 1, 3, 3, 5, 5]


@pytest.mark.parametrize(("text", "message"), [
    ("6", "6 layers; this network has 1 to 5"), ("0x6", "0 layers; this network has 1 to 5"),
    ("3x2,5", "is no schedule; write a number"), ("3x2;", "no such file; write a number"),
    ("120%", "6 layers; this network has 1 to 5"), ("0%", "0 layers; this network has 1 to 5"),
    ("0%x50%,100%x50%", "0 layers; this network has 1 to 5"),
    ("3x50%,5x40%", "shares of the calls must be all in % and make 100%"),
    ("3x50%,5x3", "shares of the calls must be all in %"), ("3x%", "is no schedule; write"),
    ("-1", "is no schedule; write"), ("nowhere.json", "no such file"),
    ("3x2,5x3", "is for 5 calls of the network, this sampler makes 6")])
def test_schedules_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=f"^policy.schedule='{text}'.*{message}"):
        chain(**SCHEDULED, policy__schedule=text)


def test_a_schedule_and_a_target_ratio_exclude_each_other():
    with pytest.raises(UserError, match=r"policy.target_layer_ratio=0.5, policy.schedule='3': give one of them"):
        EarlyExit(mode="schedule", schedule="3", target_layer_ratio=0.5)


@pytest.mark.usefixtures("fresh_compiler")
def test_every_depth_is_compiled_once():
    """However few graphs torch.compile keeps for one function."""
    net, graphs = tiny(depth=2), []
    compiled = torch.compile(net, backend=lambda graph, examples: graphs.append(graph) or graph.forward)
    policy = make_policy({"name": "early_exit", "mode": "schedule", "schedule": "1x1,2x1,3x1"}, compiled)
    x, t, y = torch.randn(2, 3, 8, 8), torch.ones(2), torch.tensor([1, 2])
    counts = []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            policy.start(torch.arange(3.0))
            outs = torch.stack([policy(x, t, y) for _ in range(3)])
            counts.append(len(graphs))
        wanted, _ = net(x, t, y, every_layer=True)
    torch.testing.assert_close(outs, wanted, rtol=1e-5, atol=1e-5)
    assert counts == [3, 3]


@pytest.fixture
def counting(monkeypatch):
    """The modes that graphs are compiled in, by a compiler that replays a graph's result in one place, as CUDA graphs
    do.
    """
    modes, compile_ = [], torch.compile

    def backend(graph, examples, mode="default"):
        modes.append(mode)
        if mode == "default":
            return graph.forward
        held = []

        def replay(*given):
            outs = graph.forward(*given)
            held[:] = held or [out.clone() for out in outs]
            return tuple(place.copy_(out) for place, out in zip(held, outs, strict=True))

        return replay

    monkeypatch.setattr(torch, "compile", lambda net, mode=None: compile_(net, backend=backend, mode=mode))
    return modes


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("policy", [{}, {"policy__mode": "schedule", "policy__schedule": "1x2,3x3"}])
def test_every_depth_replays_a_graph_of_its_own(mode, policy, counting, monkeypatch):
    """And what it gave is not written over, since solvers hold on to earlier outputs."""
    marked = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    methods = ("early_exit," if policy else "") + "dpm_solver"
    fields = {"sampler__steps": 5, **policy}
    net = tiny(depth=2)
    wanted = chain(net, methods, **fields).sample([0, 1], [2, 3])
    assert not marked
    config = load("configs/digits_uvit.py").compute.to_dict() | {"compile": True, "compile_mode": mode}
    compiled = build.prepare_backbone(net, config, CPU)
    used = chain(compiled, methods, compute__compile=True, compute__compile_mode=mode, **fields)
    for _ in range(2):
        torch.testing.assert_close(used.sample([0, 1], [2, 3]), wanted, rtol=1e-4, atol=1e-4)
    assert len(marked) == 2 * 5
    assert counting == [mode] * (2 if policy else 1)
    used.policy.start(used.denoiser.time_input(used.times))
    x, cond = torch.randn(2, 4, 3, 8, 8), {"y": torch.arange(4)}
    with torch.inference_mode():
        held, other = (used.denoiser.output(each, used.times[0], cond) for each in x)
    assert not torch.equal(held, other)


@pytest.mark.parametrize(("policy", "mode"), [("per_sample", "reduce-overhead"), ("batch_mean", "max-autotune")])
def test_cuda_graphs_cannot_serve_exits_by_the_image(policy, mode):
    with pytest.raises(UserError, match=rf"^compute.compile_mode={mode}: policy.mode={policy} holds on to .*default$"):
        chain(policy__mode=policy, compute__compile=True, compute__compile_mode=mode)
    with pytest.raises(UserError, match="^compute.compile_mode='fast' is unknown; choose from default, reduce-over"):
        build.prepare_backbone(tiny(), {"compile": False, "compile_mode": "fast"}, CPU)


# The commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return digits_checkpoint(tmp_path_factory.mktemp("digits"))


def command(checkpoint, out, *fields: str) -> list[str]:
    return ["--config=configs/digits_uvit.py:early_exit", f"--checkpoint={checkpoint}", f"--out={out}",
            "--config.compute.rows=4", "--config.compute.device=cpu", "--config.sampler.steps=4", *fields]


def test_a_file_is_written_used_and_refused_elsewhere(checkpoint, tmp_path, run_main):
    path, out = tmp_path / "schedule.json", tmp_path / "out"
    ran = run_main(exit_schedule.main, *command(checkpoint, path, "--config.policy.threshold=0.5"))
    assert ran.status == 0, ran.stderr
    held = json.loads(path.read_text())
    assert (held["layers"], held["threshold"], held["sampler"]["steps"]) == (5, 0.5, 4)
    assert (held["calibration_images"], held["first_seed"], len(held["checkpoint_sha256"])) == (16, CALIBRATION, 64)
    assert held["layer_ratio"] == sum(held["depths"]) / 20
    use = ["--seeds=0-2", "--config.policy.mode=schedule", f"--config.policy.schedule={path}"]
    ran = run_main(sample.main, *command(checkpoint, out, *use))
    assert ran.status == 0, ran.stderr
    stats = json.loads((out / "summary.json").read_text())["stats"]
    assert stats["layer_ratio"] == pytest.approx(held["layer_ratio"])
    # the same calibration, made on the spot
    same = tmp_path / "same"
    run_main(sample.main, *command(checkpoint, same, *use[:2], "--config.policy.threshold=0.5"))
    for image in ("000000.png", "000002.png"):
        assert (same / image).read_bytes() == (out / image).read_bytes()

    def refused(*fields: str) -> str:
        ran = run_main(sample.main, *command(checkpoint, out, *use, *fields))
        assert ran.status == 2
        assert len(ran.stderr.splitlines()) == 1
        return ran.stderr

    assert "is for 4 calls of the network, this sampler makes 8" in refused("--config.sampler.steps=8")
    assert "is for other times: call 1 is at" in refused("--config.sampler.grid=logsnr", "--config.sampler.t_end=0.01",
                                                         "--config.sampler.name=dpm_solver_pp")
    path.write_text(json.dumps(held | {"depths": [5] * 4}))
    assert "schedule_sha256" in refused()
    path.write_text(json.dumps(held | {"layers": 13}))
    assert "is for a network of 13 layers, this one has 5" in refused()
    path.write_text(json.dumps(held | {"depths": [5, 9, 5, 5]}))
    assert "is damaged" in refused()
    path.write_text("{}")
    assert "is no schedule; python -m libs.exits.schedule writes one" in refused()
    path.write_text("{")
    assert "cannot be read" in refused()


def test_a_file_read_back_is_what_was_written(tmp_path):
    used = chain(**SCHEDULED)
    used.policy.ready()
    path = tmp_path / "schedule.json"
    exit_schedule.write_schedule(path, used.policy.schedule, 5, used.policy.made_for, {"threshold": 0.5})
    assert depths_of(str(path), 5, used.policy.made_for) == used.policy.schedule
    assert read_schedule(path)["threshold"] == 0.5
    again = chain(**SCHEDULED, policy__schedule=str(path))
    assert torch.equal(again.sample([1, 2], [3, 4]), used.sample([1, 2], [3, 4]))


@pytest.mark.parametrize(("fields", "message"), [
    (["--config.policy.schedule=3"], "--config.policy.schedule=3 is a schedule already"),
    (["--config=configs/digits_uvit.py"], "policy.name='full' has no schedule to calibrate"),
    (["--checkpoint=digits_uvit"],
     "policy.mode=schedule needs uncertainty heads, which checkpoint=digits_uvit has not"),
    (["--out=schedule.txt"], "--out=schedule.txt must end in .json")])
def test_what_cannot_be_calibrated_is_told_in_one_line(checkpoint, tmp_path, fields, message, run_main):
    out = tmp_path / "schedule.json"
    ran = run_main(exit_schedule.main, *command(checkpoint, out, *fields))
    assert ran.status == 2
    assert ran.stderr.startswith(f"error: {message}")
    assert len(ran.stderr.splitlines()) == 1
    assert not out.exists()


def test_previews_of_a_training_calibrate_the_weights_of_the_moment(tmp_path, run_main, monkeypatch):
    calibrated, calibrate = [], Scheduled._calibrate
    monkeypatch.setattr(Scheduled, "_calibrate", lambda policy: calibrated.append(policy) or calibrate(policy))
    ran = run_main(train.main, "--config=configs/digits_uvit.py:early_exit", f"--workdir={tmp_path / 'run'}",
                   "--config.policy.mode=schedule", "--config.policy.threshold=0.5", "--config.train.steps=2",
                   "--config.train.batch_size=4", "--config.train.preview_every=1", "--config.train.preview_images=2",
                   "--config.policy.calibration_images=2", "--config.compute.rows=2", "--config.sampler.steps=2",
                   "--config.compute.device=cpu", "--config.train.ema=0")
    assert ran.status == 0, ran.stderr
    assert len(calibrated) == 2
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 2
