"""See what the model is given: a training batch token by token, or a sheet of training samples.

    python -m tools.show toy
    python -m tools.show okvqa --data data --model idefics2-8b-base --shots 4 [--png okvqa.png]

The batch is the first one that train.py trains on with the same options, which may all stand here; --shots
and --batch-size are 2 if not given. One line a token, equal ones in a row on one line:
    attention   1 = token, 0 = padding or a masked separator
    image       the picture that an <image> token stands for: which of the row's, and its id
    aligned     1 = L_align compares the states of this column
    CE          1 = the LM loss reads this token (of the student alone)
    part        padding, separator, <s>, instruction, ICD 1 …, query, answer
"""

import textwrap
from itertools import groupby

import models
from data import DATASETS, ICD, QUERY, collate, load, train_dev
from support.files import reading, run_command
from support.options import Parser, number
from support.pictures import to_rgb
from toy import world
from train import parse, steps_of

HEAD = ("column", "id", "token", "attention", "image", "aligned", "CE", "part")
PARTS = ("padding", "separator", "<s>", "instruction", "ICD", "query", "answer")    # of data.PADDING … ANSWER


def describe(rows, b, samples, masks):
    """Row b, with the pictures of `samples` → a tuple a column, as HEAD. masks: bools of its last columns."""
    parts = rows.part[b].tolist()
    size = rows.processor.tokens_per_image
    is_image = rows.input_ids[b] == rows.processor.image_ids[1]      # (T,)
    begun = ((is_image.cumsum(0) + size - 1) // size).tolist()       # pictures up to each column
    lead = begun.index(len(samples)) - parts.index(QUERY)            # tokens of a query before its picture
    masks = [[False] * (len(parts) - len(mask)) + list(mask) for mask in masks]
    lines = []
    for t, token_id in enumerate(rows.input_ids[b].tolist()):
        token = str(rows.processor.tokenizer.id_to_token(token_id))
        token = token.replace("\n", "\\n").replace("<0x0A>", "\\n")
        name = f"ICD {begun[t + lead]}" if parts[t] == ICD else PARTS[parts[t]]
        image = ""
        if is_image[t]:
            image = f"{begun[t]} of {len(samples)}: {samples[begun[t] - 1].image_id}"
        marks = ["1" if mask[t] else "" for mask in masks]
        lines.append((t, token_id, token, int(rows.attention_mask[b, t]), image, *marks, name))
    return lines


def table(lines):
    """Lines as text; equal ones in a row become one, `token x 64`."""
    shown = [HEAD]
    for _, run in groupby(lines, key=lambda line: line[1:]):
        first, *more = run
        column, token_id, token, *rest = map(str, first)
        if more:
            column += f"-{more[-1][0]}"
            token += f" x {1 + len(more)}"
        shown.append((column, token_id, token, *rest))
    widths = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in shown)


def show_batch(args):
    """Prints what teacher and student read of every query of the first batch.  args: of train.py."""
    samples, _ = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed, args.task)
    processor = models.of(args.model)[1].from_pretrained(args.model)
    templates = processor.official_templates if args.official else processor.templates
    queries, icds = next(steps_of(samples, 0, args.seed, args.batch_size, 1, args.shots))[0]
    batch = collate(queries, icds, processor, templates[DATASETS[args.dataset].task])
    read = getattr(batch, vars(args).get("ce_on", "answer"))
    for b, query in enumerate(queries):
        title = f"row {b + 1} of {len(queries)}: sample {query.id}, answer {query.target!r}"
        teacher = describe(batch.teacher, b, [*icds[b], query], [batch.align[b], []])
        student = describe(batch.student, b, [query], [batch.align[b], read[b]])
        print(f"teacher, {title}\n{table(teacher)}\n")
        print(f"student, {title}\n{table(student)}\n")


def write_sheet(path, rows, args):
    """Writes the first training samples as a picture, four in a row; of a toy with its hidden rule."""
    with reading("--png", "matplotlib (pip install matplotlib)"):
        from matplotlib.figure import Figure
    samples = load(args.dataset, args.data, "train", args.task)
    toy = DATASETS[args.dataset].toy
    rule = world.describe(world.task(args.dataset, args.task)) if toy else []
    title = f"{args.dataset}, task {args.task}" if toy else f"{args.dataset}, training samples"
    figure = Figure(figsize=(8, 1 + 2.3 * rows), dpi=180, layout="constrained")
    figure.suptitle(textwrap.fill("  ·  ".join([title, *rule]), 90), fontsize=10)
    for axis, s in zip(figure.subplots(rows, 4, squeeze=False).flat, samples, strict=False):
        said = [*textwrap.wrap(s.question or "", 26), *textwrap.wrap(s.target, 26)]
        axis.imshow(to_rgb(s.picture()))
        axis.set(xticks=[], yticks=[], xlabel="\n".join(said))
    with reading(path, "a picture file that can be written"):
        figure.savefig(path)
    print("\n  ".join([f"{path}: {title}", *rule]))


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.show")
    parser.add_argument("dataset", choices=DATASETS, help="stands first")
    parser.add_argument("--png", metavar="FILE", help="write a sheet of training samples instead")
    parser.add_argument("--rows", type=number(int, 1), default=6, help="of four samples each (default 6)")
    mine, others = parser.parse_known_args(argv)
    args, _ = parse(["--dataset", mine.dataset, "--shots", "2", "--batch-size", "2", *others])
    if mine.png:
        return write_sheet(mine.png, mine.rows, args)
    show_batch(args)


if __name__ == "__main__":
    run_command(main)
