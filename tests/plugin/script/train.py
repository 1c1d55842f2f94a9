"""What a TorchRL user writes: TorchRL's configurations, Hydra, one line of training. It knows no pwm_torchrl."""

import hydra
import torchrl.trainers.algorithms.configs  # noqa: F401 - fills the ConfigStore


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    """Train, and say what was trained."""
    trainer = hydra.utils.instantiate(cfg.trainer)
    trainer.train()
    print(f"{type(trainer.loss_module).__name__}: {trainer.collected_frames} frames, {trainer._optim_count} updates")


if __name__ == "__main__":
    main()
