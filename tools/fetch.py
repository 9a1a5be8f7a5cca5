"""Download the published annotations, and of COCO's pictures only those that a run needs: of its training and
dev samples (the demonstrations are drawn from them) and of the evaluation split.

    python -m tools.fetch okvqa --data data                        # what `train.py --dataset okvqa` reads
    python -m tools.fetch vqav2 --data data --limit 500            # only 500 items of the evaluation split
    python -m tools.fetch coco --data data --samples 200 --seed 1  # for `train.py --samples 200 --seed 1`

What is there and whole is left alone. A file is received as NAME.part, goes on where a broken connection or a
kill left it, and gets its name when it has its length and is a complete JPEG. Archives are unpacked, deleted.
"""

import contextlib
import http.client
import os
import re
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data import DATASETS, load, open_image, train_dev
from support.files import InputError, make_folder, run_command, written_whole
from support.options import Parser, number

OKVQA = "https://okvqa.allenai.org/static/data/"
VQAV2 = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
COCO = "http://images.cocodataset.org/"
ARCHIVES = {                      # of a dataset: address → the members that are kept, under --data/DATASET
    "okvqa": {f"{OKVQA}{name}.zip": [name] for name in (
        "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json",
        "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")},
    "vqav2": {
        VQAV2 + "v2_Questions_Train_mscoco.zip": ["v2_OpenEnded_mscoco_train2014_questions.json"],
        VQAV2 + "v2_Questions_Val_mscoco.zip": ["v2_OpenEnded_mscoco_val2014_questions.json"],
        VQAV2 + "v2_Annotations_Train_mscoco.zip": ["v2_mscoco_train2014_annotations.json"],
        VQAV2 + "v2_Annotations_Val_mscoco.zip": ["v2_mscoco_val2014_annotations.json"]},
    "coco": {KARPATHY + "caption_datasets.zip": ["dataset_coco.json"]},
}
CHAIR = {COCO + "annotations/annotations_trainval2014.zip": [
    "annotations/instances_val2014.json", "annotations/captions_val2014.json"]}
PICTURE = r"(train|val)2014/COCO_(train|val)2014_\d{12}\.jpg"
PAUSES = (1, 3, 10)               # seconds before another try; if the last brings nothing, it is an error
CHUNK = 1 << 16                   # bytes


class Broken(Exception):
    """What was received is not the whole file; another try may help."""


class Spoilt(Broken):
    """What was received is something else: another try has to begin from nothing."""


# --- One file -----------------------------------------------------------------------------------------------
def receive(url, part, count, stop):
    """Receives what the file `part` lacks. Raises Broken, or what the connection raises, if that fails.

    count(n) is called for every n bytes; stop: an Event that ends it."""
    size = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tools.fetch"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range", "") == f"bytes */{size}":
            return                                                     # all of it was there
        if e.code == 416:
            raise Spoilt("a part that is longer than the file") from None
        if e.code < 500 and e.code not in (408, 429):
            raise InputError(f"{url}: expected the file, found HTTP status {e.code}") from None
        raise Broken(f"HTTP status {e.code}") from None
    with reply:
        goes_on = reply.status == 206                                  # a server may ignore the range
        found = reply.headers.get("Content-Range", "")
        if goes_on and not found.startswith(f"bytes {size}-"):
            raise Broken(f"another part of the file: {found}")
        size = size if goes_on else 0
        length = reply.headers.get("Content-Length") or ""
        whole = size + int(length) if length.isdigit() else None       # unknown: the content will tell
        with open(part, "ab" if goes_on else "wb") as file:
            while chunk := reply.read(CHUNK):
                if stop.is_set():
                    raise Broken("an end to the work")
                file.write(chunk)
                size += len(chunk)
                count(len(chunk))
    if whole not in (None, size):
        raise Broken(f"{size} of {whole} bytes")


def download(url, path, check, count, stop):
    """The file at `path`, whole. check(path) raises Spoilt if the content is not.

    Raises InputError after a few tries in a row that brought nothing."""
    if path.exists():
        with contextlib.suppress(Spoilt):
            return check(path)
        path.unlink()
    part = Path(f"{path}.part")
    furthest = 0
    tries = 0
    while True:
        try:
            receive(url, part, count, stop)
            check(part)
            return os.replace(part, path)
        except (Broken, OSError, http.client.HTTPException) as e:      # urllib's errors are OSErrors
            problem = e
        if isinstance(problem, Spoilt):
            part.unlink()
        size = part.stat().st_size if part.exists() else 0
        tries = 0 if size > furthest else tries + 1
        furthest = max(size, furthest)
        if tries > len(PAUSES) or stop.wait(PAUSES[max(0, tries - 1)]):
            found = str(problem) or type(problem).__name__
            raise InputError(f"{url}: expected the whole file, found after {tries} tries: {found}")


def check_picture(path):
    """Decodes all of a JPEG. Raises Spoilt."""
    try:
        found = open_image(path).format
    except InputError as e:
        raise Spoilt(f"no complete JPEG ({e})") from None
    if found not in ("JPEG", "MPO"):               # a camera's JPEG with a preview behind the picture
        raise Spoilt(f"no JPEG but {found}")


def unpack(members, folder, path):
    """Members of a zip, in whatever folder of it, into ours, each whole or not at all. Raises Spoilt."""
    for member in members:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if f"/{name}".endswith(f"/{member}")]
                content = archive.read(names[0] if names else member)                  # checksum included
        except (zipfile.BadZipFile, OSError, EOFError, KeyError, NotImplementedError, zlib.error) as e:
            raise Spoilt(f"no complete zip ({e})") from None
        make_folder((folder / member).parent)
        with written_whole(folder / member) as temporary:
            temporary.write_bytes(content)


# --- All files ----------------------------------------------------------------------------------------------
def fetch_archive(url, address, members, folder, count, stop):
    """The members of an archive, unpacked, unless they are there."""
    path = folder / url.rsplit("/", 1)[1]
    if not all((folder / member).exists() for member in members):
        download(address, path, partial(unpack, members, folder), count, stop)
    path.unlink(missing_ok=True)


def in_parallel(jobs, threads, title):
    """Calls job(count, stop) for every job, `threads` at a time. The first error ends all."""
    stop = threading.Event()
    bar = tqdm(desc=title, unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(job, bar.update, stop) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                bar.set_description(f"{title} {done}/{len(jobs)}", refresh=False)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def needed_pictures(args):
    """→ {address: path} of the pictures that train.py and eval.py read with these options."""
    train, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed)
    evaluated = load(args.dataset, args.data, DATASETS[args.dataset].eval_split)[:args.limit]
    found = {}
    for path in (s.image for s in (*train, *dev, *evaluated)):
        name = f"{path.parent.name}/{path.name}"
        if not re.fullmatch(PICTURE, name):
            raise InputError(f"{args.data}: expected pictures named as COCO 2014's, found {name}")
        found[COCO + name] = path
    return found


def parse(argv):
    parser = Parser(__doc__, prog="python -m tools.fetch")
    add = parser.add_argument
    add("dataset", choices=ARCHIVES)
    add("--data", default="data", metavar="FOLDER", help="where the files go (default data)")
    add("--samples", type=number(int, 1), default=1000, help="training samples (default 1000, as train.py)")
    add("--dev-samples", type=number(int, 0), default=200, help="dev samples (default 200, as train.py)")
    add("--seed", type=int, default=0, help="which samples (default 0, as train.py)")
    add("--limit", type=number(int, 1), metavar="N", help="evaluation items, as train.py's (default: all)")
    add("--chair", action="store_true", help="coco: instances and captions of CHAIR, too (one large zip)")
    add("--threads", type=number(int, 1), default=8, help="files at a time (default 8)")
    add("--mirror", metavar="URL", help="get URL/HOST/PATH in the place of http(s)://HOST/PATH")
    add("--resume", action="store_true", help="(it goes on without being told to, too)")
    args = parser.parse(argv)
    if args.mirror is not None and not re.match("https?://.", args.mirror):
        raise InputError(f"--mirror: expected an address with http:// or https://, found {args.mirror!r}")
    return args


def main(argv=None):
    args = parse(argv)
    folder = Path(args.data) / args.dataset
    archives = ARCHIVES[args.dataset]
    if args.chair and args.dataset == "coco":
        archives = archives | CHAIR

    def address(url):
        return url if args.mirror is None else f"{args.mirror.rstrip('/')}/{url.split('://')[1]}"

    make_folder(folder)
    jobs = [partial(fetch_archive, url, address(url), members, folder) for url, members in archives.items()]
    in_parallel(jobs, args.threads, "annotations")
    pictures = needed_pictures(args)
    for parent in {path.parent for path in pictures.values()}:
        make_folder(parent)
    jobs = [partial(download, address(url), path, check_picture) for url, path in pictures.items()]
    in_parallel(jobs, args.threads, "pictures")
    print(f"{args.data}: {args.dataset} with {len(pictures)} pictures is complete")


if __name__ == "__main__":
    run_command(main)
