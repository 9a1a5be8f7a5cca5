"""tools.fetch against a server of this machine that is slow, breaks off, lies and sends rubbish."""

import io
import multiprocessing
import random
import re
import threading
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tqdm import tqdm

import data
from support.files import InputError
from tools import fetch

QUESTIONS = "okvqa.allenai.org/static/data/OpenEnded_mscoco_val2014_questions.json.zip"
PICTURE = "images.cocodataset.org/val2014/COCO_val2014_000000389684.jpg"
SHORT = ["okvqa", "--samples", "1", "--dev-samples", "0", "--limit", "1"]        # of the pictures two


class Handler(BaseHTTPRequestHandler):
    """Of a server with files: {HOST/PATH: bytes}; faults: {HOST/PATH: list of faults, one for each of its next requests};
    log: list of HOST/PATH; seconds: pause after every 16 kB."""

    def do_GET(self):
        path = self.path.lstrip("/")
        whole, fault = self.server.files.get(path), (self.server.faults.get(path) or [None]).pop(0)
        self.server.log.append(path)
        if whole is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        body = whole if fault != "rubbish" else b"\xff\xd8" + bytes(len(whole) - 2)
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) + {"too long": 99, "too short": -len(body) // 2}.get(fault, 0)))
        self.end_headers()
        body = body[:len(body) // 2] if fault in ("drop", "too short") else body
        for at in range(0, len(body), 1 << 14):
            self.wfile.write(body[at:at + (1 << 14)])
            time.sleep(self.server.seconds)


@pytest.fixture(scope="module")
def expected(shared):
    """{dataset: {name: bytes}}: of the sample's files those that it needs."""
    found = {}
    for dataset in "okvqa", "coco":
        samples = [s for split in ("train", "val") for s in data.load(dataset, shared / "data", split)]
        names = [*fetch.ARCHIVES[dataset].values(), *(str(s.image.relative_to(shared / "data")) for s in samples)]
        found[dataset] = {name: (shared / "data" / name).read_bytes() for name in names}
    return found


@pytest.fixture
def server(expected, monkeypatch):
    """Has what the official servers have, and is asked in their place."""
    files = expected["okvqa"] | expected["coco"]
    published = {f"images.cocodataset.org/{name[5:]}": files[name] for name in files if name.endswith("jpg")}
    for url, name in (fetch.ARCHIVES["okvqa"] | fetch.ARCHIVES["coco"]).items():
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr(f"some/folder/{Path(name).name}", files[name])
        published[url.split("://")[1]] = content.getvalue()

    def urlopen(request, timeout):
        request.full_url = f"http://127.0.0.1:{server.server_address[1]}/{request.full_url.split('://')[1]}"
        return urllib.request.urlopen(request, timeout=timeout)
    monkeypatch.setattr(Handler, "log_message", lambda *words: None)
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *words: None)      # clients that were killed
    monkeypatch.setattr(fetch, "PAUSES", (0, 0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(fetch, "urlopen", urlopen)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.files, server.faults, server.log, server.seconds = True, published, {}, [], 0
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


def run(root, *words):
    fetch.main([*(words or ["okvqa"]), "--data", str(root)])


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_okvqa_and_coco_are_fetched_as_published(server, tmp_path, expected, capsys):
    run(tmp_path, "okvqa")
    run(tmp_path, "coco")
    assert tree(tmp_path) == expected["okvqa"] | expected["coco"]
    assert "okvqa with 33 pictures is complete" in capsys.readouterr().out


def test_a_second_call_asks_for_nothing_and_a_spoilt_picture_alone_is_fetched_again(server, tmp_path, expected):
    run(tmp_path)
    server.log.clear()
    run(tmp_path)
    assert server.log == []
    path = tmp_path / "coco/val2014" / Path(PICTURE).name
    path.write_bytes(path.read_bytes()[:5000])
    run(tmp_path)
    assert server.log == [PICTURE] and tree(tmp_path) == expected["okvqa"]


def test_only_what_the_options_ask_for_is_fetched(server, tmp_path):
    run(tmp_path, "okvqa", "--samples", "3", "--dev-samples", "1", "--seed", "7", "--limit", "2")
    train, dev = data.train_dev("okvqa", tmp_path, 3, 1, 7)
    wanted = {s.image for s in (*train, *dev, *data.load("okvqa", tmp_path, "val")[:2])}
    assert set(tmp_path.rglob("*.jpg")) == wanted and len(wanted) == 6


@pytest.mark.parametrize("faults", [
    ["drop", "drop", "drop"], ["too long"], ["too short"], [503, "drop", 429, "drop"], ["rubbish"], ["no length"]])
@pytest.mark.parametrize("path", [PICTURE, QUESTIONS])
def test_after_faults_of_the_server_the_files_are_the_published_ones(server, tmp_path, expected, path, faults):
    server.faults[path] = list(faults)
    run(tmp_path, *SHORT)
    found = tree(tmp_path)
    assert len(found) == 4 + 2 and found.items() <= expected["okvqa"].items() and PICTURE[23:] in str(found.keys())
    assert server.faults[path] == []


@pytest.mark.parametrize("fault, message", [("rubbish", "expected a complete"), (500, "HTTP Error 500")])
@pytest.mark.parametrize("path", [PICTURE, QUESTIONS])
def test_a_server_that_never_sends_the_file_is_one_line_that_names_it(server, tmp_path, path, fault, message):
    server.faults[path] = [fault] * 20
    with pytest.raises(InputError, match=f"{path}: expected the whole file, found after 5 tries: .*{message}") as error:
        run(tmp_path, *SHORT)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob(Path(path).name))
    server.faults.clear()
    run(tmp_path, *SHORT)                                                  # and the next call does the rest


def test_killed_at_random_moments_it_ends_with_the_same_files_and_fetches_none_twice(server, tmp_path, expected):
    tqdm.set_lock(threading.RLock())                 # its own is shared by all forks: who is killed with it stops the others
    server.seconds, r = 0.02, random.Random(0)
    for kills in range(40):
        done, start = tree(tmp_path).keys(), len(server.log)
        process = multiprocessing.get_context("fork").Process(target=run, args=[tmp_path])
        process.start()
        process.join(r.uniform(0.02, 0.3) if kills < 30 else 20)
        process.kill()
        process.join()
        asked = {Path(path).name.removesuffix(".zip") for path in server.log[start:]}
        assert not asked & {Path(name).name for name in done}              # a file with its final name is never asked for again
        if process.exitcode == 0:
            break
    assert 3 < kills < 39 and tree(tmp_path) == expected["okvqa"]


def test_only_fetch_opens_connections():
    root = Path(fetch.__file__).parents[1]
    files = [p for at in ("*.py", "[!t]*/*.py", "to*/*.py") for p in root.glob(at) if p.name != "fetch.py"]
    assert [p.name for p in files if re.search(r"^\s*(import|from) (urllib|http|socket|requests)", p.read_text(), re.M)] == []
