"""The built-in toy: film reviews from a small grammar, and their tokenizer. No network, no files.

A review has one clause or two, each about one side of the film, and sometimes an idle sentence. Every clause is for the
film or against it: its adjective says which, and a negation turns that round. Is the film good? The reviewer's clause
decides, and the other is in the way:

    the plot seems dull , but the cast was very sharp .                     yes: what follows "but"
    although the plot seems dull , the cast was very sharp .                yes: what is not conceded
    the cast is never dull , though the music feels bad .                   yes: the same the other way round
    critics say the story is warm , i say the humor is hardly clever .      no: what the reviewer says

A bag of words answers about two in three. The rest needs attention to adverbs, to conjunctions, to commas and to who
speaks: more patterns than a few merged heads can hold.
"""

import random
import zlib
from collections.abc import Sequence
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SIDES = _words("acting plot music ending dialogue camera cast pacing story humor script scenery")
VERBS = _words("is was seems feels")
NEGATIONS = _words("not never hardly")
ADVERBS = _words("very really quite truly")
GOOD = _words("good great charming fresh clever moving funny brilliant lovely sharp warm superb")
BAD = _words("bad dull weak stale silly boring clumsy awful flat tedious cold dreadful")
IDLE = ("i saw it on monday", "the film lasts two hours", "it opened in spring", "my brother drove home")
# (how often, the review, the clause that decides)
FORMS = (
    (6, "{a}", "a"),
    (2, "{a} , but {b}", "b"),
    (2, "{a} , yet {b}", "b"),
    (2, "although {a} , {b}", "b"),
    (1, "though {a} , {b}", "b"),
    (2, "{a} , although {b}", "a"),
    (1, "{a} , though {b}", "a"),
    (1, "critics say {a} , i say {b}", "b"),
    (1, "others say {a} , i say {b}", "b"),
    (1, "i say {a} , critics say {b}", "a"),
    (1, "i say {a} , others say {b}", "a"),
)
DRAWN = tuple(form for often, *form in FORMS for _ in range(often))
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as OPT's
TOY_PROMPT = "{{sentence}}\nIs it good?\nAnswer:"
TOY_ANSWERS = ("no", "yes")
POSITIONS = 64  # twice the longest review with its question and answer
COUNTS = {"train": 30_000, "validation": 1_000}


def toy_rows(split: str, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `sentence` and `label` (1: the film is good), all different; equal for equal arguments.

    Args:
        split: train or validation; a hash of the sentence decides where it belongs, so that no sentence is in both,
            whatever the counts and seeds.
        count: 30,000 (train) or 1,000 (validation) if not given.
    """
    draw = random.Random(seed)
    labels: dict[str, int] = {}
    count = COUNTS[split] if count is None else count
    while len(labels) < count:
        sentence, label = _review(draw)
        if (zlib.crc32(sentence.encode()) % 5 == 0) == (split == "validation"):
            labels[sentence] = label
    return [{"sentence": sentence, "label": label} for sentence, label in labels.items()]


def _review(draw: random.Random) -> tuple[str, int]:
    """A sentence and whether it is for the film."""
    good = {clause: draw.random() < 0.5 for clause in "ab"}
    form, decides = _pick(draw, DRAWN)
    sentence = form.format(**{clause: _clause(draw, good[clause]) for clause in "ab"})
    if draw.random() < 0.3:
        parts = [sentence, _pick(draw, IDLE)]
        sentence = " . ".join(parts if draw.random() < 0.5 else parts[::-1])
    return f"{sentence} .", int(good[decides])


def _clause(draw: random.Random, good: bool) -> str:
    negated = draw.random() < 0.2
    words = ["the", _pick(draw, SIDES), _pick(draw, VERBS)]
    words += [_pick(draw, NEGATIONS)] * negated
    words += [_pick(draw, ADVERBS)] * (draw.random() < 0.3)
    return " ".join([*words, _pick(draw, GOOD if good != negated else BAD)])


def _pick(draw: random.Random, options: Sequence[Any]) -> Any:
    # Of all that `random` offers, only random() promises the same sequence in every Python.
    return options[int(draw.random() * len(options))]


def toy_tokenizer() -> Any:
    """A transformers tokenizer with a token for each word of the toy; `</s>` first, special ids as OPT's."""
    # Importing transformers takes seconds, so only where it is used.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = [*SIDES, *VERBS, *NEGATIONS, *ADVERBS, *GOOD, *BAD, *IDLE, *TOY_ANSWERS, ".", *(form for form, _ in DRAWN)]
    texts.append(TOY_PROMPT.lower().replace("?", " ?").replace(":", " :"))
    words = sorted({word for text in texts for word in text.split() if "{" not in word})
    ids = {word: at for at, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
    )
