"""Recovery: train kept weights towards the dense model's predictions; the mask is fixed."""
