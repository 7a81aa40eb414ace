import logging

# accelerate imports DeepSpeed wherever it is installed, and DeepSpeed warns on every machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
