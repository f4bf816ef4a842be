from lightning import LightningModule, Trainer

from derain.callbacks import FinalWeights


def test_a_warning_without_checkpoints_to_take_the_weights_from(tmp_path, caplog):
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    FinalWeights().on_fit_end(trainer, LightningModule())
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "derain"]
    assert "BestCheckpoint" in warning
    assert not list(tmp_path.iterdir())
