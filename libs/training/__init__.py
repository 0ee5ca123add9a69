"""One training loop for every objective: `Trainer(..., objective=diffusion_loss)`."""

from .batches import Batch, Batches, load_training_data
from .loop import Trainer
from .objective import Objective, diffusion_loss
from .run import Run
from .setup import choose_precision, describe_trained, make_objective, new_network, start_network, validate

__all__ = ["Batch", "Batches", "Objective", "Run", "Trainer", "choose_precision", "describe_trained",
           "diffusion_loss", "load_training_data", "make_objective", "new_network", "start_network", "validate"]
