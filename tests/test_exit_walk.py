"""Rows that leave a U-ViT one by one: each as if it were alone, in any company, with what it needs computed once."""

import pytest
import torch
from exit_networks import ROWS, THRESHOLD, certainties, inputs, layer_maps, mix_exits, tiny
from torch import nn

from libs.backbones import UViT
from libs.policies import make_policy
from libs.policies.early_exit import EarlyExit

NETS = {"plain": {}, "label": {"num_classes": 11}, "text": {"clip_dim": 6, "num_clip_token": 3},
        "paper": {"uem": "paper", "num_classes": 11}, "guidance": {"guidance_embed": True}, "no_skip": {"skip": False}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def one_by_one(net: UViT, x, t, more, threshold: float = THRESHOLD, check_every: int = 1):
    """The released algorithm on one image after another: (outputs, exit layers)."""
    layers, outs, exits = net.depth + 1, [], []
    for row in range(len(x)):
        one = slice(row, row + 1)
        own = x[one], t[one], {name: value[one] for name, value in more.items()}
        sure = certainties(net, *own)[:, 0] > threshold
        looked = [i for i in range(1, layers) if i % check_every == 0 and sure[i - 1]]
        exits.append(looked[0] if looked else layers)
        outs.append(net.head(layer_maps(net, *own)[exits[-1] - 1]))
    return torch.cat(outs), exits


def run(policy, x, t, more, rows_per_image: int = 1) -> torch.Tensor:
    policy.start(torch.tensor([1.0]), rows_per_image)
    with torch.no_grad():
        return policy(x, t, **more)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("check_every", [1, 2, 3])
def test_every_image_leaves_as_if_it_were_alone(kind, check_every):
    net = tiny(**NETS[kind])
    given = inputs(net)
    mix_exits(net, *given)
    wanted, exits = one_by_one(net, *given, check_every=check_every)
    assert {*exits} == {layer for layer in (1, 2, 3, 4, 5) if layer % check_every == 0 or layer == 5}
    for compact_from in (0.0, 0.25, 1.0):
        policy = EarlyExit(threshold=THRESHOLD, check_every=check_every, compact_from=compact_from).attach(net)
        torch.testing.assert_close(run(policy, *given), wanted, **CLOSE)
        assert policy.last["exit_layer"].tolist() == exits
        executed = policy.last["executed"].tolist()
        if compact_from in (0, 1):
            assert executed == (exits if compact_from == 0 else [5] * ROWS)
        assert all(run >= layer for run, layer in zip(executed, exits, strict=True))


@pytest.mark.parametrize("compact_from", [0.0, 0.3, 1.0])
def test_blocks_and_head_run_for_the_rows_that_need_them(compact_from):
    net = tiny()
    given = inputs(net)
    mix_exits(net, *given)
    policy = EarlyExit(threshold=THRESHOLD, compact_from=compact_from).attach(net)
    in_blocks, in_head = [], []
    for block in net.block_list():
        block.register_forward_hook(lambda block, args, out: in_blocks.append(len(out)))
    net.decoder_pred.register_forward_hook(lambda layer, args, out: in_head.append(len(out)))
    run(policy, *given)
    assert sum(in_blocks) == policy.last["executed"].sum()
    assert sum(in_head) == ROWS
    if compact_from == 0:
        assert in_blocks == [15, 12, 9, 6, 3]
    elif compact_from == 0.3:  # 3 of 15 are too few, 6 of 15 are not
        assert in_blocks == [15, 15, 9, 6, 3]


def test_an_exit_does_not_depend_on_batch_mates():
    net = tiny()
    x, t, more = inputs(net)
    mix_exits(net, x, t, more)
    policy = EarlyExit(threshold=THRESHOLD).attach(net)
    together = run(policy, x, t, more)
    exits = policy.last["exit_layer"]
    few = torch.tensor([14, 2, 7])
    torch.testing.assert_close(run(policy, x[few], t[few], more), together[few], **CLOSE)
    assert torch.equal(policy.last["exit_layer"], exits[few])


def test_a_loop_asks_the_heads_as_they_are_then():
    net = tiny()
    x, t, more = inputs(net)
    policy = EarlyExit(threshold=THRESHOLD).attach(net)
    for sure in (4, 5):  # at the first out-block, whose tokens are bfloat16 under autocast; then nowhere
        for layer, head in enumerate(net.lte_classifer, start=1):
            nn.init.constant_(head.lte.bias, 40.0 if layer == sure else -40.0)
        with torch.autocast("cpu", torch.bfloat16):
            run(policy, x, t, more)
        assert policy.last["exit_layer"].unique().tolist() == [sure]


@pytest.mark.parametrize("joint", [True, False])
def test_the_rows_of_a_guided_pair_leave_together_or_each_by_itself(joint):
    net = tiny()
    x, t, more = inputs(net, 16)
    mix_exits(net, x, t, more)
    policy = EarlyExit(threshold=THRESHOLD, joint=joint, compact_from=0.0).attach(net)
    out = run(policy, x, t, more, rows_per_image=2)
    alone, exits = one_by_one(net, x, t, more)
    if joint:
        sure = (certainties(net, x, t, more) > THRESHOLD).view(5, 2, 8).all(dim=1)
        exits = [next((i + 1 for i in range(4) if sure[i, pair]), 5) for pair in range(8)] * 2
        alone = torch.cat([net.head(layer_maps(net, x, t, more)[layer - 1][[row]]) for row, layer in enumerate(exits)])
    assert len({*exits}) > 2
    assert policy.last["exit_layer"].tolist() == exits
    torch.testing.assert_close(out, alone, **CLOSE)


@pytest.mark.parametrize("mode", ["per_sample", "batch_mean"])
@pytest.mark.parametrize(("sure", "first", "second"), [  # layers that are certain: 3 in-blocks, mid, 3 out-blocks
    ("1010000", 1, 3), ("1100000", 1, 2), ("0110000", 2, 3), ("1001000", 1, 4), ("0010100", 3, 5), ("1000000", 1, 7),
    ("0001000", 4, 4), ("0000010", 6, 6), ("0000001", 7, 7), ("0000000", 7, 7), ("1111111", 1, 2)])
def test_patience_counts_over_all_in_blocks_and_ends_there(mode, sure, first, second):
    net = tiny(depth=6, img_size=4)
    for head, certain in zip(net.lte_classifer, sure, strict=True):
        nn.init.zeros_(head.lte.weight)
        nn.init.constant_(head.lte.bias, 1.0 if certain == "1" else -1.0)
    x = torch.randn(2, 3, 4, 4)
    for patience, layer in ((1, first), (2, second)):
        policy = EarlyExit(mode=mode, threshold=0.6, patience=patience).attach(net)
        run(policy, x, torch.ones(2), {})
        assert policy.last["exit_layer"].tolist() == [layer, layer]


@pytest.mark.parametrize(("rows_per_image", "joint"), [(1, True), (2, True), (2, False)])
def test_batch_mean_decides_for_all_rows(rows_per_image, joint):
    net = tiny()
    x, t, more = inputs(net, 16)
    mix_exits(net, x, t, more)
    group = 8 if rows_per_image == 2 and not joint else 16
    means, maps = certainties(net, x, t, more), layer_maps(net, x, t, more)
    threshold = means.view(5, -1, group).mean(2)[:4].max(0).values.mean().item() - 1e-4
    wanted, exits = [], []
    for part in range(0, 16, group):
        sure = means[:, part:part + group].mean(1) > threshold
        exits += [next((i + 1 for i in range(4) if sure[i]), 5)] * group
        wanted.append(net.head(maps[exits[-1] - 1][part:part + group]))
    assert min(exits) < 5
    policy = EarlyExit(mode="batch_mean", threshold=threshold, joint=joint).attach(net)
    torch.testing.assert_close(run(policy, x, t, more, rows_per_image), torch.cat(wanted), **CLOSE)
    assert policy.last["exit_layer"].tolist() == exits


def test_a_compiled_network_has_its_blocks_compiled():
    net = tiny(depth=2)
    given = inputs(net)
    mix_exits(net, *given)
    graphs = []
    compiled = torch.compile(net, backend=lambda graph, examples: graphs.append(graph) or graph.forward)
    policy = make_policy({"name": "early_exit", "threshold": THRESHOLD, "compact_from": 0.0}, compiled)
    torch.testing.assert_close(run(policy, *given), one_by_one(net, *given)[0], **CLOSE)
    first = len(graphs)
    run(policy, *given)
    assert 0 < first == len(graphs)
    assert policy.disable() is compiled
