"""Train a small OPT from nothing on public text and tasks: a model to repeat the experiments on.

    python experiments/train_test_model.py --text $DATA/corpus/train.jsonl.gz $DATA/wikitext2/validation.txt.gz \
        --task sst2,rte,piqa --data-dir $DATA --layers 8 --heads 8 --width 256 --vocabulary 8192 --steps 2800 \
        --out models/opt-mini
    python experiments/train_test_model.py ... --tokenizer models/opt-mini --layers 4 --width 128 --out models/opt-micro

Texts are local files (.txt, or .jsonl with a field `text`; gzipped or not); tasks come from --data-dir or, without it,
from the Hugging Face hub, as *train* rows in the prompts of the lm-evaluation-harness. Nothing of a validation split is
trained on, and no WikiText-2 test text should be given. A byte-level BPE is trained on the same texts and prompts, or
taken from a folder, so that two models share one vocabulary. `--task-share` of the examples are tasks, of which the
loss sees the answer alone; the rest are windows of text, of which it sees every token. Training is that of `chai-jax
run` (AdamW, linear decay), resumed from its checkpoints when the same command is given again.

Expected, with the first command (some hours on two cores): SST-2 about 80 %, RTE and PIQA a little above chance.
Writes a folder in Hugging Face layout (float16), and beside it OUT.scores.json; the last line on stdout are its scores.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from chai_jax.adapt.finetune import finetune
from chai_jax.commands.options import read
from chai_jax.commands.streams import complain
from chai_jax.config import Checkpoints, FinetuneConfig, TrainConfig
from chai_jax.console import console, track
from chai_jax.data.batches import Encoded, encode
from chai_jax.data.multiple_choice import Task
from chai_jax.data.tasks import get_tasks, load_rows
from chai_jax.data.text import windows
from chai_jax.data.toy import SPECIAL
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import evaluate
from chai_jax.files.atomic import claim_folder, new_folder, write_json
from chai_jax.files.export import export
from chai_jax.files.store import load
from chai_jax.files.tokenizer import load_tokenizer
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.run.environment import versions, where_computed
from lab.options import Record
from lab.texts import documents


@dataclass(frozen=True)
class Training:
    """Shape, data and training of the model."""

    text: tuple[Path, ...]
    """Files to train on."""
    out: Path
    """Folder of the model."""
    task: str = "sst2"
    """Tasks to train on and to be scored on at the end, with commas."""
    data_dir: Path | None = None
    """Folder holding TASK/{train,validation}.jsonl[.gz]; without it, the data comes from the Hugging Face hub."""
    tokenizer: Path | None = None
    """Folder of a tokenizer to use; without it one is trained."""
    vocabulary: int = 8192
    """Tokens of the tokenizer that is trained."""
    layers: int = 8
    heads: int = 8
    width: int = 256
    """Of the hidden states; the feed-forward part is four times as wide."""
    positions: int = 512
    """Tokens the model can read."""
    steps: int = 2800
    """Updates."""
    batch: int = 32
    """Examples of an update."""
    accumulation: int = 1
    """Microbatches of an update."""
    window: int = 256
    """Tokens of an example of text."""
    lr: float = 1e-3
    """Peak (first) learning rate."""
    task_share: float = 0.5
    """Part of the examples that are task rows."""
    checkpoint_minutes: float = 10.0
    """Save the state of training so often."""
    limit: int | None = None
    """Score on the first N validation examples only."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be, before any work.

        Raises:
            InputError: naming the option.
        """
        if not 0 <= self.task_share <= 1:
            raise InputError(f"--task-share is {self.task_share}; expected a fraction from 0 to 1")
        if self.width % self.heads:
            raise InputError(f"--width is {self.width}, --heads {self.heads}; expected heads that divide the width")
        if not 2 <= self.window <= self.positions:
            raise InputError(f"--window is {self.window}; expected 2 to --positions, {self.positions}")
        if not self.text:
            raise InputError("no text is given; expected one or more files: --text FILE")

    @property
    def tasks(self) -> list[Task]:
        return get_tasks("--task", self.task)


def prompts(training: Training) -> Iterator[tuple[str, str]]:
    """Context and right answer of every training row."""
    for task in training.tasks:
        for row in load_rows(task, "train", training.data_dir):
            example = task.question(row).example
            yield example.context, example.completion


def train_tokenizer(texts: Sequence[str], vocabulary: int, positions: int, folder: Path) -> None:
    """Train a byte-level BPE as OPT's (`</s>` in front, special ids 0 to 3), and write its files to `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(SPECIAL) + len(alphabet):
        raise InputError(
            f"--vocabulary is {vocabulary}; expected at least {len(SPECIAL) + len(alphabet)}: every byte has a token"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=console.is_terminal,
    )
    bpe.train_from_iterator(texts, trainer, len(texts))
    with new_folder(folder) as made:
        bpe.model.save(str(made))
        write_json(
            made / "tokenizer_config.json",
            {
                "tokenizer_class": "GPT2Tokenizer",
                "bos_token": "</s>",
                "eos_token": "</s>",
                "unk_token": "</s>",
                "pad_token": "<pad>",
                "add_bos_token": True,
                "add_prefix_space": False,
                "model_max_length": positions,
            },
        )


def examples(
    training: Training, tokenizer: Any, texts: Sequence[str], asked: Sequence[tuple[str, str]]
) -> list[Encoded]:
    """As many examples as the updates need: task rows and windows of text, each drawn in rounds without repetition."""
    total = training.steps * training.batch
    of_tasks = round(training.task_share * total) if asked else 0
    cut = [part for text in track(texts, "Tokenizing") for part in windows(tokenizer, text, training.window)]
    cut = [part for part in cut if len(part.tokens) > 1]
    random = np.random.default_rng(training.seed)
    chosen = [cut[at] for at in rounds(random, len(cut), total - of_tasks)]
    rows = [asked[at] for at in rounds(random, len(asked), of_tasks)]
    return chosen + [encode(tokenizer, *row, training.positions) for row in track(rows, "Tokenizing tasks")]


def rounds(random: np.random.Generator, size: int, count: int) -> list[int]:
    """`count` numbers below `size`: one shuffle after the other."""
    if not size:
        return []
    shuffles = [random.permutation(size) for _ in range(-(-count // size))]
    return [int(at) for shuffle in shuffles for at in shuffle][:count]


def untrained(training: Training, folder: Path) -> Model:
    """A random model of the shape asked for with the tokenizer in `folder`."""

    def shaped(vocabulary: int) -> Architecture:
        ffn = 4 * training.width
        return Architecture(
            vocabulary, training.width, training.layers, training.heads, ffn, training.positions, training.width
        )

    tokenizer = load_tokenizer(folder, shaped(sys.maxsize))
    if tokenizer is None:
        raise InputError(f"{folder} holds no tokenizer; expected vocab.json and merges.txt: choose another --tokenizer")
    config = shaped(-(-len(tokenizer) // 8) * 8)
    spec = Spec.dense(training.layers, training.heads, config.head_dim)
    # Wider than OPT's 0.02, which at such widths leaves the first hundred updates without a gradient to speak of.
    params = init(config, spec, jax.random.key(training.seed), std=training.width**-0.5)
    return Model(config, spec, params, tokenizer, training.out.name)


def train(training: Training) -> Record:
    """Tokenizer, training, folder, scores."""
    training.check()
    claim_folder(training.out)
    texts = [text for path in training.text for text in documents(path)]
    asked = list(prompts(training))
    work = training.out.with_name(f"{training.out.name}.partial")
    tokenizer = training.tokenizer or work / "tokenizer"
    if training.tokenizer is None and not tokenizer.exists():
        spoken = [*texts, *(context + answer for context, answer in asked)]
        train_tokenizer(spoken, training.vocabulary, training.positions, tokenizer)
    model = untrained(training, tokenizer)
    wanted = examples(training, model.tokenizer, texts, asked)
    settings = TrainConfig(
        lr=training.lr,
        batch=training.batch,
        accumulation=training.accumulation,
        epochs=1,
        max_steps=training.steps,
        seed=training.seed,
    )
    saving = Checkpoints(work / "checkpoints", minutes=training.checkpoint_minutes)
    tuned = finetune(model, wanted, FinetuneConfig(settings), checkpoints=saving)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tuned.params)
    export(tuned.replace(params=half), training.out)
    shutil.rmtree(work)
    return report(training, len(wanted))


def report(training: Training, seen: int) -> Record:
    """Score the model as it was written, on validation splits that it has not seen."""
    model = load(training.out)
    scores = {}
    for task in training.tasks:
        metrics = evaluate(model, task, data_dir=training.data_dir, limit=training.limit).metrics()
        scores[task.name] = {name: metrics[name] for name in ("acc", "acc_stderr", "acc_interval", "n", "at_chance")}
    about = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "examples": seen,
        "training": {
            name: [each.name for each in value] if name == "text" else value.name if isinstance(value, Path) else value
            for name, value in vars(training).items()
        },
    }
    record = {"model": training.out.name, "scores": scores, **about, **where_computed(), "versions": versions()}
    write_json(training.out.with_name(f"{training.out.name}.scores.json"), record)
    return record


def main() -> int:
    try:
        print(json.dumps(train(read(Training, None, description=__doc__))))
    except InputError as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
