"""scripts/accelerate/*.yaml as accelerate itself reads them: every key known, every choice arrives.

What runs with them is in tests/converters/test_uptrain_processes.py; DeepSpeed is not in the
environment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("accelerate")

FOLDER = ROOT / "scripts" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
Environment = Callable[[Path], dict[str, str]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """What `accelerate launch` would tell its processes; it refuses unknown keys and values."""
    from accelerate.commands import launch

    def found(file: Path) -> dict[str, str]:
        seen: list[dict[str, str]] = []
        monkeypatch.setattr(
            launch,
            "deepspeed_launcher",
            lambda args: seen.append(launch.prepare_deepspeed_cmd_env(args)[1]),
        )
        monkeypatch.setattr(
            launch,
            "multi_gpu_launcher",
            lambda args: seen.append(launch.prepare_multi_gpu_env(args)),
        )
        words = ["--config_file", str(file), "--main_process_port", "0", "script.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(words))
        [variables] = seen
        return variables

    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_takes_it(file: Path, environment: Environment) -> None:
    sharded = {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    found = environment(file)
    for by in ("FSDP", "DEEPSPEED"):
        used = found.get(f"ACCELERATE_USE_{by}") == "true"
        assert used == (sharded.get(file.stem) == by)
    assert f"scripts/accelerate/{file.name} scripts/uptrain.py" in file.read_text()


def test_control_an_unknown_key_is_refused(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FILES[0].read_text() + "number_of_processes: 2\n")
    with pytest.raises(ValueError, match="number_of_processes"):
        environment(tmp_path / "c.yaml")


def test_fsdp_is_version_two(environment: Environment) -> None:
    found = environment(FOLDER / "fsdp2.yaml")
    assert found["FSDP_VERSION"] == "2" and found["FSDP_RESHARD_AFTER_FORWARD"].lower() == "true"


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_is_given(
    stage: int, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By accelerate's own class, with what the recipe decides left to the Trainer."""
    from accelerate.utils import DeepSpeedPlugin

    variables = environment(FOLDER / f"deepspeed_zero{stage}.yaml")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(variables["ACCELERATE_MIXED_PRECISION"])
    given: dict[str, Any] = plugin.deepspeed_config
    assert given["bf16"]["enabled"]
    zero = given["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    for name in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert given[name] == "auto", name
