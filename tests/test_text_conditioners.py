"""Text encoders of conditioners, what conditioners give of texts, and what stands for no text."""

import pytest
import torch
import transformers
from tiny_texts import T5_WIDTH, TOKENS, write_text_encoders

from libs.backbones import UNet2D, UViT
from libs.conditioners import Apply, Conditioners, Draws, SuperResolution, TextContext, TextVector
from libs.errors import UserError
from libs.text import CHUNK, PooledTextEncoder, T5Encoder, TextEncoder, make_text_encoder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    write_text_encoders(root)
    return root


def draws(count):
    return Draws(torch.zeros(count, dtype=torch.long), torch.arange(count))


def test_t5_does_not_see_its_padding(root):
    encoder, net = T5Encoder(str(root / "t5"), TOKENS), transformers.T5EncoderModel.from_pretrained(root / "t5")
    texts = ["a cat", "", "a photo of the red sea, a cat, a dog"]
    found = encoder(texts)
    assert (found.shape, found.dtype, encoder.width) == ((3, TOKENS, T5_WIDTH), torch.float32, T5_WIDTH)
    for text, states in zip(texts, found, strict=True):
        ids = encoder.tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = net(ids).last_hidden_state[0]  # without any padding
        torch.testing.assert_close(states[:len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert not states[len(alone):].any()
    assert torch.equal(encoder.empty, found[1])
    assert isinstance(make_text_encoder({"text_encoder": str(root / "t5"), "tokens": 3}), T5Encoder)
    assert isinstance(make_text_encoder({"text_encoder": str(root / "clip"), "tokens": 3}), TextEncoder)


def test_pooled_text_is_the_projection_where_there_is_one(root):
    texts = ["a cat", "a photo of the red sea"]
    for name, kind in (("projection", "CLIPTextModelWithProjection"), ("clip", "CLIPTextModel")):
        encoder = PooledTextEncoder(str(root / name), TOKENS)
        net = getattr(transformers, kind).from_pretrained(root / name)
        ids = encoder.tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = net(ids)
        expected = out.text_embeds if name == "projection" else out.pooler_output
        torch.testing.assert_close(encoder(texts), expected, rtol=1e-5, atol=1e-5)
        assert encoder(texts).shape == (2, encoder.width)


@pytest.mark.parametrize("make", [lambda root: T5Encoder(str(root / "t5"), 7),
                                  lambda root: PooledTextEncoder(str(root / "projection"), 7)])
def test_a_text_has_the_same_bits_in_any_company(make, root):
    encoder, texts = make(root), [f"a {'red ' * (i % 3)}cat of {chr(97 + i)}" for i in range(CHUNK + 3)]
    together = encoder(texts)
    for i in (0, CHUNK - 1, CHUNK + 2):
        assert torch.equal(encoder([texts[i]])[0], together[i])


def test_what_is_no_text_encoder(root):
    for kind, name, message in (
        (T5Encoder, "clip", "holds no T5EncoderModel"), (TextEncoder, "t5", "holds no CLIPTextModel"),
        (PooledTextEncoder, "t5", "holds no CLIPTextModelWithProjection"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            kind(str(root / name), TOKENS)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cond.tokens=0: cond.text_encoder='.*t5' takes at least 1 token"):
        T5Encoder(str(root / "t5"), 0)


@pytest.mark.parametrize("unknown", ["empty", "zeros"])
def test_texts_are_left_out_at_their_rates(root, unknown):
    clip, pooled = TextEncoder(str(root / "clip"), TOKENS), PooledTextEncoder(str(root / "projection"), TOKENS)
    made = Conditioners([TextContext(clip, rate=0.2, unknown=unknown), TextVector(pooled, rate=0.6, unknown=unknown),
                         Apply(lambda x: x.mean((2, 3))), SuperResolution(2, (8, 8), rate=0.2)])
    inputs = {"image": torch.rand(1000, 3, 8, 8), "text": ["a cat", "a dog"] * 500}
    whole, some = made(inputs, draws(1000)), made(inputs, draws(1000), drop=True)
    assert {name: each.shape[1:] for name, each in whole.items()} == {
        "context": (TOKENS, 32), "vector": (32 + 3,), "concat": (3, 8, 8)}
    assert torch.equal(whole["context"][:2], clip(["a cat", "a dog"]))
    assert torch.equal(whole["vector"][:2, :32], pooled(["a cat", "a dog"]))
    null = made.unconditional(whole)
    expected = [clip([""]), pooled([""])] if unknown == "empty" else [torch.zeros(1, TOKENS, 32), torch.zeros(1, 32)]
    assert torch.equal(null["context"], expected[0].expand(1000, -1, -1))
    assert torch.equal(null["vector"][:, :32], expected[1].expand(1000, -1))
    assert torch.equal(null["vector"][:, 32:], whole["vector"][:, 32:])  # rate 0
    assert not null["concat"].any()
    gone = (some["context"] == null["context"]).all((1, 2))
    assert abs(gone.float().mean() - 0.2) < 0.04
    assert torch.equal(some["context"][~gone], whole["context"][~gone])
    assert torch.equal(gone, (some["concat"] == 0).all((1, 2, 3)))  # of equal rates: together
    rare = (some["vector"] == null["vector"]).all(1)
    assert abs(rare.float().mean() - 0.6) < 0.05
    assert (rare | ~gone).all()
    assert not any(each.requires_grad for each in some.values())


def test_a_text_is_embedded_once_and_fit_to_train_on(root):
    made = TextContext(TextEncoder(str(root / "clip"), TOKENS))
    with torch.inference_mode():  # as previews do, between two updates
        held = made(["a cat"], None)
    layer = torch.nn.Linear(32, 4)
    layer(made(["a cat"], None)).sum().backward()
    assert layer.weight.grad.any()
    assert torch.equal(made(["a cat"], None), held)
    assert list(made.remembered.held) == ["a cat"]


def test_a_network_must_take_the_text(root):
    image = {"size": 8, "channels": 3}
    clip = Conditioners([TextContext(TextEncoder(str(root / "clip"), TOKENS))])
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    clip.check(UViT(**options, num_clip_token=TOKENS, clip_dim=32), image, (8, 8))
    for net, message in (
        (UViT(**options), "it gives a context of 9x32, this UViT takes no context"),
        (UViT(**options, num_clip_token=7, clip_dim=32),
         "it gives a context of 9x32, this UViT takes a context of 7x32"),
        (UNet2D(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2), "it gives a context of 9x32, this UNet2D takes no context"),
    ):
        with pytest.raises(UserError, match=f"^cond.task: {message}$"):
            clip.check(net, image, (8, 8))
