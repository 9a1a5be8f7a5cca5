"""tools.fetch against a server of this machine that is slow, breaks off, lies, forgets ranges and sends rubbish."""

import io
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from support.files import InputError
from tools import fetch

REPOSITORY = Path(__file__).resolve().parents[1]
QUESTIONS = "okvqa.allenai.org/static/data/OpenEnded_mscoco_val2014_questions.json.zip"
PICTURE = "images.cocodataset.org/val2014/COCO_val2014_000000389684.jpg"


class Server(ThreadingHTTPServer):
    """files: {HOST/PATH: bytes}; faults: {HOST/PATH: list of faults, one for each of its next requests}; log: list of
    (HOST/PATH, first byte asked for, bytes sent); seconds: pause after every 16 kB."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.seconds = files, {}, [], 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass                                                 # a client that was killed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        path = self.path.lstrip("/")
        faults = self.server.faults.get(path)
        fault = faults.pop(0) if faults else None
        body, total = self.server.files.get(path), len(self.server.files.get(path, b""))
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if fault == "no range":
            first = 0
        entry = [path, first, 0]
        self.server.log.append(entry)
        if body is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if first and first >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = b"\xff\xd8" + bytes(total - 2) if fault == "rubbish" else body
        body = body[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first + (fault == 'other range')}-{total - 1}/{total}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) + {"too long": 99, "too short": -len(body) // 2}.get(fault, 0)))
        self.end_headers()
        body = body[:len(body) // 2] if fault in ("drop", "too short", "drop no length") else body
        for at in range(0, len(body), 1 << 14):
            self.wfile.write(body[at:at + (1 << 14)])
            entry[2] += len(body[at:at + (1 << 14)])
            time.sleep(self.server.seconds)
        self.close_connection = True


@pytest.fixture(scope="module")
def published(shared):
    """What the official servers have, of the sample: {HOST/PATH: bytes}."""
    files = {}
    for dataset, archives in fetch.ARCHIVES.items():
        for url, members in archives.items():
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for member in members:
                    if (path := shared / "data" / dataset / member).exists():
                        archive.write(path, member if dataset != "okvqa" else f"folder/{member}")
            files[url.split("://")[1]] = buffer.getvalue()
    for path in (shared / "data/coco").glob("*2014/*.jpg"):
        files[f"images.cocodataset.org/{path.parent.name}/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture
def server(published, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.01, 0.01))
    server = Server(published)
    yield server
    server.shutdown()
    server.server_close()


def run(server, root, dataset="okvqa", *more):
    fetch.main([dataset, "--data", str(root), "--mirror", server.url, *more])


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def expected_tree(shared, *datasets):
    """The sample's files that OK-VQA, VQA v2 or COCO need, byte by byte."""
    names = [f"{d}/{m}" for d in datasets for members in fetch.ARCHIVES[d].values() for m in members]
    for d in datasets:
        samples = [s for split in ("train", data.DATASETS[d].eval_split) for s in data.load(d, shared / "data", split)]
        names += [str(s.image.relative_to(shared / "data")) for s in samples]
    return {name: (shared / "data" / name).read_bytes() for name in names}


def test_okvqa_and_coco_are_fetched_with_the_pictures_of_a_run_and_load_as_published(shared, server, tmp_path, capsys):
    for dataset in ("okvqa", "coco"):
        run(server, tmp_path, dataset)
    assert tree(tmp_path) == expected_tree(shared, "okvqa", "coco")
    assert [s.id for s in data.load("okvqa", tmp_path, "val")] == [s.id for s in data.load("okvqa", shared / "data", "val")]
    assert all(s.picture().size for s in data.load("coco", tmp_path, "val"))
    assert "okvqa with 33 pictures is complete" in capsys.readouterr().out


def test_a_second_call_asks_for_nothing_and_a_spoilt_picture_alone_is_fetched_again(shared, server, tmp_path):
    run(server, tmp_path)
    server.log.clear()
    run(server, tmp_path)
    assert server.log == []
    path = tmp_path / "coco/val2014" / PICTURE.rsplit("/", 1)[1]
    path.write_bytes(path.read_bytes()[:5000])
    run(server, tmp_path)
    assert [entry[0] for entry in server.log] == [PICTURE] and tree(tmp_path) == expected_tree(shared, "okvqa")


def test_only_what_the_options_ask_for_is_fetched(server, tmp_path):
    run(server, tmp_path, "okvqa", "--samples", "3", "--dev-samples", "1", "--seed", "7", "--limit", "2")
    train, dev = data.train_dev("okvqa", tmp_path, 3, 1, 7)
    wanted = {s.image for s in (*train, *dev, *data.load("okvqa", tmp_path, "val")[:2])}
    assert set(tmp_path.rglob("*.jpg")) == wanted and len(wanted) == 6


@pytest.mark.parametrize("faults", [
    ["drop"], ["drop", "drop", "drop"], ["too long"], ["too short"], ["drop", "no range"], [500], [503, "drop", 429, "drop"],
    ["rubbish"], ["drop", "other range"], ["no length"], ["drop", "rubbish", "too long", "no range"]])
@pytest.mark.parametrize("path", [PICTURE, QUESTIONS])
def test_after_faults_of_the_server_the_files_are_the_published_ones(shared, server, tmp_path, path, faults):
    server.faults[path] = list(faults)
    run(server, tmp_path, "okvqa", "--samples", "1", "--dev-samples", "0", "--limit", "1")
    whole = expected_tree(shared, "okvqa")
    found = tree(tmp_path)
    assert len(found) == 4 + 2 and all(whole[name] == content for name, content in found.items())
    assert server.faults[path] == [] and any(name.endswith(PICTURE.rsplit("/", 1)[1]) for name in found)


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.faults[PICTURE] = ["drop"]
    run(server, tmp_path, "okvqa", "--limit", "1")
    (_, first, sent), (_, second, rest) = [entry for entry in server.log if entry[0] == PICTURE]
    assert first == 0 and second == sent > 1000 and sent + rest == len(server.files[PICTURE])


@pytest.mark.parametrize("fault, message", [
    ("rubbish", "no complete (JPEG|zip)"), (500, "HTTP status 500"), ("too short", "no complete"), (404, "HTTP status 404")])
@pytest.mark.parametrize("path", [PICTURE, QUESTIONS])
def test_a_server_that_never_sends_the_file_is_one_line_that_names_it(server, tmp_path, path, fault, message):
    server.faults[path] = [fault] * 20
    with pytest.raises(InputError, match=message) as error:
        run(server, tmp_path)
    assert path in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob(path.rsplit("/", 1)[1])) and len([x for x in server.log if x[0] == path]) <= 5
    server.faults.clear()
    run(server, tmp_path)                                                  # and the next call does the rest


def test_a_missing_file_is_one_line_and_exit_status_2_and_no_server_at_all_is_named(server, tmp_path):
    found = subprocess.run([sys.executable, "-m", "tools.fetch", "coco", "--data", tmp_path, "--mirror", f"{server.url}/none"],
                           cwd=REPOSITORY, capture_output=True, text=True)
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(errors) == 1 and "caption_datasets.zip: expected the file, found HTTP" in errors[0]
    assert "Traceback" not in found.stderr
    with pytest.raises(InputError, match="caption_datasets.zip: expected the whole file, found after 4 tries: .*refused"):
        fetch.main(["coco", "--data", str(tmp_path), "--mirror", "http://127.0.0.1:9"])


HELPER = """
import os, sys, time
from tools import fetch
print("ready", flush=True)
for line in sys.stdin:
    if not (child := os.fork()):
        sys.stdout = open(os.devnull, "w")
        fetch.main(sys.argv[1:])
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, 9)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_random_moments_it_ends_with_the_same_files_and_fetches_none_twice(shared, server, tmp_path):
    server.seconds, r = 0.02, random.Random(0)
    words = ["okvqa", "--data", tmp_path, "--mirror", server.url, "--threads", "4"]
    helper = subprocess.Popen([sys.executable, "-c", HELPER, *words], cwd=REPOSITORY, stdin=subprocess.PIPE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert helper.stdout.readline() == "ready\n"
    kills, status = -1, "9\n"
    while status == "9\n" and kills < 40:
        done, start = tree(tmp_path).keys(), len(server.log)
        print(r.uniform(0.02, 0.3) if kills < 30 else 20, file=helper.stdin, flush=True)
        status, kills = helper.stdout.readline(), kills + 1
        asked = {entry[0].rsplit("/", 1)[1] for entry in server.log[start:]}
        asked |= {name.removesuffix(".zip") for name in asked}
        assert not asked & {Path(name).name for name in done}              # a file with its final name is never asked for again
    helper.stdin.close()
    helper.stdout.close()
    assert helper.wait() == 0 and status == "0\n" and kills > 3 and tree(tmp_path) == expected_tree(shared, "okvqa")
    assert sum(first > 0 for _, first, _ in server.log) > 3                # and others went on in their middle
    assert sum(entry[2] for entry in server.log) < 2 * sum(map(len, tree(tmp_path).values()))


# ---- what is asked for


@pytest.mark.parametrize("words", [["--samples", "0"], ["--limit", "0"], ["--threads", "0"], ["--dev-samples", "-1"],
                                   ["--mirror", "here"]])
def test_a_number_or_mirror_that_cannot_be_is_refused(words, tmp_path):
    with pytest.raises(InputError, match=f"{words[0]}: expected a"):
        fetch.main(["okvqa", "--data", str(tmp_path), *words])


def test_only_fetch_opens_connections():
    files = [p for at in ("*.py", "[!t]*/*.py", "to*/*.py") for p in REPOSITORY.glob(at) if p.name != "fetch.py"]
    assert [p.name for p in files if re.search(r"^\s*(import|from) (urllib|http|socket|requests)", p.read_text(), re.M)] == []
