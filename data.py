"""From published files to batches: samples, demonstrations, prompts, image transform, tokens.

    samples = load("okvqa", "data", "train")                     # list[Sample]
    processor = Processor.from_pretrained("idefics2-8b-base")    # tokenizer and image transform
    batch = collate(queries, icds, processor, TEMPLATES["vqa"])  # teacher and student rows, what is aligned, what the CE sees

--data FOLDER holds the files as published, COCO's pictures serving all three sets:
    okvqa/   OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json
    vqav2/   v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json
    coco/    dataset_coco.json (Karpathy's splits), train2014/*.jpg, val2014/*.jpg
The toy datasets (toy.py) need no files.

    python data.py fetch okvqa --data data                       # downloads what a run needs: fetch.py
    python data.py show okvqa --data data --model FOLDER         # a training batch token by token, samples as PNG: show.py

Letters: B rows, T tokens, N images. ICD = one in-context demonstration, shots = how many of them, query = the example to answer.
"""

import functools
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

import toy
from model import Config, InputError, read_json


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: one template a task. A prompt is instruction + (query + " " + answer + end) for each ICD + query.
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Template:
    query: str                    # up to and including the cue of the answer
    instruction: str = ""         # stands once, before everything
    end: str = "\n"               # ends an answer, in demonstrations and in what is trained alike
    separator: str = ""           # the official code's masked token around the query and before the answer
    stop: tuple = ("\n",)         # an answer ends at the first of these words


VQA_STOP, CAPTION_STOP = ("\n", "Question", "Answer", "Image", "Short"), ("\n", "Caption", "Image", "<", "Short")
TEMPLATES = {
    "vqa": Template("Image:<image>\nQuestion: {question}\nAnswer:",
                    "Instruction: Provide an answer to the question. Use the image to answer.\n", stop=VQA_STOP),
    "caption": Template("Image:<image>\nCaption:", "Instruction: provide a short caption of the input image.\n",
                        stop=CAPTION_STOP),
    # The answer stands right behind the question: then the model learns to find "what stood behind this question before" (an
    # induction head) in a few hundred steps of pre-training; with one word between them it did not in thousands.
    "toy": Template("Image:<image> {question}"),
    "toy-caption": Template("Image:<image> Caption:"),
}
# What the official code feeds Idefics2: a misspelt token that reaches the model as text, no instruction before the student's
# query in training, <unk> (masked as a key, but counted as a position) before query and answer, and </s> behind the answer.
OFFICIAL_TEMPLATES = {
    "vqa": Template("Image:<image><end_of_outterance>\nQuestion: {question}<end_of_outterance>\nAnswer:",
                    "Instruction: Provide an answer to the question. Use the image to answer.<end_of_outterance>\n",
                    "<end_of_outterance>\n", "<unk>", VQA_STOP),
    "caption": Template("Image:<image><end_of_outterance>\nCaption:", "", "<end_of_outterance>\n", "<unk>", CAPTION_STOP),
    "toy": replace(TEMPLATES["toy"], separator="<unk>"),
    "toy-caption": replace(TEMPLATES["toy-caption"], separator="<unk>"),
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    image_id: int                 # one number for one picture in all splits: image features are kept under it
    image: object                 # path of the picture, or the PIL image itself
    question: str | None          # None for captions
    answers: list                 # what a prediction is scored against: the annotators' answers, or reference captions
    target: str = ""              # what is trained and shown in demonstrations: the most common answer, or the first caption
    id: int = 0                   # question id; for captions the image id
    question_type: str = ""
    answer_type: str = ""
    raw_answers: list = field(default_factory=list)              # OK-VQA: what the annotators wrote, `answers` being stemmed

    def picture(self):
        """The PIL image. Raises InputError if the file is missing or no image."""
        return open_image(self.image) if isinstance(self.image, (str, Path)) else self.image

    def picture_size(self):
        """(width, height) in pixels, read from the file's header."""
        return open_image(self.image, read=False).size if isinstance(self.image, (str, Path)) else self.image.size


@dataclass(frozen=True)
class Dataset:
    task: str                     # key of TEMPLATES
    metric: str                   # "vqa_accuracy" or "cider"
    max_new_tokens: int
    eval_split: str               # what eval.py scores unless told otherwise


DATASETS = {
    "okvqa": Dataset("vqa", "vqa_accuracy", 10, "val"),
    "vqav2": Dataset("vqa", "vqa_accuracy", 10, "val"),
    "coco": Dataset("caption", "cider", 20, "val"),
    "toy": Dataset("toy", "vqa_accuracy", 6, "test"),
    "toy-named": Dataset("toy", "vqa_accuracy", 6, "test"),
    "toy-caption": Dataset("toy-caption", "cider", 10, "test"),
}


def load(dataset, root, split, task=0):
    """All samples of a split in the order of the files → list[Sample]. Raises InputError for a file that is missing, truncated
    or of another form.

    Splits: "train" and "val"; coco (Karpathy's; its "train" is train + restval) also "test"; the toys "train", "dev", "test".
    root: the --data folder; task: number of the toy rule (both without meaning for the other kind of dataset)."""
    if dataset not in DATASETS:
        raise InputError(f"--dataset: expected one of {', '.join(DATASETS)}, found {dataset!r}")
    if dataset in toy.KINDS:
        return load_toy(dataset, split, task)
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder with okvqa/, vqav2/ or coco/, found no such folder")
    samples = load_captions(root, split) if dataset == "coco" else load_vqa(dataset, root, split)
    if not samples:
        raise InputError(f"{root}: expected samples of {dataset} {split}, found none")
    return samples


def records(path, key):
    """The list of objects under `key` of a JSON file."""
    content = read_json(path)
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise InputError(f"{path}: expected a list of objects under {key!r}, found {type(found).__name__}")
    return found


def fields(record, path, **kinds):
    """The named values of a record, each of its kind; else InputError."""
    if not isinstance(record, dict):
        raise InputError(f"{path}: expected an object with {', '.join(kinds)}, found {record!r:.80}")
    for name, kind in kinds.items():
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: expected {name!r} of type {kind.__name__}, found {value!r:.80} in {record!r:.80}")
        if kind is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise InputError(f"{path}: expected text under {name!r}, found half a character in {value!r:.80} ({e.reason})"
                                 ) from None
    return [record[name] for name in kinds]


def text_or(default, record, path, name):
    """The text under `name`, or the default if it is not there; InputError if it is something else."""
    return default if record.get(name) is None else fields(record, path, **{name: str})[0]


def once(numbers, path, name):
    """Raises InputError for a number that is there twice."""
    seen = set()
    for number in numbers:
        if number in seen:
            raise InputError(f"{path}: expected every {name} once, found {number} twice")
        seen.add(number)


def load_vqa(dataset, root, split):
    """OK-VQA v1.1 and VQA v2. OK-VQA's official `answer`s are stemmed: they are scored, while `raw_answer`s are trained.
    Of VQA v2's val split the 10,000 published questions of `vqav2_val_questions`."""
    prefix = {"okvqa": "", "vqav2": "v2_"}[dataset]
    questions = root / dataset / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json"
    annotations = root / dataset / f"{prefix}mscoco_{split}2014_annotations.json"
    listed = records(questions, "questions")
    if (dataset, split) == ("vqav2", "val"):
        kept = vqav2_val_questions()
        listed = [q for q in listed if fields(q, questions, question_id=int)[0] in kept]
        if not listed:
            raise InputError(f"{questions}: expected questions of the published list, vqav2_val_questions.json, found none")
    once((fields(q, questions, question_id=int)[0] for q in listed), questions, "question_id")
    asked, truth = {q["question_id"] for q in listed}, {}
    annotated = annotations.exists() or split == "train"
    if annotated:                                       # without annotations a split can be answered, but not scored
        for a in records(annotations, "annotations"):
            question_id, answers = fields(a, annotations, question_id=int, answers=list)
            if question_id not in asked:
                continue
            if question_id in truth:
                raise InputError(f"{annotations}: expected every question_id once, found {question_id} twice")
            scored = [fields(x, annotations, answer=str)[0] for x in answers]
            if not scored:
                raise InputError(f"{annotations}: expected answers of question {question_id}, found none")
            raw = [text_or(x["answer"], x, annotations, "raw_answer") for x in answers]
            target = text_or("", a, annotations, "multiple_choice_answer")
            target = target or Counter(raw).most_common(1)[0][0]                                   # ties: the first
            kinds = [text_or("", a, annotations, name) for name in ("question_type", "answer_type")]
            truth[question_id] = (scored, target, *kinds, raw if dataset == "okvqa" else [])
    samples = []
    for q in listed:
        question_id, image_id, question = fields(q, questions, question_id=int, image_id=int, question=str)
        if annotated and question_id not in truth:
            raise InputError(f"{annotations}: expected an annotation of question {question_id} of {questions.name}, found none")
        answers, target, question_type, answer_type, raw = truth.get(question_id, ([], "", "", "", []))
        image = root / f"coco/{split}2014/COCO_{split}2014_{image_id:012d}.jpg"
        samples.append(Sample(image_id, image, question, answers, target, question_id, question_type, answer_type, raw))
    return samples


def vqav2_val_questions():
    """The ids of the 10,000 questions of VQA v2's val2014 that the papers evaluate on, from the list beside this file."""
    return set(accumulate(read_json(Path(__file__).parent / "vqav2_val_questions.json")["distances"]))


@functools.lru_cache(maxsize=1)
def stemmer(root):
    """OK-VQA's stemming of answers (racing → race), read off the training annotations, which hold both forms → str → str.

    Whole answers first, then word by word. The official answers are stemmed, so what is scored against them has to be too."""
    path, whole, words = Path(root) / "okvqa" / "mscoco_train2014_annotations.json", {}, {}
    for annotation in records(path, "annotations"):
        for a in fields(annotation, path, answers=list)[0]:
            stem, = fields(a, path, answer=str)
            raw = text_or(stem, a, path, "raw_answer")
            whole[raw] = stem
            if len(raw.split()) == len(stem.split()):
                for r, s in zip(raw.split(), stem.split(), strict=True):
                    words.setdefault(r, Counter())[s] += 1
    return lambda text: whole.get(text) or " ".join(words[w].most_common(1)[0][0] if w in words else w for w in text.split())


def load_captions(root, split):
    """COCO captions with Karpathy's splits."""
    path = root / "coco" / "dataset_coco.json"
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    samples = []
    for image in records(path, "images"):
        if image.get("split") in wanted:
            image_id, folder, name, sentences = fields(image, path, cocoid=int, filepath=str, filename=str, sentences=list)
            captions = [fields(s, path, raw=str)[0].strip() for s in sentences]
            if not captions:
                raise InputError(f"{path}: expected captions of image {image_id}, found none")
            for part in folder, name:
                if part in ("", ".", "..") or set(part) & set("/\\\0"):
                    raise InputError(f"{path}: expected a plain name of a folder and of a file in it, found {folder!r}, {name!r}")
            samples.append(Sample(image_id, root / "coco" / folder / name, None, captions, captions[0], image_id))
    once((s.id for s in samples), path, "cocoid")
    return samples


def load_toy(dataset, split, task):
    """Samples of one hidden rule; ten annotators agree, so that VQA accuracy is right or wrong."""
    try:
        found = toy.samples(dataset, task, split)
    except ValueError as e:
        raise InputError(f"--dataset {dataset} --task {task}: {e}") from None
    return [Sample(r.image_id, r.image, r.question, [r.answer] * (10 if r.question else 1), r.answer, r.image_id) for r in found]


def train_dev(dataset, root, n_train, n_dev, seed, task=0):
    """Disjoint training and dev samples, drawn by the seed from the training split → (train, dev).

    A dev sample shares no picture with a training sample. Of a small split a sixth at most becomes dev; the toys have a dev
    split of their own."""
    samples = load(dataset, root, "train", task)
    samples = random.Random(seed).sample(samples, len(samples))
    if dataset in toy.KINDS:
        return samples[:n_train], load(dataset, root, "dev", task)[:n_dev]
    dev = samples[:min(n_dev, len(samples) // 6)]
    dev_images = {s.image_id for s in dev}
    train = [s for s in samples[len(dev):] if s.image_id not in dev_images][:n_train]
    if not train:
        raise InputError(f"{root}: expected training samples of {dataset} with other pictures than its dev samples, found none")
    return train, dev


def pick_icds(pool, query, shots, seed):
    """`shots` different samples of the pool, never the query; `seed` (a string) alone decides which, in which order."""
    if shots == 0:
        return []
    picked = random.Random(seed).sample(pool, min(shots + 1, len(pool)))
    picked = [s for s in picked if s.id != query.id][:shots]
    if len(picked) < shots:
        raise InputError(f"expected at least {shots} training samples beside the query for {shots} shots, found {len(picked)}")
    return picked


# ---------------------------------------------------------------------------------------------------------------------
# Images and tokens
# ---------------------------------------------------------------------------------------------------------------------
# What the content of a file may be, whatever it is called. Not EPS, which Pillow has Ghostscript run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None     # Pillow's own limit, half of it a warning: `open_image` has that one


def open_image(path, read=True):
    """The PIL image, its pixels read and the file closed; read=False: only its header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}: a decompression bomb")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:        # MPO: a camera's JPEG with its preview
                raise ValueError(f"an animation of {image.n_frames} frames")
            if read:
                image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"{path}: expected an image, found no file") from None
    except Exception as e:                                           # decoders raise anything when the bytes are wrong
        raise InputError(f"{path}: expected a complete image, found: {' '.join(str(e).split()) or type(e).__name__}") from None


def readable(samples, skip=False):
    """Looks at the pictures of the samples before the long work: at their headers, and raises InputError for the first bad one;
    or, with skip, at all of their bytes → the samples with a good one, and what is wrong with each of the others' pictures."""
    bad = {}
    for s in {s.image_id: s for s in samples}.values():
        try:
            s.picture() if skip else s.picture_size()
        except InputError as e:
            if not skip:
                raise
            bad[s.image_id] = str(e)
    return [s for s in samples if s.image_id not in bad], list(bad.values())


def to_rgb(image):
    """RGB as it is; anything else over white, transparent or not."""
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255)), image).convert("RGB")


def checked_preprocessor(path):
    """The object in preprocessor_config.json. Raises InputError for numbers that no picture can be made with."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected an object, found {raw!r:.80}")

    def numbers(values):
        return all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e4 for x in values)

    size = raw.get("size")
    for x in (*(size.values() if isinstance(size, dict) else [size]), raw.get("image_size")):
        if x is not None and (type(x) is not int or not 0 < x < 10_000):
            raise InputError(f"{path}: expected sizes in pixels, found {x!r:.80}")
    for name, positive in ("image_mean", False), ("image_std", True):
        x = raw.get(name)
        if x is not None and not (isinstance(x, list) and len(x) == 3 and numbers(x) and (not positive or min(x) > 0)):
            raise InputError(f"{path}: expected {name} of three numbers, found {x!r:.80}")
    scale, resample = raw.get("rescale_factor"), raw.get("resample")
    if scale is not None and not (numbers([scale]) and scale > 0):
        raise InputError(f"{path}: expected rescale_factor to be a positive number, found {scale!r:.80}")
    if resample is not None and (type(resample) is not int or resample not in range(6)):
        raise InputError(f"{path}: expected resample in 0 … 5, found {resample!r:.80}")
    return raw


class Processor:
    """Tokenizer and image transform of a model folder: text → ids, PIL images → pixels."""
    config_class = Config
    templates, official_templates = TEMPLATES, OFFICIAL_TEMPLATES
    counts_separators = True      # official: a masked separator takes a position

    def __init__(self, tokenizer, config, longest_edge=980, shortest_edge=378, mean=(0.5,) * 3, std=(0.5,) * 3,
                 rescale=1 / 255, resample=Image.Resampling.BILINEAR):
        self.tokenizer, self.config = tokenizer, config
        self.longest, self.shortest, self.resample = longest_edge, shortest_edge, resample
        self.tokens_per_image, self.vocab_size = config.tokens_per_image, config.text.vocab_size
        self.pad_id, self.bos_id = config.text.pad_token_id, self.token_id("<s>")
        self.image_ids = self.token_id("<fake_token_around_image>"), self.token_id("<image>")
        # A byte has 256 values: the published arithmetic (rescaled in fp64, kept in fp32, normalised in fp32), done once. (256,3)
        bytes_ = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)[:, None]
        self.pixel_of_byte = (bytes_ - np.array(mean, np.float32)) / np.array(std, np.float32)

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json, config.json and, if there, preprocessor_config.json. Raises InputError for a bad one."""
        folder = Path(folder)
        config, path = cls.config_class.from_file(folder / "config.json"), folder / "tokenizer.json"
        read_json(path)                                              # a missing or truncated file is said better here
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:                                       # the library raises nothing more specific
            raise InputError(f"{path}: expected a tokenizer, found: {e}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        found = tokenizer.token_to_id("<image>")
        if found != config.image_token_id:
            raise InputError(f"{path}: expected <image> to be token {config.image_token_id} as in config.json, found {found}")
        path, options = folder / "preprocessor_config.json", {}
        if path.exists():
            raw = checked_preprocessor(path)
            options = {**cls.options(raw), "mean": raw.get("image_mean"), "std": raw.get("image_std"),
                       "rescale": raw.get("rescale_factor"), "resample": raw.get("resample")}
        return cls(tokenizer, config, **{k: v for k, v in options.items() if v is not None})

    @staticmethod
    def options(raw):
        """What preprocessor_config.json says of sizes, in the words of __init__."""
        size = raw.get("size") or {}
        return {"longest_edge": size.get("longest_edge"), "shortest_edge": size.get("shortest_edge")}

    def token_id(self, token):
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"tokenizer.json: expected the token {token}, found none")
        return found

    @property
    def newline_id(self):
        """The token of a line's end, which ends an answer."""
        return self.encode("a\n")[-1]

    # -- images
    def resized(self, width, height):
        """Width and height in pixels after the resize: the longer side at most `longest`, each side at least `shortest`.

        The two bounds are independent, so that small pictures lose their aspect ratio, as in the published transform."""
        ratio = width / height
        if width >= height and width > self.longest:
            width, height = self.longest, int(self.longest / ratio)
        elif height > width and height > self.longest:
            width, height = int(self.longest * ratio), self.longest
        return max(width, self.shortest), max(height, self.shortest)

    def images(self, pictures):
        """PIL images → pixel_values (N,3,H,W) fp32, pixel_mask (N,H,W) bool; smaller pictures are padded with 0 below and right.

        Equal bit by bit to transformers' Idefics2ImageProcessor (PIL) without image splitting."""
        arrays = []
        for picture in map(to_rgb, pictures):
            size = self.resized(*picture.size)
            resized = picture if size == picture.size else picture.resize(size, self.resample)
            u8 = np.asarray(resized)                                                                # (H,W,3)
            arrays.append(np.stack([self.pixel_of_byte[:, c][u8[:, :, c]] for c in range(3)]))
        H, W = (max(a.shape[i] for a in arrays) for i in (1, 2))
        values, mask = torch.zeros(len(arrays), 3, H, W), torch.zeros(len(arrays), H, W, dtype=torch.bool)
        for i, a in enumerate(arrays):
            values[i, :, :a.shape[1], :a.shape[2]], mask[i, :a.shape[1], :a.shape[2]] = torch.from_numpy(a), True
        return values, mask

    # -- text
    def expand(self, text):
        """<image> → fake token + tokens_per_image × <image> + fake token (<fake_token_around_image>); neighbours share one."""
        fake = "<fake_token_around_image>"
        return text.replace("<image>", fake + "<image>" * self.tokens_per_image + fake).replace(fake + fake, fake)

    def encode(self, text):
        """Token ids of an expanded text, <s> in front."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text):
        """→ ids, and the place in `text` where each token starts (<s>: −1)."""
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as e:                                       # the library raises nothing more specific
            raise InputError(f"tokenizer.json: expected ids for {text!r:.80}, found: {e}") from None
        return [self.bos_id, *encoding.ids], [-1, *(start for start, _ in encoding.offsets)]

    def decode(self, ids):
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids if i < self.tokenizer.get_vocab_size()], skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Rows:
    """Left-padded prompts, ready for the model. Every row ends at the last column; there is no padding inside a row."""
    input_ids: torch.Tensor       # (B,T) int64
    attention_mask: torch.Tensor  # (B,T) bool, True = token
    samples: list                 # whose images the <image> tokens stand for, in reading order
    position_ids: torch.Tensor | None = None


@dataclass
class Batch:
    """One training step: the last T_q columns of teacher and student are the same tokens (query and answer)."""
    teacher: Rows                 # ICDs, query, answer
    student: Rows                 # query, answer
    align: torch.Tensor           # (B,T_q) bool, True = column of the last T_q whose states are compared
    answer: torch.Tensor          # (B,T) bool over the student's columns, True = token of the answer, its end included
    sequence: torch.Tensor        # (B,T) bool over the student's columns, True = any token that has one before it
    n_shared: int = 0             # so many first columns of the teacher are the same in all rows, and computed once


def plain(text):
    """Dataset text with nothing in it that the tokenizer would take for a special token."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def render(template, icds, query):
    """The three parts of a prompt's text → (prefix: instruction and ICDs, query, answer)."""
    def ask(s):
        return template.query.format(question=plain(s.question or ""))

    prefix = template.instruction + "".join(f"{ask(s)} {plain(s.target)}{template.end}" for s in icds)
    answer = f"{plain(query.target)}</s>" if template.separator else f" {plain(query.target)}{template.end}"
    return prefix, ask(query), answer


def left_pad(rows, value):
    """Lists of ids of different lengths → (B,T) int64, filled with `value` on the left."""
    T = max(map(len, rows))
    return torch.tensor([[value] * (T - len(row)) + row for row in rows])


def last_columns(lengths, T):
    """(B,T) bool, True in the last lengths[b] columns of row b."""
    return torch.arange(T) >= T - torch.tensor(lengths)[:, None]


def pack(ids, samples, processor, n_shared=0):
    """Lists of ids → Rows. Raises InputError if one has no row in the model's embedding (the published tokenizer has such).

    n_shared: so many first ids are the same in all rows and stay in the first columns; the padding stands behind them."""
    if (largest := max(map(max, ids))) >= processor.vocab_size:
        token = processor.tokenizer.id_to_token(largest)
        raise InputError(f"tokenizer.json: expected ids below the model's {processor.vocab_size}, found {token} = {largest}")
    padded = torch.cat([torch.tensor([row[:n_shared] for row in ids], dtype=torch.long),
                        left_pad([row[n_shared:] for row in ids], processor.pad_id)], 1)
    present = last_columns([len(row) - n_shared for row in ids], padded.shape[1])
    present[:, :n_shared] = True
    return Rows(padded, present, samples)


def prompts(queries, icds, processor, template):
    """Rows to generate from: each query behind its ICDs (a list of samples a query; empty for zero-shot)."""
    ids = [processor.encode(processor.expand("".join(render(template, d, q)[:2]))) for q, d in zip(queries, icds, strict=True)]
    return pack(ids, [s for q, d in zip(queries, icds, strict=True) for s in (*d, q)], processor)


def collate(queries, icds, processor, template, share=False):
    """Queries with their ICDs → Batch. With the official template the separators (<unk>) are masked as keys.

    share: all queries have the same ICDs, which stand in the same columns of every teacher row (any padding is behind them)."""
    teacher, student, query_lengths, answer_lengths = [], [], [], []
    for query, demonstrations in zip(queries, icds, strict=True):
        prefix, ask, answer = render(template, demonstrations, query)
        instruction = template.instruction
        if template.separator:
            prefix, ask, instruction = prefix + template.separator, ask + template.separator, ""
        teacher_ids, start, _ = split(processor, prefix, ask, answer)
        student_ids, query_start, answer_start = split(processor, instruction, ask, answer)
        if teacher_ids[start:] != student_ids[query_start:]:
            raise InputError(f"expected a tokenizer that splits {ask + answer!r} alike wherever it stands, "
                             f"found {teacher_ids[start:]} and {student_ids[query_start:]}")
        teacher.append(teacher_ids)
        student.append(student_ids)
        query_lengths.append(len(student_ids) - query_start)
        answer_lengths.append(len(student_ids) - answer_start)

    n_shared = start if share else 0
    if any(ids[:n_shared] != teacher[0][:n_shared] for ids in teacher):
        raise InputError("expected queries that share their demonstrations, found others")
    teacher = pack(teacher, [s for q, d in zip(queries, icds, strict=True) for s in (*d, q)], processor, n_shared)
    student = pack(student, list(queries), processor)
    if template.separator:
        for rows in teacher, student:
            rows.attention_mask = rows.input_ids != processor.pad_id
            if processor.counts_separators:
                rows.position_ids = torch.arange(rows.input_ids.shape[1]).expand(rows.input_ids.shape)
    T, T_q, kept = student.input_ids.shape[1], max(query_lengths), student.attention_mask
    return Batch(teacher, student, last_columns(query_lengths, T_q) & kept[:, -T_q:], last_columns(answer_lengths, T) & kept,
                 kept & (kept.cumsum(1) > 1), n_shared)


def split(processor, prefix, query, answer):
    """Ids of prefix + query + answer, tokenised as one text, and where query and answer start among them."""
    prefix, query, answer = map(processor.expand, (prefix, query, answer))
    ids, offsets = processor.encode_with_offsets(prefix + query + answer)
    at = [next(i for i, o in enumerate(offsets) if o >= place) for place in (len(prefix), len(prefix + query))]
    return ids, *at


def main(argv=None):
    """`fetch` and `show` are files of their own, read when they are called."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        return print(f"{__doc__}\n`data.py fetch --help` and `data.py show --help` say more.")
    if words[:1] == ["fetch"]:
        from fetch import main as command
    elif words[:1] == ["show"]:
        from show import main as command
    else:
        raise InputError(f"data.py: expected `fetch` or `show` and a dataset, found {' '.join(words) or 'nothing'}")
    command(words[1:])


if __name__ == "__main__":
    from eval import run_command
    run_command(main, goes_on=sys.argv[1:2] == ["fetch"])
