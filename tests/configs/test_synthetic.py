"""The synthetic configs fit their data, train, and measure accuracy."""

from pathlib import Path

import pytest

from rat_cli.main import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "synthetic").glob("[!b]*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_training_and_a_test(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false", "--data.init_args.batch_size=2"]
    main(["fit", "--config", str(path), *quick])
    main(["test", "--config", str(path), *quick])
    assert "test/sequence_accuracy" in capsys.readouterr().out
