"""Images and the prompt, as a vision-language model gets them."""

import json

import pytest
import torch
from PIL import Image
from transformers import AddedToken, LlavaProcessor

from captioning_models import END, IMAGE, START, byte_tokenizer, tiny_llava
from scaleclip.captioning import vision_language_model
from scaleclip.captioning.generation import Sampling
from scaleclip.captioning.vision_language_model import VisionLanguageModel
from scaleclip.errors import ConfigError

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, max_tokens=20)
IMAGES = [Image.new("RGB", size, color) for size, color in (((40, 48), "red"), ((300, 20), "blue"), ((28, 28), "black"))]


def test_texts_are_those_of_each_image_alone_and_of_a_plain_call(llava):
    written = llava.write(llava.inputs(IMAGES), GREEDY, 0)
    assert len({each.text for each in written}) == len(IMAGES)
    assert all(1 <= each.tokens <= 20 for each in written)
    assert written == [llava.write(llava.inputs([image]), GREEDY, 0)[0] for image in IMAGES]
    for image, each in zip(IMAGES, written, strict=True):
        inputs = llava.processor(text=f"USER: {IMAGE}\nDescribe it. ASSISTANT:", images=image, return_tensors="pt")
        made = llava.model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        assert each.text == llava.processor.decode(made, skip_special_tokens=True).strip()


def test_a_chat_template_is_used_and_starts_once(tmp_path):
    model = VisionLanguageModel(tiny_llava(tmp_path / "chat", chat=True), "Describe it.", "auto", CPU)
    ids = model.inputs(IMAGES[:1])["input_ids"][0]
    text = model.processor.tokenizer.decode(ids)
    patches = IMAGE * 4
    assert text == f"{START}[user]{patches}Describe it.{END}[assistant]"


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_with_an_image_of_its_own_is_refused(tmp_path, chat):
    with pytest.raises(ConfigError, match="which stands for an image: leave it out"):
        VisionLanguageModel(tiny_llava(tmp_path / "llava", chat=chat), "What is in <image>?", "auto", CPU)


def test_images_are_those_of_one_text_each(llava, monkeypatch):
    """As processors have it that take a flat list for the images of one text."""
    real = llava.processor

    class Strict:
        tokenizer = real.tokenizer

        def __call__(self, *, text, images, **named):
            if [len(each) for each in images] != [1] * len(text):
                raise ValueError("as many lists of images as texts")
            return real(text=text, images=images, **named)

    expected = llava.inputs(IMAGES)
    monkeypatch.setattr(llava, "processor", Strict())
    assert all(torch.equal(value, expected[name]) for name, value in llava.inputs(IMAGES).items())


def test_a_token_that_begins_an_image_may_stand_for_it(tmp_path, monkeypatch):
    folder = tiny_llava(tmp_path / "llava", chat=True)
    monkeypatch.setattr(LlavaProcessor, "boi_token", IMAGE, raising=False)
    monkeypatch.setattr(LlavaProcessor, "image_token", property(lambda self: "<soft>", lambda self, value: None), raising=False)
    assert VisionLanguageModel(folder, "Describe it.", "auto", CPU).asked.count(IMAGE) == 1
    with pytest.raises(ConfigError, match="has <image>, which stands for an image"):
        VisionLanguageModel(folder, "Describe <image>.", "auto", CPU)


def test_a_template_that_forgets_the_image_is_refused(tmp_path):
    folder = tiny_llava(tmp_path / "llava", chat=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(ConfigError, match="makes 0 images of one"):
        VisionLanguageModel(folder, "Describe it.", "auto", CPU)


def test_a_folder_without_a_processor_is_refused(tmp_path):
    folder = tiny_llava(tmp_path / "llava")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="processor"):
        VisionLanguageModel(folder, "Describe it.", "auto", CPU)


def test_a_template_beside_the_tokenizer_alone_is_used(tmp_path):
    folder = tiny_llava(tmp_path / "llava", chat=True)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    whole = tiny_llava(tmp_path / "whole", chat=True)
    asked = VisionLanguageModel(folder, "Describe it.", "auto", CPU).asked
    assert asked == VisionLanguageModel(whole, "Describe it.", "auto", CPU).asked


@pytest.mark.parametrize("content", ["{{ m['content'] }}", "{{ '' + m['content'] }}"])
def test_a_tokenizers_template_may_take_text_alone(content, tmp_path):
    folder = tiny_llava(tmp_path / "llava")
    template = "{% for m in messages %}USER: " + content + " ASSISTANT:{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert VisionLanguageModel(folder, "Describe it.", "auto", CPU).asked == f"USER: {IMAGE}\nDescribe it. ASSISTANT:"


def test_a_token_of_an_image_may_be_an_object(tmp_path):
    """As BLIP-2's processor has it."""
    folder = tiny_llava(tmp_path / "llava")
    whole = VisionLanguageModel(folder, "Describe it.", "auto", CPU).asked
    processor = LlavaProcessor.from_pretrained(folder)
    processor.image_token = AddedToken(IMAGE)
    assert vision_language_model._ask(processor, "Describe it.", folder) == whole
    with pytest.raises(ConfigError, match="has <image>, which stands for an image"):
        vision_language_model._ask(processor, "Describe <image>.", folder)


def test_a_template_that_refuses_is_said(tmp_path):
    folder = tiny_llava(tmp_path / "llava", chat=True)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system, no talk') }}")
    with pytest.raises(ConfigError, match="the chat template cannot be filled in: no system, no talk; take another model"):
        VisionLanguageModel(folder, "Describe it.", "auto", CPU)
