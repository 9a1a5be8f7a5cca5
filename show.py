"""See what the model is given: a training batch token by token, and a sheet of samples.

    python data.py show toy
    python data.py show okvqa --data data --model idefics2-8b-base --shots 2
    python data.py show coco --data data --model idefics2-8b-base --png coco.png

The batch is the first one that train.py trains on with the same options. One line a token, equal ones in a row on one line:
    column      place in the left-padded row
    attention   1 = token, 0 = padding or a masked separator
    image       which picture of the row an <image> token stands for, and its id
    aligned     1 = L_align compares the states of this column
    CE          1 = the LM loss reads this token (of the student alone)
    part        instruction, ICD 1 …, query, answer: where each begins and ends
"""

import argparse
import random
from itertools import groupby
from pathlib import Path

import toy
from data import DATASETS, collate, pick_icds, render, to_rgb, train_dev
from eval import classes_of, default_model, template_of
from model import InputError

HEAD = ("column", "id", "token", "attention", "image", "aligned", "CE", "part")


def part_starts(processor, template, icds, query, teacher):
    """→ [(name of a part, number of its first token)] of a row, <s> counted, and the row's ids."""
    separator, (_, ask, answer) = template.separator, render(template, icds, query)
    texts = [("instruction", template.instruction if teacher or not separator else "")]
    if teacher:
        prefixes = [render(template, icds[:k], query)[0] for k in range(len(icds) + 1)]
        texts += [(f"ICD {k + 1}", prefixes[k + 1][len(prefixes[k]):]) for k in range(len(icds))]
        texts += [("separator", separator)]
    texts += [("query", ask), ("separator", separator), ("answer", answer)]
    text, places = "", []
    for name, part in texts:
        places += [(name, len(text))] if part else []
        text += processor.expand(part)
    ids, offsets = processor.encode_with_offsets(text)
    return [(name, next(i for i, o in enumerate(offsets) if o >= place)) for name, place in places], ids


def describe(batch, b, icds, query, processor, template, teacher, read):
    """The columns of row b of the batch → list of tuples, as HEAD. teacher: its row, else the student's; read: (B,T) bool, what
    the CE reads. Raises ValueError if the row's ids are not those of its rendered text."""
    rows = batch.teacher if teacher else batch.student
    ids, attention = rows.input_ids[b].tolist(), rows.attention_mask[b].tolist()
    T, T_q, lines = len(ids), batch.align.shape[1], []
    starts, row_ids = part_starts(processor, template, icds, query, teacher)
    padding = T - len(row_ids)
    if ids[padding:] != row_ids:
        raise ValueError(f"the row of sample {query.id} is not its rendered text")
    pictures, seen = ([*icds, query] if teacher else [query]), 0
    for column, token_id in enumerate(ids):
        image, place = "", column - padding
        if token_id == processor.image_ids[1]:
            n, seen = seen // processor.tokens_per_image, seen + 1
            image = f"{n + 1} of {len(pictures)}: {pictures[n].image_id}"
        part = "padding" if place < 0 else next((name for name, start in reversed(starts) if start <= place), "<s>")
        aligned = column >= T - T_q and batch.align[b, column - (T - T_q)].item()
        ce = not teacher and read[b, column].item()
        token = str(processor.tokenizer.id_to_token(token_id)).replace("\n", "\\n").replace("<0x0A>", "\\n")
        lines.append((column, token_id, token, int(attention[column]), image, "1" if aligned else "", "1" if ce else "", part))
    return lines


def table(lines):
    """Lines as text; equal ones in a row become one, `token x 64`."""
    shown = [HEAD]
    for _, run in groupby(lines, key=lambda line: line[1:]):
        run = list(run)
        column, token_id, token, *rest = run[0]
        many = len(run) > 1
        shown.append((f"{column}-{run[-1][0]}" if many else f"{column}", str(token_id),
                      f"{token} x {len(run)}" if many else token, *map(str, rest)))
    widths = [max(len(line[i]) for line in shown) for i in range(len(HEAD))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in shown)


def first_batch(samples, args):
    """→ queries, their ICDs: as train.py draws them in its first step."""
    queries = random.Random(f"{args.seed}-0").sample(samples, len(samples))[:args.batch_size]
    return queries, [pick_icds(samples, q, args.shots, f"{args.seed}-0-{q.id}") for q in queries]


def contact_sheet(args, samples):
    """→ PIL.Image of the first samples with their questions and answers."""
    if args.dataset in toy.KINDS:
        return toy.contact_sheet(args.dataset, args.task)
    items = [(to_rgb(s.picture()), s.question, s.target) for s in samples[:24]]
    return toy.sheet(f"{args.dataset}, training samples, seed {args.seed}", args.data, items, cell=240, below=84)


def main(words):
    parser = argparse.ArgumentParser(prog="data.py show", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data", default="data", metavar="FOLDER", help="as train.py's (default %(default)s)")
    parser.add_argument("--model", default=None, metavar="FOLDER",
                        help="whose tokenizer.json and config.json are read, no weights (default: as train.py's)")
    parser.add_argument("--task", type=int, default=0, metavar="N", help="number of the toy's hidden rule (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="as train.py's (default %(default)s)")
    parser.add_argument("--dev-samples", type=int, default=200, help="as train.py's (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="as train.py's (default %(default)s)")
    parser.add_argument("--shots", type=int, default=2, help="ICDs of the teacher (default %(default)s; train.py has 8)")
    parser.add_argument("--batch-size", type=int, default=2, help="queries (default %(default)s; train.py has 4)")
    parser.add_argument("--official", action="store_true", help="prompts and CE tokens as in the official code")
    parser.add_argument("--png", default=None, metavar="FILE", help="write a sheet of the first 24 training samples, too")
    args = parser.parse_args(words)
    for name, least in {"samples": 1, "dev_samples": 0, "shots": 0, "batch_size": 1}.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(args, name)}")
    samples, _ = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed, args.task)
    args.model = args.model or default_model(args.dataset)
    processor = classes_of(args.model)[1].from_pretrained(args.model)
    template = template_of(args, processor)
    queries, icds = first_batch(samples, args)
    batch = collate(queries, icds, processor, template)
    read = batch.sequence if args.official else batch.answer
    for b, query in enumerate(queries):
        for teacher in True, False:
            name = "teacher" if teacher else "student"
            print(f"{name}, row {b + 1} of {len(queries)}: sample {query.id}, answer {query.target!r}")
            print(table(describe(batch, b, icds[b], query, processor, template, teacher, read)) + "\n")
    if args.png:
        try:
            contact_sheet(args, samples).save(args.png)
        except (OSError, ValueError) as e:
            raise InputError(f"{args.png}: expected a picture file that can be written, found: {e}") from None
        print(f"{Path(args.png)} written")
