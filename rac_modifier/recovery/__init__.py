"""Recovery: the kept weights of a sparse model are trained towards the dense model's predictions, with the mask fixed."""
