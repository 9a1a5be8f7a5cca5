"""From published files to batches: datasets → samples → demonstrations → prompts → tokens.

    samples = load("okvqa", "data", "train")                     # list[Sample]
    processor = Processor.from_pretrained("idefics2-8b-base")    # tokenizer and image transform
    features = encode_images(model, processor, samples, {})      # image id → (n_latents,d); each picture once
    batch = collate(queries, icds, processor, TEMPLATES["vqa"])  # every token knows what it is

--data FOLDER holds the files as published (`python -m tools.fetch` gets them):
    okvqa/   OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json
    vqav2/   v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json
    coco/    dataset_coco.json (Karpathy's splits), train2014/*.jpg, val2014/*.jpg

B rows, T tokens, N images. ICD = an in-context demonstration, shots = how many, query = the question.
"""

import random
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import torch

from model import Config
from support.files import InputError, chunks, read_json, read_tokenizer, reading, string  # noqa: F401
from support.pictures import ImageTransform, encode_images, open_image  # noqa: F401 (belongs to a batch)


# ---- Prompts: one template a task. A prompt is instruction, query + " " + answer + end of each ICD, query.
@dataclass(frozen=True)
class Template:
    query: str                    # up to and including the cue of the answer
    instruction: str = ""         # stands once, before everything
    end: str = "\n"               # ends an answer, in demonstrations and in what is trained alike
    separator: str = ""           # the official code's masked token around the query and before the answer
    stop: tuple = ("\n",)         # an answer ends at the first of these words


VQA = "Instruction: Provide an answer to the question. Use the image to answer."
VQA_STOP = ("\n", "Question", "Answer", "Image", "Short")
CAPTION = "Instruction: provide a short caption of the input image."
CAPTION_STOP = ("\n", "Caption", "Image", "<", "Short")
TEMPLATES = {
    "vqa": Template("Image:<image>\nQuestion: {question}\nAnswer:", VQA + "\n", stop=VQA_STOP),
    "caption": Template("Image:<image>\nCaption:", CAPTION + "\n", stop=CAPTION_STOP),
    # The answer stands right behind the question: so pre-training learns to find "what stood behind this
    # question before" (an induction head) in hundreds of steps; with a word between, not in thousands.
    "toy": Template("Image:<image> {question}"),
    "toy-caption": Template("Image:<image> Caption:"),
}
# What the official code feeds Idefics2: a misspelt token that reaches the model as text, no instruction
# before the student's query in training, <unk> (masked as a key, but counted as a position) before query and
# answer, </s> behind it.
END = "<end_of_outterance>\n"
OFFICIAL_TEMPLATES = {
    "vqa": Template(f"Image:<image>{END}Question: {{question}}{END}Answer:", VQA + END, END, "<unk>",
                    VQA_STOP),
    "caption": Template(f"Image:<image>{END}Caption:", "", END, "<unk>", CAPTION_STOP),
    "toy": replace(TEMPLATES["toy"], separator="<unk>"),
    "toy-caption": replace(TEMPLATES["toy-caption"], separator="<unk>"),
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")


# ---- Datasets
@dataclass
class Sample:
    image_id: int | str           # names one picture in all splits: image features are kept under it
    image: object                 # path of the picture, or the PIL image itself
    question: str | None          # None for captions
    answers: list                 # what an answer is scored against: the annotators', or reference captions
    target: str = ""              # what is trained and shown: the most common answer, the first caption
    id: int | str = 0             # question id; for captions the image id
    question_type: str = ""
    answer_type: str = ""
    raw_answers: list = field(default_factory=list)       # OK-VQA: as the annotators wrote them, unstemmed

    def picture(self):
        """The PIL image. Raises InputError if the file is missing or no image."""
        return open_image(self.image) if isinstance(self.image, (str, Path)) else self.image

    def picture_size(self):
        """(width, height) in pixels, read from the file's header."""
        if isinstance(self.image, (str, Path)):
            return open_image(self.image, read=False).size
        return self.image.size


def load_vqa(name, prefix, root, split, task=0, only=None):
    """Questions and answers in the VQA format, splits train and val. only: ids of the questions that count.
    OK-VQA's official `answer`s are stemmed: they are scored, while `raw_answer`s are trained."""
    questions = Path(root) / name / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json"
    annotations = Path(root) / name / f"{prefix}mscoco_{split}2014_annotations.json"
    samples = {}
    with reading(questions, "VQA questions"):
        asked = [q for q in read_json(questions)["questions"] if only is None or q["question_id"] in only]
        for q in asked:
            image = Path(root) / f"coco/{split}2014/COCO_{split}2014_{q['image_id']:012d}.jpg"
            number = q["question_id"]
            samples[number] = Sample(q["image_id"], image, string(q["question"]), [], id=number)
    if split != "train" and not annotations.exists():     # such a split can be answered, but not scored
        return list(samples.values())
    with reading(annotations, "VQA annotations"):
        known = [a for a in read_json(annotations)["annotations"] if a["question_id"] in samples]
        for a in known:
            s = samples[a["question_id"]]
            s.answers = [string(x["answer"]) for x in a["answers"]]
            s.raw_answers = [string(x.get("raw_answer") or x["answer"]) for x in a["answers"]]
            most_common = Counter(s.raw_answers).most_common(1)[0][0]                    # of equals the first
            s.target = string(a.get("multiple_choice_answer") or most_common)
            s.question_type = string(a.get("question_type") or "")
            s.answer_type = string(a.get("answer_type") or "")
        if bare := [s.id for s in samples.values() if not s.answers]:
            raise ValueError(f"none of question {bare[0]}")
    return list(samples.values())


def load_vqav2(root, split, task):
    """VQA v2; of val the 10,000 questions that the papers evaluate on."""
    listed = read_json(Path(__file__).parent / "metrics/vqav2_val_questions.json")["distances"]
    return load_vqa("vqav2", "v2_", root, split, task, set(accumulate(listed)) if split == "val" else None)


@lru_cache(maxsize=1)
def stemmer(root):
    """OK-VQA's stemming (racing → race), learnt from the training annotations, which have both."""
    from metrics.stem import learn_stems
    path = Path(root) / "okvqa/mscoco_train2014_annotations.json"
    with reading(path, "VQA annotations"):
        answers = [x for a in read_json(path)["annotations"] for x in a["answers"]]
        return learn_stems((string(x.get("raw_answer") or x["answer"]), string(x["answer"])) for x in answers)


def load_captions(root, split, task):
    """COCO captions with Karpathy's splits train (with restval), val and test."""
    path = Path(root) / "coco/dataset_coco.json"
    wanted = ("train", "restval") if split == "train" else (split,)
    samples = []
    with reading(path, "Karpathy's split of COCO"):
        for image in read_json(path)["images"]:
            if image["split"] in wanted:
                for name in image["filepath"], image["filename"]:
                    if name in ("", ".", "..") or set(name) & set("/\\\0"):
                        raise ValueError(f"{name!r} in the place of a plain name of a folder or file")
                captions = [string(s["raw"]).strip() for s in image["sentences"]]
                file = Path(root) / "coco" / image["filepath"] / image["filename"]
                samples.append(Sample(image["cocoid"], file, None, captions, captions[0], image["cocoid"]))
    return samples


def load_toy(name, root, split, task):
    """Samples of one hidden rule; ten annotators agree, so that VQA accuracy is right or wrong."""
    from toy import world
    try:
        found = world.samples(name, task, split)
    except ValueError as e:
        raise InputError(f"--dataset {name} --task {task}: {e}") from None
    return [Sample(r.image_id, r.image, r.question, [r.answer] * (10 if r.question else 1), r.answer,
                   r.image_id) for r in found]


@dataclass(frozen=True)
class Dataset:
    """All that the scripts know of a dataset. Your own: an entry in DATASETS and a function `read`."""
    task: str                     # key of TEMPLATES
    metric: str                   # "vqa_accuracy" or "cider"
    max_new_tokens: int
    eval_split: str               # what eval.py scores unless told otherwise
    read: Callable                # (root, split, task) → list[Sample], of "train" and what is evaluated
    model: str = "idefics2-8b-base"                       # default of --model
    keys: tuple = ("question_id", "answer")               # of a record in the official result file, if any
    stemmer: Callable | None = None                       # root → (answer → the form in which it is scored)
    toy: bool = False             # a toy world: a split "dev", numbered tasks, its own learning rates


TOY = {"eval_split": "test", "model": "checkpoints/tiny", "keys": (), "toy": True}
DATASETS = {
    "okvqa": Dataset("vqa", "vqa_accuracy", 10, "val", partial(load_vqa, "okvqa", ""), stemmer=stemmer),
    "vqav2": Dataset("vqa", "vqa_accuracy", 10, "val", load_vqav2),
    "coco": Dataset("caption", "cider", 20, "val", load_captions, keys=("image_id", "caption")),
    "toy": Dataset("toy", "vqa_accuracy", 6, read=partial(load_toy, "toy"), **TOY),
    "toy-named": Dataset("toy", "vqa_accuracy", 6, read=partial(load_toy, "toy-named"), **TOY),
    "toy-caption": Dataset("toy-caption", "cider", 10, read=partial(load_toy, "toy-caption"), **TOY),
}


def load(dataset, root, split, task=0):
    """All samples of a split in the order of the files → list[Sample]. Raises InputError for a bad file.

    root: the --data folder; task: number of a toy's rule."""
    samples = DATASETS[dataset].read(root, split, task)
    if not samples:
        raise InputError(f"{root}: expected samples of {dataset} {split}, found none")
    if len({s.id for s in samples}) < len(samples):
        raise InputError(f"{root}: expected every Sample.id of {dataset} {split} once, found one twice")
    if split == "train" and not all(s.target for s in samples):
        raise InputError(f"{root}: expected Sample.target, what is trained, in all of {dataset}, found none")
    return samples


def train_dev(dataset, root, n_train, n_dev, seed, task=0):
    """Disjoint training and dev samples, drawn by the seed from the training split → (train, dev).

    A dev sample shares no picture with a training sample. Of a small split a sixth at most becomes dev; the
    toys have a dev split of their own."""
    samples = load(dataset, root, "train", task)
    samples = random.Random(seed).sample(samples, len(samples))
    if DATASETS[dataset].toy:
        return samples[:n_train], load(dataset, root, "dev", task)[:n_dev]
    dev = samples[:min(n_dev, len(samples) // 6)]
    dev_images = {s.image_id for s in dev}
    train = [s for s in samples[len(dev):] if s.image_id not in dev_images][:n_train]
    if not train:
        raise InputError(f"{root}: expected training samples of {dataset} beside its dev samples, found none")
    return train, dev


def pick_icds(pool, query, shots, seed):
    """`shots` samples of the pool, never the query; `seed` (a string) alone decides which, and the order."""
    if shots == 0:
        return []
    picked = random.Random(seed).sample(pool, min(shots + 1, len(pool)))
    picked = [s for s in picked if s.id != query.id][:shots]
    if len(picked) < shots:
        raise InputError(f"expected at least {shots} training samples beside the query for {shots} shots, "
                         f"found {len(picked)}; more --samples, or fewer --shots or --compare")
    return picked


def draw(pool, queries, shots, seed):
    """The demonstrations of each query: lists of `pick_icds`."""
    return [pick_icds(pool, q, shots, f"{seed}-{q.id}") for q in queries]


# ---- Pictures and tokens
class Processor(ImageTransform):
    """Tokenizer and image transform of a model folder: text → ids, PIL images → pixels."""
    config_class = Config
    templates, official_templates = TEMPLATES, OFFICIAL_TEMPLATES
    counts_separators = True      # --official: a masked separator takes a position

    def __init__(self, tokenizer, config, **transform):
        super().__init__(**transform)
        self.tokenizer, self.config = tokenizer, config
        self.tokens_per_image = config.tokens_per_image
        self.vocab_size = config.text.vocab_size
        self.pad_id = config.text.pad_token_id
        self.bos_id = self.token_id("<s>")
        self.image_ids = self.token_id("<fake_token_around_image>"), self.token_id("<image>")

    @classmethod
    def from_pretrained(cls, folder):
        """Reads tokenizer.json, config.json and, if there, preprocessor_config.json. Raises InputError."""
        folder = Path(folder)
        config = cls.config_class.from_file(folder / "config.json")
        path = folder / "tokenizer.json"
        tokenizer = read_tokenizer(path)
        found = tokenizer.token_to_id("<image>")
        if found != config.image_token_id:
            raise InputError(f"{path}: expected <image> to be {config.image_token_id}, found {found}")
        path = folder / "preprocessor_config.json"
        if not path.exists():
            return cls(tokenizer, config)
        with reading(path, "sizes in pixels, a mean and a deviation of three numbers"):
            return cls(tokenizer, config, **cls.settings(read_json(path)))

    def token_id(self, token):
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"tokenizer.json: expected the token {token}, found none")
        return found

    @property
    def newline_id(self):
        """The token that ends an answer."""
        return self.encode("a\n")[-1]

    def expand(self, text):
        """<image> → fake token + tokens_per_image × <image> + fake token; neighbours share a fake token."""
        fake = "<fake_token_around_image>"
        image = fake + "<image>" * self.tokens_per_image + fake
        return text.replace("<image>", image).replace(fake + fake, fake)

    def encode(self, text):
        """Token ids of an expanded text, <s> first."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text):
        """→ ids, and the place in `text` where each token starts (<s>: −1)."""
        with reading("tokenizer.json", f"ids for {text!r:.80}"):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.bos_id, *encoding.ids], [-1, *(start for start, _ in encoding.offsets)]

    def decode(self, ids):
        """The text of token ids, without special tokens."""
        n = self.tokenizer.get_vocab_size()
        return self.tokenizer.decode([i for i in ids if i < n], skip_special_tokens=True)


# ---- Batches: every token of a row says which part of the prompt it is
PADDING, SEPARATOR, START, INSTRUCTION, ICD, QUERY, ANSWER = range(7)      # SEPARATOR: of --official, masked


@dataclass
class Rows:
    """Left-padded prompts, ready for the model: every row ends at the last column."""
    input_ids: torch.Tensor       # (B,T) int64
    part: torch.Tensor            # (B,T) int64: PADDING … ANSWER
    samples: list                 # whose pictures the <image> tokens stand for, in reading order
    processor: object = None      # what made them
    position_ids: torch.Tensor | None = None

    @property
    def attention_mask(self):
        """(B,T) bool, True = token."""
        return self.part > SEPARATOR

    def inputs(self, model, features):
        """What `model.hidden_states` reads, on its device. features: of `encode_images`."""
        device = model.device
        found = {"input_ids": self.input_ids.to(device), "attention_mask": self.attention_mask.to(device),
                 "image_features": torch.stack([features[s.image_id].to(device) for s in self.samples])}
        if self.position_ids is not None:
            found["position_ids"] = self.position_ids.to(device)
        return found


@dataclass
class Batch:
    """A training step. The last T_q columns of teacher and student are the same tokens: query and answer."""
    teacher: Rows                 # instruction, ICDs, query, answer
    student: Rows                 # instruction, query, answer
    shared: bool = False          # the teacher is one row of instruction and ICDs, before all the queries

    @property
    def T_q(self):
        """Columns from the first token of the longest query on."""
        return self.student.part.shape[1] - int((self.student.part >= QUERY).any(0).int().argmax())

    @property
    def align(self):
        """(B,T_q) bool: whose states are compared."""
        return self.student.part[:, -self.T_q:] >= QUERY

    @property
    def answer(self):
        """(B,T) bool over the student's columns: the answer and its end, which the LM loss reads."""
        return self.student.part == ANSWER

    @property
    def sequence(self):
        """(B,T) bool over the student's columns: every token that has one before it."""
        return self.student.part > START


def plain(text):
    """Dataset text with nothing in it that the tokenizer would take for a special token."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def row(processor, template, icds, query, with_answer=True):
    """One prompt → its token ids, and the part of the prompt that each of them belongs to."""
    def ask(s):
        return template.query.format(question=plain(s.question or ""))

    pieces = [(INSTRUCTION, template.instruction)]
    pieces += [(ICD, f"{ask(s)} {plain(s.target)}{template.end}") for s in icds]
    asked = QUERY, ask(query)
    if not with_answer:
        pieces += [asked]
    elif template.separator:                              # --official: the student's row has no instruction
        separator = (SEPARATOR, template.separator)
        pieces = [*pieces, separator] if icds else []
        pieces += [asked, separator, (ANSWER, f"{plain(query.target)}</s>")]
    else:
        pieces += [asked, (ANSWER, f" {plain(query.target)}{template.end}")]

    whole, starts = "", []
    for _, piece in pieces:
        starts.append(len(whole))
        whole += processor.expand(piece)
    ids, offsets = processor.encode_with_offsets(whole)
    parts = [START]
    for at in offsets[1:]:                                # a token belongs to the piece in which it starts
        part, _ = pieces[bisect_right(starts, at) - 1]
        parts.append(part)
    return ids, parts


def left_pad(rows, value):
    """Lists of different lengths → (B,T) int64, filled with `value` on the left."""
    T = max(map(len, rows))
    return torch.tensor([[value] * (T - len(x)) + list(x) for x in rows])


def pack(rows, samples, processor):
    """What `row` gives, of several prompts → Rows. Raises InputError for an id the model does not have."""
    ids, parts = zip(*rows, strict=True)
    largest = max(map(max, ids))
    if largest >= processor.vocab_size:
        token = processor.tokenizer.id_to_token(largest)
        raise InputError(f"tokenizer.json: expected ids below the model's {processor.vocab_size}, "
                         f"found {token} = {largest}")             # the published tokenizer has such
    return Rows(left_pad(ids, processor.pad_id), left_pad(parts, PADDING), samples, processor)


def prompts(queries, icds, processor, template):
    """Rows to generate from: each query behind its ICDs (a list of samples a query; empty for zero-shot)."""
    pairs = list(zip(queries, icds, strict=True))
    rows = [row(processor, template, d, q, with_answer=False) for q, d in pairs]
    return pack(rows, [s for q, d in pairs for s in (*d, q)], processor)


def collate(queries, icds, processor, template, share=False):
    """Queries with their ICDs → Batch. share: all queries stand behind the ICDs of the first.

    With the official template the separators (<unk>) are masked as keys, and counted as positions."""
    pairs = list(zip(queries, icds, strict=True))
    teacher = [row(processor, template, d, q) for q, d in pairs]
    student = [row(processor, template, [], q) for q in queries]
    for (long, _), (short, parts) in zip(teacher, student, strict=True):
        asked = short[parts.index(QUERY):]
        if long[-len(asked):] != asked:
            raise InputError("tokenizer.json: expected the same tokens of a query wherever it stands, found "
                             f"{long[-len(asked):]} and {asked}")
    shown = [s for q, d in pairs for s in (*d, q)]
    if share:
        ids, parts = teacher[0]
        teacher = [(ids[:parts.index(QUERY)], parts[:parts.index(QUERY)])]
        shown = icds[0]
    batch = Batch(pack(teacher, shown, processor), pack(student, list(queries), processor), share)
    if template.separator and processor.counts_separators:
        for rows in batch.teacher, batch.student:
            rows.position_ids = torch.arange(rows.part.shape[1]).expand(rows.part.shape)
    return batch


if __name__ == "__main__":
    print("error: data.py is no command; now python -m tools.fetch or tools.show DATASET", file=sys.stderr)
    sys.exit(2)
