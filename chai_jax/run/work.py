"""The data of a run: a labelled task or a text, in disjoint parts for training, calibration, choices and measuring."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from chai_jax.config import RunConfig
from chai_jax.data.batches import Encoded, Example, Windows, encode
from chai_jax.data.multiple_choice import Row, Task
from chai_jax.data.tasks import TASKS, get_task, held_out, load_rows
from chai_jax.data.text import read_text_file, split_corpus
from chai_jax.data.tokens import require_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import Result, TextResult, evaluate_rows, evaluate_windows
from chai_jax.model.model import Model
from chai_jax.sources import source_of

TEXT_WINDOW = 256  # tokens, or as many as the model takes
HELD_OUT = 512  # training rows kept back to judge by, beside those for calibration
Measured = Result | TextResult


@dataclass(frozen=True)
class Work:
    """The parts of a run's data.

    Attributes:
        training: what is trained on.
        calibration: token windows for the probe; never trained on, never measured.
        measure: scores a model on the validation examples (or the text's last part).
        judge: scores a model on held-out training examples; choices are made by these.
        recall: makes a measured result from its samples.
        labelled: whether it is a task, on which a model can be at chance.
        pad: the model's padding token.
        about: what records say of where the task is described (see `Task.about`).
    """

    name: str
    training: Sequence[Example | Encoded]
    calibration: Sequence[Sequence[int]]
    measure: Callable[[Model], Measured]
    judge: Callable[[Model], Measured]
    recall: Callable[[Sequence[dict[str, object]]], Measured]
    labelled: bool
    pad: int
    about: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> Windows:
        """The calibration windows as arrays."""
        return Windows.stack(self.calibration, self.pad)


def task_of(config: RunConfig) -> Task | None:
    """The task that a run works on; None where it is a text.

    Raises:
        InputError: neither is asked for, or both are; there is no such task.
    """
    task = config.task or (None if config.text else source_of(config.model).task)
    if (task is None) == (config.text is None):
        raise InputError(
            f"give either --task ({', '.join(TASKS)}, or a file NAME.yaml) or --text FILE, so that there is something "
            "to work on"
        )
    return None if task is None else get_task(task)


def open_work(config: RunConfig, model: Model) -> Work:
    """Read the run's data.

    Raises:
        InputError: no data asked for or two kinds, no tokenizer to read them with, or what reading them raises.
    """
    task = task_of(config)
    require_tokenizer(model.tokenizer, config.model)
    return _text_work(config, model) if task is None else _task_work(task, config, model)


def _task_work(task: Task, config: RunConfig, model: Model) -> Work:
    train = load_rows(task, "train", config.data_dir)
    validation = load_rows(task, "validation", config.data_dir, config.limit)
    kept, rest = held_out(train, HELD_OUT + config.planning.calibration, config.seed)
    looked_at = min(config.planning.calibration, len(kept) // 2)
    calibration, judged = kept[:looked_at], kept[looked_at:]
    if min(len(calibration), len(judged), len(validation)) < 2:
        raise InputError(
            f"{task.name} has {len(train)} training and {len(validation)} validation rows; expected more of both"
        )

    def tokens(row: Row) -> tuple[int, ...]:
        example, longest = task.question(row).example, model.config.max_positions - 1
        return encode(model.tokenizer, example.context, example.completion, longest, cut_completion=True).tokens

    return Work(
        name=task.name,
        training=[task.question(row).example for row in rest],
        calibration=[tokens(row) for row in calibration],
        measure=partial(evaluate_rows, task=task, rows=validation, seed=config.seed),
        judge=partial(evaluate_rows, task=task, rows=judged, seed=config.seed),
        recall=Result.from_samples,
        labelled=True,
        pad=model.config.pad_token_id,
        about=task.about,
    )


def _text_work(config: RunConfig, model: Model) -> Work:
    length = min(TEXT_WINDOW, model.config.max_positions)
    corpus = split_corpus(model.tokenizer, read_text_file(str(config.text)), length, config.planning.calibration)
    judged = min(HELD_OUT, len(corpus.training) // 4)
    return Work(
        name=str(config.text),
        training=corpus.training[judged:],
        calibration=[window.tokens for window in corpus.calibration],
        measure=partial(evaluate_windows, encoded=corpus.evaluation[: config.limit]),
        judge=partial(evaluate_windows, encoded=corpus.training[:judged]),
        recall=TextResult.from_samples,
        labelled=False,
        pad=model.config.pad_token_id,
    )
