"""Training: data, checkpoints, the loop, and the comparison of an optimized model with its original."""

from .checkpoint import CheckpointError
from .config import TrainConfig, learning_rate
from .corpus import embedded_corpus
from .data import TokenDataset, open_dataset, unigram_nats
from .interrupt import TrainingInterrupted
from .loop import DivergedError, TrainResult, train
from .models import default_config, default_model, load_model
from .parts import evaluate
from .story import run_training

__all__ = [
    "CheckpointError",
    "DivergedError",
    "TokenDataset",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "default_config",
    "default_model",
    "embedded_corpus",
    "evaluate",
    "learning_rate",
    "load_model",
    "open_dataset",
    "run_training",
    "train",
    "unigram_nats",
]
