"""Download the published annotations, and of COCO's pictures only those a run needs: its training and dev samples (the
demonstrations are drawn from them) and the evaluation split.

    python data.py fetch okvqa --data data                        # what `train.py --dataset okvqa` reads
    python data.py fetch vqav2 --data data --limit 500            # of the evaluation split the first 500 items
    python data.py fetch coco --data data --samples 200 --seed 1  # what `train.py --samples 200 --seed 1` reads
    python data.py fetch coco --data data --list                  # the addresses instead, with the files they become

What is there and whole is left alone. A file is received as NAME.part, goes on where a broken connection or a kill left it,
and gets its name when it has its length and is a complete zip or JPEG. Archives are unpacked and deleted.
"""

import argparse
import http.client
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from data import DATASETS, load, open_image, train_dev
from model import InputError

OKVQA = "https://okvqa.allenai.org/static/data/"
VQAV2 = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
COCO = "http://images.cocodataset.org/"
ARCHIVES = {  # address: the members that are kept, all under --data/DATASET
    "okvqa": {f"{OKVQA}{name}.zip": [name] for split in ("train", "val") for name in (
        f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json")},
    "vqav2": {f"{VQAV2}v2_{kind}_{split.title()}_mscoco.zip": [name] for split in ("train", "val") for kind, name in (
        ("Questions", f"v2_OpenEnded_mscoco_{split}2014_questions.json"),
        ("Annotations", f"v2_mscoco_{split}2014_annotations.json"))},
    "coco": {"https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip": ["dataset_coco.json"]},
}
CHAIR = {f"{COCO}annotations/annotations_trainval2014.zip": [
    f"annotations/{kind}_val2014.json" for kind in ("instances", "captions")]}
PAUSES = (1, 3, 10)               # seconds before another try; as many tries in a row may bring nothing, and one more
CHUNK = 1 << 16                   # bytes


class Broken(Exception):
    """What was received is not the whole file; another try may help."""


# ---------------------------------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------------------------------
def receive(url, part, count, stop):
    """Receives what is lacking in the file `part`. Raises Broken, or what the connection raises, if it stays incomplete;
    count(n) is called for every n bytes; stop: an Event that ends it."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py-fetch"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range", "") == f"bytes */{have}":
            return                                                     # all of it was there
        if e.code == 416:
            part.unlink()
        elif e.code < 500 and e.code not in (408, 429):
            raise InputError(f"{url}: expected the file, found HTTP status {e.code}") from None
        raise Broken(f"HTTP status {e.code}") from None
    goes_on = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    with reply, opened(part, "ab" if goes_on else "wb") as file:       # a server may ignore the range
        if reply.status == 206 and not goes_on:
            raise Broken(f"another part of the file: {reply.headers.get('Content-Range')}")
        size, length = file.tell(), reply.headers.get("Content-Length")
        expected = size + int(length) if (length or "").isdigit() else None      # unknown: the check of the content must do
        while chunk := reply.read(CHUNK):
            if stop.is_set():
                raise Broken("an end to the work")
            try:
                file.write(chunk)
            except OSError as e:
                raise InputError(f"{part}: expected room for the file, found: {e.strerror}") from None
            size += len(chunk)
            count(len(chunk))
    if expected is not None and size != expected:
        raise Broken(f"{size} of {expected} bytes")


def opened(path, mode):
    try:
        return open(path, mode)
    except OSError as e:
        raise InputError(f"{path}: expected a file that can be written, found: {e.strerror}") from None


def download(url, path, check, count, stop):
    """The file at `path`, whole. check(path) raises Broken if the content is not. Raises InputError after a few tries in a row
    that brought nothing."""
    if path.exists():
        try:
            return check(path)
        except Broken:
            path.unlink()
    part, furthest, tries = Path(f"{path}.part"), 0, 0
    while True:
        try:
            receive(url, part, count, stop)
        except (Broken, OSError, http.client.HTTPException) as e:      # urllib's errors are OSErrors
            problem = e
        else:
            try:
                check(part)
                return os.replace(part, path)
            except Broken as e:
                part.unlink()
                problem = e
        size = part.stat().st_size if part.exists() else 0
        tries, furthest = (0, size) if size > furthest else (tries + 1, furthest)
        if tries > len(PAUSES) or stop.wait(PAUSES[max(0, tries - 1)]):
            found = str(problem) or type(problem).__name__
            raise InputError(f"{url}: expected the whole file, found after {tries} tries: {found}")


def check_picture(path):
    """Decodes all of a JPEG. Raises Broken."""
    try:
        found = open_image(path).format
    except InputError as e:
        raise Broken(f"no complete JPEG ({e})") from None
    if found not in ("JPEG", "MPO"):               # a camera's JPEG with a preview behind the picture
        raise Broken(f"no JPEG but {found}")


def check_zip(path, members):
    """Reads all of the zip's members that are wanted. Raises Broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                with archive.open(find(archive, member)) as file:
                    while file.read(1 << 20):                          # its checksum is compared at its end
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, NotImplementedError, zlib.error) as e:
        raise Broken(f"no complete zip ({e})") from None


def find(archive, member):
    """Name in the archive of a member, in whatever folder. Raises KeyError."""
    names = [n for n in archive.namelist() if n == member or n.endswith("/" + member)]
    if not names:
        raise KeyError(f"no {member} in it")
    return names[0]


def unpack(path, members, folder):
    """Members of a checked zip into the folder, each whole or not at all; then the zip is deleted."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(find(archive, member)) as source, open(folder / f"{member}.part", "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(folder / f"{member}.part", folder / member)
        path.unlink()
    except OSError as e:
        raise InputError(f"{path}: expected room to unpack it, found: {e.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# All files
# ---------------------------------------------------------------------------------------------------------------------
def fetch_archive(url, folder, members, address, count, stop):
    """The members of an archive, unpacked, unless they are there."""
    path = folder / url.rsplit("/", 1)[1]
    if all((folder / member).exists() for member in members):
        path.unlink(missing_ok=True)                                   # a kill came between unpacking and deleting
        return
    download(address, path, lambda file: check_zip(file, members), count, stop)
    unpack(path, members, folder)


def in_parallel(jobs, threads, title):
    """Calls job(count, stop) for every job, `threads` at a time, behind a progress bar of files. The first error ends all."""
    stop, lock, received = threading.Event(), threading.Lock(), [0]
    with tqdm(total=len(jobs), desc=title, unit="file") as bar, ThreadPoolExecutor(threads) as pool:
        def count(n):
            with lock:
                received[0] += n
                bar.set_postfix_str(f"{received[0] / 1e6:.1f} MB", refresh=False)
                bar.update(0)

        futures = [pool.submit(job, count, stop) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                with lock:
                    bar.update()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def needed_pictures(dataset, root, n_train, n_dev, seed, limit):
    """→ {address: path} of the pictures that train.py and eval.py read with these options."""
    train, dev = train_dev(dataset, root, n_train, n_dev, seed)
    found = {}
    for s in (*train, *dev, *load(dataset, root, DATASETS[dataset].eval_split)[:limit]):
        folder, name = s.image.parent.name, s.image.name
        if not re.fullmatch(r"(train|val)2014/COCO_(train|val)2014_\d{12}\.jpg", f"{folder}/{name}"):
            raise InputError(f"{root}: expected pictures named as COCO 2014's, found {folder}/{name}")
        found[f"{COCO}{folder}/{name}"] = s.image
    return found


def main(words):
    parser = argparse.ArgumentParser(prog="data.py fetch", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=ARCHIVES)
    parser.add_argument("--data", default="data", metavar="FOLDER", help="where the files go (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="training samples, as train.py's (default %(default)s)")
    parser.add_argument("--dev-samples", type=int, default=200, help="as train.py's (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="as train.py's (default %(default)s)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="evaluation items, as train.py's (default: all)")
    parser.add_argument("--chair", action="store_true", help="coco: the instances and captions of CHAIR, too (one large zip)")
    parser.add_argument("--threads", type=int, default=8, help="files at a time (default %(default)s)")
    parser.add_argument("--mirror", default=None, metavar="URL", help="get URL/HOST/PATH in the place of http(s)://HOST/PATH")
    parser.add_argument("--resume", action="store_true", help="(it goes on without being told to, too)")
    parser.add_argument("--list", action="store_true", help="print addresses and files instead")
    args = parser.parse_args(words)
    for name, least in {"samples": 1, "dev_samples": 0, "limit": 1, "threads": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(args, name)}")
    if args.mirror is not None and not re.match("https?://.", args.mirror):
        raise InputError(f"--mirror: expected an address that begins with http:// or https://, found {args.mirror!r}")
    root, folder = Path(args.data), Path(args.data) / args.dataset
    archives = ARCHIVES[args.dataset] | (CHAIR if args.chair and args.dataset == "coco" else {})

    def address(url):
        return url if args.mirror is None else f"{args.mirror.rstrip('/')}/{url.split('://')[1]}"

    def pictures():
        return needed_pictures(args.dataset, root, args.samples, args.dev_samples, args.seed, args.limit)

    if args.list:
        lines = [(url, folder / m) for url, members in archives.items() for m in members]
        if all(path.exists() for _, path in lines):
            lines += pictures().items()
        else:
            print("the pictures are listed once the annotations are there", file=sys.stderr)
        print("\n".join(f"{address(url)}\t{path}" for url, path in lines))
        return
    began = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: expected a folder that can be written, found: {e.strerror}") from None
    in_parallel([lambda count, stop, url=url, members=members: fetch_archive(url, folder, members, address(url), count, stop)
                 for url, members in archives.items()], args.threads, "annotations")
    wanted = pictures()
    for path in {p.parent for p in wanted.values()}:
        path.mkdir(parents=True, exist_ok=True)
    in_parallel([lambda count, stop, url=url, path=path: download(address(url), path, check_picture, count, stop)
                 for url, path in wanted.items()], args.threads, "pictures")
    print(f"{root}: {args.dataset} with {len(wanted)} pictures is complete ({time.perf_counter() - began:.0f} s)")
