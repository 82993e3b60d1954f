from helpers.training_fixtures import model, other_model, world

__all__ = ["model", "other_model", "world"]
