"""Function vector: the few heads that carry a task from the demonstrations to the last token (Todd et al., ICLR 2024).

    ā_lh = mean of a_lh over clean prompts          a_lh (D): output of head h of layer l at the last token, before W_o
    IE_lh = p(y | prompt with shuffled answers, a_lh ← ā_lh) − p(y | that prompt)             y: first token of the true answer
    A = the 10 heads with the largest mean IE
    v = Σ_{(l,h) in A} W_o^lh ā_lh                  W_o^lh (d,D): the columns of layer l's o_proj that read head h
    inference, no demonstrations:  h_l(last token) ← h_l(last token) + v                      at one layer l, chosen on dev

v is added in every pass of generation: to the prompt's last token, then to each generated one. Clean prompts: 100 training
samples behind 10 demonstrations without them, only such as the model gets right, which means that the answer's first token is
the one it finds most probable (Todd's rule; it fits captions too). The 25 shuffled prompts have queries of these, new
demonstrations, and those demonstrations' answers permuted among them. A patched head changes nothing but the last token, so all
that stands before it is computed once a prompt, and the heads are rows of a batch of single tokens: exact and cheap.
"""

import copy
import json
import random
from dataclasses import replace

import torch
from tqdm import tqdm

from baselines.task_vector import choose_layer, inputs, load_vector, save_vector
from data import pick_icds, plain, render, split
from model import InputError, KVCache, Shifts

PROMPTS, SHUFFLED, HEADS = 100, 25, 10      # clean prompts, prompts with shuffled answers, |A|
ROWS = 32                                   # heads patched at a time, each with a copy of the prompt's keys and values


class FunctionVector(Shifts):
    """`model.generate(…, shifts=function_vector)`: vector (d) is added to the last token's state after `layer`."""

    def __init__(self, vector, layer):
        self.vector, self.layer = vector, layer

    def after_layer(self, layer, hidden_states):
        """(B,T,d) → (B,T,d). The last column is the prompt's last token, then each generated one."""
        if layer != self.layer:
            return hidden_states
        return torch.cat([hidden_states[:, :-1], hidden_states[:, -1:] + self.vector.to(hidden_states)], 1)

    def save(self, path, **about):
        save_vector(self, path, about)

    @classmethod
    def load(cls, path):
        return cls(*load_vector(path, "function vector"))


class HeadReader(Shifts):
    """Keeps the head outputs of one pass at its last token: .outputs, one (B,H,D) tensor a layer."""

    def __init__(self):
        self.outputs = []

    def after_attention(self, layer, q, k, out, lse):
        self.outputs.append(out[:, :, -1].float())
        return out


class HeadPatch(Shifts):
    """Row i's head heads[i] = (layer, head) gives values[layer, head] (D) at the last token; values (L,H,D)."""

    def __init__(self, heads, values):
        self.heads, self.values = heads, values

    def after_attention(self, layer, q, k, out, lse):
        out = out.clone()
        for row, (patched, head) in enumerate(self.heads):
            if patched == layer:
                out[row, head, -1] = self.values[layer, head].to(out.dtype)
        return out


@torch.no_grad()
def prefill(model, input_ids, attention_mask, images):
    """Keys and values of all tokens but the last → KVCache."""
    cache = KVCache(model.config.text.num_hidden_layers, input_ids.shape[1])
    model.hidden_states(input_ids[:, :-1], attention_mask[:, :-1], images, cache=cache)
    return cache


@torch.no_grad()
def last_logits(model, input_ids, attention_mask, cache, shifts=None, rows=1):
    """fp32 logits (B·rows,vocab) behind prompts whose prefill is in the cache, each `rows` times. The cache stays as it is."""
    cache = copy.copy(cache)
    if rows > 1:
        cache.repeat(rows)
    ids, mask = (x.repeat_interleave(rows, 0) for x in (input_ids[:, -1:], attention_mask))
    return model.lm_head(model.hidden_states(ids, mask, shifts=shifts, cache=cache)[:, -1]).float()


def indirect_effects(model, prompt, gold, values):
    """IE of every head for one prompt (input_ids (1,T), attention_mask (1,T), images) and its gold token → (L,H) on the CPU."""
    L, H = values.shape[:2]
    ids, mask, _ = prompt
    cache, every, patched = prefill(model, *prompt), [(layer, head) for layer in range(L) for head in range(H)], []
    for heads in (every[i:i + ROWS] for i in range(0, len(every), ROWS)):
        patched.append(last_logits(model, ids, mask, cache, HeadPatch(heads, values), len(heads)))
    base = last_logits(model, ids, mask, cache).softmax(-1)[0, gold]
    return (torch.cat(patched).softmax(-1)[:, gold] - base).view(L, H).cpu()


def function_vector(model, heads, values):
    """v = Σ W_o^lh ā_lh over heads [(l, h)], from values (L,H,D) → (d) fp32."""
    D, layers = values.shape[-1], model.text_model.layers
    return sum(layers[lyr].self_attn.o_proj.weight[:, h * D:(h + 1) * D].float() @ values[lyr, h] for lyr, h in heads)


def make(model, processor, template, features, pool, shots, seed, dev_score, batch_size=16):
    """The function vector of the pool's task → FunctionVector, what its file says of it. Arguments as task_vector.make."""
    def first_token(query):                 # of the true answer, in the form in which demonstrations show answers
        ids, _, start = split(processor, "", render(template, [], query)[1], f" {plain(query.target)}")
        return ids[start]

    # 1. ā: the mean head outputs of clean prompts that the model gets right.
    total, right = 0.0, []
    order = random.Random(f"{seed}-clean").sample(pool, len(pool))
    with tqdm(total=min(PROMPTS, len(pool)), desc="prompts answered right", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            queries, reader = order[start:start + batch_size], HeadReader()
            icds = [pick_icds(pool, q, shots, f"{seed}-clean-{q.id}") for q in queries]
            ids, mask, images = inputs(model, processor, template, features, queries, icds)
            best = last_logits(model, ids, mask, prefill(model, ids, mask, images), reader).argmax(-1).tolist()
            kept = [i for i, q in enumerate(queries) if best[i] == first_token(q)][:PROMPTS - len(right)]
            total = total + torch.stack(reader.outputs)[:, kept].sum(1)                            # (L,H,D)
            right += [queries[i] for i in kept]
            bar.update(len(kept))
            if len(right) == PROMPTS:
                break
    if not right:
        raise InputError(f"--method function-vector: expected prompts that the model gets right with {shots} demonstrations, "
                         f"found none in {len(pool)}")
    values = total / len(right)

    # 2. The heads with the largest mean indirect effect.
    effects = 0.0
    for query in tqdm(right[:SHUFFLED], desc="indirect effects", unit="prompt"):
        icds = pick_icds(pool, query, shots, f"{seed}-shuffled-{query.id}")
        targets = random.Random(f"{seed}-targets-{query.id}").sample([s.target for s in icds], shots)
        icds = [replace(s, target=target) for s, target in zip(icds, targets, strict=True)]
        prompt = inputs(model, processor, template, features, [query], [icds])
        effects = effects + indirect_effects(model, prompt, first_token(query), values) / min(SHUFFLED, len(right))
    H = effects.shape[1]
    heads = [divmod(i, H) for i in effects.flatten().sort(descending=True, stable=True).indices[:HEADS].tolist()]

    # 3. The vector, and the layer behind which it helps most.
    vector = function_vector(model, heads, values)
    chosen, scores = choose_layer([FunctionVector(vector, layer) for layer in range(len(values))], dev_score)
    shown = [[layer, head, round(effects[layer, head].item(), 4)] for layer, head in heads]
    return chosen, {"dev_scores": scores, "prompts": len(right), "heads": json.dumps(shown)}
