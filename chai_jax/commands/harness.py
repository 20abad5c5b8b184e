"""`chai-jax lm-eval`: a model in the lm-evaluation-harness."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional, Suppress

from chai_jax.config import DeviceConfig


@dataclass(frozen=True)
class LmEvalCommand:
    """Run a model through the lm-evaluation-harness (pip install 'chai_jax[eval]')."""

    model: Positional[str]
    """Hub id, folder, or `toy`. It comes first. All options but those below are the harness's own: --tasks,
    --num_fewshot, --limit, --batch_size, --output_path, --log_samples, ... (`lm-eval run --help` lists them)."""
    data_dir: Path | None = None
    """Folder with TASK/validation.jsonl for sst2, rte, piqa, hellaswag, TASK/train.jsonl for --num_fewshot,
    and wikitext2/test.raw.txt for wikitext, each plain or .gz. These tasks then need no network."""
    revision: str | None = None
    """Revision of a hub model."""
    arguments: Suppress[tuple[str, ...]] = ()
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.evaluation.lm_eval import run_harness
        from chai_jax.run.devices import start
        from chai_jax.run.environment import versions, where_computed

        execution = start(self.devices)
        found = run_harness(self.model, self.arguments, self.data_dir, self.revision, execution)
        return {**found, "software": versions(), **where_computed(execution)}
