"""Does a model here compute what transformers computes with torch: logits, perplexity, texts?

    python experiments/agree_with_torch.py $MODEL --text wiki.test.raw --out runs/as_torch

Needs torch. Both read the model in float32 on the CPU (`--theirs FOLDER` gives torch another folder: what
`chai-jax export` made of $MODEL).

- windows: the first --windows windows of the text, of --window tokens each, as `chai-jax evaluate --text` cuts it: the
  largest difference of a logit over all their tokens, and the perplexity of both.
- texts: greedy continuations of --prompts beginnings of paragraphs, --tokens tokens each, with our cache. Where two
  texts part, the margin of torch's choice there is given: below 1e-3 either token is right.

Expected: logits within 1e-3, perplexities equal to five digits, equal texts. Writes agreement.json; exits with 1 where
something disagrees. The last line on stdout is the record as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.console import track
from chai_jax.data.batches import Encoded
from chai_jax.data.text import read_text_file, windows
from chai_jax.data.tokens import require_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import evaluate_windows
from chai_jax.files.atomic import write_json
from chai_jax.files.store import load
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.run.environment import versions, where_computed
from chai_jax.serve.generate import generate_tokens

LOGITS = 1e-3
RELATIVE = 1e-5  # of a perplexity
NARROW = 1e-3  # nats between the two best tokens
SHORTEST = 200  # characters of a paragraph that gives a prompt

Record = dict[str, Any]


def compare_windows(torchs: Any, ours: Model, encoded: list[Encoded]) -> Record:
    """Logits and losses of both on the same windows."""
    import torch

    mine, nats, worst = evaluate_windows(ours, encoded, batch_size=4), 0.0, 0.0
    for one in track(encoded, "Reading with torch"):
        tokens = np.asarray([one.tokens])
        with torch.no_grad():
            logits = torchs(torch.tensor(tokens.astype(np.int64))).logits[0].double()
        worst = max(worst, float(np.abs(logits.numpy() - np.asarray(ours(tokens.astype(np.int32))[0])).max()))
        logprobs = torch.log_softmax(logits, -1)
        nats -= float(logprobs[np.arange(len(one.tokens) - 1), one.tokens[1:]].sum())
    found = mine.metrics()
    theirs = float(np.exp(nats / found["n"]))
    return {
        "windows": len(encoded),
        "n": found["n"],
        "perplexity": {"torch": theirs, "chai_jax": found["perplexity"], "stderr": found["perplexity_stderr"]},
        "max_logit_difference": worst,
        "agrees": abs(found["perplexity"] / theirs - 1) < RELATIVE and worst < LOGITS,
    }


def compare_texts(torchs: Any, ours: Model, prompts: list[list[int]], tokens: int) -> Record:
    """Greedy continuations; where they part, and by how little torch chose."""
    import torch

    found, parted = generate_tokens(ours, prompts, max_new_tokens=tokens, stop=False), []
    rule: Record = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for number, (prompt, mine) in enumerate(track(list(zip(prompts, found, strict=True)), "Writing with torch")):
        given = torch.tensor([prompt])
        text = torchs.generate(given, attention_mask=torch.ones_like(given), **rule, eos_token_id=None)
        theirs = text[0, len(prompt) :].tolist()
        if theirs != mine:
            at = next(at for at, pair in enumerate(zip(theirs, mine, strict=True)) if pair[0] != pair[1])
            with torch.no_grad():
                best = torch.log_softmax(torchs(text[:, : len(prompt) + at]).logits[0, -1], -1).topk(2).values
            parted.append({"prompt": number, "token": at, "margin": float(best[0] - best[1])})
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "equal": len(prompts) - len(parted),
        "parted": parted,
        "agrees": all(one["margin"] < NARROW for one in parted),
    }


def agreement(chosen: argparse.Namespace) -> Record:
    """Both comparisons."""
    import torch
    from transformers import AutoModelForCausalLM

    ours = load(chosen.model, execution=Execution.choose("float32"))
    tokenizer, text = require_tokenizer(ours.tokenizer, ours.source), read_text_file(chosen.text)
    folder = chosen.theirs or chosen.model
    torchs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    paragraphs = [line.strip() for line in text.splitlines() if len(line) > SHORTEST]
    step = max(1, len(paragraphs) // chosen.prompts)
    prompts = [list(tokenizer(line)["input_ids"][:32]) for line in paragraphs[::step][: chosen.prompts]]
    return {
        "windows": compare_windows(torchs, ours, windows(tokenizer, text, chosen.window)[: chosen.windows]),
        "texts": compare_texts(torchs, ours, prompts, chosen.tokens),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--theirs", help="folder that torch reads (default: the same)")
    parser.add_argument("--text", type=Path, required=True, help="a text file, gzipped or not")
    parser.add_argument("--windows", type=int, help="only the first windows")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="texts to continue (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of a continuation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/as_torch"))
    chosen = parser.parse_args(arguments)
    try:
        record = agreement(chosen)
        write_json(chosen.out / "agreement.json", {**record, "versions": versions(), **where_computed()})
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(record))
    return 0 if all(part["agrees"] for part in record.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
