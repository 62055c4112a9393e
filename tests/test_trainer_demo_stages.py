"""Each stage of the demo for two steps, the tokenizer, and the arithmetic between the stages."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from ipa.trainer.demo.chain import STAGES, DemoConfig, train
from ipa.trainer.demo.clip import CLASSES, CaptionTable, build_image_processor, compatible, normalized, preprocess_all
from ipa.trainer.demo.dataset import draw_dataset
from ipa.trainer.demo.models import SCALING_FACTOR, build_text_encoder, build_vae, signal_to_noise
from ipa.trainer.demo.tokenizer import WORDS, build_tokenizer
from ipa.trainer.demo.unet import embed_captions
from ipa.trainer.demo.vae import as_pixels, encode_all, whiten
from ipa.trainer.errors import TrainError

TINY = DemoConfig(
    images=64,
    judge_images=40,
    adapter_pairs=8,
    vae_steps=2,
    clip_steps=2,
    unet_steps=1,
    decoder_steps=2,
    adapter_steps=1,
    judge_steps=2,
    workers=1,
    evaluation_pairs=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_caption_word_is_one_token(tokenizer):
    for word in WORDS:
        assert len(tokenizer(word)["input_ids"]) == 3, word


def test_the_tokenizer_is_clips_in_all_but_its_merges(tokenizer, tmp_path):
    text = "A Striped  RED star on a blue background!"
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids == bare.encode(text).ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a striped red star on a blue background !"
    assert loaded.model_max_length == 77
    assert len(tokenizer(text, padding="max_length", truncation=True)["input_ids"]) == 77


@pytest.mark.parametrize("text", ["", "a zebra, café", "日本 🦓", "don't", "x" * 500, "\t\n a"])
def test_unknown_words_fall_apart_and_never_fail(tokenizer, text):
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert 2 <= len(ids) <= 77
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_captions_are_numbered_by_what_they_name(tokenizer):
    table = CaptionTable(tokenizer)
    unnamed = [CLASSES[1], CLASSES[2], CLASSES[3]]
    rows = table.rows(torch.tensor([[3, 0, 4, 1], [3, *unnamed]]))
    assert [table.texts[row] for row in rows] == ["a striped red star on a blue background", "a star"]
    assert len(set(table.texts)) == len(table.texts) == 8 * 9 * 9 * 4
    ends = (table.input_ids == tokenizer.eos_token_id).any(dim=1)
    assert ends.all()  # no caption was cut


def test_a_true_caption_is_no_negative():
    shown = torch.tensor([[3, 0, 4, 1], [3, 0, 5, 1]])
    named = torch.tensor([[3, 0, 4, 1], [3, 0, CLASSES[2], CLASSES[3]]])
    assert compatible(shown, named).tolist() == [[True, True], [False, True]]


def test_pixel_values_are_those_of_the_image_processor():
    images = draw_dataset(4, seed=1).images
    theirs = build_image_processor()([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    ours = normalized(preprocess_all(images))
    # Both resize with PIL's bicubic filter to 8 bits; only the order of the float arithmetic differs.
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_whitening_changes_the_latents_and_not_the_picture():
    torch.manual_seed(0)
    vae = build_vae().eval()
    pixels = as_pixels(draw_dataset(32, seed=1).images)
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        decoded = vae.decode(before.mean).sample
        whiten(vae, pixels)
        after = vae.encode(pixels).latent_dist
        scaled = after.mean * SCALING_FACTOR
        assert torch.allclose(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        # The spread of the posterior is whitened along with its mean.
        rescaled = after.mean.std((0, 2, 3), keepdim=True) / before.mean.std((0, 2, 3), keepdim=True)
        assert torch.allclose(after.std / before.std, rescaled.expand_as(after.std), rtol=1e-4)


def test_latents_are_scaled_means():
    torch.manual_seed(0)
    vae = build_vae().eval()
    images = draw_dataset(3, seed=1).images
    with torch.no_grad():
        mean = vae.encode(as_pixels(images)).latent_dist.mean * SCALING_FACTOR
    # encode_all runs in bfloat16, which keeps 8 bits of each of some 20 layers.
    assert (encode_all(vae, images) - mean).norm() / mean.norm() < 0.05


def test_caption_states_are_the_text_encoders(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(tokenizer).eval()
    states, strides = embed_captions(encoder, tokenizer)
    row = int((torch.tensor([3, 0, 4, 1]) * strides).sum())
    for index, text in ((row, "a striped red star on a blue background"), (-1, "")):
        ids = tokenizer(text, padding="max_length", return_tensors="pt")["input_ids"]
        assert torch.allclose(states[index], encoder(ids).last_hidden_state[0], atol=1e-5)


def test_signal_to_noise_falls_from_first_to_last_timestep():
    ratio = signal_to_noise()
    assert len(ratio) == 1000 and (ratio.diff() < 0).all()
    assert ratio[0] > 1000 and ratio[-1] < 0.005  # SD 1.5's schedule ends with a little signal left


def test_the_whole_chain_makes_a_pipeline_that_diffusers_loads(tmp_path):
    folder = train(tmp_path, TINY)
    pipe = StableDiffusionPipeline.from_pretrained(folder.pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a star", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3) and np.isfinite(image).all()
    assert (folder.pipeline / "image_encoder" / "preprocessor_config.json").exists()
    assert (folder.adapter / "ip_adapter.safetensors").exists()
    assert load_file(folder.judge)
    scores = json.loads(folder.evaluation.read_text())
    assert list(scores) == ["0.0", "0.5", "1.0"] and scores["1.0"]["images"] == 2
    # What is finished stays as it is.
    written = {path: path.stat().st_mtime_ns for path in (folder.work / "vae").iterdir()}
    train(tmp_path, TINY, stages=("vae", "clip", "unet", "decoder", "judge"))
    assert written == {path: path.stat().st_mtime_ns for path in (folder.work / "vae").iterdir()}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("vae", "clip", "judge")])
def test_a_stage_without_those_before_it_says_which_one_to_run(tmp_path, stage):
    with pytest.raises(TrainError, match="run the stage"):
        train(tmp_path, TINY, stages=(stage,))


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(TrainError, match="no stage is called 'vea'; there are vae, clip"):
        train(tmp_path, TINY, stages=("vea",))


def test_minutes_are_shared_among_the_stages():
    assert DemoConfig().budget("unet").minutes is None
    config = DemoConfig(minutes=60)
    spent = sum(config.budget(stage).minutes for stage in ("vae", "clip", "unet", "decoder", "judge"))
    assert 45 < spent < 60  # the adapter's part is left
