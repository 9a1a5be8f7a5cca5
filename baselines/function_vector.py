"""Function vector: the few heads that carry a task from demonstrations to the last token (Todd et al. 2024).

    ā_lh = mean of a_lh over clean prompts      a_lh (D): head h of layer l at the last token, before W_o
    IE_lh = p(y | shuffled prompt, a_lh ← ā_lh) − p(y | shuffled prompt)    y: first token of the true answer
    v = Σ_{(l,h) in A} W_o^lh ā_lh              A: 10 heads of largest mean IE; W_o^lh (d,D): o_proj's columns
    inference, no demonstrations:  h_l(last token) ← h_l(last token) + v    one layer l, chosen on dev

v is added in every pass: to the prompt's last token, then to each generated one. Clean prompts: 100 training
samples behind 10 demonstrations, whose answer the model begins right. 25 shuffled prompts: queries of these,
new demonstrations with their answers permuted. A patched head changes nothing but the last token, so all
before it is computed once a prompt, and the heads of a layer are rows of a batch of single tokens.
"""

import copy
import random
from dataclasses import replace

import torch
from tqdm import tqdm

from baselines.task_vector import TaskVector, best_layer
from data import ANSWER, chunks, draw, encode_images, prompts, row
from model import KVCache, Shifts
from support.files import InputError

PROMPTS = 100                 # clean prompts
SHUFFLED = 25                 # prompts with shuffled answers
HEADS = 10                    # |A|


class FunctionVector(TaskVector):
    """`model.generate(…, shifts=vector)`: vector (d) is added to the last token's state after `layer`."""
    shots, least = 10, 2          # with one demonstration there is nothing to shuffle

    def patched(self, last):
        return last + self.vector.to(last)

    while_decoding = Shifts.while_decoding

    @classmethod
    @torch.no_grad()
    def prepare(cls, model, processor, template, pool, queries, shots, seed, batch_size, dev_score):
        """→ no demonstrations for any query, and the function vector; dev_score chooses the layer."""
        features = encode_images(model, processor, pool, {}, "encode images")

        def first_token(query):              # of the true answer, written as demonstrations write it
            ids, parts = row(processor, replace(template, separator=""), [], query)
            return ids[parts.index(ANSWER)]

        # 1. ā: the mean head outputs of clean prompts that the model gets right.
        total = 0.0
        right = []
        order = random.Random(f"{seed}-clean").sample(pool, len(pool))
        for asked in tqdm(chunks(order, batch_size), desc="clean prompts", unit="batch"):
            reader = HeadReader()
            rows = prompts(asked, draw(pool, asked, shots, f"{seed}-clean"), processor, template)
            states = model.hidden_states(**rows.inputs(model, features), shifts=reader, last=1)
            said = model.lm_head(states[:, -1]).argmax(-1).tolist()
            new = [i for i, q in enumerate(asked) if said[i] == first_token(q)][:PROMPTS - len(right)]
            total = total + torch.stack(reader.outputs)[:, new].sum(1)                   # (L,H,D)
            right += [asked[i] for i in new]
            if len(right) == PROMPTS:
                break
        if not right:
            raise InputError("--method function-vector: expected prompts that the model gets right with "
                             f"{shots} demonstrations, found none in {len(pool)}")
        values = total / len(right)

        # 2. The heads with the largest mean indirect effect.
        effects = 0.0
        shuffled = right[:SHUFFLED]
        for query in tqdm(shuffled, desc="indirect effects", unit="prompt"):
            icds, = draw(pool, [query], shots, f"{seed}-shuffled")
            targets = random.Random(f"{seed}-targets-{query.id}").sample([s.target for s in icds], shots)
            icds = [replace(s, target=target) for s, target in zip(icds, targets, strict=True)]
            prompt = prompts([query], [icds], processor, template).inputs(model, features)
            effect = indirect_effects(model, prompt, first_token(query), values)
            effects = effects + effect / len(shuffled)
        largest = effects.flatten().sort(descending=True, stable=True).indices[:HEADS].tolist()
        heads = [divmod(i, effects.shape[1]) for i in largest]
        shown = ", ".join(f"{layer}.{head} {effects[layer, head]:.4f}" for layer, head in heads)
        print(f"function-vector: {len(right)} prompts answered right; layer.head with its effect: {shown}")

        # 3. The vector, and the layer behind which it helps most.
        vector = sum_of_heads(model, heads, values)
        candidates = [cls(vector, layer) for layer in range(len(values))]
        return [[]] * len(queries), best_layer("function-vector", candidates, dev_score)


class HeadReader(Shifts):
    """Keeps the head outputs of one pass at its last token: .outputs, one (B,H,D) tensor a layer."""
    def __init__(self):
        self.outputs = []

    def after_attention(self, layer, q, k, out, lse):
        self.outputs.append(out[:, :, -1].float())
        return out


class HeadPatch(Shifts):
    """Of H equal rows in row h the layer's head h gives values[h] at the last token; values (H,D)."""
    def __init__(self, layer, values):
        self.layer = layer
        self.values = values

    def after_attention(self, layer, q, k, out, lse):
        if layer == self.layer:
            every = range(len(self.values))
            out = out.clone()
            out[every, every, -1] = self.values.to(out.dtype)
        return out


def indirect_effects(model, prompt, gold, values):
    """IE of every head for one prompt (of `Rows.inputs`, one row) and its gold token → (L,H) on the CPU."""
    L, H = values.shape[:2]
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    before = KVCache(L, ids.shape[1])
    model.hidden_states(ids[:, :-1], mask[:, :-1], prompt["image_features"], cache=before)

    def p(n, shifts):                                            # of the gold token, in each of n rows
        cache = copy.deepcopy(before)
        cache.repeat(n)
        last = ids[:, -1:].expand(n, 1)
        states = model.hidden_states(last, mask.expand(n, -1), cache=cache, shifts=shifts)
        return model.lm_head(states[:, -1]).float().softmax(-1)[:, gold]

    patched = torch.stack([p(H, HeadPatch(layer, values[layer])) for layer in range(L)])
    return (patched - p(1, None)).cpu()


def sum_of_heads(model, heads, values):
    """v = Σ W_o^lh ā_lh over heads [(l, h)], from values (L,H,D) → (d) fp32."""
    v = 0.0
    for layer, head in heads:
        w_o = model.text_model.layers[layer].self_attn.o_proj.weight.unflatten(1, (-1, values.shape[-1]))
        v = v + w_o[:, head].float() @ values[layer, head]
    return v
