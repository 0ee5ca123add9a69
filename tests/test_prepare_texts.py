"""prepare_data.py text: what it writes, read back, is what encoding on the fly gives."""

import numpy as np
import pytest
import torch
from PIL import Image
from prepared_features import TOKENS, error_of, learn, prepare, save_models, texted, write_coco
from tiny_pipelines import CROSS

import prepare_data
from libs.codecs import KLCodec
from libs.data import load_data, make_features
from libs.text import TextEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path)


def test_texts_and_latents_of_captions(run_main, tmp_path, models, coco):
    out, captions = tmp_path / "features", f"--captions={tmp_path}/captions.json"
    printed = prepare(run_main, "latents", *texted(models), captions, f"--images={coco}", f"--out={out}")
    assert printed == f"{out}/train: latents of 5 images\n"
    assert prepare(run_main, "text", *texted(models), captions, f"--out={out}") == \
        f"{out}/train: 7 captions of 5 images\n"
    (tmp_path / "prompts.txt").write_text("a red sea\n\nthe dog\n")
    assert prepare(run_main, "text", *texted(models), f"--prompts={tmp_path}/prompts.txt", f"--out={out}") == \
        f"{out}/run_vis: 2 prompts\n"

    data, encoder = load_data("features", out), TextEncoder(str(models / "clip"), TOKENS)
    images = torch.stack([torch.from_numpy(np.array(Image.open(coco / f"{9 - i}.png").crop((2, 0, 18, 16))))
                          for i in range(5)])
    moments, labels = data.batch(torch.arange(5))
    torch.testing.assert_close(moments, KLCodec(str(models / "vae"), 0.5).moments(images), rtol=1e-5, atol=1e-5)
    assert labels is None
    draws = torch.tensor([0.1, 0.9, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert torch.equal(data.contexts(torch.arange(5), draws),
                       encoder(["a cat 0", "a red cat 1", "a cat 2", "a cat 3", "a cat 4"]))
    assert torch.equal(data.empty_context, encoder([""])[0])
    assert [prompt for prompt, _ in data.prompts] == ["a red sea", "the dog"]
    assert torch.equal(torch.stack([context for _, context in data.prompts]), encoder(["a red sea", "the dog"]))
    prompt, context = np.load(out / "run_vis" / "1.npy", allow_pickle=True)  # as U-ViT's reader does it
    assert (prompt, context.shape) == ("the dog", (TOKENS, CROSS))

    losses = learn(run_main, tmp_path / "run", *texted(models), "--config.data.name=features",
                   f"--config.data.path={out}")
    assert all(np.isfinite(losses))


def test_val_is_the_other_part(run_main, tmp_path, models, coco):
    out, captions = tmp_path / "features", f"--captions={tmp_path}/captions.json"
    argv = [*texted(models), captions, "--split=val", "--limit=2", f"--out={out}"]
    prepare(run_main, "latents", *argv, f"--images={coco}")
    assert prepare(run_main, "text", *argv) == f"{out}/val: 3 captions of 2 images\n"
    data = load_data("features", out, split="test")
    assert len(data) == 2
    assert [len(files) for files in data.captions] == [1, 2]


def test_texts_go_on_and_other_texts_do_not(run_main, tmp_path, models, coco, monkeypatch):
    argv = ["text", *texted(models), f"--captions={tmp_path}/captions.json", f"--out={tmp_path}/features"]
    monkeypatch.setattr(make_features, "GROUP", 2)
    write, written = make_features.write_feature, []

    def interrupted(*args):
        written.append(args)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(make_features, "write_feature", interrupted)
        assert run_main(prepare_data.main, *argv).status == 130
    asked, call = [], TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, texts: asked.extend(texts) or call(self, texts))
    prepare(run_main, *argv)
    assert asked == ["a cat 3", "a red cat 3", "a cat 4", ""]
    assert error_of(run_main(prepare_data.main, *argv, "--config.cond.tokens=8")) == \
        f"--out: the features in {tmp_path}/features/train were made with tokens=9, not 8; choose another folder"
    (tmp_path / "captions.json").write_text((tmp_path / "captions.json").read_text().replace("a cat 4", "a dog 4"))
    assert "were made from other texts; choose another folder" in error_of(run_main(prepare_data.main, *argv))
    prompts = ["text", *texted(models), "--prompts=a cat", f"--out={tmp_path}/features", "--config.cond.tokens=8"]
    told = error_of(run_main(prepare_data.main, *prompts))
    assert told.endswith("empty_context.npy is the empty text of another text encoder; choose another folder")


def test_fewer_prompts_do_not_mix_with_more(run_main, tmp_path, models):
    for count in 2, 1:
        (tmp_path / "prompts.txt").write_text("a cat\n" * count)
        ran = run_main(prepare_data.main, "text", *texted(models), f"--prompts={tmp_path}/prompts.txt",
                       f"--out={tmp_path}/features")
    assert "run_vis holds 1 prompts more than there are now" in error_of(ran)
