"""Download the published annotations, and of COCO's pictures only those that a run needs: of its training and
dev samples (the demonstrations are drawn from them) and of the evaluation split.

    python -m tools.fetch okvqa --data data                        # what `train.py --dataset okvqa` reads
    python -m tools.fetch vqav2 --data data --limit 500            # only 500 items of the evaluation split
    python -m tools.fetch coco --data data --samples 200 --seed 1  # for `train.py --samples 200 --seed 1`

What is there and whole is left alone. A file is received as NAME.part, which the next try or call continues
where a broken connection or a kill left it; whole, it gets its name, or is unpacked if it is an archive.
"""

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from data import DATASETS, load, open_image, train_dev
from support.files import InputError, make_folder, reading, run_command, written_whole
from support.options import Parser, number

OKVQA = "https://okvqa.allenai.org/static/data/"
VQAV2 = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
COCO = "http://images.cocodataset.org/"
ARCHIVES = {                      # of a dataset: address → the file in it that is kept, under --data
    "okvqa": {f"{OKVQA}{name}.zip": f"okvqa/{name}" for name in (
        "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json",
        "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")},
    "vqav2": {
        VQAV2 + "v2_Questions_Train_mscoco.zip": "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        VQAV2 + "v2_Questions_Val_mscoco.zip": "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        VQAV2 + "v2_Annotations_Train_mscoco.zip": "vqav2/v2_mscoco_train2014_annotations.json",
        VQAV2 + "v2_Annotations_Val_mscoco.zip": "vqav2/v2_mscoco_val2014_annotations.json"},
    "coco": {KARPATHY + "caption_datasets.zip": "coco/dataset_coco.json"},
}
CHAIR = {COCO + "annotations/annotations_trainval2014.zip": "coco/annotations/instances_val2014.json"}
PAUSES = (0, 1, 3, 10, 30)        # seconds before each try


def receive(url, part, title=None):
    """Receives what the file `part` lacks. Raises OSError or HTTPException if that fails.

    title: of a progress bar, or None."""
    size = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "tools.fetch", "Range": f"bytes={size}-"})
    try:
        reply = urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416:                                    # nothing stands behind these bytes
            return
        raise
    with reply:
        goes_on = reply.status == 206                        # a server may ignore the range
        found = reply.headers.get("Content-Range", "")
        if goes_on and not found.startswith(f"bytes {size}-"):
            raise ConnectionError(f"another part of the file: {found}")
        bar = tqdm.wrapattr(reply, "read", total=reply.length, desc=title, disable=not title)
        with open(part, "ab" if goes_on else "wb") as file, bar as source:
            shutil.copyfileobj(source, file)
        if reply.length:                                     # what is left of the announced length
            raise ConnectionError(f"{reply.length} bytes are missing")


def download(url, part, read, title=None):
    """The whole file as `part` → read(part), which raises InputError if the content is not whole.

    Raises InputError after a few tries."""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            receive(url, part, title)
            return read(part)
        except (OSError, http.client.HTTPException) as e:    # urllib's errors are OSErrors
            problem = str(e) or type(e).__name__
        except InputError as e:                              # the next try begins from nothing
            part.unlink(missing_ok=True)
            problem = str(e)
    raise InputError(f"{url}: expected the whole file, found after {len(PAUSES)} tries: {problem}")


def fetch_picture(url, path):
    """A picture, unless it is there and can be decoded."""
    with contextlib.suppress(InputError):
        return open_image(path)
    part = Path(f"{path}.part")
    download(url, part, open_image)
    os.replace(part, path)


def unzip(name, path):
    """The bytes of the file `name`, in whatever folder of the zip it is. Raises InputError."""
    with reading(path, f"a complete zip with {name}"), zipfile.ZipFile(path) as archive:
        names = {Path(member).name: member for member in archive.namelist()}
        return archive.read(names[name])                     # checksum included


def fetch_archive(url, path):
    """The file `path`, out of the archive, unless it is there."""
    part = path.parent / (url.rsplit("/", 1)[1] + ".part")
    if not path.exists():
        make_folder(path.parent)
        content = download(url, part, partial(unzip, path.name), title=path.name)
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
    part.unlink(missing_ok=True)


def needed_pictures(args):
    """Paths of the pictures that train.py and eval.py read with these options."""
    train, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed)
    evaluated = load(args.dataset, args.data, DATASETS[args.dataset].eval_split)[:args.limit]
    return sorted({s.image for s in (*train, *dev, *evaluated)})


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.fetch")
    add = parser.add_argument
    add("dataset", choices=ARCHIVES)
    add("--data", default="data", metavar="FOLDER", help="where the files go (default data)")
    add("--samples", type=number(int, 1), default=1000, help="training samples (default 1000, as train.py)")
    add("--dev-samples", type=number(int, 0), default=200, help="dev samples (default 200, as train.py)")
    add("--seed", type=int, default=0, help="which samples (default 0, as train.py)")
    add("--limit", type=number(int, 1), metavar="N", help="evaluation items, as train.py's (default: all)")
    add("--chair", action="store_true", help="the instances, too, that tools.score --chair needs (240 MB)")
    args = parser.parse(argv)
    archives = ARCHIVES[args.dataset]
    if args.chair:
        archives = archives | CHAIR

    for url, name in archives.items():
        fetch_archive(url, Path(args.data) / name)
    paths = needed_pictures(args)
    for folder in {path.parent for path in paths}:
        make_folder(folder)
    urls = [f"{COCO}{path.parent.name}/{path.name}" for path in paths]
    with ThreadPoolExecutor(8) as pool:                      # the first error cancels what has not begun
        for _ in tqdm(pool.map(fetch_picture, urls, paths), "pictures", len(paths)):
            pass
    print(f"{args.data}: {args.dataset} with {len(paths)} pictures is complete")


if __name__ == "__main__":
    run_command(main)
