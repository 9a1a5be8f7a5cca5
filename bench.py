"""Seconds and memory, side by side with a peer.

    python bench.py                                       # every bench at toy and mid size
    python bench.py --only fit --size full --out bench.json

fit    `--fit layerwise` (ours) beside end-to-end training (peer), both on 8 demonstrations; random weights and random tokens, as
       neither changes the time. At full size (Idefics2-8b-base's decoder) one layer and one batch are measured, after one that is
       not, and the rest extrapolated; states that would lie on disk are not part of it
cider  ours beside pycocoevalcap (to be installed, with Java): of each picture of --captions the first caption is scored against
       the others

Every measurement is a process of its own, so that its peak memory is its own; peer and ours alternate, and the median of
--repeats counts. Prints a table; --out FILE writes JSON rows {what, size, device, dtype, batch, ours_s, peer_s,
ratio = peer/ours, peak_gib, peer_peak_gib, inference_peak_gib, about}.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from data import Batch, Rows
from eval import clock, run_command, write_atomically
from features import gather
from fit import advance, fit, fit_layer, is_demonstration, plan, student, teacher
from metrics import cider
from mimic import MimIC
from model import Config, Idefics2, InputError, PerceiverConfig, Shifts, TextConfig, VisionConfig, read_json
from train import losses, parse

SIZES = {                              # decoders; the pictures' features are random, so the vision tower is the smallest there is
    "toy": (TextConfig(128, 352, 6, 8, 4, vocab_size=130), 4, 6),
    "mid": (TextConfig(512, 1408, 8, 8, 4), 64, 20),
    "full": (TextConfig(), 64, 20),
}                                      # decoder, image tokens a picture, text tokens an example (the last 3 are the answer)
SHOTS = 8
MEMORY_GB = 0.1                        # of the layer-wise fit


def decoder(size, device, dtype, n_layers=None):
    """An Idefics2 with random weights around the decoder of that size."""
    text, n_latents, _ = SIZES[size]
    if n_layers:
        text.num_hidden_layers = n_layers
    config = Config(VisionConfig(16, 16, 1, 1, 28), PerceiverConfig(n_latents, 1, 1, 8, 1), text, image_token_id=4)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Idefics2(config)
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def random_batch(size, B, seed=0):
    """B queries behind SHOTS demonstrations, random tokens, one picture an example, all examples of one length."""
    _, n_latents, n_text = SIZES[size]
    g, one = torch.Generator().manual_seed(seed), n_latents + n_text
    examples = torch.cat([torch.full((B, SHOTS + 1, n_latents), 4),
                          torch.randint(5, 100, (B, SHOTS + 1, n_text), generator=g)], 2)
    teacher = torch.cat([torch.ones(B, 1, dtype=torch.long), examples.flatten(1)], 1)
    student = torch.cat([teacher[:, :1], teacher[:, -one:]], 1)
    picture = SimpleNamespace(image_id=0)
    whole = torch.ones_like(student, dtype=torch.bool)
    answer = whole.clone()
    answer[:, :-3] = False
    return Batch(Rows(teacher, torch.ones_like(teacher, dtype=torch.bool), [picture] * (B * (SHOTS + 1))),
                 Rows(student, whole, [picture] * B), whole[:, 1:], answer, whole)


def prepared(size, device, dtype, n_layers=None):
    """A model, an adapter for it, the features of the one picture, and the embedding of rows."""
    model = decoder(size, device, dtype, n_layers)
    c = model.config.text
    features = {0: torch.randn(SIZES[size][1], c.hidden_size, device=device, dtype=dtype)}
    mimic = MimIC(c.num_hidden_layers, c.num_attention_heads, c.head_dim).to(device)
    return model, mimic, features, lambda rows: model.embed(rows.input_ids.to(device), gather(features, rows.samples))


def layerwise(size, device, dtype, samples, batch_size, epochs):
    """Seconds of a layer-wise fit. At full size: one batch through one layer and one regression on all tokens, times the rest."""
    model, mimic, _, embed = prepared(size, device, dtype, 1 if size == "full" else None)
    if size != "full":
        chunks = [[random_batch(size, batch_size, i)] for i in range(samples // batch_size)]
        began = clock(model.device)
        with tempfile.TemporaryDirectory() as folder:
            fit(model, mimic, chunks, *plan(model, chunks, [4], "all", MEMORY_GB), embed, Path(folder))
        return clock(model.device) - began
    batch, c = random_batch(size, batch_size), model.config.text
    with torch.no_grad():
        x, s, T_q = embed(batch.teacher), embed(batch.student), batch.align.shape[1]
        for _ in range(2):
            began = clock(model.device)
            teacher(model, 0, x, batch.teacher, is_demonstration(batch), T_q)
            student(model, 0, s, batch.student)
            advance(model, 0, s, batch.student, mimic)
            streams = clock(model.device) - began
        began = clock(model.device)
        N, H, D = samples * T_q, c.num_attention_heads, c.head_dim
        q, log_z1, log_z2, delta = (
            torch.randn(*shape, device=device) for shape in ((H, N, D), (N, H), (N, H), (N, c.hidden_size)))
        w_o = model.model["text_model"].layers[0].self_attn.o_proj.weight.float().view(-1, H, D)
        fit_layer(mimic, 0, q, log_z1, log_z2, delta, w_o)
        return TextConfig().num_hidden_layers * (streams * samples / batch_size + clock(model.device) - began)


def training(size, device, dtype, samples, batch_size, epochs):
    """Seconds of end-to-end training: one epoch, or at full size one step of a one-layer model, times what is missing."""
    model, mimic, features, _ = prepared(size, device, dtype, 1 if size == "full" else None)
    args, optimiser = parse([]), torch.optim.AdamW(mimic.parameters(), lr=1e-3)
    batches = [random_batch(size, batch_size, i) for i in range(1 if size == "full" else samples // batch_size)]

    def step(batch):
        align, ce = losses(model, mimic, batch, features, args)
        (align + 0.5 * ce).backward()
        optimiser.step()
        optimiser.zero_grad()

    step(batches[0])
    began = clock(model.device)
    for batch in batches:
        step(batch)
    missing = TextConfig().num_hidden_layers * samples / batch_size if size == "full" else 1
    return (clock(model.device) - began) * missing * epochs


def inference(size, device, dtype, samples, batch_size, epochs):
    """Seconds of one pass of the model over a batch's demonstrations and queries."""
    model, _, _, embed = prepared(size, device, dtype, 1 if size == "full" else None)
    rows = random_batch(size, batch_size).teacher
    began = clock(model.device)
    with torch.no_grad():
        model.model["text_model"](embed(rows), rows.attention_mask.to(device), rows.attention_mask.to(device).cumsum(1) - 1,
                                  Shifts(), None)
    return clock(model.device) - began


def alone(function, queue, threads, *arguments):
    """In a process of its own: seconds and peak memory in GiB, the model's own weights included."""
    torch.set_num_threads(threads)
    seconds, cuda = function(*arguments), arguments[1].startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((seconds, peak / 2**30))


def measured(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=alone, args=(function, queue, torch.get_num_threads(), *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(f"{function.__name__} {arguments}: expected exit status 0, found {process.exitcode}")
    return queue.get()


def side_by_side(ours, peer, repeats, what, *arguments):
    """Ours and the peer's, alternating → {ours_s, peer_s, ratio, peak_gib, peer_peak_gib}, medians."""
    runs = [[measured(side, *arguments) for side in (ours, peer)] for _ in tqdm(range(repeats), desc=what)]
    (seconds, peak), (peer_seconds, peer_peak) = (map(statistics.median, zip(*s, strict=True)) for s in zip(*runs, strict=True))
    return {"what": what, "ours_s": seconds, "peer_s": peer_seconds, "ratio": peer_seconds / seconds, "peak_gib": peak,
            "peer_peak_gib": peer_peak}


def bench_fit(args, dtype):
    for size in args.size:
        samples, batch_size, epochs = args.samples or {"toy": 1000, "mid": 64, "full": 1000}[size], 4 if size == "toy" else 2, 5
        words = size, args.device, getattr(torch, dtype), samples, batch_size, epochs
        _, needed = measured(inference, *words)
        how = "; one layer measured, the rest extrapolated" if size == "full" else ""
        yield {**side_by_side(layerwise, training, args.repeats, "fit_layerwise", *words), "size": size, "batch": batch_size,
               "inference_peak_gib": needed, "about": f"{samples} samples, {SHOTS} shots, --memory-gb {MEMORY_GB}; peer: "
               f"training, {epochs} epochs; inference alone {needed:.2f} GiB{how}"}


def captions(path):
    """{id: [captions]} → the first caption of each picture as candidate, the others as its references."""
    found = [c for c in read_json(path).values() if len(c) > 1]
    return [c[0] for c in found], [c[1:] for c in found]


def our_cider(path, device):
    candidates, references = captions(path)
    began = time.perf_counter()
    print(f"ours {cider(candidates, references)[0]:.6f}")
    return time.perf_counter() - began


def their_cider(path, device):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    candidates, references = captions(path)
    began = time.perf_counter()
    tokens = [PTBTokenizer().tokenize({i: [{"caption": c} for c in group] for i, group in enumerate(side)})
              for side in (references, [[c] for c in candidates])]
    print(f"peer {Cider().compute_score(*tokens)[0]:.6f}")
    return time.perf_counter() - began


def bench_cider(args, dtype):
    if args.captions:
        n = len(captions(args.captions)[0])
        yield {**side_by_side(our_cider, their_cider, args.repeats, "cider", args.captions, "cpu"), "size": "-", "batch": n,
               "about": f"{n} captions; peer: pycocoevalcap, its Java tokenizer included"}


BENCHES = {"fit": bench_fit, "cider": bench_cider}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="(default: all)")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["toy", "mid"], help="(default toy mid)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s here)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="(default: float32, bfloat16 on cuda)")
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--samples", type=int, default=None, help="(default: toy and full 1000, mid 64)")
    parser.add_argument("--captions", default=None, metavar="FILE", help="for cider: JSON {image id: [captions]}")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: torch's)")
    parser.add_argument("--out", default=None, metavar="FILE", help="writes the rows as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    rows = []
    print(f"{'what':<16}{'size':<6}{'ours s':>10}{'peer s':>10}{'ratio':>8}{'peak GiB':>10}{'peer GiB':>10}  about")
    for name in args.only:
        for row in BENCHES[name](args, dtype):
            rows.append({**row, "device": args.device, "dtype": dtype})
            print(f"{row['what']:<16}{row['size']:<6}{row['ours_s']:>10.3g}{row['peer_s']:>10.3g}{row['ratio']:>8.2f}"
                  f"{row['peak_gib']:>10.2f}{row['peer_peak_gib']:>10.2f}  {row['about']}")
    if args.out:
        write_atomically(args.out, json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    run_command(main)
