"""Pre-training in the toy world: its texts are the prompts of data.py, it can be interrupted, and what it made is an Idefics2
in the published layout that really learns in context."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import TEMPLATES, Processor, Sample, prompts, row
from model import Idefics2
from support.files import InputError
from tools import pretrain
from toy import world

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
MICRO = ["--no-compile", "--fp32", "--batch", "4", "--vision-batch", "16", "--bank", "64", "--vision-steps", "6",
         "--steps", "8", "--log-every", "4", "--log-episodes", "8", "--table-episodes", "4"]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    pretrain.write_settings(folder)
    return Processor.from_pretrained(folder)


def draw_episodes(kind, n, seed=0, held_out=True):
    """n episodes of nine, and the bank they speak of: (scenes, pictures)."""
    rng = np.random.default_rng(seed)
    scenes, pictures = pretrain.random_pictures(200, rng)
    return world.episodes(rng, n, pretrain.E, scenes, {kind: 1.0}, held_out=held_out), pictures


# ---- texts ----


def test_ids_of_a_prompt_worked_out_by_hand(processor):
    words = pretrain.vocabulary()
    ids = processor.encode(processor.expand("Image:<image> dax? rot it is\nImage:"))
    picture = ["<fake_token_around_image>", *["<image>"] * 4, "<fake_token_around_image>"]
    assert [words[i] for i in ids] == ["<s>", "Image:", *picture, "dax?", "rot", "it", "is", "\n", "Image:"]
    assert words[:3] == ["<unk>", "<s>", "</s>"] and len(set(words)) == len(words) == 122
    assert processor.decode(processor.encode("rot it is\n")).strip() == "rot it is"


@pytest.mark.parametrize("kind", world.KINDS)
def test_episodes_are_what_the_tokenizer_makes_of_the_rendered_text(processor, kind):
    (_, questions, answers), _ = draw_episodes(kind, 20)
    ids, numbers = pretrain.write(processor, questions, answers)
    template = TEMPLATES["toy" if questions[0][0] else "toy-caption"]
    for made, of, question, answer in zip(ids, numbers, questions, answers, strict=True):
        *icds, query = [Sample(0, None, q, [a], a) for q, a in zip(question, answer, strict=True)]
        expected, _ = row(processor, template, icds, query)
        assert made[-len(expected):].tolist() == expected and (made[:-len(expected)] == processor.pad_id).all()
        for n, text in enumerate(answer):               # trained: the answers and the line ends that close them, no more
            assert made[of == n].tolist() == processor.encode(f" {text}\n")[1:]
        assert (of >= 0).sum() == sum(len(text.split()) + 1 for text in answer)
    assert ids.shape[1] <= pretrain.LONGEST


def test_pixels_are_those_of_the_processor(processor):
    _, pictures = pretrain.random_pictures(5, np.random.default_rng(0))
    seen = []
    model = type("Spy", (), {"encode_images": lambda self, *given: seen.extend(given)})()
    pretrain.encode(model, processor, pictures)
    values, mask = processor.images([Image.fromarray(p) for p in pictures])
    assert torch.equal(seen[0], values) and torch.equal(seen[1], mask)


def test_an_example_is_right_if_all_its_tokens_are():
    numbers = torch.tensor([[-1, 0, 0, -1, 1, 1], [-1, -1, 0, -1, -1, 1]])
    labels = torch.tensor([3, 4, 5, 6, 7, 8])           # of the tokens that have a number, in reading order
    guesses = torch.tensor([3, 4, 5, 9, 9, 8])
    right = pretrain.examples_right(torch.nn.functional.one_hot(guesses, 10), labels, numbers)
    assert right[:, :2].tolist() == [[True, False], [False, True]]


def test_the_learning_rate_rises_rests_and_falls():
    factors = [pretrain.schedule(step, 3000) for step in range(3000)]
    assert factors[0] == 1 / 200 and set(factors[199:2100]) == {1.0} and 0 < factors[-1] < 0.002
    assert all(b <= a for a, b in zip(factors[2100:], factors[2101:], strict=False))


# ---- the command ----


def tensors(folder):
    return Idefics2.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro") / "tiny"
    pretrain.main([*MICRO, "--out", str(folder)])
    return folder


def test_a_short_run_writes_a_complete_folder(micro):
    assert sorted(p.name for p in micro.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "log.csv", "model.safetensors", "preprocessor_config.json",
        "processor_config.json", "table.json", "tokenizer.json", "tokenizer_config.json"]
    table = json.loads((micro / "table.json").read_text())
    assert len(table) == 3 * 2 * 5 and {row["n"] for row in table} == {4}
    assert [line.split(",")[0] for line in (micro / "log.csv").read_text().splitlines()] == ["step", "4", "8"]


@pytest.mark.parametrize("saves", [0, 1, 2])            # between the stages, in the decoder's, behind it
def test_interrupted_and_resumed_is_uninterrupted(micro, tmp_path, monkeypatch, capsys, saves):
    save, left = pretrain.files.save_state, iter(range(saves))

    def interrupting(*args):
        save(*args)
        if next(left, None) is None:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.files, "save_state", interrupting)
        pretrain.main([*MICRO, "--out", str(tmp_path)])
    with pytest.raises(InputError, match="expected the state of"):
        pretrain.main([*MICRO, "--out", str(tmp_path), "--seed", "1"])
    pretrain.main([*MICRO, "--out", str(tmp_path), "--resume"])
    ours, theirs = tensors(tmp_path), tensors(micro)
    capsys.readouterr()
    pretrain.main([*MICRO, "--out", str(tmp_path), "--resume"])
    assert "already finished" in capsys.readouterr().out
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_do_the_work_of_one(micro, tmp_path):
    words = ["-m", "tools.pretrain", *MICRO, "--steps", "1", "--table-episodes", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
                   cwd=TINY.parents[1], check=True, capture_output=True)
    vision = [name for name in tensors(micro) if "vision_model" in name]
    distance = [(tensors(micro)[n].float() - tensors(tmp_path)[n].float()).abs().max().item() for n in vision]
    assert max(distance) < 0.02                          # six steps of 2e-3; the same pictures, in another order of summation


# ---- the committed checkpoint ----


@pytest.fixture(scope="module")
def tiny():
    if not TINY.is_dir():
        pytest.skip(f"{TINY} is not there: python -m tools.pretrain makes it")
    return Idefics2.from_pretrained(TINY), Processor.from_pretrained(TINY)


@functools.cache
def never_seen(kind):
    return draw_episodes(kind, 100, seed=20)


def accuracy(tiny, kind, shots, change=lambda demonstrations, other: demonstrations):
    """Share of 100 never-seen episodes answered right by generation; `change` gets a row's demonstrations and another row's."""
    model, processor = tiny
    (indices, questions, answers), pictures = never_seen(kind)
    rows = [[Sample(i, None, q, [a], a) for i, q, a in zip(*row, strict=True)]
            for row in zip(indices.tolist(), questions, answers, strict=True)]
    icds = [change(row[8 - shots:8], rows[n - 1][8 - shots:8]) for n, row in enumerate(rows)]
    batch = prompts([row[8] for row in rows], icds, processor, TEMPLATES["toy" if questions[0][0] else "toy-caption"])
    features = pretrain.encode(model, processor, pictures)[[s.image_id for s in batch.samples]]
    made = model.generate(batch.input_ids, batch.attention_mask, features, 8, end_ids=[processor.newline_id])
    said = [processor.decode(ids).split("\n")[0].strip() for ids in made]
    return np.mean([text == row[8].target for text, row in zip(said, rows, strict=True)])


@pytest.mark.parametrize("kind", world.KINDS)
def test_never_seen_rules_are_learnt_from_eight_demonstrations(tiny, kind):
    assert accuracy(tiny, kind, 0) <= 0.2
    assert accuracy(tiny, kind, 8) >= {"toy": 0.75, "toy-named": 0.85, "toy-caption": 0.95}[kind]


@pytest.mark.parametrize("kind", world.KINDS)
def test_demonstrations_of_another_rule_are_of_no_use(tiny, kind):
    """The other episode's demonstrations are followed, pictures, questions, answers and all."""
    assert accuracy(tiny, kind, 8, lambda own, other: other) <= 0.3


def test_answers_swapped_among_the_demonstrations_destroy_the_score(tiny):
    def shift_answers(own, other):
        targets = [s.target for s in own]
        return [Sample(s.image_id, None, s.question, [t], t) for s, t in zip(own, targets[3:] + targets[:3], strict=True)]
    assert accuracy(tiny, "toy", 8, shift_answers) <= 0.4


def test_the_order_of_the_demonstrations_hardly_matters(tiny):
    for kind in world.KINDS:
        assert abs(accuracy(tiny, kind, 8, lambda own, other: own[::-1]) - accuracy(tiny, kind, 8)) <= 0.08


def test_the_checkpoint_is_small_and_its_table_is_in_its_readme(tiny):
    assert (TINY / "model.safetensors").stat().st_size <= 5e6
    table = json.loads((TINY / "table.json").read_text())
    assert pretrain.markdown(table) in (TINY / "README.md").read_text(encoding="utf-8")
    settings = json.loads((TINY / "config.json").read_text())
    assert settings == json.loads(json.dumps(pretrain.SETTINGS["config"]))


def test_logits_equal_those_of_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    judge, report = transformers.Idefics2ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, processor = tiny
    (indices, questions, answers), pictures = never_seen("toy")
    ids, _ = pretrain.write(processor, questions[:2], answers[:2])
    mask = ids != processor.pad_id
    shown = pictures[indices[:2]]                        # (2,9,40,40,3)
    ours = model(ids, mask, pretrain.encode(model, processor, shown.reshape(-1, *shown.shape[2:])))
    pixels = torch.from_numpy(processor.pixel_of_byte[shown, np.arange(3)]).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        theirs = judge.eval()(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels).logits
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=1e-4)


def test_the_processor_of_transformers_reads_the_folder_alike(tiny):
    transformers = pytest.importorskip("transformers")
    judge = transformers.AutoProcessor.from_pretrained(TINY, use_fast=False)
    _, processor = tiny
    text, picture = "Image:<image> dax? rot it is\n", Image.fromarray(never_seen("toy")[1][0])
    theirs = judge(text=text, images=[[picture]], return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == processor.encode(processor.expand(text))
    torch.testing.assert_close(theirs["pixel_values"][0], processor.images([picture])[0], atol=1e-6, rtol=0)
