"""Settings as frozen dataclasses: of a run, and of each training stage. How the command line shows them is not here."""

from chai_jax.config.checks import check_seed as check_seed
from chai_jax.config.run import STAGES as STAGES
from chai_jax.config.run import DeviceConfig as DeviceConfig
from chai_jax.config.run import PlanConfig as PlanConfig
from chai_jax.config.run import RunConfig as RunConfig
from chai_jax.config.run import RunOptions as RunOptions
from chai_jax.config.run import TrainOverrides as TrainOverrides
from chai_jax.config.stages import Checkpoints as Checkpoints
from chai_jax.config.stages import DistilConfig as DistilConfig
from chai_jax.config.stages import FinetuneConfig as FinetuneConfig
from chai_jax.config.stages import StageConfig as StageConfig
from chai_jax.config.stages import TargetConfig as TargetConfig
from chai_jax.config.stages import TrainConfig as TrainConfig
