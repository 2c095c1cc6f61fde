"""Everything that the entropy-model families share. See docs/architecture.md for the rooms."""

import os

# TensorFlow's start-up notices (CUDA not found, CPU features) hide what matters. Errors are raised
# as Python exceptions at any level; TF_CPP_MIN_LOG_LEVEL=0 brings the notices back.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
