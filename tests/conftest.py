"""One thread in every test: the same sums in a process and in its forks, and no crowd on two cores."""

import torch

torch.set_num_threads(1)
