"""Prompts of a command line: a text, a file with one a line, COCO's captions in their fixed order."""

import json

import pytest

from libs.errors import UserError
from libs.prompts import prompts_id, prompts_of, read_prompts


def write_captions(path, images):
    """A COCO annotation file: two captions for each of the image ids, the later id first."""
    annotations = [{"image_id": image, "id": 10 * image + k, "caption": f"image {image}\n caption {k} "}
                   for image in images for k in (1, 0)]
    path.write_text(json.dumps({"annotations": annotations}))
    return str(path)


def test_a_text_is_one_prompt():
    assert read_prompts("a cat, a dog") == ["a cat, a dog"]
    assert read_prompts("version 1.5") == ["version 1.5"]


@pytest.mark.parametrize("text", ["and/or", "24/7", "cat", "w/o", "amazon.com", "U.S.A", "~cat", "cat...", "?",
                                  "a red/green/blue cat", "see readme.md now", "runs/coco/cats ", "cat, " * 100])
def test_a_prompt_may_have_a_slash_or_a_dot(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert read_prompts(text) == [text]


@pytest.mark.parametrize("text", ["cats.csv", "cats.TXT", "cats.jsonl", "run_vis/0.npy", "/nowhere/cats", "./cats",
                                  "../cats", "~/cats-of-nobody", "cats/", "coco/prompts/cats", "here/cats"])
def test_a_path_that_is_not_there_is_no_prompt(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError) as caught:
        read_prompts(text)
    assert str(caught.value).startswith(f"--prompts={text}: there is no such file; a prompt that looks like one needs")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.csv", "a b", "prompts.v2"])
def test_a_file_has_one_prompt_a_line(tmp_path, name):
    path = tmp_path / name
    path.write_text("a cat\n\n  a red  dog \r\nün chat")
    assert read_prompts(str(path)) == ["a cat", "a red dog", "ün chat"]


def test_coco_gives_one_caption_an_image_in_an_order_that_depends_on_the_images_alone(tmp_path):
    images = list(range(100, 140))
    prompts = read_prompts(write_captions(tmp_path / "a.json", images))
    assert sorted(prompts) == [f"image {image} caption 0" for image in images]
    assert prompts != sorted(prompts)
    assert read_prompts(write_captions(tmp_path / "b.json", images[::-1])) == prompts
    assert prompts[:3] == ["image 100 caption 0", "image 127 caption 0", "image 112 caption 0"]  # in every release


def test_a_seed_decides_its_prompt():
    assert prompts_of([5, 1, 4], ["a", "b", "c"]) == ["c", "b", "b"]
    assert prompts_of(range(3), ["a"]) == ["a", "a", "a"]


def test_the_id_depends_on_order_and_borders():
    lists = (["a", "b"], ["b", "a"], ["a b"], ["ab"], ["a", "b", ""])
    assert len({prompts_id(each) for each in lists}) == len(lists)


@pytest.mark.parametrize(("name", "content", "line"), [
    ("missing.txt", None, "cannot be read (No such file or directory)"),
    ("empty.txt", "\n \n", "holds no prompts"),
    ("latin.txt", b"\xff\xfe\x00", "cannot be read"), ("a.png", b"\x89PNG\r\n", "cannot be read"),
    ("a.json", "{", "cannot be read"),
    ("a.json", "[1]", "want COCO's captions: annotations with id, image_id and caption"),
    ("a.json", '{"annotations": [{"id": 1, "image_id": 2}]}', "want COCO's captions"),
    ("a.json", '{"annotations": []}', "holds no prompts"),
])
def test_files_of_another_form_are_refused(tmp_path, name, content, line):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_prompts(str(path))
    assert str(caught.value).startswith(f"--prompts={path}")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="--prompts=' ' is empty"):
        read_prompts(" ")
