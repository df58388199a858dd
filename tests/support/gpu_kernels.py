"""Where the tests run the Triton kernels: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import support.interpreter  # noqa: F401 (mends the interpreter)
import torch
from charonia_kernels.gpu._launch import INTERPRETED

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda")
