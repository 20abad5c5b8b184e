"""What each stage of a run does to a model, with the run's settings and data, and the record that is kept of it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from chai_jax.adapt.distil import distil
from chai_jax.adapt.finetune import finetune
from chai_jax.adapt.target import target
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.config import DistilConfig, FinetuneConfig, RunConfig, TargetConfig, TrainConfig
from chai_jax.console import console
from chai_jax.inputs.reading import Record
from chai_jax.model.cache import bytes_per_sequence, bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan
from chai_jax.plans.spec import Spec
from chai_jax.run.environment import versions, where_computed
from chai_jax.run.work import Work
from chai_jax.sources import source_of


@dataclass(frozen=True)
class Stages:
    """The steps from one model to the next, by one run's settings and data.

    Each returns a new model. `keeping` is the log and the checkpoints of its training.
    """

    config: RunConfig
    work: Work

    def dense(self, model: Model, **keeping: Any) -> Model:
        """The model to be compressed. It is tuned on the task first where `--finetune` says so."""
        wanted = self.config.finetune
        chance = self._at_chance(model)
        if wanted == "always" or (wanted == "auto" and chance):
            console.print("tuning the dense model on the task first" + (": it is at chance" if chance else ""))
            settings = FinetuneConfig(self.train(FinetuneConfig().train))
            model = finetune(model, self.work.training, settings, **keeping)
            chance = self._at_chance(model)
        if chance:
            console.print(
                "warning: on held-out training rows the dense model is not above the majority label by two standard "
                "errors; as a teacher and as a baseline it makes every later number meaningless",
                style="bold red",
            )
        return model

    def _at_chance(self, model: Model) -> bool:
        return self.work.labelled and self.work.judge(model).metrics()["at_chance"]

    def cluster(self, model: Model, plan: Plan) -> Model:
        return cluster(model, plan, self.work.text)

    def distil(self, model: Model, teacher: Model, **keeping: Any) -> Model:
        settings = DistilConfig(self.train(DistilConfig().train), cache_teacher=self.config.cache_teacher)
        return distil(model, teacher, self.work.training, settings, **keeping)

    def quantize(self, model: Model, plan: Plan) -> Model:
        return quantize(model, plan, self.work.text)

    def target(self, model: Model, plan: Plan, **keeping: Any) -> Model:
        settings = TargetConfig(self.train(TargetConfig().train), self.config.policy)
        return target(model, plan, self.work.training, settings, **keeping)

    def train(self, train: TrainConfig) -> TrainConfig:
        """A stage's training settings with what the run overrides."""
        usual = source_of(self.config.model).train.apply(train)
        return dataclasses.replace(self.config.train.apply(usual), seed=self.config.seed)

    def record(self, stage: str, model: Model, metrics: Record, seconds: float) -> Record:
        """What is recorded of a stage: metrics, bytes (of real arrays, and by formula), and where it ran."""
        config = model.config
        dense = {storage: bytes_per_token(Spec.of(config, storage)) for storage in ("bfloat16", "float32")}
        stored = model.kv_bytes_per_token
        return {
            "stage": stage,
            "task": self.work.name,
            **self.work.about,
            "metrics": metrics,
            "kv_bytes_per_token": stored,
            "kv_bytes_per_token_formula": bytes_per_token(model.spec),
            "kv_bytes_per_sequence": bytes_per_sequence(model.spec),
            "kv_bytes_per_token_dense_bfloat16": dense["bfloat16"],
            "kv_bytes_per_token_dense_float32": dense["float32"],
            "kv_reduction": 1 - stored / dense["bfloat16"],
            "model_bytes": model.nbytes,
            "seconds": round(seconds, 2),
            "seed": self.config.seed,
            **where_computed(model.how),
            "versions": versions(),
        }
