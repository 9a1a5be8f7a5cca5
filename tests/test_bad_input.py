"""Whatever is wrong with a file, a folder or the machine: one line that names it, exit status 2, and nothing half-written."""

import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

import eval as evaluation
import train
from baselines.rices import image_vectors
from data import Processor, load, open_image, readable
from eval import ADAPTERS, load_model, run_command
from mimic import save_atomically
from model import Idefics2, InputError
from results import read_predictions, read_rows
from resume import load_state, read_state, save_state

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "checkpoints/tiny"


@pytest.fixture
def world(shared, tmp_path):
    """The folder of a user: data/ as published, model/, and run/, trained on the toys. Nothing of it is shared with a test."""
    for folder in ("okvqa", "vqav2"):
        shutil.copytree(shared / "data" / folder, tmp_path / "data" / folder, copy_function=shutil.copyfile)
    for folder in ("train2014", "val2014"):
        (tmp_path / "data/coco" / folder).mkdir(parents=True)
        for path in (shared / "data/coco" / folder).iterdir():
            (tmp_path / "data/coco" / folder / path.name).symlink_to(path)
    shutil.copyfile(shared / "data/coco/dataset_coco.json", tmp_path / "data/coco/dataset_coco.json")
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    return tmp_path


@pytest.fixture
def toy_world(tmp_path, trained):
    """A folder with model/ and run/ of the toy world, to be harmed."""
    shutil.copytree(TINY, tmp_path / "model")
    shutil.copytree(trained, tmp_path / "run")
    args = json.loads((tmp_path / "run/args.json").read_text())
    (tmp_path / "run/args.json").write_text(json.dumps({**args, "model": str(tmp_path / "model")}))
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(["--samples", "6", "--dev-samples", "2", "--limit", "2", "--epochs", "1", "--shots", "1", "--compare", "--model",
                str(TINY), "--out", str(out)])
    return out


def complaint(main, words, capsys):
    """The one line that a command prints on stderr behind its progress bars, exit status 2 behind it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main([*map(str, words)]))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not re.search(r"\d+\w* \[", line)]
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    assert "expected" in errors[0] and "found" in errors[0] and len(errors[0]) < 1500, errors
    return errors[0]


def check(errors, words):
    assert all(str(word) in errors for word in words), errors


# ---------------------------------------------------------------------------------------------------------------------
# Ways to harm a file
# ---------------------------------------------------------------------------------------------------------------------
def gone(path):
    path.unlink()


def folder_instead(path):
    path.unlink()
    path.mkdir()


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def begins(share):
    """As `cut`, of a link's file a copy."""
    return lambda path: holds(path.read_bytes()[:int(share * path.stat().st_size)])(path)


def holds(content):
    def harm(path):
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return harm


def changed(change):
    """change(content) edits the parsed JSON in place."""
    def harm(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return harm


def entry(key, number=0, **values):
    """In the list `key`, the number-th record gets these values."""
    return changed(lambda content: content[key][number].update(values))


def without(key, name):
    return changed(lambda content: content[key][0].pop(name))


def twice(key):
    return changed(lambda content: content[key].append(content[key][0]))


def answers(value):
    return changed(lambda content: content["annotations"][0].update(answers=value))


def tensors(change):
    """change(dict of tensors) edits a safetensors file, its metadata kept."""
    def harm(path):
        with open(path, "rb") as file:
            about = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__")
        found = load_file(path)
        change(found)
        save_file(found, path, about)
    return harm


def header(change):
    """A safetensors file whose header says something else of the same bytes; change(header) → header."""
    def harm(path):
        whole = path.read_bytes()
        length, = struct.unpack("<Q", whole[:8])
        text = json.dumps(change(json.loads(whole[8:8 + length]))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length:])
    return harm


def moved(name, by):
    def change(h):
        h[name]["data_offsets"] = [x + by for x in h[name]["data_offsets"]]
        return h
    return header(change)


def poisoned(name):
    return tensors(lambda t: t[name].view(-1)[:1].fill_(torch.nan))


def bomb(width, height):
    """A PNG of a few bytes that says it is that large."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    whole = bytearray(buffer.getvalue())
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def animated(kind):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Data: (what is asked for, file, harm, words of the complaint besides the file's name)
# ---------------------------------------------------------------------------------------------------------------------
Q, A, K = ("okvqa/OpenEnded_mscoco_train2014_questions.json", "okvqa/mscoco_train2014_annotations.json", "coco/dataset_coco.json")
VA, VQ = "vqav2/v2_mscoco_train2014_annotations.json", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
HALF = "a\ud800b"
DATA = {
    "questions cut": ("okvqa", Q, cut(0.5), ["complete JSON"]),
    "annotations cut": ("okvqa", A, cut(0.9), ["complete JSON"]),
    "annotations of vqav2 cut": ("vqav2", VA, cut(0.3), ["complete JSON"]),
    "captions cut": ("coco", K, cut(0.99), ["complete JSON"]),
    "questions empty": ("okvqa", Q, holds(b""), ["complete JSON"]),
    "questions no text": ("okvqa", Q, holds(b"\xff\xfe\x00"), ["complete JSON"]),
    "questions a page of a web server": ("okvqa", Q, holds(b"<html>404</html>"), ["complete JSON"]),
    "questions a folder": ("okvqa", Q, folder_instead, ["readable JSON file", "directory"]),
    "questions gone": ("okvqa", Q, gone, ["a JSON file, found nothing"]),
    "annotations gone": ("okvqa", A, gone, ["a JSON file, found nothing"]),
    "captions gone": ("coco", K, gone, ["a JSON file, found nothing"]),
    "a number of thousands of digits": ("okvqa", Q, holds(b'{"questions": [{"question_id": ' + b"9" * 9999 + b"}]}"), ["JSON"]),
    "brackets without end": ("okvqa", Q, holds(b"[" * 200_000), ["complete JSON"]),
    "a list": ("okvqa", Q, holds([1, 2]), ["under 'questions'"]),
    "no list": ("okvqa", Q, holds({"questions": {"1": {}}}), ["a list of objects under 'questions'"]),
    "a list of texts": ("okvqa", Q, holds({"questions": ["why?"]}), ["a list of objects under 'questions'"]),
    "no questions": ("okvqa", Q, holds({"questions": []}), ["samples of okvqa train, found none"]),
    "no captions": ("coco", K, holds({"images": []}), ["samples of coco train, found none"]),
    "no split of that name": ("coco", K, changed(lambda c: [i.update(split="x") for i in c["images"]]), ["found none"]),
    "a question id of text": ("okvqa", Q, entry("questions", question_id="7"), ["'question_id' of type int, found '7'"]),
    "a question id of truth": ("okvqa", Q, entry("questions", question_id=True), ["'question_id' of type int, found True"]),
    "a question without an image": ("okvqa", Q, without("questions", "image_id"), ["'image_id' of type int, found None"]),
    "an image id of half a number": ("okvqa", Q, entry("questions", image_id=0.5), ["'image_id' of type int, found 0.5"]),
    "a question of nothing": ("okvqa", Q, entry("questions", question=None), ["'question' of type str, found None"]),
    "a question of half a letter": ("okvqa", Q, entry("questions", question=HALF), ["half a character"]),
    "a question twice": ("okvqa", Q, twice("questions"), ["every question_id once, found", "twice"]),
    "an annotation twice": ("okvqa", A, twice("annotations"), ["every question_id once, found", "twice"]),
    "an annotation missing": ("okvqa", A, changed(lambda c: c["annotations"].pop()), ["an annotation of question"]),
    "no annotations": ("okvqa", A, holds({"annotations": []}), ["an annotation of question"]),
    "an annotation without id": ("okvqa", A, without("annotations", "question_id"), ["'question_id' of type int"]),
    "answers of another kind": ("okvqa", A, answers({"answer": "x"}), ["'answers' of type list"]),
    "no answers": ("okvqa", A, answers([]), ["answers of question", "found none"]),
    "answers of text": ("okvqa", A, answers(["x"]), ["an object with answer, found 'x'"]),
    "an answer of numbers": ("okvqa", A, answers([{"answer": 7}]), ["'answer' of type str, found 7"]),
    "a raw answer of numbers": ("okvqa", A, answers([{"answer": "7", "raw_answer": 7}]), ["'raw_answer' of type str, found 7"]),
    "an answer of half a letter": ("okvqa", A, answers([{"answer": HALF}]), ["half a character"]),
    "a chosen answer of a list": ("vqav2", VA, entry("annotations", multiple_choice_answer=["a"]), ["'multiple_choice_answer'"]),
    "a type of numbers": ("vqav2", VA, entry("annotations", question_type=5), ["'question_type' of type str, found 5"]),
    "no question of the published list": ("vqav2", VQ, changed(lambda c: [q.update(question_id=i) for i, q in enumerate(
        c["questions"])]), ["questions of the published list"]),
    "a path that climbs": ("coco", K, entry("images", filepath=".."), ["a plain name of a folder", "'..'"]),
    "a name that climbs": ("coco", K, entry("images", filename="../../../secret.jpg"), ["a plain name", "secret.jpg"]),
    "an absolute name": ("coco", K, entry("images", filename="/etc/passwd"), ["a plain name", "/etc/passwd"]),
    "a name with a zero byte": ("coco", K, entry("images", filename="a\0.jpg"), ["a plain name"]),
    "a name of Windows": ("coco", K, entry("images", filename="..\\secret.jpg"), ["a plain name"]),
    "an image id of text": ("coco", K, changed(lambda c: [i.update(cocoid="1") for i in c["images"]]), ["'cocoid' of type int"]),
    "an image twice": ("coco", K, changed(lambda c: [i.update(cocoid=5) for i in c["images"]]), ["every cocoid once, found 5"]),
    "no sentences": ("coco", K, changed(lambda c: [i.update(sentences=[]) for i in c["images"]]), ["captions of image"]),
    "sentences of text": ("coco", K, changed(lambda c: [i.update(sentences=["a"]) for i in c["images"]]), ["an object with raw"]),
    "a sentence of numbers": ("coco", K, changed(lambda c: [i.update(sentences=[{"raw": 1}]) for i in c["images"]]), ["'raw'"]),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name, world, tiny_folder, capsys):
    dataset, file, harm, words = DATA[name]
    harm(world / "data" / file)
    command_line = ["--dataset", dataset, "--model", tiny_folder, "--data", world / "data", "--out", world / "out"]
    found = complaint(train.main, command_line, capsys)
    check(found, [*words, world / "data" / ("" if "samples of" in found else file)])
    assert not (world / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
PICTURES = {
    "gone": (gone, ["found no file"]),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere.jpg")), ["found no file"]),
    "a folder": (folder_instead, ["a complete image", "directory"]),
    "empty": (holds(b""), ["a complete image"]),
    "cut in its middle": (begins(0.5), ["a complete image", "truncated"]),
    "cut in its header": (begins(1e-4), ["a complete image"]),
    "noise": (holds(random.Random(0).randbytes(5000)), ["cannot identify"]),
    "a web page": (holds(b"<html><body>502 Bad Gateway</body></html>"), ["cannot identify"]),
    "a decompression bomb": (holds(bomb(60_000, 60_000)), ["60000 x 60000 pixels, more than 100,000,000"]),
    "a smaller bomb": (holds(bomb(20_000, 5_001)), ["decompression bomb"]),
    "as large as it says in nothing": (holds(bomb(4000, 4000)), ["a complete image"]),
    "an animation": (holds(animated("GIF")), ["an animation of 3 frames"]),
    "an animation in PNG": (holds(animated("PNG")), ["an animation of 3 frames"]),
    "an animation in WebP": (holds(animated("WEBP")), ["an animation of 3 frames"]),
    "a program for Ghostscript": (holds(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n"),
                                    ["cannot identify"]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_picture(name, world, tiny_folder, capsys):
    harm, words = PICTURES[name]
    path = load("okvqa", world / "data", "val")[1].image
    harm(path)
    found = complaint(evaluation.main, ["--dataset", "okvqa", "--model", tiny_folder, "--data", world / "data", "--limit", "2",
                                        "--num-beams", "1", "--out", world / "out"], capsys)
    check(found, [path, *words])
    assert not [p for p in world.rglob("*") if p.name.endswith((".tmp", "results.json", "predictions.jsonl"))]


def test_a_picture_is_what_its_bytes_say_whatever_its_name(tmp_path):
    for kind in ("PNG", "BMP", "WEBP", "GIF", "TIFF", "JPEG"):
        Image.new("RGB", (9, 8), "red").save(tmp_path / "a.jpg", kind)
        assert open_image(tmp_path / "a.jpg").size == (9, 8)


def test_bad_pictures_are_left_out_counted_and_listed_on_demand(world, tiny_folder, capsys):
    """One of the evaluation split, one of the training split; what remains is trained on and scored."""
    train_set, val = (load("okvqa", world / "data", split) for split in ("train", "val"))
    (bad, other), n = (train_set[3].image, val[1].image), len({s.image_id for s in train_set})
    cut_in_its_middle, gone_ = PICTURES["cut in its middle"][0], PICTURES["gone"][0]
    cut_in_its_middle(bad)
    gone_(other)
    row, = train.main(["--dataset", "okvqa", "--model", str(tiny_folder), "--data", str(world / "data"), "--out",
                       str(world / "out"), "--skip-bad-images", "--epochs", "1", "--shots", "1", "--num-beams", "1"])
    said = capsys.readouterr().out
    left = [s for s in train_set if s.image_id == train_set[3].image_id], [s for s in val if s.image_id == val[1].image_id]
    assert f"--skip-bad-images: 2 bad pictures, {sum(map(len, left))} samples left out\n" in said and n > 1
    assert f"{bad}: expected a complete image" in said and f"{other}: expected an image, found no file" in said
    assert row["n"] == len(val) - len(left[1])
    for s in val:
        gone_(s.image) if s.image.is_symlink() else None
    words = ["--dataset", "okvqa", "--model", tiny_folder, "--data", world / "data", "--out", world / "out2", "--skip-bad-images"]
    check(complaint(evaluation.main, words, capsys), ["a readable picture, found none in", "the first:"])
    assert readable(train_set, skip=True)[0] == [s for s in train_set if s.image_id != train_set[3].image_id]


# ---------------------------------------------------------------------------------------------------------------------
# Models, adapters, runs: (file, harm, words besides its name)
# ---------------------------------------------------------------------------------------------------------------------
W, NORM = "model/model.safetensors", "model.text_model.norm.weight"
M, T, P, G, C = (f"model/{name}.json" for name in (
    "model.safetensors.index", "tokenizer", "preprocessor_config", "generation_config", "config"))
R = "run/mimic.safetensors"
FILES = {
    "weights cut": (W, cut(0.99), ["complete safetensors"]),
    "weights empty": (W, holds(b""), ["complete safetensors"]),
    "weights gone": (W, gone, ["found nothing"]),
    "a header longer than the file": (W, lambda p: p.write_bytes(struct.pack("<Q", 1 << 40) + p.read_bytes()[8:]), ["complete"]),
    "a header that is no JSON": (W, lambda p: p.write_bytes(p.read_bytes()[:8] + b"x" * 9000), ["complete safetensors"]),
    "a tensor behind the end": (W, moved(NORM, 1 << 30), ["complete safetensors"]),
    "a tensor upon another": (W, moved(NORM, -2), ["complete safetensors"]),
    "a shape that the bytes are not": (W, header(lambda h: h[NORM].update(shape=[999]) or h), ["complete safetensors"]),
    "a dtype that is none": (W, header(lambda h: h[NORM].update(dtype="X7") or h), ["complete safetensors"]),
    "weights of whole numbers": (W, tensors(lambda t: t.update({NORM: t[NORM].to(torch.int16)})), [NORM, "floating point"]),
    "weights of other names": (W, tensors(lambda t: t.update(wrong=t.pop(NORM))), ["1 missing", NORM, "1 unexpected: wrong"]),
    "weights of another shape": (W, tensors(lambda t: t.update({NORM: t[NORM][:9]})), ["1 misshapen", f"{NORM} [9] instead"]),
    "weights with NaN": (W, poisoned(NORM), ["finite logits", NORM]),
    "an index that climbs": (M, holds({"weight_map": {"a": "../../a.safetensors"}}), ["a weight_map"]),
    "a tokenizer cut": (T, cut(0.5), ["complete JSON"]),
    "a tokenizer of something else": (T, holds({"version": "1.0"}), ["a tokenizer"]),
    "a tokenizer gone": (T, gone, ["found nothing"]),
    "a preprocessor of a list": (P, holds([1]), ["an object"]),
    "a size of text": (P, changed(lambda c: c.update(size={"longest_edge": "40"})), ["in pixels, found '40'"]),
    "a preprocessor of no size": (P, changed(lambda c: c.update(size={"longest_edge": 0})), ["sizes in pixels, found 0"]),
    "a mean of two numbers": (P, changed(lambda c: c.update(image_mean=[1, 2])), ["image_mean of three numbers"]),
    "a deviation of nothing": (P, changed(lambda c: c.update(image_std=[0, 1, 1])), ["image_std of three numbers"]),
    "a scale of text": (P, changed(lambda c: c.update(rescale_factor="1/255")), ["rescale_factor"]),
    "a resampling that is none": (P, changed(lambda c: c.update(resample=99)), ["resample in 0 … 5, found 99"]),
    "a padding of text": (G, changed(lambda c: c.update(pad_token_id="<pad>")), ["pad_token_id", "'<pad>'"]),
    "a padding below nothing": (G, changed(lambda c: c.update(pad_token_id=-1)), ["pad_token_id", "-1"]),
    "a config of a number without end": (
        C, lambda p: p.write_text(p.read_text().replace("10000.0", "1e999")), ["rope_theta", "inf"]),
    "a config of a number of hundreds of digits": (
        C, changed(lambda c: c["text_config"].update(hidden_size=10 ** 400)), ["hidden_size to be int"]),
    "a config of a billion layers": (
        C, changed(lambda c: c["text_config"].update(num_hidden_layers=10 ** 9)), ["num_hidden_layers to be 1000 at most"]),
    "an adapter cut": (R, cut(0.9), ["a MimIC adapter in safetensors"]),
    "an adapter empty": (R, holds(b""), ["a MimIC adapter in safetensors"]),
    "an adapter gone": (R, gone, ["a MimIC adapter, found nothing"]),
    "an adapter whose header lies": (R, moved("vector", 1 << 20), ["a MimIC adapter in safetensors"]),
    "an adapter with NaN": (R, poisoned("vector"), ["of finite numbers, found vector"]),
    "an adapter with infinity": (R, tensors(lambda t: t["f_bias"].fill_(torch.inf)), ["of finite numbers, found f_bias"]),
    "an adapter of bfloat16": (
        R, tensors(lambda t: t.update(vector=t["vector"].bfloat16())), ["torch.float32, found vector of torch.bfloat16"]),
    "an adapter of whole numbers": (
        R, tensors(lambda t: t.update(vector=t["vector"].int())), ["torch.float32, found vector of torch.int32"]),
    "an adapter of other names": (R, tensors(lambda t: t.update(v=t.pop("vector"))), ["a MimIC adapter with vector", "'v'"]),
    "an adapter of another model": (R, tensors(lambda t: t.update({k: x[:2].clone() for k, x in t.items()})),
                                    ["whose vector is (6, 8, 16) as for this model, found (2, 8, 16)"]),
    "an adapter of another method": (R, holds(save({"W": torch.zeros(2, 128)})), ["a MimIC adapter with", "'W'"]),
    "an adapter of options that are none": (
        R, header(lambda h: h["__metadata__"].update(z2="half") or h), ["z2 masked or", "half"]),
    "arguments cut": ("run/args.json", cut(0.5), ["complete JSON"]),
    "arguments of a list": ("run/args.json", holds([1]), ["arguments of a run of train.py"]),
    "arguments of another method": ("run/args.json", changed(lambda c: c.update(method="x")), ["arguments of a run"]),
    "arguments of words for numbers": ("run/args.json", changed(lambda c: c.update(samples="many")), ["--samples", "'many'"]),
    "arguments of an unknown dataset": ("run/args.json", changed(lambda c: c.update(dataset="x")), ["--dataset", "'x'"]),
    "arguments of a list for a number": ("run/args.json", changed(lambda c: c.update(num_beams=[1])), ["--num-beams"]),
    "results of something else": ("run/results.json", holds({"score": 1}), ["a list of rows"]),
    "results cut": ("run/results.json", cut(0.5), ["complete JSON"]),
    "predictions garbled": ("run/predictions.jsonl", holds(b'{"dataset": 1}\n{"data'), ["a prediction in line 2"]),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_of_a_model_or_a_run(name, toy_world, capsys):
    file, harm, words = FILES[name]
    before = {p.name for p in (toy_world / "run").rglob("*")}
    harm(toy_world / file)
    command_line = ["--run", toy_world / "run", "--limit", "1", "--num-beams", "1", "--restore-shots", "1"]
    found = complaint(evaluation.main, command_line, capsys)
    check(found, words)
    if not any(word in found for word in ("tensors of this config", "finite logits")):
        assert Path(file).name in found, found
    after = {p.name for p in (toy_world / "run").rglob("*")} - {"answers", M.split("/")[1]}
    assert not [n for n in after - before if not n.startswith("toy_test")], after - before


def test_there_are_enough_cases():
    assert len(DATA) + len(PICTURES) + len(FILES) >= 60


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------
RUN = ["--samples", "6", "--dev-samples", "2", "--limit", "2", "--epochs", "2", "--shots", "1", "--compare", "--num-beams", "1"]


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_a_folder_that_cannot_be(main, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = RUN if main is train.main else ["--limit", "1"]
    for out in tmp_path / "file", tmp_path / "file/below":
        check(complaint(main, [*words, "--out", out], capsys), [out, "a folder that can be written"])


@pytest.mark.skipif(os.name != "posix", reason="needs users and limits of processes")
def test_a_folder_that_may_not_be_written(command, tmp_path):
    """As a user who may not, whoever runs the tests."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "closed").mkdir(mode=0o555)
    for script, words in (("train.py", RUN), ("eval.py", ["--limit", "1"])):
        status, errors = command(script, [*words, "--model", tmp_path / "model", "--out", tmp_path / "closed/run"], user=65534)
        assert status == 2, errors
        assert errors.endswith("closed/run: expected a folder that can be written, found: Permission denied\n"), errors
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs limits of processes")
@pytest.mark.parametrize("script, file, size", [
    ("train.py", "args.json", 300), ("train.py", "features.bin", 1500), ("train.py", "state.safetensors", 17_500),
    ("eval.py", "answers", 4000), ("eval.py", "predictions.jsonl", 4000)])
def test_a_disk_that_is_full(command, tmp_path, script, file, size):
    """No file may become longer than `size`: what there was stays whole, and the run goes on once there is room."""
    words = [*(RUN if script == "train.py" else ["--limit", "250" if file == "answers" else "24", "--num-beams", "1"])]
    words += ["--out", tmp_path / "run"]
    status, errors = command(script, words, limit=size)
    assert status == 2 and errors.count("error: ") == 1 and "Traceback" not in errors, errors
    line = errors[errors.index("error: "):]
    assert line.count("\n") == 1 and file in line and "found: File too large" in line, line
    assert not list(tmp_path.rglob("*.tmp"))
    assert command(script, [*words[:-2], "--resume", *words[-2:]])[0] == 0
    assert len(json.loads((tmp_path / "run/results.json").read_text())) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("script, words, option, hint", [
    ("train.py", ["--samples", "600", "--batch-size", "600"], "--batch-size 600",
     "try --batch-size 300, with twice the --accumulate"),
    ("eval.py", ["--shots", "8", "--limit", "500", "--eval-batch-size", "500"], "--eval-batch-size 500",
     "try --eval-batch-size 250")])
def test_too_little_memory_for_a_batch(command, tmp_path, script, words, option, hint):
    status, errors = command(script, [*words, "--out", tmp_path / "run"], more_memory=350_000_000)
    line = errors[errors.index("error: "):] if "error: " in errors else errors
    assert status == 2 and line.startswith(
        f"error: {option}: expected it to fit into the memory, found that it does not; {hint}"), errors
    assert line.count("\n") == 1


@pytest.mark.parametrize("main, words", [
    (train.main, ["--lr", "nan"]), (train.main, ["--lr", "-1"]), (train.main, ["--warmup", "2"]), (train.main, ["--clip", "0"]),
    (train.main, ["--lambda-ce", "inf"]), (evaluation.main, ["--length-penalty", "1e308"])])
def test_numbers_that_cannot_be(main, words, tmp_path, capsys):
    check(complaint(main, [*words, "--out", tmp_path / "run"], capsys), [words[0], "found", f"{float(words[1]):g}"])


@pytest.mark.parametrize("words, reader", [
    (["--fit", "layerwise", "--lambda-ce", "5"], "--fit training"),
    (["--fit", "layerwise", "--test-every-epoch"], "--fit training"),
    (["--fit-tokens", "text"], "--fit or --init layerwise"), (["--method", "live", "--mu", "one"], "--method mimic"),
    (["--rank", "4"], "--method lora or hificl"), (["--method", "hificl", "--scope", "all"], "--method lora"), ([], None),
    (["--init", "layerwise", "--lr", "0.1", "--memory-gb", "2", "--mu", "one"], None),
    (["--method", "lora", "--rank", "2"], None)])
def test_an_option_that_changes_nothing_is_named(words, reader, capsys):
    train.parse(words)
    option = next((w for w in words[::-1] if w.startswith("--")), None)
    assert capsys.readouterr().err == (f"{option} changes nothing here: only {reader} reads it\n" if reader else "")


def test_a_loss_that_is_no_number_stops_training_and_names_step_samples_and_the_last_good_file(tmp_path, monkeypatch, capsys):
    losses, calls = train.losses, []

    def later_nan(*arguments):
        calls.append([s.id for s in arguments[2].student.samples])
        align, ce = losses(*arguments)
        return align, ce * torch.nan if len(calls) == 4 else ce
    monkeypatch.setattr(train, "losses", later_nan)
    words = [*RUN, "--batch-size", "2", "--out", tmp_path / "run"]
    found = complaint(train.main, words, capsys)
    check(found, ["step 4: expected finite losses and gradients, found align 0.", "ce nan", str(calls[3]),
                  f"last good: {tmp_path}/run/mimic.safetensors and {tmp_path}/run/state.safetensors"])
    assert read_state(tmp_path / "run/state.safetensors")[2]["step"] == 3
    monkeypatch.setattr(train, "losses", lambda *a: tuple(x * torch.inf for x in losses(*a)))
    check(complaint(train.main, [*words[:-1], tmp_path / "first"], capsys), ["step 1: expected", "inf", "last good: none yet"])


# ---------------------------------------------------------------------------------------------------------------------
# 300 mutated files
# ---------------------------------------------------------------------------------------------------------------------
ODD = [None, True, False, 0, -1, 2 ** 63, 10 ** 30, 0.5, 1e308, float("nan"), "", "x", "a\ud800", "\0", "../..", [], {}, [[]],
       [None], {"a": 1}]


def mutated_json(content, r):
    """Somewhere in the tree: another value, a key that is gone, an entry twice."""
    content = json.loads(json.dumps(content))
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return r.choice(ODD)
        key = r.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and r.random() < 0.8:
            node = node[key]
            continue
        harm = r.randrange(4)
        if harm == 0:
            del node[key]
        elif harm == 1 and isinstance(node, list):
            node.append(node[key])
        else:
            node[key] = r.choice(ODD)
        return content


def mutated_bytes(whole, r):
    """Cut, overwritten, with a part that is gone, twice or filled with zeros."""
    at, n = r.randrange(len(whole)), r.choice([1, 2, 8, 100, 4000])
    if r.random() < 0.5:                                       # most of what is checked stands at the beginning
        at = r.randrange(min(len(whole), 400))
    return r.choice([
        lambda: whole[:at], lambda: whole[:at] + r.randbytes(n) + whole[at + n:], lambda: whole[:at] + whole[at + n:],
        lambda: whole[:at] + whole[at:at + n] * 2 + whole[at + n:], lambda: whole[:at] + bytes(n) + whole[at + n:],
        lambda: whole[:at] + r.randbytes(n) + whole[at:]])()


def mutate(path, r):
    whole = path.read_bytes()
    if path.suffix == ".json" and r.random() < 0.7:
        path.write_text(json.dumps(mutated_json(json.loads(whole), r)))
    else:
        path.write_bytes(mutated_bytes(whole, r))


@pytest.fixture
def readers(shared, toy_world, tmp_path):
    """(file, what reads it), for every kind of file that is read."""
    model, processor = load_model(TINY, "cpu", "float32")
    data = tmp_path / "data"
    for name in ("okvqa", "vqav2"):
        shutil.copytree(shared / "data" / name, data / name, copy_function=shutil.copyfile)
    (data / "coco").mkdir()
    shutil.copyfile(shared / "data/coco/dataset_coco.json", data / "coco/dataset_coco.json")
    for folder in (data, *data.iterdir()):
        folder.chmod(0o755)
    pairs = [(path, lambda d=path.parent.name, s="train" if "train" in path.name else "val": load(d, data, s))
             for path in sorted(data.glob("*/*.json"))]
    picture, files = Image.open(next((shared / "data/coco/val2014").glob("*.jpg"))).resize((60, 50)), []
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        files.append(tmp_path / f"picture.{kind.lower()}")
        picture.save(files[-1])
    pairs += [(path, lambda path=path: processor.images([open_image(path)])) for path in files]
    folder = tmp_path / "model"
    pairs += [(folder / f"{name}.json", lambda: (Processor.from_pretrained(folder).encode("Image:<image> wug? rot it is\n"),
                                                 Idefics2.from_pretrained(folder)))
              for name in ("config", "tokenizer", "preprocessor_config", "generation_config")]
    pairs.append((folder / "model.safetensors", lambda: Idefics2.from_pretrained(folder)))
    for method, kind in ADAPTERS.items():
        adapter, path = kind.for_model(model), tmp_path / f"{method}.safetensors"
        adapter.save(path, method=method)
        pairs.append((path, lambda kind=kind, path=path: evaluation.check_fits(kind.load(path), model, path)))
    optimiser, path = torch.optim.AdamW(adapter.parameters()), tmp_path / "state.safetensors"
    adapter.vector.grad = torch.ones_like(adapter.vector)
    optimiser.step()
    save_state(path, adapter.state_dict(), optimiser, step=1, best=0.5)
    pairs.append((path, lambda path=path: load_state(path, adapter, optimiser)))
    vectors = tmp_path / "rices.safetensors"
    save_atomically({"image_ids": torch.arange(3), "vectors": torch.ones(3, 4)}, vectors, {"tower": "x"})
    pairs.append((vectors, lambda: image_vectors(model, [], None, vectors)))
    run = tmp_path / "run"
    pairs += [(run / "results.json", lambda: read_rows(run / "results.json")),
              (run / "predictions.jsonl", lambda: read_predictions(run / "predictions.jsonl")),
              (run / "args.json", lambda: evaluation.main(["--run", str(run), "--limit", "1", "--out", str(tmp_path / "out")]))]
    return pairs


def test_three_hundred_mutated_files_are_read_or_refused_in_one_line(readers, capsys):
    r, refused, tracebacks = random.Random(0), 0, []
    for n in range(300):
        path, read = readers[n % len(readers)]
        whole = path.read_bytes()
        mutate(path, r)
        try:
            read()
        except InputError as e:
            refused += 1
            if "\n" in str(e) or not re.search("expected|image tokens", str(e)):
                tracebacks.append((n, path.name, str(e)))
        except BaseException as e:                             # the libraries' panics are no Exceptions
            tracebacks.append((n, path.name, repr(e)))
        path.write_bytes(whole)
    capsys.readouterr()
    print(f"inputs tried 300: {300 - refused} read all the same, {refused} refused in one line, tracebacks {len(tracebacks)}")
    assert refused > 150 and not tracebacks, tracebacks


# ---------------------------------------------------------------------------------------------------------------------
# What is never done
# ---------------------------------------------------------------------------------------------------------------------
def test_nothing_reads_pickles_or_runs_what_it_reads():
    forbidden = (r"pickle|marshal|shelve|yaml|torch\.(load|save)\b|\w+_object(_list)?\(|os\.(system|popen)|shell=True"
                 r"|(?<![.\w])(eval|exec|compile|__import__)\(")
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "baselines").glob("*.py")]
    found = [(p.name, line.strip()) for p in files for line in p.read_text().splitlines()
             if re.search(forbidden, line.split("#")[0]) and "expected" not in line]
    assert len(files) > 20 and found == []


def test_a_run_opens_no_connection_and_no_pickle(tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("this must not be called")
    for module, name in (socket.socket, "connect"), (socket, "getaddrinfo"), (pickle, "load"), (pickle, "loads"):
        monkeypatch.setattr(module, name, never)
    for words in ([*RUN, "--method", "lora"], [*RUN, "--fit", "layerwise"]):
        train.main([*words, "--out", str(tmp_path / words[-1])])
    for words in (["--run", str(tmp_path / "lora")], ["--method", "rices", "--shots", "2"], ["--method", "task-vector"]):
        evaluation.main([*words, "--limit", "2", "--samples", "8", "--out", str(tmp_path / "eval")])
