"""Set up a worker's process before it imports torch."""

import os

from acpo_dist.core.packages import leave_out_bitsandbytes


def set_up(*, cpus: float, gpus: float) -> str:
    """Set thread counts, allocator and accelerator of this process.

    Returns:
        Device to use: `cuda` if Ray gave this worker a GPU, else `cpu`.
    """
    threads = str(max(1, int(cpus)))
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_out_bitsandbytes()
    if gpus <= 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
        from acpo_dist.core.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(int(threads))
    return "cuda" if gpus > 0 else "cpu"
