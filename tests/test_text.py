"""The text encoder, and what a text model is shown for its seeds."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_pipelines import CROSS, clip_text_model, clip_tokenizer

from libs.contexts import DataContexts, PromptContexts, StoredContexts, make_contexts
from libs.errors import UserError
from libs.text import CHUNK, HELD, TextEncoder, make_text_encoder

TOKENS = 9


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIPTextModel with its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder / "vocabulary")
    clip_text_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(clip):
    return TextEncoder(str(clip), TOKENS)


def description(clip="nowhere", kind="text", tokens=TOKENS, width=CROSS):
    return {"cond": {"kind": kind, "text_encoder": str(clip), "tokens": TOKENS},
            "backbone": {"num_clip_token": tokens, "clip_dim": width}}


# The encoder


def test_last_hidden_state_of_padded_and_cut_texts(clip, encoder):
    texts = ["a photo of the red sea", "", "a cat, a dog, a cat, a dog, a cat, a dog"]
    net = transformers.CLIPTextModel.from_pretrained(clip)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = encoder(texts)
    assert (found.shape, found.dtype) == ((3, TOKENS, CROSS), torch.float32)
    for text, context in zip(texts, found, strict=True):
        words = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS - 2]
        ids = [begin, *words, end, *[tokenizer.pad_token_id] * (TOKENS - 2 - len(words))]
        with torch.no_grad():
            expected = net(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.empty, found[1])


def test_a_text_has_the_same_bits_in_any_company(encoder):
    texts = [f"a {'red ' * (i % 3)}{'cat' if i % 2 else 'dog'} of {chr(97 + i)}" for i in range(CHUNK + 5)]
    together = encoder(texts)
    for i in (0, 7, CHUNK - 1, CHUNK, CHUNK + 4):
        assert torch.equal(encoder([texts[i]])[0], together[i])


def test_the_network_is_frozen_and_gives_no_gradient(encoder):
    assert not encoder.net.training
    assert not any(each.requires_grad for each in encoder.net.parameters())
    assert not encoder(["a cat"]).requires_grad


def test_a_whole_clip_model_will_do(clip, tmp_path):
    text = transformers.CLIPTextConfig.from_pretrained(clip).to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 4, "patch_size": 2}
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    encoder = make_text_encoder({"text_encoder": str(tmp_path), "tokens": 5})
    ids = encoder.tokenizer(["a"], padding="max_length", max_length=5, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = whole.eval().text_model(ids).last_hidden_state
    torch.testing.assert_close(encoder(["a"]), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_text_encoder(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cond.text_encoder='/nowhere' is no folder, and cannot be had from"):
        TextEncoder("/nowhere")
    with pytest.raises(UserError, match="cond.tokens=17: cond.text_encoder='.*' takes 1 to 16 tokens"):
        TextEncoder(str(clip), 17)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no CLIPTextModel with its tokenizer"):
        TextEncoder(str(tmp_path / "empty"))
    for path in clip.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = min(weights)
    save_file({name: each for name, each in weights.items() if name != lost}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match=f"holds no CLIPTextModel: its weights lack .*{lost}"):
        TextEncoder(str(tmp_path), TOKENS)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="holds no CLIPTextModel with its tokenizer"):
        TextEncoder(str(tmp_path), TOKENS)


# What seeds are shown


class Counting:
    """Stands in for a TextEncoder: the text's length everywhere."""

    id, empty = "counting", torch.zeros(2, 3)

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return torch.stack([torch.full((2, 3), float(len(text))) for text in texts])


def test_prompts_in_turn_each_embedded_once():
    encoder = Counting()
    contexts = PromptContexts(["a", "bb", "ccc"], encoder)
    assert contexts([4, 0, 4, 2])[:, 0, 0].tolist() == [2, 1, 2, 3]
    assert contexts([7, 3])[:, 0, 0].tolist() == [2, 1]
    assert encoder.asked == ["bb", "a", "ccc"]
    assert contexts.texts([4, 0]) == ["bb", "a"]
    assert contexts.null is encoder.empty


def test_memory_is_bounded_and_a_group_is_never_embedded_twice():
    encoder = Counting()
    prompts = ["x" * (1 + i) for i in range(2 * HELD)]
    contexts = PromptContexts(prompts, encoder)
    for start in range(0, 2 * HELD, 50):
        seeds = list(range(start, min(start + 50, 2 * HELD)))
        for _ in range(2):
            assert contexts(seeds)[:, 0, 0].tolist() == [1 + seed for seed in seeds]
        assert len(contexts.encode.held) <= HELD
    assert encoder.asked == prompts
    contexts(list(range(2 * HELD)))  # more than are held, at once
    asked = len(encoder.asked)
    contexts(list(range(2 * HELD)))
    assert len(encoder.asked) == asked


def test_fingerprints_tell_prompts_encoders_and_contexts_apart(encoder):
    table = [("a cat", torch.zeros(2, 3)), ("a dog", torch.ones(2, 3))]
    other = Counting()
    made = [PromptContexts(["a cat", "a dog"], encoder), PromptContexts(["a dog", "a cat"], encoder),
            PromptContexts(["a cat", "a dog"], other), StoredContexts(table, None),
            StoredContexts([("a cat", torch.ones(2, 3)), table[1]], None)]
    assert len({json.dumps(each.fingerprint, sort_keys=True) for each in made}) == len(made)
    again = StoredContexts(table, torch.ones(2, 3))
    assert again.fingerprint == made[3].fingerprint
    # images of stored contexts are scored against the prompts that lie with them
    assert made[3].fingerprint["prompts_sha256"] == made[0].fingerprint["prompts_sha256"]


def test_stored_contexts():
    contexts = StoredContexts([("a cat", torch.zeros(2, 3)), ("a dog", torch.ones(2, 3))], torch.full((2, 3), 5.0))
    assert contexts([1, 4, 3])[:, 0, 0].tolist() == [1, 0, 1]
    assert contexts.texts([1, 4, 3]) == ["a dog", "a cat", "a dog"]
    assert contexts.null.eq(5).all()


def data_of(prompts):
    def contexts(indices, draws):
        return (indices + 100 * torch.floor(draws * 5)).float()[:, None, None].expand(-1, 2, 3)

    data = SimpleNamespace(empty_context=torch.zeros(2, 3), prompts=prompts, device=torch.device("cpu"))
    data.contexts = contexts
    return type("Data", (SimpleNamespace,), {"__len__": lambda self: 4})(**vars(data))


def test_a_training_set_shows_its_prompts_and_then_its_images_first_captions():
    shown = DataContexts(data_of([("a cat", torch.full((2, 3), 50.0)), ("a dog", torch.full((2, 3), 60.0))]))
    assert shown([0, 1, 2, 3, 5, 4])[:, 1, 2].tolist() == [50, 60, 2, 3, 1, 0]
    assert DataContexts(data_of([]))([0, 1, 6])[:, 0, 0].tolist() == [0, 1, 2]
    assert shown.texts([0]) is None


# From the command line's --prompts


def test_make_contexts(clip, tmp_path):
    assert make_contexts(None, description(kind="none", tokens=0)) is None
    (tmp_path / "prompts.txt").write_text("a cat\nthe sea\n")
    contexts = make_contexts(str(tmp_path / "prompts.txt"), description(clip))
    assert contexts.texts([1, 2]) == ["the sea", "a cat"]
    assert contexts([1]).shape == (1, TOKENS, CROSS)


@pytest.mark.parametrize(("prompts", "options", "line"), [
    ("a cat", {"kind": "none", "tokens": 0}, "--prompts=a cat: this model takes no text (cond.kind='none');"),
    ("a cat", {"kind": "label", "tokens": 0}, "--prompts=a cat: this model takes no text (cond.kind='label');"),
    (None, {}, "--prompts is missing: a text, a .txt file with one a line, a .json file of COCO's captions, or a fol"),
    ("", {}, "--prompts='' is empty"),
    ("nowhere.txt", {}, "--prompts=nowhere.txt cannot be read (No such file or directory)"),
    ("a cat", {"tokens": 7}, f"texts of {TOKENS} tokens of width {CROSS}; this network takes 7 of width {CROSS}"),
    ("a cat", {"width": 8}, f"texts of {TOKENS} tokens of width {CROSS}; this network takes {TOKENS} of width 8"),
    ("a cat", {"tokens": 0}, "cond.kind='text': this network takes no text tokens (backbone.num_clip_token)"),
])
def test_prompts_that_do_not_fit(clip, prompts, options, line):
    with pytest.raises(UserError) as error:
        make_contexts(prompts, description(clip, **options))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
