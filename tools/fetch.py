"""Download the published annotations, and of COCO's pictures those of a run's training, dev and eval samples.

    python -m tools.fetch okvqa --data data                        # what `train.py --dataset okvqa` reads
    python -m tools.fetch vqav2 --data data --limit 500            # only 500 items of the evaluation split

Options are train.py's, of which --data, --samples, --dev-samples, --seed and --limit say what is needed. What
is there and whole is left alone, so that the same command goes on where one was interrupted.
"""

import contextlib
import http.client
import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from data import DATASETS, load, open_image, train_dev
from support.files import InputError, make_folder, reading, run_command, write_whole
from support.options import Parser
from train import parse

OKVQA = "https://okvqa.allenai.org/static/data/"
VQAV2 = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
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
PAUSES = (0, 1, 3, 10, 30)        # seconds before each try


def download(url, use):
    """→ use(the bytes there), which raises InputError unless they are whole; in the end, so does this."""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with urlopen(Request(url, headers={"User-Agent": "tools.fetch"}), timeout=60) as reply:
                return use(reply.read())
        except (OSError, http.client.HTTPException, InputError) as e:        # urllib's errors are OSErrors
            problem = str(e) or type(e).__name__
    raise InputError(f"{url}: expected the whole file, found after {len(PAUSES)} tries: {problem}")


def fetch_picture(url, path):
    """A picture, unless it is there and can be decoded."""
    def keep(content):
        part = Path(f"{path}.part")
        part.write_bytes(content)
        open_image(part)
        part.replace(path)

    with contextlib.suppress(InputError):
        return open_image(path)
    download(url, keep)


def fetch_archive(url, path):
    """The file `path`, out of the archive, in whatever folder of it, unless it is there."""
    def unzip(content):
        with reading(url, f"a complete zip with {path.name}"):
            archive = zipfile.ZipFile(io.BytesIO(content))
            names = {Path(member).name: member for member in archive.namelist()}
            return archive.read(names[path.name])            # checksum included

    if not path.exists():
        print(url)
        make_folder(path.parent)
        write_whole(path, download(url, unzip))


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.fetch")
    parser.add_argument("dataset", choices=ARCHIVES, help="stands first")
    mine, others = parser.parse_known_args(argv)
    args, _ = parse(["--dataset", mine.dataset, "--shots", "1", *others])      # shots: else of the model
    for url, name in ARCHIVES[args.dataset].items():
        fetch_archive(url, Path(args.data) / name)
    train, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed)
    evaluated = load(args.dataset, args.data, DATASETS[args.dataset].eval_split)[:args.limit]
    paths = sorted({s.image for s in (*train, *dev, *evaluated)})
    for folder in {path.parent for path in paths}:
        make_folder(folder)
    urls = [f"http://images.cocodataset.org/{path.parent.name}/{path.name}" for path in paths]
    with ThreadPoolExecutor(8) as pool:                      # the first error cancels what has not begun
        for _ in tqdm(pool.map(fetch_picture, urls, paths), "pictures", len(paths)):
            pass
    print(f"{args.data}: {args.dataset} with {len(paths)} pictures is complete")


if __name__ == "__main__":
    run_command(main)
