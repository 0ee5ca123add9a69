"""Captions of text files, and the text encoder that is made of their words: transformers' CLIP reads it."""

import json

import pytest
import torch
from PIL import Image
from small_shards import png, sample, write_tar

from libs import small_text_encoder
from libs.data import caption_files
from libs.data.raw import read_captions
from libs.small_text_encoder import byte_pairs
from libs.text import TextEncoder

CAPTIONS = {"b": "Emoji of  a red heart\n", "a": "a cat\n\nit's a cat, 12\n"}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, text in CAPTIONS.items():
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    return folder


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, "")
    [line] = ran.stderr.splitlines()
    return line


def test_captions_in_the_order_of_the_images(pictures, tmp_path, run_main):
    out = tmp_path / "captions.json"
    assert run_main(caption_files.main, f"--images={pictures}", f"--out={out}").status == 0
    assert read_captions(out, "train") == [("a.png", ["a cat", "it's a cat, 12"]), ("b.png", ["Emoji of a red heart"])]
    ids = [each["id"] for each in json.loads(out.read_text())["annotations"]]
    assert ids == [0, 1, 2]


def test_captions_of_shards(tmp_path, run_main):
    """Of the shards in turn; a sample without a caption is left out."""
    one = write_tar(tmp_path / "0.tar", {"x": {"png": png(0), "txt": b"a cat\na small cat\n"}, "y": {"png": png(1)}})
    two = write_tar(tmp_path / "1.tar", {"x": sample(2, score=6.0)})
    out = tmp_path / "captions.json"
    ran = run_main(caption_files.main, f"--shards={one};{two}", f"--out={out}")
    assert ran.status == 0, ran.stderr
    assert read_captions(out, "train") == [("x.png", ["a cat", "a small cat"]), ("x.png", ["picture 2"])]
    assert "left out" in ran.stderr
    assert "give one of them" in error_of(run_main(caption_files.main, f"--out={out}"))


@pytest.mark.parametrize(("action", "said"), [
    (lambda folder: (folder / "b.txt").unlink(), "b.txt (No such file or directory)"),
    (lambda folder: (folder / "b.txt").write_text(" \n"), "b.txt holds no caption of b.png"),
    (lambda folder: (folder / "b.txt").write_bytes(b"\xff\xfe"), "b.txt ("),
])
def test_refuses_images_without_captions(pictures, tmp_path, run_main, action, said):
    action(pictures)
    out = tmp_path / "captions.json"
    line = error_of(run_main(caption_files.main, f"--images={pictures}", f"--out={out}"))
    assert line.startswith(f"error: --images={pictures}: ")
    assert said in line
    assert not out.exists()


@pytest.fixture
def encoder_folder(pictures, tmp_path, run_main):
    captions, out = tmp_path / "captions.json", tmp_path / "encoder"
    assert run_main(caption_files.main, f"--images={pictures}", f"--out={captions}").status == 0
    argv = [f"--captions={captions}", "--tokens=8", "--width=16", "--layers=1", f"--out={out}"]
    ran = run_main(small_text_encoder.main, *argv)
    assert ran.status == 0, ran.stderr
    assert "is there already" in error_of(run_main(small_text_encoder.main, *argv))
    return out


def test_every_word_of_the_captions_is_a_token(encoder_folder):
    encoder = TextEncoder(str(encoder_folder), tokens=8)
    split = encoder.tokenizer.tokenize
    assert split("It's a red CAT, 12") == ["it</w>", "'s</w>", "a</w>", "red</w>", "cat</w>", ",</w>", "1</w>", "2</w>"]
    assert split("emoji of heart") == ["emoji</w>", "of</w>", "heart</w>"]
    assert split("ca tc") == ["c", "a</w>", "t", "c</w>"]  # unknown words become letters
    known = encoder.tokenizer.get_vocab()
    ids = encoder.tokenizer("red cat", padding="max_length", max_length=8)["input_ids"]
    start, end = known["<|startoftext|>"], known["<|endoftext|>"]
    assert ids == [start, known["red</w>"], known["cat</w>"], *[end] * 5]


def test_texts_have_embeddings_of_their_own(encoder_folder):
    encoder = TextEncoder(str(encoder_folder), tokens=8)
    a, b, c = encoder(["a red cat", "a red heart", "a cat red"])
    assert a.shape == encoder.empty.shape == (8, 16)
    torch.testing.assert_close(a[:3], b[:3])  # start, a, red: what follows does not show in them
    assert (a[3] - b[3]).abs().max() > 0.3
    assert (a[2] - c[2]).abs().max() > 0.3
    assert not torch.allclose(a[4:], b[4:], atol=1e-4)  # the padding sees the whole text


def test_the_seed_decides_the_weights(encoder_folder, tmp_path, run_main):
    def weights(seed):
        out = tmp_path / f"seed{seed}"
        assert run_main(small_text_encoder.main, f"--captions={tmp_path / 'captions.json'}", "--tokens=8", "--width=16",
                        "--layers=1", f"--seed={seed}", f"--out={out}").status == 0
        return (out / "model.safetensors").read_bytes()

    assert weights(0) == (encoder_folder / "model.safetensors").read_bytes() != weights(1)


def test_refuses(tmp_path, run_main):
    missing = run_main(small_text_encoder.main, f"--captions={tmp_path / 'none.json'}", f"--out={tmp_path / 'new'}")
    assert "none.json" in error_of(missing)
    assert not (tmp_path / "new").exists()
    line = error_of(run_main(small_text_encoder.main, "--captions=x.json", "--width=100", f"--out={tmp_path / 'new'}"))
    assert line == "error: --width=100 must be at most 64, or a multiple of 64"


def test_byte_pairs_share_their_beginnings():
    tokens, merges = byte_pairs(["cat", "cab", "a"])
    assert merges == ["c a", "ca t</w>", "ca b</w>"]
    assert len(tokens) == len(set(tokens))
    assert tokens[-3:] == ["ca", "cat</w>", "cab</w>"]  # a</w> is a letter
