"""Scoring questions of one length: ours alone."""

from typing import Any

import jax

from chai_jax.bench.race import Shape, clock, split_questions
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.score.loglikelihood import target_logprobs


class Scored:
    """This package's scoring program at one shape (see `Shape`), compiled, with its inputs.

    Args:
        params: the model's, as they are multiplied (`serving_params`).

    Attributes:
        bytes: `weights_resident`.
    """

    framework = "chai_jax"

    def __init__(self, model: Model, params: Params, shape: Shape, seed: int) -> None:
        self.shape, self.params = shape, params
        self.questions = split_questions(shape.inputs(model.config.vocab_size, seed)[1])
        what = model.config, model.spec, model.how, self.params, self.questions[0]
        self.program: Any = target_logprobs.lower(*what).compile()
        self.bytes = {"weights_resident": sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))}

    def lap(self) -> list[float]:
        """Milliseconds a question."""
        milliseconds, self.answers = clock(lambda: [self.program(self.params, piece) for piece in self.questions])
        return [milliseconds / self.shape.batch]
