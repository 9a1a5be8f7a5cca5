"""Pre-training in the toy world: its texts are the prompts of data.py, and what it made is an Idefics2 in the published layout
that really learns in context."""

import functools

import numpy as np
import pytest
import torch

from data import DATASETS, TEMPLATES, Processor, encode_images, load, prompts, row
from eval import answer
from model import Idefics2
from tools import pretrain
from tools.pretrain import TINY
from toy import world

FEATURES = {}

@pytest.fixture(scope="module")
def tiny():
    return Idefics2.from_pretrained(TINY), Processor.from_pretrained(TINY)


@functools.cache
def never_seen(kind):
    """100 episodes of nine samples, neighbours under different ones of 25 held-out rules."""
    tasks = [load(kind, None, "dev", n) for n in range(25)]
    return [samples[at:at + 9] for at in range(0, 36, 9) for samples in tasks]


def test_ids_of_a_prompt_worked_out_by_hand(tiny):
    processor = tiny[1]
    words = [processor.tokenizer.id_to_token(i) for i in range(122)]
    ids = processor.encode(processor.expand("Image:<image> dax? rot it is\nImage:"))
    picture = ["<fake_token_around_image>", *["<image>"] * 4, "<fake_token_around_image>"]
    assert [words[i] for i in ids] == ["<s>", "Image:", *picture, "dax?", "rot", "it", "is", "\n", "Image:"]
    assert words[:3] == ["<unk>", "<s>", "</s>"] and len(set(words)) == processor.tokenizer.get_vocab_size() == 122
    assert processor.decode(processor.encode("rot it is\n")).strip() == "rot it is"


@pytest.mark.parametrize("kind", world.KINDS)
def test_episodes_are_prompts_whose_answers_and_line_ends_are_trained(tiny, kind):
    processor, episodes = tiny[1], never_seen(kind)
    ids, trained = pretrain.write(processor, [[(s.question, s.target) for s in samples] for samples in episodes])
    template = TEMPLATES[DATASETS[kind].task]
    for made, read, (*icds, query) in zip(ids, trained, episodes, strict=True):
        expected, _ = row(processor, template, icds, query)
        assert made[-len(expected):].tolist() == expected and (made[:-len(expected)] == processor.pad_id).all()
        assert made[read].tolist() == processor.encode("".join(f" {s.target}\n" for s in [*icds, query]))[1:]


def test_the_learning_rate_rises_rests_and_falls():
    factors = [pretrain.schedule(step, 3000, 200) for step in range(3000)]
    assert factors[0] == 1 / 200 and set(factors[199:2100]) == {1.0} and 0 < factors[-1] < 0.002


def test_a_short_run_writes_a_complete_folder_with_settings_of_its_own(tmp_path, monkeypatch):
    for name in "VISION_STEPS", "VISION_BATCH", "STEPS", "BATCH", "BANK":
        monkeypatch.setattr(pretrain, name, 4)
    config = (TINY / "config.json").read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 1')
    (tmp_path / "config.json").write_text(config)
    pretrain.main(["--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in TINY.iterdir()} - {"README.md", "log.csv"}
    assert Idefics2.from_pretrained(tmp_path).config.text.num_hidden_layers == 1


def accuracy(tiny, kind, shots, another=0):
    """Share of 100 never-seen episodes answered right by generation, with the demonstrations of an episode so many before it."""
    rows = never_seen(kind)
    icds = [rows[n - another][8 - shots:8] for n in range(len(rows))]
    features = encode_images(*tiny, sum(rows, []), FEATURES)
    said = answer(*tiny, kind, [row[8] for row in rows], icds, features=features, num_beams=1, batch_size=100)
    return np.mean([text == row[8].target for text, row in zip(said, rows, strict=True)])


@pytest.mark.parametrize("kind", world.KINDS)
def test_never_seen_rules_are_learnt_from_eight_demonstrations(tiny, kind):
    assert accuracy(tiny, kind, 0) <= 0.2
    assert accuracy(tiny, kind, 8) >= {"toy": 0.75, "toy-named": 0.85, "toy-caption": 0.95}[kind]


def test_demonstrations_of_another_rule_are_of_no_use(tiny):
    for kind in world.KINDS:
        assert accuracy(tiny, kind, 8, another=1) <= 0.3


def test_the_checkpoint_is_small():
    assert (TINY / "model.safetensors").stat().st_size <= 5e6


def test_logits_equal_those_of_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    judge, report = transformers.Idefics2ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, processor = tiny
    first, second, *_ = never_seen("toy")
    rows = prompts([first[8], second[8]], [first[:8], second[:8]], processor, TEMPLATES["toy"])
    pixels, mask = processor.images([s.picture() for s in rows.samples])
    seen = rows.attention_mask
    ours = model(rows.input_ids, seen, model.encode_images(pixels, mask))
    with torch.no_grad():
        theirs = judge.eval()(rows.input_ids, seen.long(), pixel_values=pixels.view(2, 9, 3, 40, 40)).logits
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-4, rtol=1e-4)


def test_the_processor_of_transformers_reads_the_folder_alike(tiny):
    transformers = pytest.importorskip("transformers")
    judge = transformers.AutoProcessor.from_pretrained(TINY, use_fast=False)
    _, processor = tiny
    text, picture = "Image:<image> dax? rot it is\n", never_seen("toy")[0][0].picture()
    theirs = judge(text=text, images=[[picture]], return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == processor.encode(processor.expand(text))
    torch.testing.assert_close(theirs["pixel_values"][0], processor.images([picture])[0], atol=1e-6, rtol=0)
