"""Twenty kills at random moments leave no trace in a training's result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "kill.py"


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["identical"]
    assert found["same_losses"]
    assert found["each_step_logged_once"]
    # Steps since the last whole checkpoint: one interval, and one more where the next was still being written.
    assert max(found["lost_updates"]) <= 2 * found["checkpoint_every"]
